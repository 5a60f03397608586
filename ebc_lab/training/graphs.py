"""A training step as a CUDA graph: launched as a whole instead of kernel by kernel (DESIGN: speed).

What a step is captured from must look for everything that changes from step to step (batch, learning rate, budget, optimizer
state) in memory that stays where it is, and read nothing on the host. `StepGraphs` keeps one graph for each kind of step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol

import torch

from .pending import Packed

WARM = 3  # steps taken eagerly first in a process: libraries set themselves up, optimizers make their state

Compute = Callable[[], Packed]


class Graph(Protocol):
    def replay(self) -> Packed: ...


class CudaGraph:
    """A captured step. Capturing computes nothing; `replay` does, on the current stream, and returns the graph's own output."""

    def __init__(self, compute: Compute, beside: Graph | None):
        self.graph = torch.cuda.CUDAGraph()
        # the graphs of one run are never under way at once, so that they can share their memory; other runs of this process
        # may allocate meanwhile, which only the strictest capture mode forbids
        pool = beside.graph.pool() if isinstance(beside, CudaGraph) else None
        with torch.cuda.graph(
            self.graph, pool=pool, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
        ):
            self.output = compute()

    def replay(self) -> Packed:
        self.graph.replay()
        return self.output


class StepGraphs:
    """Graphs by kind of step, captured when a kind first comes up. With `capture=None` every step is taken eagerly."""

    def __init__(self, capture: Callable[[Compute, Graph | None], Graph] | None = CudaGraph):
        self.capture = capture
        self.graphs: dict[Hashable, Graph] = {}
        self.seen = 0

    def wants(self, kind: Hashable | None) -> bool:
        """Whether this step is to come from a graph; every step is to be asked for, once."""
        self.seen += 1
        return self.capture is not None and kind is not None and self.seen > WARM

    def run(self, kind: Hashable, compute: Compute) -> Packed:
        """The step's values, from the graph of its kind."""
        if kind not in self.graphs:
            assert self.capture is not None
            self.graphs[kind] = self.capture(compute, next(iter(self.graphs.values()), None))
        return self.graphs[kind].replay()

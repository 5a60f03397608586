"""Training steps as CUDA graphs: one launch for a whole step instead of one for each kernel.

A captured step must find everything that changes from step to step (batch, learning rate, budget, optimizer
state) in memory that stays where it is, and must read nothing on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Protocol

import torch

from ebc_lab.components import optimizer as optimizers
from ebc_lab.components.hook import Hook
from ebc_lab.config.schema import RunConfig
from ebc_lab.ebc import StabilizedOptimizer
from ebc_lab.workloads import Workload

from .pending import Packed

WARM = 3  # first steps of a process, taken eagerly: libraries initialise, optimizers create their state

Compute = Callable[[], Packed]


def why_eager(
    run: RunConfig,
    optimizer: StabilizedOptimizer,
    workload: Workload,
    hooks: Sequence[Hook],
    *,
    held_back: bool,
    processes: int,
) -> Iterator[str]:
    """Name the settings for which no step of a run becomes a CUDA graph; with none of them most steps do.

    `held_back`: whether text that is held back chooses c. `processes`: that train the run.
    """
    if not optimizers.capturable(run.optimizer):
        yield f"optimizer={run.optimizer.name}"
    ebc = run.stabilizer.name == "ebc"
    said = {
        "stabilizer": f"budget={run.budget.name}" if ebc else f"stabilizer={run.stabilizer.name}",
        "projection": f"projection={run.projection.name}",
        "measure": f"budget.measure={run.budget.measure}",
    }
    yield from (said[name] for name in optimizer.never_captured())
    if not workload.capturable:
        text = run.workload.name == "gpt"
        yield f"model={run.model.name}" if text else f"workload={run.workload.name}"
    for hook in hooks:
        if not hook.graphed:
            yield type(hook).__module__.rpartition(".")[2]  # the name of its group in conf/
    if held_back:
        yield "budget.probe_tokens=held"
    if processes > 1:
        yield "launcher.processes_per_run"


class Graph(Protocol):
    def replay(self) -> Packed: ...


class CudaGraph:
    """A captured step. Capturing computes nothing; `replay` does, and always returns the same output tensors.

    `earlier`: another graph of the run, whose memory this one shares: two of them never run at the same time.
    """

    def __init__(self, compute: Compute, earlier: Graph | None):
        self.graph = torch.cuda.CUDAGraph()
        pool = earlier.graph.pool() if isinstance(earlier, CudaGraph) else None
        stream = torch.cuda.current_stream()
        # in the default mode no thread may allocate during a capture, but other runs of this process do
        with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.output = compute()

    def replay(self) -> Packed:
        self.graph.replay()
        return self.output


class StepGraphs:
    """A graph for each kind of step, captured when that kind first occurs; none with `capture=None`."""

    def __init__(self, capture: Callable[[Compute, Graph | None], Graph] | None = CudaGraph):
        self.capture = capture
        self.graphs: dict[Hashable, Graph] = {}
        self.seen = 0

    def wants(self, kind: Hashable | None) -> bool:
        """Whether the next step, of this kind, is taken from a graph. To be called once for every step."""
        self.seen += 1
        return self.capture is not None and kind is not None and self.seen > WARM

    def run(self, kind: Hashable, compute: Compute) -> Packed:
        """The values of a step, from the graph of its kind."""
        if kind not in self.graphs:
            assert self.capture is not None
            self.graphs[kind] = self.capture(compute, next(iter(self.graphs.values()), None))
        return self.graphs[kind].replay()

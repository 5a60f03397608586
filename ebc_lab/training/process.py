"""Settings of the process that trains: threads, reproducible kernels, memory, compilation; and what its runs
must not share: random numbers."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ebc_lab.components import numerics_of, stabilizers
from ebc_lab.config.schema import RunConfig

COMPILED_SHAPES = 256  # shapes and modes for which one process may compile a model
MALLOPT = {-1: 2**31 - 1, -3: 32 << 20}  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD at their largest, bytes


def set_up_torch(run: RunConfig) -> None:
    """Set threads, whose number changes bits on a CPU, the run's numerics and the allocator.

    Raises UserError where that would compute wrong bits here.
    """
    if torch.get_num_threads() != run.threads_per_run:
        torch.set_num_threads(run.threads_per_run)
    numerics_of(run).set_up(run)
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Tell glibc to keep the memory that a step frees for the next one. Without glibc this does nothing.

    By default it returns activations to the system and gets them back by thousands of page faults, which is a
    tenth of a step's time, more or less depending on the layout of the heap.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    for parameter, value in MALLOPT.items():
        mallopt(parameter, value)


class OwnRandomness:
    """torch's default generators as one run leaves them: of the runs that take turns in a process each draws
    on from its own numbers (dropout is all that draws).

    On a GPU the generator's state is a seed and an offset, kept on the host: nothing waits for it. A CUDA
    graph draws on from the offset that it finds at its replay, as the same step would eagerly.
    """

    def __init__(self, seed: int, device: torch.device):
        self.on_gpu = device.type == "cuda"
        torch.manual_seed(seed)
        self._keep()

    def _keep(self) -> None:
        self.host = torch.get_rng_state()
        self.gpu = torch.cuda.get_rng_state() if self.on_gpu else None

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """Within it, what torch draws by default are the run's next numbers."""
        torch.set_rng_state(self.host)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu)
        try:
            yield
        finally:
            self._keep()

    def state_dict(self) -> dict[str, Any]:
        return {"rng": self.host, "cuda_rng": self.gpu}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        torch.Generator().set_state(state["rng"])  # which raises where it is no state
        self.host = state["rng"]
        if self.on_gpu and state["cuda_rng"] is not None:
            self.gpu = state["cuda_rng"]


def forward_of(model: nn.Module, run: RunConfig) -> nn.Module:
    """What training calls: the model, or with `compile=on` the compiled model, compiled again for each shape.

    The shapes are those of the step, the probe rows and the audited rows (seconds each, once a process).
    Evaluations call the model itself, because their last batches have other shapes, and so does a run whose
    stabilizer hooks into layers.
    """
    if run.compile != "on" or run.stabilizer.name in stabilizers.HOOKED:
        return model
    # beyond torch's limit it silently runs eagerly: a run's bits would depend on the runs before it
    torch._dynamo.config.recompile_limit = COMPILED_SHAPES
    return torch.compile(model, dynamic=False)  # type: ignore[return-value]

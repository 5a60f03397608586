"""Settings of the process that trains: threads, reproducible kernels, memory, compilation."""

from __future__ import annotations

import ctypes

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

"""Settings of the process that trains: threads, reproducible kernels, memory, compilation."""

from __future__ import annotations

import ctypes
import os

import torch
from torch import nn

from ebc_lab.components import determinism, stabilizers
from ebc_lab.config.schema import RunConfig

COMPILED_SHAPES = 256  # shapes and modes for which one process may compile a model
MALLOPT = {-1: 2**31 - 1, -3: 32 << 20}  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD at their largest, bytes


def set_up_torch(run: RunConfig) -> None:
    """Set threads, whose number changes bits on a CPU, reproducible kernels, the allocator, and the engine of
    a run under verity. Raises UserError where that would compute wrong bits here."""
    if torch.get_num_threads() != run.threads_per_run:
        torch.set_num_threads(run.threads_per_run)
    asked = run.determinism.name == "torch"
    if asked or run.device == "cuda":
        repeat_bits(strict=asked)
    elif torch.are_deterministic_algorithms_enabled():  # an earlier run of this process asked for it
        torch.use_deterministic_algorithms(False)
    determinism.start(run)
    keep_freed_memory()


def repeat_bits(*, strict: bool = False) -> None:
    """Have a GPU give the same bits whatever else it computes, so that packed runs equal single ones.

    By default the backward pass of attention adds in the order in which blocks finish, and cuBLAS chooses its
    algorithm by the workspace of a stream; the workspace must be set before the first call of cuBLAS.
    `strict`: an operation that has no reproducible kernel raises RuntimeError, on a CPU too.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    torch.backends.cudnn.benchmark = False
    # each buffer would be written twice
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


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

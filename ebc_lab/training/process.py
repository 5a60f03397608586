"""The process that trains: threads, reproducible kernels, memory, compilation."""

from __future__ import annotations

import ctypes
import os

import torch
from torch import nn

from ebc_lab.components import stabilizers
from ebc_lab.config.schema import RunConfig

COMPILED_SHAPES = 256  # and modes, that one process may compile a model for


def set_up_torch(run: RunConfig) -> None:
    """Threads as the run's identity says: the thread count changes bits on a CPU."""
    if torch.get_num_threads() != run.threads_per_run:
        torch.set_num_threads(run.threads_per_run)
    if run.device == "cuda":
        repeat_bits()
    keep_freed_memory()


def repeat_bits() -> None:
    """Have a GPU give the same bits whatever else it is doing, so that packed runs equal single ones.

    Left alone, attention's backward adds in the order in which blocks happen to finish, and cuBLAS picks its way by the
    workspace that a stream was given; the latter has to be said before its first call.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # each buffer written twice


def keep_freed_memory() -> None:
    """Tell glibc to keep what a step frees for the next one.

    Left alone it gives activations back to the system and takes page faults to get them again: thousands a step, a tenth of
    the step's time, more or less by chance of the heap's layout. Elsewhere than on glibc this does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    for parameter, value in (
        (-1, 2**31 - 1),
        (-3, 32 << 20),
    ):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD at its largest
        mallopt(parameter, value)


def forward_of(model: nn.Module, run: RunConfig) -> nn.Module:
    """What training calls: the model, or under `compile=on` the model compiled, anew for each shape it meets.

    Those are the step's, the probe rows' and the audited rows' (some seconds each, once a process); evaluations, whose last
    batches have shapes of their own, call the model, and so does a run whose stabilizer listens to layers.
    """
    if run.compile != "on" or run.stabilizer.name in stabilizers.HOOKED:
        return model
    # beyond this limit it would go back to eager in silence: what a run computes would hang on the runs before it
    torch._dynamo.config.recompile_limit = COMPILED_SHAPES
    return torch.compile(model, dynamic=False)  # type: ignore[return-value]

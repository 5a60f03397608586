"""Runs that take turns in one process: what they yield, and how they end early. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, TypeVar

T = TypeVar("T")
# what torch says of a GPU that no process here can use now, whatever the run: another process has it for
# itself (compute mode EXCLUSIVE_PROCESS), it has fallen off the bus, its driver or its memory is broken
UNUSABLE = (
    "busy or unavailable",
    "No CUDA GPUs are available",
    "no CUDA-capable device is detected",
    "CUDA driver initialization failed",
    "CUDA unknown error",
    "Unexpected error from cudaGetDeviceCount()",
    "uncorrectable ECC error encountered",
)
OUT_OF_MEMORY = (
    "the memory of its GPU ran out"  # how DeviceFailed begins for a run that is to be tried on another
)
# of a run: it yields between blocks of steps, and its value is the result
Progress = Generator[None, None, dict[str, Any]]
Say = Callable[[str], None]


def quiet(text: str) -> None:
    """A `Say` for whoever is not listening."""


class Interrupted(Exception):
    """The run was asked to stop; its checkpoint is written."""


class DeviceFailed(Exception):
    """The GPU under a run is gone or broken, or one of the processes that train it is; says how. Another
    process may continue the run."""


def to_the_end(progress: Generator[None, None, T]) -> T:
    """Exhaust a generator, such as a run's `blocks`, and return its value."""
    while True:
        try:
            next(progress)
        except StopIteration as end:
            value: T = end.value
            return value

"""How a run ends before its result, and what torch says of a GPU that fails. No torch here."""

from __future__ import annotations

from collections.abc import Callable

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
Say = Callable[[str], None]


def quiet(text: str) -> None:
    """A `Say` for whoever is not listening."""


class Interrupted(Exception):
    """The run was asked to stop; its checkpoint is written."""


class DeviceFailed(Exception):
    """The GPU under a run is gone or broken, or one of the processes that train it is; says how. Another
    process may continue the run."""

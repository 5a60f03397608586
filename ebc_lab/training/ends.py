"""How a run ends before its result, and what torch says of a GPU that fails. No torch here."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

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
OUT_OF_MEMORY = "the memory of its GPU ran out"  # begins a DeviceFailed whose run is to be tried on another
Say = Callable[[str], None]


def quiet(text: str) -> None:
    """A `Say` for whoever is not listening."""


class Interrupted(Exception):
    """The run was asked to stop; its checkpoint is written."""


class DeviceFailed(Exception):
    """The GPU under a run is gone or broken, or one of the processes that train it is; says how. Another
    process may continue the run."""


def until_done(attempt: Callable[[Callable[[], bool]], dict[str, Any]]) -> dict[str, Any]:
    """Return the result of `attempt`, which trains until it is done or the function that it is given says to
    stop, and then raises Interrupted. A signal stops it. The signal's own handler then runs, and the attempt
    is made again; a signal without a handler lets Interrupted through.

    submitit's handlers requeue the job on USR2 (time-out, pre-emption) and ignore TERM: whether a kill or a
    restart follows is up to Slurm, and until then the run continues.
    """
    handlers: dict[int, Any] = {
        s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    }
    ends = (signal.SIGINT, signal.SIGTERM)
    heard = [s for s, handler in handlers.items() if callable(handler) or s in ends]
    asked: list[int] = []
    for s in heard:
        signal.signal(s, lambda number, _: asked.append(number))
    try:
        while True:
            try:
                return attempt(lambda: bool(asked))
            except Interrupted:
                while asked:
                    number = asked.pop(0)
                    if not callable(handlers[number]):
                        raise
                    handlers[number](number, None)
    finally:
        for s in heard:
            signal.signal(s, handlers[s])

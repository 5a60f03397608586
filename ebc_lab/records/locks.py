"""Lock files: who drives a study, who trains a run. The kernel frees them when a process dies."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ebc_lab.config.errors import UserError

from .paths import RunFiles


def locked(path: Path) -> bool:
    """Whether somebody holds this lock file; the look takes and writes nothing. Raises UserError where there are no locks."""
    try:
        with open(path, "rb") as f:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return True
        remedy = "mount its file system with locks, or choose another"
        raise UserError(f"{path} cannot be locked ({error.strerror}): {remedy}.") from None
    return False


@contextmanager
def run_lock(directory: Path) -> Iterator[bool]:
    """Try to be the only one who trains in this run's folder; yields whether it worked. Freed by the kernel on death."""
    lock = FileLock(RunFiles(directory).lock, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()

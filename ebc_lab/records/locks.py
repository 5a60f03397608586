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
    """Whether a process holds this lock file; changes nothing. Raises UserError where locks do not work."""
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
    """Try to lock a run's folder for training; yields whether that worked. The kernel unlocks on death."""
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

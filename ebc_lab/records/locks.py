"""Lock files of studies and runs. The kernel frees a lock when the process that holds it dies."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ebc_lab.config.errors import UserError

from . import fence
from .json_files import try_read, write_json
from .paths import RunFiles, StudyFiles


def is_locked(path: Path) -> bool:
    """Return whether a process holds this lock file. The file is locked only for the moment of the test.

    A file that this user may not read counts as free. Raises UserError if locking fails.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        finally:
            os.close(descriptor)
    except (FileNotFoundError, PermissionError):
        return False
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return True
        remedy = "mount its file system with locks, or choose another"
        raise UserError(f"{path} cannot be locked ({error.strerror}): {remedy}.") from None
    return False


@contextmanager
def run_lock(directory: Path) -> Iterator[str | None]:
    """Lock a run for training while the block runs, and supersede earlier attempts (`fence.py`). Yields the
    token of this attempt, or None if another process has the run."""
    with ExitStack() as held:
        try:
            held.enter_context(FileLock(RunFiles(directory).lock, fallback_to_soft=False).acquire(timeout=0))
            token = fence.claim(directory)
        except (Timeout, fence.Superseded):
            yield None
            return
        held.callback(fence.leave, directory, token)
        held.enter_context(fence.within(directory, token))
        yield token


def study_holder(files: StudyFiles) -> dict[str, Any] | None:
    """Return `pid`, `host` and `since` of the process that drives a study; None if no process does. The dict
    is empty if the process has not recorded these yet."""
    if not is_locked(files.driver_lock):
        return None
    return try_read(files.driver_file, dict[str, Any]) or {}


@contextmanager
def study_lock(files: StudyFiles) -> Iterator[None]:
    """Hold the lock of a study's driver while the block runs. Raises UserError if another process has it."""
    lock = FileLock(files.driver_lock, fallback_to_soft=False)
    name = files.root.name
    try:
        lock.acquire(timeout=2)  # another process's `study_holder` may hold it for a moment
    except Timeout:
        who = {"pid": "?", "host": "?", "since": "?"} | (study_holder(files) or {})
        where = f"process {who['pid']} on {who['host']} since {who['since']}"
        remedy = f"wait for it, or stop it with `ebc-lab cancel {name}`"
        raise UserError(f"study {name} is being run by {where}: {remedy}.") from None
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        write_json(files.driver_file, {"pid": os.getpid(), "host": os.uname().nodename, "since": since})
        yield
    except OSError as error:
        # when a disk fills up, the error names no file
        error.filename = error.filename or str(files.root)
        raise
    finally:
        files.driver_file.unlink(missing_ok=True)
        lock.release()

"""Writes after which a reader, or a crash, sees a complete file or none; reads that cannot hang or flood."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from ebc_lab.config.errors import UserError

from . import fence

Stamp = tuple[int, int, int, int]  # of a file, by `stamp_of`
# of a disk, or of the way to it: they say nothing about what is on it
STORAGE_ERRORS = (errno.EIO, errno.ENOSPC, errno.EROFS, errno.ESTALE, errno.EDQUOT, errno.EFBIG)


def write_atomic(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write a file through `atomic_writer`."""
    with atomic_writer(path, durable=durable) as f:
        f.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_writer(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Yield a file to write, which replaces the one at `path` at the end: temporary name, fsync, rename.
    `durable=False` leaves out the fsync, for what may be lost when the machine fails, as a run's progress.
    Raises Superseded as `replacing` does."""
    with replacing(path) as temporary, open(temporary, "wb") as f:
        yield f
        f.flush()
        if durable:
            os.fsync(f.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name to write a file under, which replaces the old one at the end. Raises Superseded in the
    folder of a run at which a later attempt has begun (`fence.py`)."""
    own = fence.attempt_folder(path)
    temporary = (own or path.parent) / f".{path.name}.{os.getpid()}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and own and not own.exists() and own.parent.exists():
            raise fence.Superseded(own.parent) from None
        raise


def stamp_of(about: os.stat_result) -> Stamp:
    """Return size, times of the last change of content and of inode, and the inode's number: one of them
    changes whenever the file does."""
    return about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino


def stamp(path: Path) -> Stamp | None:
    """Return the stamp of a file; None where there is none."""
    try:
        return stamp_of(os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_regular(path: Path, most: int) -> bytes:
    """Return the content of a file of at most `most` bytes. Raises FileNotFoundError where there is nothing,
    and UserError for a larger file and, before it can block, for a folder, a pipe or a device."""
    with opened(path) as f:
        size = os.fstat(f.fileno()).st_size
        content = f.read(size + 1) if size <= most else None
    if content is None or len(content) > most:
        raise UserError(f"{path} is larger than {most} bytes, and so no file of ours: move it away.")
    return content


def opened(path: Path) -> BufferedReader:
    """Return a file, open for reading. Raises as `read_regular`, and OSError where the disk fails."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(error.errno, error.strerror, str(path)) from None
    except OSError as error:
        if error.errno in STORAGE_ERRORS:
            raise
        raise UserError(f"{path} cannot be read ({error.strerror}): restore it, or delete it.") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path} is not a file but a folder, a pipe or a device: move it away.")
    return open(descriptor, "rb")


def refuse_unwritable(path: Path) -> None:
    """Raise UserError where a folder can neither be created nor written."""
    existing = next(p for p in [path, *path.resolve().parents] if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"{path} cannot be written ({existing} does not allow it): choose another output folder."
        )

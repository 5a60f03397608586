"""Atomic writes, which leave a complete file or none even after a crash, and reads that cannot hang."""

from __future__ import annotations

import errno
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from ebc_lab.config.errors import UserError

from . import fence

Stamp = tuple[int, int, int, int]  # of a file, by `stamp_of`
# errors of a disk or network, which say nothing about the contents of a file
STORAGE_ERRORS = (errno.EIO, errno.ENOSPC, errno.EROFS, errno.ESTALE, errno.EDQUOT, errno.EFBIG)
# what zipfile raises for an archive that is damaged, or of a kind that it does not know
NO_SOUND_ZIP = (
    *(zipfile.BadZipFile, NotImplementedError, ValueError, OSError, EOFError),
    *(struct.error, zlib.error),
)


def write_atomic(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write a whole file through `atomic_writer`. Text is encoded as UTF-8."""
    with atomic_writer(path, durable=durable) as f:
        f.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_writer(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Yield a temporary file for writing. At the end, it is synced to the disk and renamed to `path`. With
    `durable=False` it is not synced, for files that a crash of the machine may lose, such as progress.json.
    Raises Superseded as `replacing` does."""
    with replacing(path) as temporary, open(temporary, "wb") as f:
        yield f
        f.flush()
        if durable:
            os.fsync(f.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path. At the end, the file written there replaces the file at `path`. Raises
    Superseded if `path` is in the folder of a run that a later attempt has taken over (`fence.py`)."""
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
    """Return a file's size, modification time, inode change time (both in ns) and inode number. At least one
    of these changes whenever the file changes."""
    return about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino


def stamp(path: Path) -> Stamp | None:
    """Return the stamp of a file; None if the file does not exist."""
    try:
        return stamp_of(os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_regular(path: Path, most: int) -> bytes:
    """Return the contents of a file. Raises FileNotFoundError if it does not exist, and UserError if it is
    unreadable, larger than `most` bytes or, without blocking, if it is a folder, pipe or device."""
    with opened(path) as f:
        size = os.fstat(f.fileno()).st_size
        content = f.read(size + 1) if size <= most else None
    if content is None or len(content) > most:
        raise UserError(f"{path} is larger than {most} bytes, and so no file of ours: move it away.")
    return content


def opened(path: Path) -> BufferedReader:
    """Return a file opened for reading. Raises as `read_regular` does, and OSError if the disk fails."""
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
    """Raise UserError unless `path` is a folder that can be written to, or one that can be created."""
    existing = next(p for p in [path, *path.resolve().parents] if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"{path} cannot be written ({existing} does not allow it): choose another output folder."
        )

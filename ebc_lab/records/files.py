"""Atomic writes: a reader, or a crash, sees a complete file or none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ebc_lab.config.errors import UserError


def write_atomic(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write a file through `atomic_writer`."""
    with atomic_writer(path, durable=durable) as f:
        f.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_writer(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write that replaces the old one at the end: temporary name, fsync, rename.

    `durable=False` leaves out the fsync, for what may be lost when the machine fails (progress).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            if durable:
                os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def refuse_unwritable(path: Path) -> None:
    """Raises UserError for a folder that cannot be created or written."""
    existing = next(p for p in [path, *path.resolve().parents] if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"{path} cannot be written ({existing} does not allow it): choose another output folder."
        )

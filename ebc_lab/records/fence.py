"""Which attempt at a run may write in the run's folder: the one whose hidden folder is still there.

The lock of a run (`locks.py`) keeps two processes off it, except where a node is cut off: its lock is given
up, or taken away, while its process lives on and may come back. So every attempt has a hidden folder, named
after its token, and writes each file there before renaming it to its place. The next attempt removes that
folder before it reads anything. From then on the earlier one can neither make a file nor rename one: the
rename checks and replaces in one step, on every file system, and needs no lock that a process could be
stopped with. Streams are opened before they are renamed, so rows that come late go into a file that nobody
sees.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ebc_lab.config.errors import UserError

PREFIX = ".attempt-"
PAST = ".past-"  # one that is being removed


class Superseded(UserError):
    """Another attempt at the run has begun, and this one may write no more."""

    def __init__(self, directory: Path):
        super().__init__(f"another attempt at {directory.name} has begun since: this one writes no more.")
        self.directory = directory


_writing_in: dict[str, Path] = {}  # folder of a run -> the hidden folder of this process's attempt at it


def claim(directory: Path) -> str:
    """Supersede every earlier attempt at a run, and return the token of a new one. Raises Superseded where
    another begins at this moment."""
    for earlier in [path for path in directory.iterdir() if path.name.startswith((PREFIX, PAST))]:
        _remove(earlier)
    token = secrets.token_hex(4)
    own = directory / f"{PREFIX}{token}"
    own.mkdir()
    # of two that come here at once at least one sees the other
    if any(other != own for other in directory.glob(f"{PREFIX}*")):
        _remove(own)
        raise Superseded(directory)
    return token


@contextmanager
def within(directory: Path, token: str) -> Iterator[None]:
    """Have this process write in a run's folder as the attempt with this token."""
    key = os.path.abspath(directory)
    _writing_in[key] = directory / f"{PREFIX}{token}"
    try:
        yield
    finally:
        _writing_in.pop(key, None)


def leave(directory: Path, token: str) -> None:
    """End an attempt, superseded or not."""
    _remove(directory / f"{PREFIX}{token}")


def token_in(directory: Path) -> str | None:
    """Return the token of the attempt as which this process writes in a run's folder, if it does."""
    own = _writing_in.get(os.path.abspath(directory))
    return own.name.removeprefix(PREFIX) if own else None


def attempt_at(directory: Path) -> str | None:
    """Return the token of the attempt that may write in a run's folder; None where there is none, or one is
    just beginning."""
    tokens = [path.name.removeprefix(PREFIX) for path in directory.glob(f"{PREFIX}*")]
    return tokens[0] if len(tokens) == 1 else None


def attempt_folder(path: Path) -> Path | None:
    """Return where this process writes a file of a run before it renames it; None for other files."""
    for parent in (path.parent, path.parent.parent):
        own = _writing_in.get(os.path.abspath(parent)) if _writing_in else None
        if own is not None:
            return own
    return None


def _remove(own: Path) -> None:
    """Make a folder unusable for the process that writes into it, by its name, and remove it."""
    past = own.with_name(own.name.replace(PREFIX, PAST))
    with suppress(FileNotFoundError):
        own.rename(past)
        shutil.rmtree(past, ignore_errors=True)  # what is left of it the next attempt removes

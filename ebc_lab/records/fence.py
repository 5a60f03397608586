"""A fence around a run's folder, so that only the latest attempt at the run can write there.

A run's lock (`locks.py`) keeps other processes away, except when a node is cut off. The lock is then freed or
removed, while the process on the node lives on and may come back. So every attempt has a hidden folder, named
after the attempt's token, and writes each file there before renaming it into place. The next attempt removes
that folder before it reads anything. From then on, the earlier attempt can neither create nor rename a file.
A rename checks and replaces in one step on every file system, so no process can be suspended between the two.
Streams are opened before they are renamed, so late rows go to a file that nobody sees.
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
PAST = ".past-"  # begins the name of a folder that is being removed


class Superseded(UserError):
    """Another attempt at the run has begun, so this attempt may no longer write."""

    def __init__(self, directory: Path):
        super().__init__(f"another attempt at {directory.name} has begun since: this one writes no more.")
        self.directory = directory


_writing_in: dict[str, Path] = {}  # folder of a run -> the hidden folder of this process's attempt at it


def claim(directory: Path) -> str:
    """Supersede every earlier attempt at a run, and return the token of a new attempt. Raises Superseded if
    yet another attempt begins at the same moment."""
    for earlier in [path for path in directory.iterdir() if path.name.startswith((PREFIX, PAST))]:
        _remove(earlier)
    token = secrets.token_hex(4)
    own = directory / f"{PREFIX}{token}"
    own.mkdir()
    # of two attempts that get here at once, at least one sees the other
    if any(other != own for other in directory.glob(f"{PREFIX}*")):
        _remove(own)
        raise Superseded(directory)
    return token


@contextmanager
def within(directory: Path, token: str) -> Iterator[None]:
    """Let this process write in a run's folder, as the attempt with this token, while the block runs."""
    key = os.path.abspath(directory)
    _writing_in[key] = directory / f"{PREFIX}{token}"
    try:
        yield
    finally:
        _writing_in.pop(key, None)


def leave(directory: Path, token: str) -> None:
    """Remove an attempt's hidden folder, unless another attempt has already removed it."""
    _remove(directory / f"{PREFIX}{token}")


def token_in(directory: Path) -> str | None:
    """Return the token under which this process writes in a run's folder; None if the process has none."""
    own = _writing_in.get(os.path.abspath(directory))
    return own.name.removeprefix(PREFIX) if own else None


def attempt_at(directory: Path) -> str | None:
    """Return the token of the attempt that may write in a run's folder. Return None if there is no attempt,
    or if another attempt is just beginning."""
    tokens = [path.name.removeprefix(PREFIX) for path in directory.glob(f"{PREFIX}*")]
    return tokens[0] if len(tokens) == 1 else None


def attempt_folder(path: Path) -> Path | None:
    """Return the folder where this process writes a run's file before renaming it; None for other files."""
    for parent in (path.parent, path.parent.parent):
        own = _writing_in.get(os.path.abspath(parent)) if _writing_in else None
        if own is not None:
            return own
    return None


def _remove(own: Path) -> None:
    """Rename a hidden folder, so that its attempt can no longer write there, and then remove the folder."""
    past = own.with_name(own.name.replace(PREFIX, PAST))
    with suppress(FileNotFoundError):
        own.rename(past)
        shutil.rmtree(past, ignore_errors=True)  # the next attempt removes what is left

"""Shards: texts of billions of tokens, cut into tokens beforehand, as files of `data=bin`. No torch here.

A shard is a header of 256 little-endian int32, of which the first three are a magic number, a version and how
many tokens follow, and then that many little-endian uint16: the format of llm.c (Karpathy 2024), in which
modded-nanogpt's FineWeb is published. Its tokens are mapped into memory, never read as a whole.

What a shard holds is known by the sha256 of the complete file. It is found once, with the largest token, and
kept in the user's cache by the file's path, size, times and inode: whoever writes to a shard changes one of
these, and the file is read again.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import digest
from ebc_lab.records.cache import MeasurementCache
from ebc_lab.records.files import stamp_of

from ..named import named_files

MAGIC = 20240520
VERSION = 1
HEADER = 256  # int32 numbers, of which the first three are used
HEADER_BYTES = 4 * HEADER
TOKEN = np.dtype("<u2")
READ_BYTES = 16 << 20  # at a time, where a file is looked through
TELL_FROM = 64 << 20  # bytes: files from which on it is said that they are read


class _Content(TypedDict):
    sha256: str
    largest: int


@dataclass(frozen=True)
class Shard:
    """A file of tokens. `sha256` is of all of it, `largest` the greatest token in it."""

    path: Path
    count: int  # tokens
    sha256: str
    largest: int

    def tokens(self) -> NDArray[np.uint16]:
        """Map its tokens into memory, (count,)."""
        return np.memmap(self.path, dtype=TOKEN, mode="r", offset=HEADER_BYTES, shape=(self.count,))


@dataclass(frozen=True)
class ShardSet:
    """The shards of a corpus, in the order in which they are read."""

    train: tuple[Shard, ...]
    val: tuple[Shard, ...]

    @property
    def sha256(self) -> str:
        """What names the corpus: the checksums of all shards, in order."""
        return digest({"train": [s.sha256 for s in self.train], "val": [s.sha256 for s in self.val]})

    @property
    def largest(self) -> Shard:
        """The shard with the greatest token."""
        return max((*self.train, *self.val), key=lambda shard: shard.largest)


def write_shard(path: Path, tokens: Sequence[int] | NDArray[np.integer]) -> None:
    """Write tokens, (n,), as a shard. Raises UserError where one is no uint16."""
    ids = np.asarray(tokens)
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) <= np.iinfo(TOKEN).max:
        raise UserError(f"{path} cannot be written: a shard's tokens are 0 to {np.iinfo(TOKEN).max}.")
    header = np.zeros(HEADER, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(ids)
    with path.open("wb") as f:
        f.write(header.tobytes())
        f.write(ids.astype(TOKEN).tobytes())


def found(setting: str, patterns: Sequence[str]) -> tuple[Shard, ...]:
    """Return the shards that paths and patterns name, each pattern's in the order of their names.

    `setting`: which one they are given by. Raises UserError for what is not there, is named twice, or is no
    whole shard.
    """
    return tuple(looked_at(setting, path) for path in named_files(setting, patterns))


def looked_at(setting: str, path: Path) -> Shard:
    """Return the shard of a file, after a look at its header and its size. Raises UserError."""
    try:
        with path.open("rb") as f:
            head = f.read(HEADER_BYTES)
            status = os.fstat(f.fileno())
    except OSError as error:
        raise UserError(
            f"the shard {path} cannot be read ({error.strerror}): give another {setting}."
        ) from None
    count = _checked_count(path, head, status.st_size)
    content = _content(path, stamp_of(status))
    return Shard(path, count, content["sha256"], content["largest"])


@functools.lru_cache(maxsize=1024)  # a cache on disk that cannot be written costs one reading a process
def _content(path: Path, stamp: tuple[int, ...]) -> _Content:
    cache = MeasurementCache("shard", [str(path), *stamp], form=_Content)
    content: _Content = cache.read_or_measure(lambda: _read_through(path))
    return content


def _checked_count(path: Path, head: bytes, size: int) -> int:
    """Return how many tokens follow the header. Raises UserError where it is no shard's, or they are not
    there."""
    if len(head) < HEADER_BYTES:
        raise UserError(f"{path} is no shard: it has {size} bytes, and a header {HEADER_BYTES}.")
    magic, version, count = (int(number) for number in np.frombuffer(head, dtype="<i4")[:3])
    if magic != MAGIC:
        raise UserError(
            f"{path} is no shard: its first number is {magic}, not {MAGIC}; give files of GPT-2's tokens "
            "with llm.c's header, or a text with data=path."
        )
    if version != VERSION:
        raise UserError(
            f"{path} is a shard of version {version}: version {VERSION}, of uint16 tokens, is read; fetch or "
            "write it in that one."
        )
    there, odd = divmod(size - HEADER_BYTES, TOKEN.itemsize)
    if count < 1 or there != count or odd:
        raise UserError(
            f"{path} is damaged or half fetched: its header says {count} tokens, and {there} follow; fetch "
            "it again."
        )
    return count


def _read_through(path: Path) -> _Content:
    """Return a file's checksum and its greatest token; a second for each few hundred megabytes."""
    if path.stat().st_size > TELL_FROM:
        print(f"reading {path} once, for its checksum …", file=sys.stderr)
    checksum = hashlib.sha256()
    largest = 0
    with path.open("rb") as f:
        checksum.update(f.read(HEADER_BYTES))
        while block := f.read(READ_BYTES):
            checksum.update(block)
            largest = max(largest, int(np.frombuffer(block, dtype=TOKEN).max()))
    return {"sha256": checksum.hexdigest(), "largest": largest}


def head_of(shards: Sequence[Shard], start: int, count: int) -> NDArray[np.int64]:
    """Return `count` tokens, from the start-th on, of shards laid end to end, (count,), or what there is."""
    parts = []
    for shard in shards:
        if start < shard.count and count > 0:
            part = shard.tokens()[start : start + count]
            parts.append(part.astype(np.int64))
            count -= len(part)
        start = max(0, start - shard.count)
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def batches_in(shards: Sequence[Shard], tokens: int) -> list[int]:
    """Return how many batches of so many tokens each shard has, in order.

    None reaches into the next shard, and the tokens left over at a shard's end are not used. A batch needs
    one token more, its last target, and modded-nanogpt, whose batches these are, wants one more still.
    """
    return [max(0, (shard.count - 2) // tokens) for shard in shards]


def too_short(batches: int, tokens: int) -> str:
    """Say that shards have so few batches of so many tokens, and what can be done."""
    return (
        f"data.files hold {batches} batches of {tokens} tokens, each in one shard: give more shards, train "
        "for fewer steps, or choose data.order=random."
    )

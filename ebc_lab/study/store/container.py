"""A .zip in one spelling only, so that the same contents give the same bytes, and every byte of the file can be checked.

The entry `manifest.json` comes first, the others follow in the order of their names, all deflated, dated 1980-01-01, regular
files with mode 0644, one after the other without gaps; then the central directory and the end record, without a comment.
Each local header carries, in an extra field, the sha256 of the packed bytes behind it: deflate has padding bits and more than
one way to say the same, which a checksum of the contents does not see. Any unzip reads such a file.

`write` makes one; `read` goes through it from its first byte to its last and says what is not as `write` would have written it.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

FIRST = "manifest.json"
LOCAL = struct.Struct("<4s5H3L2H")
CENTRAL = struct.Struct("<4s6H3L5H2L")
END = struct.Struct("<4s4H2LH")
END64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR64 = struct.Struct("<4sLQL")
SEAL = struct.Struct("<2H32s")
OPENS, LISTS, ENDS = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
VERSION, VERSION64, UTF8, DEFLATED, MIDNIGHT, NEW_YEAR_1980 = 20, 45, 0x800, 8, 0, 0x21
UNIX, REGULAR_FILE = 3 << 8, 0o100644 << 16
SEAL_ID = 0x4245  # of the extra field: "EB"
HALF, FULL = 0xFFFF, 0xFFFFFFFF  # from there on a field's value stands in a zip64 record
CHUNK = 1 << 20
WHOLE = "the file"  # where what is wrong is no part's
LONGEST_NAME = 4096
MOST_TIMES = (
    200  # that an entry of some size may unpack to its packed size; tables of numbers come to about ten
)
SMALL = 1 << 20  # bytes, up to which it may be any


class Unreadable(Exception):
    """Nothing behind this point can be told apart: `part` of the file, and what is wrong there."""

    def __init__(self, part: str, what: str):
        super().__init__(f"{part}: {what}")
        self.part, self.what = part, what


@dataclass(frozen=True)
class Entry:
    """What the headers say of one file."""

    name: str
    crc: int = 0
    packed: int = 0  # bytes
    size: int = 0  # bytes, unpacked
    seal: bytes = b""  # sha256 of the packed bytes
    offset: int = 0  # of its local header

    def local(self) -> bytes:
        name, extra = self.name.encode(), SEAL.pack(SEAL_ID, 32, self.seal)
        about = (
            VERSION,
            UTF8,
            DEFLATED,
            MIDNIGHT,
            NEW_YEAR_1980,
            self.crc,
            self.packed,
            self.size,
            len(name),
            len(extra),
        )
        return LOCAL.pack(OPENS, *about) + name + extra

    def central(self) -> bytes:
        name, far = self.name.encode(), self.offset >= FULL
        extra = struct.pack("<2HQ", 1, 8, self.offset) if far else b""
        version = VERSION64 if far else VERSION
        about = (
            version,
            UTF8,
            DEFLATED,
            MIDNIGHT,
            NEW_YEAR_1980,
            self.crc,
            self.packed,
            self.size,
            len(name),
            len(extra),
        )
        rest = (0, 0, 0, REGULAR_FILE, min(self.offset, FULL))
        return CENTRAL.pack(LISTS, UNIX | version, *about, *rest) + name + extra

    @property
    def end(self) -> int:
        return self.offset + len(self.local()) + self.packed


def end_records(count: int, size: int, offset: int) -> bytes:
    """What follows `count` records of the central directory, `size` bytes from `offset` on."""
    out, at = b"", offset + size
    if count >= HALF or size >= FULL or offset >= FULL:
        rest = (END64.size - 12, UNIX | VERSION64, VERSION64, 0, 0, count, count, size, offset)
        out = END64.pack(b"PK\x06\x06", *rest) + LOCATOR64.pack(b"PK\x06\x07", 0, at, 1)
    few = min(count, HALF)
    return out + END.pack(ENDS, 0, 0, few, few, min(size, FULL), min(offset, FULL), 0)


# -- writing --------------------------------------------------------------------------------------------------------------


def write(out: BinaryIO, contents: Iterable[tuple[str, Callable[[], Iterator[bytes]]]]) -> None:
    """Write (name, how to read it) into an empty file that can be sought in. Raises ValueError for a file of 4 GiB or more."""
    entries = []
    for name, chunks in contents:
        entry = Entry(name, offset=out.tell())
        out.seek(len(replace(entry, seal=bytes(32)).local()), 1)
        packer, seal, crc, size, packed = zlib.compressobj(6, zlib.DEFLATED, -15), hashlib.sha256(), 0, 0, 0

        def put(piece: bytes) -> int:
            seal.update(piece)  # noqa: B023 - called in this turn only
            return out.write(piece)

        for chunk in chunks():
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
            packed += put(packer.compress(chunk))
        packed += put(packer.flush())
        if max(size, packed) >= FULL:
            raise ValueError(f"{name} has {size} bytes, and 4 GiB are too many")
        entries.append(replace(entry, crc=crc, packed=packed, size=size, seal=seal.digest()))
        after = out.tell()
        out.seek(entry.offset)
        out.write(entries[-1].local())
        out.seek(after)
    start = out.tell()
    for entry in entries:
        out.write(entry.central())
    out.write(end_records(len(entries), out.tell() - start, start))


# -- reading --------------------------------------------------------------------------------------------------------------


Put = Callable[[bytes], object]
Wrong = tuple[str, str]  # a file of the bundle, or a part of the container; what is wrong with it


def looks_like_one(path: Path) -> bool:
    """Whether a file begins as `write` begins."""
    with open(path, "rb") as f:
        head = f.read(LOCAL.size + len(FIRST))
    return len(head) == LOCAL.size + len(FIRST) and not _odd(head) and head[LOCAL.size :] == FIRST.encode()


def _odd(head: bytes) -> int:
    """How many of the fields of a first local header that are always the same are not."""
    mine = LOCAL.unpack(Entry(FIRST, seal=bytes(32)).local()[: LOCAL.size])
    return sum(
        mine[i] != field for i, field in enumerate(LOCAL.unpack(head[: LOCAL.size])) if i not in (6, 7, 8)
    )


def read(
    path: Path, sink: Callable[[str], Put | None], expected: Callable[[], Sequence[str]]
) -> Iterator[Wrong]:
    """What is not as `write` writes it: (file or part, what). Each file's contents go, in pieces, to what `sink` gives for it.

    `expected`: the names that should follow the first, sorted; asked once that has been read. Raises Unreadable where nothing
    more can be told apart.
    """
    with open(path, "rb") as f:
        total = f.seek(0, 2)
        f.seek(0)
        head = f.read(LOCAL.size)
        if len(head) < LOCAL.size or (not head.startswith(OPENS) and _odd(head) > 1):
            raise Unreadable(WHOLE, "it is no zip")
        if _odd(head) > 1:
            raise Unreadable(
                WHOLE, "it is a zip, but none that `ebc-lab export` has written, or it was packed again"
            )
        entries: list[Entry] = []
        names: Sequence[str] = ()
        spoilt = ""  # the last file, if its own sizes cannot be believed
        while True:
            at = entries[-1].end if entries else 0
            name = _following(entries, names)
            f.seek(at)
            head = f.read(LOCAL.size)
            if entries and head[:4] == LISTS:
                break
            if name is None and head[:4] != OPENS:
                raise Unreadable("the central directory", f"byte {at}: it does not begin there")
            found, wrong = _entry(f, at, total, head, name or "a file behind the last one", spoilt, sink)
            yield from wrong
            spoilt = found.name if wrong else ""
            if entries and found.name <= (entries[-1].name if len(entries) > 1 else ""):
                yield found.name, "it is there twice, or not in its place"
            entries.append(found)
            if len(entries) == 1:
                names = expected()
        yield from _tail(f, total, entries)


def _following(entries: Sequence[Entry], names: Sequence[str]) -> str | None:
    """The name that should come next."""
    if not entries:
        return FIRST
    at = bisect_right(names, entries[-1].name) if len(entries) > 1 else 0
    return names[at] if at < len(names) else None


def _entry(
    f: BinaryIO, at: int, total: int, head: bytes, name: str, spoilt: str, sink: Callable[[str], Put | None]
) -> tuple[Entry, list[Wrong]]:
    """One file -> its entry, as far as it can be known, and what is wrong with it."""
    part = f"the header of {name}" + (f" (or that of {spoilt}, which says where it begins)" if spoilt else "")
    if len(head) < LOCAL.size:
        raise Unreadable(part, f"the file ends at byte {total}, in the middle of it")
    opens, *_, crc, packed, size, name_size, extra_size = LOCAL.unpack(head)
    if opens != OPENS:
        raise Unreadable(part, f"byte {at}: it does not begin there")
    if extra_size != SEAL.size or not 0 < name_size <= LONGEST_NAME:
        where = at + LOCAL.size - (2 if extra_size != SEAL.size else 4)
        raise Unreadable(part, f"byte {where}: not what `ebc-lab export` writes there")
    rest = f.read(name_size + extra_size)
    start = at + LOCAL.size + len(rest)
    told = Entry(_spelt(rest[:name_size], name), crc, packed, size, rest[-32:], at)
    if told.name != name and rest[name_size : name_size + 4] != SEAL.pack(SEAL_ID, 32, b"")[:4]:
        raise Unreadable(
            part, f"byte {at + LOCAL.size - 4}: the length of its name, or what follows the name, is damaged"
        )
    if start + packed > total:
        raise Unreadable(
            told.name, f"the file ends at byte {total}, in the middle of it, or its header is damaged"
        )
    seen, problem = _unpacked(f, told, sink(told.name))
    if problem:
        return told, [
            (told.name, f"bytes {start} to {start + packed - 1}, or its header before them: {problem}")
        ]
    if seen.seal != told.seal and (seen.crc, seen.size) != (told.crc, told.size):
        return told, [
            (told.name, f"bytes {start} to {start + packed - 1}: its contents are not those that were packed")
        ]
    byte = _first_difference(head + rest, seen.local())
    if byte is None:
        return seen, []
    if byte >= len(head) + name_size + 4:
        what = f"bytes {at + byte} to {start + packed - 1}: the packed contents are not those that the header has the sha256 of"
        return seen, [(told.name, what)]
    return seen, [(told.name, f"byte {at + byte}: its header is not what `ebc-lab export` writes")]


def _spelt(raw: bytes, meant: str) -> str:
    """A name as it is written, or as it is meant where one character is damaged."""
    name = raw.decode(errors="replace")
    return (
        meant
        if len(name) == len(meant) and sum(a != b for a, b in zip(name, meant, strict=True)) == 1
        else name
    )


def _unpacked(f: BinaryIO, told: Entry, put: Put | None) -> tuple[Entry, str | None]:
    """Unpack what stands here, no more than the header announces -> the entry as it should be, and what is wrong."""
    if told.size > SMALL and told.size > MOST_TIMES * told.packed:
        return told, f"it says that it unpacks to {told.size} bytes, {MOST_TIMES} times its size and more"
    unpacker, seal, crc, size, left = zlib.decompressobj(-15), hashlib.sha256(), 0, 0, told.packed
    try:
        while left:
            piece = f.read(min(CHUNK, left))
            left -= len(piece)
            seal.update(piece)
            while piece and not unpacker.eof:
                out = unpacker.decompress(piece, CHUNK)
                crc, size, piece = zlib.crc32(out, crc), size + len(out), unpacker.unconsumed_tail
                if size > told.size:
                    return told, "it unpacks to more than its header says"
                if put:
                    put(out)
            if unpacker.eof and (left or unpacker.unused_data or piece):
                return told, "it goes on behind its end"
        out = unpacker.flush()  # what the limit on a piece has kept back
        crc, size = zlib.crc32(out, crc), size + len(out)
        if put:
            put(out)
    except zlib.error as error:
        return told, f"it cannot be unpacked ({error})"
    if not unpacker.eof:
        return told, "it is cut off"
    return replace(told, crc=crc, size=size, seal=seal.digest()), None


def _tail(f: BinaryIO, total: int, entries: Sequence[Entry]) -> Iterator[Wrong]:
    """The central directory and the end record, byte by byte."""
    start = at = entries[-1].end
    f.seek(at)
    for entry in entries:
        record = entry.central()
        byte = _first_difference(f.read(len(record)), record)
        if byte is not None:
            yield from _cut_or_changed(f"the central directory's record of {entry.name}", at + byte, total)
            return
        at += len(record)
    last = end_records(len(entries), at - start, start)
    byte = _first_difference(f.read(len(last)), last)
    if byte is not None:
        yield from _cut_or_changed("the end record", at + byte, total)
    elif at + len(last) < total:
        yield "the end of the file", f"byte {at + len(last)}: {total - at - len(last)} byte(s) too many"


def _cut_or_changed(part: str, at: int, total: int) -> Iterator[Wrong]:
    where = (
        f"the file ends at byte {total}, in the middle of it"
        if at >= total
        else f"byte {at}: not what belongs there"
    )
    yield part, where


def _first_difference(found: bytes, meant: bytes) -> int | None:
    if found == meant:
        return None
    return next(
        (i for i, (a, b) in enumerate(zip(found, meant, strict=False)) if a != b), min(len(found), len(meant))
    )

"""A study's place at an fsspec address: files that never change, and a numbered index of those that count.

    files/<path>.<16 digits of its sha256>    a file of the study, as it was at some time
    index/00000012.json                       path -> sha256 and size of every file, under a checksum

* A file is written under a name that its content gives it, so nothing that an index names is written again.
  An index names only what was written completely. So whatever is cut off, the latest index that is whole
  describes a whole study; one that is cut off itself fails its checksum, and the one before it counts.
* An index is made under a number that nobody has taken (S3's If-None-Match, a folder's O_EXCL). Of two
  drivers that both think the study is theirs, one finds its number taken, or later ones, and knows.
* The last two indexes and their files are kept, for a reader of the one while the other is made.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec

from ebc_lab.config.errors import UserError
from ebc_lab.records.json_files import checksum_holds, parse_json, with_checksum

from ..store.manifest import is_safe

CHUNK = 8 << 20  # bytes of a large file that are in memory at a time


class Entry(NamedTuple):
    """A file's content, as an index names it."""

    sha256: str
    bytes: int


File = tuple[str, Entry]  # path in the study, and content


@dataclass(frozen=True)
class Index:
    """All files of a study at one time. Its file also has the time and a checksum."""

    study: str
    writer: str  # a token of the folder that is mirrored
    number: int
    files: dict[str, Entry]


class Overtaken(UserError):
    """Somebody else has written the next index."""

    def __init__(self, address: str):
        super().__init__(f"{address} is being written by somebody else: choose another.")


class Place:
    """One study's files at an address. Methods raise what the file system raises."""

    def __init__(self, address: str):
        from fsspec.core import url_to_fs

        self.address = address.rstrip("/")
        self.local = self.address.startswith(("file:", "local:"))
        options = {"auto_mkdir": True} if self.local else {}
        self._fs, self.root = url_to_fs(self.address, skip_instance_cache=True, **options)

    @property
    def fs(self) -> Any:
        """The file system, made to forget its listings, which miss what another driver has written."""
        self._fs.invalidate_cache()
        return self._fs

    def latest(self) -> Index | None:
        """Return the latest index that is whole, or None."""
        indexes = map(self._read, sorted(self._numbers(), reverse=True))
        return next((index for index in indexes if index is not None), None)

    def _numbers(self) -> list[int]:
        stems = (name.removesuffix(".json") for name in self._listed("index"))
        return [int(stem) for stem in stems if stem.isdecimal() and stem.isascii()]

    def _read(self, number: int) -> Index | None:
        """Return an index; None where it was cut off, or is none of ours."""
        try:
            record = parse_json(self.fs.cat_file(self._index_path(number)))
            index = msgspec.convert(record, Index)
        except (FileNotFoundError, ValueError):  # an older one may be removed meanwhile
            return None
        whole = checksum_holds(record) and index.number == number
        return index if whole and all(map(is_safe, index.files)) else None

    def publish(self, study: str, writer: str, after: int, files: Mapping[str, Entry]) -> Index:
        """Make an index of these files the latest, under the next number that is free, and return it.

        Raises Overtaken where another folder has written one since the index of number `after`. Its number
        may be free again, if that folder has gone on so far that it has removed its own.
        """
        number = after + 1
        if self.local:
            self.fs.makedirs(f"{self.root}/index", exist_ok=True)
        while True:
            index = Index(study, writer, number, dict(sorted(files.items())))
            record = {**vars(index), "at": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
            content = json.dumps(with_checksum(record)).encode()
            try:
                self.fs.pipe_file(self._index_path(number), content, mode="create")
            except FileExistsError:
                there = self._read(number)
                if there is None:  # cut off
                    number += 1
                    continue
                if there.writer != writer or there.files != files:  # else ours, whose answer was lost
                    raise Overtaken(self.address) from None
            if max(self._numbers(), default=number) > number:
                self._remove([self._index_path(number)])
                raise Overtaken(self.address)
            return index

    def _index_path(self, number: int) -> str:
        return f"{self.root}/index/{number:08d}.json"

    def write(self, files: Mapping[File, bytes]) -> None:
        """Write these files, as many at a time as the file system likes."""
        self.fs.pipe({self._path(*file): content for file, content in files.items()})

    def write_large(self, path: str, entry: Entry, source: IO[bytes], moved: Callable[[], None]) -> None:
        """Write the first bytes of an open file, calling `moved` after each part."""
        with self.fs.open(self._path(path, entry), "wb") as out:
            for part in parts(source, entry.bytes):
                out.write(part)
                moved()

    def fetch(self, path: str, entry: Entry, to: Path) -> None:
        """Copy what is there of a file into one on this machine; nothing is compared."""
        self.fs.get_file(self._path(path, entry), str(to))

    def _path(self, path: str, entry: Entry) -> str:
        return f"{self.root}/files/{path}.{entry.sha256[:16]}"

    def sweep(self, kept: Set[File], first: int, written: Set[File] | None = None) -> None:
        """Remove the files that are not to be kept, and the indexes before the number `first`. `written`: all
        files that may be there; without it, the place is listed."""
        if written is None:
            there = set(self.fs.find(f"{self.root}/files"))
        else:
            there = {self._path(*file) for file in written}
        self._remove(there - {self._path(*file) for file in kept})
        self._remove(self._index_path(number) for number in self._numbers() if number < first)

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            with suppress(FileNotFoundError):
                self.fs.rm_file(name)

    def probe(self, token: str) -> None:
        """Write a file, read it, and remove it. Raises OSError where it is not what was written."""
        path = f"{self.root}/files/.probe.{token}"
        self.fs.pipe_file(path, token.encode())
        if self.fs.cat_file(path) != token.encode():
            raise OSError("what was written is not what is read")
        self._remove([path])

    def holds_others(self) -> bool:
        """Return whether anything is there that no mirror writes."""
        return bool({*self._listed("")} - {"files", "index"})

    def studies(self) -> list[str]:
        """Return the names of the studies directly below this place."""
        names = (name for name in self._listed("") if is_safe(name))
        return [name for name in names if Place(f"{self.address}/{name}")._numbers()]

    def _listed(self, folder: str) -> list[str]:
        """Return the names in a folder, sorted."""
        try:
            paths = self.fs.ls(f"{self.root}/{folder}".rstrip("/"), detail=False)
        except FileNotFoundError:
            return []
        return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)


def parts(file: IO[bytes], size: int) -> Iterator[bytes]:
    """Yield the first `size` bytes of an open file, as far as it has them, in parts."""
    file.seek(0)
    while size > 0 and (part := file.read(min(CHUNK, size))):
        yield part
        size -= len(part)


def why(error: BaseException) -> str:
    """Return the error of a file system as a part of one sentence."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return text[:300].rstrip(".") or type(error).__name__

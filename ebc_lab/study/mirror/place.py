"""A study's mirror at an fsspec address: files that never change, and numbered indexes that list them.

    files/<path>.<16 digits of its sha256>    one version of one of the study's files
    index/00000012.json                       path -> sha256 and size of every file, with a checksum

* A file's name at the address contains its hash, so no file that an index lists is ever overwritten. An index
  lists only files that were written completely. Whatever is interrupted, the latest index with a valid
  checksum therefore describes a whole study.
* A new index takes a free number, as S3's If-None-Match or a folder's O_EXCL ensures. If two drivers write to
  one address, one of them finds that its number, or a later one, is taken, and stops.
* The last two indexes and the files in them are kept, for readers that still use the older index.
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


class Entry(NamedTuple):
    """The hash and size of a file's content, as an index lists them."""

    sha256: str
    bytes: int


File = tuple[str, Entry]  # one version of a file: its path in the study, and its content


@dataclass(frozen=True)
class Index:
    """The files of a study at one time, by path. The index's JSON file also has this time and a checksum."""

    study: str  # the study's name
    writer: str  # token of the folder that is mirrored
    number: int
    files: dict[str, Entry]


class Overtaken(UserError):
    """Raised when another folder has written the next index."""

    def __init__(self, address: str):
        super().__init__(f"{address} is being written by somebody else: choose another.")


class Place:
    """A study's mirror at an address. The methods raise what the file system raises."""

    def __init__(self, address: str):
        from fsspec.core import url_to_fs

        self.address = address.rstrip("/")
        self.local = self.address.startswith(("file:", "local:"))
        options = {"auto_mkdir": True} if self.local else {}
        self._fs, self.root = url_to_fs(self.address, skip_instance_cache=True, **options)

    @property
    def fs(self) -> Any:
        """Return the file system without cached listings, since they miss what another driver wrote."""
        self._fs.invalidate_cache()
        return self._fs

    def latest(self) -> Index | None:
        """Return the latest intact index, or None if there is none."""
        indexes = map(self._read, sorted(self._numbers(), reverse=True))
        return next((index for index in indexes if index is not None), None)

    def _numbers(self) -> list[int]:
        stems = (name.removesuffix(".json") for name in self._listed("index"))
        return [int(stem) for stem in stems if stem.isdecimal() and stem.isascii()]

    def _read(self, number: int) -> Index | None:
        """Return the index with this number, or None if it is missing, damaged or not written by a mirror."""
        try:
            record = parse_json(self.fs.cat_file(self._index_path(number)))
            index = msgspec.convert(record, Index)
        except (FileNotFoundError, ValueError):  # an older index may be removed meanwhile
            return None
        whole = checksum_holds(record) and index.number == number
        return index if whole and all(map(is_safe, index.files)) else None

    def publish(self, study: str, writer: str, after: int, files: Mapping[str, Entry]) -> Index:
        """Write an index of these files under the next free number, and return the index. `after`: the number
        of the latest known index. Raises Overtaken if another folder has written an index since, even if that
        folder has already removed the index after writing later ones."""
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
                found = self._read(number)
                if found is None:  # it was cut off
                    number += 1
                    continue
                if found.writer != writer or found.files != files:  # else we wrote it, and no answer came
                    raise Overtaken(self.address) from None
            if max(self._numbers(), default=number) > number:
                self._remove([self._index_path(number)])
                raise Overtaken(self.address)
            return index

    def _index_path(self, number: int) -> str:
        return f"{self.root}/index/{number:08d}.json"

    def write(self, files: Mapping[File, bytes]) -> None:
        """Write these files, as many in parallel as the file system allows."""
        self.fs.pipe({self._path(*file): content for file, content in files.items()})

    def write_large(self, path: str, entry: Entry, source: IO[bytes], moved: Callable[[], None]) -> None:
        """Write the first `entry.bytes` bytes of an open file in parts, calling `moved` after each part."""
        with self.fs.open(self._path(path, entry), "wb") as out:
            for part in parts(source, entry.bytes):
                out.write(part)
                moved()

    def fetch(self, path: str, entry: Entry, to: Path) -> None:
        """Copy a mirrored file to the local path `to`, without checking the file's content."""
        self.fs.get_file(self._path(path, entry), str(to))

    def _path(self, path: str, entry: Entry) -> str:
        return f"{self.root}/files/{path}.{entry.sha256[:16]}"

    def sweep(self, kept: Set[File], first: int, written: Set[File] | None = None) -> None:
        """Remove all files except `kept`, and all indexes with a number below `first`. `written`: all files
        that may be at the address, or None to find the files by listing the address."""
        if written is None:
            names = set(self.fs.find(f"{self.root}/files"))
        else:
            names = {self._path(*file) for file in written}
        self._remove(names - {self._path(*file) for file in kept})
        self._remove(self._index_path(number) for number in self._numbers() if number < first)

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            with suppress(FileNotFoundError):
                self.fs.rm_file(name)

    def probe(self, token: str) -> None:
        """Write a test file, read it back, and remove it. Raises OSError if the content differs."""
        path = f"{self.root}/files/.probe.{token}"
        self.fs.pipe_file(path, token.encode())
        if self.fs.cat_file(path) != token.encode():
            raise OSError("what was written is not what is read")
        self._remove([path])

    def holds_others(self) -> bool:
        """Return whether the address holds anything that no mirror writes."""
        return bool({*self._listed("")} - {"files", "index"})

    def studies(self) -> list[str]:
        """Return the names of the mirrored studies directly below this address."""
        names = (name for name in self._listed("") if is_safe(name))
        return [name for name in names if Place(f"{self.address}/{name}")._numbers()]

    def _listed(self, folder: str) -> list[str]:
        """Return the sorted names in a folder, or an empty list if there is no such folder."""
        try:
            paths = self.fs.ls(f"{self.root}/{folder}".rstrip("/"), detail=False)
        except FileNotFoundError:
            return []
        return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)


def parts(file: IO[bytes], size: int) -> Iterator[bytes]:
    """Yield the first `size` bytes of an open file, or the whole file if it is shorter, in parts of 8 MiB."""
    file.seek(0)
    while size > 0 and (part := file.read(min(8 << 20, size))):
        yield part
        size -= len(part)


def why(error: BaseException) -> str:
    """Return a file system's error as a phrase on one line, for use within a sentence."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return text[:300].rstrip(".") or type(error).__name__

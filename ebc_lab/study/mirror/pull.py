"""`ebc-lab pull`: a mirrored study fetched into a folder of studies, every file checked against its sha256.

Files are collected in `.NAME.pull` beside the study's folder, which appears when all are there. What an
interrupted call has collected the next one keeps, as far as it is what the index says.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ebc_lab.config.errors import UserError, visible
from ebc_lab.config.study_checks import check_address
from ebc_lab.records.files import atomic_writer, refuse_unwritable, write_atomic
from ebc_lab.records.json_files import read_json, write_json

from ..store import manifest
from ..store.study import Study
from .place import CHUNK, Entry, Index, Place, sha256_of, why
from .upload import IN_MEMORY, MirrorRecord, kept_elsewhere

Say = Callable[[str], None]

AT_A_TIME = 64  # files
TRIES = 3  # with the latest index, which may have replaced the one that was read
A_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
DAMAGED = "is not what was written"


class NothingThere(UserError):
    """The address can be read, and holds no study."""


def pull(address: str, folder: Path, say: Say = lambda text: None) -> dict[str, Any]:
    """Fetch the study at an address, or the only one below it, into `folder`.

    Returns `study`, `root`, `address` and `mirror` (what study.mirror is to be), `files`, `bytes`, `fetched`
    (files of this call) and `damaged`: file -> what is wrong with it there. A run of which a file is damaged
    is left out, to be trained again, as a decision, table or picture is, to be made again.

    Raises UserError: nothing there, out of reach, a study.json that is damaged, another study in its folder.
    """
    check_address("ADDRESS", address)
    try:
        place, index = _found(Place(address))
        root = folder / index.study
        if there := _here_already(root, place, index):
            say(there)
            return _told(place, index, root, {}, 0)
        refuse_unwritable(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f".{index.study}.pull.lock", fallback_to_soft=False)
        with lock.acquire(timeout=0):
            return _fetched(place, index, root, say)
    except Timeout:
        raise UserError(f"{folder / index.study} is being pulled already: wait for it.") from None
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{address} cannot be read ({visible(why(error))}): try again.") from None


def _found(place: Place) -> tuple[Place, Index]:
    """Return where the study is, and its latest index. Raises UserError."""
    index = place.latest()
    if index is None:
        names = place.studies()
        if len(names) > 1:
            which = ", ".join(f"{place.address}/{name}" for name in names)
            raise UserError(f"{place.address} holds {len(names)} studies: name one of {which}.")
        place = place.inside(names[0]) if names else place
        index = place.latest()
    if index is None or Study(Path(index.study)).header_file.name not in index.files:
        raise NothingThere(f"{place.address} holds no study that was mirrored with study.mirror.")
    if not A_NAME.fullmatch(index.study):
        raise UserError(f"{place.address} is not as ebc-lab writes it: its study has no plain name.")
    return place, index


def _here_already(root: Path, place: Place, index: Index) -> str:
    """Say that the study is here, if its folder holds what the index says, or what was mirrored from here.
    Raises UserError where another one is in its place."""
    if not root.exists():
        return ""
    note = _note(root)
    if note and note["address"] == place.address and note["writer"] == index.writer:
        return f"{root} is what is mirrored there: nothing was fetched"
    here = {path: manifest.sha256_of(root / path) for path in kept_elsewhere(root)}
    if here == {path: entry.sha256 for path, entry in index.files.items()}:
        return f"{root} has all of it already"
    raise UserError(
        f"{root} is another study, or is not as it is mirrored: move it away, or pull into another folder, "
        f"`ebc-lab pull {shlex.quote(place.address)} FOLDER`."
    )


def _note(root: Path) -> MirrorRecord | None:
    try:
        note: MirrorRecord = read_json(Study(root).mirror_file, MirrorRecord)
    except (OSError, UserError):
        return None
    return note


def _fetched(place: Place, index: Index, root: Path, say: Say) -> dict[str, Any]:
    """Collect all files, and make them the study's folder."""
    staging = Study(root.with_name(f".{root.name}.pull"))
    fetched, damaged = 0, dict[str, str]()
    for _ in range(TRIES):
        lacking = {p: entry for p, entry in index.files.items() if _sha256(staging.root / p) != entry.sha256}
        damaged = _collect(place, lacking, staging.root)
        fetched += len(lacking) - len(damaged)
        latest = place.latest() if damaged else None
        if latest is None or latest.number == index.number:
            break
        index = latest
    if what := damaged.get(staging.header_file.name):
        raise UserError(
            f"{place.address}: {staging.header_file.name} {what}, and nothing goes on without it."
        )
    runs = {run for path in damaged if (run := manifest.owning_run(path))}
    for path in list(kept_elsewhere(staging.root)):
        if path not in index.files or manifest.owning_run(path) in runs:
            (staging.root / path).unlink()
    staging.runs.mkdir(exist_ok=True)
    for run in sorted(runs):
        say(f"run {run} is left out, and trained again by the study's command")
    note: MirrorRecord = {
        "address": place.address,
        "writer": secrets.token_hex(8),
        "since": [index.number, index.writer],
    }
    write_json(staging.mirror_file, note)
    os.replace(staging.root, root)
    return _told(place, index, root, damaged, fetched)


def _collect(place: Place, lacking: Mapping[str, Entry], into: Path) -> dict[str, str]:
    """Fetch these files. -> what is wrong with those that are not there, or are not what they should be.

    Raises what the file system raises if it is out of reach.
    """
    damaged = {}
    for some in _batches({p: e for p, e in lacking.items() if e.bytes <= IN_MEMORY}):
        for path, content in place.read(some).items():
            if isinstance(content, FileNotFoundError):
                damaged[path] = "is missing"
            elif isinstance(content, Exception):
                raise content
            elif sha256_of(content) != some[path].sha256:
                damaged[path] = DAMAGED
            else:
                (into / path).parent.mkdir(parents=True, exist_ok=True)
                write_atomic(into / path, content)
    for path in lacking.keys() - damaged.keys():
        if lacking[path].bytes > IN_MEMORY and (what := _large(place, path, lacking[path], into / path)):
            damaged[path] = what
    return damaged


def _batches(files: Mapping[str, Entry]) -> Iterator[dict[str, Entry]]:
    """Yield some files at a time."""
    batch: dict[str, Entry] = {}
    size = 0
    for path, entry in files.items():
        if batch and (len(batch) == AT_A_TIME or size + entry.bytes > IN_MEMORY):
            yield batch
            batch, size = {}, 0
        batch[path] = entry
        size += entry.bytes
    if batch:
        yield batch


def _large(place: Place, path: str, entry: Entry, to: Path) -> str | None:
    """Fetch one large file. -> what is wrong with it."""
    to.parent.mkdir(parents=True, exist_ok=True)
    sha256 = hashlib.sha256()
    try:
        with place.opened(path, entry) as source, atomic_writer(to) as out:
            while chunk := source.read(CHUNK):
                sha256.update(chunk)
                out.write(chunk)
            if sha256.hexdigest() != entry.sha256:
                raise ValueError
    except FileNotFoundError:
        return "is missing"
    except ValueError:
        return DAMAGED
    return None


def _sha256(path: Path) -> str | None:
    try:
        return manifest.sha256_of(path)
    except (FileNotFoundError, UserError):
        return None


def _told(place: Place, index: Index, root: Path, damaged: Mapping[str, str], fetched: int) -> dict[str, Any]:
    return {
        "study": index.study,
        "root": str(root),
        "address": place.address,
        "mirror": place.address.removesuffix(f"/{index.study}"),
        "files": len(index.files),
        "bytes": sum(entry.bytes for entry in index.files.values()),
        "fetched": fetched,
        "damaged": {visible(path): what for path, what in sorted(damaged.items())},
    }

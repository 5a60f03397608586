"""`ebc-lab pull`: fetch a mirrored study into a folder of studies, checking every file's sha256.

Files are collected in the folder `.NAME.pull`, which is renamed to the study's folder once all files are
there. If a pull is interrupted, the next one keeps the collected files that match the index.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ebc_lab.config.errors import UserError, visible
from ebc_lab.config.study_checks import check_address
from ebc_lab.records.files import refuse_unwritable, replacing
from ebc_lab.records.json_files import try_read, write_json

from ..store import manifest
from ..store.study import Study
from ..store.verify import digest_or_fault
from .place import Entry, Index, Place, why
from .upload import MirrorRecord, Say, kept_elsewhere

AT_A_TIME = 16  # files fetched in parallel
TRIES = 3  # each with the latest index, since a newer one may have replaced files of the one that was read


class NothingThere(UserError):
    """Raised when an address can be read but holds no study."""


def pull(address: str, folder: Path, say: Say = lambda text: None) -> dict[str, Any]:
    """Fetch the study at an address, or the only study directly below the address, into `folder`.

    Returns `study`, `root`, `address`, `mirror` (a value for study.mirror), `files`, `bytes`, `fetched` (how
    many files were fetched this time) and `damaged`: file -> what is wrong with the mirrored copy. A damaged
    file is left out. If it belongs to a run, the run's other files are left out too. The study's command
    makes all of these files again.

    Raises UserError if no study can be read, study.json is damaged, or the study's folder has other content.
    """
    check_address("ADDRESS", address)
    try:
        place, index = _find(Place(address))
        root = folder / index.study
        fetched, damaged = 0, dict[str, str]()
        if sentence := _here_already(root, place, index):
            say(sentence)
        else:
            refuse_unwritable(folder)
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / f".{index.study}.pull.lock", fallback_to_soft=False)
            with lock.acquire(timeout=0):
                index, fetched, damaged = _fetch_study(place, index, root, say)
    except Timeout:
        raise UserError(f"{folder / index.study} is being pulled already: wait for it.") from None
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{address} cannot be read ({visible(why(error))}): try again.") from None
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


def _find(place: Place) -> tuple[Place, Index]:
    """Return the study's place and latest index. Raises UserError unless exactly one study is found."""
    index = place.latest()
    if index is None:
        names = place.studies()
        if len(names) > 1:
            which = ", ".join(f"{place.address}/{name}" for name in names)
            raise UserError(f"{place.address} holds {len(names)} studies: name one of {which}.")
        place = Place(f"{place.address}/{names[0]}") if names else place
        index = place.latest()
    if index is None or Study(Path(index.study)).header_file.name not in index.files:
        raise NothingThere(f"{place.address} holds no study that was mirrored with study.mirror.")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", index.study):
        raise UserError(f"{place.address} is not as ebc-lab writes it: its study has no plain name.")
    return place, index


def _here_already(root: Path, place: Place, index: Index) -> str:
    """Return a sentence saying that the study is here, or "" if `root` does not exist. The study is here if
    `root` matches the index or is the folder that is mirrored. Raises UserError for any other `root`."""
    if not root.exists():
        return ""
    note = try_read(Study(root).mirror_file, MirrorRecord)
    if note and note["address"] == place.address and note["writer"] == index.writer:
        return f"{root} is what is mirrored there: nothing was fetched"
    here = {path: digest_or_fault(root / path) for path in kept_elsewhere(root)}
    if here == {path: entry.sha256 for path, entry in index.files.items()}:
        return f"{root} has all of it already"
    raise UserError(
        f"{root} is another study, or is not as it is mirrored: move it away, or pull into another folder, "
        f"`ebc-lab pull {shlex.quote(place.address)} FOLDER`."
    )


def _fetch_study(place: Place, index: Index, root: Path, say: Say) -> tuple[Index, int, dict[str, str]]:
    """Collect all files in a folder beside `root`, and rename that folder to `root`. Returns the index that
    lists the files, the number of files fetched, and file -> what is wrong with the mirrored copy."""
    staging = Study(root.with_name(f".{root.name}.pull"))
    fetched, damaged = 0, dict[str, str]()
    for _ in range(TRIES):
        lacking = {p: e for p, e in index.files.items() if digest_or_fault(staging.root / p) != e.sha256}
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            faults = pool.map(partial(_fetch_file, place, staging.root), lacking, lacking.values())
            damaged = {path: what for path, what in zip(lacking, faults, strict=True) if what}
        fetched += len(lacking) - len(damaged)
        latest = place.latest() if damaged else None
        if latest is None or latest.number == index.number:
            break
        index = latest
    header = staging.header_file.name
    if header in damaged:
        raise UserError(f"{place.address}: {header} {damaged[header]}, and nothing goes on without it.")
    runs = {run for path in damaged if (run := manifest.owning_run(path))}
    for path in list(kept_elsewhere(staging.root)):
        if path not in index.files or manifest.owning_run(path) in runs:
            (staging.root / path).unlink()
    staging.runs.mkdir(exist_ok=True)
    for run in sorted(runs):
        say(f"run {run} is left out, and trained again by the study's command")
    since = [index.number, index.writer]
    note = MirrorRecord(address=place.address, writer=secrets.token_hex(8), since=since)
    write_json(staging.mirror_file, note)
    os.sync()
    os.replace(staging.root, root)
    return index, fetched, damaged


def _fetch_file(place: Place, into: Path, path: str, entry: Entry) -> str | None:
    """Fetch a file and return None. If the mirrored copy is missing or damaged, keep nothing and return what
    is wrong with it. Raises what the file system raises if the mirror is out of reach."""
    to = into / path
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(to) as temporary:
            place.fetch(path, entry, temporary)
            if manifest.sha256_of(temporary) != entry.sha256:
                raise ValueError
    except FileNotFoundError:
        return "is missing"
    except ValueError:
        return "is not what was written"
    return None

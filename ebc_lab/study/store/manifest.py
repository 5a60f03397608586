"""manifest.json: the sha256 of each file of a study, as it was when it was recorded.

* An entry is added once, at the end of the command that made the file, and never changed: no later command
  accepts an edit.
* Before a file is written again (of a run, a table, a plot), its entry is removed. A kill between the two
  leaves a file without an entry, never a wrong one.
* While a command is in progress, or after it was cut off, `complete` is false, and files may lack an entry.
* Not recorded: runs without a result, which still grow; what no command of ours writes; checkpoints and
  diagnoses of kept models, which are no evidence.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypedDict

from ebc_lab.config.errors import UserError
from ebc_lab.records.files import opened, write_atomic
from ebc_lab.records.json_files import json_bytes, read_checksummed, with_checksum
from ebc_lab.records.paths import DIAGNOSES, RUNS, RunFiles, StudyFiles, is_checkpoint

NAME = StudyFiles(Path()).manifest_file.name
RESULT = RunFiles(Path()).result.name
SPEC = RunFiles(Path()).spec.name
CHUNK = 1 << 16  # bytes of a file that are hashed at a time: most files are smaller
LONGEST_PART = 200  # characters of a file's or a folder's own name
LONGEST = 512  # characters of a path; the runs' own have about 150


class ManifestRecord(TypedDict):
    """What manifest.json holds."""

    complete: bool
    files: dict[str, str]  # path -> sha256


def read(root: Path) -> dict[str, Any]:
    """Return `files` (path -> sha256) and `complete`. Raises UserError: missing, cut off, edited."""
    if not (root / NAME).exists():
        raise UserError(
            f"study {root.name} has no {NAME}, which its command writes when it has finished: continue the "
            f"study, or, where a stage is decided, let `ebc-lab report {root.name}` write it."
        )
    report = f"`ebc-lab report {root.name}`"
    remedy = f"restore a copy, or delete it and let {report} record the files as they are now"
    record = read_checksummed(root / NAME, remedy, ManifestRecord)
    files = {path: sha256 for path, sha256 in record["files"].items() if not is_checkpoint(path)}
    return {**record, "files": files}


def entries(root: Path) -> dict[str, str]:
    """Return path -> sha256 of what is recorded; nothing without a manifest. Raises UserError as `read`."""
    recorded: dict[str, str] = read(root)["files"] if (root / NAME).exists() else {}
    return recorded


def begin(root: Path) -> None:
    """Record that a command is in progress. Raises UserError where the manifest was cut off or edited."""
    if (root / NAME).exists() and (record := read(root))["complete"]:
        _write(root, record["files"], complete=False)


def refuse_changed(root: Path) -> None:
    """Raise UserError where settings, a spec or a result, from which all else is computed, is not the file
    that was recorded, whatever its own checksum says."""
    study = StudyFiles(root)
    built_on = (study.header_file.name, f"{study.own.name}/*", f"{RUNS}/*/{RESULT}", f"{RUNS}/*/{SPEC}")
    for path, sha256 in entries(root).items():
        if not any(fnmatch(path, pattern) for pattern in built_on):
            continue
        with suppress(FileNotFoundError):  # deleted, to be made again
            if sha256_of(root / path) != sha256:
                run = owning_run(path)
                again = (
                    f"delete {root / RUNS / run}, and the run is trained again" if run else "restore a copy"
                )
                raise UserError(f"{root / path} was changed after it was recorded in {NAME}: {again}.")


def remove_entries(root: Path, *patterns: str, runs: Iterable[str] = (), but: Collection[str] = ()) -> None:
    """Remove the entries of files that are about to be written: of all files of these `runs`, and of the
    study's own files that fit a pattern and are not in `but`."""
    recorded, gone = entries(root), set(runs)
    left = {p: sha256 for p, sha256 in recorded.items() if p in but or not _is_meant(p, patterns, gone)}
    if len(left) < len(recorded):
        _write(root, left, complete=False)


def _is_meant(path: str, patterns: Sequence[str], runs: Collection[str]) -> bool:
    """Return whether a file belongs to one of the runs, or to none and fits one of the patterns."""
    run_id = owning_run(path)
    return run_id in runs if run_id else any(path == p or fnmatch(path, p) for p in patterns)


def complete(root: Path, describe: Callable[[Mapping[str, str]], None] | None = None) -> None:
    """Add entries for the study's own files and those of finished runs; existing entries do not change.
    `describe` is given all entries but that of the description of the study, and writes it."""
    known = entries(root)
    study = StudyFiles(root)
    patterns = (study.header_file.name, f"{study.own.name}/*", *study.conclusions())
    there = [path for path, is_ripe in files(root).items() if is_ripe]
    fresh = {run_id for path in there if (run_id := owning_run(path))} - set(map(owning_run, known))
    new = [path for path in there if path not in known and _is_meant(path, patterns, fresh)]
    known |= {path: sha256_of(root / path) for path in new}
    if describe:
        crate = study.crate_file
        describe({path: sha256 for path, sha256 in sorted(known.items()) if path != crate.name})
        known[crate.name] = sha256_of(crate)
    _write(root, known, complete=True)


def _write(root: Path, recorded: Mapping[str, str], *, complete: bool) -> None:
    write_atomic(root / NAME, content_for(recorded, complete=complete))


def content_for(recorded: Mapping[str, str], *, complete: bool = True) -> bytes:
    """Return the bytes of the manifest of a study that has these files."""
    record: ManifestRecord = {"complete": complete, "files": dict(sorted(recorded.items()))}
    return json_bytes(with_checksum(record))


def walk(root: Path, folder: str = "", *, runs: bool = True) -> Iterator[str]:
    """Yield the files below a folder of a study, as paths in the study, sorted folder by folder. Hidden
    files, Python's caches and the notes of `ebm diagnose` are left out, and without `runs` all runs."""
    start = len(os.path.join(root, ""))
    for inside, folders, names in os.walk(os.path.join(root, folder)):
        within = os.path.join(inside, "")[start:]
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
        if not runs and not within and RUNS in folders:
            folders.remove(RUNS)
        for name in sorted(names):
            if not name.startswith(".") and not name.endswith(DIAGNOSES):
                yield within + name


def files(root: Path) -> dict[str, bool]:
    """Return path -> whether it is to be recorded, which a file of a run without a result is not; of all
    files of a study but the manifest and checkpoints."""
    there = [path for path in walk(root) if path != NAME and not is_checkpoint(path)]
    ended = {None, *(owning_run(path) for path in there if path.endswith(f"/{RESULT}"))}
    return {path: owning_run(path) in ended for path in there}


def owning_run(path: str) -> str | None:
    """Return the run that a file belongs to, by its path in the study; None for the study's own files."""
    parts = path.split("/", 2)
    return parts[1] if parts[0] == RUNS and len(parts) > 2 else None


def is_safe(path: str) -> bool:
    """Return whether a path that somebody else wrote is a plain one inside a study, on any system."""
    return len(path) <= LONGEST and all(
        part not in ("", ".", "..")
        and len(part) <= LONGEST_PART
        and part.isprintable()
        and not set(part) & set('\\:*?"<>|')
        for part in path.split("/")
    )


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file. Raises as `opened`."""
    sha256 = hashlib.sha256()
    with opened(path) as f:
        while chunk := f.read(CHUNK):
            sha256.update(chunk)
    return sha256.hexdigest()

"""manifest.json: the sha256 of each file of a study at the time it was recorded.

* An entry is added once, at the end of the command that wrote the file, and is never updated. An edited file
  is therefore never accepted by a later command.
* Before a file is written again, its entry is removed. A kill between the two steps leaves a file without an
  entry, never a file with a wrong entry.
* While a command is in progress, or after it was cut off, `complete` is false and files may lack entries.
* Three kinds of files are not recorded: files of runs without a result, which still grow; files that no
  command writes; and checkpoints and diagnoses of kept models, which are no evidence.
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
CHUNK = 1 << 16  # bytes hashed at a time; most files are smaller
LONGEST_PART = 200  # characters in the name of a file or folder
LONGEST = 512  # characters in a path; those of runs have about 150


class ManifestRecord(TypedDict):
    """The contents of manifest.json."""

    complete: bool
    files: dict[str, str]  # path -> sha256


def read(root: Path) -> dict[str, Any]:
    """Return the manifest: `files` (path -> sha256, without checkpoints) and `complete`. Raises UserError if
    the manifest is missing, damaged or edited."""
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
    """Return path -> sha256 of the recorded files; empty without a manifest. Raises as `read` does."""
    recorded: dict[str, str] = read(root)["files"] if (root / NAME).exists() else {}
    return recorded


def begin(root: Path) -> None:
    """Record that a command is in progress. Raises UserError if the manifest is damaged or was edited."""
    if (root / NAME).exists() and (record := read(root))["complete"]:
        _write(root, record["files"], complete=False)


def refuse_changed(root: Path) -> None:
    """Raise UserError if study.json, a copy of one of the user's files, a spec or a result differs from the
    recorded file, even if the checksum inside the file is right. All other files are computed from these."""
    study = StudyFiles(root)
    built_on = (study.header_file.name, f"{study.own.name}/*", f"{RUNS}/*/{RESULT}", f"{RUNS}/*/{SPEC}")
    for path, sha256 in entries(root).items():
        if not any(fnmatch(path, pattern) for pattern in built_on):
            continue
        with suppress(FileNotFoundError):  # deleted by the user, so that it is made again
            if sha256_of(root / path) != sha256:
                run = owning_run(path)
                again = (
                    f"delete {root / RUNS / run}, and the run is trained again" if run else "restore a copy"
                )
                raise UserError(f"{root / path} was changed after it was recorded in {NAME}: {again}.")


def remove_entries(root: Path, *patterns: str, runs: Iterable[str] = (), but: Collection[str] = ()) -> None:
    """Remove the entries of files about to be rewritten: all files of `runs`, and those of the study's own
    files that match one of `patterns`. Entries of the paths in `but` are kept."""
    recorded, gone = entries(root), set(runs)
    left = {p: sha256 for p, sha256 in recorded.items() if p in but or not _is_meant(p, patterns, gone)}
    if len(left) < len(recorded):
        _write(root, left, complete=False)


def _is_meant(path: str, patterns: Sequence[str], runs: Collection[str]) -> bool:
    """Return whether a file belongs to one of `runs`, or belongs to no run and matches one of `patterns`."""
    run_id = owning_run(path)
    return run_id in runs if run_id else any(path == p or fnmatch(path, p) for p in patterns)


def complete(root: Path, describe: Callable[[Mapping[str, str]], None] | None = None) -> None:
    """Add the missing entries of the study's own files and of runs with a result, and set `complete`.
    `describe`, if given, writes ro-crate-metadata.json; it is called with the entries of all other files."""
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
    """Return the bytes of a manifest with the entries `recorded` (path -> sha256)."""
    record: ManifestRecord = {"complete": complete, "files": dict(sorted(recorded.items()))}
    return json_bytes(with_checksum(record))


def walk(root: Path, folder: str = "", *, runs: bool = True) -> Iterator[str]:
    """Yield the paths, relative to the study, of all files below `folder`, sorted within each folder. Leave
    out hidden files, Python's caches, the notes of `ebm diagnose` and, without `runs`, all runs."""
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
    """Return path -> whether the file is to be recorded, for all files of a study but the manifest and
    checkpoints. The files of a run are not recorded before the run has a result."""
    there = [path for path in walk(root) if path != NAME and not is_checkpoint(path)]
    ended = {None, *(owning_run(path) for path in there if path.endswith(f"/{RESULT}"))}
    return {path: owning_run(path) in ended for path in there}


def owning_run(path: str) -> str | None:
    """Return the id of the run to which a file of a study belongs; None for the study's own files."""
    parts = path.split("/", 2)
    return parts[1] if parts[0] == RUNS and len(parts) > 2 else None


def is_safe(path: str) -> bool:
    """Return whether an untrusted relative path stays inside a study and is valid on every system."""
    return len(path) <= LONGEST and all(
        part not in ("", ".", "..")
        and len(part) <= LONGEST_PART
        and part.isprintable()
        and not set(part) & set('\\:*?"<>|')
        for part in path.split("/")
    )


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file in hex. Raises the same errors as `opened`."""
    sha256 = hashlib.sha256()
    with opened(path) as f:
        while chunk := f.read(CHUNK):
            sha256.update(chunk)
    return sha256.hexdigest()

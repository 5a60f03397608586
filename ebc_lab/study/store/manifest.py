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
from ebc_lab.records.files import opened
from ebc_lab.records.json_files import read_checksummed, write_checksummed
from ebc_lab.records.paths import DIAGNOSES, RUNS, RunFiles, StudyFiles, is_checkpoint

NAME = StudyFiles(Path()).manifest_file.name
RESULT = RunFiles(Path()).result.name
SPEC = RunFiles(Path()).spec.name


class ManifestRecord(TypedDict):
    """What manifest.json holds."""

    complete: bool
    files: dict[str, str]  # path -> sha256


def read(root: Path) -> dict[str, Any]:
    """Return `files` (path -> sha256) and `complete`. Raises UserError: it is missing, truncated or
    edited."""
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


def begin(root: Path) -> None:
    """A command is in progress from now on. Raises UserError when the manifest was truncated or edited."""
    if (root / NAME).exists() and (record := read(root))["complete"]:
        _write(root, record["files"], complete=False)


def refuse_changed(root: Path) -> None:
    """Raise UserError where settings, a spec or a result, from which all else is computed, is not the file
    that was recorded, whatever its own checksum says."""
    if not (root / NAME).exists():
        return
    study = StudyFiles(root)
    copies = f"{study.own.name}/*"
    built_on = (study.header_file.name, copies, f"{RUNS}/*/{RESULT}", f"{RUNS}/*/{SPEC}")
    for path, sha256 in read(root)["files"].items():
        if not any(fnmatch(path, pattern) for pattern in built_on):
            continue
        with suppress(FileNotFoundError):  # deleted, to be made again
            if sha256_of(root / path) != sha256:
                run = run_of(path)
                what = (
                    f"delete {root / RUNS / run}, and the run is trained again" if run else "restore a copy"
                )
                raise UserError(f"{root / path} was changed after it was recorded in {NAME}: {what}.")


def remove_entries(root: Path, *patterns: str, runs: Iterable[str] = (), but: Collection[str] = ()) -> None:
    """Remove the entries of files that are about to be written: the study's by name, except for those in
    `but`, and all of `runs`."""
    if not (root / NAME).exists():
        return
    record = read(root)
    gone = set(runs)
    meant = {path for path in record["files"] if path not in but and _meant(path, patterns, gone)}
    entries = {path: sha256 for path, sha256 in record["files"].items() if path not in meant}
    if len(entries) < len(record["files"]):
        _write(root, entries, complete=False)


def _meant(path: str, patterns: Sequence[str], runs: set[str]) -> bool:
    run_id = run_of(path)
    return run_id in runs if run_id else any(path == p or fnmatch(path, p) for p in patterns)


def complete(root: Path, describe: Callable[[Mapping[str, str]], None] | None = None) -> None:
    """Add entries for the study's own files and those of finished runs; existing entries do not change.

    `describe`: is given all entries but that of the description of the study, and writes it.
    """
    known: dict[str, str] = read(root)["files"] if (root / NAME).exists() else {}
    there = {path: run_of(path) for path in files(root)}
    study = StudyFiles(root)
    meant = (study.header_file.name, f"{study.own.name}/*", *study.conclusions())
    fresh = {run_id for run_id in there.values() if run_id} - {run_of(path) for path in known}
    new = {path: sha256_of(root / path) for path in there if path not in known and _meant(path, meant, fresh)}
    entries = known | new
    if describe:
        crate = study.crate_file
        describe({path: sha256 for path, sha256 in sorted(entries.items()) if path != crate.name})
        entries[crate.name] = sha256_of(crate)
    _write(root, dict(sorted(entries.items())), complete=True)


def _write(root: Path, entries: dict[str, str], *, complete: bool) -> None:
    write_checksummed(root / NAME, {"complete": complete, "files": entries})


def files(root: Path, *, unfinished: bool = False) -> Iterator[str]:
    """Yield all files but the manifest, checkpoints, diagnoses and hidden ones; `unfinished`: also runs
    without a result."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(d for d in folders if not d.startswith(".") and d != "__pycache__")
        inside = os.path.relpath(folder, root)
        if os.path.dirname(inside) == RUNS and not unfinished and RESULT not in names:
            folders.clear()
            continue
        paths = (
            name if inside == "." else f"{inside}/{name}"
            for name in sorted(names)
            if not name.startswith(".")
        )
        for path in paths:
            if path != NAME and not path.endswith(DIAGNOSES) and not is_checkpoint(path):
                yield path


def run_of(path: str) -> str | None:
    """Return the run that a file belongs to, by its path in the study."""
    parts = path.split("/")
    return parts[1] if parts[0] == RUNS and len(parts) > 2 else None


def sha256_of(path: Path) -> str:
    with opened(path) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

"""manifest.json: the sha256 of each file of a study, as it was when it was recorded.

An entry is made once, at the end of the call that made the file, and then stays, whatever becomes of the file: no later call
blesses an edit. Whoever is about to write a file anew (a run that is trained again, a table, a plot) strikes its entry out
first, so a kill between the two leaves a file without an entry, never a wrong one. While a call is under way, or was cut off,
`complete` is false: files without an entry are then no surprise. Runs without a result still grow, and are not recorded; nor is
what no call of ours writes, nor a checkpoint, which only a failed run keeps: it is no evidence.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ebc_lab.config.errors import UserError
from ebc_lab.records.json_files import read_checksummed, write_checksummed
from ebc_lab.records.paths import RUNS, RunFiles, StudyFiles

NAME = StudyFiles(Path()).manifest_file.name
CHECKPOINT = f"/{RunFiles(Path()).checkpoint.name}"
RESULT = RunFiles(Path()).result.name


def read(root: Path) -> dict[str, Any]:
    """`files`, path -> sha256, and `complete`. Raises UserError when there is none, or it was truncated or edited."""
    if not (root / NAME).exists():
        raise UserError(
            f"study {root.name} has no {NAME}: it is written when a call ends; give the study's command again, or "
            f"`ebc-lab report {root.name}`."
        )
    remedy = f"bring back a copy, or delete it and let `ebc-lab report {root.name}` record the files as they are now"
    found = read_checksummed(root / NAME, remedy)
    files = {path: sha256 for path, sha256 in found["files"].items() if not path.endswith(CHECKPOINT)}
    return {**found, "files": files}


def begin(root: Path) -> None:
    """A call is under way from now on. Raises UserError when there is a manifest that cannot be trusted."""
    if (root / NAME).exists() and (found := read(root))["complete"]:
        _write(root, found["files"], complete=False)


def strike(root: Path, *patterns: str, runs: Iterable[str] = ()) -> None:
    """Take out the entries of files that are about to be written anew: by name in the study's own folder, or whole runs."""
    if not (root / NAME).exists():
        return
    found, gone = read(root), set(runs)
    kept = {path: sha256 for path, sha256 in found["files"].items() if not _meant(path, patterns, gone)}
    if len(kept) < len(found["files"]):
        _write(root, kept, complete=False)


def _meant(path: str, patterns: Sequence[str], runs: set[str]) -> bool:
    run_id = run_of(path)
    return run_id in runs if run_id else any(fnmatch(path, p) for p in patterns)


def complete(root: Path) -> None:
    """Record what has no entry yet: the study's own files, and finished runs as a whole. Entries that are there stay."""
    known: dict[str, str] = read(root)["files"] if (root / NAME).exists() else {}
    there = {path: run_of(path) for path in files(root)}
    study = StudyFiles(root)
    own = (study.header_file.name, *study.conclusions())
    fresh = {run_id for run_id in there.values() if run_id} - {run_of(path) for path in known}
    new = {path: sha256_of(root / path) for path in there if path not in known and _meant(path, own, fresh)}
    _write(root, dict(sorted((known | new).items())), complete=True)


def _write(root: Path, entries: dict[str, str], *, complete: bool) -> None:
    write_checksummed(root / NAME, {"complete": complete, "files": entries})


def files(root: Path, *, unfinished: bool = False) -> Iterator[str]:
    """All files but the manifest, checkpoints and hidden ones; those of a run without a result only with `unfinished`."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(d for d in folders if not d.startswith("."))
        inside = os.path.relpath(folder, root)
        if os.path.dirname(inside) == RUNS and not unfinished and RESULT not in names:
            folders.clear()
            continue
        paths = (
            name if inside == "." else f"{inside}/{name}"
            for name in sorted(names)
            if not name.startswith(".")
        )
        yield from (path for path in paths if path != NAME and not path.endswith(CHECKPOINT))


def run_of(path: str) -> str | None:
    """The run that a path of a study belongs to."""
    parts = path.split("/")
    return parts[1] if parts[0] == RUNS and len(parts) > 2 else None


def sha256_of(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

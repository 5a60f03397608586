"""Runs that another study in the same output folder has finished: copied, not trained again.

A run's name holds the hash of everything that can change its numbers, so a run of the same name is the same
run. Copies, not links: each study stays whole by itself, whatever becomes of the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ebc_lab.config.errors import UserError
from ebc_lab.records.figures import FINISHED, RunResult
from ebc_lab.records.files import read_regular, write_atomic
from ebc_lab.records.json_files import write_checksummed
from ebc_lab.records.locks import run_lock
from ebc_lab.records.paths import RunFiles
from ebc_lab.records.spec import RunSpec
from ebc_lab.records.streams import MOST_BYTES

from . import attempts, manifest
from .study import Study, studies_in


class Neighbour(NamedTuple):
    """Another study of the folder, and the runs that it has planned."""

    study: Study
    runs: frozenset[str]


def neighbours_of(study: Study) -> list[Neighbour]:
    """Return the other studies in a study's output folder, the newest first."""
    found = []
    for neighbour in studies_in(study.root.parent):
        if neighbour.name != study.name:
            with suppress(OSError):  # it may be somebody else's
                found.append(Neighbour(neighbour, frozenset(neighbour.run_ids())))
    return found


def finished_elsewhere(
    study: Study, specs: Sequence[RunSpec], neighbours: Sequence[Neighbour] | None = None
) -> dict[str, Study]:
    """Return run id -> a neighbour that has finished this very run, with the files that it recorded of it.

    Measurements of time are left out: they belong to a machine and an hour. `neighbours`: of the study, where
    they have been looked for.
    """
    elsewhere: dict[str, Study] = {}
    left = {s.run_id: s for s in specs if s.kind == "train"}
    for neighbour, runs in neighbours_of(study) if neighbours is None and left else neighbours or ():
        with suppress(OSError):
            there = [left[r] for r in left.keys() & runs if neighbour.has_result(r)]
            recorded = _recorded(neighbour) if there else {}
            for spec in there:
                if _sound_result(neighbour, spec, recorded):
                    elsewhere[spec.run_id] = neighbour
                    del left[spec.run_id]
    return {s.run_id: elsewhere[s.run_id] for s in specs if s.run_id in elsewhere}


def _recorded(study: Study) -> Mapping[str, str] | None:
    """Return what its manifest records; None where that cannot be trusted."""
    try:
        return manifest.read(study.root)["files"] if study.manifest_file.exists() else {}
    except (UserError, OSError):
        return None


def _sound_result(study: Study, spec: RunSpec, recorded: Mapping[str, str] | None) -> RunResult | None:
    """Return the result of a finished run whose files are as its result, and the manifest, recorded them."""
    if recorded is None:
        return None
    files = study.run_files(spec.run_id)
    try:
        result = study.results([spec])[spec.run_id]
        if result["outcome"] not in FINISHED:
            return None
        if not (_brief(study, files, recorded) or _streams_match(files, result)):
            return None
        for path in (files.result, *_copied(files, result)):
            known = recorded.get(str(path.relative_to(study.root)))
            if known is not None and manifest.sha256_of(path) != known:
                return None
    except (UserError, OSError, LookupError):
        return None
    return result


def _brief(study: Study, files: RunFiles, recorded: Mapping[str, str]) -> bool:
    """Return whether a run came with `ebc-lab export --brief`: recorded, but nothing that it logged."""
    names = [str(path.relative_to(study.root)) for path in (files.result, files.steps)]
    return not files.steps.exists() and names[0] in recorded and names[1] not in recorded


def _streams_match(files: RunFiles, result: RunResult) -> bool:
    recorded = result.get("streams", {})
    return {path.name: manifest.sha256_of(path) for path in _recorded_by(files, result)} == recorded


def _recorded_by(files: RunFiles, result: RunResult) -> tuple[Path, ...]:
    """Return the files whose checksums the result holds; a kept model is not every run's."""
    kept = (files.packed, files.model, files.weights)
    models = [path for path in kept if path.name in result.get("streams", {})]
    return (files.steps, files.evals, *models)


def _copied(files: RunFiles, result: RunResult) -> tuple[Path, ...]:
    return (*_recorded_by(files, result), files.log, files.attempts)


def take(study: Study, spec: RunSpec, neighbour: Study) -> bool:
    """Copy a finished run, its result last. -> False where that cannot be done: train it.

    A kill on the way leaves no result, so the run is taken, or trained, by the next command.
    """
    study.write_spec(spec)
    files = study.run_files(spec.run_id)
    with run_lock(files.directory) as mine:
        if not mine or files.result.exists():
            return False
        try:
            result = neighbour.results([spec])[spec.run_id]
            theirs = neighbour.run_files(spec.run_id)
            brief = not theirs.steps.exists() and _brief(neighbour, theirs, _recorded(neighbour) or {})
            copies = () if brief else zip(_copied(files, result), _copied(theirs, result), strict=True)
            contents = {to: read_regular(path, MOST_BYTES) if path.exists() else b"" for to, path in copies}
        except (UserError, OSError, LookupError):
            return False
        for path, content in contents.items():
            write_atomic(path, content)
        if not (brief or _streams_match(files, result)):  # somebody is changing them
            return False
        attempts.note(files.directory, "taken", study=neighbour.name)
        write_checksummed(files.result, result)
        files.checkpoint.unlink(missing_ok=True)
        files.progress.unlink(missing_ok=True)
    return True

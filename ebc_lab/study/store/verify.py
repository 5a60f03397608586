"""Is every file of a study the one that was recorded, and does each run belong to its name?

Reads only; needs neither the corpus nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ebc_lab.config.dicts import from_dict
from ebc_lab.config.errors import UserError, visible
from ebc_lab.config.identity import NAMED_BY, digest, environment, identity_of, recorded_environment
from ebc_lab.config.schema import RunConfig
from ebc_lab.records.json_files import read_json
from ebc_lab.records.paths import SpecRecord

from ..stages.rules import OTHER_VERSION, decision_problem
from . import manifest
from .study import OfAnotherRun, Study, recorded_config

CHANGED = "changed since it was recorded"
MISSING = "missing"
UNKNOWN = "not in the manifest"
FOREIGN = "was not written by the run it is named after"


def verify(study: Study) -> dict[str, Any]:
    """Return `bad`: each file that is not as it should be, with what is wrong and the remedy; `ok`: there is
    none.

    `under_way`: the last stage is not decided, a command is running the study, or one was cut off. Files that
    are not recorded yet are then only counted (`unrecorded`), as are those of runs in progress (`growing`).
    Raises UserError when there is no study or no manifest, or the manifest was truncated or edited.
    """
    study.must_exist()
    recorded = manifest.read(study.root)
    under_way = study.holder() is not None or not recorded["complete"] or not _ended(study)
    wrong = _compare(study.root, recorded["files"])
    if wrong:  # a file's entry is removed before the file is written: leave out those removed since
        recorded = manifest.read(study.root)
        wrong = {p: what for p, what in wrong.items() if p in recorded["files"]}
    there = set(manifest.files(study.root))
    unfinished = [p for p in manifest.files(study.root, unfinished=True) if p not in there]
    fresh = [p for p in there if p not in recorded["files"]]
    if not under_way:
        wrong |= dict.fromkeys(fresh, UNKNOWN)
    wrong = _contents(study, there.union(unfinished)) | wrong
    growing = sum(p not in recorded["files"] for p in unfinished)
    findings = {
        p: {"what": visible(what), "remedy": visible(_remedy(study, p, what))} for p, what in wrong.items()
    }
    bad = [{"file": visible(p), **findings[p]} for p in sorted(wrong)]
    return {
        "study": study.name,
        "root": str(study.root),
        "under_way": under_way,
        "files": len(recorded["files"]),
        "unrecorded": len(fresh) if under_way else 0,
        "growing": growing,
        "bad": bad,
        "ok": not bad,
    }


def _ended(study: Study) -> bool:
    try:
        return recorded_config(study.header()).study.stages[-1] in study.decisions()
    except UserError:
        return True  # then every unrecorded file is reported


def _compare(root: Path, recorded: Mapping[str, str]) -> dict[str, str]:
    """Return recorded file -> what is wrong with it."""
    wrong = {}
    for path, sha256 in recorded.items():
        try:
            if manifest.sha256_of(root / path) != sha256:
                wrong[path] = CHANGED
        except FileNotFoundError:
            wrong[path] = MISSING
        except (UserError, OSError):
            wrong[path] = "not a file that can be read"
    return wrong


def _contents(study: Study, files: set[str]) -> dict[str, str]:
    """Return file -> what is wrong: a study.json or decision that was edited, what is not its run's own."""
    wrong: dict[str, str] = {}
    try:
        study.header()
    except UserError:
        wrong[study.header_file.name] = "edited: its checksum does not match"
    try:
        recorded = study.decisions()
        problems = {stage: decision_problem(decision) for stage, decision in recorded.items()}
        what = "; ".join(f"{s}: {why}" for s, why in problems.items() if why and why != OTHER_VERSION)
    except UserError:
        what = "damaged or edited: it holds no decisions"
    if what:
        wrong[study.decisions_file.name] = what
    for run_id in sorted({r for path in files if (r := manifest.run_of(path))}):
        run = study.run_files(run_id)
        spec, result = (str(path.relative_to(study.root)) for path in (run.spec, run.result))
        expected = None
        if spec in files:
            try:
                expected = _identity_digest(study, run_id)
            except (UserError, OSError, KeyError, TypeError, AttributeError):
                wrong[spec] = "does not describe the run it is named after"
        elif result in files:
            wrong[spec] = MISSING
        try:
            record = study.result(run_id)
        except OfAnotherRun:
            wrong[result] = FOREIGN
            continue
        except UserError:
            wrong[result] = "damaged or edited: its checksum does not match, or it is no result"
            continue
        if record is not None and expected is not None and record.get("identity") != expected:
            wrong[result] = FOREIGN
            continue
        for name, sha256 in (record or {}).get("streams", {}).items():
            stream = f"{run.directory.relative_to(study.root)}/{name}"
            with suppress(UserError, OSError):  # `_compare` names it
                if stream in files and manifest.sha256_of(study.root / stream) != sha256:
                    wrong[stream] = CHANGED
    return wrong


def _identity_digest(study: Study, run_id: str) -> str:
    """Return the digest of a run's identity, from its spec. Raises UserError when the spec is not this
    run's."""
    spec = read_json(study.run_files(run_id).spec, SpecRecord)
    kind = spec["kind"]
    whole = spec["identity"]
    run: RunConfig = from_dict(RunConfig, spec["config"])
    named = whole if kind == "train" else whole["run"]
    with recorded_environment(environment(named)):
        if identity_of(kind, run) != whole:
            raise UserError(f"{run_id} is another run.")
    sha256 = digest(whole)
    if not run_id.endswith(f"-{sha256[:NAMED_BY]}"):
        raise UserError(f"{run_id} is another run.")
    return sha256


def _remedy(study: Study, path: str, what: str) -> str:
    run_id = manifest.run_of(path)
    if what == UNKNOWN:
        return f"move it out of {study.root} if it does not belong to the study"
    if run_id:
        return f"delete {study.run_dir(run_id)} and run the study's command again, which trains the run again"
    if path == study.header_file.name:
        return "restore a copy, or delete it and run the study's command again, which keeps unchanged runs"
    if path.startswith(f"{study.own.name}/"):
        return "restore a copy, or delete it and run the study's command again where your own file is"
    if path == study.decisions_file.name:
        return "run the study's command again, which decides again from the runs"
    return f"`ebc-lab report {study.name}` makes it again from the runs"

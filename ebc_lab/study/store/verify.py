"""Is every file of a study the one that was recorded? Each against manifest.json, and each run against its own name.

Reads, never writes; needs neither the corpus nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ebc_lab.config.dicts import from_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import as_recorded, describes, digest, environment, identity_of
from ebc_lab.config.schema import RunConfig
from ebc_lab.records.json_files import read_json

from . import manifest
from .study import Study

CHANGED, MISSING, UNKNOWN = "changed since it was recorded", "missing", "not in the manifest"


def verify(study: Study) -> dict[str, Any]:
    """`bad`: each file that is not what it should be, what is wrong with it, and the remedy; `ok` when there is none.

    `under_way`: the study has not come to its end, a call is on it, or was cut off; files that are not recorded yet are then
    only counted (`unrecorded`), as are the files of runs without a result (`growing`).
    Raises UserError when there is no study or no manifest, or the manifest was truncated or edited.
    """
    study.must_exist()
    recorded = manifest.read(study.root)
    under_way = study.holder() is not None or not recorded["complete"] or not _ended(study)
    wrong = _compare(study.root, recorded["files"])
    if wrong:  # whoever writes a file strikes it out first: ask again about those that were struck meanwhile
        recorded = manifest.read(study.root)
        wrong = {p: what for p, what in wrong.items() if p in recorded["files"]}
    there, all_there = (list(manifest.files(study.root, unfinished=u)) for u in (False, True))
    fresh = [p for p in there if p not in recorded["files"]]
    if not under_way:
        wrong |= dict.fromkeys(fresh, UNKNOWN)
    wrong = _contents(study, set(all_there)) | wrong
    growing = len(set(all_there) - set(there) - set(recorded["files"]))
    bad = [{"file": p, "what": what, "remedy": _remedy(study, p, what)} for p, what in sorted(wrong.items())]
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
        return study.header()["config"]["study"]["stages"][-1] in study.decisions()
    except UserError:
        return True  # then nothing is excused


def _compare(root: Path, recorded: Mapping[str, str]) -> dict[str, str]:
    """Recorded file -> what is wrong with it."""
    wrong = {}
    for path, sha256 in recorded.items():
        try:
            if manifest.sha256_of(root / path) != sha256:
                wrong[path] = CHANGED
        except FileNotFoundError:
            wrong[path] = MISSING
        except OSError as error:
            wrong[path] = f"cannot be read ({error.strerror})"
    return wrong


def _contents(study: Study, files: set[str]) -> dict[str, str]:
    """Files of runs whose content does not belong to the run, and a study.json that was edited -> what is wrong."""
    wrong: dict[str, str] = {}
    try:
        study.header()
    except UserError:
        wrong[study.header_file.name] = "edited: its checksum does not hold"
    for run_id in sorted({r for path in files if (r := manifest.run_of(path))}):
        run = study.run_files(run_id)
        spec, result = (str(path.relative_to(study.root)) for path in (run.spec, run.result))
        expected = None
        if spec in files:
            try:
                expected = _named(study, run_id)
            except (UserError, OSError, KeyError, TypeError, AttributeError):
                wrong[spec] = "does not describe the run it is named after"
        elif result in files:
            wrong[spec] = MISSING
        try:
            found = study.result(run_id)
        except UserError:
            wrong[result] = "damaged or edited: its checksum does not hold"
            continue
        if found is not None and expected is not None and found.get("identity") != expected:
            wrong[result] = "was not written by the run it is named after"
    return wrong


def _named(study: Study, run_id: str) -> str:
    """The digest of a run's identity, from its spec. Raises UserError when the spec is not this run's."""
    spec = read_json(study.run_files(run_id).spec)
    kind, whole = spec["kind"], spec["identity"]
    run: RunConfig = from_dict(RunConfig, spec["config"])
    own = whole if kind == "train" else whole["run"]
    with as_recorded(environment(own)):
        if identity_of(kind, run) != whole or not describes(kind, run, run_id):
            raise UserError(f"{run_id} is another run.")
    return digest(whole)


def _remedy(study: Study, path: str, what: str) -> str:
    run_id = manifest.run_of(path)
    if what == UNKNOWN:
        return f"move it out of {study.root}, if it is none of the study's"
    if run_id:
        return f"delete {study.run_dir(run_id)} and give the study's command again: the run is trained anew"
    if path == study.header_file.name:
        return "bring back a copy, or delete it and give the study's command again: runs that are still the same are kept"
    if path == study.decisions_file.name:
        return "give the study's command again: it decides anew from the runs"
    return f"`ebc-lab report {study.name}` makes it anew from the runs"

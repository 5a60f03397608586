"""A check that every file of a study is the file that was recorded, and that each run matches its name.

The check only reads, and needs neither the corpus nor torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ebc_lab.config.dicts import from_dict
from ebc_lab.config.errors import UserError, visible
from ebc_lab.config.identity import NAMED_BY, digest, environment, identity_of, recorded_environment
from ebc_lab.config.schema import RunConfig
from ebc_lab.records.json_files import read_json
from ebc_lab.records.paths import RUNS, SpecRecord

from ..stages.rules import OTHER_VERSION, decision_problem
from . import manifest
from .study import OfAnotherRun, Study, recorded_config

CHANGED = "changed since it was recorded"
MISSING = "missing"
UNREADABLE = "not a file that can be read"
NO_DIGEST = (MISSING, UNREADABLE)
UNKNOWN = "not in the manifest"
FOREIGN = "was not written by the run it is named after"
EDITED = "edited: its checksum does not match"


def verify(study: Study, recorded: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the findings on a study. `bad` lists each faulty file with the fault and a remedy; `ok` is true
    if no file is faulty.

    `under_way` means that the last stage is undecided, or that a command is running or was cut off. In that
    case, files that are not recorded yet are no fault but are counted in `unrecorded`. Files of runs without
    a result are always only counted, in `growing`. `recorded`: the manifest, if the caller has just read it.
    Raises UserError if there is no study or no manifest, or if the manifest was truncated or edited.
    """
    study.must_exist()
    recorded = recorded or manifest.read(study.root)
    try:
        finished = recorded_config(study.header(), checked=False).study.stages[-1] in study.decisions()
    except UserError:
        finished = True  # then every unrecorded file is reported
    under_way = study.holder() is not None or not recorded["complete"] or not finished
    digests = {path: digest_or_fault(study.root / path) for path in recorded["files"]}
    if mismatches(recorded["files"], digests):
        recorded = manifest.read(study.root)  # files being rewritten now have lost their entries by now
        digests = {path: sha256 for path, sha256 in digests.items() if path in recorded["files"]}
    there = manifest.files(study.root)
    new = [path for path in there if path not in recorded["files"]]
    unrecorded = [path for path in new if there[path]]
    unknown = [] if under_way else unrecorded
    listed = {path: sha256 for path, sha256 in recorded["files"].items() if path in digests}
    wrong = faults(study, there, digests) | mismatches(listed, digests) | dict.fromkeys(unknown, UNKNOWN)
    bad = [
        {"file": visible(path), "what": visible(what), "remedy": visible(_remedy(study, path, what))}
        for path, what in sorted(wrong.items())
    ]
    return {
        "study": study.name,
        "root": str(study.root),
        "under_way": under_way,
        "files": len(recorded["files"]),
        "unrecorded": len(unrecorded) if under_way else 0,
        "growing": len(new) - len(unrecorded),
        "bad": bad,
        "ok": not bad,
    }


def digest_or_fault(path: Path) -> str:
    """Return the sha256 of a file; MISSING if it does not exist, and UNREADABLE if it cannot be read."""
    try:
        return manifest.sha256_of(path)
    except FileNotFoundError:
        return MISSING
    except (UserError, OSError):
        return UNREADABLE


def mismatches(recorded: Mapping[str, str], digests: Mapping[str, str]) -> dict[str, str]:
    """Return file -> fault for each recorded file that has one. `digests`: path -> `digest_or_fault`."""
    found = {path: digests.get(path, MISSING) for path in recorded}
    wrong = [path for path, sha256 in recorded.items() if found[path] != sha256]
    return {path: found[path] if found[path] in NO_DIGEST else CHANGED for path in wrong}


def faults(study: Study, files: Collection[str], digests: Mapping[str, str]) -> dict[str, str]:
    """Return, by file, each fault found in the contents of a study's files: an edited study.json or decision,
    or a spec, result or stream that belongs to another run. `digests`: path -> sha256, if known."""
    wrong: dict[str, str] = {}
    try:
        study.header()
    except UserError:
        wrong[study.header_file.name] = EDITED
    try:
        problems = {stage: decision_problem(decision) for stage, decision in study.decisions().items()}
        what = "; ".join(f"{s}: {why}" for s, why in problems.items() if why not in (None, OTHER_VERSION))
    except UserError:
        what = "damaged or edited: it holds no decisions"
    if what:
        wrong[study.decisions_file.name] = what
    sound: set[bytes] = set()
    for run_id in sorted({run for path in files if (run := manifest.owning_run(path))}):
        wrong |= _faults_of_run(study, run_id, files, digests, sound)
    return wrong


def _faults_of_run(
    study: Study, run_id: str, files: Collection[str], digests: Mapping[str, str], sound: set[bytes]
) -> dict[str, str]:
    """Return the faults of the files of one run, as `faults` does. `sound`: as in `_identity_digest`."""
    folder = f"{RUNS}/{run_id}"
    spec, result = f"{folder}/{manifest.SPEC}", f"{folder}/{manifest.RESULT}"
    wrong: dict[str, str] = {}
    expected = None
    if spec in files:
        try:
            expected = _identity_digest(study, run_id, sound)
        except (UserError, OSError, KeyError, TypeError, AttributeError):
            wrong[spec] = "does not describe the run it is named after"
    elif result in files:
        wrong[spec] = MISSING
    try:
        record = study.result(run_id)
    except OfAnotherRun:
        return wrong | {result: FOREIGN}
    except UserError:
        return wrong | {result: "damaged or edited: its checksum does not match, or it is no result"}
    if record is None:
        return wrong
    if expected not in (None, record.get("identity")):
        return wrong | {result: FOREIGN}
    streams = {f"{folder}/{name}": sha256 for name, sha256 in record.get("streams", {}).items()}
    for path in (path for path in streams if path in files):
        sha256 = digests.get(path) or digest_or_fault(study.root / path)
        if sha256 not in (streams[path], *NO_DIGEST):  # `mismatches` reports those without a digest
            wrong[path] = CHANGED
    return wrong


def _identity_digest(study: Study, run_id: str, sound: set[bytes]) -> str:
    """Return the digest of a run's identity, taken from the spec. Raises UserError if the spec is another
    run's. `sound`: hashes of pairs of settings and identity, both without the seed, that have been found to
    agree. This function adds to it, so that the comparison is made once for all runs of an arm."""
    spec = read_json(study.run_files(run_id).spec, SpecRecord)
    kind, whole = spec["kind"], spec["identity"]
    of_run = whole if kind == "train" else whole["run"]
    seed = spec["config"]["seed"]
    same = type(seed) is int and of_run["seed"] == seed
    rest = json.dumps([kind, {**spec["config"], "seed": 0}, {**of_run, "seed": 0}]).encode()
    without_seed = hashlib.blake2b(rest, digest_size=16).digest()
    if same and without_seed not in sound:
        run: RunConfig = from_dict(RunConfig, spec["config"])
        with recorded_environment(environment(of_run)):
            same = identity_of(kind, run) == whole
        if same:
            sound.add(without_seed)
    sha256 = digest(whole)
    if not (same and run_id.endswith(f"-{sha256[:NAMED_BY]}")):
        raise UserError(f"{run_id} is another run.")
    return sha256


def _remedy(study: Study, path: str, what: str) -> str:
    run_id = manifest.owning_run(path)
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

"""The studies and bundles in a folder, with a line about each."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ebc_lab.config.errors import MISTAKEN, UserError, visible
from ebc_lab.records.files import NO_SOUND_ZIP
from ebc_lab.records.json_files import parse_json
from ebc_lab.records.paths import StudyFiles
from ebc_lab.study.stages.rules import decision_problem
from ebc_lab.study.stages.stage import ending_stages, stage_of
from ebc_lab.study.store import manifest
from ebc_lab.study.store.bundle import SUFFIX
from ebc_lab.study.store.study import Study, studies_in

HEADER, DECISIONS = StudyFiles(Path()).header_file.name, StudyFiles(Path()).decisions_file.name
TIMED = ("overhead_", "step_")  # what the names of runs that measure time begin with
MOST_OF_A_FILE = 32 << 20  # bytes of a file in a bundle that is read here


def places(folder: Path) -> list[Path]:
    """Return the studies and bundles in a folder, the newest first."""
    dated = [(os.stat(study.header_file).st_mtime, study.root) for study in studies_in(folder)]
    for path in folder.glob(f"*{SUFFIX}"):
        with suppress(OSError):
            about = os.stat(path)
            dated += [(about.st_mtime, path)] if stat.S_ISREG(about.st_mode) else []
    return [path for _, path in sorted(dated, key=lambda pair: -pair[0])]


def catalogue(folder: Path) -> list[dict[str, Any]]:
    """Return an entry for each study and bundle in a folder, the last written first.

    Its keys are `name`, `place` (the path), `bundle` (whether it is one), `state` (`running`, `finished`,
    `interrupted`, `empty` or `damaged`), `stages`, `scale`, `runs` (the number of training runs), `written`
    (ISO time), `bytes`, and `headline`: what was found, or what is wrong. Damage raises no error.
    """
    entries = [_about(path) for path in places(folder)]
    return sorted(entries, key=lambda one: one["written"] or "", reverse=True)


def _about(path: Path) -> dict[str, Any]:
    bundle = path.suffix == SUFFIX and path.is_file()
    entry: dict[str, Any] = {"name": visible(path.stem if bundle else path.name), "place": visible(str(path))}
    entry |= {"bundle": bundle, "state": "damaged", "stages": [], "scale": None, "runs": 0}
    entry |= {"written": None, "bytes": None, "headline": ""}
    try:
        recorded = _of_bundle(path) if bundle else _of_folder(path)
    except (UserError, *NO_SOUND_ZIP, *MISTAKEN) as error:
        return entry | {"headline": visible(str(error) or type(error).__name__)}
    return entry | recorded


def _of_folder(path: Path) -> dict[str, Any]:
    study = Study(path)
    entry = _of_records(study.header(), study.decisions(), study.run_ids())
    written = study.decisions_file if study.decisions_file.exists() else study.header_file
    if study.holder() is not None:
        entry["state"] = "running"
    return entry | {"written": _time(os.stat(written).st_mtime), "bytes": _size(path)}


def _of_bundle(path: Path) -> dict[str, Any]:
    """Return the entry of a bundle, from three of its files; only `ebc-lab verify` checks all."""
    with zipfile.ZipFile(path) as archive:
        files = _member(archive, manifest.NAME)["files"]
        header = _member(archive, HEADER)
        decisions = _member(archive, DECISIONS) if DECISIONS in files else {}
    runs = {run for name in files if (run := manifest.owning_run(name))}
    about = os.stat(path)
    return _of_records(header, decisions, runs) | {"written": _time(about.st_mtime), "bytes": about.st_size}


def _member(archive: zipfile.ZipFile, name: str) -> Any:
    if archive.getinfo(name).file_size > MOST_OF_A_FILE:
        raise UserError(f"{name} is too large to be a study's.")
    return parse_json(archive.read(name))


def _of_records(header: Mapping[str, Any], decisions: Mapping[str, Any], runs: Any) -> dict[str, Any]:
    """Return the part of an entry that study.json and the decisions give. `runs`: ids of all runs."""
    stages = list(header["config"]["study"]["stages"])
    done = [stage for stage in stages if stage in decisions]
    return {
        "state": state_of(stages, decisions, runs),
        "stages": stages,
        "scale": header["config"].get("scale"),
        "runs": sum(not name.startswith(TIMED) for name in runs),
        "headline": visible(_headline(done, decisions)),
    }


def state_of(stages: Sequence[str], decisions: Container[str], runs: Any) -> str:
    """Return `finished` if the last stage is decided, else `interrupted`, or `empty` without any runs."""
    if stages[-1] in decisions:
        return "finished"
    return "interrupted" if runs else "empty"


def _headline(done: list[str], decisions: Mapping[str, Any]) -> str:
    """Return the answers about the user's own arms, each after its verdict, or else what the last decided
    stage found. `done`: the decided stages."""
    if not done:
        return ""
    if why := decision_problem(decisions[done[-1]]):
        return f"{done[-1]} cannot be used: {why}"
    found: list[str] = []
    for stage in ending_stages({name: d for name in done if not decision_problem(d := decisions[name])}):
        answers = [
            f"{answer['verdict']}: {label}; {answer['sentence']}" if answer["verdict"] else answer["sentence"]
            for track in decisions[stage]["tracks"].values()
            for label, answer in (track.get("answers") or {}).items()
        ]
        found += answers or stage_of(stage).headlines(decisions[stage])
    return "; ".join(found)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _size(folder: Path) -> int:
    """Return the number of bytes in all files below a folder."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(root, name)).st_size
    return total

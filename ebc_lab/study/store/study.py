"""A study's folder: what is in it, and who is running it. Reading never writes."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypedDict, cast

from ebc_lab.config.dicts import from_dict, to_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import matches_run_id
from ebc_lab.config.schema import STAGES, Config, RunConfig
from ebc_lab.records.figures import RunResult
from ebc_lab.records.json_files import as_json, read_checksummed, read_json, write_json
from ebc_lab.records.locks import study_holder, study_lock
from ebc_lab.records.paths import SpecRecord, StudyFiles

from ..stages.spec import RunSpec
from . import manifest

RETRIED = ("lost", "cancelled")  # outcomes that say nothing about the run itself
RETRIED_UNFINISHED = (*RETRIED, "failed", "oom")  # by a study whose last stage is not decided


class CorpusRecord(TypedDict):
    """The corpus in study.json."""

    name: str
    title: str
    sha256: str
    warning: str | None


class StudyHeader(TypedDict):
    """What study.json holds."""

    study: str
    created: str
    ebc_lab: str  # the version that wrote it
    requested: dict[str, Any]  # settings as they were asked for
    config: dict[str, Any]  # settings as they were resolved
    environment: dict[str, Any]  # what the names of runs depend on in addition to settings
    chosen: dict[str, str]  # setting -> why it was chosen automatically
    corpus: CorpusRecord
    versions: dict[str, Any]
    git: str | None
    hardware: dict[str, Any]


def settings_of(header: Mapping[str, Any]) -> Config:
    """The settings in study.json, resolved. Raises UserError where another version wrote them."""
    try:
        found: Config = from_dict(Config, header["config"])
    except UserError as error:
        raise UserError(
            f"study {header['study']} cannot be read here ({str(error).rstrip('.')}): use that version of "
            "ebc-lab, or choose another study.name."
        ) from None
    return found


@dataclass(frozen=True)
class Record:
    """The files of a planned run, read. `problem`: why its spec or its result, then None, cannot be used."""

    run_id: str
    spec: SpecRecord | None
    result: RunResult | None
    problem: str | None = None


class Study(StudyFiles):
    """One study under `output_dir/name`."""

    resumable = True  # commands may train in it; a bundle is only read

    @property
    def name(self) -> str:
        return self.root.name

    def exists(self) -> bool:
        return self.header_file.exists()

    def must_exist(self) -> None:
        """Raises UserError when there is no study here."""
        if not self.exists():
            raise UserError(
                f"there is no study at {self.root}: start it with `ebc-lab autopilot study.name={self.name}`."
            )

    def header(self, *, checked: bool = True) -> StudyHeader:
        """study.json. Raises UserError: no study here, or the file was truncated or (`checked`) edited."""
        self.must_exist()
        if not checked:
            return cast(StudyHeader, read_json(self.header_file))
        remedy = (
            "undo the edit (settings are changed on the command line, with --force), or delete the file: the "
            "study's command writes it again and keeps the runs that are still the same"
        )
        return cast(StudyHeader, read_checksummed(self.header_file, remedy))

    def decisions(self) -> dict[str, Any]:
        """Stage -> decision, in the order of the stages. Raises UserError when the file was truncated."""
        path = self.decisions_file
        found = read_json(path) if path.exists() else {}
        if not isinstance(found, dict):
            raise UserError(
                f"{path} was edited: delete it, and the study's command decides again from the runs."
            )
        return found

    def result(self, run_id: str) -> RunResult | None:
        """A run's result, if it has one. Raises UserError when it was truncated or edited."""
        files = self.run_files(run_id)
        try:
            remedy = f"delete {files.directory}, and the study's command trains the run again"
            return cast(RunResult, read_checksummed(files.result, remedy))
        except FileNotFoundError:
            return None

    def has_result(self, run_id: str) -> bool:
        return self.run_files(run_id).result.exists()

    def results(self, specs: Iterable[RunSpec]) -> dict[str, RunResult]:
        """Run id -> result, of those `specs` that have one. Raises UserError: edited, or another run's."""
        found = {}
        for spec in specs:
            result = self.result(spec.run_id)
            if result is not None:
                self.refuse_other_runs(spec, result)
                found[spec.run_id] = result
        return found

    def refuse_other_runs(self, spec: RunSpec, result: Mapping[str, Any]) -> None:
        """Raises UserError when a result in a run's folder belongs to another run."""
        if result.get("identity") != spec.identity_sha256:
            files = self.run_files(spec.run_id)
            raise UserError(
                f"{files.result} was not written by this run: delete {files.directory} to train it again."
            )

    def records(self) -> list[Record]:
        """Every planned run; what is wrong with one is in its `problem`, and not raised."""
        return [record for run_id in self.run_ids() if (record := self._record(run_id))]

    def _record(self, run_id: str) -> Record | None:
        files = self.run_files(run_id)
        spec: SpecRecord | None = None
        result: RunResult | None = None
        problem: str | None = None
        try:
            spec = _parsed_spec(files.spec.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError) as error:
            problem = f"{files.spec} is damaged ({error}): delete {files.directory}"
        try:
            result = self.result(run_id)
        except UserError as error:
            problem = str(error)
        if result is not None and spec is not None and result.get("run_id", run_id) != run_id:
            result = None
            problem = f"{files.result} is another run's: delete {files.directory} to train it again."
        return Record(run_id, spec, result, problem)

    def read_spec(self, run_id: str) -> tuple[str, RunConfig]:
        """(kind, configuration) of a planned run. Raises UserError when its spec does not match its name."""
        path = self.run_files(run_id).spec
        spec = read_json(path)
        run: RunConfig = from_dict(RunConfig, spec["config"])
        if not matches_run_id(spec["kind"], run, run_id):
            raise UserError(f"{path} does not describe {run_id}: delete the folder, and it is planned again.")
        return spec["kind"], run

    def progress(self, run_id: str) -> dict[str, Any] | None:
        path = self.run_files(run_id).progress
        try:
            return dict(read_json(path))
        except (OSError, UserError):  # none, or being replaced; on NFS also stale for a moment
            return None

    def holder(self) -> dict[str, Any] | None:
        """Which process is running the study now, or None; found without taking the lock or writing."""
        return study_holder(self)

    def prepare(self) -> None:
        """Make the folder and check that it can be written. Raises UserError."""
        try:
            self.runs.mkdir(parents=True, exist_ok=True)
            probe = self.root / f".probe.{os.getpid()}"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"{self.root} cannot be written ({error.strerror}): choose another output_dir."
            ) from None

    def held(self) -> AbstractContextManager[None]:
        """Be the only process that runs this study. Raises UserError, naming the other one."""
        self.must_be_ours()
        return study_lock(self)

    def must_be_ours(self) -> None:
        """Raises UserError where this user may read the study and not change it."""
        if self.root.exists() and not os.access(self.root, os.W_OK | os.X_OK):
            raise UserError(
                f"{self.root} belongs to another user and cannot be changed: status, why, verify, diff, "
                "watch and export --output read it, and `ebc-lab report` of a bundle of it makes a copy."
            )

    def note_command(self, words: Sequence[str]) -> None:
        """Keep the command that runs the study, with the folder in which it was given."""
        about = {"words": list(words), "folder": os.getcwd(), "study": str(self.root.resolve())}
        write_json(self.command_file, about)

    def noted_command(self) -> str | None:
        """That command, for a shell in this folder; None if none was kept, or the study was moved since."""
        try:
            about = read_json(self.command_file)
            words, folder, place = about["words"], about["folder"], about["study"]
        except (OSError, UserError, KeyError, TypeError):
            return None
        if place != str(self.root.resolve()):
            return None
        there = "" if folder == os.getcwd() else f"cd {shlex.quote(folder)} && "
        return there + shlex.join(words)

    def write_spec(self, spec: RunSpec) -> None:
        """Make a run's folder and spec.json, once."""
        files = self.run_files(spec.run_id)
        files.directory.mkdir(parents=True, exist_ok=True)
        if files.spec.exists():
            return
        record: SpecRecord = {
            "run_id": spec.run_id,
            "kind": spec.kind,
            "stage": spec.stage,
            "role": spec.role,
            "arm": spec.arm,
            "lr_scale": spec.lr_scale,
            "identity": spec.identity,
            "config": to_dict(spec.run),
        }
        write_json(files.spec, record)

    def write_decision(self, stage: str, decision: Mapping[str, Any]) -> bool:
        """Record a decision. If it replaces a different one, remove what was built on that. -> whether so."""
        known = self.decisions()
        before = known.get(stage)
        if before is not None and before == as_json(decision):
            return False
        if before is not None:
            self.drop_conclusions()
        kept = {s: known[s] for s in STAGES[: STAGES.index(stage)] if s in known}
        manifest.remove_entries(self.root, self.decisions_file.name)
        write_json(self.decisions_file, {**kept, stage: decision})
        return before is not None

    def drop_conclusions(self) -> None:
        """Remove decisions, verdict, tables and plots, which are made again from the runs."""
        manifest.remove_entries(self.root, *self.conclusions())
        for pattern in (*self.conclusions(), self.plotted_file.name):
            for path in self.root.glob(pattern):
                path.unlink()

    def forget(self, outcomes: Iterable[str], stages: Iterable[str]) -> list[str]:
        """Remove results of `stages` with one of `outcomes`, so that they are trained again. -> run ids."""
        wanted = set(outcomes)
        among = set(stages)
        gone = []
        for record in self.records():
            if record.spec is None or record.result is None:
                continue
            if record.result["outcome"] in wanted and record.spec["stage"] in among:
                gone.append(record.run_id)
        manifest.remove_entries(self.root, runs=gone)
        for run_id in gone:
            self.run_files(run_id).result.unlink()
        return gone


class Cancelled(Exception):
    """The study was stopped with `ebc-lab cancel`."""


def _parsed_spec(content: bytes) -> SpecRecord:
    """A spec.json. Raises ValueError, KeyError or TypeError when it is damaged."""
    spec = json.loads(content)
    missing = {"stage", "role", "arm", "kind", "identity"} - set(spec)
    if missing:
        raise KeyError(min(missing))
    int(spec["config"]["seed"])
    return cast(SpecRecord, spec)

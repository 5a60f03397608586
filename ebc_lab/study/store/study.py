"""A study's folder: its files, and the process that runs the study. Reading never writes."""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import msgspec

from ebc_lab.config.choices import choices_of
from ebc_lab.config.dicts import from_dict, to_dict
from ebc_lab.config.errors import UserError, any_of, blamed, nearest, shown
from ebc_lab.config.identity import NAMED_BY, digest, matches_run_id
from ebc_lab.config.schema import STAGES, Config, RunConfig
from ebc_lab.config.study_checks import validate
from ebc_lab.records.decisions import Decision
from ebc_lab.records.figures import OUTCOMES, RunResult
from ebc_lab.records.files import opened
from ebc_lab.records.json_files import as_json, read_checksummed, read_json, read_sealed, try_read, write_json
from ebc_lab.records.locks import study_holder, study_lock
from ebc_lab.records.paths import ProgressRecord, ShownSettings, SpecRecord, StudyFiles
from ebc_lab.records.spec import RunSpec

from ..stages.rules import inputs_of
from ..stages.stage import stage_of
from . import attempts, manifest

HEADER_REMEDY = (
    "undo the edit (settings are changed on the command line, with --force), or delete the file: the "
    "study's command writes it again and keeps the runs that are still the same"
)
RETRIED = ("lost", "cancelled")  # outcomes that say nothing about the run itself
RETRIED_UNFINISHED = (*RETRIED, "failed", "oom")  # what a study retries until its last stage is decided


class CorpusRecord(TypedDict):
    """The corpus in study.json."""

    name: str
    title: str
    sha256: str
    warning: str | None


class NotedCommand(TypedDict):
    """The contents of .command.json."""

    words: list[str]
    folder: str
    study: str


class OwnRecord(TypedDict):
    """The entry in study.json about the files in own/, which are copies of the user's files."""

    suite: str | None  # name of the suite's file among them; None where there is none
    files: dict[str, str]  # name below own/ -> sha256


class EarlierAnswer(TypedDict):
    """An earlier answer to the study's question, given by another study."""

    study: str
    seeds: list[int]  # that it was judged on
    shared: list[int]  # those that the new study judges on again; empty: its seeds are all fresh


class StudyHeader(TypedDict):
    """The contents of study.json."""

    study: str
    created: str
    ebc_lab: str  # the version that wrote it
    requested: dict[str, Any]  # settings as given, before `auto` values are resolved
    config: dict[str, Any]  # settings as resolved
    environment: dict[str, Any]  # what run names depend on besides the settings
    chosen: dict[str, str]  # setting -> why it was chosen automatically
    corpus: CorpusRecord
    versions: dict[str, Any]
    git: str | None
    hardware: dict[str, Any]
    own: NotRequired[OwnRecord]  # missing where there are none
    earlier: NotRequired[list[EarlierAnswer]]  # missing where there are none
    looks: NotRequired[list[int]]  # up to 1.0 in place of `earlier`: the number of seeds of each answer


def recorded_config(header: Mapping[str, Any], *, checked: bool = True) -> Config:
    """Return the settings in study.json. Raises UserError if this version cannot read them or, with
    `checked`, if they contradict each other. The check for contradictions is slow in a study of many arms."""
    try:
        config: Config = from_dict(Config, header["config"])
        if checked:
            validate(config, study=True, here=False)
    except UserError as error:
        raise UserError(
            f"study {header['study']} cannot be read here ({str(error).rstrip('.')}): use that version of "
            "ebc-lab, or choose another study.name."
        ) from None
    return config


class Brief(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The facts about a run that are often needed; nothing else is kept in memory for every run."""

    run_id: str
    kind: str | None = None  # None if the spec is unusable; then all fields up to `tokens` are defaults
    stage: str = ""
    arm: str = ""
    seed: int = 0
    steps: int = 0
    optimizer: str = ""
    stabilizer: str = ""
    tokens: int = 0  # per step
    outcome: str | None = None  # None without a usable result; then those up to `checksum` are defaults
    cause: str | None = None
    wall_s: float | None = None
    stopped_at: int = 0  # steps taken
    identity: str | None = None
    weights: str | None = None  # checksum of the weights that were judged
    checksum: str = ""  # of the result
    history: attempts.History | None = None  # None: its log was not read


class PlannedRun(TypedDict):
    """The keys that spec.json must have for a run of a study. The file has other keys as well."""

    run_id: str
    kind: str
    stage: str
    role: str
    arm: str
    lr_scale: NotRequired[float | None]
    identity: dict[str, Any]
    config: ShownSettings


@dataclass(frozen=True)
class Record:
    """A planned run of a study. `problem`: why the spec or the result cannot be used; None if both can."""

    study: Study
    brief: Brief
    problem: str | None = None

    @property
    def run_id(self) -> str:
        return self.brief.run_id

    @property
    def spec(self) -> SpecRecord | None:
        """Return the run's spec, read from the file; None if it was unusable when the record was made, or has
        been removed since. Raises UserError if it has been damaged since."""
        with suppress(FileNotFoundError):
            return self.study.spec(self.run_id) if self.brief.kind is not None else None
        return None

    @property
    def result(self) -> RunResult | None:
        """Return the run's result, read from the file; None if there is no usable result."""
        return self.study.result(self.run_id) if self.brief.outcome else None

    @cached_property
    def history(self) -> attempts.History:
        """Return what the run's log of attempts says, read from the file unless it was read before."""
        return self.brief.history or attempts.history(self.study.run_dir(self.run_id))


class Study(StudyFiles):
    """A study in the folder `output_dir/name`."""

    resumable = True  # commands may train in it; a bundle is only read

    @property
    def called(self) -> str:
        """Return the name or path by which commands and `ebc_lab.load` find the study from this folder."""
        return self.root.name if self.root.parent == Path(Config.output_dir) else str(self.place)

    def exists(self) -> bool:
        return self.header_file.exists()

    def must_exist(self) -> None:
        """Raise UserError if the folder holds no study."""
        if self.exists():
            return
        names = [study.name for study in studies_in(self.root.parent)]
        near = nearest(self.name, names)
        there = f" (studies there: {any_of(names)})" if names else ""
        place = self.root if self.root.parent.name else f"./{self.root}"
        setting = "study" if self.name in choices_of("study", None) else "study.name"
        start = "" if near else f"start it with `ebc-lab autopilot {setting}={self.name}`, or "
        raise UserError(
            f"there is no study at {place}{near}{there}: {start}say where it is with --output-dir."
        )

    def must_have(self, stage: str, stages: Sequence[str]) -> None:
        """Raise UserError if a stage is none of the study's `stages`."""
        if stage not in stages:
            near = nearest(stage, stages)
            raise UserError(
                f"study {self.name} has no stage {shown(stage)}{near}: it has {', '.join(stages)}."
            )

    def blame_files(self) -> AbstractContextManager[None]:
        """Return a context that replaces any error caused by malformed contents of the study's files with a
        UserError. Contents may be malformed even though their checksum is right."""
        remedy = f"`ebc-lab verify {self.name}` names it, and the study's command makes decisions again"
        return blamed(f"a file of study {self.name}", remedy)

    def header(self, *, checked: bool = True) -> StudyHeader:
        """Return the contents of study.json. Raises UserError if there is no study, if the file is damaged
        or, with `checked`, if it was edited."""
        self.must_exist()
        if not checked:
            return cast(StudyHeader, read_json(self.header_file, StudyHeader, HEADER_REMEDY))
        return cast(StudyHeader, read_checksummed(self.header_file, HEADER_REMEDY, StudyHeader))

    def decisions(self) -> dict[str, Any]:
        """Return stage -> decision, in stage order. Raises UserError if the decisions file is damaged."""
        remedy = "delete it, and the study's command decides again from the runs"
        try:
            return dict(read_json(self.decisions_file, dict[str, dict[str, Any]], remedy))
        except FileNotFoundError:
            return {}

    def result(self, run_id: str) -> RunResult | None:
        """Return a run's result; None if the run has none. Raises UserError if the result was truncated or
        edited, and OfAnotherRun if it belongs to another run."""
        return self._sealed_result(run_id)[0]

    def _sealed_result(self, run_id: str) -> tuple[RunResult | None, str]:
        """Return a run's result as `result` does, and the checksum in the file (empty without a result)."""
        files = self.run_files(run_id)
        remedy = f"delete {files.directory}, and the study's command trains the run again"
        try:
            value, checksum = read_sealed(files.result, remedy, RunResult)
        except FileNotFoundError:
            return None, ""
        recorded = cast(RunResult, value)
        identity = recorded.get("identity") or ""  # none where the spec could not be read
        if recorded.get("run_id", run_id) != run_id or not run_id.endswith(identity[:NAMED_BY]):
            raise OfAnotherRun(f"{files.result} was not written by this run: {remedy}.")
        if recorded.get("outcome") not in OUTCOMES:
            raise UserError(f"{files.result} is damaged (it does not say how the run ended): {remedy}.")
        if recorded.get("grad_norm_quantiles") == []:
            raise UserError(f"{files.result} is damaged (grad_norm_quantiles is empty): {remedy}.")
        return recorded, checksum

    def has_result(self, run_id: str) -> bool:
        return self.run_files(run_id).result.exists()

    def results(self, specs: Iterable[RunSpec]) -> dict[str, RunResult]:
        """Return run id -> result for those `specs` that have a result. Raises UserError as `result` does."""
        known = {}
        for spec in specs:
            if (result := self.result(spec.run_id)) is None:
                continue
            if result.get("identity") != spec.identity_sha256:
                files = self.run_files(spec.run_id)
                raise OfAnotherRun(
                    f"{files.result} was not written by this run: delete {files.directory} to train it again."
                )
            known[spec.run_id] = result
        return known

    def results_of(self, decision: Decision) -> dict[str, RunResult]:
        """Return run id -> result for the runs that a decision was made from and that have a result."""
        known = {run_id: self.result(run_id) for _, run_id in inputs_of(decision)}
        return {run_id: result for run_id, result in known.items() if result is not None}

    def records(self) -> list[Record]:
        """Return every planned run. A fault in a run's files raises no error: `problem` describes it."""
        return [record for run_id in self.run_ids() if (record := self.record(run_id))]

    def record(self, run_id: str) -> Record | None:
        """Return the record of one planned run, or None if it has no spec. Damaged files raise no error; the
        record's `problem` describes the damage."""
        about: dict[str, Any] = {}
        problem: str | None = None
        try:
            spec = self.spec(run_id)
            run = spec["config"]
            about |= {key: spec[key] for key in ("kind", "stage", "arm")}
            about |= {key: run[key] for key in ("seed", "steps")}
            about |= {key: run[key]["name"] for key in ("optimizer", "stabilizer")}
            about["tokens"] = run["batch_size"] * run["model"]["context"]
        except FileNotFoundError:
            return None
        except UserError as error:
            problem = str(error)
        try:
            result, about["checksum"] = self._sealed_result(run_id)
            if result is not None:
                about |= {key: result.get(key) for key in ("outcome", "cause", "wall_s", "identity")}
                about |= {"stopped_at": result.get("steps", 0), "weights": result.get("weights_checksum")}
        except UserError as error:
            problem = str(error)
        return Record(self, Brief(run_id, **about), problem)

    def read_spec(self, run_id: str) -> tuple[str, RunConfig]:
        """Return (kind, configuration) of a planned run. Raises UserError if they belong to another name."""
        spec = self.spec(run_id)
        run: RunConfig = from_dict(RunConfig, spec["config"])
        with suppress(LookupError):  # a choice that this version does not know
            if matches_run_id(spec["kind"], run, run_id):
                return spec["kind"], run
        path = self.run_files(run_id).spec
        raise UserError(f"{path} does not describe {run_id}: delete the folder, and it is planned again.")

    def spec(self, run_id: str) -> SpecRecord:
        """Return the contents of a run's spec.json. Raises FileNotFoundError if the file does not exist, and
        UserError if it is damaged or belongs to another run."""
        files = self.run_files(run_id)
        remedy = f"delete {files.directory}, and the run is planned again"
        spec = cast(SpecRecord, read_json(files.spec, PlannedRun, remedy))
        if spec["run_id"] != run_id or not run_id.endswith(digest(spec["identity"])[:NAMED_BY]):
            raise UserError(f"{files.spec} is another run's: {remedy}.")
        return spec

    def progress(self, run_id: str) -> dict[str, Any] | None:
        """Return the contents of a run's progress.json; None if the file is missing or cannot be read."""
        progress: dict[str, Any] | None = try_read(self.run_files(run_id).progress, ProgressRecord)
        return progress

    def last_evaluation(self, run_id: str) -> tuple[int, float] | None:
        """Return (step, validation loss) of a run's latest evaluation; None if none can be read."""
        with suppress(OSError, UserError, ValueError, LookupError), opened(self.run_files(run_id).evals) as f:
            rows = f.read().decode().splitlines(keepends=True)
            whole = [row for row in rows[1:] if row.endswith("\n")]
            step, loss, *_ = whole[-1].split(",")
            return int(step), float(loss)
        return None

    def holder(self) -> dict[str, Any] | None:
        """Return which process runs the study now (`study_holder`); None if there is none. Writes nothing."""
        return study_holder(self)

    def prepare(self) -> None:
        """Create the study's folder. Raises UserError if the folder cannot be written."""
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
        """Return a context during which no other process can run this study. Raises UserError if this user
        may not change the study, or if another process runs it, which the error names."""
        self.must_be_ours()
        return study_lock(self)

    def must_be_ours(self) -> None:
        """Raise UserError if this user may not change the study."""
        if self.root.exists() and not os.access(self.root, os.W_OK | os.X_OK):
            raise UserError(
                f"{self.root} belongs to another user and cannot be changed: status, why, verify, diff, "
                "watch and export --output read it, and `ebc-lab report` of a bundle of it makes a copy."
            )

    def note_command(self, words: Sequence[str]) -> None:
        """Record the command that runs the study, and the working folder."""
        about: NotedCommand = {"words": list(words), "folder": os.getcwd(), "study": str(self.root.resolve())}
        write_json(self.command_file, about)

    def noted_command(self) -> str | None:
        """Return the recorded command as a line to paste into a shell in the working folder. Return None if
        no command was recorded, or the study has been moved since."""
        about: NotedCommand | None = try_read(self.command_file, NotedCommand)
        if about is None or about["study"] != str(self.root.resolve()):
            return None
        there = "" if about["folder"] == os.getcwd() else f"cd {shlex.quote(about['folder'])} && "
        return there + shlex.join(about["words"])

    def write_spec(self, spec: RunSpec) -> None:
        """Create a run's folder and write its spec.json. Do nothing if spec.json exists."""
        files = self.run_files(spec.run_id)
        if files.spec.exists():
            return
        files.directory.mkdir(parents=True, exist_ok=True)
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
        """Record a decision. If it replaces a different decision, remove the conclusions drawn from the old
        one and return True; otherwise, return False."""
        known = self.decisions()
        replaced = stage in known
        if replaced and known[stage] == as_json(decision):
            return False
        earlier = STAGES[: STAGES.index(stage)]
        if replaced:
            self.drop_conclusions(but=[stage_of(s).summary_csv for s in earlier])
        manifest.remove_entries(self.root, self.decisions_file.name)
        write_json(self.decisions_file, {**{s: known[s] for s in earlier if s in known}, stage: decision})
        return replaced

    def drop_conclusions(self, but: Collection[str] = ()) -> None:
        """Remove the decisions, the verdict, tables and plots. All of these can be made again from the runs.
        `but`: names of files to keep."""
        manifest.remove_entries(self.root, *self.conclusions(), but=but)
        for pattern in (*self.conclusions(), self.plotted_file.name):
            for path in self.root.glob(pattern):
                if path.name not in but:
                    path.unlink()

    def forget(
        self, records: Iterable[Record], outcomes: Collection[str], stages: Collection[str]
    ) -> list[str]:
        """Remove the results of runs in `stages` whose outcome is one of `outcomes`, so that these runs are
        trained again. Return the ids of these runs. `records`: all runs of the study."""
        gone = [r.run_id for r in records if r.brief.stage in stages and r.brief.outcome in outcomes]
        manifest.remove_entries(self.root, runs=gone)
        for run_id in gone:
            self.run_files(run_id).result.unlink()
        return gone


def study_of(config: Config) -> Study:
    """Return the study that a configuration names."""
    return Study(Path(config.output_dir).expanduser() / config.study.name)


def studies_in(folder: Path) -> list[Study]:
    """Return the studies in a folder, newest first. Studies that this user cannot access are left out."""
    written: dict[Study, float] = {}
    for study in map(Study, folder.glob("*")):
        with suppress(OSError):
            about = os.stat(study.header_file)
            if stat.S_ISREG(about.st_mode):
                written[study] = about.st_mtime
    return sorted(written, key=written.__getitem__, reverse=True)


def study_around(path: Path) -> Study | None:
    """Return the study that a path is, or in whose folder it lies; None if there is none."""
    return next((study for study in map(Study, (path, *path.parents)) if study.exists()), None)


def run_again(study: str, run_id: str) -> str:
    """Return the command line that trains one run again and compares it with the recording. `study`: the name
    or path by which a command finds it."""
    return shlex.join(["ebc-lab", "rerun", study, "--run", run_id])


class OfAnotherRun(UserError):
    """The error that a run's folder holds the result of another run."""


class Cancelled(Exception):
    """A signal that the study was stopped by `ebc-lab cancel`."""

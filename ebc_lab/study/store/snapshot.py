"""A study read once, at one moment, for commands that report on it: its settings, decisions and runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import cast

from ebc_lab.config.errors import UserError, blamed
from ebc_lab.config.identity import digest, recorded_environment, study_environment
from ebc_lab.config.schema import Config
from ebc_lab.records.decisions import Decision
from ebc_lab.records.figures import RunResult
from ebc_lab.records.json_files import read_json
from ebc_lab.records.spec import RunSpec

from ..stages.rules import decision_problem, inputs_digest, inputs_of, settings_of_stage
from ..stages.stage import ResultsOf, stage_of
from . import counts, manifest, reuse
from .index import Index
from .study import Record, Study, StudyHeader, recorded_config


@dataclass(frozen=True)
class Snapshot:
    """The contents of a study's files at the moment when they were read."""

    study: Study
    header: StudyHeader
    config: Config
    decisions: dict[str, Decision]  # as recorded, in the order of the stages
    faults: dict[str, str]  # stage -> why its recorded decision cannot be used
    index: Index
    records: list[Record]  # every planned run
    name: str  # digest of study.json and the decisions file
    problems: list[str]  # a sentence for each damaged file, with a remedy

    @cached_property
    def record_of(self) -> dict[str, Record]:
        """Return run id -> planned run."""
        return {record.run_id: record for record in self.records}

    @property
    def finished(self) -> bool:
        """Return whether the last stage is decided."""
        return self.config.study.stages[-1] in self.decisions

    def sound_decisions(self) -> dict[str, Decision]:
        """Return stage -> decision. Raises UserError if any was edited or made by an incompatible version."""
        if self.faults:
            what = "; ".join(f"{stage}: {why}" for stage, why in self.faults.items())
            raise UserError(
                f"{self.study.decisions_file} cannot be used ({what}): run the study's command again, which "
                "decides again from the runs, and trains again those that this version trains otherwise."
            )
        return self.decisions

    def decided(self, stage: str | None) -> list[str]:
        """Return a stage or, for None, all decided stages in their order. Raises UserError if the stage, or
        every stage, is undecided."""
        asked = [s for s in self.config.study.stages if s in self.decisions and stage in (None, s)]
        if not asked:
            name = self.study.name
            raise UserError(f"{stage or 'no stage'} of study {name} is {'not ' if stage else ''}decided yet.")
        return asked

    def sound_records(self) -> list[Record]:
        """Return all planned runs. Raises UserError if the files of any run are damaged."""
        if problems := self.index.problems:
            raise UserError(problems[0])
        return self.records

    def results_of(self, specs: list[RunSpec]) -> dict[str, RunResult]:
        """Return run id -> result for those `specs` that have a result. Raises UserError if one of these
        results is damaged or belongs to another run."""
        planned = [spec for spec in specs if spec.run_id in self.record_of]
        for record in (self.record_of[spec.run_id] for spec in planned):
            if record.problem and not record.brief.outcome:
                raise UserError(record.problem)
        return self.study.results(planned)

    def sorts_of_runs(self) -> dict[str, str]:
        """Return run id -> sort (`counts.sorts_of_runs`), ignoring decisions that cannot be used."""
        sound = {stage: d for stage, d in self.decisions.items() if stage not in self.faults}
        return counts.sorts_of_runs(self.records, sound)

    def trained_by(self) -> dict[str, list[str]]:
        """Return which software trained which of the runs in use (`counts.trained_by`)."""
        return counts.trained_by(self.records, self.sorts_of_runs())

    def reusable_results(self) -> ResultsOf:
        """Return a function that maps specs to the results that the study's own command would keep."""
        return reuse.reusable_results(self.records, finished=self.finished)

    def stale_decisions(self) -> dict[str, str]:
        """Compare hashes and return, by stage, why the recorded decision no longer follows from the files. No
        decision is made again. A bundle is judged under the library versions that it recorded."""
        recorded = recorded_environment(self.header["environment"])
        with nullcontext() if self.study.resumable else recorded:
            state = self.index.state
            key = f"{self.name} {digest(study_environment(self.config))} {state}" if state else ""
            found = self.index.remembered("stale", key, lambda: json.dumps(self._find_stale_decisions()))
        return cast(dict[str, str], json.loads(found))

    def _find_stale_decisions(self) -> dict[str, str]:
        versions = reuse.environment_changes(self.config, self.header)
        changed = [f"{what} is {now} here and was {old}" for what, old, now in versions]
        stale: dict[str, str] = {}
        sound: dict[str, Decision] = {}
        for stage in (s for s in self.config.study.stages if s in self.decisions):
            if why := self.faults.get(stage):
                reasons = [*changed, why]
            else:
                reasons = changed + self._changed_inputs(stage, sound)
                sound[stage] = self.decisions[stage]
            if stale:
                reasons.append(f"it builds on {next(reversed(stale))}, which is stale")
            if reasons:
                stale[stage] = "; ".join(reasons)
        return stale

    def _changed_inputs(self, stage: str, earlier: Mapping[str, Decision]) -> list[str]:
        """Return why a decision no longer follows from the results on disk; an empty list if it does."""
        decision = self.decisions[stage]
        run_ids = list(dict.fromkeys(run_id for _, run_id in inputs_of(decision)))
        among: dict[str, list[str]] = {"missing": [], "edited": []}
        for run_id in run_ids:
            record = self.record_of.get(run_id)
            if record and record.problem:
                among["edited"].append(run_id)
            elif not (record and record.brief.outcome):
                among["missing"].append(run_id)
        reasons = [reuse.runs_in_words(runs, len(run_ids), what) for what, runs in among.items() if runs]
        if not reasons and self._inputs_digest(stage, earlier) != decision["inputs_sha256"]:
            reasons.append(
                "it was made from other results, settings or earlier decisions than those that are there now"
            )
        return reasons

    def _inputs_digest(self, stage: str, earlier: Mapping[str, Decision]) -> str:
        """Return the `inputs_digest` of a stage's decision for the current inputs. It is cached until the
        settings, the inputs of an earlier decision or a run's result change."""
        runs = inputs_of(self.decisions[stage])
        before = {s: d["inputs_sha256"] for s, d in earlier.items()}
        settings = digest([settings_of_stage(self.config, stage), before])
        checksums = digest([[role, run_id, self.record_of[run_id].brief.checksum] for role, run_id in runs])
        return self.index.remembered(
            f"inputs of {stage}",
            f"{settings} {checksums}",
            lambda: inputs_digest(self.config, stage, runs, self._result, earlier),
        )

    def _result(self, run_id: str) -> RunResult:
        """Return a run's result, read from the file each time. It is not kept in memory."""
        with suppress(OSError, UserError):
            content = read_json(self.study.run_files(run_id).result)
            # with an unchanged checksum, the check made for the record is not repeated
            if content.pop("checksum", "") == self.record_of[run_id].brief.checksum:
                return cast(RunResult, content)
        if (result := self.study.result(run_id)) is None:
            raise UserError(f"{run_id} was removed while the study was read: ask again.")
        return result


def read(study: Study, *, strict: bool = True, runs: Index | None = None) -> Snapshot:
    """Return a snapshot of a study. Damaged runs are named in the snapshot's `problems`.

    `strict`: raise UserError if study.json or auto_decisions.json is damaged; otherwise, `problems` names it.
    `runs`: the index, if the caller has just read it. Raises UserError if settings are missing or unreadable.
    """
    problems: list[str] = []
    try:
        header = study.header()
    except UserError as error:
        if strict:
            raise
        try:
            header = study.header(checked=False)
        except UserError:
            raise error from None
        problems.append(str(error))
    try:
        decisions = study.decisions()
    except UserError as error:
        if strict:
            raise
        decisions = {}
        problems.append(str(error))
    runs = runs or Index(study)
    problems += runs.problems

    def check_decisions() -> str:
        found = {stage: _fault(stage, decision) for stage, decision in decisions.items()}
        return json.dumps({stage: why for stage, why in found.items() if why})

    decided = manifest.sha256_of(study.decisions_file) if decisions else ""
    faults = json.loads(runs.remembered("faults", decided, check_decisions))
    settings = digest(header["config"])
    sound = runs.recall("settings", settings) == "sound"
    config = recorded_config(header, checked=not sound)  # UserError if settings contradict each other
    if not sound:
        runs.remember("settings", settings, "sound")
    name = digest([header, decided])
    return Snapshot(study, header, config, decisions, faults, runs, runs.records, name, problems)


def _fault(stage: str, decision: Decision) -> str | None:
    """Return why a recorded decision cannot be used; None if it can."""
    if why := decision_problem(decision):
        return why
    try:
        with blamed("it", "it is decided again"):
            stage_of(stage).headlines(decision)
    except UserError:
        return "its record in auto_decisions.json is not what this stage decides"
    return None

"""One reading of a study: settings, decisions and runs, for everything that answers questions about it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from ebc_lab.config.errors import UserError, blamed
from ebc_lab.config.identity import digest, recorded_environment, study_environment
from ebc_lab.config.schema import Config
from ebc_lab.records.decisions import Decision
from ebc_lab.records.figures import RunResult
from ebc_lab.records.spec import RunSpec

from ..stages.rules import decision_problem
from ..stages.stage import ResultsOf, stage_of
from . import counts, index, manifest, reuse
from .index import Index
from .study import Record, Study, StudyHeader, recorded_config


@dataclass(frozen=True)
class Snapshot:
    """A study's files as they were when it was read."""

    study: Study
    header: StudyHeader
    config: Config
    decisions: dict[str, Decision]  # as recorded, in the order of the stages
    wrong: dict[str, str | None]  # stage -> what `decision_problem` says of its recorded decision
    faults: dict[str, str]  # stage -> why that cannot be used
    index: Index  # of every planned run
    name: str  # of settings and decisions as they are
    problems: list[str]  # what is damaged, with a remedy each

    @property
    def records(self) -> list[Record]:
        """Return every planned run."""
        return self.index.records

    @property
    def finished(self) -> bool:
        """Tell whether the last stage is decided."""
        return self.config.study.stages[-1] in self.decisions

    def sound_decisions(self) -> dict[str, Decision]:
        """Return all decisions. Raises UserError when one was edited, or is another version's."""
        if self.faults:
            what = "; ".join(f"{stage}: {why}" for stage, why in self.faults.items())
            raise UserError(
                f"{self.study.decisions_file} cannot be used ({what}): run the study's command again, which "
                "decides again from the runs, and trains again those that this version trains otherwise."
            )
        return self.decisions

    def sound_records(self) -> list[Record]:
        """Return all planned runs. Raises UserError when the files of one are damaged."""
        for record in self.records:
            if record.problem:
                raise UserError(record.problem)
        return self.records

    def results_of(self, specs: list[RunSpec]) -> dict[str, RunResult]:
        """Return run id -> result, of those `specs` that have one. Raises UserError: damaged, or another
        run's."""
        known = {record.run_id: record for record in self.records}
        results = {}
        for spec in specs:
            record = known.get(spec.run_id)
            if record is None:
                continue
            if (result := record.result) is not None:
                self.study.refuse_other_runs(spec, result)
                results[spec.run_id] = result
            elif record.problem:
                raise UserError(record.problem)
        return results

    def sorts_of_runs(self) -> dict[str, str]:
        """Return run id -> whether it is a training run, a measurement, or one that no decision uses."""
        sound = {stage: d for stage, d in self.decisions.items() if stage not in self.faults}
        return counts.sorts_of_runs(self.records, sound)

    def reusable_results(self) -> ResultsOf:
        """Return the results that the same command would take as they are."""
        return reuse.reusable_results(self.records, finished=self.finished)

    def stale_decisions(self) -> dict[str, str]:
        """Return stage -> why its decision no longer follows from the files (in a bundle, under any
        torch)."""

        def find() -> str:
            return json.dumps(self._stale_decisions())

        with self._environment():
            of = f"{self.name} {digest(study_environment(self.config))}"
            found: dict[str, str] = json.loads(self.index.remembered("stale", find, of))
        return found

    def _stale_decisions(self) -> dict[str, str]:
        with self._environment():
            return reuse.stale_decisions(
                self.config, self.header, self.decisions, self.records, self.index.remembered, self.wrong
            )

    def _environment(self) -> AbstractContextManager[None]:
        return nullcontext() if self.study.resumable else recorded_environment(self.header["environment"])


def read(study: Study, *, strict: bool = True, runs: Index | None = None) -> Snapshot:
    """Read all of a study. `problems` lists damaged runs, and a damaged study.json or auto_decisions.json.

    `runs`: as they were looked at just before; `strict`: raises UserError where one of those two files is
    damaged. Raises UserError in any case when there is no study, or its settings cannot be read.
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
    runs = runs or index.look(study)
    problems += runs.problems
    of = manifest.sha256_of(study.decisions_file) if decisions else ""
    wrong, faults = _checked(decisions, runs, of)
    config = _settings(header, runs)
    name = digest([header, of])
    return Snapshot(study, header, config, decisions, wrong, faults, runs, name, problems)


def _settings(header: StudyHeader, runs: Index) -> Config:
    """Return `recorded_config`; settings that were found sound once are."""

    def check() -> str:
        recorded_config(header)
        return "sound"

    runs.remembered("settings", check, digest(header["config"]), runs=False)
    return recorded_config(header, checked=False)


def _checked(
    decisions: Mapping[str, Decision], runs: Index, of: str
) -> tuple[dict[str, str | None], dict[str, str]]:
    """Return (stage -> what `decision_problem` says, stage -> why its decision cannot be used). `of`: names
    the file that they are from."""

    def check() -> str:
        return json.dumps({stage: _faults(stage, decision) for stage, decision in decisions.items()})

    checked = json.loads(runs.remembered("decisions", check, of, runs=False))
    faults = {stage: fault for stage, (_, fault) in checked.items() if fault}
    return {stage: wrong for stage, (wrong, _) in checked.items()}, faults


def _faults(stage: str, decision: Decision) -> tuple[str | None, str | None]:
    """Say what is wrong with a recorded decision, and why it cannot be used: edited, another version's, or
    not what its stage decides."""
    if why := decision_problem(decision):
        return why, why
    try:
        with blamed("it", "it is decided again"):
            decider = stage_of(stage)
            decider.headlines(decision)
            decider.would_change(decision)
    except UserError:
        return None, "its record in auto_decisions.json is not what this stage decides"
    return None, None

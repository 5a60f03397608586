"""What of a study can be reused: which decisions follow from its files, and what would be trained again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ebc_lab.config.identity import by_name, study_environment
from ebc_lab.config.schema import Config
from ebc_lab.records.decisions import Decision
from ebc_lab.records.figures import RunResult
from ebc_lab.records.spec import RunSpec

from ..stages.rules import Results, Undecidable, decision_problem, inputs_digest, inputs_of
from ..stages.runs import distinct
from ..stages.stage import ResultsOf, planned_runs, stage_of
from .study import RETRIED, RETRIED_UNFINISHED, Record


@dataclass(frozen=True)
class StageWork:
    """What a command would do in a stage: train the `missing` ones of its `runs`, and reuse the others.

    Both are None where that depends on how an earlier stage decides.
    """

    stage: str
    runs: int | None = None
    missing: int | None = None
    undecidable: bool = False  # although no result is missing


def remaining_work(config: Config, results_of: ResultsOf) -> list[StageWork]:
    """Return what a command would train in each stage, as far as the results tell; sweeps may still
    extend."""
    decisions: dict[str, Decision] = {}
    work: list[StageWork] = []
    for stage in config.study.stages:
        if work and (work[-1].missing != 0 or work[-1].undecidable):
            work.append(StageWork(stage))
            continue
        specs, results = planned_runs(stage, config, decisions, results_of)
        runs = distinct(specs)
        missing = sum(s.run_id not in results for s in runs)
        undecidable = False
        if not missing and stage != config.study.stages[-1]:
            try:
                decisions[stage] = stage_of(stage).decide(config, specs, results, decisions)
            except Undecidable:
                undecidable = True
        work.append(StageWork(stage, len(runs), missing, undecidable))
    return work


def work_in_words(work: Sequence[StageWork]) -> str:
    """Return `lr_sweep: all 8 kept; calibrate: 3 of 5 would be trained; finals: decided again after that`."""
    parts = []
    for look in work:
        if look.missing is None:
            continue
        what = f"all {look.runs}" if look.missing in (0, look.runs) else f"{look.missing} of {look.runs}"
        note = ", which cannot be decided from them" if look.undecidable else ""
        parts.append(f"{look.stage}: {what} {'would be trained' if look.missing else 'kept'}{note}")
    after = [look.stage for look in work if look.missing is None]
    if after:
        parts.append(f"{', '.join(after)}: decided again after that")
    return "; ".join(parts)


def reusable_results(records: Sequence[Record], *, finished: bool) -> ResultsOf:
    """Return the results that a command would take as they are; it trains the other runs again."""
    again = RETRIED if finished else RETRIED_UNFINISHED
    known = {r.run_id: r.result for r in records if r.result is not None and r.result["outcome"] not in again}

    def results_of(specs: list[RunSpec]) -> dict[str, RunResult]:
        there = ((s, known.get(s.run_id)) for s in specs)
        return {s.run_id: r for s, r in there if r is not None and r.get("identity") == s.identity_sha256}

    return results_of


def stale_decisions(
    config: Config, header: Mapping[str, Any], decisions: Mapping[str, Decision], records: Sequence[Record]
) -> dict[str, str]:
    """Return stage -> why its recorded decision no longer follows from the results and the decisions before
    it.

    Only hashes are compared; nothing is decided again.
    """
    results = {r.run_id: r.result for r in records if r.result is not None}
    damaged = {r.run_id for r in records if r.problem}
    changed = [f"{k} is {new} here and was {old}" for k, old, new in environment_changes(config, header)]
    stale: dict[str, str] = {}
    sound: dict[str, Decision] = {}
    for stage in (s for s in config.study.stages if s in decisions):
        decision = decisions[stage]
        if why := decision_problem(decision):
            reasons = [*changed, why]
        else:
            reasons = changed + _changed_inputs(config, stage, decision, results, damaged, sound)
            sound[stage] = decision
        if stale:
            reasons.append(f"it builds on {next(reversed(stale))}, which is stale")
        if reasons:
            stale[stage] = "; ".join(reasons)
    return stale


def _changed_inputs(
    config: Config,
    stage: str,
    decision: Decision,
    results: Results,
    damaged: set[str],
    earlier: Mapping[str, Decision],
) -> list[str]:
    """Say why a decision does not follow from the `results`; empty if it does."""
    runs = inputs_of(decision)
    ids = list(dict.fromkeys(run_id for _, run_id in runs))
    edited = [r for r in ids if r in damaged]
    missing = [r for r in ids if r not in results and r not in damaged]
    reasons = []
    if missing:
        reasons.append(runs_in_words(missing, len(ids), "missing"))
    if edited:
        reasons.append(runs_in_words(edited, len(ids), "edited"))
    if not reasons and inputs_digest(config, stage, runs, results, earlier) != decision["inputs_sha256"]:
        reasons.append(
            "it was made from other results, settings or earlier decisions than those that are there now"
        )
    return reasons


def runs_in_words(run_ids: Sequence[str], of: int, what: str) -> str:
    """Return `2 of its 8 runs are missing (…)`, with the first two named."""
    verb = "is" if len(run_ids) == 1 else "are"
    more = ", …" if len(run_ids) > 2 else ""
    return f"{len(run_ids)} of its {of} runs {verb} {what} ({', '.join(run_ids[:2])}{more})"


def environment_changes(config: Config, header: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (what, recorded, now) of what the names of runs depend on in addition to settings."""
    now = by_name(study_environment(config))
    recorded = by_name(header.get("environment", {}))
    return [(k, recorded.get(k), now[k]) for k in now if recorded.get(k) != now[k]]

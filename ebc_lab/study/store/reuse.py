"""What of a study can be reused: which decisions follow from its files, and what would be trained again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import by_name, digest, study_environment
from ebc_lab.config.schema import Config
from ebc_lab.records.decisions import Decision
from ebc_lab.records.figures import RunResult
from ebc_lab.records.spec import RunSpec

from ..stages.rules import Undecidable, decision_problem, inputs_digest, inputs_of, settings_of_stage
from ..stages.runs import distinct
from ..stages.stage import ResultsOf, planned_runs, stage_of
from .study import RETRIED, RETRIED_UNFINISHED, Record

NONE: dict[str, str | None] = {}


class Remembered(Protocol):
    """What `Index.remembered` is."""

    def __call__(self, name: str, make: Callable[[], str], of: str, *, runs: bool) -> str: ...


def _forgotten(name: str, make: Callable[[], str], of: str, *, runs: bool) -> str:
    return make()


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
    """Return the results that a command would take as they are, each read when it is first asked for; it
    trains the other runs again."""
    again = (None, *(RETRIED if finished else RETRIED_UNFINISHED))
    known = {r.run_id: r for r in records if r.brief.outcome not in again}
    seen: dict[str, RunResult | None] = {}

    def results_of(specs: list[RunSpec]) -> dict[str, RunResult]:
        wanted = [s for s in specs if s.run_id in known]
        there = [s.run_id for s in wanted if known[s.run_id].brief.identity == s.identity_sha256]
        for run_id in there:
            if run_id not in seen:
                seen[run_id] = known[run_id].result
        return {run_id: result for run_id in there if (result := seen[run_id]) is not None}

    return results_of


def stale_decisions(
    config: Config,
    header: Mapping[str, Any],
    decisions: Mapping[str, Decision],
    records: Sequence[Record],
    remembered: Remembered = _forgotten,
    problems: Mapping[str, str | None] = NONE,
) -> dict[str, str]:
    """Return stage -> why its recorded decision no longer follows from the results and the decisions before
    it.

    Only hashes are compared; nothing is decided again. `remembered`: as `Index.remembered`; `problems`: of
    decisions, where they are known.
    """
    known = {r.run_id: r for r in records}
    changed = [f"{k} is {new} here and was {old}" for k, old, new in environment_changes(config, header)]
    stale: dict[str, str] = {}
    sound: dict[str, Decision] = {}
    for stage in (s for s in config.study.stages if s in decisions):
        decision = decisions[stage]
        if why := problems[stage] if stage in problems else decision_problem(decision):
            reasons = [*changed, why]
        else:
            reasons = changed + _changed_inputs(config, stage, decision, known, sound, remembered)
            sound[stage] = decision
        if stale:
            reasons.append(f"it builds on {next(reversed(stale))}, which is stale")
        if reasons:
            stale[stage] = "; ".join(reasons)
    return stale


class _Results(Mapping[str, RunResult]):
    """The results of these runs, each read when it is looked at and held no longer."""

    def __init__(self, records: Mapping[str, Record]):
        self.records = records

    def __getitem__(self, run_id: str) -> RunResult:
        result = self.records[run_id].result
        if result is None:
            raise UserError(f"{run_id} was removed while the study was read: ask again.")
        return result

    def __iter__(self) -> Iterator[str]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)


def _changed_inputs(
    config: Config,
    stage: str,
    decision: Decision,
    known: Mapping[str, Record],
    earlier: Mapping[str, Decision],
    remembered: Remembered,
) -> list[str]:
    """Say why a decision does not follow from the results of the `known` runs; empty if it does."""
    runs = inputs_of(decision)
    ids = list(dict.fromkeys(run_id for _, run_id in runs))
    edited = [r for r in ids if r in known and known[r].problem]
    there = {r for r in ids if r in known and known[r].brief.outcome}
    missing = [r for r in ids if r not in there and r not in edited]
    reasons = []
    if missing:
        reasons.append(runs_in_words(missing, len(ids), "missing"))
    if edited:
        reasons.append(runs_in_words(edited, len(ids), "edited"))
    if (
        not reasons
        and _inputs_digest(config, stage, runs, known, earlier, remembered) != (decision["inputs_sha256"])
    ):
        reasons.append(
            "it was made from other results, settings or earlier decisions than those that are there now"
        )
    return reasons


def _inputs_digest(
    config: Config,
    stage: str,
    runs: Sequence[tuple[str, str]],
    known: Mapping[str, Record],
    earlier: Mapping[str, Decision],
    remembered: Remembered,
) -> str:
    """Return `inputs_digest`; where the checksum of every result is known, it is remembered by these."""
    checksums = [known[run_id].brief.checksum for _, run_id in runs]

    def make() -> str:
        return inputs_digest(config, stage, runs, _Results(known), earlier)

    if not all(checksums):
        return make()
    settings = digest([settings_of_stage(config, stage), {s: d["inputs_sha256"] for s, d in earlier.items()}])
    runs_digest = digest([[*run, sha256] for run, sha256 in zip(runs, checksums, strict=True)])
    return remembered(f"inputs of {stage}", make, f"{settings} {runs_digest}", runs=False)


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

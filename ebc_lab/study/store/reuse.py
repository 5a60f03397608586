"""What of a study still holds: which decisions follow from its files, and what a call would train again. Reading only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from ebc_lab.config.schema import Config
from ebc_lab.records.figures import RunResult

from ..stages import planned_runs, stage_of
from ..stages.rules import Decision, Undecidable, fault, inputs_digest, inputs_of
from ..stages.runs import distinct
from ..stages.spec import RunSpec, as_recorded, environment, identity_of
from .study import RETRIED, RETRIED_UNFINISHED, Record, Study


def seen_from(study: Study, header: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Another torch makes decisions stale where a call may go on, and nowhere else."""
    return nullcontext() if study.goes_on else as_recorded(header["environment"])


ResultsOf = Callable[[list[RunSpec]], dict[str, RunResult]]


@dataclass(frozen=True)
class Outlook:
    """What a call would do in a stage: `missing` of its `runs` trained, the others kept. None: not known before an earlier
    stage has been decided again."""

    stage: str
    runs: int | None = None
    missing: int | None = None
    undecidable: bool = False  # from results that are all there


def outlook(config: Config, results_of: ResultsOf) -> list[Outlook]:
    """What a call would train, stage by stage, as far as the results on disk allow to say; sweeps may still extend."""
    decisions: dict[str, Decision] = {}
    found: list[Outlook] = []
    for stage in config.study.stages:
        if found and (found[-1].missing != 0 or found[-1].undecidable):
            found.append(Outlook(stage))
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
        found.append(Outlook(stage, len(runs), missing, undecidable))
    return found


def in_words(found: Sequence[Outlook]) -> str:
    """`lr_sweep: all 8 kept; calibrate: 3 of 5 would be trained; lr_scale, finals: decided again after that`."""
    parts = []
    for look in found:
        if look.missing is None:
            continue
        what = f"all {look.runs}" if look.missing in (0, look.runs) else f"{look.missing} of {look.runs}"
        note = ", which cannot be decided from them" if look.undecidable else ""
        parts.append(f"{look.stage}: {what} {'would be trained' if look.missing else 'kept'}{note}")
    after = [look.stage for look in found if look.missing is None]
    if after:
        parts.append(f"{', '.join(after)}: decided again after that")
    return "; ".join(parts)


def kept(records: Sequence[Record], *, finished: bool) -> ResultsOf:
    """The results that the next call would take as they are, among files already read; it tries the others again."""
    again = RETRIED if finished else RETRIED_UNFINISHED
    known = {r.run_id: r.result for r in records if r.result is not None and r.result["outcome"] not in again}

    def results_of(specs: list[RunSpec]) -> dict[str, RunResult]:
        there = ((s, known.get(s.run_id)) for s in specs)
        return {s.run_id: r for s, r in there if r is not None and r.get("identity") == s.identity_sha256}

    return results_of


def stale(
    config: Config, header: Mapping[str, Any], decisions: Mapping[str, Decision], records: Sequence[Record]
) -> dict[str, str]:
    """Stage -> why its recorded decision no longer follows from the results on disk and the decisions before it.

    A comparison of hashes: nothing is decided again here.
    """
    results = {r.run_id: r.result for r in records if r.result is not None}
    damaged = {r.run_id for r in records if r.problem}
    elsewhere = [f"{k} is {new} here and was {old}" for k, old, new in environment_changes(config, header)]
    found: dict[str, str] = {}
    sound: dict[str, Decision] = {}
    for stage in (s for s in config.study.stages if s in decisions):
        decision, reasons = decisions[stage], list(elsewhere)
        if why := fault(decision):
            reasons.append(why)
        else:
            runs = inputs_of(decision)
            ids = list(dict.fromkeys(run_id for _, run_id in runs))
            edited = [r for r in ids if r in damaged]
            gone = [r for r in ids if r not in results and r not in damaged]
            reasons += [
                some(which, len(ids), what)
                for what, which in (("missing", gone), ("edited", edited))
                if which
            ]
            if (
                not gone
                and not edited
                and inputs_digest(config, stage, runs, results, sound) != decision["inputs_sha256"]
            ):
                reasons.append(
                    "it was made from other results, settings or earlier decisions than those that are there now"
                )
            sound[stage] = decision
        if found:
            reasons.append(f"it builds on {next(reversed(found))}, which is stale")
        if reasons:
            found[stage] = "; ".join(reasons)
    return found


def some(run_ids: Sequence[str], of: int, what: str) -> str:
    """`2 of its 8 runs are missing (…)`, the first of them named."""
    verb, more = "is" if len(run_ids) == 1 else "are", ", …" if len(run_ids) > 2 else ""
    return f"{len(run_ids)} of its {of} runs {verb} {what} ({', '.join(run_ids[:2])}{more})"


def environment_changes(config: Config, header: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(what, recorded, now) of what the names of runs depend on beside settings."""
    now = environment(identity_of("train", config))
    recorded = header.get("environment", {})
    return [(k, recorded.get(k), now[k]) for k in now if recorded.get(k) != now[k]]

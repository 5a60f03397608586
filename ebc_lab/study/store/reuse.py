"""The results of a study that a command would keep, and the runs that it would train again."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ebc_lab.config.identity import by_name, study_environment
from ebc_lab.config.schema import Config
from ebc_lab.records.decisions import Decision
from ebc_lab.records.figures import RunResult
from ebc_lab.records.spec import RunSpec

from ..stages.rules import Undecidable
from ..stages.runs import distinct
from ..stages.stage import ResultsOf, planned_runs, stage_of
from .study import RETRIED, RETRIED_UNFINISHED, Record


@dataclass(frozen=True)
class StageWork:
    """The work that remains in one stage: `runs` is the number of runs that the stage needs, `missing` how
    many are still to be trained. Both are None if they depend on the decision of an earlier stage."""

    stage: str
    runs: int | None = None
    missing: int | None = None
    undecidable: bool = False  # the stage cannot be decided although no result is missing


def remaining_work(config: Config, results_of: ResultsOf) -> list[StageWork]:
    """Return how much a command still has to do in each stage, as far as the results of earlier stages
    determine it. A sweep may still extend its grid, which adds runs."""
    decisions: dict[str, Decision] = {}
    work: list[StageWork] = []
    for stage in config.study.stages:
        if len(decisions) < len(work):
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
    """Return a one-line summary of the work in each stage, such as
    `lr_sweep: all 8 kept; calibrate: 3 of 5 would be trained; finals: decided again after that`."""
    parts = []
    for look in (look for look in work if look.missing is not None):
        what = f"all {look.runs}" if look.missing in (0, look.runs) else f"{look.missing} of {look.runs}"
        note = ", which cannot be decided from them" if look.undecidable else ""
        parts.append(f"{look.stage}: {what} {'would be trained' if look.missing else 'kept'}{note}")
    if after := [look.stage for look in work if look.missing is None]:
        parts.append(f"{', '.join(after)}: decided again after that")
    return "; ".join(parts)


def reusable_results(records: Sequence[Record], *, finished: bool) -> ResultsOf:
    """Return a function from specs to results (run id -> result): those that a command would keep instead of
    training the runs again, each read when first needed. `finished`: the last stage is decided."""
    again = (None, *(RETRIED if finished else RETRIED_UNFINISHED))
    known = {r.run_id: r for r in records if r.brief.outcome not in again}
    result_of = functools.cache(lambda run_id: known[run_id].result)

    def results_of(specs: list[RunSpec]) -> dict[str, RunResult]:
        planned = [s for s in specs if s.run_id in known]
        same = [s.run_id for s in planned if known[s.run_id].brief.identity == s.identity_sha256]
        return {run_id: result for run_id in same if (result := result_of(run_id)) is not None}

    return results_of


def runs_in_words(run_ids: Sequence[str], out_of: int, what: str) -> str:
    """Return a clause such as `2 of its 8 runs are missing (…)`, with the first two run ids in brackets."""
    verb = "is" if len(run_ids) == 1 else "are"
    more = ", …" if len(run_ids) > 2 else ""
    return f"{len(run_ids)} of its {out_of} runs {verb} {what} ({', '.join(run_ids[:2])}{more})"


def environment_changes(config: Config, header: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (name, recorded, now) for each changed version among those that run names depend on."""
    now = by_name(study_environment(config))
    recorded = by_name(header.get("environment", {}))
    return [(k, recorded.get(k), now[k]) for k in now if recorded.get(k) != now[k]]

"""The number of runs in a study, as `plan`, `status`, `diff` and `autopilot` count them.

A training run counts once, even if several stages use it. Timing runs are counted separately. So are runs
that no decision uses: an idle worker began such a run in case it would be needed, or the run's arm has been
removed since.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ebc_lab.records.decisions import Decision

from ..stages.rules import inputs_of
from .study import Record

TRAINING = "training"
MEASUREMENT = "measurements"
UNUSED = "unused"


def sorts_of_runs(records: Iterable[Record], decisions: Mapping[str, Decision]) -> dict[str, str]:
    """Return run id -> sort of the run: TRAINING, MEASUREMENT or UNUSED. A run of an undecided stage counts
    as used. A run with an unusable spec is left out."""
    used = {run_id for decision in decisions.values() for _, run_id in inputs_of(decision)}
    sorts = {}
    for brief in (record.brief for record in records):
        if brief.kind is None:
            continue
        if brief.kind != "train":
            sorts[brief.run_id] = MEASUREMENT
        elif brief.run_id in used or brief.stage not in decisions:
            sorts[brief.run_id] = TRAINING
        else:
            sorts[brief.run_id] = UNUSED
    return sorts


def trained_by(records: Iterable[Record], sorts: Mapping[str, str]) -> dict[str, int]:
    """Return software in words -> how many of the training runs in use have a result that it trained, the
    earliest first. A run that one version began and another went on with counts for both. `sorts`: as
    `sorts_of_runs` returns them."""
    ended = [r.history for r in records if r.brief.outcome and sorts.get(r.run_id) == TRAINING]
    ended.sort(key=lambda history: history.spans[:1])
    return dict(Counter(software for history in ended for software in history.software))


def upgraded(trained: Mapping[str, int], study: str, here: str | None = None) -> str:
    """Return a sentence if a study was not trained by one version of the software alone, else an empty text.

    `trained`: as `trained_by` counts them; `study`: how commands name it; `here`: the software of the call
    that goes on with it.
    """
    if len({*trained, here} - {None}) < 2 or not trained:
        return ""
    runs = {software: f"{n} run{'s' * (n != 1)}" for software, n in trained.items()}
    runs |= {here: f"{runs[here]} and this call" if here in runs else "this call"} if here else {}
    by = " and by ".join(f"{software} ({which})" for software, which in runs.items())
    again = f"ebc-lab rerun {shlex.quote(study)} --run RUN"
    return f"trained by {by}: whether they compute the same bits, `{again}` says of a RUN of an earlier one"


def counted(sorts: Iterable[str]) -> dict[str, int]:
    """Return sort -> number of times that it occurs in `sorts`, including zeros."""
    counts = Counter(sorts)
    return {sort: counts[sort] for sort in (TRAINING, MEASUREMENT, UNUSED)}


def in_words(counts: Mapping[str, Any]) -> str:
    """Return counts in words, such as
    `25 training runs, 1 measurement of time, 1 run that no decision uses`."""
    ending = {n: "" if n == 1 else "s" for n in counts.values()}
    parts = [f"{counts[TRAINING]} training run{ending[counts[TRAINING]]}"]
    if n := counts[MEASUREMENT]:
        parts.append(f"{n} measurement{ending[n]} of time")
    if n := counts[UNUSED]:
        parts.append(f"{n} run{ending[n]} that no decision uses")
    return ", ".join(parts)

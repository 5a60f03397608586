"""The number of runs in a study, as `plan`, `status`, `diff` and `autopilot` count them.

A training run counts once, even if several stages use it. Timing runs are counted separately. So are runs
that no decision uses: an idle worker began such a run in case it would be needed, or the run's arm has been
removed since.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ebc_lab.config.errors import count
from ebc_lab.records.decisions import Decision

from ..stages.rules import inputs_of
from . import attempts
from .study import Record, run_again

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


def trained_by(records: Iterable[Record], sorts: Mapping[str, str]) -> dict[str, list[str]]:
    """Return software in words, the earliest first -> the training runs in use that it has trained to a
    result. A run that one version began and another went on with stands under both. `sorts`: as
    `sorts_of_runs` returns them."""
    ended = [r for r in records if r.brief.outcome and sorts.get(r.run_id) == TRAINING]
    found: dict[str, list[str]] = {}
    for record in sorted(ended, key=lambda record: record.history.spans[:1]):
        for software in record.history.software:
            found.setdefault(software, []).append(record.run_id)
    return found


def trained_in_words(trained: Mapping[str, Sequence[str]], here: str | None = None) -> str:
    """Return what `trained_by` found in words: each version of the software with the number of runs that it
    trained and, for the version `here`, `this call`. Empty if no version is known."""
    runs = {software: [count(len(of), "run")] for software, of in trained.items()}
    if here:
        runs.setdefault(here, []).append("this call")
    known = {*runs} - {attempts.UNRECORDED}
    return " and ".join(f"{name} ({', '.join(which)})" for name, which in runs.items()) if known else ""


def upgraded(trained: Mapping[str, Sequence[str]], study: str, here: str | None = None) -> str:
    """Return a sentence if a study was not trained by one version of the software alone, else an empty text.
    `study`: how commands name it; `here`: the software of the call that goes on with it."""
    if not trained or len({*trained, here} - {None}) < 2:
        return ""
    again = run_again(study, next(iter(trained.values()))[0])
    by = trained_in_words(trained, here)
    return f"trained by {by}: `{again}` trains one of the first again and says whether its bits are the same"


def counted(sorts: Iterable[str]) -> dict[str, int]:
    """Return sort -> number of times that it occurs in `sorts`, including zeros."""
    counts = Counter(sorts)
    return {sort: counts[sort] for sort in (TRAINING, MEASUREMENT, UNUSED)}


def in_words(counts: Mapping[str, Any]) -> str:
    """Return counts in words, such as
    `25 training runs, 1 measurement of time, 1 run that no decision uses`."""
    parts = [count(counts[TRAINING], "training run")]
    if n := counts[MEASUREMENT]:
        parts.append(f"{count(n, 'measurement')} of time")
    if n := counts[UNUSED]:
        parts.append(f"{count(n, 'run')} that no decision uses")
    return ", ".join(parts)

"""The use of a study's worker slots: which run occupied which slot and when, and how long the slots idled.

All of it comes from the `attempts.jsonl` of each run. There are as many slots as were ever busy at once. A
worker is present from its first claim of a run to the end of its last run. Time counts while any worker is
present: pauses after an interruption do not count, nor does work after the last run, such as plotting.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypedDict

from ebc_lab.config.errors import clock, count
from ebc_lab.config.schema import STAGES

from ..store.study import Record


class Bar(NamedTuple):
    """One attempt at a run on one slot. Times are in seconds since the first attempt, without pauses."""

    run_id: str
    stage: str
    kind: str
    seed: int
    begin: float
    end: float
    worker: tuple[str, int]
    slot: int = 0


class SlotUse(TypedDict):
    """The use of the slots, as `status` reports it."""

    slots: int
    seconds: float  # from the first attempt to the end of the last one, without pauses
    idle: dict[str, float]  # `whole` and each stage -> the idle share of the slots' time, 0 to 1


class Timeline(NamedTuple):
    """All attempts, ordered by when they began, and the use of the slots. The time of a stage runs from the
    end of the previous stage to the end of the stage's last run."""

    bars: list[Bar]
    use: SlotUse


def timeline(runs: Iterable[Record]) -> Timeline | None:
    """Return the timeline of a study's slots so far, from its planned runs; None if no attempt has ended."""
    bars: list[Bar] = []  # in seconds since the epoch
    for record in runs:
        run = record.brief
        if run.kind is not None and run.stage in STAGES:
            about = (run.run_id, run.stage, run.kind, run.seed)
            spans = record.history.spans
            bars += [Bar(*about, begin, end, (host, pid)) for begin, end, host, pid in spans]
    if not bars:
        return None
    bars.sort(key=lambda bar: (bar.begin, bar.end, bar.run_id))
    bars = _on_slots(_without_pauses(bars))
    slots = 1 + max(bar.slot for bar in bars)
    end = max(bar.end for bar in bars)
    idle = {"whole": _idle_share(bars, slots, 0.0, end)}
    since = 0.0
    for stage in STAGES:
        until = max((bar.end for bar in bars if bar.stage == stage), default=since)
        if until > since:
            idle[stage] = _idle_share(bars, slots, since, until)
            since = until
    return Timeline(bars, {"slots": slots, "seconds": end, "idle": idle})


def in_words(use: SlotUse) -> str:
    """Return the use of the slots as `2 worker slots for 12 min 31 s, idle 7% of that time (lr_sweep 9%)`."""
    whole = use["idle"]["whole"]
    slots = count(use["slots"], "worker slot")
    return f"{slots} for {clock(use['seconds'])}, idle {whole:.0%} of that time ({idle_by_stage(use)})"


def idle_by_stage(use: SlotUse) -> str:
    """Return the idle share of each stage as `lr_sweep 9%, finals 5%`."""
    return ", ".join(f"{stage} {share:.0%}" for stage, share in use["idle"].items() if stage != "whole")


def _without_pauses(bars: Sequence[Bar]) -> list[Bar]:
    """Return the bars in seconds since the first one began, without the time when no worker was present."""
    lives: dict[tuple[str, int], tuple[float, float]] = {}
    for bar in bars:
        first, last = lives.get(bar.worker, (bar.begin, bar.end))
        lives[bar.worker] = min(first, bar.begin), max(last, bar.end)
    # (end, length) of each pause, in seconds; the first one lasts from the epoch to the first attempt
    pauses: list[tuple[float, float]] = []
    until = 0.0
    for first, last in sorted(lives.values()):
        if first > until:
            pauses.append((first, first - until))
        until = max(until, last)

    def worked(when: float) -> float:
        return when - sum(length for end, length in pauses if end <= when)

    return [bar._replace(begin=worked(bar.begin), end=worked(bar.end)) for bar in bars]


def _on_slots(bars: Iterable[Bar]) -> list[Bar]:
    """Return the bars with their slots: a worker's previous slot if it is free, or the first free slot."""
    free: list[float] = []  # slot -> when it is free again
    last: dict[tuple[str, int], int] = {}  # worker -> its previous slot
    placed = []
    for bar in bars:
        wanted = [last[bar.worker]] if bar.worker in last else []
        slots = itertools.chain(wanted, itertools.count())
        slot = next(slot for slot in slots if slot >= len(free) or free[slot] <= bar.begin)
        free += [0.0] * (slot == len(free))
        free[slot] = bar.end
        last[bar.worker] = slot
        placed.append(bar._replace(slot=slot))
    return placed


def _idle_share(bars: Sequence[Bar], slots: int, since: float, until: float) -> float:
    """Return the share, 0 to 1, of the slots' time between `since` and `until` that was idle."""
    busy = sum(max(0.0, min(bar.end, until) - max(bar.begin, since)) for bar in bars)
    whole = slots * (until - since)
    return max(0.0, 1 - busy / whole) if whole else 0.0

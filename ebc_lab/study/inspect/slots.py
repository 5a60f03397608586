"""How busy a study's worker slots were: which run was on which of them and when, and how long they idled.

All of it comes from the `attempts.jsonl` of each run. There are as many slots as were ever busy at once. Time
counts while any worker is there, from its first claim of a run to the end of its last one. So neither the
pause between an interruption and the call that continued counts, nor what follows the last run, such as
drawing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from ebc_lab.config.errors import UserError, clock
from ebc_lab.config.schema import STAGES
from ebc_lab.records.json_files import read_json
from ebc_lab.records.paths import SpecRecord, StudyFiles

from ..store import attempts
from ..store.study import Brief


class Bar(NamedTuple):
    """One attempt at a run on one slot, in seconds since the first attempt; pauses are cut out."""

    run_id: str
    stage: str
    kind: str
    seed: int
    begin: float
    end: float
    worker: tuple[str, int]
    slot: int = 0


@dataclass(frozen=True)
class Use:
    """A stretch of time and how much of it was wasted."""

    seconds: float
    idle: float  # the share of the slots' time in which they trained nothing


@dataclass(frozen=True)
class Timeline:
    """Every attempt in the order in which they began, and the use that each stage made of the time from the
    end of the stage before to the end of its own last run."""

    slots: int
    bars: list[Bar]
    stages: dict[str, Use]
    whole: Use

    def as_dict(self) -> dict[str, Any]:
        """Return the timeline as `status` has it: slots, seconds, and the idle share as a whole and by
        stage."""
        uses = {"whole": self.whole, **self.stages}
        return {
            "slots": self.slots,
            "seconds": self.whole.seconds,
            "idle": {name: use.idle for name, use in uses.items()},
        }


def timeline(study: StudyFiles, runs: Iterable[Brief] | None = None) -> Timeline | None:
    """Return what the slots of a study have done so far, None where no attempt has ended. `runs`: the
    study's; they are read from its files where they are left out."""
    bars: list[Bar] = []  # in seconds since the epoch
    for run in _planned(study) if runs is None else runs:
        if run.kind is not None and run.stage in STAGES:
            about = (run.run_id, run.stage, run.kind, run.seed)
            spans = attempts.spans(study.run_dir(run.run_id)) if run.spans is None else run.spans
            bars += [Bar(*about, begin, end, (host, pid)) for begin, end, host, pid in spans]
    if not bars:
        return None
    bars.sort(key=lambda bar: (bar.begin, bar.end, bar.run_id))
    bars = _on_slots(_without_pauses(bars))
    slots = 1 + max(bar.slot for bar in bars)
    stages: dict[str, Use] = {}
    since = 0.0
    for stage in STAGES:
        until = max((bar.end for bar in bars if bar.stage == stage), default=since)
        if until > since:
            stages[stage] = _use(bars, slots, since, until)
            since = until
    return Timeline(slots, bars, stages, _use(bars, slots, 0.0, since))


def in_words(told: Mapping[str, Any]) -> str:
    """Return `2 worker slots for 12 min 31 s, idle 7% of that time (lr_sweep 9%)`."""
    idle = dict(told["idle"])
    whole = idle.pop("whole")
    slots = f"{told['slots']} worker slot{'s' * (told['slots'] != 1)}"
    parts = ", ".join(f"{stage} {100 * share:.0f}%" for stage, share in idle.items())
    return f"{slots} for {clock(told['seconds'])}, idle {100 * whole:.0f}% of that time ({parts})"


def _planned(study: StudyFiles) -> Iterator[Brief]:
    """Yield the study's planned runs, without those whose files are damaged."""
    for files in study.all_runs():
        with suppress(OSError, UserError):  # other readers say what is wrong with it
            spec = read_json(files.spec, SpecRecord)
            seed = spec["config"].get("seed", 0)
            yield Brief(spec["run_id"], spec["kind"], stage=spec.get("stage", ""), seed=seed)


def _without_pauses(bars: Sequence[Bar]) -> list[Bar]:
    """Return the bars in seconds since the first one began, the time in which no worker was there cut out."""
    lives: dict[tuple[str, int], tuple[float, float]] = {}
    for bar in bars:
        first, last = lives.get(bar.worker, (bar.begin, bar.end))
        lives[bar.worker] = min(first, bar.begin), max(last, bar.end)
    # when each ends, and how long it was; the first is since the epoch
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
    """Return the bars, each on the slot that its worker had before where that is free, else on the first free
    one."""
    free: list[float] = []  # slot -> when it is free again
    last: dict[tuple[str, int], int] = {}  # worker -> the slot it was on
    placed = []
    for bar in bars:
        wanted = [last[bar.worker]] if bar.worker in last else []
        slot = next(
            s for s in itertools.chain(wanted, itertools.count()) if s >= len(free) or free[s] <= bar.begin
        )
        free += [0.0] * (slot == len(free))
        free[slot] = bar.end
        last[bar.worker] = slot
        placed.append(bar._replace(slot=slot))
    return placed


def _use(bars: Sequence[Bar], slots: int, since: float, until: float) -> Use:
    """Return the use that the slots made of the time between two moments."""
    busy = sum(max(0.0, min(bar.end, until) - max(bar.begin, since)) for bar in bars)
    whole = slots * (until - since)
    return Use(until - since, max(0.0, 1 - busy / whole) if whole else 0.0)

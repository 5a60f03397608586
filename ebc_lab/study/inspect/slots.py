"""How busy the slots were: which run was on which of them and when, and the share of their time that idled.

All of it from `attempts.jsonl` of each run. There are as many slots as were ever busy at once, and their time
counts while a worker is there: from its first claim of a run to its last one's end. So what lies between an
interruption and the call that continued is left out, and so is what follows the last run, as drawing.
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
    """One attempt on one slot, in seconds since the first one began; time without a worker is cut out."""

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
    """How long the slots could have trained, and the share of it in which they did not."""

    seconds: float
    idle: float


@dataclass(frozen=True)
class Timeline:
    """Every bar, by its begin; and what each stage made of the time until its last run ended."""

    slots: int
    bars: list[Bar]
    stages: dict[str, Use]
    whole: Use

    def as_dict(self) -> dict[str, Any]:
        """Return what `status` says of it."""
        uses = {"whole": self.whole, **self.stages}
        return {
            "slots": self.slots,
            "seconds": self.whole.seconds,
            "idle": {name: use.idle for name, use in uses.items()},
        }


def timeline(study: StudyFiles, runs: Iterable[Brief] | None = None) -> Timeline | None:
    """Return what the slots of a study did so far; None where no attempt has ended. `runs`: the study's,
    where they are known."""
    bars = _on_slots(_without_pauses(_attempts(study, _planned(study) if runs is None else runs)))
    if not bars:
        return None
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
    for files in study.all_runs():
        with suppress(OSError, UserError):  # other readers say what is wrong with it
            spec = read_json(files.spec, SpecRecord)
            seed = spec["config"].get("seed", 0)
            yield Brief(spec["run_id"], spec["kind"], stage=spec.get("stage", ""), seed=seed)


def _attempts(study: StudyFiles, runs: Iterable[Brief]) -> list[Bar]:
    bars = []
    for run in runs:
        if run.kind is None or run.stage not in STAGES:
            continue
        of_run = (run.run_id, run.stage, run.kind, run.seed)
        spans = attempts.spans(study.run_dir(run.run_id)) if run.spans is None else run.spans
        bars += [Bar(*of_run, begin, end, (host, pid)) for begin, end, host, pid in spans]
    return sorted(bars, key=lambda bar: (bar.begin, bar.end, bar.run_id))


def _without_pauses(bars: Sequence[Bar]) -> list[Bar]:
    """Count time from the first begin, and not while no worker was there."""
    lives: dict[tuple[str, int], tuple[float, float]] = {}
    for bar in bars:
        first, last = lives.get(bar.worker, (bar.begin, bar.end))
        lives[bar.worker] = min(first, bar.begin), max(last, bar.end)
    pauses: list[tuple[float, float]] = []  # when one ends, and how long it was; first of all since the epoch
    until = 0.0
    for first, last in sorted(lives.values()):
        if first > until:
            pauses.append((first, first - until))
        until = max(until, last)

    def counted(at: float) -> float:
        return at - sum(length for end, length in pauses if end <= at)

    return [bar._replace(begin=counted(bar.begin), end=counted(bar.end)) for bar in bars]


def _on_slots(bars: Iterable[Bar]) -> list[Bar]:
    """Give each bar the slot of its worker where that is free, else the first free one."""
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
    busy = sum(max(0.0, min(bar.end, until) - max(bar.begin, since)) for bar in bars)
    whole = slots * (until - since)
    return Use(until - since, max(0.0, 1 - busy / whole) if whole else 0.0)

"""What stops a study early: repeated failures, and limits that are reached."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from ebc_lab.config.errors import require
from ebc_lab.records.figures import FINISHED
from ebc_lab.records.spec import RunSpec

from .store.changes import pinned
from .store.index import Index
from .store.study import Study


class StageFailed(Exception):
    """Raised when a stage was stopped, or could not be decided. Exit code 3."""


def cause_class(run_id: str, outcome: str, cause: str | None) -> str:
    """Return a run's outcome and cause without names, numbers and addresses, to compare it with others."""
    cause = (cause or "").replace(run_id, "#")
    return f"{outcome}: " + re.sub(r"0x[0-9a-f]+|\d+(\.\d+)?([eE][-+]?\d+)?", "#", cause)


class Breaker:
    """A guard that stops a stage when runs in a row fail for the same cause: two before any run has finished,
    three afterwards. `proven`: whether a run of the stage has already finished."""

    def __init__(self, stage: str, study: Study, *, proven: bool):
        self.stage = stage
        self.study = study
        self.proven = proven
        self.row: list[str] = []  # the latest runs in a row that failed for the same cause
        self.cause = ""

    def see(self, run_id: str, result: Mapping[str, Any], left: int) -> None:
        """Record that a run has ended, with `left` more to come. Raises StageFailed to stop the stage."""
        if result["outcome"] in FINISHED:
            self.proven = True
            self.row = []
            return
        cause = cause_class(run_id, result["outcome"], result.get("cause"))
        self.row = [*self.row, run_id] if cause == self.cause else [run_id]
        self.cause = cause
        which, most = ("last", 3) if self.proven else ("first", 2)
        if left and len(self.row) >= most:
            raise StageFailed(
                f"{self.stage} was stopped: its {which} {len(self.row)} runs all failed with "
                f"{result.get('cause')!r}; "
                f"read {self.study.run_files(self.row[0]).log}, fix it, and give the same command again"
                f"{pinned(Index(self.study).records, self.row[0])}."
            )


class Limits:
    """The limits of one command, `--max-runs` and `--max-hours`: runs to train, and hours of its workers."""

    def __init__(self, max_runs: int | None = None, max_hours: float | None = None):
        for name, value in (("--max-runs", max_runs), ("--max-hours", max_hours)):
            require(value is None or value > 0, f"{name} must be > 0, not {value}.")
        self.runs_left = max_runs
        self.max_s = None if max_hours is None else 3600 * max_hours
        self.spent_s = 0.0
        self.rate: float | None = None  # seconds per unit of `RunSpec.cost`
        self._trained_s, self._trained_cost = 0.0, 0.0
        self._last = time.monotonic()

    @property
    def is_set(self) -> bool:
        return self.runs_left is not None or self.max_s is not None

    def admit(self, wave: Sequence[RunSpec]) -> list[RunSpec]:
        """Return the longest runs of the wave that fit into what is left. Hours are predicted from the runs
        that this command has finished. Until one has finished, runs are admitted one at a time."""
        chosen = sorted(wave, key=lambda s: -s.cost)
        if self.runs_left is not None:
            chosen = chosen[: self.runs_left]
        if self.max_s is None:
            return chosen
        if self.rate is None:
            return chosen[:1] if self.spent_s < self.max_s else []
        left_s = self.max_s - self.spent_s
        ends = accumulate(self.rate * spec.cost for spec in chosen)
        return [spec for spec, end in zip(chosen, ends, strict=True) if end <= left_s]

    def record_end(self, spec: RunSpec, result: Mapping[str, Any]) -> None:
        """Record that a run has ended: count it against `--max-runs` and, if it finished, update the pace."""
        if self.runs_left is not None:
            self.runs_left -= 1
        if result["outcome"] in FINISHED and result.get("wall_s"):
            self._trained_s += float(result["wall_s"])
            self._trained_cost += spec.cost * result["steps"] / spec.run.steps
            self.rate = self._trained_s / max(self._trained_cost, 1.0)

    def tick(self, busy: int) -> None:
        """Charge each busy worker for the time since the last call. Raises StageFailed once the hours of
        `--max-hours` are used up."""
        now = time.monotonic()
        self.spent_s += busy * (now - self._last)
        self._last = now
        if self.max_s is not None and self.spent_s >= self.max_s:
            raise StageFailed(self.message("the hours of --max-hours are over"))

    def message(self, what: str) -> str:
        """Return the message for a limit that is reached. `what`: what is used up, or still to be trained."""
        return f"the limit of this call is reached, {what}; the same command continues from here."

"""The runs of an arm as arrays, seeds side by side: what the pictures are drawn from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ebc_lab.records.figures import RunResult
from ebc_lab.records.json_files import read_json
from ebc_lab.records.paths import SpecRecord, StudyFiles
from ebc_lab.records.streams import read_columns

from ...text.words import plural

# of a run, the half-width of the moving window: the eye needs a line, not the noise of the batches
SMOOTHED_SHARE = 1 / 40
MOST_POINTS = 300  # of a smooth curve: two points apart on the page


@dataclass(frozen=True)
class Run:
    """One seed of an arm. `steps` and `evals` are its streams by column; without rows where it has none."""

    seed: str
    result: Mapping[str, Any]  # empty while there is none
    steps: Mapping[str, np.ndarray]
    evals: Mapping[str, np.ndarray]

    @property
    def outcome(self) -> str:
        return str(self.result.get("outcome", "missing"))


@dataclass(frozen=True)
class ArmRuns:
    """What a picture of several arms may show of one."""

    label: str
    decided: Mapping[str, Any]
    runs: Sequence[Run]
    specs: Mapping[str, Mapping[str, Any]]  # by seed
    tried: Callable[[], list[tuple[str, dict[str, Any]]]]  # reads the point and the result of each tuning run
    is_reference: bool = False


def read_runs(root: Path, arm: Mapping[str, Any]) -> list[Run]:
    """Return the runs of an arm by seed; one that never started has no result and no rows."""
    runs = []
    for seed, run_id in arm["runs"].items():
        steps = _stream(StudyFiles(root).run_files(run_id).steps, ("step", "loss", "c", "skipped"))
        runs.append(Run(seed, known(root, run_id), steps, evals_of(root, run_id)))
    return runs


def read_specs(root: Path, arm: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return seed -> the spec of an arm's run; empty where there is none."""
    return {seed: known(root, run_id, "spec") for seed, run_id in arm["runs"].items()}


def known(root: Path, run_id: str, name: str = "result") -> dict[str, Any]:
    """Return a run's result, or its spec; empty where there is none."""
    files = StudyFiles(root).run_files(run_id)
    path, kind = (files.spec, SpecRecord) if name == "spec" else (files.result, RunResult)
    try:
        return dict(read_json(path, kind))
    except FileNotFoundError:
        return {}


def evals_of(root: Path, run_id: str) -> dict[str, np.ndarray]:
    """Return the evaluations of a run by column; empty where it has none."""
    return _stream(StudyFiles(root).run_files(run_id).evals, ("step", "val_loss"))


def _stream(path: Path, needed: Iterable[str]) -> dict[str, np.ndarray]:
    try:
        columns = read_columns(path, needed) if path.stat().st_size else {}
    except FileNotFoundError:
        return {}
    return columns if len(columns.get("step", ())) else {}


def by_step(streams: Iterable[Mapping[str, np.ndarray]], column: str) -> tuple[np.ndarray, np.ma.MaskedArray]:
    """Return the steps that any stream has, and a column of the streams, (streams, steps). It is masked where
    it is not finite: a run that ended early drops out of the mean instead of bending it."""
    streams_there = [s for s in streams if s]
    steps = np.unique(np.concatenate([s["step"] for s in streams_there])) if streams_there else np.empty(0)
    table = np.full((len(streams_there), len(steps)), np.nan)
    for row, stream in zip(table, streams_there, strict=True):
        row[np.searchsorted(steps, stream["step"])] = stream[column]
    return steps, np.ma.masked_invalid(table)


def spans(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where each step's moving window begins and ends: narrow at first, where curves are steep."""
    half = window(n) // 2
    at = np.arange(n)
    return np.maximum(at - half, 0), np.minimum(at + np.minimum(at, half) + 1, n)


def running_mean(table: np.ma.MaskedArray) -> np.ma.MaskedArray:
    """Return each row's mean over the moving window."""
    low, high = spans(table.shape[1])
    sums, counts = (
        np.concatenate([np.zeros((len(table), 1)), np.cumsum(x, axis=1)], axis=1)
        for x in (table.filled(0.0), 1.0 - np.ma.getmaskarray(table))
    )
    totals, seen = sums[:, high] - sums[:, low], counts[:, high] - counts[:, low]
    return np.ma.masked_array(totals / np.maximum(seen, 1), mask=np.ma.getmaskarray(table) | (seen == 0))


def thinned(n: int, most: int = MOST_POINTS) -> np.ndarray:
    """Return the columns that a smooth curve over `n` steps is drawn from: all, or as many as are seen."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int)) if n else np.arange(0)


@dataclass(frozen=True)
class Line:
    """A figure over the run: each seed, and the line that stands for them; masked where there is none."""

    steps: np.ndarray
    seeds: np.ma.MaskedArray  # (seeds, steps)
    middle: np.ma.MaskedArray

    @property
    def last(self) -> tuple[float, float] | None:
        """Return the last point that is finite; None where none is."""
        return last_point(self.steps, self.middle)

    def above(self, low: float) -> Line:
        """Return the line without what is not above `low`."""
        seeds, middle = (np.ma.masked_less_equal(values, low) for values in (self.seeds, self.middle))
        return Line(self.steps, seeds, middle)


def smooth_line(steps: np.ndarray, table: np.ma.MaskedArray, *, log: bool = False) -> Line:
    """Return the running means of seeds side by side, and their median, thinned; geometric means if `log`."""
    if not len(steps):
        return Line(steps, table, np.ma.masked_all(0))
    at = thinned(len(steps))
    seeds = running_mean(np.ma.log(table) if log else table)[:, at]
    middle = np.ma.median(seeds, axis=0)
    return Line(steps[at], np.ma.exp(seeds), np.ma.exp(middle)) if log else Line(steps[at], seeds, middle)


def last_point(x: np.ndarray, y: np.ma.MaskedArray) -> tuple[float, float] | None:
    """Return the last point of a line that is finite; None where none is."""
    seen = np.flatnonzero(np.isfinite(np.ma.filled(y, np.nan)))
    return (float(x[seen[-1]]), float(y[seen[-1]])) if len(seen) else None


def window(steps: int) -> int:
    """Return how many steps the moving window of a run of `steps` steps takes in."""
    return 2 * max(1, round(SMOOTHED_SHARE * steps)) + 1 if steps > 1 else 1


def applied_c(runs: Sequence[Run]) -> tuple[np.ndarray, np.ma.MaskedArray]:
    """Return the steps, and the clip coefficients of all but skipped ones, (runs, steps)."""
    steps, table = by_step((r.steps for r in runs), "c")
    if len(steps):
        skipped = by_step((r.steps for r in runs), "skipped")[1].filled(1.0) != 0
        table.mask = np.ma.getmaskarray(table) | skipped
    return steps, table


def trouble(runs: Sequence[Run]) -> str:
    """Return what the reader must know about runs that are not whole; empty when all completed."""
    parts = []
    for run in runs:
        if run.outcome == "diverged":
            parts.append(f"seed {run.seed} diverged ({run.result.get('cause') or 'no cause given'})")
        elif run.outcome == "missing":
            parts.append(f"seed {run.seed} has no result")
        elif run.outcome != "completed":
            parts.append(f"seed {run.seed} did not finish: {run.result.get('cause') or run.outcome}")
    return "; ".join(parts)


def audited(steps: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the audited rows whose KL a log axis can show."""
    if not steps:
        return {}
    rows = np.nan_to_num(steps["applied_kl"], nan=0.0, posinf=0.0) > 0
    return {k: v[rows] for k, v in steps.items()} if rows.any() else {}


def missing(arms: Mapping[str, Mapping[str, Any]], asked: Sequence[str] = ()) -> str:
    """Return what the reader must know about arms that are incomplete; empty when all are complete."""
    kinds: dict[str, list[str]] = {"diverged": [], "without a result": []}
    for label, arm in arms.items():
        seeds, diverged = len(arm["runs"]), arm["outcomes"].get("diverged", 0)
        without = seeds - diverged - arm["outcomes"].get("completed", 0)
        for kind, n in zip(kinds, (diverged, without), strict=True):
            kinds[kind] += [f"{label} ({n} of {plural(seeds, 'seed')})"] if n else []
    kinds["could not be made"] = [label for label in asked if label not in arms]
    return "; ".join(f"{kind}: {', '.join(labels)}" for kind, labels in kinds.items() if labels)

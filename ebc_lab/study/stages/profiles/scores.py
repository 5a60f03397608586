"""How soon a method reaches a target, and how that compares: the statistics of the stage profiles.

* Time to a target: the first evaluation on the fixed windows whose loss is at or below it, in steps, and in
  seconds of training, to which measurements add; of several seeds the median, a miss being infinite.
* r of a method on a workload: its time over the shortest time of any method there; ρ(τ): the share of the
  workloads on which r <= τ (performance profiles, Dolan & Moré 2002); the score: the mean of ρ over τ in
  [1, 4], as AlgoPerf's (Dahl et al., arXiv:2306.07179).
* LR sensitivity: the mean of min(loss, loss of the first step) over learning rates, less the best loss
  (Wortsman et al., arXiv:2309.14322).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ebc_lab.config.parts.target import finite_rows, first_at_or_below
from ebc_lab.records.decisions import RateSensitivity
from ebc_lab.records.figures import RunResult
from ebc_lab.records.spec import RunSpec

from ..rules import Results, is_conclusive, val_loss
from ..statistics import CONFIDENCE, window

MOST = 4.0  # ratio up to which a profile is drawn and scored
RESAMPLES = 2000
Times = Mapping[str, Mapping[str, Sequence[float]]]  # method -> workload -> each seed's, infinite for a miss


def curve_of(result: RunResult | None) -> list[tuple[int, float, float]]:
    """Return (step, loss on the fixed windows, seconds of training) of the evaluations that have a loss."""
    return finite_rows((result or {}).get("curve") or [])


def lowest(result: RunResult | None) -> float:
    """Return the lowest loss of a run on the fixed windows; infinite where there is none."""
    return min((loss for _, loss, _ in curve_of(result)), default=math.inf)


def reached(result: RunResult | None, target: float) -> tuple[int, float] | None:
    """Return the steps and the seconds until a run first has a loss at or below the target; None for never. A
    run that diverged afterwards has reached it."""
    return first_at_or_below((result or {}).get("curve") or [], target)


def times_of(specs: Sequence[RunSpec], results: Results, target: float) -> list[tuple[float, float]]:
    """Return steps and seconds to the target of the runs that ended by themselves, infinite for a miss."""
    there = [results.get(s.run_id) for s in specs]
    found = [reached(result, target) for result in there if is_conclusive(result)]
    return [found_ or (math.inf, math.inf) for found_ in found]


def median(times: Sequence[float]) -> float:
    """Return the median over seeds; infinite where there is none."""
    return statistics.median(times) if times else math.inf


def ratios(medians: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return method -> workload -> its time over that of the best method there, infinite for a miss."""
    names = {name for by_workload in medians.values() for name in by_workload}
    best = {name: min(by_workload[name] for by_workload in medians.values()) for name in names}
    return {
        method: {name: x / best[name] if math.isfinite(x) else math.inf for name, x in by_workload.items()}
        for method, by_workload in medians.items()
    }


def share_within(of_workloads: Sequence[float], tau: float) -> float:
    """Return ρ(τ), the share of the workloads whose ratio is at most τ."""
    return sum(r <= tau for r in of_workloads) / len(of_workloads)


def score(of_workloads: Sequence[float], most: float = MOST) -> float:
    """Return the mean of ρ over τ in [1, `most`], exactly: a workload counts from its ratio on."""
    return statistics.fmean(max(0.0, most - r) / (most - 1) for r in of_workloads)


def intervals(times: Times, divided: int = 1) -> dict[str, tuple[float, float]]:
    """Return the 95% interval of each method's score by bootstrap over the seeds, which are drawn for each
    workload by itself and are the same for all methods.

    It says how far other seeds might move the score on these very workloads, with these configurations; of
    other workloads it says nothing. A workload on which a method lacks a seed is left out.
    `divided`: by what the error is (`rules.error_divided`).
    """
    import numpy as np

    methods = list(times)
    generator = np.random.default_rng(0)
    total = np.zeros((RESAMPLES, len(methods)))
    names = [
        name
        for name in times[methods[0]]
        if len({len(by_workload.get(name, ())) for by_workload in times.values()}) == 1
        and times[methods[0]][name]
    ]
    if not names:
        return {}
    for name in names:
        known = np.array([times[method][name] for method in methods])  # (methods, seeds)
        seeds = known.shape[1]
        picked = np.sort(known[:, generator.integers(0, seeds, (RESAMPLES, seeds))], axis=-1)
        medians = (picked[..., (seeds - 1) // 2] + picked[..., seeds // 2]) / 2  # infinite ones stay so
        best = medians.min(axis=0)
        with np.errstate(invalid="ignore"):
            r = np.where(np.isfinite(medians), medians / best, math.inf)
        total += np.clip((MOST - r.T) / (MOST - 1), 0, None)
    tail = 50 * (1 - CONFIDENCE) / divided
    low, high = np.percentile(total / len(names), [tail, 100 - tail], axis=0)
    return {m: (float(a), float(b)) for m, a, b in zip(methods, low, high, strict=True)}


def over_hints(times: Sequence[float], hints: Sequence[int]) -> float:
    """Return the geometric mean of times over the length of the runs that set the targets, a miss as 4."""
    return statistics.geometric_mean(
        min(MOST, time / hint) if math.isfinite(time) else MOST
        for time, hint in zip(times, hints, strict=True)
    )


def sensitivity(runs: Mapping[float, Sequence[RunSpec]], results: Results) -> RateSensitivity:
    """Return how much the learning rate matters, from the runs at each of several rates."""
    rates = sorted(runs)
    losses = {lr: _mean(runs[lr], results, capped=False) for lr in rates}
    capped = [_mean(runs[lr], results, capped=True) for lr in rates]
    whole = all(map(math.isfinite, capped)) and any(map(math.isfinite, losses.values()))
    return {
        "rates": rates,
        "losses": [loss if math.isfinite(loss) else None for loss in losses.values()],
        "sensitivity": statistics.fmean(capped) - min(losses.values()) if whole else None,
        "window": window(losses),
    }


def _mean(specs: Sequence[RunSpec], results: Results, *, capped: bool) -> float:
    """Return the mean validation loss of some seeds, of each at most that of its first step if `capped`."""
    losses = []
    for spec in specs:
        result: Mapping[str, Any] = results.get(spec.run_id, {})
        start = result.get("initial_loss")
        loss = val_loss(results.get(spec.run_id))
        first = start if start is not None and math.isfinite(start) else math.inf
        losses.append(min(loss, first) if capped and is_conclusive(result) else loss)
    return statistics.fmean(losses)

"""The statistics of the stage profiles: how soon each method reaches a target, and how methods compare.

* Time to a target: the steps, or the seconds of training (with measurements), until an evaluation on the
  fixed windows first has a loss at or below the target; the median over several seeds. None is a miss, which
  ranks behind every time.
* r of a method on a workload: its time divided by the shortest time of any method. ρ(τ): the share of
  workloads with r <= τ (performance profiles, Dolan & Moré 2002). The score: the mean of ρ over τ in [1, 4],
  as in AlgoPerf (Dahl et al., arXiv:2306.07179).
* LR sensitivity: the mean of min(loss, loss of the first step) over learning rates, less the best loss
  (Wortsman et al., arXiv:2309.14322).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from ebc_lab.config.parts.target import finite_rows
from ebc_lab.records.decisions import RateSensitivity
from ebc_lab.records.figures import RunResult

from ..rules import Results, Specs, is_conclusive, losses_of, val_loss
from ..statistics import CONFIDENCE, window

MOST = 4.0  # the largest ratio τ that is drawn and scored
RESAMPLES = 2000
Time = float | None
Times = Mapping[str, Mapping[str, Sequence[Time]]]  # method -> workload -> one time per seed


def lowest(result: RunResult | None) -> float:
    """Return the lowest loss of a run on the fixed windows; infinite if no loss is finite."""
    rows = finite_rows((result or {}).get("curve") or [])
    return min((loss for _, loss, _ in rows), default=math.inf)


def median(times: Iterable[Time]) -> Time:
    """Return the median time over seeds; None if the median is a miss, or if there are no seeds."""
    known = [math.inf if time is None else time for time in times]
    middle = statistics.median(known) if known else math.inf
    return float(middle) if math.isfinite(middle) else None


def over_the_best(times: Sequence[Time]) -> tuple[Time, list[float | None]]:
    """Return the shortest time, and each time divided by the shortest; a quotient is None for a miss."""
    best = min((time for time in times if time is not None), default=None)
    return best, [None if time is None or best is None else time / best for time in times]


def share_within(ratios: Sequence[float], tau: float) -> float:
    """Return ρ(τ): the share of workloads whose ratio is at most τ. A miss has an infinite ratio."""
    return sum(r <= tau for r in ratios) / len(ratios)


def score(ratios: Sequence[float | None], most: float = MOST) -> float:
    """Return the mean of ρ over τ in [1, `most`], computed exactly. A ratio of None is a miss."""
    return statistics.fmean(0.0 if r is None else max(0.0, most - r) / (most - 1) for r in ratios)


def intervals(times: Times, divided: int = 1) -> dict[str, tuple[float, float]]:
    """Return the 95% bootstrap interval of each method's score over seeds. Seeds are drawn for each workload
    separately, and the draws are the same for all methods.

    An interval shows how far other seeds might move the score on these workloads with these configurations.
    It says nothing about other workloads. A workload on which a method lacks a seed is left out. `divided`:
    the number that divides the error of 5% (`rules.error_divided`).
    """
    import numpy as np

    generator = np.random.default_rng(0)
    total = np.zeros((RESAMPLES, len(times)))
    judged = 0  # workloads
    for name in next(iter(times.values()), ()):
        of_methods = [by_workload[name] for by_workload in times.values()]
        seeds = len(of_methods[0])
        if not seeds or any(len(of_seeds) != seeds for of_seeds in of_methods):
            continue
        known = np.array(of_methods, dtype=float)  # (methods, seeds)
        known[np.isnan(known)] = math.inf  # a miss
        picked = np.sort(known[:, generator.integers(0, seeds, (RESAMPLES, seeds))], axis=-1)
        medians = (picked[..., (seeds - 1) // 2] + picked[..., seeds // 2]) / 2  # infinite ones stay infinite
        best = medians.min(axis=0)
        with np.errstate(invalid="ignore"):
            r = np.where(np.isfinite(medians), medians / best, math.inf)
        total += np.clip((MOST - r.T) / (MOST - 1), 0, None)
        judged += 1
    if not judged:
        return {}
    tail = 50 * (1 - CONFIDENCE) / divided
    low, high = np.percentile(total / judged, [tail, 100 - tail], axis=0)
    return {m: (float(a), float(b)) for m, a, b in zip(times, low, high, strict=True)}


def mean_time(times: Mapping[str, float]) -> float:
    """Return the geometric mean of relative times; a miss, or a time above 4, counts as 4."""
    return statistics.geometric_mean(min(MOST, time) for time in times.values())


def sensitivity(runs: Mapping[float, Specs], results: Results) -> RateSensitivity:
    """Return how much the learning rate matters, from the runs at each of several learning rates."""
    rates = sorted(runs)
    losses = {lr: statistics.fmean(losses_of(runs[lr], results)) for lr in rates}
    capped = [statistics.fmean(_capped(results.get(s.run_id)) for s in runs[lr]) for lr in rates]
    whole = all(map(math.isfinite, capped)) and any(map(math.isfinite, losses.values()))
    return {
        "rates": rates,
        "losses": [loss if math.isfinite(loss) else None for loss in losses.values()],
        "sensitivity": statistics.fmean(capped) - min(losses.values()) if whole else None,
        "window": window(losses),
    }


def _capped(result: RunResult | None) -> float:
    """Return a run's validation loss or, if that is higher or the run diverged, its first-step loss."""
    first = (result or {}).get("initial_loss")
    if not is_conclusive(result) or first is None or not math.isfinite(first):
        return val_loss(result)
    return min(val_loss(result), first)

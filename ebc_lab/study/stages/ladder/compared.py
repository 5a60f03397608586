"""What the ladder says of two arms: on each rung, over all of them, and with more compute.

All are paired by seed. The contrast is named beforehand: the mean of the differences over all rungs, each
rung with the same weight. The trend is the slope of the difference over log2 of a run's floating-point
operations, by least squares over the rungs. Both are linear in the losses, so each seed gives one value of
them, and the t-interval over seeds needs no model of how the rungs scatter about the line.

Speed-ups are ratios of steps or seconds. Nothing is interpolated between evaluations: the estimate takes the
first evaluation at or below the loss, and an interval covers what the evaluations leave open.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ebc_lab.config.parts.target import finite_rows
from ebc_lab.records.decisions import Difference, Lengths, Rung, RungArm, SpeedUp
from ebc_lab.records.figures import RunResult

from ..compare_arms import losses
from ..rules import Results
from ..statistics import CONFIDENCE, NO_LUCK, ROUNDING, Luck, finite_or_none, interval_of, paired

Losses = Mapping[str, float]  # by seed
Reach = tuple[float, float, float]  # steps to a loss, steps at the evaluation before it, and seconds


def losses_by_seed(arm: RungArm, results: Results, carried: bool = False) -> dict[str, float]:
    """Return an arm's test losses on a rung, by seed."""
    runs: Any = {"runs": arm["carried_runs" if carried else "runs"]}
    return losses(runs, results)


def contrast(
    weights: Mapping[str, float],
    of_arm: Mapping[str, Losses],
    of_other: Mapping[str, Losses],
    **settings: Any,
) -> Difference | None:
    """Return the difference of weighted sums over the rungs, paired by seed; None if a rung with a weight has
    no loss. A seed counts if both arms have it on every rung. With a weight below 0, a diverged run leaves
    nothing to say, and None is returned. `weights`: rung -> weight; `of_arm`, `of_other`: rung -> losses."""
    used = [rung for rung, weight in weights.items() if weight]
    both = [of[rung] for of in (of_arm, of_other) for rung in used]
    seeds = set.intersection(*map(set, both)) if all(both) else set()
    lost = any(math.isinf(of[seed]) for of in both for seed in seeds)
    if not seeds or (lost and min(weights.values()) < 0):
        return None
    sums = [
        {seed: sum(weights[rung] * of[rung][seed] for rung in used) for seed in seeds}
        for of in (of_arm, of_other)
    ]
    return paired(*sums, **settings)


def luck_over(weights: Mapping[str, float], *arms: Mapping[str, RungArm]) -> Luck:
    """Return the luck in a weighted sum over rungs, of arms (rung -> arm) that were tuned apart. Where an arm
    was not tuned again, it is the luck of one choice for all these rungs."""
    parts = []
    for arm in arms:
        kept = [rung for rung in weights if not arm[rung]["trials"]]
        parts += [(abs(w), arm[rung]["luck"]) for rung, w in weights.items() if rung not in kept]
        parts += [(abs(sum(weights[rung] for rung in kept)), arm[rung]["luck"]) for rung in kept[:1]]
    return sum((Luck(w * luck["sd"], luck["freedom"]) for w, luck in parts if w > ROUNDING), NO_LUCK)


def equal_weights(rungs: Sequence[str]) -> dict[str, float]:
    return dict.fromkeys(rungs, 1 / len(rungs))


def slope_weights(rungs: Mapping[str, Rung]) -> dict[str, float] | None:
    """Return the weights with which losses on the rungs add up to their slope, nats per doubling of compute;
    None if all rungs have the same compute."""
    doublings = {name: math.log2(rung["compute"]) for name, rung in rungs.items()}
    mean = statistics.fmean(doublings.values())
    spread = sum((x - mean) ** 2 for x in doublings.values())
    return {name: (x - mean) / spread for name, x in doublings.items()} if spread > 1e-9 else None


# -- speed ---------------------------------------------------------------------------------------------------


def speed_up(arm: RungArm, other: RungArm, results: Results, comparisons: int, looks: int) -> SpeedUp:
    """Return how many times as soon an arm reaches a loss as the other does on a rung. The intervals hold for
    all comparisons at once, at an error divided by `looks`. A run that did not complete leaves out its
    seed."""
    steps: list[tuple[float, float, float]] = []  # of each seed the log of the ratio, and its two bounds
    seconds: list[float] = []
    for seed, run_id in arm["runs"].items():
        pair = [results.get(run_id, RunResult()), results.get(other["runs"].get(seed, ""), RunResult())]
        rows = [finite_rows(r.get("curve") or []) if r.get("outcome") == "completed" else [] for r in pair]
        if not all(rows):
            continue
        target = max(curve[-1][1] for curve in rows)
        (a, before_a, time_a), (b, before_b, time_b) = (_reach(curve, target) for curve in rows)
        steps.append((math.log(b / a), _log(before_b / a), _log(b / before_a if before_a else math.inf)))
        seconds.append(math.log(time_b / time_a) if time_a > 0 and time_b > 0 else math.nan)
    level = (1 - CONFIDENCE) / looks / comparisons
    timed = seconds if all(map(math.isfinite, seconds)) else []
    low, high = (_interval([each[end] for each in steps], level)[end - 1] for end in (1, 2))
    seconds_low, seconds_high = _interval(timed, level)
    return {
        "seeds": len(steps),
        "steps": _exp(statistics.fmean(x for x, _, _ in steps)) if steps else None,
        "steps_low": low,
        "steps_high": high,
        "seconds": _exp(statistics.fmean(timed)) if timed else None,
        "seconds_low": seconds_low,
        "seconds_high": seconds_high,
    }


def _reach(rows: Sequence[tuple[int, float, float]], target: float) -> Reach:
    """Return when a curve is first at or below the loss. Its last row is, by the choice of the loss."""
    first = next(i for i, (_, loss, _) in enumerate(rows) if loss <= target or i == len(rows) - 1)
    step, _, seconds = rows[first]
    return step, rows[first - 1][0] if first else 0, seconds


def _log(x: float) -> float:
    return math.log(x) if 0 < x < math.inf else math.copysign(math.inf, x - 1)


def _exp(x: float) -> float | None:
    return finite_or_none(math.exp(x)) if x < 700 else None


def _interval(logs: Sequence[float], level: float) -> tuple[float | None, float | None]:
    """Return the ends of the interval of a geometric mean; None for one that is infinite or not known."""
    if len(logs) < 2 or not all(map(math.isfinite, logs)):
        return None, None
    low, high, _ = interval_of("t", logs, NO_LUCK, level)
    return _exp(low), _exp(high)


def lengths(
    names: Sequence[str], rungs: Mapping[str, Rung], arm: Losses, other: Mapping[str, Losses], divided: float
) -> Lengths | None:
    """Return how many times as long the other arm would have to train to end at the arm's loss at the shorter
    of two lengths. `names`: the shorter and the longer rung; `arm`: losses at the shorter one; `other`: rung
    -> losses. The interval is Fieller's, of two means over the same seeds, its error divided by `divided`; an
    end is None if it is infinite. Return None if the other arm does not gain from the greater length.

    Its losses are taken to lie on a straight line over the logarithm of the length, each with a schedule and
    a tuning of its own. Beyond the greater length that is an extrapolation.
    """
    from scipy import stats

    short, long = names
    seeds = sorted(set(arm) & set(other[short]) & set(other[long]))
    ahead = [other[short][s] - arm[s] for s in seeds]
    gains = [other[short][s] - other[long][s] for s in seeds]
    n = len(seeds)
    if n < 2 or not all(map(math.isfinite, [*ahead, *gains])) or (gain := statistics.fmean(gains)) <= 0:
        return None
    doublings = math.log2(rungs[long]["steps"] / rungs[short]["steps"])
    lead = statistics.fmean(ahead)
    t2 = float(stats.t.ppf(1 - (1 - CONFIDENCE) / divided / 2, n - 1)) ** 2 / n
    a = gain**2 - t2 * statistics.variance(gains)
    b = lead * gain - t2 * statistics.covariance(ahead, gains)
    c = lead**2 - t2 * statistics.variance(ahead)
    ends: tuple[float | None, float | None] = (None, None)
    if a > 0 and (root := b**2 - a * c) >= 0:
        ends = tuple(_exp((b + sign * math.sqrt(root)) / a * doublings * math.log(2)) for sign in (-1, 1))  # type: ignore[assignment]
    times = _exp(lead / gain * doublings * math.log(2))
    return {"rungs": [short, long], "times": times, "low": ends[0], "high": ends[1]}


def pair_of_lengths(rungs: Mapping[str, Rung]) -> tuple[str, str] | None:
    """Return the first two rungs that differ in length alone, the shorter first; None if there are none."""
    alike: dict[tuple[int, int, int], list[str]] = {}
    for name in sorted(rungs, key=lambda name: rungs[name]["steps"]):
        rung = rungs[name]
        names = alike.setdefault((rung["width"], rung["blocks"], rung["batch_size"]), [])
        if not names or rung["steps"] > rungs[names[-1]]["steps"]:
            names.append(name)
    several = [names for names in alike.values() if len(names) > 1]
    return (several[0][0], several[0][1]) if several else None

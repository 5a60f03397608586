"""What runs say about arms and about the differences between them.

Distributions and tests are scipy's, and comparisons over shared seeds are those of the lab's own finals
(ebc_lab/study/stages/statistics.py). For runs that share no seeds:

* Welch's t-interval. It is too narrow where an arm of two or three runs, whose variance may come out tiny by
  chance, stands against many more (2 against 20 runs of equal variance: an error of 12% in place of 5%).
  There the t has the freedom of the smaller arm, which is never too narrow (Mickey & Brown 1966).
* Where a run diverged, it ranks behind all others, and the interval is that of Hodges & Lehmann (1963), which
  inverts the exact test of Mann & Whitney (1947). It alone judges: a mere count of diverged runs has no known
  error. The difference of two diverged runs is not known, and no end of an interval rests on it.
* An arm of one run has no interval of its own. Only a standard deviation from elsewhere gives one.

Of the error of a family of comparisons each has an equal share (Bonferroni). Those by Welch's t put theirs
together and spend it by simulation (`joint`), which knows how they are correlated. dev/studies/judge_rates.py
measures how often all this claims something false.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from ebc_lab.config.errors import require
from ebc_lab.records.decisions import Diverged
from ebc_lab.study.stages.statistics import (
    CONFIDENCE,
    MOST_SEEDS,
    NO_LUCK,
    POWER,
    Luck,
    detectable_errors,
    finite_or_none,
    interval_of,
    paired,
    power,
    seeds_needed,
    sum_of_variances,
    without_spread,
)
from ebc_lab.study.stages.verdict import verdict_of

from . import joint
from .record import ArmSummary, DifferenceRecord

ERROR = 1 - CONFIDENCE
FEW = 4  # runs: an arm of fewer against half as many again or more has no Welch interval that can be trusted
EXACT = 2_500  # pairs of runs up to which the distribution of Mann and Whitney's U is exact
Array = np.ndarray[Any, Any]
GRID = 25  # freedoms at which the detectable difference of a large family is computed


class Comparison(DifferenceRecord):
    """The loss of an arm minus that of its reference, lower being better."""

    seeds: int  # that both arms have, if they are paired; otherwise 0
    diverged: Diverged
    freedom: float | None  # of the t-interval; None for the normal or by rank


def arm_summary(values: Sequence[float]) -> ArmSummary:
    """Return the summary of an arm of one run or more; a loss that is not finite is of a diverged run."""
    from scipy import stats

    losses = sorted(_ranked(values))
    finite = [x for x in losses if math.isfinite(x)]
    n, lost = len(losses), len(losses) - len(finite)
    out: dict[str, Any] = dict.fromkeys(ArmSummary.__annotations__)
    out |= {"runs": n, "completed": len(finite), "diverged": lost}
    for name, loss in (("median", statistics.median(losses)), ("lowest", losses[0]), ("highest", losses[-1])):
        out[name] = finite_or_none(loss)
    out["mean"] = None if lost else statistics.fmean(losses)
    out["sd"] = statistics.stdev(finite) if len(finite) > 1 else None
    if not lost and not without_spread(losses):
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * statistics.stdev(losses) / math.sqrt(n)
        out |= {"low": out["mean"] - half, "high": out["mean"] + half}
    out["median_low"], out["median_high"], out["median_confidence"] = median_interval(losses)
    return cast(ArmSummary, out)


def median_interval(ranked: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Return the interval of order statistics of the median of sorted values (Thompson 1936), at 95% or more,
    and its actual confidence; of fewer than six values their whole range, with its lower confidence. An
    infinite end is None; all are None from one value."""
    from scipy import stats

    n = len(ranked)
    if n < 2:
        return None, None, None
    cut = max(int(stats.binom.ppf(ERROR / 2, n, 0.5)), 1)  # P(fewer than cut) ≤ 2.5%, or there is no such cut
    confidence = float(1 - 2 * stats.binom.cdf(cut - 1, n, 0.5))
    return finite_or_none(ranked[cut - 1]), finite_or_none(ranked[n - cut]), confidence


def compare(
    arms: Mapping[str, Mapping[str, float]],
    reference: str,
    *,
    pairs: bool = False,
    chain: Sequence[str] = (),
    paired: bool | None = None,
    margin: float = 0.0,
    sigma: float | None = None,
    sigma_freedom: float = math.inf,
    luck: Mapping[str, Luck] | None = None,
) -> list[Comparison]:
    """Return the comparison of each arm with `reference`; with `pairs`, of all pairs, the earlier being the
    reference (`reference` comes first); with `chain`, of each arm in it with the one before.

    `arms`: arm -> seed, or name of the run -> loss, lower being better; a loss that is not finite is that of
    a diverged run. `paired`: whether seeds pair the runs of two arms; None: where both have the same seeds.
    `margin`: differences up to it are level. `sigma`: the standard deviation of a run, for arms of one run,
    and `sigma_freedom`, the degrees of freedom of its estimate. `luck`: arm -> the luck of its tuning.

    Raise UserError if there is no arm of the reference's name or one has no run.
    """
    known = ", ".join(arms)
    require(reference in arms, f"no arm is called {reference}: the reference has to be one of {known}")
    for name, runs in arms.items():
        require(bool(runs), f"the arm {name} has no run: leave it out, or give its runs")
    luck = luck or {}
    losses = {name: dict(zip(runs, _ranked(runs.values()), strict=True)) for name, runs in arms.items()}
    order = [reference, *(name for name in losses if name != reference)]
    couples = [(reference, arm) for arm in order[1:]]
    if pairs:
        couples = list(itertools.combinations(order, 2))
    if chain:
        couples = list(itertools.pairwise(chain))
    found = [_begun(losses, arm, other, paired, sigma) for other, arm in couples]
    tested = [c for c in found if c["method"]]
    for c in found:
        c["comparisons"], c["margin"] = len(tested), margin
    by_t = [c for c in tested if c["method"] in ("welch", "sigma")]
    for c in tested:
        if c["method"] in ("t", "rank"):
            both = luck.get(c["arm"], NO_LUCK) + luck.get(c["reference"], NO_LUCK)
            _pair(c, losses[c["arm"]], losses[c["reference"]], both)
        elif c["method"] == "rank-sum":
            _rank_sum(c, [*losses[c["arm"]].values()], [*losses[c["reference"]].values()])
    if by_t:
        _by_t(by_t, losses, luck, sigma, sigma_freedom)
    for c in found:
        if c["method"] is None:
            c["detectable"] = _one_run(losses[c["arm"]], losses[c["reference"]])
    return found


def _ranked(values: Any) -> list[float]:
    """Return losses with infinity for every one that is not finite."""
    return [float(x) if math.isfinite(x) else math.inf for x in values]


def _begun(
    losses: Mapping[str, Mapping[str, float]], arm: str, other: str, paired: bool | None, sigma: float | None
) -> Comparison:
    """Return a comparison with its arms, its method, and no figures yet."""
    ours, theirs = losses[arm], losses[other]
    shared = ours.keys() & theirs.keys()
    together = ours.keys() == theirs.keys() if paired is None else paired
    few = len(shared) < 2 if together else min(len(ours), len(theirs)) < 2
    if together and not few:  # only the seeds that both have
        ours, theirs = ({s: runs[s] for s in shared} for runs in (ours, theirs))
    lost = {"arm": sum(map(math.isinf, ours.values())), "reference": sum(map(math.isinf, theirs.values()))}
    method, note = _method(ours, theirs, together, few, any(lost.values()), sigma)
    out: dict[str, Any] = dict.fromkeys(Comparison.__annotations__)
    out |= {"arm": arm, "reference": other, "method": method, "note": note, "diverged": lost}
    out |= {"n_arm": len(losses[arm]), "n_reference": len(losses[other]), "verdict": "undecided"}
    out["seeds"] = len(shared) if together else 0
    if not any(lost.values()):
        out["mean"] = statistics.fmean(ours.values()) - statistics.fmean(theirs.values())
    return cast(Comparison, out)


def _method(
    ours: Mapping[str, float],
    theirs: Mapping[str, float],
    together: bool,
    few: bool,
    lost: bool,
    sigma: float | None,
) -> tuple[str | None, str | None]:
    """Return the method for two arms, or why there is none."""
    if not any(map(math.isfinite, (*ours.values(), *theirs.values()))):
        return None, "no run of either arm has a finite outcome"
    if few and lost:
        return None, "one run, and a diverged one: ranks of so few runs say nothing"
    if few:
        return ("sigma", None) if sigma else (None, "one run has no spread: no interval without a sigma")
    if together and lost:
        return "rank", None
    same = "all runs of an arm agree: they may be copies, or the figure is as coarse as the evaluations"
    if together:
        return (None, same) if without_spread([ours[s] - theirs[s] for s in ours]) else ("t", None)
    if lost:
        return "rank-sum", None
    return (None, same) if any(without_spread([*x.values()]) for x in (ours, theirs)) else ("welch", None)


def _judged(low: float, high: float, margin: float) -> str:
    """Return the verdict of `verdict_of` by the ends of a joint interval alone, which may be infinite."""
    return verdict_of(cast(Any, {"seeds": 0, "joint_low": low, "joint_high": high, "margin": margin}))


def _pair(c: Comparison, ours: Mapping[str, float], theirs: Mapping[str, float], luck: Luck) -> None:
    """Fill in a comparison over shared seeds."""
    difference = paired(ours, theirs, margin=c["margin"], comparisons=c["comparisons"], luck=luck)
    shared = Comparison.__annotations__.keys() & difference.keys() - {"diverged"}
    c.update(cast(Any, {key: difference[key] for key in shared}))  # type: ignore[literal-required]
    if c["method"] == "rank":
        between = [ours[s] - theirs[s] for s in ours.keys() & theirs.keys()]
        lowest, highest = ([end if x != x else x for x in between] for end in (-math.inf, math.inf))

        def limits(level: float) -> tuple[float, float]:
            low, high = (interval_of("rank", ends, NO_LUCK, level) for ends in (lowest, highest))
            return low[0], high[1]

        _by_rank(c, between, limits)
    else:
        c["freedom"] = c["seeds"] - 1.0
        c["verdict"] = _judged(cast(float, c["joint_low"]), cast(float, c["joint_high"]), c["margin"])
    c["seeds_needed"] = seeds_needed(difference) if c["verdict"] == "undecided" else None


def _one_run(ours: Mapping[str, float], theirs: Mapping[str, float]) -> float | None:
    """Return the smallest difference that one run could show against the runs of the other arm, if they have
    the same spread; None if neither arm has two completed runs, or its runs have no spread."""
    many = max(ours, theirs, key=len).values()
    if min(len(ours), len(theirs)) > 1 or not all(map(math.isfinite, many)) or without_spread([*many]):
        return None
    error = statistics.stdev(many) * math.sqrt(1 + 1 / len(many))
    return detectable_errors(len(many) - 1, ERROR) * error


# -- by ranks ------------------------------------------------------------------------------------------------


@functools.cache
def _mann_whitney(n: int, m: int) -> Array:
    """Return P(U ≤ u) for u = 0 … n·m, U being the number of pairs of n and m runs in which the first is the
    lower, if all orders are equally likely. Exact for up to EXACT pairs, then normal."""
    from scipy import stats

    if n * m > EXACT:
        spread = math.sqrt(n * m * (n + m + 1) / 12)
        return np.asarray(stats.norm.cdf((np.arange(n * m + 1) + 0.5 - n * m / 2) / spread))
    row = [np.ones(1)] * (m + 1)  # chances of U for no run of the first arm and 0 … m of the second
    for i in range(1, n + 1):
        new = [np.ones(1)]
        for j in range(1, m + 1):  # the highest run of all is the first arm's, or it is the second's
            chances = np.zeros(i * j + 1)
            chances[: (i - 1) * j + 1] += i / (i + j) * row[j]
            chances[i:] += j / (i + j) * new[j - 1]
            new.append(chances)
        row = new
    return np.cumsum(row[m])


def _rank_sum(c: Comparison, ours: Sequence[float], theirs: Sequence[float]) -> None:
    """Fill in an unpaired comparison of runs of which some diverged; ties count against a difference."""
    with np.errstate(invalid="ignore"):  # of two diverged runs
        between = np.subtract.outer(np.array(ours), np.array(theirs)).ravel()
    lowest, highest = (np.sort(np.where(np.isnan(between), end, between)) for end in (-math.inf, math.inf))
    chances = _mann_whitney(len(ours), len(theirs))
    least = min(chances[int((lowest <= 0).sum())], chances[int((highest >= 0).sum())])
    p = min(1.0, 2 * float(least))
    c["p"], c["p_joint"] = p, min(1.0, c["comparisons"] * p)

    def limits(level: float) -> tuple[float, float]:
        outside = int(np.searchsorted(chances, level / 2, side="right"))  # P(U < outside) ≤ level / 2
        return (lowest[outside - 1], highest[-outside]) if outside else (-math.inf, math.inf)

    _by_rank(c, between.tolist(), limits)


def _by_rank(c: Comparison, between: Sequence[float], limits: Callable[[float], tuple[float, float]]) -> None:
    """Fill in the median, the intervals and the verdict from the differences `between` runs, NaN for two that
    diverged, and the `limits` of an interval with a given error."""
    middle = statistics.median(0.0 if x != x else x for x in between)
    c["median"] = finite_or_none(middle) if middle or 0.0 in between else None
    for prefix, level in (("", ERROR), ("joint_", ERROR / c["comparisons"])):
        low, high = limits(level)
        c.update(cast(Any, {f"{prefix}low": finite_or_none(low), f"{prefix}high": finite_or_none(high)}))
    c["verdict"] = _judged(low, high, c["margin"])


# -- by t ----------------------------------------------------------------------------------------------------


def _by_t(
    found: Sequence[Comparison],
    losses: Mapping[str, Mapping[str, float]],
    luck: Mapping[str, Luck],
    sigma: float | None,
    sigma_freedom: float,
) -> None:
    """Fill in the comparisons by Welch's t and by a given σ. The luck of a tuning only widens an interval."""
    compared = {name for c in found for name in (c["arm"], c["reference"])}
    spreads = {}  # arm -> the number of its runs, and the variance of one
    for name in sorted(compared):  # not in the order of hashes
        values = [*losses[name].values()]
        spreads[name] = len(values), statistics.variance(values) if len(values) > 1 else math.nan
    ways = [_of_family(found, spreads, {}, sigma, sigma_freedom)]
    if any(luck.get(name, NO_LUCK).sd for name in spreads):
        ways.append(_of_family(found, spreads, luck, sigma, sigma_freedom))
    widest = {key: np.max([way[key] for way in ways], axis=0) for key in ways[0] if key != "freedom"}
    for i, c in enumerate(found):
        at = {key: float(values[i]) for key, values in widest.items()}
        mean = cast(float, c["mean"])
        for prefix in ("", "joint_"):
            low, high = mean - at[f"{prefix}half"], mean + at[f"{prefix}half"]
            limits = {"low": low, "high": high, "detectable": at[f"{prefix}detectable"]}
            c.update(cast(Any, {f"{prefix}{name}": x for name, x in limits.items()}))
        c["p"], c["p_joint"], c["sd"] = at["p"], at["p_joint"], math.sqrt(at["variance"])
        c["freedom"] = finite_or_none(float(ways[-1]["freedom"][i]))
        c["verdict"] = _judged(low, high, c["margin"])
        if c["verdict"] == "undecided":
            needed = at["needed"]
            c["seeds_needed"] = int(needed) if needed <= MOST_SEEDS else None


def welch(errors: Any, freedoms: Any, runs: Any, first: Any, second: Any) -> tuple[Any, Any, Any]:
    """Return `joint.welch` of arms with so many `runs`, but the freedom of the smaller arm where it has too
    few for Welch's; and which comparisons have Welch's, and so spend their error jointly."""
    error, freedom = joint.welch(errors, freedoms, first, second)
    fewer, more = np.minimum(runs[first], runs[second]), np.maximum(runs[first], runs[second])
    few = (fewer < FEW) & (more >= 1.5 * fewer)
    return error, np.where(few, np.minimum(freedoms[first], freedoms[second]), freedom), ~few


def _of_family(
    found: Sequence[Comparison],
    spreads: Mapping[str, tuple[int, float]],
    luck: Mapping[str, Luck],
    sigma: float | None,
    sigma_freedom: float,
) -> dict[str, Array]:
    """Return, an array over comparisons each, half the widths of their intervals and what else `_by_t` fills
    in, luck included. `spreads`: arm -> the number of its runs, and the variance of one."""
    from scipy import special

    number = {name: i for i, name in enumerate(spreads)}
    first, second = (np.array([number[c[key]] for c in found]) for key in ("arm", "reference"))
    runs = np.array([n for n, _ in spreads.values()])
    variances = np.array([variance for _, variance in spreads.values()])
    lucks = [luck.get(name, NO_LUCK) for name in spreads]
    parts = [
        sum_of_variances((variance / n, max(1.0, n - 1.0)), (one.sd**2, one.freedom))
        for variance, n, one in zip(variances, runs, lucks, strict=True)
    ]
    errors, freedoms = np.sqrt([v for v, _ in parts]), np.array([f for _, f in parts])
    by_sigma = np.array([c["method"] == "sigma" for c in found])
    variance = variances[first] + variances[second]
    lucky = np.array([one.sd**2 for one in lucks])
    lucky = lucky[first] + lucky[second]
    fewer = np.minimum(runs[first], runs[second])
    mean, k = np.array([c["mean"] for c in found]), found[0]["comparisons"]
    error, freedom, pool = welch(errors, freedoms, runs, first, second)
    if sigma:
        variance = np.where(by_sigma, 2 * sigma**2, variance)
        error = np.where(by_sigma, np.sqrt(sigma**2 * (1 / runs[first] + 1 / runs[second]) + lucky), error)
        freedom = np.where(by_sigma, sigma_freedom, freedom)
    p = joint.two_sided(mean / error, freedom)
    level, p_joint = np.full(len(found), ERROR / k), np.minimum(1.0, k * p)
    pool &= ~by_sigma
    if pool.any():
        share = pool.sum() / k
        at, together = joint.joint(errors, freedoms, first[pool], second[pool], p[pool], ERROR * share)
        level[pool], p_joint[pool] = at, np.minimum(1.0, together / share)
    out = {"p": p, "p_joint": p_joint, "variance": variance, "freedom": freedom}
    for prefix, error_level in (("", np.full(len(found), ERROR)), ("joint_", level)):
        out[f"{prefix}half"] = error * special.stdtrit(freedom, 1 - error_level / 2)
        out[f"{prefix}detectable"] = error * _detectable(freedom, error_level)
    alone = np.where(by_sigma, math.inf, variance**2 / (variances[first] ** 2 + variances[second] ** 2))
    fixed = np.where(by_sigma, sigma_freedom, math.nan)
    out["needed"] = _needed(mean, variance, lucky, alone, fixed, level, found[0]["margin"], fewer + 1)
    return out


def _detectable(freedom: Array, level: Array) -> Array:
    """Return `detectable_errors` of many comparisons; of more than GRID freedoms at a level, interpolated."""
    out = np.empty(len(freedom))
    for one in np.unique(level):
        inverse = 1 / freedom[level == one]
        grid = np.unique(inverse)
        if len(grid) > GRID:
            grid = np.linspace(grid[0], grid[-1], GRID)
        known = [math.log(detectable_errors(1 / x if x else math.inf, float(one))) for x in grid]
        out[level == one] = np.exp(np.interp(inverse, grid, known))
    return out


def _needed(
    mean: Array,
    variance: Array,
    lucky: Array,
    shape: Array,
    fixed: Array,
    level: Array,
    margin: float,
    fewest: Array,
) -> Array:
    """Return how many fresh runs per arm would decide each comparison with probability POWER; more than
    MOST_SEEDS where so many would not do.

    `variance`: of the difference of two runs; `lucky`: of the luck of both tunings, which stays; `shape`: of
    Welch's freedom with equal runs, in units of runs - 1; `fixed`: the freedom that more runs do not change,
    NaN where there is none; `fewest`: runs to begin with.
    """
    low, high = np.maximum(2, fewest), np.full(len(mean), MOST_SEEDS + 1)
    while (low < high).any():  # bisection, all comparisons at once
        middle = (low + high) // 2
        freedom = np.where(np.isnan(fixed), shape * (middle - 1), fixed)
        enough = power(mean, np.sqrt(variance / middle + lucky), freedom, level, margin) >= POWER
        low, high = np.where(enough, low, np.minimum(middle + 1, high)), np.where(enough, middle, high)
    return np.asarray(low)

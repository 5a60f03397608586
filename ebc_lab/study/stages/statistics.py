"""What paired seeds can show: differences with their intervals, judgements on them, and the noise of runs.

Distributions and tests are scipy's. This module chooses which of them to use, and at which level:

* The differences of an arm from its reference, paired by seed, get a t-interval (Student 1908). Where a run
  diverged, its loss ranks behind every other and the differences have no mean; then their median gets the
  distribution-free interval of order statistics (Thompson 1936).
* Where several arms are compared with one reference, a second, wider interval holds for all of them at once
  (Bonferroni; Dunn 1961). Claims about an arm rest on this wider interval.
* A study that judges its results more than once, adding seeds while they are undecided, divides its error by
  the number of looks (Bonferroni again; for the reason see Armitage, McPherson & Rowe 1969).
* An answer that reuses seeds of earlier answers was not planned, and nobody knows how many will follow. It
  gets half the error of the answer before, so that all later answers add 2.5 + 1.25 + … < 5% to the 5% of the
  first (error spending: Lan & DeMets 1983). An answer on fresh seeds is independent and keeps its full error.
* Where an arm's settings were tuned, other tuning seeds might have led to other settings. This luck is
  estimated from the points that were tried and the noise of a run, and widens the t-interval (for the reason
  see Bouthillier et al., arXiv:2103.03098).

scipy is imported only where it is used, and of it only what is used: `scipy.stats` takes half a second more
than `scipy.special`, which has the distributions that forecasts and `why` need.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

from ebc_lab.config.errors import count
from ebc_lab.records.decisions import Difference, NoiseFloor, TuningNeeded, Window

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray

CONFIDENCE = 0.95
POWER = 0.80
ROUNDING = 1e-12  # nats: differences within this range count as equal
MOST_SEEDS = 200  # the most that `seeds_needed` returns
MOST_TUNED = 20  # the most seeds of a point that `tuning_needed` returns: each costs a whole tuning
WINDOW_NATS = 0.05  # how far above its lowest loss an arm may be inside its window


@dataclass(frozen=True)
class Luck:
    """How much of a tuning's result is luck: the estimated standard deviation, in nats, of the chosen
    setting's loss over tuning seeds, and the degrees of freedom of that estimate."""

    sd: float = 0.0
    freedom: float = 1.0

    def __add__(self, other: Luck) -> Luck:
        """Return the luck in the difference of two independent choices."""
        variance, freedom = sum_of_variances((self.sd**2, self.freedom), (other.sd**2, other.freedom))
        return Luck(math.sqrt(variance), freedom)


NO_LUCK = Luck()


def luck_between(arms: Iterable[Mapping[str, Any]]) -> Luck:
    """Return the luck in the difference of arms that were tuned apart; an untuned one adds none."""
    return sum((Luck(**arm["luck"]) for arm in arms if "luck" in arm), NO_LUCK)


def sum_of_variances(*parts: tuple[float, float]) -> tuple[float, float]:
    """Return the variance and degrees of freedom of a sum, from those of each part (Welch 1947; Satterthwaite
    1946)."""
    variance = sum(v for v, _ in parts)
    shares = sum(v**2 / freedom for v, freedom in parts if v)
    return variance, variance**2 / shares if shares else parts[0][1]


def noise_of_runs(losses: Sequence[Sequence[float]], *, finalists: bool = False) -> tuple[float, int] | None:
    """Return the standard deviation of a run's loss, in nats, and its degrees of freedom, from the losses of
    several points under the same seeds.

    The effects of point and seed are removed, and the median size of the residuals gives the deviation. Only
    the better half of the points is used, since losses at too high a rate have outliers, unless they are
    `finalists`. Return None with fewer than two seeds, or with fewer than two points whose losses are all
    finite.
    """
    known = [of_point for of_point in losses if all(map(math.isfinite, of_point))]
    if len(known) < 2 or len(known[0]) < 2:
        return None
    import numpy as np
    from scipy import special

    points = np.array(known)
    seeds = points.shape[1]
    order = np.argsort(points.mean(axis=1), kind="stable")
    near = points[order[: len(known) if finalists else max(2, math.ceil(len(known) / 2))]]
    left = near - near.mean(axis=1, keepdims=True) - near.mean(axis=0) + near.mean()
    shrunk = (1 - 1 / len(near)) * (1 - 1 / seeds)  # the share of the variance that is left in the residuals
    sd = float(np.median(np.abs(left))) / special.ndtri(0.75) / math.sqrt(shrunk)
    return sd, (len(near) - 1) * (seeds - 1)


def pooled_deviation(parts: Sequence[tuple[float, int]]) -> tuple[float, int]:
    """Return the standard deviation that several estimates of it share, and its degrees of freedom, from the
    deviation and the freedom of each."""
    freedom = sum(f for _, f in parts)
    return math.sqrt(sum(f * s**2 for s, f in parts) / freedom), freedom


def deviation_interval(sd: float, freedom: int) -> tuple[float, float]:
    """Return the 95% interval of a standard deviation (chi-square)."""
    from scipy import special

    tails = special.chdtri(freedom, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    low, high = (sd * math.sqrt(freedom / tail) for tail in tails)
    return low, high


def luck_of_choice(
    tried: Sequence[Sequence[float]], sigma: float, freedom: int = 1, *, uncertain: bool = False
) -> Luck:
    """Return the luck in choosing the lowest of several points, given each point's losses under the same
    seeds. Some may have further seeds, the same ones (finalists).

    The noise of a mean, from `noise_of_runs` or, if that is None, from `sigma` and its `freedom`, gives each
    point a probability of being the lowest; the noise on the finalists' further seeds is pooled with it. The
    luck is the standard deviation of the points' means under these probabilities, with the freedom of the
    noise. It is 0 if one point is far ahead, or if fewer than two are finite.

    `uncertain`: the points' true losses are taken to lie about their means by that noise, as they do. Of
    many points the lowest means are close together because they were picked for being low; the true losses
    behind them are not. That adds the noise's variance, times the probability that another tuning chooses
    another point.
    """
    known = [losses for losses in tried if all(map(math.isfinite, losses))]
    if len(known) < 2:
        return NO_LUCK
    import numpy as np

    counts = np.array([len(losses) for losses in known])
    least = int(counts.min())
    spread, freedom = noise_of_runs([losses[:least] for losses in known]) or (sigma, freedom)
    further = [losses[least:] for losses in known if len(losses) > least]
    if of_finalists := noise_of_runs(further, finalists=True):
        spread, freedom = pooled_deviation([(spread, freedom), of_finalists])
    if not spread > ROUNDING:
        return Luck(0.0, freedom)
    means, errors = np.array([np.mean(losses) for losses in known]), spread / np.sqrt(counts)
    chance, _ = chances_of_lowest(means, errors)
    variance = variance_under(chance, means)
    if uncertain:
        variance += float(chance @ (errors**2 * (1 - chance).clip(0)))  # a sum to 1 but for rounding
    return Luck(float(f"{math.sqrt(variance):.6g}"), freedom)


def variance_under(chance: NDArray[float64], values: NDArray[float64]) -> float:
    """Return the variance of values under their probabilities; of equal values 0, however these round."""
    beyond = values - values.min()
    return float(chance @ (beyond - chance @ beyond) ** 2)


def chances_of_lowest(means: NDArray[float64], errors: NDArray[float64]) -> tuple[NDArray[float64], float]:
    """Return the probability with which each of several means would be the lowest if all were measured again,
    and the expected value of the lowest. `errors`: the standard errors of the means (> 0, normal noise)."""
    import numpy as np
    from scipy import special

    lowest_at = means.min() + errors.max() * np.linspace(-8, 8, 801)  # possible values of the lowest mean
    z = (lowest_at - means[:, None]) / errors[:, None]
    beyond = special.log_ndtr(-z)
    log_pdf = -(z**2) / 2 - math.log(2 * math.pi) / 2
    density = np.exp(log_pdf + beyond.sum(axis=0) - beyond) / errors[:, None]
    density /= density.sum()
    return density.sum(axis=1), float(density.sum(axis=0) @ lowest_at)


def level(differences: Iterable[Mapping[str, Any] | None]) -> str:
    """Return the confidence of the intervals: `95%`, or more if looks or earlier answers divide the error."""
    return level_of(max((d.get("looks") or 1 for d in differences if d), default=1))


def level_of(divided: int) -> str:
    """Return the confidence level, as text, when the error probability of 5% is divided by `divided`: `97.5%`
    for 2."""
    return f"{100 * (1 - (1 - CONFIDENCE) / divided):.4g}%"


def paired(
    arm: Mapping[str, float],
    reference: Mapping[str, float],
    *,
    margin: float = 0.0,
    comparisons: int = 1,
    looks: int = 1,
    replicates: Sequence[float] = (),
    luck: Luck = NO_LUCK,
) -> Difference:
    """Return how an arm differs from a reference over the seeds that both have. Losses are in nats by seed,
    infinite if a run diverged. `replicates`: losses of one configuration under several seeds, for the noise
    floor. `luck`: the luck in the difference, from the tuning of both arms.

    * `method`: `t`, `rank` if a run diverged, or None if there is no pair;
    * `mean` (None by rank), `median` and `sd` (None by rank, or from one seed) of the differences, and
      `sigmas`, the mean in units of the noise of one run;
    * `low`, `high`: the 95% interval of the mean or median, its error divided by `looks`; an infinite end is
      None. `joint_low`, `joint_high`: the interval that holds for all `comparisons` at once;
    * `p`, `p_joint`: two-sided p-values of no difference, corrected in the same way;
    * `detectable`, `joint_detectable`: the smallest true difference at which such an interval would exclude 0
      in 4 of 5 studies;
    * `alone`, `judged`: the result of `judge` for the first and for the joint interval.
    """
    seeds = sorted(set(arm) & set(reference))
    both = [(arm[s], reference[s]) for s in seeds]
    lost = sum(math.isinf(a) for a, _ in both)
    gained = sum(math.isinf(b) for _, b in both)
    differences = [0.0 if a == b else a - b for a, b in both]  # two diverged runs count as equal
    finite = [a - b for a, b in both if math.isfinite(a) and math.isfinite(b)]
    level = (1 - CONFIDENCE) / looks
    out: dict[str, Any] = {"seeds": len(seeds), "comparisons": comparisons, "looks": looks, "margin": margin}
    out |= {
        "method": "t" if both else None,
        "median": finite_or_none(statistics.median(differences or [math.nan])),
    }
    out |= dict.fromkeys(("mean", "sd", "sigmas"))
    if lost or gained:
        out |= {"method": "rank", "diverged": {"arm": lost, "reference": gained}}
    elif both:
        out["mean"] = mean = statistics.fmean(differences)
        out["sd"] = _spread(tuple(differences)) if len(differences) > 1 else None
        out["sigmas"] = mean / statistics.stdev(replicates) if len(set(replicates)) > 1 else None
    if luck.sd and out["method"] == "t" and not without_spread(differences):
        out["luck"] = asdict(luck)
    for name, prefix, k in (("alone", "", 1), ("judged", "joint_", comparisons)):
        low, high, p = interval_of(out["method"], differences, luck, level / k)
        out |= {f"{prefix}low": finite_or_none(low), f"{prefix}high": finite_or_none(high)}
        out["p_joint" if prefix else "p"] = None if p is None else min(1.0, p * looks * k)
        out[f"{prefix}detectable"] = _detectable(finite, replicates, level / k, luck)
        # an arm that diverged on more seeds than its reference misses, whatever its other seeds did
        out[name] = "misses" if lost > gained else judge(low, high, margin)
    return cast(Difference, out)


def interval_of(
    method: str | None, differences: Sequence[float], luck: Luck, level: float
) -> tuple[float, float, float | None]:
    """Return the ends of an interval with error `level`, and the p-value; NaN, NaN and None if there is
    nothing to test. The differences do not show luck, so luck can only widen the interval."""
    if method is None or (method == "t" and len(differences) < 2):
        return math.nan, math.nan, None
    from scipy import stats

    if method == "rank":
        by_rank = stats.quantile_test(differences, q=0.0, p=0.5)
        return *by_rank.confidence_interval(1 - level), float(by_rank.pvalue)
    mean = statistics.fmean(differences)
    if without_spread(differences):  # the same runs under two names
        return mean, mean, float(mean == 0)
    plain = _one_sample(tuple(differences))
    low, high = plain.confidence_interval(1 - level)
    p = float(plain.pvalue)
    if luck.sd:
        error, freedom = _error(_spread(tuple(differences)), len(differences), luck)
        wide_low, wide_high = stats.t.interval(1 - level, freedom, mean, error)
        low, high = min(float(low), float(wide_low)), max(float(high), float(wide_high))
        p = max(float(2 * stats.t.sf(abs(mean) / error, freedom)), p)
    return low, high, p


@functools.lru_cache(maxsize=1)
def _spread(differences: tuple[float, ...]) -> float:
    """Return the standard deviation of a comparison's differences, which each of its figures rests on."""
    return statistics.stdev(differences)


@functools.lru_cache(maxsize=1)
def _one_sample(differences: tuple[float, ...]) -> Any:
    """Return scipy's test of no mean difference; both intervals of a comparison are read from it."""
    from scipy import stats

    return stats.ttest_1samp(differences, 0.0)


def without_spread(differences: Sequence[float]) -> bool:
    """Return whether the differences have no spread: there are fewer than two, or all are equal but for the
    rounding of their size."""
    size = max(1.0, *map(abs, differences)) if differences else 1.0
    return len(differences) < 2 or max(differences) - min(differences) <= ROUNDING * size < math.inf


def judge(low: float, high: float, margin: float) -> str:
    """Return `beats` if the upper limit is below 0, `meets` if it is at most `margin`, and `misses` if the
    lower limit is above `margin`. Return `undecided` otherwise, also for limits that are NaN."""
    if high <= margin:
        return "beats" if high < 0 else "meets"
    return "misses" if low > margin else "undecided"


def _error(spread: float, seeds: int, luck: Luck) -> tuple[float, float]:
    """Return the standard error of a mean difference, including its luck, and the degrees of freedom."""
    variance, freedom = sum_of_variances((spread**2 / seeds, seeds - 1), (luck.sd**2, luck.freedom))
    return math.sqrt(variance), freedom


def finite_or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _detectable(
    differences: Sequence[float], replicates: Sequence[float], level: float, luck: Luck = NO_LUCK
) -> float | None:
    """Return the smallest detectable difference, estimated from the spread of the differences or, if there
    are fewer than two, from the spread of the replicates. Return None if both have fewer than two values."""
    if len(differences) > 1:
        spread = _spread(tuple(differences))
        errors = (_error(spread, len(differences), x) for x in (luck, NO_LUCK))
        return max(detectable_errors(freedom, level) * error for error, freedom in errors)
    if len(replicates) > 1:
        return detectable_errors(len(replicates) - 1, level) * statistics.stdev(replicates) * math.sqrt(2)
    return None


@functools.cache
def detectable_errors(freedom: float, level: float) -> float:
    """Return the true difference, in standard errors, that a two-sided t-test with error `level` finds with
    probability POWER."""
    from scipy import optimize, special

    critical = special.stdtrit(freedom, 1 - level / 2)
    most = 10 * critical + 10
    # P(t > critical) of the noncentral t is, mirrored, P(t < -critical)
    if math.isnan(special.nctdtr(freedom, -most, -critical)):
        # so far out the noise of the mean is nothing beside that of its standard error
        return float(critical * math.sqrt(special.chdtri(freedom, 1 - POWER) / freedom))
    return float(optimize.brentq(lambda x: special.nctdtr(freedom, -x, -critical) - POWER, 0.0, most))


def seeds_needed(difference: Difference) -> int | None:
    """Return how many fresh seeds would decide an undecided difference from `paired`. This is the smallest
    number above the difference's own at which a joint interval from the fresh seeds alone would, in 4 of 5
    studies, exclude 0 or lie within ± the margin.

    Further differences are assumed to have the same mean and spread. More seeds do not reduce the luck of a
    tuning. Return None if more than MOST_SEEDS are needed, if a run diverged, or with one seed, which shows
    no spread.
    """
    luck = Luck(**difference["luck"]) if "luck" in difference else NO_LUCK
    return _least(difference["seeds"] + 1, MOST_SEEDS, lambda seeds: _decides(difference, seeds, luck))


def tuning_needed(difference: Difference, tuned: int, finals: int) -> TuningNeeded | None:
    """Return how many tuning seeds, in place of `tuned` for each point and `finals` more for each finalist,
    would decide an undecided difference that the luck of the tuning keeps open, and on how many fresh seeds:
    as many as it has or, where these do not do, twice what would decide it without luck.

    The luck is taken to fall as the noise of the means by which a point is chosen, with the root of their
    seeds, because points that are mistaken for one another differ by about that noise. Return None if more
    than MOST_TUNED are needed, or if it is not the luck that keeps the difference open.
    """
    if "luck" not in difference:
        return None
    now = Luck(**difference["luck"])
    alone = _least(2, MOST_SEEDS, lambda seeds: _decides(difference, seeds, NO_LUCK))
    own = difference["seeds"]
    for seeds in (own, max(own, min(2 * alone, MOST_SEEDS))) if alone else ():

        def decides(more: int, seeds: int = seeds) -> bool:
            times = more / tuned
            return _decides(difference, seeds, Luck(now.sd / math.sqrt(times), now.freedom * times))

        if more := _least(tuned + 1, MOST_TUNED, decides):
            return {"tune_seeds": more, "final_seeds": math.ceil(finals * more / tuned), "seeds": seeds}
    return None


def _least(fewest: int, most: int, decides: Callable[[int], bool]) -> int | None:
    """Return the smallest number from `fewest` (2 at least) to `most` that decides; None if none does."""
    fewest = max(2, fewest)
    if fewest > most or not decides(most):
        return None
    return fewest + bisect.bisect_left(range(fewest, most), True, key=decides)


def _decides(difference: Difference, seeds: int, luck: Luck) -> bool:
    """Return whether so many fresh seeds, with this luck of the tuning, would decide a difference in 4 of 5
    studies. False of one without a spread."""
    mean, spread = difference["mean"], difference["sd"]
    if mean is None or spread is None:
        return False
    level, error = (1 - CONFIDENCE) / difference["comparisons"], max(spread, ROUNDING)
    powers = (_power(mean, error, seeds, level, difference["margin"], x) for x in {luck, NO_LUCK})
    return min(powers) >= POWER  # `interval_of` takes the wider of the two


def mostly_luck(difference: Difference) -> bool:
    """Return whether the luck of the tuning, which more seeds do not reduce, exceeds the seeds' own error."""
    of_seeds = (difference["sd"] or 0.0) / math.sqrt(max(1, difference["seeds"]))
    return "luck" in difference and difference["luck"]["sd"] > of_seeds


def _power(mean: float, spread: float, seeds: int, level: float, margin: float, luck: Luck) -> float:
    """Return the `power` of a comparison of `seeds` pairs."""
    error, freedom = _error(spread, seeds, luck)
    return float(power(mean, error, freedom, level, margin))


def power(mean: Any, error: Any, freedom: Any, level: Any, margin: float) -> Any:
    """Return the larger of two probabilities: that a t-interval with error `level` excludes 0, and that the
    interval lies within ± `margin`.

    `mean`: the true difference; `error`: the standard error of its estimate; `freedom`: of this error. These
    and `level` are numbers or numpy arrays of one shape, as is what is returned.
    """
    import numpy as np
    from scipy import special

    critical = special.stdtrit(freedom, 1 - level / 2)

    def above(true: Any) -> Any:  # P(lower limit > 0) for this true mean
        shift = true / error
        chance = 1 - special.nctdtr(freedom, np.clip(shift, -35, 35), critical)
        # far out, scipy has no value of the noncentral t: take that of the normal
        known = (abs(shift) < 35) & np.isfinite(chance)
        return np.where(known, chance, special.ndtr(shift - critical))

    apart = above(mean) + above(-mean)
    level_ = above(mean + margin) + above(margin - mean) - 1
    return np.maximum(apart, level_)


def by_interval(difference: Difference, joint: bool) -> Difference:
    """Return the difference with `low`, `high`, `detectable` and `judged` of its joint or own interval."""
    if not joint:
        return {**difference, "judged": difference["alone"]}
    low, high, detectable = difference["joint_low"], difference["joint_high"], difference["joint_detectable"]
    return {**difference, "low": low, "high": high, "detectable": detectable}


def centre_of(figures: Mapping[str, Any]) -> float | None:
    """Return the mean of a difference, or of an arm; its median if a run diverged; None if it has neither."""
    mean: float | None = figures.get("mean")
    return figures.get("median") if mean is None else mean


def show_interval(low: float | None, high: float | None) -> str:
    """Return an interval, written as `[-0.0200, +0.0040]`; None stands for an infinite end."""
    return f"[{'−∞' if low is None else f'{low:+.4f}'}, {'∞' if high is None else f'{high:+.4f}'}]"


def show_difference(d: Difference, *, joint: bool = False) -> str:
    """Return a one-line description of a difference: the estimate, its interval, the number of seeds, and the
    smallest difference detectable with that number of seeds."""
    d = by_interval(d, joint)
    together = joint and d["comparisons"] > 1
    shown = "too few seeds to detect any difference"
    if d["detectable"] is not None:
        shown = f"smallest detectable {d['detectable']:.4f}"
        shown += f" for all {d['comparisons']} together" if together else ""
    if d["method"] is None:
        return f"no pair of finished runs; {shown}"
    value, words = centre_of(d), ""
    if d["method"] == "rank":
        lost = d["diverged"]
        words = f"diverged: {lost['arm']} of the arm's, {lost['reference']} of the reference's runs; "
        words += "median difference "
    words += "unbounded" if value is None else f"{value:+.4f} nats"
    if d["low"] is None and d["high"] is None:
        words += " from one seed: no interval" if d["seeds"] == 1 else ": no finite interval"
    else:
        words += f" {show_interval(d['low'], d['high'])}"
        words += f" for all {d['comparisons']} comparisons together" if together else ""
        words += ", luck of the tuning included" if "luck" in d else ""
    return f"{words}, {count(d['seeds'], 'seed')}; {shown}"


def show_mean(d: Difference) -> str:
    """Return the estimate without its interval, such as `+0.0123 nats`. If runs diverged, return how many; if
    there is no estimate, return `not known`."""
    if d["mean"] is not None:
        return f"{d['mean']:+.4f} nats"
    if d["method"] == "rank":
        return f"{d['diverged']['arm']} of {d['seeds']} runs diverged"
    return "not known"


def below(losses: Sequence[float], target: float, sigma: float = 0.0, divided: int = 1) -> float | None:
    """Return the one-sided p of a mean this far below `target`, by a z-test if the runs' standard deviation
    `sigma` is known (> 0), and otherwise by a t-test. Return None if the t-test lacks two losses that differ,
    since runs that agree in every digit are one run. `divided`: the number that divides the error."""
    from scipy import stats

    if sigma > 0 and losses:
        z = (statistics.fmean(losses) - target) * math.sqrt(len(losses)) / sigma
        return min(1.0, float(stats.norm.cdf(z)) * divided)
    if len(losses) < 2 or max(losses) - min(losses) <= ROUNDING:
        return None
    return min(1.0, float(stats.ttest_1samp(losses, target, alternative="less").pvalue) * divided)


def noise(losses: Sequence[float]) -> NoiseFloor:
    """Return the noise floor in nats from the losses of replicate seeds: `sigma`, its 95% interval, and
    `detectable`, the smallest true difference that two runs of one seed each would show 4 times in 5. All are
    None with fewer than two losses."""
    seeds = len(losses)
    if len(set(losses)) < 2:  # without noise, or without a figure for it
        none = 0.0 if seeds > 1 else None
        return {"sigma": none, "low": none, "high": none, "detectable": none, "seeds": seeds}
    sigma = statistics.stdev(losses)
    low, high = deviation_interval(sigma, seeds - 1)
    detectable = _detectable((), losses, 1 - CONFIDENCE)
    return {"sigma": sigma, "low": low, "high": high, "detectable": detectable, "seeds": seeds}


def window(losses: Mapping[float, float], within: float = WINDOW_NATS) -> Window | None:
    """Return the range of a setting around its best value in which the loss is within `within` nats of the
    best. (Wortsman et al., arXiv:2309.14322, average the excess loss over a fixed range instead.)

    `losses`: nats by the setting's value (> 0), infinite if a run diverged. Between two values, the loss is
    taken to be linear in the logarithm of the setting. Next to an infinite loss, the window ends at the last
    value with a finite one. A window that is open at an end of the tried values may really be wider. Return
    None if no loss is finite.
    """
    values = sorted(losses)
    best = min(values, key=lambda x: (losses[x], x), default=None)
    if best is None or math.isinf(losses[best]):
        return None
    limit = losses[best] + within
    low, open_low = _crossing([x for x in values[::-1] if x <= best], losses, limit)
    high, open_high = _crossing([x for x in values if x >= best], losses, limit)
    return {
        "best": best,
        "loss": losses[best],
        "low": low,
        "high": high,
        "octaves": math.log2(high / low),
        "open_low": open_low,
        "open_high": open_high,
    }


def in_octaves(span: Window | None) -> str:
    """Return a window's width: `2.0 octaves`, `≥ 2.0 octaves` if an end is open, or `none` without one."""
    if span is None:
        return "none"
    at_least = "≥ " if span["open_low"] or span["open_high"] else ""
    return f"{at_least}{span['octaves']:.1f} octaves"


def open_ends(span: Window) -> str:
    """Return the ends at which a window is open: `low`, `high`, `low and the high`, or an empty string."""
    return " and the ".join(["low"] * span["open_low"] + ["high"] * span["open_high"])


def _crossing(values: Sequence[float], losses: Mapping[float, float], limit: float) -> tuple[float, bool]:
    """Return the value at which the loss first exceeds `limit`, interpolated between neighbours, and False;
    if the next loss is infinite, the last value before it. If none exceeds it, return the last value and
    True."""
    for inside, outside in itertools.pairwise(values):
        if losses[outside] <= limit:
            continue
        if math.isinf(losses[outside]):
            return inside, False
        share = (limit - losses[inside]) / (losses[outside] - losses[inside])
        return inside * (outside / inside) ** share, False
    return values[-1], True

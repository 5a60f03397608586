"""How soon runs reach a target, and what a step is worth.

A curve is known only at its evaluations. Where a run is first seen at or below the target, it crossed at some
step after the evaluation before and not after this one. Nothing is interpolated: a run's steps are those of
that evaluation, and intervals of ratios are widened by what the evaluations leave open.

A run that never reaches the target is censored. It ranks behind every run that does, is counted, and is never
dropped. This is fair where all runs were long enough; where a censored run ended before others reached the
target, it may be that it would have reached it first, and `Reached.ended_early` counts such runs.

Three figures compare arms of unequal length:

* the ratio of steps to the target (`ratios_of_steps`);
* the exchange rate, the change of the last loss with each step by which a run is made longer
  (`exchange_rates`), which needs runs of several lengths, each with a schedule of its own;
* the ratio of the lengths at which two arms end at the same loss (`ratio_of_lengths`).

The slope at the end of a curve is not an exchange rate. Under a schedule that decays, a
run's last steps lower its loss for two reasons, the training and the decay, and a longer run would decay
later.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import pandas as pd

from ebc_lab.config.errors import UserError
from ebc_lab.study.stages import statistics
from ebc_lab.study.stages.statistics import centre_of, finite_or_none

from .differences import Comparison, compare, median_interval
from .runs import Curves

GRID = 1025  # lengths at which `ratio_of_lengths` compares two arms
SIMILAR = 1.5  # two arms are evaluated equally often if what is left open differs by less than this factor


class Reached(TypedDict):
    """When the runs of an arm reach the target."""

    runs: int
    reached: int
    censored: int  # never at or below the target
    ended_early: int  # censored, and ended before the last of all runs that reached it did
    returned: int  # reached it, and were above it again at a later evaluation
    first: float | None  # the fewest steps of a run; None if none reached it
    last: float | None  # the most; None if a run is censored
    mean: float | None  # None if a run is censored
    median: float | None  # censored runs rank last; None if the median run is censored
    low: float | None  # an interval of the median from order statistics; None: there is no such end
    high: float | None
    confidence: float | None  # that the interval has: at least 95%, or what the whole range of the runs has
    between: float | None  # mean number of steps from the evaluation before the crossing to the next


class Ratio(TypedDict):
    """Steps of an arm over those of its reference: below 1 where the arm needs fewer."""

    arm: str
    reference: str
    ratio: float | None
    low: float | None  # None: infinite or not known; where both are, the verdict says whether it is
    high: float | None
    verdict: str  # fewer, more, undecided
    coarse: bool  # whether the evaluations, and not the runs, set an end of the interval


class Exchange(TypedDict):
    """What a step is worth to an arm: the slope of a straight line through its last losses against length."""

    lengths: list[float]  # at which it was trained
    runs: int
    per_step: float | None  # loss lost for each step; positive where longer runs end lower
    low: float | None  # 95%, from the scatter of the runs about the line
    high: float | None
    bends: float | None  # p of the line: small where the loss bends over the lengths; None: not known


def steps_to_target(
    curves: pd.DataFrame, table: pd.DataFrame, target: float, better: str = "lower"
) -> pd.DataFrame:
    """Return, for each run of `table`, when its curve is first at or below `target` (at or above it where
    `better` is `higher`).

    `curves`: columns run, step and loss, sorted by run and step. The columns of what is returned: `step`, the
    first evaluation at which the target is reached (NaN: never); `before`, the evaluation before it (NaN if
    there is none); `end`, the last step (NaN without a curve); `returned`, whether a later evaluation is on
    the wrong side again.
    """
    by_run = Curves.of(curves)
    step, loss = by_run.step, by_run.loss
    hit = loss <= target if better == "lower" else (loss >= target) & (loss < np.inf)  # inf: not a number
    nothing = {"step": np.nan, "before": np.nan, "end": np.nan, "returned": False}
    out = pd.DataFrame(nothing, index=table.index)
    names, starts, ends = by_run.run, by_run.start, by_run.end - 1
    at = np.flatnonzero(hit)
    first = np.r_[at, len(step)][np.searchsorted(at, starts)]
    reached = first <= ends
    missed = np.r_[0, np.cumsum(~hit)]  # evaluations on the wrong side, before each row
    where = first[reached]
    out.loc[names, "end"] = step[ends]
    out.loc[names[reached], "step"] = step[where]
    out.loc[names[reached], "returned"] = missed[ends[reached] + 1] > missed[where]
    earlier = where > starts[reached]
    out.loc[names[reached][earlier], "before"] = step[where[earlier] - 1]
    return out


def reached_by_arm(reached: pd.DataFrame, table: pd.DataFrame) -> dict[str, Reached]:
    """Return a summary for each arm of what `steps_to_target` returned, in the order of the table."""
    latest = reached["step"].max()  # NaN where no run reached the target
    out: dict[str, Reached] = {}
    for arm, rows in reached.groupby(table["arm"], sort=False):
        steps = np.sort(rows["step"].fillna(np.inf).to_numpy(dtype=float))
        none = rows["step"].isna()
        width = (rows["step"] - rows["before"].fillna(0.0)).mean()
        low, high, confidence = median_interval(steps.tolist())
        out[str(arm)] = {
            "runs": len(rows),
            "reached": int((~none).sum()),
            "censored": int(none.sum()),
            "ended_early": int((none & ~(rows["end"] >= latest)).sum()) if latest == latest else 0,
            "returned": int(rows["returned"].sum()),
            "first": finite_or_none(steps[0]),
            "last": finite_or_none(steps[-1]),
            "mean": finite_or_none(steps.mean()),
            # between a run that reached the target and one that did not, there is no number
            "median": finite_or_none((steps[(len(steps) - 1) // 2] + steps[len(steps) // 2]) / 2),
            "low": low,
            "high": high,
            "confidence": confidence,
            "between": finite_or_none(width),
        }
    return out


def ratios_of_steps(
    reached: pd.DataFrame,
    table: pd.DataFrame,
    reference: str,
    *,
    pairs: bool = False,
    chain: Sequence[str] = (),
    paired: bool = False,
) -> list[Ratio]:
    """Return the ratios of the arms' steps to the target to those of the reference (with `pairs`, of
    all pairs; with `chain`, to those of the arm before), each with an interval that holds for all at once.

    The comparisons are those of `differences.compare` on the logarithm of the steps: a ratio of geometric
    means where all runs of both arms reached the target, and by rank otherwise. `paired`: whether seeds pair
    the runs of two arms. The interval is for the steps at which the runs crossed, which lie up to one
    evaluation earlier than the steps that are known. An interval never is narrower than the ratios that this
    leaves open. Where one arm was evaluated more often than the other near the target, its steps are biased
    less, and what is left open is added to both ends.
    """
    logs: dict[str, list[float]] = {}
    left_open: dict[str, list[float]] = {}
    for arm, rows in reached.groupby(table["arm"], sort=False):
        if (rows["step"] <= 0).any():
            raise UserError(
                f"{arm}: a run is at the target at step 0, before any training: choose another --target, or "
                "add 1 to steps that are counted from 0"
            )
        logs[str(arm)] = [math.log(step) if step > 0 else math.inf for step in rows["step"]]  # NaN: never
        known = rows[rows["step"].notna()]
        left_open[str(arm)] = [
            math.log(step / before) if before > 0 else math.inf
            for step, before in zip(known["step"], known["before"], strict=True)
        ]
    tied = {arm for arm, values in logs.items() if len({*values}) == 1 < len(values) == len(left_open[arm])}
    for arm in tied:
        logs[arm] = _spread_within(logs[arm], left_open[arm])
    seeds = {str(arm): rows for arm, rows in table["seed"].groupby(table["arm"], sort=False)}
    paired = paired and not tied  # a made spread belongs to no seed
    paired = paired and all(rows.notna().all() and rows.is_unique for rows in seeds.values())
    arms = {
        # where nothing is paired, no two arms have a name of a run in common
        arm: {
            str(seed) if paired else f"{arm}/{i}": x
            for i, (seed, x) in enumerate(zip(seeds[arm], values, strict=True))
        }
        for arm, values in logs.items()
    }
    found = compare(arms, reference, pairs=pairs, chain=chain, paired=paired)
    return [_ratio(one, arms, left_open, tied) for one in found]


def _spread_within(logs: list[float], left_open: list[float]) -> list[float]:
    """Return the logarithms of the steps of runs that all crossed between the same two evaluations, with the
    mean that they have and the spread that they may have: that of a uniform distribution between these."""
    if not math.isfinite(max(left_open)):
        return logs
    even = np.linspace(-1.0, 1.0, len(logs))
    return [float(x) for x in logs[0] + max(left_open) / math.sqrt(12) * even / even.std(ddof=1)]


def _ratio(
    found: Comparison,
    arms: Mapping[str, Mapping[str, float]],
    left_open: Mapping[str, list[float]],
    tied: Collection[str],
) -> Ratio:
    """Return a comparison of logarithms of steps as a ratio, its interval widened for the evaluations.

    `tied`: arms whose runs all crossed between the same two evaluations.
    """
    arm, reference = found["arm"], found["reference"]
    by_rank = math.inf in (*arms[arm].values(), *arms[reference].values())
    below, above = (_left_open(left_open[name], by_rank) for name in (arm, reference))
    centre = centre_of(found)
    low, high = found["joint_low"], found["joint_high"]
    if low is None:  # an infinity, of the sign that the verdict has
        low = math.inf if found["verdict"] == "worse" else -math.inf
    if high is None:
        high = -math.inf if found["verdict"] == "better" else math.inf
    even = not {arm, reference} & {*tied} and max(below, above) < SIMILAR * min(below, above)
    lowest, highest = (low if math.isinf(low) else low - below), (high if math.isinf(high) else high + above)
    if even and centre is not None and (low, high) != (-math.inf, math.inf):
        lowest, highest = min(low, centre - below), max(high, centre + above)
    return {
        "arm": arm,
        "reference": reference,
        "ratio": None if centre is None else math.exp(centre),
        "low": math.exp(lowest) if math.isfinite(lowest) else None,
        "high": math.exp(highest) if math.isfinite(highest) else None,
        "verdict": _verdict(lowest, highest, 0.0),
        "coarse": bool(lowest < low or highest > high),
    }


def _left_open(logs: list[float], by_rank: bool) -> float:
    """Return by how much the logarithms of an arm's steps may be too high: their mean, or for a comparison by
    rank, which has an interval between two runs, the most."""
    if not logs:
        return 0.0
    return max(logs) if by_rank else sum(logs) / len(logs)


def _verdict(low: float | None, high: float | None, level: float) -> str:
    """Return on which side of `level`, at which two arms need equal steps, an interval lies."""
    if high is not None and high < level:
        return "fewer"
    return "more" if low is not None and low > level else "undecided"


def _last_losses(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the runs that were trained to the end and did not diverge, their length as `steps`.

    Runs that an arm was to train for equally long (`planned`; where that is unknown, `length`) form a group.
    The longest of a group shows where its arm stops, and those that stopped earlier are not finished.
    """
    planned = table["planned"].fillna(table["length"])
    steps = table["length"].fillna(table["planned"])
    longest = steps.groupby([table["arm"], planned]).transform("max")
    finished: pd.DataFrame = table.assign(steps=steps)[(steps == longest) & np.isfinite(table["outcome"])]
    return finished


def exchange_rates(table: pd.DataFrame) -> dict[str, Exchange]:
    """Return what a step is worth to each arm that has runs of two lengths or more, in the table's order.

    The line is straight in the number of steps. Over a wide range of them the loss bends, which `bends` tests
    where three lengths or more have several runs. `outcome` is taken as a loss. An arm whose runs all have
    one length is left out.
    """
    from scipy import stats

    out: dict[str, Exchange] = {}
    for arm, used in _last_losses(table).groupby("arm", sort=False):
        lengths = sorted(float(x) for x in used["steps"].unique())
        if len(lengths) < 2:
            continue
        line = stats.linregress(used["steps"], used["outcome"])
        half = math.nan
        if len(used) > 2:
            half = float(stats.t.ppf((1 + statistics.CONFIDENCE) / 2, len(used) - 2)) * line.stderr
        out[str(arm)] = {
            "lengths": lengths,
            "runs": len(used),
            "per_step": float(-line.slope),
            "low": finite_or_none(-line.slope - half),
            "high": finite_or_none(-line.slope + half),
            "bends": _lack_of_fit(used, line),
        }
    return out


def _lack_of_fit(used: pd.DataFrame, line: Any) -> float | None:
    """Return the p-value of no more than scatter about a line: the F-test of the lengths' means against the
    spread within lengths. None from fewer than three lengths, or without a second run of any."""
    from scipy import stats

    within = used["outcome"] - used.groupby("steps")["outcome"].transform("mean")
    lengths = used["steps"].nunique()
    pure, freedom = float((within**2).sum()), len(used) - lengths
    if lengths < 3 or freedom < 1 or not pure > 0:
        return None
    rest = used["outcome"] - line.intercept - line.slope * used["steps"]
    lack = max(float((rest**2).sum()) - pure, 0.0)
    return float(stats.f.sf(lack / (lengths - 2) / (pure / freedom), lengths - 2, freedom))


def ratio_of_lengths(table: pd.DataFrame, arm: str, reference: str, comparisons: int = 1) -> Ratio | None:
    """Return the ratio of the lengths at which `arm` and `reference` end at the same loss, or None where the
    runs do not have it: the arm needs runs of two lengths, and the loss of the reference's longest runs must
    lie between its own losses. Nothing is extrapolated.

    Between two lengths, the mean loss is taken to be a straight line. The interval holds the lengths at which
    the arm's line is not, at a level of 5% / `comparisons`, apart from the loss of the reference (Fieller
    1954); an end outside the trained lengths is None. Lengths with one run borrow the spread of the others.
    """
    from scipy import stats

    rows = _last_losses(table[table["arm"].isin([arm, reference])])
    cells = rows.groupby(["arm", "steps"])["outcome"].agg(["mean", "var", "count"])
    if not {arm, reference} <= set(cells.index.get_level_values("arm")) or len(cells.loc[arm]) < 2:
        return None
    freedom = (cells["count"] - 1).sum()
    pooled = (cells["var"].fillna(0.0) * (cells["count"] - 1)).sum() / freedom if freedom else math.nan
    alone = cells["count"] == 1
    cells["variance"] = cells["var"].where(~alone, pooled) / cells["count"]
    cells["freedom"] = (cells["count"] - 1.0).where(~alone, float(freedom))
    own, other = cells.loc[arm], cells.loc[reference].iloc[-1]
    longest, lengths = float(cells.loc[reference].index[-1]), own.index.to_numpy(dtype=float)

    at = np.unique(np.r_[lengths, np.linspace(lengths[0], lengths[-1], GRID)])
    right = np.clip(np.searchsorted(lengths, at), 1, len(lengths) - 1)
    share = (at - lengths[right - 1]) / (lengths[right] - lengths[right - 1])
    above = np.interp(at, lengths, own["mean"]) - other["mean"]
    parts = [
        (weight**2 * own["variance"].to_numpy()[cell], own["freedom"].to_numpy()[cell])
        for weight, cell in ((1 - share, right - 1), (share, right))
    ]
    parts.append((np.full(len(at), other["variance"]), np.full(len(at), other["freedom"])))
    variance = sum(v for v, _ in parts)
    crossed = np.flatnonzero((above[:-1] > 0) & (above[1:] <= 0))
    if not len(crossed):
        return None
    i = crossed[0]
    centre = at[i] + (at[i + 1] - at[i]) * above[i] / (above[i] - above[i + 1])
    low = high = None
    if variance.max() > 0:  # false also for NaN: no length has two runs
        free = variance**2 / sum(v**2 / f for v, f in parts)
        critical = stats.t.ppf(1 - (1 - statistics.CONFIDENCE) / comparisons / 2, free)
        level = np.flatnonzero(np.abs(above) <= critical * np.sqrt(variance))
        level = np.r_[level, i, i + 1]
        low = float(at[level.min()]) / longest if level.min() > 0 else None
        high = float(at[level.max()]) / longest if level.max() < len(at) - 1 else None
    return {
        "arm": arm,
        "reference": reference,
        "ratio": float(centre) / longest,
        "low": low,
        "high": high,
        "verdict": _verdict(low, high, 1.0),
        "coarse": False,
    }


def at_equal_steps(
    arms: Mapping[str, Mapping[str, float]], steps: Mapping[str, float], exchange: float
) -> dict[str, dict[str, float]]:
    """Return losses as if each arm had been trained for as many steps as the shortest: each further step that
    an arm took is charged to it, at `exchange` of loss. They are as good as that rate is."""
    fewest = min(steps[arm] for arm in arms)
    return {
        arm: {name: loss + exchange * (steps[arm] - fewest) for name, loss in losses.items()}
        for arm, losses in arms.items()
    }

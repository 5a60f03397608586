"""Rules of other benchmarks, applied to the same runs beside our own statistics.

`track3` is the rule of modded-nanogpt's optimization benchmark (records/track_3_optimization/README.md in
KellerJordan/modded-nanogpt, as of 1 August 2026). It takes the standard deviation of a run's loss, 0.0013, as
known and equal for every arm:

* A result counts at a step if the mean loss of its n runs there is at most 3.28 − 0.004/√n, which is a
  one-sided z-test at p < 0.001. The first such step may be chosen after the runs were seen, if it is the same
  for all runs of the arm.
* One result is better than another if (Δ + worth of the steps) / √(1/n₁ + 1/n₂) is at least 0.004, where Δ is
  how much lower its mean is, and 100 steps fewer are worth 0.0045.

The rule's p-values are for one comparison and one step. Neither that many steps were looked at nor that many
results are compared changes them.
"""

from __future__ import annotations

import itertools
import math
import statistics as plain
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import pandas as pd

from ebc_lab.config.errors import UserError
from ebc_lab.study.stages import statistics

TARGET = 3.28  # nats
SIGMA = 0.0013  # nats, of one run: assumed by the rule
NEEDED = 0.004  # nats: 3.09 × SIGMA, as the rule rounds it
EXCHANGE = 0.0045 / 100  # nats for each step


class Standing(TypedDict):
    """A result as track3 reports it: at the first step that all runs of the arm have and at which the rule
    holds, or at the last such step if it never holds."""

    arm: str
    runs: int
    step: float | None  # None where the runs have no step in common
    mean: float | None  # of the losses at that step; None if a run diverged
    excess: float | None  # (TARGET − mean)·√n, which the rule wants to be at least NEEDED
    p: float | None  # one-sided, by SIGMA
    holds: bool
    sd: float | None  # of the runs' losses at that step; None from one run
    sd_low: float | None  # its 95% interval, from chi-square
    sd_high: float | None
    p_own: float | None  # one-sided, by the runs' own spread (t)
    losses: list[float | None]  # one a run


class Claim(TypedDict):
    """Whether one result is better than another, by the rule of track3."""

    arm: str
    other: str
    lower_by: float  # mean of the other minus mean of the arm
    worth: float  # of the steps that the arm saved, in nats; negative if it took more
    statistic: float  # which the rule wants to be at least NEEDED
    p: float  # one-sided, by SIGMA
    holds: bool


class Spread(TypedDict):
    """The runs' own spread beside the rule's SIGMA."""

    pooled: float | None  # standard deviation of a run, in nats, over all arms with several runs
    freedom: int
    low: float | None  # its 95% interval
    high: float | None
    p_equal: float | None  # that all arms have one spread (Brown & Forsythe 1974)


def counts(mean: Any, runs: int) -> Any:
    """Return whether track3 accepts a result of this mean loss, or of each of several, over `runs` runs."""
    return (TARGET - mean) * math.sqrt(runs) >= NEEDED - statistics.ROUNDING


def claim(
    arm: tuple[str, float, int, float], other: tuple[str, float, int, float], exchange: float = EXCHANGE
) -> Claim:
    """Return track3's comparison of two results, each given as name, mean loss, number of runs and step."""
    from scipy import stats

    (name, mean, runs, step), (other_name, other_mean, other_runs, other_step) = arm, other
    lower_by, worth = other_mean - mean, (other_step - step) * exchange
    statistic = (lower_by + worth) / math.sqrt(1 / runs + 1 / other_runs)
    return {
        "arm": name,
        "other": other_name,
        "lower_by": lower_by,
        "worth": worth,
        "statistic": statistic,
        "p": float(stats.norm.sf(statistic / SIGMA)),
        "holds": statistic >= NEEDED - statistics.ROUNDING,
    }


def standings(curves: pd.DataFrame, table: pd.DataFrame, at: Mapping[str, float] = {}) -> list[Standing]:
    """Return each arm's result by track3's rule, in the order of the table.

    `curves`: columns run, step and loss (nats). `at`: arm -> the step at which it is reported, in place of
    the first at which the rule holds; "" stands for every other arm. Raise UserError where a run lacks that
    step.
    """
    codes, arms = table["arm"].factorize()
    of_arm = codes[table.index.get_indexer(pd.Index(curves["run"]))]
    out = []
    for code, arm in enumerate(map(str, arms)):
        n = int((codes == code).sum())
        known = curves.loc[of_arm == code, ["step", "loss"]]
        found = known.groupby("step")["loss"].agg(["mean", "size"])
        means = found.loc[found["size"] == n, "mean"]
        step = at.get(arm, at.get(""))
        if step is not None and step not in means.index:
            raise UserError(f"{arm}: not all of its {n} runs have a loss at step {step:g}: name another step")
        if step is None and len(means):
            holds = np.flatnonzero(counts(means, n))
            step = float(means.index[holds[0] if len(holds) else -1])
        out.append(_standing(arm, n, step, known.loc[known["step"] == step, "loss"].tolist()))
    return out


def _standing(arm: str, runs: int, step: float | None, losses: Sequence[float]) -> Standing:
    """Return an arm's result from the losses of its runs at one step."""
    from scipy import stats

    finite = bool(losses) and all(map(math.isfinite, losses))
    mean = plain.fmean(losses) if finite else None
    own = statistics.noise(losses if finite else [])
    excess = None if mean is None else (TARGET - mean) * math.sqrt(runs)
    return {
        "arm": arm,
        "runs": runs,
        "step": step,
        "mean": mean,
        "excess": excess,
        "p": None if excess is None else float(stats.norm.sf(excess / SIGMA)),
        "holds": mean is not None and counts(mean, runs),
        "sd": own["sigma"],
        "sd_low": own["low"],
        "sd_high": own["high"],
        "p_own": statistics.below(losses, TARGET) if finite else None,
        "losses": [x if math.isfinite(x) else None for x in losses],
    }


def claims(results: Sequence[Standing], exchange: float | None = None) -> list[Claim]:
    """Return track3's comparison of each result with the one before it, in the order given. Results without a
    mean are passed over. `exchange`: nats a step; that of track3 if None."""
    known = [
        (x["arm"], x["mean"], x["runs"], x["step"])
        for x in results
        if x["mean"] is not None and x["step"] is not None
    ]
    worth = EXCHANGE if exchange is None else exchange
    return [claim(after, before, worth) for before, after in itertools.pairwise(known)]


def spread(results: Sequence[Standing]) -> Spread:
    """Return how the spread of the arms' runs, at the steps of their results, compares with SIGMA."""
    from scipy import stats

    several = [x for x in results if x["sd"] is not None]
    out: Spread = {"pooled": None, "freedom": 0, "low": None, "high": None, "p_equal": None}
    if several:
        pooled, freedom = statistics.pooled_deviation([(x["sd"] or 0.0, x["runs"] - 1) for x in several])
        low, high = statistics.deviation_interval(pooled, freedom)
        out |= {"pooled": pooled, "freedom": freedom, "low": low, "high": high}
    if len(several) > 1 and any(x["sd"] for x in several):
        out["p_equal"] = float(stats.levene(*(x["losses"] for x in several), center="median").pvalue)
    return out

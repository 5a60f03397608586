"""Rules of other benchmarks: track3's published figures come out of the functions that apply its rule."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ebc_lab.config.errors import UserError
from ebc_lab.judging import rules

# modded-nanogpt, records/track_3_optimization/README.md: mean, runs and step of results, as published
NORMUONH = ("#8", 3.2778, 10, 3250)
SKYLIGHT = ("#9", 3.2771, 8, 3250)
CONTRA_MUON = ("#11", 3.2785, 16, 3225)
MULOCO = ("#13", 3.2785, 10, 3210)
SOAPISH = ("#14", 3.2776, 4, 3150)
TRUSTLIGHT = ("#16", 3.2784, 8, 3125)


@pytest.mark.parametrize(
    ("arm", "other", "published"),
    [
        (CONTRA_MUON, SKYLIGHT, 0.69),
        (MULOCO, CONTRA_MUON, 0.099),
        (MULOCO, NORMUONH, 0.029),
        (TRUSTLIGHT, SOAPISH, 0.34),
        # published as 0.168: from the means before rounding, as its own README has the first of them
        (("#34", 3.27812750, 8, 2925), ("#30", 3.27844375, 16, 2930), 0.168),
    ],
)
def test_published_p_values_come_out(arm, other, published):
    found = rules.claim(arm, other)
    digits = len(str(published)) - 2
    assert round(found["p"], digits) == published
    assert not found["holds"]


def test_a_claim_that_the_benchmark_calls_resolved():
    """Its README: 0.00648 for #12 against #6, with -0.0002 in loss and 50 steps fewer."""
    found = rules.claim(("#12", 3.2790, 20, 3325), ("#6", 3.2788, 20, 3375))
    assert found["holds"]
    assert found["statistic"] == pytest.approx(0.00648, abs=1e-5)


def test_a_mean_on_the_limit_counts():
    assert rules.counts(3.276, 1)
    assert rules.counts(3.278, 4)
    assert not rules.counts(3.2761, 1)
    assert not rules.counts(3.2781, 4)


def runs_of(arms: dict[str, list[dict[float, float]]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Curves and table of arms, each given as the curves of its runs: step -> loss."""
    table = pd.DataFrame({"arm": [arm for arm, runs in arms.items() for _ in runs]})
    curves = [c for runs in arms.values() for c in runs]
    rows = [(i, step, loss) for i, curve in enumerate(curves) for step, loss in curve.items()]
    return pd.DataFrame(rows, columns=["run", "step", "loss"]), table


def test_a_result_stands_at_the_first_common_step_at_which_it_holds():
    """Step 90 holds for the mean of the runs that have it, but the second run does not have it."""
    one, two = {90: 3.2, 100: 3.279, 125: 3.2775, 150: 3.27}, {100: 3.279, 125: 3.2785, 150: 3.27}
    never = {100: 3.3, 150: 3.29}
    found = rules.standings(*runs_of({"a": [one, two, one, two], "b": [never, never]}))
    assert [(x["arm"], x["step"], x["holds"]) for x in found] == [("a", 125, True), ("b", 150, False)]
    assert found[0]["mean"] == pytest.approx(3.278)
    assert found[0]["excess"] == pytest.approx(0.004)
    assert found[0]["p"] == pytest.approx(0.00105, abs=1e-5)  # of z = 0.004 / 0.0013


def test_the_step_of_an_arm_can_be_named():
    curves, table = runs_of({"a": [{1: 3.27, 2: 3.26}] * 2, "b": [{1: 3.27, 2: 3.26}] * 2})
    assert [x["step"] for x in rules.standings(curves, table, {"a": 2})] == [2, 1]
    assert [x["step"] for x in rules.standings(curves, table, {"": 2, "a": 1})] == [1, 2]
    with pytest.raises(UserError, match="b: not all of its 2 runs have a loss at step 3"):
        rules.standings(curves, table, {"b": 3})


def test_a_diverged_run_has_no_standing():
    """A rule about a mean cannot count a run that has no loss; leaving the run out would be a choice."""
    found = rules.standings(*runs_of({"a": [{1: 3.2}, {1: 3.2}, {1: math.inf}], "b": [{1: 3.2}, {2: 3.2}]}))
    assert [(x["mean"], x["holds"], x["p"]) for x in found] == [(None, False, None)] * 2
    assert found[0]["losses"] == [3.2, 3.2, None]
    assert found[1]["step"] is None  # its runs share no step
    assert rules.claims(found) == []


def test_the_spread_beside_the_assumed_one():
    rng = np.random.default_rng(1)
    sds = {"as assumed": rules.SIGMA, "twice": 2 * rules.SIGMA, "a quarter": rules.SIGMA / 4}
    arms = {arm: [{1: loss} for loss in rng.normal(3.27, sd, 40)] for arm, sd in sds.items()}
    arms["two far apart"] = [{1: 3.27}, {1: 3.273}]  # two runs say little about their spread
    found = rules.spread(rules.standings(*runs_of(arms)))
    losses = [[curve[1] for curve in runs] for runs in arms.values()]
    assert found["p_equal"] == stats.levene(*losses, center="median").pvalue
    squares = sum(np.var(x) * len(x) for x in losses)
    assert found["pooled"] == pytest.approx(np.sqrt(squares / found["freedom"]))
    assert found["low"] < found["pooled"] < found["high"]


def test_successive_results_are_compared_in_the_order_given():
    found = rules.standings(*runs_of({"a": [{100: 3.27}] * 2, "b": [{90: 3.27}] * 8}))
    (claim,) = rules.claims(found)
    assert (claim["arm"], claim["other"]) == ("b", "a")
    assert claim["worth"] == pytest.approx(10 * 0.0045 / 100)
    (dearer,) = rules.claims(found, exchange=0.001)
    assert dearer["worth"] == pytest.approx(0.01)

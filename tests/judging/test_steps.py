"""Steps to a target and what a step is worth, against plain loops, scipy, and runs whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ebc_lab.config.errors import UserError
from ebc_lab.judging import steps


def curves_of(runs: list[dict[float, float]]) -> pd.DataFrame:
    rows = [(i, float(step), loss) for i, curve in enumerate(runs) for step, loss in curve.items()]
    return pd.DataFrame(rows, columns=["run", "step", "loss"])


def table_of(arms: dict[str, int], **columns) -> pd.DataFrame:
    """A table with so many runs of each arm, named by a number within the arm."""
    rows = [(arm, str(i), str(i)) for arm, n in arms.items() for i in range(n)]
    return pd.DataFrame(rows, columns=["arm", "run", "seed"]).assign(**columns)


def crossing_at(step: float, cadence: float = 10, end: float = 1000) -> dict[float, float]:
    """A curve that is evaluated every `cadence` steps and is below 1 from `step` on."""
    return {x: 0.5 if x >= step else 2.0 for x in np.arange(0, end + 1, cadence)}


def test_steps_of_every_kind_of_curve():
    runs = [
        {0: 9, 10: 3, 20: 1, 30: 0.5},  # on the target counts
        {0: 9, 10: 0.5, 20: 3, 30: 0.5},  # back above it for one evaluation
        {0: 9, 10: 3, 25: 2},  # never
        {5: 0.1, 10: math.inf},  # at once, and diverges
        {0: math.inf},
    ]
    found = steps.steps_to_target(curves_of(runs), table_of({"a": 6}), 1.0)  # the sixth has no curve
    assert found["step"].tolist()[:2] == [20, 10]
    assert found["step"][3] == 5
    assert found["step"].isna().tolist() == [False, False, True, False, True, True]
    assert found["before"].tolist()[:2] == [10, 0]
    assert math.isnan(found["before"][3])
    assert found["end"].tolist()[:5] == [30, 30, 25, 10, 0]
    assert math.isnan(found["end"][5])
    assert found["returned"].tolist() == [False, True, False, True, False, False]


@pytest.mark.parametrize("better", ["lower", "higher"])
def test_steps_agree_with_a_plain_loop(better):
    rng = np.random.default_rng(0)
    runs = [
        {float(s): (math.inf if rng.random() < 0.1 else rng.normal()) for s in range(rng.integers(1, 9))}
        for _ in range(300)
    ]
    target = -1.0 if better == "lower" else 1.0
    found = steps.steps_to_target(curves_of(runs), table_of({"a": 300}), target, better)
    for curve, (_, row) in zip(runs, found.iterrows(), strict=True):
        good = [s for s, x in curve.items() if (x <= target if better == "lower" else target <= x < math.inf)]
        assert (row["step"] == good[0]) if good else math.isnan(row["step"])
        later = {s for s in curve if good and s > good[0]}
        assert row["returned"] == bool(later - {*good})


def test_steps_of_no_curves():
    found = steps.steps_to_target(curves_of([]), table_of({"a": 2}), 1.0)
    assert found["step"].isna().all()
    assert steps.reached_by_arm(found, table_of({"a": 2}))["a"]["reached"] == 0


def test_an_arm_in_figures():
    """Of seven runs, two never reach the target: they rank last, and the mean does not exist."""
    runs = [crossing_at(x) for x in (100, 200, 300, 400, 500)]
    runs += [crossing_at(9999), crossing_at(9999, end=200), crossing_at(500), crossing_at(700)]
    runs += [crossing_at(9999, end=600)] * 2
    table = table_of({"a": 7, "b": 2, "c": 2})
    found = steps.reached_by_arm(steps.steps_to_target(curves_of(runs), table, 1.0), table)
    a, b = found["a"], found["b"]
    assert found["c"]["ended_early"] == found["c"]["censored"] == 2  # another arm's run took 700 steps
    assert (a["runs"], a["reached"], a["censored"], a["ended_early"]) == (7, 5, 2, 1)
    assert (a["first"], a["median"], a["last"], a["mean"]) == (100, 400, None, None)
    assert (a["low"], a["high"]) == (100, None)  # of 7, the interval of 98% is the whole range
    assert a["confidence"] == pytest.approx(1 - 2 / 2**7)
    assert (b["mean"], b["median"], b["low"], b["high"], b["between"]) == (600, 600, 500, 700, 10)
    assert b["confidence"] == pytest.approx(0.5)


@pytest.mark.parametrize("n", [6, 11, 20, 30])
def test_interval_of_the_median_is_that_of_scipy(n):
    values = np.random.default_rng(n).integers(10, 99, n) * 10
    table = table_of({"a": n})
    found = steps.reached_by_arm(
        steps.steps_to_target(curves_of([crossing_at(x) for x in values]), table, 1.0), table
    )
    expected = stats.quantile_test(values, p=0.5).confidence_interval(0.95)
    assert found["a"]["low"] == expected.low
    assert found["a"]["high"] == expected.high


def ratios(runs, table, **options):
    return steps.ratios_of_steps(steps.steps_to_target(curves_of(runs), table, 1.0), table, "ref", **options)


def test_a_ratio_is_welchs_on_logarithms():
    """Evaluated at every step, so that the evaluations leave almost nothing open."""
    rng = np.random.default_rng(3)
    ref, arm = rng.integers(900, 1000, 8), rng.integers(600, 800, 5)
    (found,) = ratios([crossing_at(x, 1) for x in [*ref, *arm]], table_of({"ref": 8, "arm": 5}))
    plain = stats.ttest_ind(np.log(arm), np.log(ref), equal_var=False).confidence_interval(0.95)
    assert found["ratio"] == pytest.approx(math.exp(np.log(arm).mean() - np.log(ref).mean()))
    assert found["low"] == pytest.approx(math.exp(plain.low), abs=2e-3)
    assert found["high"] == pytest.approx(math.exp(plain.high), abs=2e-3)
    assert found["verdict"] == "fewer"
    assert not found["coarse"]


def test_the_same_seeds_pair_runs():
    rng = np.random.default_rng(4)
    ref = rng.integers(500, 900, 10)
    runs = [crossing_at(x, 1) for x in [*ref, *(ref * 0.95).astype(int)]]
    table = table_of({"ref": 10, "arm": 10})
    (paired,), (unpaired,) = ratios(runs, table, paired=True), ratios(runs, table)
    assert paired["verdict"] == "fewer"
    assert paired["high"] - paired["low"] < 0.01
    assert unpaired["verdict"] == "undecided"


def test_no_spread_is_not_certainty():
    """All runs cross between two evaluations, 900 and 1000 for one arm, 800 and 900 for the other. They may
    all have crossed at 900."""
    runs = [crossing_at(1000, 100)] * 5 + [crossing_at(900, 100)] * 5 + [crossing_at(500, 100)] * 5
    near, far = ratios(runs, table_of({"ref": 5, "arm": 5, "far": 5}))
    assert near["ratio"] == pytest.approx(0.9)
    assert near["low"] < 0.78  # 800 / 1000, less what five runs leave open
    assert near["high"] > 900 / 900
    assert near["verdict"] == "undecided"
    assert near["coarse"]
    assert far["verdict"] == "fewer"
    assert far["low"] < 400 / 1000
    assert far["high"] > 500 / 900


def test_little_spread_is_no_certainty_either():
    """Nine of ten runs of either arm cross between the same evaluations: all may have crossed at 900."""
    runs = [crossing_at(x, 100) for x in [1000] * 9 + [900] + [900] * 9 + [800]]
    (found,) = ratios(runs, table_of({"ref": 10, "arm": 10}))
    assert found["high"] > found["ratio"] * 1000 / 900 * 0.999
    assert found["low"] < found["ratio"] * 800 / 900
    assert found["coarse"]


def test_an_arm_evaluated_more_rarely_is_not_slower_for_that():
    """Both arms cross at the same steps, and one of them is seen to do so at most 100 steps later."""
    rng = np.random.default_rng(5)
    wrong = 0
    for _ in range(20):
        at = rng.normal(905, 2, 12)  # just after an evaluation
        (found,) = ratios(
            [crossing_at(x, 1 if i < 6 else 100) for i, x in enumerate(at)], table_of({"ref": 6, "arm": 6})
        )
        wrong += found["verdict"] != "undecided"
    assert wrong <= 1


def test_runs_that_never_reach_the_target_count():
    ref = [crossing_at(x, 1) for x in (500, 510, 520, 530, 540, 550, 560, 570)]
    arm = [crossing_at(x, 1) for x in (300, 310, 320, 330, 340, 350, 360)] + [crossing_at(9999, 1)]
    bad = [crossing_at(x, 1) for x in (300, 310)] + [crossing_at(9999, 1)] * 6
    good, worse = ratios([*ref, *arm, *bad], table_of({"ref": 8, "arm": 8, "bad": 8}))
    assert good["verdict"] != "more"
    assert good["ratio"] == pytest.approx(330 / 530, abs=0.1)
    assert worse["verdict"] != "fewer"
    assert worse["high"] is None
    assert worse["ratio"] is None


def test_an_arm_that_never_reaches_the_target_needs_more_steps():
    ref, never = [crossing_at(x) for x in range(500, 600, 10)], [crossing_at(9999)] * 10
    for arms, expected in (({"ref": 10, "arm": 10}, "more"), ({"arm": 10, "ref": 10}, "fewer")):
        (found,) = ratios([*ref, *never], table_of(arms))
        assert found["verdict"] == expected
        assert (found["ratio"], found["low"], found["high"]) == (None, None, None)


def test_one_arm_without_spread():
    """Its runs all crossed between 900 and 1000, which is no reason to leave it out, nor to trust it wholly.
    Seeds do not pair runs that show no difference."""
    at = [700, 800, 700, 800, 900, 700, 800, 700]
    runs, table = [crossing_at(x, 100) for x in [1000] * 8 + at], table_of({"ref": 8, "arm": 8})
    (found,) = ratios(runs, table)
    centre = math.exp(np.log(at).mean())
    assert found["verdict"] == "fewer"
    assert found["low"] < (centre - 100) / 1000
    assert centre / 900 < found["high"] < 1
    assert ratios(runs, table, paired=True) == [found]


def test_a_target_that_is_reached_before_training_has_no_ratio():
    with pytest.raises(UserError, match="arm: a run is at the target at step 0"):
        ratios([crossing_at(5), crossing_at(0)], table_of({"ref": 1, "arm": 1}))


def lengths(arms: dict[str, list[tuple[float, float]]], planned=math.nan) -> pd.DataFrame:
    """A table of runs that ended at (length, loss)."""
    ended = [run for runs in arms.values() for run in runs]
    table = table_of({arm: len(runs) for arm, runs in arms.items()}, planned=planned)
    return table.assign(length=[x for x, _ in ended], outcome=[y for _, y in ended])


def test_an_exchange_rate_is_the_slope_over_lengths():
    """The published one of track3: 3.2881 at 3125 steps and 3.2790 at 3325 are 0.0045 for 100 steps."""
    rng = np.random.default_rng(6)
    means = {3125: (3.2881, 8), 3325: (3.2790, 20)}
    runs = [(x, loss) for x, (mean, n) in means.items() for loss in rng.normal(mean, 0.0013, n)]
    found = steps.exchange_rates(lengths({"a": runs, "one length": [(10, 1.0)] * 3}))
    assert [*found] == ["a"]
    assert found["a"]["lengths"] == [3125, 3325]
    assert found["a"]["low"] < 0.0091 / 200 < found["a"]["high"]
    line = stats.linregress(*np.array(runs).T)
    assert found["a"]["per_step"] == pytest.approx(-line.slope)
    assert found["a"]["high"] + line.slope == pytest.approx(stats.t.ppf(0.975, 26) * line.stderr)


def test_only_finished_runs_make_an_exchange_rate():
    runs = [(100, 2.0), (100, 2.1), (200, 1.0), (200, 1.1), (150, 9.0), (200, math.inf)]
    found = steps.exchange_rates(lengths({"a": runs}, planned=[100, 100, 200, 200, 200, 200]))["a"]
    assert found["runs"] == 4
    assert found["per_step"] == pytest.approx(0.01)
    two = steps.exchange_rates(lengths({"a": [(100, 2.0), (200, 1.0)]}))["a"]
    assert (two["low"], two["high"]) == (None, None)  # a line through two points shows no error


def test_lengths_at_which_two_arms_end_alike():
    """The arm's loss falls by 1 in 100 steps, and is that of the reference's longest runs at step 150."""
    arm = [(x, 3 - x / 100 + e) for x in (100, 200) for e in (-0.01, 0.0, 0.01)]
    ref = [(x, 3 - x / 200 + e) for x in (100, 300) for e in (-0.01, 0.0, 0.01)]
    found = steps.ratio_of_lengths(lengths({"arm": arm, "ref": ref}), "arm", "ref")
    assert found["ratio"] == pytest.approx(0.5)
    assert 0.48 < found["low"] < 0.5 < found["high"] < 0.52
    assert found["verdict"] == "fewer"
    wider = steps.ratio_of_lengths(lengths({"arm": arm, "ref": ref}), "arm", "ref", comparisons=10)
    assert wider["low"] < found["low"]
    assert wider["high"] > found["high"]


def test_nothing_is_extrapolated():
    ref = [(300, 1.5), (300, 1.5)]
    above = lengths({"arm": [(100, 3.0), (200, 2.0)], "ref": ref})
    below = lengths({"arm": [(100, 1.0), (200, 0.5)], "ref": ref})
    one = lengths({"arm": [(100, 1.5)], "ref": ref})
    for table in (above, below, one):
        assert steps.ratio_of_lengths(table, "arm", "ref") is None
    # the arm's loss is that of the reference within its lengths, and might be so beyond them
    noisy = lengths({"arm": [(100, 3.0), (100, 2.0), (200, 1.9), (200, 0.9)], "ref": ref})
    found = steps.ratio_of_lengths(noisy, "arm", "ref")
    assert found["ratio"] == pytest.approx(190.9 / 300, abs=1e-3)
    assert (found["low"], found["high"], found["verdict"]) == (None, None, "undecided")
    single = lengths({"arm": [(100, 2.0), (200, 1.0)], "ref": [(300, 1.5)]})
    found = steps.ratio_of_lengths(single, "arm", "ref")  # nothing shows the spread of a run
    assert found["ratio"] == pytest.approx(0.5)
    assert (found["low"], found["high"]) == (None, None)


@pytest.mark.thorough
def test_an_interval_of_lengths_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(400):
        arm = [(x, loss) for x in (100, 200) for loss in rng.normal(3 - x / 100, 0.05, 3)]
        ref = [(300, loss) for loss in rng.normal(1.5, 0.05, 3)]
        found = steps.ratio_of_lengths(lengths({"arm": arm, "ref": ref}), "arm", "ref")
        held += (found["low"] or 0) <= 0.5 <= (found["high"] or 9)
    assert held / 400 >= 0.93


def test_arms_of_unequal_length_are_charged_for_their_steps():
    found = steps.at_equal_steps(
        {"a": {"1": 3.0}, "b": {"1": 3.1, "2": math.inf}}, {"a": 200, "b": 100}, 0.002
    )
    assert found == {"a": {"1": pytest.approx(3.2)}, "b": {"1": pytest.approx(3.1), "2": math.inf}}

"""What runs say about arms and their differences: against scipy, and how often runs without any difference
are said to differ."""

import itertools
import json
import math
import os
import subprocess
import sys

import judge_rates
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ebc_lab.config.errors import UserError
from ebc_lab.judging.differences import arm_summary, compare
from ebc_lab.study.stages.statistics import Luck, paired


def by_run(name, losses):
    return {f"{name}-{i}": float(x) for i, x in enumerate(losses)}


def invented(seed, *sizes, sd=1.0, shift=0.0):
    """Arms a0, a1, … of so many runs, each `shift` above the one before."""
    random = np.random.default_rng(seed)
    return {f"a{i}": by_run(f"a{i}", random.normal(3 + i * shift, sd, n)) for i, n in enumerate(sizes)}


def values(arms, name):
    return list(arms[name].values())


def test_an_arm_has_the_t_interval_of_its_mean_and_the_order_statistics_of_its_median():
    losses = np.random.default_rng(1).normal(3, 0.1, 12)
    found = arm_summary(losses)
    exact = stats.ttest_1samp(losses, 0).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((exact.low, exact.high))
    ranks = stats.quantile_test(losses, p=0.5).confidence_interval(0.95)
    assert (found["median_low"], found["median_high"]) == (ranks.low, ranks.high)
    assert found["median_confidence"] >= 0.95


@pytest.mark.parametrize(("n", "confidence"), [(2, 0.5), (3, 0.75), (5, 0.9375), (6, 0.96875)])
def test_of_few_runs_the_median_lies_between_the_lowest_and_the_highest_and_it_is_said_how_surely(
    n, confidence
):
    found = arm_summary(range(n))
    assert (found["median_low"], found["median_high"]) == (0, n - 1)
    assert found["median_confidence"] == pytest.approx(confidence)


def test_a_diverged_run_ranks_behind_all_others_and_leaves_no_mean():
    found = arm_summary([2.0, math.nan, 1.0])
    assert (found["runs"], found["completed"], found["diverged"]) == (3, 2, 1)
    assert (found["mean"], found["low"], found["highest"], found["median_high"]) == (None,) * 4
    assert (found["median"], found["median_low"]) == (2.0, 1.0)


def test_one_run_has_no_interval():
    found = arm_summary([2.0])
    assert (found["mean"], found["low"], found["median_low"], found["sd"]) == (2.0, None, None, None)


def test_two_arms_are_compared_by_welch_as_scipy_does_it():
    arms = invented(2, 6, 9)
    (found,) = compare(arms, "a0")
    exact = stats.ttest_ind(values(arms, "a1"), values(arms, "a0"), equal_var=False)
    interval = exact.confidence_interval(0.95)
    for prefix in ("", "joint_"):
        assert (found[f"{prefix}low"], found[f"{prefix}high"]) == pytest.approx((interval.low, interval.high))
    assert (found["p"], found["p_joint"]) == pytest.approx((exact.pvalue, exact.pvalue))
    assert found["freedom"] == pytest.approx(exact.df)
    assert found["method"] == "welch"


def test_all_pairs_are_compared_as_games_and_howell_do_it():
    arms = invented(3, 30, 30, 30, 30)
    exact = stats.tukey_hsd(*(values(arms, x) for x in arms), equal_var=False)
    interval = exact.confidence_interval(0.95)
    for c in compare(arms, "a0", pairs=True):
        i, j = int(c["arm"][1]), int(c["reference"][1])
        half = (interval.high[i, j] - interval.low[i, j]) / 2
        assert (c["joint_high"] - c["joint_low"]) / 2 == pytest.approx(half, rel=0.015)
        assert c["p_joint"] == pytest.approx(exact.pvalue[i, j], abs=0.015)


def test_comparisons_with_a_reference_are_dunnetts_where_variances_are_equal():
    arms = invented(4, 60, 60, 60, 60, 60)
    exact = stats.dunnett(*(values(arms, f"a{i}") for i in range(1, 5)), control=values(arms, "a0"), rng=1)
    for c, p in zip(compare(arms, "a0"), exact.pvalue, strict=True):
        assert c["p_joint"] == pytest.approx(p, abs=0.03)
        assert c["p_joint"] < min(1, 4 * c["p"])  # Bonferroni's


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_joint_interval_excludes_nothing_that_its_p_value_does_not(seed, pairs):
    sizes = [2, 3, 5, 8, 1, 20, 4]
    arms = invented(seed, *sizes, shift=0.4)
    arms["a5"]["a5-0"] = math.inf
    found = compare(arms, "a2", pairs=pairs, sigma=1.0)
    assert {c["method"] for c in found} >= {"welch", "sigma", "rank-sum"}
    for c in found:
        if c["method"]:
            apart = (c["joint_low"] or -1) > 0 or (c["joint_high"] or 1) < 0
            assert apart == (c["p_joint"] < 0.05) == (c["verdict"] in ("better", "worse"))
            assert c["p"] <= c["p_joint"]
            assert (c["low"] or -99) >= (c["joint_low"] or -99)
            assert (c["high"] or 99) <= (c["joint_high"] or 99)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_other_way_round_everything_is_the_other_way_round():
    arms = invented(5, 4, 7, shift=3.0)
    (found,), (back,) = compare(arms, "a0"), compare(arms, "a1")
    assert (found["verdict"], back["verdict"]) == ("worse", "better")
    assert (found["joint_low"], found["joint_high"]) == pytest.approx(
        (-back["joint_high"], -back["joint_low"])
    )


def test_two_runs_against_many_get_the_freedom_of_the_two():
    arms = invented(6, 20, 2)
    (found,) = compare(arms, "a0")
    error = math.sqrt(sum(np.var(values(arms, x), ddof=1) / len(arms[x]) for x in arms))
    assert found["high"] - found["mean"] == pytest.approx(stats.t.ppf(0.975, 1) * error)


def test_runs_of_the_same_seeds_are_paired_unless_that_is_refused():
    arms = {"a": {"1": 1.0, "2": 2.0, "3": 3.1}, "b": {"1": 1.2, "2": 2.1, "3": 3.4}}
    (found,) = compare(arms, "b")
    exact = paired(arms["a"], arms["b"])
    assert (found["method"], found["seeds"]) == ("t", 3)
    assert (found["low"], found["high"], found["p"]) == (exact["low"], exact["high"], exact["p"])
    (apart,) = compare(arms, "b", paired=False)
    assert (apart["method"], apart["seeds"]) == ("welch", 0)
    arms["b"]["4"] = 9.0  # no longer the same seeds
    assert compare(arms, "b")[0]["method"] == "welch"
    (shared,) = compare(arms, "b", paired=True)
    assert (shared["method"], shared["seeds"], shared["mean"]) == ("t", 3, pytest.approx(exact["mean"]))


def test_a_diverged_run_leaves_ranks_whose_p_is_the_exact_one_of_mann_and_whitney():
    arms = invented(7, 6, 7, shift=2.0)
    arms["a1"]["a1-3"] = math.nan
    (found,) = compare(arms, "a0")
    ours = [x if math.isfinite(x) else 99.0 for x in values(arms, "a1")]
    exact = stats.mannwhitneyu(ours, values(arms, "a0"), method="exact")
    assert found["method"] == "rank-sum"
    assert found["p"] == pytest.approx(exact.pvalue)
    assert found["mean"] is None
    assert found["diverged"] == {"arm": 1, "reference": 0}


@pytest.mark.parametrize(("n", "m", "method"), [(50, 50, "exact"), (41, 61, "asymptotic")])
def test_ranks_of_more_pairs_than_2500_are_taken_as_normal(n, m, method):
    arms = invented(8, n, m, shift=0.4)
    arms["a1"]["a1-0"] = math.inf
    (found,) = compare(arms, "a0")
    ours = [x if math.isfinite(x) else 99.0 for x in values(arms, "a1")]
    wanted = stats.mannwhitneyu(ours, values(arms, "a0"), method=method).pvalue
    assert found["p"] == pytest.approx(wanted, rel=1e-6)


@given(st.integers(2, 7), st.integers(2, 7), st.integers(0, 10**6))
def test_the_interval_by_ranks_holds_the_shifts_that_the_test_does_not_reject(n, m, seed):
    arms = invented(seed, n, m)
    arms["a1"]["a1-0"] = math.inf
    (found,) = compare(arms, "a0")
    low = -math.inf if found["low"] is None else found["low"]
    for shift in (low - 1e-6, low + 1e-6) if math.isfinite(low) else ():
        ours = [1e6 if math.isinf(x) else x - shift for x in values(arms, "a1")]
        p = stats.mannwhitneyu(ours, values(arms, "a0"), method="exact").pvalue
        assert (p < 0.05) == (shift < low)


@pytest.mark.parametrize("pairs", [False, True])
def test_an_arm_that_always_diverged_is_worse_where_there_are_enough_runs(pairs):
    for n, verdict in ((3, "undecided"), (8, "worse")):
        seeds = [str(i) for i in range(n)]
        arms = {"a": dict.fromkeys(seeds, math.inf), "b": {s: 1.0 + int(s) for s in seeds}}
        (found,) = compare(arms, "b", paired=pairs)
        assert found["verdict"] == verdict
        assert compare(arms, "a", paired=pairs)[0]["verdict"] == {"worse": "better"}.get(verdict, verdict)


def test_two_diverged_runs_say_nothing_of_a_difference():
    arms = {name: by_run(name, [math.inf, math.nan, 1.0]) for name in "ab"}
    (found,) = compare(arms, "b")
    assert (found["median"], found["p"], found["verdict"]) == (0.0, 1.0, "undecided")
    lost = {name: by_run(name, [math.inf] * 9) for name in "ab"}
    (found,) = compare(lost, "b")
    assert (found["method"], found["median"], found["verdict"]) == (None, None, "undecided")
    most = {name: {str(i): i if i < 2 else math.inf for i in range(20)} for name in "ab"}
    for by_seed in (False, True):
        (found,) = compare(most, "b", paired=by_seed)
        assert (found["low"], found["high"], found["verdict"]) == (None, None, "undecided")


def test_of_one_run_only_a_standard_deviation_from_elsewhere_makes_an_interval():
    arms = {"a": {"a-0": 2.0}, "b": by_run("b", [1.0, 1.1, 1.2, 1.3])}
    (without,), (found,) = compare(arms, "b"), compare(arms, "b", sigma=0.1)
    assert (without["method"], without["low"], without["verdict"]) == (None, None, "undecided")
    assert "one run" in without["note"]
    error = stats.sem(values(arms, "b")) * math.sqrt(5)
    assert 3.18 * error < without["detectable"] < 5 * error
    half = stats.norm.ppf(0.975) * 0.1 * math.sqrt(1 + 1 / 4)
    assert (found["low"], found["high"]) == pytest.approx((0.85 - half, 0.85 + half))
    (few,) = compare(arms, "b", sigma=0.1, sigma_freedom=3)
    assert few["high"] - few["mean"] == pytest.approx(half * stats.t.ppf(0.975, 3) / stats.norm.ppf(0.975))


@pytest.mark.parametrize("pairs", [False, True])
def test_runs_that_agree_to_the_last_digit_are_not_tested(pairs):
    arms = {"a": {"1": 2.0, "2": 2.0, "3": 2.0}, "b": {"1": 1.0, "2": 1.0, "3": 1.0}}
    (found,) = compare(arms, "b", paired=pairs)
    assert (found["method"], found["p"], found["verdict"]) == (None, None, "undecided")
    assert "all runs of an arm agree" in found["note"]


def test_level_needs_the_whole_interval_within_the_margin():
    arms = invented(8, 20, 20, sd=0.1)
    (found,) = compare(arms, "a0")
    reach = max(abs(found["joint_low"]), abs(found["joint_high"]))
    assert compare(arms, "a0", margin=1.01 * reach)[0]["verdict"] == "level"
    assert compare(arms, "a0", margin=0.99 * reach)[0]["verdict"] == "undecided"


def test_so_many_runs_as_are_said_to_decide_do_so_in_four_of_five_cases():
    arms = {"a": by_run("a", [1.0, 2.0, 3.0, 4.2]), "b": by_run("b", [2.0, 3.0, 4.0, 5.0, 6.0])}
    (found,) = compare(arms, "b")
    n = found["seeds_needed"]
    random = np.random.default_rng(1)
    for runs, enough in ((n, True), (n - 2, False)):
        one, other = (
            random.normal(np.mean(values(arms, x)), np.std(values(arms, x), ddof=1), (20_000, runs))
            for x in "ab"
        )
        decided = (stats.ttest_ind(one, other, axis=1, equal_var=False).pvalue < 0.05).mean()
        assert (decided > 0.79) == enough


def test_the_luck_of_a_tuning_only_widens():
    arms = invented(9, 5, 6, 7)
    for c, wide in zip(compare(arms, "a0"), compare(arms, "a0", luck={"a1": Luck(0.5, 3)}), strict=True):
        assert wide["joint_low"] <= c["joint_low"] < c["joint_high"] <= wide["joint_high"]
        assert (wide["high"] > c["high"]) == (c["arm"] == "a1")


def test_what_cannot_be_compared_is_said():
    arms = invented(10, 3, 3)
    with pytest.raises(UserError, match="no arm is called c: the reference has to be one of a0, a1"):
        compare(arms, "c")
    with pytest.raises(UserError, match="the arm a1 has no run"):
        compare({**arms, "a1": {}}, "a0")


# the cells of dev/studies/judge_rates.py that a naive way gets wrong
CELLS = list(itertools.product((1, 5), ((2, 2), (3, 3), (2, 20), (20, 2)), (1.0, 5.0)))


@pytest.mark.parametrize(("k", "sizes", "sd"), CELLS)
def test_runs_without_a_difference_are_seldom_said_to_differ(k, sizes, sd):
    false = judge_rates.unpaired(600, k, *sizes, sd)["false"]
    assert false < 0.06 + 3 * math.sqrt(0.06 * 0.94 / 600)


def test_the_same_runs_get_the_same_figures_in_every_process():
    code = (
        "from ebc_lab.judging.differences import compare\n"
        "arms = {name: {str(i): (7 * i + 3 * n * i) % 11 + 2 * n for i in range(3 + n)}"
        " for n, name in enumerate('abcde')}\n"
        "print([c['p_joint'] for c in compare(arms, 'a', pairs=True, paired=False)])"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in "12"
    }
    assert len(printed) == 1

"""What paired seeds can show: against scipy and by hand, and how often studies without any effect claim
one."""

import math
import random

import null_studies
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ebc_lab.study.stages import compare_arms, finals
from ebc_lab.study.stages.statistics import (
    Luck,
    chances_of_lowest,
    detectable_errors,
    judge,
    luck_of_choice,
    noise,
    noise_of_runs,
    paired,
    seeds_needed,
    show_difference,
    window,
)

LOSS = st.floats(1.0, 3.0)


def by_seed(*losses):
    return {str(i): x for i, x in enumerate(losses)}


def test_the_interval_is_the_paired_t_interval_and_every_look_widens_it():
    arm, reference = by_seed(2.0, 2.1, 1.9, 2.05), by_seed(2.05, 2.12, 1.97, 2.06)
    exact = stats.ttest_rel(list(arm.values()), list(reference.values()))
    found, often = paired(arm, reference, comparisons=5), paired(arm, reference, looks=4)
    assert found["mean"] == pytest.approx(np.mean([*arm.values()]) - np.mean([*reference.values()]))
    for low, high, interval, confidence in (
        ("low", "high", found, 0.95),
        ("joint_low", "joint_high", found, 0.99),
        ("low", "high", often, 1 - 0.05 / 4),
    ):
        ends = exact.confidence_interval(confidence)
        assert (interval[low], interval[high]) == pytest.approx((ends.low, ends.high))
    assert found["p"] == pytest.approx(exact.pvalue)
    assert found["p_joint"] == pytest.approx(min(1, 5 * found["p"]))
    assert often["p"] == pytest.approx(min(1, 4 * found["p"]))
    assert often["detectable"] > found["detectable"]


@pytest.mark.thorough
@given(st.lists(st.tuples(LOSS, LOSS), min_size=2, max_size=8), st.integers(1, 9), st.floats(0, 0.1))
def test_a_claim_for_all_arms_at_once_never_exceeds_the_one_alone(pairs, comparisons, margin):
    arm = by_seed(*(a for a, _ in pairs))
    reference = by_seed(*(b for _, b in pairs))
    found = paired(arm, reference, margin=margin, comparisons=comparisons)
    back = paired(reference, arm, margin=margin, comparisons=comparisons)
    assert found["joint_low"] <= found["low"] <= found["mean"] <= found["high"] <= found["joint_high"]
    assert (found["low"], found["high"]) == pytest.approx((-back["high"], -back["low"]))
    claims = ("beats", "meets", "undecided")
    if found["judged"] in claims and found["alone"] in claims:
        assert claims.index(found["judged"]) >= claims.index(found["alone"])
    assert found["judged"] != "misses" or found["alone"] == "misses"


def test_the_detectable_difference_is_found_as_often_as_it_says():
    even = stats.norm.ppf((np.arange(5) + 0.5) / 5)
    per_sd = paired(by_seed(*even), by_seed(*[0.0] * 5))["detectable"] / np.std(even, ddof=1)
    noisy = np.random.default_rng(0).normal(per_sd, 1.0, (4000, 5))
    p = stats.ttest_1samp(noisy, 0.0, axis=1).pvalue
    assert np.mean(p < 0.05) == pytest.approx(0.8, abs=0.02)


def test_with_two_seeds_the_detectable_difference_grows_as_the_level_falls_however_many_are_compared():
    """Quantiles of t with one degree of freedom go as 1 / level; scipy's noncentral t ends at some 1e5."""
    found = [level * detectable_errors(1.0, level) for level in (1e-3, 1e-5, 1e-6, 1e-9)]
    assert found == pytest.approx([found[0]] * 4, rel=1e-3)


def test_only_seeds_that_both_have_are_compared():
    found = paired({"0": 2.0, "1": 2.1}, {"1": 2.0, "2": 9.0}, replicates=[2.0, 2.02, 2.04])
    assert found["seeds"] == 1
    assert found["mean"] == pytest.approx(0.1)
    assert found["sigmas"] == pytest.approx(5)
    assert found["high"] is None
    assert "no interval" in show_difference(found)
    assert found["detectable"] == noise([2.0, 2.02, 2.04])["detectable"]  # there is always one to print
    assert f"{found['detectable']:.4f}" in show_difference(found)
    none = paired({}, {"0": 2.0})
    assert none["judged"] == none["alone"] == "undecided"
    assert none["method"] is None
    assert "no pair" in show_difference(none)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-0.05, -0.01, "beats"),
        (-0.05, 0.0, "meets"),
        (-0.05, 0.01, "meets"),
        (0.002, 0.01, "meets"),
        (-0.05, 0.02, "undecided"),
        (0.011, 0.02, "misses"),
        (math.nan, math.nan, "undecided"),
        (-math.inf, -math.inf, "beats"),
        (-0.05, math.inf, "undecided"),
        (math.inf, math.inf, "misses"),
    ],
)
def test_meeting_the_target_is_not_beating_the_baseline(low, high, expected):
    assert judge(low, high, 0.01) == expected


def test_a_run_that_diverged_ranks_behind_every_other():
    lost = paired(by_seed(2.0, math.inf, 1.0), by_seed(2.0, 2.0, 2.0), margin=0.01)
    assert lost["judged"] == "misses"
    assert lost["method"] == "rank"
    assert lost["mean"] is None
    assert lost["median"] == 0.0
    assert "diverged: 1 of the arm's, 0 of the reference's" in show_difference(lost)
    few = paired(by_seed(1.0, 1.0, 1.0), by_seed(2.0, math.inf, 2.0), margin=0.01)
    assert few["judged"] == "undecided"  # by rank, three seeds show nothing
    many = paired(by_seed(*[1.0] * 8), by_seed(*[2.0] * 7, math.inf), margin=0.01)
    assert many["judged"] == "beats"
    assert many["high"] == pytest.approx(-1.0)
    assert many["low"] is None
    assert paired(by_seed(*[1.0] * 8), by_seed(*[math.inf] * 8))["judged"] == "beats"
    assert paired(by_seed(math.inf), by_seed(math.inf))["judged"] == "undecided"


def test_the_noise_has_an_interval_of_its_own():
    found = noise([2.0, 2.02, 2.04])
    assert found["sigma"] == pytest.approx(0.02)
    assert found["low"] == pytest.approx(0.02 * math.sqrt(2 / stats.chi2.ppf(0.975, 2)))
    assert found["high"] == pytest.approx(0.02 * math.sqrt(2 / stats.chi2.ppf(0.025, 2)))
    assert found["low"] < found["sigma"] < found["high"] < found["detectable"] * 2
    assert noise([2.0])["sigma"] is None


KINDS = {"fixed": (), "sequential": ("finals.max_seeds=9", "finals.seeds_per_look=2")}


STUDIES = 200


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "diverging"), [("fixed", 0.0), ("fixed", 0.05), ("sequential", 0.0)])
def test_studies_without_an_effect_rarely_claim_one(kind, diverging):
    found = null_studies.simulate(null_studies.settings(KINDS[kind]), STUDIES, diverging=diverging)
    by_luck = 0.05 + 2 * math.sqrt(0.05 * 0.95 / STUDIES)  # of this many studies, at a rate of 5%
    assert found["beats"] <= by_luck
    assert found["beats_rate"] <= by_luck
    if kind == "fixed" and not diverging:
        assert found["uncorrected"] > by_luck  # without the correction they would claim one


@pytest.mark.thorough
def test_what_is_worse_by_the_margin_is_rarely_called_no_worse():
    config = null_studies.settings()
    found = null_studies.simulate(config, STUDIES, worse=config.finals.margin)
    assert found["x2_no_worse"] <= 0.05
    assert found["best_no_worse"] <= 0.05


def test_the_plan_adds_seeds_only_while_the_verdict_is_undecided():
    config = null_studies.settings(KINDS["sequential"])
    decisions = null_studies.decided(config)
    looks = null_studies.seeds_of(config, decisions)
    assert [len({s.run.seed for s in specs}) for specs in looks] == compare_arms.looks(config) == [3, 5, 7, 9]
    stopped = set()
    for i, sd in enumerate((0.0005, 0.004, 0.008, 0.02)):
        draw = random.Random(i)
        results = {s.run_id: {"outcome": "completed"} for s in looks[-1]}
        for spec in looks[-1]:
            results[spec.run_id] |= dict.fromkeys(("val_loss", "test_loss"), draw.gauss(2.0, sd))
        specs = finals.STAGE.runs(config, decisions, results)
        seeds = len({s.run.seed for s in specs})
        found = finals.STAGE.decide(config, specs, results, decisions)
        [track] = found["tracks"].values()
        compared = [line for line in track["verdict"] if "difference" in line]
        open_lines = [line["name"] for line in compared if line["verdict"] == "undecided"]
        assert found == null_studies.judged(config, decisions, looks, results)
        assert found["sequential"]["at"] == seeds
        assert found["sequential"]["confidence"] == pytest.approx(1 - 0.05 / 4)
        assert bool(open_lines) == ("still undecided" in found["sequential"]["stopped"])
        assert not open_lines or seeds == 9
        stopped.add(seeds)
    assert len(stopped) > 1  # some stop early, some do not


@pytest.mark.parametrize(
    ("overrides", "added"),
    [(["finals.max_seeds=4"], [104, 105]), (["finals.max_seeds=3", "calibrate.seeds=7"], [107])],
)
def test_added_seeds_are_new_and_none_of_the_stages(overrides, added):
    config = null_studies.settings(("seeds=[98,99]", *overrides))
    specs = null_studies.seeds_of(config, null_studies.decided(config))[-1]
    assert list(dict.fromkeys(s.run.seed for s in specs)) == [98, 99, *added]


def test_a_window_reaches_to_where_the_loss_crosses_its_limit():
    losses = {1.0: 2.10, 2.0: 2.00, 4.0: 2.02, 8.0: 2.06, 16.0: 2.50}
    found = window(losses, 0.05)
    assert (found["best"], found["open_low"], found["open_high"]) == (2.0, False, False)
    assert found["low"] == pytest.approx(2**0.5)  # half-way, in octaves, between 2.10 and 2.00
    assert found["high"] == pytest.approx(4 * 2**0.75)  # three quarters of the way from 2.02 to 2.06
    assert found["octaves"] == pytest.approx(2.25)


def test_a_window_is_open_where_the_grid_ends_and_shut_where_a_run_diverged():
    found = window({1.0: 2.0, 2.0: 2.01, 4.0: math.inf, 8.0: 2.0})
    assert (found["low"], found["high"], found["octaves"]) == (1.0, 2.0, 1.0)
    assert (found["open_low"], found["open_high"]) == (True, False)
    assert window({3.0: 2.0})["octaves"] == 0
    assert window({3.0: math.inf}) is None
    assert window({}) is None


# -- the luck of a tuning -----------------------------------------------------------------------------------


def test_the_luck_of_a_choice_is_how_the_points_spread_by_their_chance_of_being_chosen():
    """Against a plain simulation: the means drawn again with their noise, and the lowest chosen each time."""
    tried = [[2.00, 2.02], [2.01, 1.99], [2.03, 2.02], [2.06, 2.08], [2.30, 2.31]]
    found = luck_of_choice(tried, sigma=1.0)
    means = np.mean(tried, axis=1)
    near = np.array(tried)[np.argsort(means, kind="stable")[:3]]
    left = near - near.mean(axis=1, keepdims=True) - near.mean(axis=0) + near.mean()
    spread = np.median(np.abs(left)) / 0.674490 / math.sqrt((1 - 1 / 3) * (1 - 1 / 2))
    draw = np.random.default_rng(0).normal(means, spread / math.sqrt(2), size=(200_000, 5))
    assert found.sd == pytest.approx(means[draw.argmin(axis=1)].std(), rel=0.02)
    assert found.freedom == 2  # of three points and two seeds


@pytest.mark.parametrize("further", [[], [[2.015, 2.001, 2.02], [2.02, 2.03, 2.01]]])
def test_the_luck_of_uncertain_points_is_that_of_true_losses_drawn_about_their_means(further):
    """By plain draws: true losses about the means, and a choice by the same chances. Two of the points may
    have further seeds: they are known better."""
    tried = [[2.00, 2.02], [2.01, 2.00], [2.012, 2.018], [2.02, 2.04], [2.4, 2.5]]
    spread, freedom = noise_of_runs(tried)
    if further:  # two points on three seeds: half of each difference is left, without the mean difference
        left = np.abs(np.subtract(*further) - np.subtract(*further).mean()) / 2
        of_further = np.median(left) / stats.norm.ppf(0.75) / math.sqrt(1 / 2 * 2 / 3)
        spread = math.sqrt((freedom * spread**2 + 2 * of_further**2) / (freedom + 2))
        freedom += 2
    tried = [losses + further[nth] if nth < len(further) else losses for nth, losses in enumerate(tried)]
    means, error = zip(*((np.mean(x), spread / math.sqrt(len(x))) for x in tried), strict=True)
    chance, _ = chances_of_lowest(np.array(means), np.array(error))
    true = np.random.default_rng(0).normal(means, error, size=(200_000, 5))
    of_choice = (true**2) @ chance - (true @ chance) ** 2
    found = luck_of_choice(tried, sigma=1.0, uncertain=True)
    assert found.freedom == freedom
    assert found.sd == pytest.approx(math.sqrt(of_choice.mean()), rel=0.01)
    assert found.sd > 1.5 * luck_of_choice(tried, sigma=1.0).sd
    draw = np.random.default_rng(0)
    for _ in range(20):  # chances add up to 1 but for rounding, sometimes to more
        ahead = [[1.0, 1.01], *draw.normal(3, 0.01, (14, 2)).tolist()]
        assert luck_of_choice(ahead, 0.01, uncertain=True).sd < 1e-6


def test_the_luck_of_one_of_two_points_is_that_of_a_coin():
    """It falls on the better one where two means, each with its noise, do not change places."""
    share = stats.norm.cdf(0.01 / (0.02 * math.sqrt(2)))
    found = luck_of_choice([[2.0], [2.01]], 0.02)
    assert found.sd == pytest.approx(0.01 * math.sqrt(share * (1 - share)), rel=1e-3)


def test_there_is_no_luck_where_one_point_is_far_ahead_or_nothing_was_chosen():
    assert luck_of_choice([[2.0, 2.01], [3.0, 3.02], [3.1, 3.11]], 0.01).sd < 1e-6
    assert luck_of_choice([[2.0, 2.01]], 0.01) == Luck()
    assert luck_of_choice([[2.0, 2.01], [math.inf, 2.0]], 0.01) == Luck()
    assert luck_of_choice([[2.0], [2.1]], 0.0).sd == 0
    for sigma in (0.01, 0.07, 0.1, 0.3):  # on any CPU, though the chances add up to 1 but for rounding
        assert luck_of_choice([[2.3]] * 3, sigma).sd == 0
    one_seed = [luck_of_choice([[2.0], [2.01], [2.02]], sigma).sd for sigma in (1e-3, 1e-2, 2e-2)]
    assert one_seed == sorted(one_seed)
    assert one_seed[-1] > 0.003


def test_luck_widens_the_interval_by_its_variance_and_no_seeds_shrink_it():
    losses = {str(seed): 2.0 + 0.01 * seed for seed in range(5)}
    other = {seed: 1.97 + 0.002 * (-1) ** int(seed) for seed in losses}
    luck = Luck(0.003, 9) + Luck(0.004, 6)
    freedom = 0.005**4 / (0.003**4 / 9 + 0.004**4 / 6)
    assert (luck.sd, luck.freedom) == (pytest.approx(0.005), pytest.approx(freedom))
    plain, wide = (paired(losses, other, comparisons=2, luck=x) for x in (Luck(), luck))
    error = math.hypot(plain["sd"] / math.sqrt(5), luck.sd)
    own = (plain["sd"] ** 2 / 5) ** 2 / 4
    half = stats.t.ppf(0.975, error**4 / (own + luck.sd**4 / freedom)) * error
    assert (wide["low"], wide["high"]) == pytest.approx((wide["mean"] - half, wide["mean"] + half))
    assert wide["joint_high"] - wide["joint_low"] > wide["high"] - wide["low"]
    assert (wide["low"] > 0) == (wide["p"] < 0.05)
    assert wide["detectable"] > plain["detectable"]
    assert "luck" not in plain
    little = paired(losses, other, comparisons=2, luck=Luck(0.0001, 200))
    for end in ("low", "joint_low"):  # nor do more degrees of freedom narrow it
        assert wide[end] <= little[end] <= plain[end]
    same = paired(losses, losses, luck=luck)  # the same runs under two names have none
    assert (same["low"], same["high"]) == (0, 0)
    hidden = {**wide, "mean": 0.004, "margin": 0.0}
    assert seeds_needed(hidden) is None
    assert seeds_needed({**hidden, "luck": {}}) is not None


def test_the_noise_of_runs_is_free_of_what_a_point_or_a_seed_does_and_of_points_that_run_wild():
    draw = np.random.default_rng(0)
    losses = np.arange(8.0)[:, None] + draw.normal(0, 5, 40) + draw.normal(0, 0.01, (8, 40))
    losses[-2:] += draw.normal(0, 1, (2, 40))
    found = noise_of_runs([*losses.tolist(), [math.inf] * 40])
    assert found == (pytest.approx(0.01, rel=0.15), 3 * 39)  # of the better four
    assert noise_of_runs([[2.0, 2.1]]) is None
    assert noise_of_runs([[2.0], [2.1]]) is None
    one_seed = [[2.0], [2.01], [2.05]]
    assert luck_of_choice(one_seed, 0.01, 6) == Luck(luck_of_choice(one_seed, 0.01).sd, 6)


@pytest.mark.thorough
def test_what_is_as_good_as_a_control_at_its_best_seldom_beats_the_one_that_a_search_of_one_seed_chose():
    found = null_studies.searched_once(0.01, 8, 400)
    assert found["luck"] <= 0.09
    assert found["plain"] > 0.12
    assert found["found"] > 0.95


@pytest.mark.thorough
def test_of_an_optimizer_tuned_twice_a_difference_is_rarely_claimed():
    found = null_studies.tuned_twice(0.01, 400)
    assert found["luck"] <= 0.07
    assert found["uncertain"] <= 0.05
    assert found["plain"] > 0.08
    assert found["widens"] < 1.8

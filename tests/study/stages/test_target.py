"""How soon and how surely an arm's runs reach a target loss, against the formulas written out."""

import math
import statistics

import pytest
from scipy import stats
from support.played import done

from ebc_lab.config.parts.target import TargetConfig, first_at_or_below
from ebc_lab.study.stages.compare_arms import target_figures
from ebc_lab.study.stages.statistics import below

TARGET = TargetConfig("loss", loss=3.28)
CURVES = {  # seed -> loss at steps 100, 200 and 300; the last is the final one, too
    "0": (3.40, 3.281, 3.276),
    "1": (3.41, 3.280, 3.277),
    "2": (3.40, 3.279, 3.2775),
    "3": (3.42, 3.2805, 3.2765),
}


def arm_of(curves, **outcomes):
    """An arm and its runs' results."""
    results = {}
    for seed, losses in curves.items():
        rows = [[100 * (i + 1), loss, 2.0 * (i + 1)] for i, loss in enumerate(losses)]
        results[f"run {seed}"] = done(losses[-1], curve=rows)
        if seed in outcomes.get("diverged", ()):
            results[f"run {seed}"] |= {"outcome": "diverged", "val_loss": None}
    return {"runs": {seed: f"run {seed}" for seed in curves}}, results


def test_a_run_reaches_a_target_at_the_first_evaluation_at_or_below_it():
    curve = [[10, 3.5, 1.0], [20, None, 2.0], [30, math.nan, 3.0], [40, 3.28, 4.0], [50, 3.0, 5.0]]
    assert first_at_or_below(curve, 3.28) == (40, 4.0)
    assert first_at_or_below(curve, 2.9) is None
    assert TARGET.reached(curve) == {"target_loss": 3.28, "steps_to_target": 40}
    assert TargetConfig("loss", loss=2.9).reached(curve)["steps_to_target"] is None
    assert TargetConfig().reached(curve) == {}


def test_an_arm_has_n_mean_and_spread_of_its_steps_and_p_of_its_final_losses():
    arm, results = arm_of(CURVES)
    figures = target_figures(TARGET, arm, None, results, 256)
    final = [losses[-1] for losses in CURVES.values()]
    assert (figures["target_runs"], figures["target_reached"]) == (4, 4)
    assert (figures["seconds_to_target"], figures["tokens_to_target"]) == (5.0, 250 * 256)
    assert figures["steps_to_target"] == statistics.fmean([300, 200, 200, 300])
    assert figures["steps_to_target_sd"] == pytest.approx(math.sqrt(4 * 50**2 / 3))
    assert figures["target_final_loss"] == pytest.approx(3.27675)
    t = (statistics.fmean(final) - 3.28) * 2 / statistics.stdev(final)
    assert figures["target_p"] == pytest.approx(stats.t.cdf(t, 3))
    assert 0.0005 < figures["target_p"] < 0.01
    loose = TargetConfig("loss", loss=3.28, level=0.01)
    assert target_figures(loose, arm, None, results, 256)["steps_surely_below"] == 300


def test_a_known_sigma_makes_the_z_test_of_the_benchmarks_rules():
    """(3.28 - mean)·√n >= 0.004 there, which is 3.08 of its σ, 0.0013; p < 0.001 needs 3.09 of them."""
    assert below([3.28 - 0.00402], 3.28, 0.0013) < 0.001 < below([3.28 - 0.00401], 3.28, 0.0013)
    four = [3.28 - 0.00402 / 2] * 4
    assert below(four, 3.28, 0.0013) == pytest.approx(below([3.28 - 0.00402], 3.28, 0.0013))
    assert below([3.27], 3.28) is None  # one run alone shows no spread
    assert below([3.27, 3.27], 3.28) is None  # nor do two that are one
    known = TargetConfig("loss", loss=3.28, sigma=0.0013)
    arm, results = arm_of({"0": (3.3, 3.27, 3.26)})
    assert target_figures(known, arm, None, results, 256)["steps_surely_below"] == 200


def test_a_missed_target_leaves_no_mean_and_a_diverged_run_no_p():
    arm, results = arm_of(CURVES | {"1": (3.5, 3.4, 3.3)})
    figures = target_figures(TARGET, arm, None, results, 256)
    keys = ("steps_to_target", "steps_to_target_sd", "seconds_to_target", "tokens_to_target")
    assert {figures[key] for key in keys} == {None}
    assert (figures["target_runs"], figures["target_reached"]) == (4, 3)
    assert figures["target_p"] > 0.1
    arm, results = arm_of(CURVES, diverged=("2",))
    figures = target_figures(TARGET, arm, None, results, 256)
    assert (figures["target_p"], figures["steps_surely_below"]) == (None, None)
    assert (figures["target_runs"], figures["target_reached"]) == (3, 3)  # it reached it, and diverged


def test_steps_are_compared_seed_by_seed():
    arm, results = arm_of(CURVES)
    slow = {seed: (3.5, *losses[:-1], losses[-1]) for seed, losses in CURVES.items()}
    _, others = arm_of(slow)
    reference = {"runs": {seed: f"other {seed}" for seed in slow}}
    results |= {f"other {seed}": others[f"run {seed}"] for seed in slow}
    figures = target_figures(TARGET, arm, reference, results, 256)
    assert figures["steps_difference"] == -100
    # evaluations tell steps no finer: an interval of no width would say that nothing else can be
    assert figures["steps_difference_low"] is figures["steps_difference_high"] is None
    results["other 0"]["curve"] = [[100, 3.5, 2.0], [200, 3.4, 4.0], [300, 3.281, 6.0], [400, 3.27, 8.0]]
    results["other 1"]["curve"] = [[100, 3.5, 2.0], [200, 3.27, 4.0]]
    figures = target_figures(TARGET, arm, reference, results, 256)
    differences = [300 - 400, 200 - 200, 200 - 300, 300 - 400]
    assert figures["steps_difference"] == statistics.fmean(differences)
    ends = figures["steps_difference_low"], figures["steps_difference_high"]
    assert ends == pytest.approx(tuple(stats.ttest_1samp(differences, 0).confidence_interval(0.95)))
    for name in ("run 0", "other 0"):
        results[name]["curve"] = [[100, 3.5, 2.0]]  # neither got there: no word on which is sooner
    assert target_figures(TARGET, arm, reference, results, 256)["steps_difference"] == pytest.approx(-200 / 3)
    for result in results.values():
        result["curve"] = [[100, 3.5, 2.0]]
    assert target_figures(TARGET, arm, reference, results, 256)["steps_difference"] is None
    other, _ = arm_of({"9": (3.3, 3.3, 3.3)})
    assert target_figures(TARGET, other, reference, results, 256)["steps_difference"] is None


def test_seconds_are_set_against_the_references_only_where_every_run_reached_the_target():
    """An arm that takes fewer steps may still take longer: the ratio says it."""
    arm, results = arm_of({"0": (3.2,), "1": (3.3, 3.2), "2": (3.2,)})
    results["run 0"]["curve"] = [[100, 3.2, 12.0]]
    reference, others = arm_of({"0": (3.5, 3.2), "1": (3.2,)})
    reference["runs"] = {seed: f"other {seed}" for seed in reference["runs"]}
    results |= {f"other {run[4:]}": result for run, result in others.items()}
    figures = target_figures(TARGET, arm, reference, results, 256)  # 12 s and 4 s, against 4 s and 2 s
    assert figures["seconds_ratio"] == pytest.approx(math.sqrt(3 * 2))
    results["other 1"]["curve"] = [[0, 3.2, 0.0]]  # its start was there already
    assert target_figures(TARGET, arm, reference, results, 256)["seconds_ratio"] is None
    results["other 1"]["curve"] = [[100, 3.5, 2.0]]
    assert target_figures(TARGET, arm, reference, results, 256)["seconds_ratio"] is None
    assert target_figures(TARGET, arm, None, results, 256)["seconds_ratio"] is None

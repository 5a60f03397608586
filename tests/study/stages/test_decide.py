import math
from dataclasses import replace

import pytest

from ebc_lab.config.compose import compose
from ebc_lab.study.stages import calibrate, lr_scale, lr_sweep, stage_of
from ebc_lab.study.stages.rules import Undecidable, band_distance, best, edge_of, margin_sigma, val_loss


@pytest.fixture(scope="module")
def config():
    config = compose(
        ["scale=laptop", "optimizer=adam", "dtype=float32", "threads_per_run=1", "compile=off", "device=cpu"]
    )
    return replace(config, data=replace(config.data, sha256="0" * 64))


def complete(loss, **more):
    return {
        "outcome": "completed",
        "val_loss": loss,
        "c_median": 1.0,
        "clip_rate": 0.0,
        "kl_median": 0.01,
        **more,
    }


def sweep_specs(config):
    results = {
        s.run_id: complete(2 + abs(s.run.optimizer.lr - 4e-3))
        for s in stage_of("lr_sweep").runs(config, {}, {})
    }
    specs = stage_of("lr_sweep").runs(config, {}, results)
    for i, s in enumerate(specs):
        results.setdefault(s.run_id, complete(2 + 0.01 * i))
    return specs, results


@pytest.mark.parametrize(
    "result",
    [
        None,
        {},
        {"outcome": "completed", "val_loss": math.nan},
        {"outcome": "completed", "val_loss": None},
        {"outcome": "diverged", "val_loss": 0.1},
        {"outcome": "failed", "val_loss": 0.1},
        {"outcome": "lost"},
    ],
)
def test_nothing_but_a_completed_finite_loss_can_win(config, result):
    assert val_loss(result) == math.inf
    specs = stage_of("lr_sweep").runs(config, {}, {})
    results = {s.run_id: result or {} for s in specs}
    assert best(specs, results) is None
    results[specs[2].run_id] = complete(9.0)
    assert best(specs, results) == specs[2]


def test_the_sweep_decision_quotes_noise_from_fresh_seeds_and_the_natural_kl(config):
    specs, results = sweep_specs(config)
    found = lr_sweep.decide(config, specs, results, {})["tracks"]["adam_none"]
    losses = [results[s.run_id]["val_loss"] for s in specs if s.role == "replicate"]
    assert found["lr"] == 4e-3
    assert found["edge"] is None
    assert found["replicate_losses"] == losses
    assert found["sigma"] == pytest.approx(0.01)
    assert found["natural_kl"] == 0.01
    assert found["control"]["lr_scale"] == 1
    assert found["margin_sigma"] == pytest.approx(2e-3 / 0.01)


def test_one_bad_replicate_is_survived_two_are_not(config):
    specs, results = sweep_specs(config)
    bad = [s.run_id for s in specs if s.role == "replicate"]
    results[bad[0]] = {"outcome": "diverged", "val_loss": None, "kl_median": 5.0}
    assert len(lr_sweep.decide(config, specs, results, {})["tracks"]["adam_none"]["replicate_losses"]) == 2
    results[bad[1]] = {"outcome": "failed", "val_loss": None}
    with pytest.raises(Undecidable, match="fewer than two replicates"):
        lr_sweep.decide(config, specs, results, {})


def test_a_stage_without_a_completed_run_says_why(config):
    specs = stage_of("lr_sweep").runs(config, {}, {})
    results = {s.run_id: {"outcome": "failed", "cause": "ImportError: no module"} for s in specs}
    with pytest.raises(Undecidable, match="ImportError"):
        lr_sweep.decide(config, specs, results, {})


def earlier(config):
    specs, results = sweep_specs(config)
    return {"lr_sweep": lr_sweep.decide(config, specs, results, {})}


def test_calibration_takes_the_best_loss_inside_the_band_only(config):
    decisions = earlier(config)
    specs = stage_of("calibrate").runs(config, decisions, {})
    results = {
        s.run_id: complete(2 + i, c_median=c)
        for i, (s, c) in enumerate(zip(specs, (0.2, 0.4, 0.55, 0.65, 0.9), strict=True))
    }
    found = calibrate.decide(config, specs, results, decisions)["tracks"]["adam_none"]
    assert found["run_id"] == specs[2].run_id
    assert found["in_band"]
    assert found["margin_sigma"] == pytest.approx(100)


def test_calibration_outside_the_band_takes_the_nearest_and_says_so(config):
    decisions = earlier(config)
    specs = stage_of("calibrate").runs(config, decisions, {})
    results = {
        s.run_id: complete(2.0, c_median=c) for s, c in zip(specs, (0.1, 0.2, 0.3, 0.45, 0.9), strict=True)
    }
    decision = calibrate.decide(config, specs, results, decisions)
    assert decision["tracks"]["adam_none"]["run_id"] == specs[3].run_id
    assert not decision["tracks"]["adam_none"]["in_band"]
    assert any("nearest" in n for n in decision["notes"])


def scale_stage(config, cs, clip_rates, losses, none_losses):
    decisions = earlier(config)
    specs = stage_of("calibrate").runs(config, decisions, {})
    results = {s.run_id: complete(2.0, c_median=0.6) for s in specs}
    decisions["calibrate"] = calibrate.decide(config, specs, results, decisions)
    specs = stage_of("lr_scale").runs(config, decisions, {})
    results = {}
    for s in specs:
        i = config.lr_scale.scales.index(s.lr_scale)
        if s.role == "ebc":
            results[s.run_id] = complete(losses[i], c_median=cs[i], clip_rate=clip_rates[i])
        else:
            results[s.run_id] = (
                complete(none_losses[i]) if none_losses[i] else {"outcome": "diverged", "val_loss": None}
            )
    return lr_scale.decide(config, specs, results, decisions)


def test_inert_scales_count_as_one_candidate_the_smallest(config):
    decision = scale_stage(config, (0.65, 0.55, 0.6), (1.0, 0.995, 1.0), (2.02, 2.01, 2.0), (2.0, 2.1, None))
    found = decision["tracks"]["adam_none"]
    assert found["lr_scale"] == 1
    assert found["inert"]
    assert found["headroom_is_tautology"]
    assert any("LR inert" in n and "×1, ×2, ×4" in n for n in decision["notes"])


def test_headroom_is_the_largest_scale_within_one_sigma_and_ignores_diverged_runs(config):
    decision = scale_stage(config, (0.9, 0.6, 0.55), (0.5, 0.7, 0.9), (2.0, 2.0, 2.5), (2.0, 2.005, None))
    found = decision["tracks"]["adam_none"]
    assert found["sigma"] == pytest.approx(0.01)
    assert found["headroom"] == {"none": 2.0, "ebc": 2.0}
    assert found["lr_scale"] == 2
    assert not found["headroom_is_tautology"]


def test_without_a_baseline_the_scale_stage_cannot_decide(config):
    with pytest.raises(Undecidable):
        scale_stage(config, (0.9, 0.6, 0.55), (0.5, 0.7, 0.9), (2.0, 2.0, 2.5), (None, 2.0, 2.0))


def test_the_hash_of_a_decision_moves_with_its_inputs(config):
    specs, results = sweep_specs(config)
    first = lr_sweep.decide(config, specs, results, {})
    assert lr_sweep.decide(config, specs, dict(results), {})["inputs_sha256"] == first["inputs_sha256"]
    changed = {**results, specs[0].run_id: complete(7.0)}
    assert lr_sweep.decide(config, specs, changed, {})["inputs_sha256"] != first["inputs_sha256"]


def test_small_rules():
    assert [band_distance(c, (0.5, 0.7)) for c in (0.5, 0.7, 0.6)] == [0, 0, 0]
    assert band_distance(0.4, (0.5, 0.7)) == pytest.approx(0.1)
    assert band_distance(None, (0.5, 0.7)) == math.inf
    assert [edge_of([1, 2, 3], x) for x in (1, 2, 3)] == ["low", None, "high"]
    assert edge_of([1], 1) == "both"
    assert margin_sigma([2.0, math.inf, 2.1], 0.05) == pytest.approx(2)
    assert margin_sigma([2.0], 0.05) is None


def test_a_track_is_triaged_when_it_is_more_than_the_threshold_behind_the_best(config):
    threshold = config.lr_sweep.skip_threshold
    losses = {"best": 2.0, "near": 2.0 * (1 + 0.99 * threshold), "far": 2.0 * (1 + 1.01 * threshold)}
    assert [lr_sweep.triaged(config, losses, track) for track in losses] == [False, False, True]

"""How far the learning rate can rise: the scale that is chosen, the headroom, and the LR windows."""

import pytest
from support.played import (
    DIVERGED,
    FAILED,
    by_lr,
    check_passed_over,
    config_of,
    decided,
    decided_through,
    done,
    played,
)

from ebc_lab.study.stages import lr_scale
from ebc_lab.study.stages.rules import Undecidable
from ebc_lab.study.stages.stage import stage_of

TRACK = "adam_none"
ONE_RATE = ("optimizer=adam", "lr_sweep.baseline_scales=[0.5]", "lr_scale.scales=[1,2,4,8]")


def spread(spec):
    """Losses that decide a sweep: best at 4e-3 (constant: 2e-3), replicates 0.01 apart."""
    return by_lr(4e-3)(spec) | {"surrogate_median": 1.0}


def calibrated(*overrides):
    config = config_of(*ONE_RATE, *overrides)
    return config, decided_through("calibrate", config, spread)


def scaled(ebc, none, c=None, clip_rate=None, overrides=()):
    """The stage's decision, of losses by scale, or what became of a run there."""
    config, decisions = calibrated(*overrides)

    def answer(s):
        loss = (ebc if s.role == "ebc" else none)[s.lr_scale]
        if isinstance(loss, dict):
            return loss
        more = {"clip_rate": (clip_rate or {}).get(s.lr_scale, 0.5)} if s.role == "ebc" else {}
        return done(loss, (c or {}).get(s.lr_scale, 0.6), **more)

    return decided("lr_scale", config, decisions, answer)


LEVEL = {1: 2.0, 2: 2.0, 4: 2.0, 8: 2.0}
LOST = dict.fromkeys(LEVEL, DIVERGED)


@pytest.mark.thorough
@pytest.mark.parametrize("overrides", [(), ("lr_scale.scales=[2,4]",), ("study.lr_schedule=constant",)])
def test_it_asks_for_every_scale_on_the_schedules_that_are_compared(overrides):
    config, decisions = calibrated(*overrides)
    decisions["lr_sweep"]["tracks"][TRACK]["control"]["lr_schedule"]["warmup_steps"] = 77
    _, specs, _ = played("lr_scale", config, decisions, spread)
    scales = config.lr_scale.scales
    assert {s.lr_scale for s in specs if s.role == "ebc"} == {*scales}
    assert {s.lr_scale for s in specs if s.role == "none"} == {1, *scales}  # ×1 whatever the scales
    constant = config.study.lr_schedule == "constant"
    for s in specs:
        assert s.run.lr_schedule.name == ("constant" if constant else "trapezoid")
        warmup = 0 if s.role == "ebc" else 77  # EBC warms up by itself
        assert constant or s.run.lr_schedule.warmup_steps == warmup
        assert s.run.optimizer.lr == pytest.approx(2e-3 * s.lr_scale)
        assert s.run.steps == config.finals.steps
    trained = {s.run_id for s in specs}
    assert (decisions["calibrate"]["tracks"][TRACK]["run_id"] in trained) == (8 in scales)
    assert (decisions["lr_sweep"]["tracks"][TRACK]["run_id"] in trained) == constant  # ×1 is the baseline


def test_the_lowest_loss_of_ebc_is_chosen_or_by_the_band_the_lowest_inside_it():
    losses, by_band = {1: 2.1, 2: 2.0, 4: 1.9, 8: 2.0}, ("calibrate.choose=band",)
    cs = {1: 0.6, 2: 0.6, 4: 0.1, 8: 0.9}
    found = scaled(losses, LEVEL, c=cs)
    assert found["tracks"][TRACK]["lr_scale"] == 4
    assert not found["tracks"][TRACK]["in_band"]
    assert not any("band" in note for note in found["notes"])
    assert found["tracks"][TRACK]["margin_sigma"] == pytest.approx(0.1 / 0.01)
    assert scaled(losses, LEVEL, c=cs, overrides=by_band)["tracks"][TRACK]["lr_scale"] == 2
    found = scaled(losses, LEVEL, c={1: 0.3, 2: 0.2, 4: 0.1, 8: 0.75}, overrides=by_band)
    assert found["tracks"][TRACK]["lr_scale"] == 8
    assert any("the nearest was taken" in note for note in found["notes"])


OUTSIDE = {"c": {1: 0.6, 2: 0.6, 4: 0.1, 8: 0.9}, "overrides": ("calibrate.choose=band",)}
CLIPPED = {"clip_rate": {2: 1.0, 4: 1.0, 8: 1.0}}


@pytest.mark.parametrize(
    ("ebc", "plain", "more", "said"),
    [
        ((2.1, 2.0, 1.9, 2.2), 2.5, OUTSIDE, "×4, 1.9000: its median c, 0.10, is outside the band"),
        ((2.5, 2.02, 2.01, 2.0), 2.5, CLIPPED, "×8, 2.0000: LR inert, ×2 stands for it; 1 more"),
        (
            (2.1, 2.0, 2.1, 2.2),
            1.9,
            {},
            "×1, 1.9000: without EBC, and this stage chooses a scale for EBC; 3 more",
        ),
    ],
)
def test_a_lower_loss_that_was_passed_over_is_named_with_the_reason(ebc, plain, more, said):
    found = scaled(dict(zip(LEVEL, ebc, strict=True)), dict.fromkeys(LEVEL, plain), **more)
    check_passed_over("lr_scale", found, said)


def test_no_scale_is_inert_where_some_of_the_model_moves_freely():
    """What the budget does not hold moves at the learning rate itself, so that the runs differ."""
    clipped, free = dict.fromkeys((1, 2, 4, 8), 1.0), ("budget.grouping=matrices",)
    found = scaled({1: 2.5, 2: 2.02, 4: 2.01, 8: 2.0}, LEVEL, clip_rate=clipped, overrides=free)
    track = found["tracks"][TRACK]
    assert (track["lr_scale"], track["inert"], track["headroom_is_tautology"]) == (8, False, False)
    assert not any("inert" in n for n in found["notes"])
    assert "count as one candidate" not in found["rule"]


def test_a_scale_whose_run_failed_does_not_end_the_window():
    found = scaled({1: 2.0, 2: 2.0, 4: FAILED, 8: 2.0}, {1: 2.0, 2: 2.0, 4: DIVERGED, 8: 2.0})
    windows = found["tracks"][TRACK]["lr_window"]
    assert (windows["ebc"]["octaves"], windows["ebc"]["open_high"]) == (3, True)
    assert (windows["none"]["octaves"], windows["none"]["open_high"]) == (1, False)


@pytest.mark.parametrize(
    ("schedule", "reference", "headroom"), [("trapezoid", 1.99, 4), ("constant", 2.1, 8)]
)
def test_headroom_is_the_largest_scale_within_one_sigma_of_the_best_without_ebc(
    schedule, reference, headroom
):
    """At a constant rate, of the plain run at one."""
    plain = {1: 2.1, 2: 1.99, 4: 1.999, 8: 2.105}
    constant = (f"study.lr_schedule={schedule}",)
    track = scaled({1: 2.0, 2: 2.0, 4: 1.999, 8: 2.5}, plain, overrides=constant)["tracks"][TRACK]
    assert track["sigma"] == pytest.approx(0.01)
    assert track["baseline_val_loss"] == reference
    assert track["headroom"] == {"none": headroom, "ebc": 4.0}
    assert not track["headroom_is_tautology"]


def test_the_windows_of_both_arms_are_in_octaves_and_say_where_they_are_open():
    found = scaled({1: 2.06, 2: 2.0, 4: 2.0, 8: 2.0}, {1: 2.0, 2: 2.04, 4: DIVERGED, 8: DIVERGED})
    windows = found["tracks"][TRACK]["lr_window"]
    assert (windows["none"]["low"], windows["none"]["high"]) == (1, 2)
    assert (windows["none"]["open_low"], windows["none"]["open_high"]) == (True, False)
    assert windows["ebc"]["low"] == pytest.approx(2 ** (1 / 6))
    assert windows["ebc"]["open_high"]
    [headline] = stage_of("lr_scale").headlines(found)
    assert "LR window without EBC ≥ 1.0 octaves, with EBC ≥ 2.8 octaves" in headline
    assert "within one σ of the best without EBC): without EBC ×1, with EBC " in headline
    assert "none" not in headline.removeprefix("adam_none")
    shown = {label: (figure, remark) for label, figure, remark in lr_scale.STAGE.rows(TRACK, found)}
    assert shown["LR window, without EBC"][0] == "1.0 octaves"
    assert "open at the low end" in shown["LR window, without EBC"][1]


@pytest.mark.parametrize("losses", [(LEVEL, LOST), (LOST, LEVEL)])
def test_without_a_completed_plain_run_or_ebc_run_the_stage_cannot_decide(losses):
    with pytest.raises(Undecidable):
        scaled(*losses)

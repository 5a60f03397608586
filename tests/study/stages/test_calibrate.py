"""The calibration: δ* by loss over a grid that grows at its edges; or, as published, by the band of c."""

import pytest
from support.played import DIVERGED, FAILED, by_lr, check_passed_over, config_of, decided, done, played

from ebc_lab.study.inspect.forecast import planned
from ebc_lab.study.stages.calibrate import STAGE
from ebc_lab.study.stages.rules import Undecidable
from ebc_lab.study.stages.stage import stage_of

BAND = ("calibrate.choose=band", "calibrate.multiples=[0.75,1,1.25,1.5,2]", "calibrate.lr_scale=2")


def trained(answer, *overrides):
    """What the stage is given to decide after a sweep whose natural KL is 0.01 and whose baseline is 2e-3,
    and its waves."""
    config = config_of("optimizer=adam", "lr_sweep.baseline_scales=[0.5]", *overrides)
    decisions = {"lr_sweep": decided("lr_sweep", config, {}, by_lr(4e-3))}
    waves, specs, results = played("calibrate", config, decisions, answer)
    return (config, specs, results, decisions), waves


def calibrated(answer, *overrides):
    """Its runs' targets, its decision, and what that holds of the only track."""
    given, _ = trained(answer, *overrides)
    decision = STAGE.decide(*given)
    return [s.run.budget.target_kl for s in given[1]], decision, decision["tracks"]["adam_none"]


def nearest(best, at=None, fate=None):
    """The nearer to this δ*, the better; what becomes of the runs at another."""
    return lambda s: (
        fate if s.run.budget.target_kl == at else done(2 + abs(s.run.budget.target_kl - best), 0.2)
    )


# -- by loss -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("best", "more"),
    [
        (0.021, [0.025]),  # 0.02·0.02/0.016
        (1.0, [0.025, 0.0313, 0.0392]),
        (0.0095, [0.008]),  # 0.01·0.01/0.0125
        (1e-3, [0.008, 0.0064, 0.00512]),
    ],
)
def test_a_best_on_the_edge_extends_the_grid_at_its_own_spacing(best, more):
    given, waves = trained(nearest(best))
    assert [wave[0].run.budget.target_kl for wave in waves[1:]] == pytest.approx(more)
    assert all(len(wave) == 1 for wave in waves[1:])
    decision = STAGE.decide(*given)
    on_edge = len(more) == given[0].calibrate.max_extra
    assert (decision["tracks"]["adam_none"]["edge"] is not None) == on_edge
    assert any("est tried" in note for note in decision["notes"]) == on_edge


def test_a_target_of_which_one_seed_diverged_does_not_win():
    def answer(s):
        unlucky = (s.run.budget.target_kl, s.run.seed) == (0.016, 101)
        return DIVERGED if unlucky else nearest(0.016)(s)

    assert calibrated(answer, "calibrate.seeds=2")[2]["delta_star"] == 0.0125


def test_a_target_whose_run_failed_does_not_end_the_window_and_one_that_diverged_was_tried():
    _, _, found = calibrated(nearest(0.016, at=0.0125, fate=FAILED))
    assert found["delta_window"]["open_low"]
    assert found["delta_window"]["low"] == 0.01
    # the one below it is no edge: the grid does not grow there, and the δ* window ends there
    targets, _, found = calibrated(nearest(1.0, at=0.02, fate=DIVERGED))
    assert len(targets) == 4
    assert (found["delta_star"], found["edge"]) == (0.016, None)
    assert not found["delta_window"]["open_high"]
    assert found["delta_window"]["open_low"]
    assert "0.02" not in found["losses"]


@pytest.mark.parametrize("losses", [{"tracked": 2.0, "shadow": 1.9}, {"tracked": 1.9, "shadow": 2.0}])
def test_budgets_at_the_same_target_are_told_apart(losses):
    def answer(s):
        return done(losses[s.run.budget.name] + abs(s.run.budget.target_kl - 0.0125))

    _, _, found = calibrated(answer, "calibrate.budgets=[tracked,shadow]")
    assert (found["budget"], found["val_loss"]) == (min(losses, key=losses.get), 1.9)
    assert found["by_budget"] == {"tracked": 0.0125, "shadow": 0.0125}
    assert found["margin_sigma"] == pytest.approx(0.0025 / found["sigma"])


def test_targets_below_what_the_budget_can_hold_are_raised_to_it_once():
    targets, _, _ = calibrated(nearest(0.0), "calibrate.multiples=[0.0005,0.001,1]")
    assert targets == [2e-5, 0.01]  # 1e-6 where hold_decay ends, at a twentieth; none lower is tried


@pytest.mark.parametrize("bad", [DIVERGED, FAILED], ids=["diverged", "failed"])
def test_runs_that_all_went_wrong_neither_extend_nor_stall(bad):
    given, waves = trained(lambda s: bad)
    assert len(waves) == 1
    with pytest.raises(Undecidable, match="calibrate could not decide"):
        STAGE.decide(*given)


@pytest.mark.parametrize(
    ("override", "losses", "c", "said"),
    [
        ("calibrate.seeds=2", {100: 1.9, 101: None}, 0.6, "seed 101 diverged there"),
        ("calibrate.seeds=2", {100: 1.9, 101: 2.3}, 0.6, "the mean of its seeds is 2.1000"),
        ("calibrate.choose=band", {100: 1.9}, 0.9, "its median c, 0.90, is outside the band"),
    ],
)
def test_a_lower_loss_that_was_passed_over_is_named_with_the_reason(override, losses, c, said):
    def answer(s):
        if s.run.budget.target_kl != 0.016:
            return done(2.0 if s.run.budget.target_kl == 0.0125 else 2.5)
        loss = losses[s.run.seed]
        return DIVERGED if loss is None else done(loss, c)

    _, decision, _ = calibrated(answer, "calibrate.max_extra=0", override)
    check_passed_over("calibrate", decision, f"δ* 0.016, 1.9000: {said}")


def test_another_tracks_candidate_is_not_passed_over():
    config = config_of("lr_sweep.keep=all")
    decisions = {"lr_sweep": decided("lr_sweep", config, {}, by_lr(8e-3))}
    decision = decided("calibrate", config, decisions, lambda s: done(1.5 if s.track == "muon_none" else 2.0))
    assert len(decision["tracks"]) == 2
    assert not any("passed over" in line for line in stage_of("calibrate").headlines(decision))


def test_a_track_without_a_completed_run_is_left_out():
    config = config_of("lr_sweep.keep=all")
    decisions = {"lr_sweep": decided("lr_sweep", config, {}, by_lr(8e-3))}

    def answer(s):
        return DIVERGED if s.run.optimizer.name == "adam" else nearest(0.0125)(s)

    decisions["calibrate"] = decided("calibrate", config, decisions, answer)
    assert list(decisions["calibrate"]["tracks"]) == ["muon_none"]
    assert {s.track for s in stage_of("lr_scale").runs(config, decisions, {})} == {"muon_none"}


# -- by the band ---------------------------------------------------------------------------------------------


def in_band(cs):
    """These median c, by rising δ*, with rising losses."""
    at = {}

    def answer(s):
        nth = at.setdefault(s.run.budget.target_kl, len(at))
        return done(2.0 + nth, cs[nth])

    return answer


def test_by_the_band_the_best_loss_inside_it_wins_and_outside_of_it_the_nearest_as_is_said():
    _, _, found = calibrated(in_band((0.2, 0.4, 0.55, 0.65, 0.9)), *BAND)
    assert (found["delta_star"], found["in_band"]) == (0.0125, True)
    assert found["margin_sigma"] == pytest.approx(1.0 / found["sigma"])
    outside = in_band((0.1, 0.2, 0.3, 0.45, 0.9))
    _, decision, found = calibrated(outside, *BAND, "calibrate.max_extra=0")
    assert (found["delta_star"], found["in_band"]) == (0.015, False)
    assert any("nearest" in n for n in decision["notes"])


def test_by_the_band_the_stages_own_seed_says_where_c_lies():
    def answer(s):
        return done(2.0, 0.6 if s.run.seed == 101 else 0.1)

    targets, _, _ = calibrated(answer, *BAND, "calibrate.seeds=2", "calibrate.max_extra=1")
    assert len(targets) == 2 * (5 + 1)


# -- the forecast --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["loss", "band"])
def test_the_forecast_knows_how_often_it_may_extend(rule):
    config = config_of("optimizer=adam", f"calibrate.choose={rule}", "study.name=nowhere")
    found = planned(config)["stages"]["calibrate"]
    grid = len(config.calibrate.multiples)
    runs = [found[k]["runs"] for k in ("min", "expected", "max")]
    assert runs == [grid, grid + 1, grid + config.calibrate.max_extra]

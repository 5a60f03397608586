"""The sweep: the grid at its own length; then, at the finals', constant rates, replicates, and the search for
the fair control, one factor at a time; and what is said of an optimizer that loses the grid."""

import pytest
from support.played import DIVERGED, FAILED, by_lr, config_of, decided, done, played, rates

from ebc_lab.study.stages.lr_sweep import STAGE
from ebc_lab.study.stages.rules import Undecidable
from ebc_lab.study.stages.stage import stage_of

BEST = 4e-3


@pytest.fixture(scope="module")
def config():
    return config_of("optimizer=adam")


def swept(config, answer):
    """The sweep's runs, its decision and what that holds of Adam."""
    _, specs, results = played("lr_sweep", config, {}, answer)
    decision = STAGE.decide(config, specs, results, {})
    return specs, decision, decision["tracks"].get("adam_none")


def controls(specs):
    """(lr, schedule, warm-up) of the control's runs, in the order they were asked for."""
    own = [s.run for s in specs if s.role == "control"]
    return [(run.optimizer.lr, run.lr_schedule.name, run.lr_schedule.warmup_steps) for run in own]


def landscape(peak=BEST, warmup=100):
    """Grid and control are best at `peak`, with this warm-up, on a trapezoid; constant rates at BEST / 4."""

    def answer(spec):
        run = spec.run
        at = BEST / 4 if spec.role in ("baseline", "replicate") else peak
        loss = 2 + 10 * abs(run.optimizer.lr - at) + 1e-3 * (run.seed % 10)
        if spec.role == "control":
            loss += 1e-3 * (run.lr_schedule.warmup_steps != warmup) + 1e-3 * (
                run.lr_schedule.name != "trapezoid"
            )
        return done(loss, 1.0)

    return answer


# -- the grid ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slope", "lrs"), [(-1, [4e-3, 8e-3]), (1, [2.5e-4, 5e-4])])
def test_a_winner_on_the_edge_extends_the_grid_twice_at_most(slope, lrs):
    config = config_of("optimizer=adam", "lr_sweep.grids.adam=[1e-3,2e-3]")
    specs, decision, track = swept(config, lambda s: done(2 + slope * s.run.optimizer.lr))
    assert sorted(rates(specs, "grid")) == sorted([1e-3, 2e-3, *lrs])
    edge = "high" if slope < 0 else "low"
    assert track["grid"]["edge"] == edge
    assert any(f"lies on its {edge} edge even after 2 extensions" in note for note in decision["notes"])


@pytest.mark.parametrize(("behind", "goes_on"), [(0.99, True), (1.01, False)], ids=["near", "triaged"])
def test_a_pair_further_behind_than_the_threshold_is_not_extended_and_does_not_go_on(behind, goes_on):
    config = config_of("lr_sweep.keep=all")
    adam = 2.0 * (1 + behind * config.lr_sweep.skip_threshold)

    def answer(s):
        return done(adam + 1e-3 - s.run.optimizer.lr / 8 if s.track == "adam_none" else 2.0)

    specs, decision, _ = swept(config, answer)
    assert (max(s.run.optimizer.lr for s in specs if s.track == "adam_none") > 8e-3) == goes_on
    assert list(decision["tracks"]) == ["muon_none", "adam_none"][: 1 + goes_on]
    assert any("triaged" in note for note in decision["notes"]) != goes_on


# -- the baseline --------------------------------------------------------------------------------------------


def test_one_constant_rate_is_compared_with_nothing_of_another_length_and_not_called_the_best():
    config = config_of("optimizer=adam", "lr_sweep.baseline_scales=[0.5]", "lr_sweep.replicates=2")
    _, decision, track = swept(config, landscape())
    assert (track["ranked"], track["margin_sigma"], track["edge"]) == ([track["run_id"]], None, None)
    [said] = stage_of("lr_sweep").headlines(decision)
    assert said.startswith("Adam: baseline (the only constant rate tried): lr ")
    assert "σ (its spread over 2 seeds)" in said
    assert "runner-up" not in said
    assert "a constant rate 0.5 times the grid's best (no other is tried)" in decision["rule"]
    _, _, track = swept(config_of("study=published"), landscape())  # its baseline is the grid's own winner
    assert len(track["ranked"]) > 1
    assert track["margin_sigma"] > 0


def test_the_noise_and_the_natural_kl_are_those_of_fresh_seeds_of_the_baseline(config):
    """One of them may be bad, two may not."""
    _, specs, results = played("lr_sweep", config, {}, landscape())
    own = [s for s in specs if s.role == "replicate"]
    assert [s.run.seed for s in own] == [101, 102, 103]
    for i, s in enumerate(own):
        results[s.run_id] = done(2 + 0.01 * i, kl_median=0.01 * (i + 1), descent_median=0.1 * (i + 1))
    found = STAGE.decide(config, specs, results, {})["tracks"]["adam_none"]
    assert found["replicate_losses"] == pytest.approx([2.0, 2.01, 2.02])
    assert found["sigma"] == pytest.approx(0.01)
    assert found["natural_kl"] == 0.02
    assert found["descent_median"] == 0.2
    assert found["margin_sigma"] == pytest.approx(10 * 5e-4 / 0.01)  # to the next constant rate
    results[own[0].run_id] = DIVERGED
    assert len(STAGE.decide(config, specs, results, {})["tracks"]["adam_none"]["replicate_losses"]) == 2
    results[own[1].run_id] = FAILED
    with pytest.raises(Undecidable, match="fewer than two replicates"):
        STAGE.decide(config, specs, results, {})


# -- the fair control ----------------------------------------------------------------------------------------


def test_the_control_is_searched_one_factor_at_a_time_each_from_the_best_so_far(config):
    specs, _, track = swept(config, landscape(peak=4e-3, warmup=20))
    assert controls(specs) == [
        (4e-3, "trapezoid", 100),  # ×1 and ×2 of the grid's best, a sixth of the run
        (8e-3, "trapezoid", 100),
        (2e-3, "trapezoid", 100),  # the best lay on the lower edge
        (4e-3, "trapezoid", 20),  # the other warm-ups at the best peak
        (4e-3, "trapezoid", 200),
        (4e-3, "warmup_linear", 20),  # the other shape with the best of these
        (2e-3, "trapezoid", 20),  # the warm-up changed: its peaks once more
        (8e-3, "trapezoid", 20),
    ]
    control = track["control"]
    assert control["lr_schedule"] == {"name": "trapezoid", "warmup_steps": 20, "decay_share": 0.4}
    assert (control["lr"], control["edge"], control["longest_warmup"]) == (4e-3, None, False)
    assert control["lr_scale"] == 4  # times the best constant rate
    assert [point["lr"] for point in control["grid"]] == [lr for lr, _, _ in controls(specs)]


def test_the_longest_warm_up_of_all_is_said_unless_the_study_does_not_use_the_control(config):
    _, decision, track = swept(config, landscape(warmup=200))
    assert track["control"]["longest_warmup"]
    assert "adam_none: the fair control has the longest warm-up that was tried" in decision["notes"]
    _, decision, track = swept(
        config_of("study=optimizers", "lr_sweep.optimizers=[adam]"), landscape(warmup=200)
    )
    assert track["control"]["used"] is False
    assert "control" not in stage_of("lr_sweep").headlines(decision)[0]
    assert not any("control" in note for note in decision["notes"])


def test_schedules_that_are_the_same_in_steps_are_one_run():
    one = ["lr_sweep.control_scales=[1]", "lr_sweep.control_shapes=[cosine]", "lr_sweep.control_warmups=[7]"]
    specs, _, track = swept(config_of("optimizer=adam", *one), landscape())
    assert controls(specs) == [(4e-3, "cosine", 7)]
    assert (track["control"]["edge"], track["control"]["longest_warmup"]) == (None, False)
    config = config_of("optimizer=adam", "finals.steps=120")  # a sixth of it is 20 steps, another warm-up
    specs, _, _ = swept(config, landscape(warmup=20))
    assert len(controls(specs)) == len(set(controls(specs)))


# -- who is dropped ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("behind", "told_apart"), [(0.02, False), (0.3, True)])
def test_an_optimizer_that_loses_the_grid_is_named_with_what_it_lacked_there(behind, told_apart):
    def answer(spec):
        """Muon is `behind` on the short grid; long runs are 0.5 better; the control is worse by 0.1."""
        if spec.role == "grid":
            muon = spec.track == "muon_none"
            off = abs(spec.run.optimizer.lr / (1.6e-2 if muon else 4e-3) - 1)
            return done(2.5 + off + behind * muon)
        return done(2.0 + 0.01 * (spec.run.seed % 100) + 0.1 * (spec.role == "control"))

    _, decision, track = swept(config_of("lr_sweep.optimizers=[adam,muon]"), answer)
    [pair] = track["dropped"]
    assert pair["behind"] == pytest.approx(behind)
    assert pair["behind_sigma"] == pytest.approx(behind / track["sigma"])
    assert pair["told_apart"] == told_apart
    [headline] = stage_of("lr_sweep").headlines(decision)
    assert f"dropped: muon_none, {behind:.4f} nats" in headline
    assert ("not told apart" in headline) != told_apart
    assert any("lr_sweep.keep=all" in note for note in decision["notes"]) != told_apart
    # counted on the grid alone: not its loss there less the baseline's of the long run
    [change] = stage_of("lr_sweep").would_change(decision)
    assert f"muon_none would have had to be {behind:.4f} nats better on the grid" in change
    assert f"{behind + 0.5:.4f}" not in change
    assert any("0.1000 nats worse than the constant baseline" in note for note in decision["notes"])
    assert "worse than the baseline" in headline


# -- what goes wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [DIVERGED, FAILED], ids=["diverged", "failed"])
@pytest.mark.parametrize("nth", range(17))
def test_one_bad_run_neither_stalls_nor_crashes_the_sweep_and_never_wins(config, bad, nth):
    seen = []

    def answer(s):
        seen.append(s)
        return bad if len(seen) == nth + 1 else landscape(warmup=20)(s)

    specs, _, track = swept(config, answer)
    assert seen[nth].run_id not in (track["run_id"], track["control"]["run_id"])
    assert {s.role for s in specs} == {"grid", "baseline", "replicate", "control"}


@pytest.mark.parametrize(
    ("role", "fate", "words"),
    [
        ("grid", FAILED, "a bug"),
        ("control", DIVERGED, "no run of adam_none with a scheduled learning rate completed"),
        ("baseline", DIVERGED, "no run of adam_none with a constant learning rate completed"),
    ],
)
def test_without_a_completed_grid_control_or_baseline_it_says_so(config, role, fate, words):
    with pytest.raises(Undecidable, match=words):
        swept(config, lambda s: fate if s.role == role else landscape()(s))


def test_a_track_without_a_control_is_dropped_and_said_while_another_goes_on():
    def answer(s):
        return DIVERGED if (s.role, s.track) == ("control", "adam_none") else by_lr(8e-3)(s)

    decision = decided("lr_sweep", config_of("lr_sweep.keep=all"), {}, answer)
    assert list(decision["tracks"]) == ["muon_none"]
    assert any("no run of adam_none with a scheduled" in note for note in decision["notes"])

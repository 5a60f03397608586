"""Suites: what arms become, how each is tuned, what is copied from another arm's record, and what is
concluded."""

import json
import math
from dataclasses import replace

import pandas as pd
import pytest
from support.played import SWEPT, played

from ebc_lab.config.compose import compose
from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import with_derived_settings
from ebc_lab.config.schema import ArmConfig
from ebc_lab.config.study_checks import validate
from ebc_lab.records.columns import PART_FIGURES
from ebc_lab.records.streams import read_columns
from ebc_lab.report.conclude import concluding
from ebc_lab.report.kinds.suite import answer_of
from ebc_lab.study.autopilot import autopilot
from ebc_lab.study.stages import ablation
from ebc_lab.study.stages.stage import stage_of
from ebc_lab.study.stages.suite import arm_run

EBC = {"stabilizer": {"name": "ebc"}}
WARM = {"name": "trapezoid", "warmup_share": 0.25}
TERNARY = {"name": "ternary"}
NORM_CLIP = {"stabilizer": {"name": "norm_clip"}}
ARMS = {
    "plain": ArmConfig(about="nothing"),
    "ebc": ArmConfig(lr_scale=2, delta=0.5, settings=EBC),
    "traced": ArmConfig(
        lr_scale=2, versus="ebc", settings={**EBC, "budget": {"name": "surrogate", "target_kl": 0.002}}
    ),
    "own": ArmConfig(replay="ebc"),
    "next": ArmConfig(replay="ebc", replay_seed="next"),
    "matched": ArmConfig(matched="ebc", settings=NORM_CLIP),
    "tuned": ArmConfig(settings=NORM_CLIP, tune={"lr_scale": [0.5, 1], "strength": [0.1, 10]}),
    "uncorrected": ArmConfig(settings={"optimizer": {"name": "adam_uncorrected"}}),
}
TRACK = SWEPT | {"lr": 1e-2}  # which a suite builds on
DECIDED = {"lr_sweep": {"tracks": {"adam_none": TRACK}, "inputs_sha256": "x"}}
ONCE = {"seeds": 1, "max_extensions": 0}


def suite(tiny, arms=ARMS, *overrides, reference="plain", tune=ONCE, **more):
    """A study that consists of a suite, on a text that is named and not read. `more`: its sweeps."""
    named = ["data.sha256=" + "0" * 64, "dtype=float32", "launcher=inline", "seeds=[3,5]"]
    config = compose([*tiny, *named, *overrides])
    config = replace(
        config,
        study=replace(config.study, stages=["lr_sweep", "tune", "ablation"]),
        tune=replace(config.tune, steps=20, **tune),
        ablation=replace(config.ablation, steps=30, arms=dict(arms), reference=reference, **more),
    )
    validate(config, study=True)
    return config


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory, own_places):
    """A finished suite, trained once, and its outcome."""
    config = suite(tiny, ARMS, f"output_dir={tmp_path_factory.mktemp('suites')}", "study.name=done")
    config = replace(config, data=replace(config.data, sha256=None))
    return config, autopilot(config, concluding())


def arms_of(outcome):
    return outcome.study.decisions()["ablation"]["tracks"]["adam_none"]["arms"]


def records(outcome, label):
    """Seed -> what a run of the arm recorded, step by step."""
    runs = arms_of(outcome)[label]["runs"]
    return {seed: read_columns(outcome.study.run_dir(run) / "steps.csv") for seed, run in runs.items()}


def spec_of(outcome, label, seed):
    return outcome.study.spec(arms_of(outcome)[label]["runs"][seed])["config"]


def run_of_arm(config, decisions, arm):
    return arm_run(config, decisions, "adam_none", arm, 30, 3, {})[0]


def test_delta_counts_in_what_was_calibrated_where_there_is_a_calibration(tiny):
    config = suite(tiny)
    found = {"delta_star": 0.5, "budget": "shadow", "by_budget": {"shadow": 0.5, "surrogate": 0.8}}
    calibrated = {**DECIDED, "calibrate": {"tracks": {"adam_none": found}}}
    assert run_of_arm(config, calibrated, ARMS["ebc"]).budget.target_kl == 0.25
    assert run_of_arm(config, calibrated, ARMS["traced"]).budget.target_kl == 0.002  # said outright
    # each budget by its own calibration; without one by that of another that measures too, else the winner's
    for budget, target in {"surrogate": 0.8, "tracked": 0.5, "fisher": 0.5}.items():
        arm = ArmConfig(settings={**EBC, "budget": {"name": budget}})
        assert run_of_arm(config, calibrated, arm).budget.target_kl == target


@pytest.mark.parametrize(
    ("arm", "words"),
    [
        ({"settings": {"optimiser": {}}}, "ablation.arms.b: optimiser is not a setting"),
        ({"settings": {"stabilizer": {"name": "agg"}}}, "did you mean agc"),
        ({"settings": {"stabilizer": "agc"}}, "stabilizer: {name: agc}"),
        ({"delta": 2}, "delta goes with stabilizer ebc"),
        ({"lr_scale": -1}, "lr_scale must be"),
        ({"replay": "c"}, "replay=c is unknown"),
        ({"tune": {"rate": [1]}}, "tune.rate is no setting of a part"),
        ({"tune": {"lr_scale": ["x"]}}, "tune.lr_scale must be a finite number"),
        ({"tune": {"strength": [1, 2]}}, "goes with a stabilizer that has one"),
        ({"tune": {"delta": [1, 2]}}, "goes with stabilizer ebc"),
        ({"matched": "plain"}, "goes with stabilizer norm_clip"),
        ({"replay": "plain", "tune": {"lr_scale": [1, 2]}}, "nothing to tune"),
        ({"delta": 2, "settings": {**EBC, "budget": {"target_kl": 0.1}}}, "leave one out"),
        ({"settings": {**EBC, "budget": {"guard": "shrink"}}}, "budget.guard goes with budget=surrogate"),
        ({"tuned_as": "plain"}, "tuned_as=plain: there is no such arm"),
        ({"batch_scale": 0.01}, "probe_sequences must leave rows"),
        ({"control": True, "settings": {"lr_schedule": WARM}}, "leave settings.lr_schedule out"),
    ],
)
def test_an_arm_that_cannot_run_is_refused(tiny, arm, words):
    with pytest.raises(UserError, match=words):
        suite(tiny, {"plain": ArmConfig(), "b": ArmConfig(**arm)})


def test_a_suite_has_two_arms_at_least_under_plain_names(tiny):
    with pytest.raises(UserError, match="at least two arms"):
        suite(tiny, {"plain": ArmConfig()})
    with pytest.raises(UserError, match="lower-case"):
        suite(tiny, {"plain": ArmConfig(), "B b": ArmConfig()})


def test_a_baseline_that_promises_no_decrease_leaves_energy_without_its_gain(tiny):
    arm = ArmConfig(settings={**EBC, "controller": {"name": "energy"}})
    for descent in (None, -0.1):
        uphill = {"lr_sweep": {"tracks": {"adam_none": {**TRACK, "descent_median": descent}}}}
        run = run_of_arm(suite(tiny), uphill, arm)
        assert run.controller.a is None  # the run then fails and says what is missing
    doubled = run_of_arm(suite(tiny), DECIDED, replace(arm, delta=2))  # its start is a multiple of its gain
    assert doubled.controller.a == pytest.approx(2 * 0.02 / 0.1)


@pytest.mark.thorough
def test_a_suite_leaves_its_table_and_says_what_was_found(done, results_schema):
    config, outcome = done
    root = outcome.study.root
    assert outcome.failed == []
    table = pd.read_csv(root / "ablation.csv").set_index("arm")
    assert list(table.index) == ["plain", "ebc", "traced", "tuned", "uncorrected", "own", "next", "matched"]
    assert (table["completed"] == 2).all()
    arms = arms_of(outcome)
    for label, row in table.iterrows():
        losses = [outcome.study.result(r)["test_loss"] for r in arms[label]["runs"].values()]
        assert row["test_loss"] == pytest.approx(sum(losses) / 2)
    reference = [outcome.study.result(r)["test_loss"] for r in arms["plain"]["runs"].values()]
    ebc = [outcome.study.result(r)["test_loss"] for r in arms["ebc"]["runs"].values()]
    gaps = [a - b for a, b in zip(ebc, reference, strict=True)]
    assert table.loc["ebc", "difference"] == pytest.approx(sum(gaps) / 2)
    half = 12.706 * abs(gaps[0] - gaps[1]) / 2  # t of one degree of freedom at 97.5%
    assert all(d["comparisons"] == 7 for a in arms.values() if (d := a["difference"]))
    assert table.loc["ebc", "high"] - table.loc["ebc", "low"] == pytest.approx(2 * half, rel=1e-3)
    assert pd.isna(table.loc["plain", "difference"])
    assert table.loc["traced", "versus"] == "ebc"
    assert table.loc["traced", "surrogate_late"] > 0
    assert pd.read_csv(root / "summary_ablation.csv").shape[0] == 16
    results = json.loads((root / "results_final.json").read_text())
    assert results["stage"] == "ablation"
    results_schema.validate(results)
    assert not (root / "acceptance.json").exists()
    assert "for all 7 comparisons at once" in outcome.study.decisions()["ablation"]["rule"]
    assert config.study.stages == list(outcome.study.decisions())


def test_the_best_point_of_a_grid_is_what_runs(done):
    _, outcome = done
    tuned = outcome.study.decisions()["tune"]["tracks"]["adam_none"]["arms"]["tuned"]
    assert tuned["runs"] == 4
    summary = pd.read_csv(outcome.study.root / "summary_tune.csv")
    assert tuned["val_loss"] == pytest.approx(summary["val_loss"].min(), rel=1e-8)
    run = spec_of(outcome, "tuned", "3")
    best = outcome.study.decisions()["lr_sweep"]["tracks"]["adam_none"]["lr"]
    assert run["stabilizer"]["name"] == "norm_clip"
    assert run["stabilizer"]["strength"] == tuned["point"]["strength"]
    assert run["optimizer"]["lr"] == pytest.approx(best * tuned["point"]["lr_scale"])


def test_a_replay_applies_what_was_recorded(done):
    _, outcome = done
    source, own, following = (records(outcome, label) for label in ("ebc", "own", "next"))
    assert (source["3"]["c"] < 0.999).any()
    for seed, other in (("3", "5"), ("5", "3")):
        assert list(own[seed]["lr"]) == pytest.approx(list(source[seed]["eta_eff"]), rel=1e-8)
        assert list(following[seed]["lr"]) == pytest.approx(list(source[other]["eta_eff"]), rel=1e-8)
        assert (own[seed]["c"] == 1).all()
        # Adam's step is proportional to the learning rate: the same run, up to rounding
        assert own[seed]["loss"] == pytest.approx(source[seed]["loss"], rel=1e-3)
    assert following["3"]["loss"][-1] != pytest.approx(source["3"]["loss"][-1], rel=1e-6)


def test_a_matched_arm_clips_as_often_as_its_model_would_have(done):
    _, outcome = done
    for seed, steps in records(outcome, "ebc").items():
        strength = spec_of(outcome, "matched", seed)["stabilizer"]["strength"]
        clipped = (steps["c"] < 0.999).mean()
        assert (steps["grad_norm"] > strength).mean() == pytest.approx(clipped, abs=1.5 / len(steps["c"]))


def invented(config, loss, **more):
    """Decisions and results by the loss of each run, None where it diverged."""
    decisions, results = dict(DECIDED), {}
    quantiles = [i / 40 for i in range(41)]

    def answer(s):
        value = loss(s)
        known = None if value is None or math.isnan(value) else value  # JSON has no NaN
        ends = {"outcome": "completed" if value is not None else "diverged", "clip_rate": 0.5}
        return {**ends, "val_loss": known, "test_loss": known, "grad_norm_quantiles": quantiles, **more}

    for stage in ("tune", "ablation"):
        _, specs, found = played(stage, config, decisions, answer)
        decisions[stage] = stage_of(stage).decide(config, specs, found, decisions)
        results |= found
    return decisions, results


def suite_found(config, loss, **more):
    """The track of such a suite."""
    return invented(config, loss, **more)[0]["ablation"]["tracks"]["adam_none"]


def test_what_diverged_lacks_or_rests_on_one_seed_is_noted_and_never_averaged_away(tiny):
    config = suite(tiny)
    lowest = {("plain", 3), ("traced", 5)}
    lost = {("uncorrected", 5), ("ebc", 3), ("ebc", 5)}

    def loss(s):
        key = s.role, s.run.seed
        return None if key in lost else 1.0 if key in lowest else 2.0 + s.run.optimizer.lr

    decisions, results = invented(config, loss)
    track, notes = decisions["ablation"]["tracks"]["adam_none"], decisions["ablation"]["notes"]
    arm = track["arms"]["uncorrected"]
    assert arm["difference"]["diverged"] == {"arm": 1, "reference": 0}
    assert arm["difference"]["mean"] is None
    assert "uncorrected: 1 of 2 seeds diverged" in notes
    assert not {"own", "next", "matched"} & {s.role for s in ablation.STAGE.runs(config, decisions, results)}
    assert "own could not be made: no run that it copies completed" in notes
    assert track["best_by_seed"] == {"3": "plain", "5": "traced"}
    assert any("one seed alone" in note for note in notes)
    assert "tuned's best lr_scale, 0.5, lies on its grid's low edge" in decisions["tune"]["notes"]


def test_a_point_is_the_mean_of_its_seeds_and_one_that_diverged_or_is_no_number_counts(tiny):
    def loss(s):
        good = {(0.5, 0.1): (1.0, 2.2), (0.5, 10): (1.5, None), (1, 0.1): (1.4, 1.6), (1, 10): (1, math.nan)}
        own = good.get((s.lr_scale, s.run.stabilizer.strength), (2.0, 2.0))
        return own[s.run.seed - 100] if s.stage == "tune" else 2.0

    decisions, _ = invented(suite(tiny, tune={"seeds": 2, "max_extensions": 0}), loss)
    found = decisions["tune"]["tracks"]["adam_none"]["arms"]["tuned"]
    assert found["point"] == {"lr_scale": 1.0, "strength": 0.1}
    assert (found["val_loss"], found["runs"]) == (pytest.approx(1.5), 8)


def test_an_extension_changes_one_setting_and_keeps_the_best_of_the_others(tiny):
    config = suite(tiny, tune={"seeds": 1, "max_extensions": 1})
    low = (0.5, 10)
    _, results = invented(config, lambda s: 1.0 if (s.lr_scale, s.run.stabilizer.strength) == low else 2.0)
    specs = stage_of("tune").runs(config, DECIDED, results)
    assert [(s.lr_scale, s.run.stabilizer.strength) for s in specs[4:]] == [(0.25, 10), (0.5, 1000)]


def test_an_arm_may_be_longer_wider_and_of_a_larger_batch(tiny):
    config = suite(tiny)
    arm = ArmConfig(steps=4, width_scale=1.5, batch_scale=2, settings={"lr_schedule": WARM})
    run = run_of_arm(config, DECIDED, arm)
    assert (run.steps, run.batch_size) == (120, 2 * config.batch_size)
    assert run.model.width == 1.5 * config.model.width
    assert with_derived_settings(run).lr_schedule.warmup_steps == 30  # of its own length
    odd = run_of_arm(config, DECIDED, ArmConfig(width_scale=1.01))
    assert odd.model.width == config.model.width  # a multiple of the heads


def test_an_arm_takes_the_best_point_of_another(tiny):
    arms = {**ARMS, "like": ArmConfig(settings=NORM_CLIP, steps=2, tuned_as="tuned", versus="tuned")}
    config = suite(tiny, arms)
    assert "like" not in {s.role for s in ablation.STAGE.runs(config, DECIDED, {})}  # it waits, too
    decisions, results = invented(config, lambda s: 2 + s.run.optimizer.lr + (s.run.stabilizer.strength or 0))
    runs = {s.role: s.run for s in ablation.STAGE.runs(config, decisions, results)}
    assert runs["like"].stabilizer == runs["tuned"].stabilizer
    assert runs["like"].optimizer == runs["tuned"].optimizer
    assert (runs["like"].steps, runs["tuned"].steps) == (60, 30)


SWEEP = {
    "plain": ArmConfig(about="nothing"),
    "ebc": ArmConfig(settings=EBC, lr_scale=4, versus="plain", tune={"delta": [1, 3]}),
}


def test_a_sweep_is_every_arm_at_every_value_and_keeps_what_was_tuned(tiny):
    config = suite(tiny, SWEEP, reference="plain_x1", lr_scales=[1, 2], deltas=[0.5, 2])
    arms = config.ablation.all_arms()
    assert list(arms) == ["plain_x1", "plain_x2", "ebc_x1", "ebc_x2", "ebc_d0p5", "ebc_d2"]
    assert arms["ebc_x2"].versus == "plain_x2"  # the same point of what it is compared with
    decisions, results = invented(config, lambda s: 2.0 - s.run.budget.target_kl)
    runs = {s.role: s.run for s in ablation.STAGE.runs(config, decisions, results)}
    assert runs["ebc_x2"].budget.target_kl == pytest.approx(3 * 0.02)
    assert runs["ebc_d2"].budget.target_kl == pytest.approx(2 * 0.02)
    assert runs["ebc_d2"].optimizer.lr == pytest.approx(4e-2)
    found = decisions["ablation"]["tracks"]["adam_none"]
    assert found["arms"]["ebc_x2"]["point"] == {"delta": 3}
    assert found["arms"]["ebc_d2"]["point"] is None


TWO = {"plain": ArmConfig(), "b": ArmConfig(settings=NORM_CLIP)}


def test_a_point_of_which_a_run_failed_is_left_out_of_its_window_and_said(tiny):
    config = suite(tiny, TWO, reference="plain_x1", lr_scales=[1, 2, 4])
    decisions, results = invented(config, lambda s: 2.0)
    failed = next(iter(decisions["ablation"]["tracks"]["adam_none"]["arms"]["b_x4"]["runs"].values()))
    results[failed] = {"outcome": "failed", "cause": "no memory"}
    specs = ablation.STAGE.runs(config, decisions, results)
    decision = ablation.STAGE.decide(config, specs, results, decisions)
    found = decision["tracks"]["adam_none"]["windows"]["b"]["lr_scale"]
    assert found["left_out"] == ["b_x4"]
    assert (found["window"]["high"], found["window"]["open_high"]) == (2, True)
    assert "b's windows leave out b_x4: a run failed or was lost" in decision["notes"]


def test_a_target_that_was_raised_to_the_least_possible_counts_as_what_it_was(tiny):
    arms = {"ebc": ArmConfig(settings={**EBC, "budget": {"schedule": "hold_decay"}})}
    config = suite(tiny, arms, reference="ebc_d1", deltas=[0.0002, 0.0005, 0.5, 1])
    points = suite_found(config, lambda s: 2.0, c_median=0.5)["windows"]["ebc"]["delta"]["points"]
    assert [p["value"] for p in points] == pytest.approx([p["delta_star"] / 0.02 for p in points])
    assert [p["value"] for p in points][1:] == [0.5, 1]  # the two lowest are one run


def test_only_arms_of_the_references_size_and_on_its_text_are_called_the_best(tiny):
    more = {"long": ArmConfig(steps=2), "few": ArmConfig(settings={"final_windows": 4})}
    losses = {"plain": 2.1, "b": 2.0, "long": 1.5, "few": 1.0}
    track = suite_found(suite(tiny, TWO | more), lambda s: losses[s.role])
    assert "best" not in answer_of(track)[1].lower()
    assert set(track["best_by_seed"].values()) == {"b"}
    assert not track["arms"]["few"]["comparable"]
    told = stage_of("ablation").headline(track)
    assert told.endswith("all intervals holding at once: lower: b, long (2× steps), few")


def test_a_rule_is_measured_by_the_best_fixed_target_of_its_length(tiny):
    arms = {
        "fixed": ArmConfig(settings=EBC),
        "rule": ArmConfig(settings={**EBC, "controller": {"name": "log_pi"}}, versus="fixed"),
        "worse": ArmConfig(settings={**EBC, "controller": {"name": "agreement"}}, versus="fixed"),
    }
    config = suite(tiny, arms, reference="fixed_d1", deltas=[0.5, 1, 2])
    losses = {"fixed": (2.3, 2.0, 2.1), "rule": (2.01, 2.0, 2.02), "worse": (2.0, 2.0, 2.5)}

    def loss(s):
        name, _, start = s.role.partition("_d")
        return losses[name][("0p5", "1", "2").index(start)]

    windows = suite_found(config, loss, c_median=0.5)["windows"]
    found = {name: sweeps["delta"] for name, sweeps in windows.items()}
    assert {k: v["every_start"] for k, v in found.items()} == {"fixed": False, "rule": True, "worse": False}
    assert found["rule"]["worst"] == pytest.approx(0.02)
    assert found["worse"]["worst"] == pytest.approx(0.5)
    assert found["rule"]["yardstick"] == "fixed"
    assert found["rule"]["rate_octaves"] == 0  # the same c at every start

    lost = suite_found(config, lambda s: None if s.role.startswith("fixed") else loss(s), c_median=0.5)
    rule = lost["windows"]["rule"]["delta"]  # nothing to measure by
    assert (rule["yardstick"], rule["worst"], rule["every_start"]) == ("fixed", None, False)


def test_a_regret_is_measured_by_what_was_tuned_again(tiny):
    tuned = {"lr_scale": [1, 2]}
    arms = {
        "plain": ArmConfig(tune=tuned),
        "ebc": ArmConfig(settings=EBC, tune={"delta": [1, 2]}),
        "again": ArmConfig(steps=2, tune=tuned),
        "plain_long": ArmConfig(steps=2, tuned_as="plain", versus="again"),
        "ebc_long": ArmConfig(steps=2, settings=EBC, tuned_as="ebc", versus="again"),
        "plain_wide": ArmConfig(width_scale=2, tuned_as="plain", versus="plain"),  # no regret: another size
    }
    losses = {"again": 1.8, "plain_long": 1.9, "ebc_long": 1.85}

    def loss(s):
        worse = 0.5 if s.stage == "tune" and s.role == "again" and s.lr_scale == 1 else 0.0
        return losses.get(s.role, 2.0) + worse + 0.01 * (s.run.seed % 2)

    found = suite_found(suite(tiny, arms), loss)
    [size] = found["transfer"]
    assert (size["shape"], size["tuned"], size["kept"]) == ("2× steps", "again", ["plain_long", "ebc_long"])
    assert found["arms"]["ebc_long"]["difference"]["mean"] == pytest.approx(0.05)
    assert size["against_kept"]["ebc_long"]["mean"] == pytest.approx(-0.05)
    assert found["arms"]["again"]["shape"] == "2× steps"


def test_what_few_levels_took_is_averaged_over_an_arms_runs_and_left_out_where_it_has_none(tiny):
    """Left out, not null: the decisions of suites without few levels keep their hash."""
    config = suite(tiny, {"plain": ARMS["plain"], "ternary": ArmConfig(settings={"quantizer": TERNARY})})
    results = {}
    for s in ablation.STAGE.runs(config, DECIDED, {}):
        results[s.run_id] = {"outcome": "completed", "val_loss": 2.0, "test_loss": 2.0}
        if s.role == "ternary":
            packed = {"packed_bytes": 1000, "model_bytes_float32": 10000 if s.run.seed == 3 else 12000}
            results[s.run_id] |= packed | {"zero_share": 0.3, "flip_share": None, "train_s": 7.0}
    decision = ablation.STAGE.decide(config, ablation.STAGE.runs(config, DECIDED, results), results, DECIDED)
    found = {label: arm["figures"] for label, arm in decision["tracks"]["adam_none"]["arms"].items()}
    in_all = {key for key, figure in PART_FIGURES.items() if figure.in_every_arm}
    assert set(found["plain"]) == {*ablation.FIGURES, *in_all}
    assert {k: v for k, v in found["ternary"].items() if k not in found["plain"]} == {
        "compression": 11.0,
        "zero_share": 0.3,
    }

"""Suites: what arms become, how each is tuned, what is copied from another arm's record, and what is
concluded."""

import json
import math
from dataclasses import replace

import pandas as pd
import pytest

from ebc_lab.config.choices import groups
from ebc_lab.config.compose import compose
from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import ArmConfig
from ebc_lab.config.study_checks import validate
from ebc_lab.records.streams import read_columns
from ebc_lab.report.conclude import concluding
from ebc_lab.study.autopilot import autopilot
from ebc_lab.study.inspect.status import status
from ebc_lab.study.inspect.why import why
from ebc_lab.study.stages import ablation, stage_of
from ebc_lab.study.stages.runs import distinct
from ebc_lab.study.stages.suite import run_of

EBC = {"stabilizer": {"name": "ebc"}}
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
SWEPT = {
    "lr": 1e-2,
    "optimizer": "adam",
    "projection": "none",
    "natural_kl": 0.02,
    "descent_median": 0.1,
    "sigma": 0.01,
}
SWEPT |= {"replicate_losses": [2.0, 2.01, 2.02]}
DECIDED = {"lr_sweep": {"tracks": {"adam_none": SWEPT}, "inputs_sha256": "x"}}


def suite(tiny, arms=ARMS, *overrides, shocks=(), reference="plain"):
    """A study that consists of a suite, on the small text."""
    config = compose(
        [*tiny, "data.sha256=" + "0" * 64, "dtype=float32", "launcher=inline", "seeds=[3,5]", *overrides]
    )
    config = replace(
        config,
        data=replace(config.data, sha256=None),
        study=replace(config.study, stages=["lr_sweep", "tune", "ablation"]),
        tune=replace(config.tune, steps=20),
        ablation=replace(
            config.ablation, steps=30, arms=dict(arms), reference=reference, shocks=list(shocks)
        ),
    )
    validate(config, study=True)
    return config


def named(tiny, *args, **kwargs):
    """The same with everything resolved, so that runs have names."""
    config = suite(tiny, *args, **kwargs)
    return replace(config, data=replace(config.data, sha256="0" * 64))


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory, own_places):
    """A finished suite, trained once, and its outcome."""
    config = suite(tiny, ARMS, f"output_dir={tmp_path_factory.mktemp('suites')}", "study.name=done")
    return config, autopilot(config, concluding())


def arms_of(outcome):
    return outcome.study.decisions()["ablation"]["tracks"]["adam_none"]["arms"]


def records(outcome, label):
    """Seed -> what a run of the arm recorded, step by step."""
    runs = arms_of(outcome)[label]["runs"]
    return {seed: read_columns(outcome.study.run_dir(run) / "steps.csv") for seed, run in runs.items()}


def spec_of(outcome, label, seed):
    return json.loads(
        (outcome.study.run_dir(arms_of(outcome)[label]["runs"][seed]) / "spec.json").read_text()
    )["config"]


def test_an_arm_is_the_best_baseline_with_some_settings_changed(tiny):
    config = named(tiny)
    [plain, ebc] = [
        run_of(config, DECIDED, "adam_none", ARMS[label], 30, 3, {})[0] for label in ("plain", "ebc")
    ]
    assert (plain.stabilizer.name, plain.optimizer.lr, plain.seed, plain.steps) == ("none", 1e-2, 3, 30)
    assert (ebc.stabilizer.name, ebc.optimizer.lr, ebc.budget.target_kl) == (
        "ebc",
        2e-2,
        0.01,
    )  # half the natural KL
    assert replace(ebc, stabilizer=plain.stabilizer, optimizer=plain.optimizer, budget=plain.budget) == plain


def test_delta_counts_in_what_was_calibrated_where_there_is_a_calibration(tiny):
    config = named(tiny)
    found = {"delta_star": 0.5, "budget": "shadow", "by_budget": {"shadow": 0.5, "surrogate": 0.8}}
    calibrated = {**DECIDED, "calibrate": {"tracks": {"adam_none": found}}}
    run, _ = run_of(config, calibrated, "adam_none", ARMS["ebc"], 30, 3, {})
    assert run.budget.target_kl == 0.25
    run, _ = run_of(config, calibrated, "adam_none", ARMS["traced"], 30, 3, {})
    assert run.budget.target_kl == 0.002  # said outright
    bound = ArmConfig(settings={**EBC, "budget": {"name": "surrogate"}})
    run, _ = run_of(config, calibrated, "adam_none", bound, 30, 3, {})
    assert run.budget.target_kl == 0.8  # each budget by its own calibration, where it has one


def test_another_optimizer_keeps_the_learning_rate_and_its_track(tiny):
    config = named(tiny)
    specs = [s for s in ablation.runs(config, DECIDED, {}) if s.role == "uncorrected"]
    assert {(s.run.optimizer.name, s.run.optimizer.lr, s.track) for s in specs} == {
        ("adam_uncorrected", 1e-2, "adam_none")
    }


def test_the_energy_controller_gets_the_baselines_gain(tiny):
    arm = ArmConfig(settings={**EBC, "controller": {"name": "energy"}})
    run, _ = run_of(named(tiny), DECIDED, "adam_none", arm, 30, 3, {})
    assert run.controller.a == pytest.approx(0.02 / 0.1)


def test_shocked_arms_are_paired_with_themselves(tiny):
    config = named(tiny, {"plain": ARMS["plain"], "ebc": ARMS["ebc"]}, shocks=["lr_spike"])
    arms = config.ablation.all_arms()
    assert list(arms) == ["plain", "plain_lr_spike", "ebc", "ebc_lr_spike"]
    assert arms["ebc_lr_spike"].versus == "ebc"
    runs = {s.role: s.run for s in ablation.runs(config, DECIDED, {})}
    assert runs["ebc_lr_spike"].shock.name == "lr_spike"
    assert replace(runs["ebc_lr_spike"], shock=runs["ebc"].shock) == runs["ebc"]


def test_every_arm_has_every_seed_and_no_run_is_made_twice(tiny):
    arms = {**ARMS, "twin": ArmConfig(about="the same as plain")}
    specs = ablation.runs(named(tiny, arms), DECIDED, {})
    by_arm = {}
    for s in specs:
        by_arm.setdefault(s.role, []).append(s.run.seed)
    assert by_arm == {
        label: [3, 5] for label in ("plain", "ebc", "traced", "uncorrected", "twin")
    }  # tuned and copies wait
    assert len(distinct(specs)) == len(specs) - 2


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        ({"plain": ArmConfig()}, "at least two arms"),
        (
            {"plain": ArmConfig(), "b": ArmConfig(settings={"optimiser": {}})},
            "ablation.arms.b: optimiser is not a setting",
        ),
        (
            {"plain": ArmConfig(), "b": ArmConfig(settings={"stabilizer": {"name": "agg"}})},
            "did you mean agc",
        ),
        ({"plain": ArmConfig(), "b": ArmConfig(settings={"stabilizer": "agc"})}, "stabilizer: {name: agc}"),
        ({"plain": ArmConfig(), "b": ArmConfig(delta=2)}, "delta goes with stabilizer ebc"),
        ({"plain": ArmConfig(), "b": ArmConfig(lr_scale=-1)}, "lr_scale must be"),
        ({"plain": ArmConfig(), "b": ArmConfig(replay="c")}, "replay=c is unknown"),
        ({"plain": ArmConfig(), "b": ArmConfig(tune={"lr": [1]})}, "takes lr_scale, delta or strength"),
        (
            {"plain": ArmConfig(), "b": ArmConfig(tune={"lr_scale": ["x"]})},
            "tune.lr_scale must be a finite number",
        ),
        (
            {"plain": ArmConfig(tune={"lr_scale": [1, 2]}), "b": ArmConfig(tune={"lr_scale": [1, 2, 4]})},
            "same number of runs: plain 2, b 3",
        ),
        ({"plain": ArmConfig(), "B b": ArmConfig()}, "lower-case"),
        (
            {"plain": ArmConfig(), "b": ArmConfig(tune={"strength": [1, 2]})},
            "goes with a stabilizer that has one",
        ),
        ({"plain": ArmConfig(), "b": ArmConfig(tune={"delta": [1, 2]})}, "goes with stabilizer ebc"),
        ({"plain": ArmConfig(), "b": ArmConfig(matched="plain")}, "goes with stabilizer norm_clip"),
        (
            {"plain": ArmConfig(), "b": ArmConfig(replay="plain", tune={"lr_scale": [1, 2]})},
            "nothing to tune",
        ),
        (
            {"plain": ArmConfig(), "b": ArmConfig(delta=2, settings={**EBC, "budget": {"target_kl": 0.1}})},
            "leave one out",
        ),
        (
            {"plain": ArmConfig(), "b": ArmConfig(settings={**EBC, "budget": {"guard": "shrink"}})},
            "budget.guard goes with budget=surrogate",
        ),
    ],
)
def test_an_arm_that_cannot_be_meant_is_refused(tiny, arms, words):
    with pytest.raises(UserError, match=words):
        suite(tiny, arms)


def test_a_decaying_arm_warms_up_as_the_control_does(tiny):
    config = named(tiny, ARMS, "lr_sweep.control_warmup=7")
    for settings, steps in (
        ({"name": "warmup_linear"}, 7),
        ({"name": "warmup_linear", "warmup_steps": 3}, 3),
    ):
        run, _ = run_of(
            config, DECIDED, "adam_none", ArmConfig(settings={"lr_schedule": settings}), 30, 3, {}
        )
        assert run.lr_schedule.warmup_steps == steps


def test_a_baseline_that_promises_no_decrease_leaves_energy_without_its_gain(tiny):
    arm = ArmConfig(settings={**EBC, "controller": {"name": "energy"}})
    for descent in (None, -0.1):
        uphill = {"lr_sweep": {"tracks": {"adam_none": {**SWEPT, "descent_median": descent}}}}
        run, _ = run_of(named(tiny), uphill, "adam_none", arm, 30, 3, {})
        assert run.controller.a is None  # the run then fails and says what is missing


def test_every_suite_that_is_shipped_can_be_planned():
    from ebc_lab.study.inspect.forecast import planned

    for name in groups()["study"]:
        config = compose(["scale=smoke", f"study={name}", "device=cpu"])
        found = planned(config)["stages"]["total"]
        assert 0 < found["min"]["runs"] <= found["expected"]["runs"] <= found["max"]["runs"]
        for label in config.ablation.all_arms():
            assert config.ablation.question
            assert label == label.lower()


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
    half = (
        12.706 * abs(gaps[0] - gaps[1]) / math.sqrt(2) / math.sqrt(2)
    )  # t of one degree of freedom at 97.5%
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
    assert run["stabilizer"] == {
        "name": "norm_clip",
        "strength": tuned["point"]["strength"],
        "schedule": "constant",
    }
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


def test_a_finished_suite_trains_nothing_and_answers_questions(done):
    config, outcome = done
    again = autopilot(config, concluding())
    assert again.trained == 0
    found = status(outcome.study)
    assert found["state"] == "finished"
    assert [s["stage"] for s in found["stages"]] == ["lr_sweep", "tune", "ablation"]
    assert set(why(outcome.study, None)) == {"lr_sweep", "tune", "ablation"}


def invented(config, loss, **more):
    """Results of every run that is asked for, until nothing more is: loss by (label, seed), None for a
    diverged run."""
    results = {}
    decisions = dict(DECIDED)
    for stage in ("tune", "ablation"):
        run = stage_of(stage).runs
        decide = stage_of(stage).decide
        while new := [s for s in run(config, decisions, results) if s.run_id not in results]:
            for s in new:
                value = loss(s)
                known = None if value is None or math.isnan(value) else value  # JSON has no NaN
                results[s.run_id] = {
                    "outcome": "completed" if value is not None else "diverged",
                    "val_loss": known,
                    "test_loss": known,
                    "clip_rate": 0.5,
                    "grad_norm_quantiles": [i / 40 for i in range(41)],
                    **more,
                }
        decisions[stage] = decide(config, run(config, decisions, results), results, decisions)
    return decisions, results


def test_a_diverged_arm_is_said_and_never_averaged_away(tiny):
    config = named(tiny)
    decisions, _ = invented(config, lambda s: None if s.role == "uncorrected" and s.run.seed == 5 else 2.0)
    arm = decisions["ablation"]["tracks"]["adam_none"]["arms"]["uncorrected"]
    assert arm["difference"]["diverged"] == {"arm": 1, "reference": 0}
    assert arm["difference"]["mean"] is None
    assert "adam_none: uncorrected: 1 of 2 seeds diverged" in decisions["ablation"]["notes"]


def test_a_nan_never_wins_a_grid(tiny):
    config = named(tiny)
    decisions, _ = invented(config, lambda s: math.nan if s.role == "tuned" and s.lr_scale == 0.5 else 2.0)
    assert decisions["tune"]["tracks"]["adam_none"]["arms"]["tuned"]["point"]["lr_scale"] == 1


def test_an_edge_of_a_grid_is_said(tiny):
    config = named(tiny)
    decisions, _ = invented(config, lambda s: 2.0 + s.run.optimizer.lr)
    assert "adam_none: tuned's best lr_scale, 0.5, lies on its grid's low edge" in decisions["tune"]["notes"]


def test_copies_of_a_run_that_failed_are_not_made_and_that_is_said(tiny):
    config = named(tiny)
    decisions, results = invented(config, lambda s: None if s.role == "ebc" else 2.0)
    assert not any(s.role in ("own", "next", "matched") for s in ablation.runs(config, decisions, results))
    assert (
        "adam_none: own could not be made: no run that it copies completed" in decisions["ablation"]["notes"]
    )


def test_one_seed_that_would_have_said_otherwise_is_named(tiny):
    config = named(tiny)
    better = {("plain", 3), ("ebc", 5)}
    decisions, _ = invented(config, lambda s: 1.0 if (s.role, s.run.seed) in better else 2.0)
    assert decisions["ablation"]["tracks"]["adam_none"]["best_by_seed"] == {"3": "plain", "5": "ebc"}
    assert any("one seed alone" in note for note in decisions["ablation"]["notes"])


def test_a_matched_strength_is_the_quantile(tiny):
    config = named(tiny)
    decisions, results = invented(config, lambda s: 2.0, clip_rate=0.25)
    matched = [s for s in ablation.runs(config, decisions, results) if s.role == "matched"]
    assert {s.run.stabilizer.strength for s in matched} == {0.75}


def test_an_arm_judged_on_another_text_is_never_the_best(tiny):
    arms = {**ARMS, "few": ArmConfig(settings={"final_windows": 4})}
    config = named(tiny, arms)
    decisions, _ = invented(config, lambda s: 1.0 if s.role == "few" else 2.0 + s.run.optimizer.lr)
    found = decisions["ablation"]["tracks"]["adam_none"]
    assert not found["arms"]["few"]["comparable"]
    assert "few" not in found["best_by_seed"].values()


def test_a_seed_that_never_recovers_is_not_averaged_away(tiny):
    arms = {"plain": ARMS["plain"], "ebc": ARMS["ebc"]}
    config = named(tiny, arms, shocks=["lr_spike"])
    results = {}
    for s in ablation.runs(config, DECIDED, {}):
        back = None if s.run.seed == 5 and s.role == "plain_lr_spike" else 4
        shocked = {"shock_peak": 0.5, "shock_recovery_steps": back} if s.run.shock.name != "none" else {}
        results[s.run_id] = {
            "outcome": "completed",
            "val_loss": 2.0,
            "test_loss": 2.0,
            "clip_rate": 0.5,
            **shocked,
        }
    decision = ablation.decide(config, ablation.runs(config, DECIDED, results), results, DECIDED)
    found = {label: arm["figures"] for label, arm in decision["tracks"]["adam_none"]["arms"].items()}
    assert (found["plain_lr_spike"]["shock_recovery_steps"], found["plain_lr_spike"]["shock_recovered"]) == (
        None,
        0.5,
    )
    assert (found["ebc_lr_spike"]["shock_recovery_steps"], found["ebc_lr_spike"]["shock_recovered"]) == (4, 1)
    assert found["plain"]["shock_recovered"] is None

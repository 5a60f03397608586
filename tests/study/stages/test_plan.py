"""The stages together: which runs a whole study makes, under which names, and what may start early."""

import random
from dataclasses import replace

import pytest
from support.played import DIVERGED, by_lr, config_of, decided, decided_through, done, played

from ebc_lab.config.identity import digest, identity
from ebc_lab.study.inspect.forecast import SCENARIOS, forecast
from ebc_lab.study.stages.runs import distinct
from ebc_lab.study.stages.stage import planned_runs, speculative_runs, stage_of


@pytest.mark.thorough
@pytest.mark.parametrize(("scale", "steps"), [("smoke", 300), ("laptop", 700), ("paper", 300)])
def test_the_runs_that_tune_are_as_long_as_the_finals(scale, steps):
    config = config_of(f"finals.steps={steps}", scale=scale)
    assert config.lr_sweep.long_steps == config.calibrate.steps == config.lr_scale.steps == steps
    assert config.lr_sweep.steps == config_of(scale=scale).lr_sweep.steps
    published = config_of("study=published", f"finals.steps={steps}", scale=scale)
    own = published.lr_sweep.steps
    assert own == published.lr_sweep.long_steps == published.calibrate.steps == published.lr_scale.steps


def test_the_forecast_knows_that_the_control_may_be_looked_at_again():
    config = config_of("optimizer=adam")
    swept = {s.name: forecast(config, scenario=s)["lr_sweep"] for s in SCENARIOS}
    counts = {name: len([spec for spec in specs if spec.role == "control"]) for name, specs in swept.items()}
    # two peaks and one or two beyond, two more warm-ups, one more shape; at most two peaks again
    assert counts == {"min": 6, "expected": 7, "max": 9}


def known(results):
    return lambda specs: {s.run_id: results[s.run_id] for s in specs if s.run_id in results}


def test_idle_workers_foresee_certain_runs_only():
    config = config_of("optimizer=adam")
    decisions = decided_through("lr_scale", config, by_lr(4e-3))
    first = {"lr_sweep": decisions["lr_sweep"]}
    running = stage_of("calibrate").runs(config, first, {})
    certain = speculative_runs(config, first, "calibrate", running, ["lr_scale", "finals"])
    assert {s.role for s in certain} == {"none", "baseline", "control", "control_x2", "control_x8"}
    grid = stage_of("lr_sweep").runs(config, {}, {})
    assert speculative_runs(config, {}, "lr_sweep", grid, []) == []
    results = {s.run_id: done(2 - s.run.optimizer.lr) for s in grid}
    extension = [s for s in stage_of("lr_sweep").runs(config, {}, results) if s.run_id not in results]
    assert [s.run.optimizer.lr for s in extension] == [16e-3]
    assert speculative_runs(config, {}, "lr_sweep", extension, [], known(results)) == []


def test_calibration_and_baseline_start_while_the_search_for_the_control_goes_on():
    config = config_of("optimizer=adam")
    _, specs, results = played("lr_sweep", config, {}, by_lr(4e-3))
    searching = [s for s in specs if s.role == "control"]
    there = known({s.run_id: results[s.run_id] for s in specs if s.role != "control"})
    early = speculative_runs(config, {}, "lr_sweep", searching, config.study.stages[1:], there)
    assert {(s.stage, s.role) for s in early} == {("calibrate", "ebc"), ("finals", "baseline")}


@pytest.mark.thorough
@pytest.mark.parametrize("suite", ["default", "published"])
@pytest.mark.parametrize("seed", range(2))
def test_whatever_ends_first_a_study_makes_every_run_that_started_early_and_no_more_than_its_forecast(
    seed, suite
):
    """Losses by the run's name, and the runs of a wave end in another order."""
    config = config_of("optimizer=adam", f"study={suite}", "study.name=s")
    most = {stage: len(specs) for stage, specs in forecast(config, scenario=SCENARIOS[-1]).items()}
    draw = random.Random(seed)
    decisions, early, made = {}, set(), set()
    for i, stage in enumerate(config.study.stages):
        results = {}
        later = config.study.stages[i + 1 :]
        while True:
            specs = stage_of(stage).runs(config, decisions, results)
            missing = [s for s in specs if s.run_id not in results]
            if not missing:
                break
            spec = draw.choice(missing)
            luck = int(spec.run_id[-6:], 16) * (seed + 1) % 1009
            results[spec.run_id] = done(2 + luck / 1009, 0.6)
            if running := [s for s in missing if s is not spec]:
                more = speculative_runs(config, decisions, stage, running, later, known(results))
                early |= {s.run_id for s in more}
        needed = planned_runs(stage, config, decisions, known(results))[0]
        new = {s.run_id for s in needed if s.kind == "train"} - made
        assert len(new) <= most[stage]
        made |= new
        decisions[stage] = stage_of(stage).decide(config, specs, results, decisions)
    assert early
    assert early <= made


def test_a_failing_run_anywhere_ends_no_study():
    """One run of every stage diverges: each stage still decides, and the verdict is given."""
    config = config_of("optimizer=adam")
    decisions = {}
    for stage in config.study.stages:
        seen = []

        def answer(s, seen=seen):
            seen.append(s)
            return DIVERGED if len(seen) == 3 else by_lr(4e-3)(s)

        decisions[stage] = decided(stage, config, decisions, answer)
    assert len(decisions["finals"]["tracks"]["adam_none"]["verdict"]) == 7


# -- the earlier recipe --------------------------------------------------------------------------------------


def as_published(best=4e-3, c=0.6):
    """(stage, role) -> what each run of the published study is, with losses that are best at `best`."""
    config = config_of("study=published")
    found = {}
    decisions = {}

    def answer(s):
        return done(2 + abs(s.run.optimizer.lr - best), c, surrogate_median=1.0, kl_ratio_median=1.0)

    for stage in config.study.stages:
        _, specs, results = played(stage, config, decisions, answer)
        decisions[stage] = stage_of(stage).decide(config, specs, results, decisions)
        for s in distinct(specs):
            found.setdefault((stage, s.role), []).append(s)
    return config, found


def test_published_is_the_earlier_recipe_run_for_run():
    _, found = as_published()
    rows = {
        key: [(s.lr_scale, s.run.steps, s.run.lr_schedule.name) for s in specs if s.run.seed in (0, 100, 101)]
        for key, specs in found.items()
    }
    assert rows == {
        ("lr_sweep", "grid"): [(1, 200, "constant")] * 4,
        ("lr_sweep", "replicate"): [(1, 200, "constant")],
        ("lr_sweep", "control"): [(x, 200, "warmup_linear") for x in (1, 2, 4)],
        ("calibrate", "ebc"): [(1, 200, "constant")] * 3,
        ("lr_scale", "none"): [(x, 200, "constant") for x in (1, 1.5, 2, 3, 4)],
        ("lr_scale", "ebc"): [(x, 200, "constant") for x in (1.5, 2, 3, 4)],
        ("lr_scale", "surrogate_x1"): [(1, 200, "constant")],
        ("lr_scale", "fixed_tau"): [(x, 200, "constant") for x in (1.5, 2, 3, 4)],
        ("finals", "baseline"): [(1, 600, "constant")],
        ("finals", "control"): [(1, 600, "warmup_linear")],
        ("finals", "ebc_x2"): [(2, 600, "constant")],
        ("finals", "ebc_chosen"): [(1.5, 600, "constant")],
        ("finals", "none_chosen"): [(1.5, 600, "constant")],
        ("finals", "ebc_lindelta"): [(3, 600, "constant")],
        ("finals", "ebc_lindelta_lrdecay"): [(3, 600, "warmup_linear")],
        ("finals", "overhead"): [(2, 160, "constant")],
    }
    ebc = found["calibrate", "ebc"] + found["lr_scale", "ebc"] + found["finals", "ebc_x2"]
    assert {s.run.budget.schedule for s in ebc} == {"constant"}
    warmups = {s.run.lr_schedule.warmup_steps for s in found["lr_sweep", "control"]}
    assert warmups == {20}


def test_published_calibrates_its_own_targets_by_the_band():
    _, found = as_published()
    assert [s.run.budget.target_kl for s in found["calibrate", "ebc"]] == [0.03, 0.05, 0.07]
    run = found["calibrate", "ebc"][0].run
    assert (run.budget.name, run.budget.aggregate, run.budget.grouping) == ("surrogate", "l1", "matrices")
    assert (run.budget.cadence, run.budget.beta_init) == ("published", "first")
    assert (run.controller.name, run.controller.kp, run.controller.ki) == ("pi", 0.15, 0.02)
    # the fixed radius: 0.6 of the median surrogate S at ×1, which is 1 here, and the bound of KL is (S / 2)²
    assert {s.run.budget.target_kl for s in found["lr_scale", "fixed_tau"]} == {(0.6 / 2) ** 2}
    _, found = as_published(c=0.2)
    assert [s.run.budget.target_kl for s in found["calibrate", "ebc"]][3:] == [0.14, 0.28, 0.56]


@pytest.mark.thorough
@pytest.mark.parametrize(
    "overrides", [[], ["study=published"], ["lr_sweep.keep=all"], ["lr_scale.steps=300"]]
)
def test_an_arms_name_means_one_setting_in_the_whole_study(overrides):
    """Its learning rate, schedules and length, whichever stage asked for it: all that runs of one name may
    differ in is the seed."""
    config = config_of(*overrides)
    settings = {}
    rates = set()

    def answer(spec):
        run = replace(spec.run, seed=0, evaluate=["val"])
        settings.setdefault(spec.arm, set()).add(digest(identity(run)))
        rates.add((spec.arm, run.optimizer.lr))
        return done(2 + abs(run.optimizer.lr - 16e-3), surrogate_median=1.0, kl_ratio_median=1.0)

    decided_through(config.study.stages[-1], config, answer)
    assert {arm: len(own) for arm, own in settings.items() if len(own) > 1} == {}
    if not overrides:  # four rates of the grid, and one that two tables tell apart
        assert ("muon_none_baseline_lr0p016_trapezoid_w33_n200", 16e-3) in rates
        assert len({arm for arm, _ in rates if arm.startswith("muon") and arm.endswith("_n200")}) >= 4

from dataclasses import replace

import pytest

from ebc_lab.config.compose import compose
from ebc_lab.config.schema import STAGES
from ebc_lab.study import stages as stages_module
from ebc_lab.study.inspect.forecast import forecast
from ebc_lab.study.stages import stage_of
from ebc_lab.study.stages.runs import distinct


def config_of(*overrides, scale="laptop"):
    config = compose(
        [f"scale={scale}", "dtype=float32", "threads_per_run=1", "compile=off", "device=cpu", *overrides]
    )
    return replace(config, data=replace(config.data, sha256="0" * 64))


def done(loss, c=0.6, **more):
    return {
        "outcome": "completed",
        "val_loss": loss,
        "c_median": c,
        "kl_median": 0.01,
        "clip_rate": 0.5,
        **more,
    }


def played(stage, config, decisions, answer):
    """Invent results until the stage asks for no more runs. -> its waves, its last list, the results."""
    results = {}
    waves = []
    while True:
        specs = stage_of(stage).runs(config, decisions, results)
        new = [s for s in distinct(specs) if s.run_id not in results]
        if not new:
            return waves, specs, results
        waves.append(new)
        results |= {s.run_id: answer(s) for s in new}


def swept(config, best_lr=4e-3):
    _, specs, results = played("lr_sweep", config, {}, lambda s: done(2 + abs(s.run.optimizer.lr - best_lr)))
    return {"lr_sweep": stage_of("lr_sweep").decide(config, specs, results, {})}


def test_the_sweep_covers_the_grid_then_replicates_and_controls_of_the_winner():
    config = config_of()
    waves, specs, _ = played("lr_sweep", config, {}, lambda s: done(2 + abs(s.run.optimizer.lr - 4e-3), 1.0))
    assert [len(w) for w in waves[:1]] == [7]
    tail = [s for s in specs if s.role != "grid"]
    assert {s.run.seed for s in tail if s.role == "replicate"} == {101, 102, 103}
    assert [s.lr_scale for s in tail if s.role == "control"] == [1, 2, 4]
    assert all(s.run.lr_schedule.name == "warmup_linear" for s in tail if s.role == "control")
    assert all(s.run.stabilizer.name == "none" for s in specs)
    assert all(s.run.evaluate == ["val"] for s in specs)  # val decides


@pytest.mark.parametrize(("slope", "lrs"), [(-1, [4e-3, 8e-3]), (1, [2.5e-4, 5e-4])])
def test_a_winner_on_the_edge_extends_the_grid_twice_at_most(slope, lrs):
    config = config_of("optimizer=adam", "lr_sweep.grids.adam=[1e-3,2e-3]")
    _, specs, _ = played("lr_sweep", config, {}, lambda s: done(2 + slope * s.run.optimizer.lr))
    grid = sorted(s.run.optimizer.lr for s in specs if s.role == "grid")
    assert grid == sorted([1e-3, 2e-3, *lrs])


def test_a_pair_far_behind_is_not_extended_and_does_not_go_on():
    config = config_of("lr_sweep.keep=all")
    _, specs, results = played(
        "lr_sweep",
        config,
        {},
        lambda s: done(3.0 - s.run.optimizer.lr if s.run.optimizer.name == "adam" else 2.0),
    )
    assert (
        max(s.run.optimizer.lr for s in specs if s.role == "grid" and s.run.optimizer.name == "adam") == 8e-3
    )
    decision = stage_of("lr_sweep").decide(config, specs, results, {})
    assert list(decision["tracks"]) == ["muon_none"]
    assert any("triaged" in note for note in decision["notes"])


def test_keep_all_carries_every_pair_that_is_close():
    config = config_of("lr_sweep.keep=all")
    decisions = swept(config)
    assert set(decisions["lr_sweep"]["tracks"]) == {"adam_none", "muon_none"}
    specs = stage_of("calibrate").runs(config, decisions, {})
    assert {s.run.optimizer.name for s in specs} == {"adam", "muon"}


def test_calibration_stops_at_the_grid_when_a_median_c_is_in_the_band():
    config = config_of("optimizer=adam")
    waves, specs, _ = played("calibrate", config, swept(config), lambda s: done(2.0, 0.6))
    assert [s.run.budget.target_kl for s in specs] == [0.0075, 0.01, 0.0125, 0.015, 0.02]
    assert len(waves) == 1
    assert all(s.lr_scale == 2 and s.run.optimizer.lr == 8e-3 for s in specs)


def test_calibration_bisects_a_bracket_that_straddles_the_band():
    config = config_of("optimizer=adam")
    _, specs, _ = played(
        "calibrate",
        config,
        swept(config),
        lambda s: done(2.0, 0.3 if s.run.budget.target_kl < 0.013 else 0.9),
    )
    extra = [s.run.budget.target_kl for s in specs][5:]
    assert extra[0] == pytest.approx((0.0125 * 0.015) ** 0.5, rel=1e-2)  # about 0.0137
    assert len(extra) == 3
    assert all(0.0125 < d < 0.015 for d in extra)


def test_a_wide_bracket_is_bisected_geometrically():
    config = config_of("optimizer=adam", "calibrate.multiples=[1,4]")
    _, specs, _ = played(
        "calibrate",
        config,
        swept(config),
        lambda s: done(2.0, 0.3 if s.run.budget.target_kl < 0.013 else 0.9),
    )
    assert [s.run.budget.target_kl for s in specs][:3] == pytest.approx([0.01, 0.04, 0.02])


@pytest.mark.parametrize(("c", "deltas"), [(0.1, [0.04, 0.08, 0.16]), (0.9, [0.00375, 0.00188, 0.00094])])
def test_calibration_extends_by_two_on_one_side(c, deltas):
    config = config_of("optimizer=adam")
    _, specs, _ = played("calibrate", config, swept(config), lambda s: done(2.0, c))
    assert [s.run.budget.target_kl for s in specs][5:] == pytest.approx(deltas, rel=1e-2)


def test_failed_runs_neither_extend_nor_stall_a_stage():
    config = config_of("optimizer=adam")
    decisions = swept(config)
    waves, _, _ = played("calibrate", config, decisions, lambda s: {"outcome": "failed", "val_loss": None})
    assert len(waves) == 1
    waves, _, _ = played("lr_sweep", config, {}, lambda s: {"outcome": "failed"})
    assert len(waves) == 1


def scaled(config, chosen=2.0):
    decisions = swept(config)
    _, specs, results = played("calibrate", config, decisions, lambda s: done(2.0, 0.6))
    decisions["calibrate"] = stage_of("calibrate").decide(config, specs, results, decisions)
    _, specs, results = played(
        "lr_scale",
        config,
        decisions,
        lambda s: done(2.0, 0.6 if s.lr_scale == chosen else 0.1, surrogate_median=1.0),
    )
    decisions["lr_scale"] = stage_of("lr_scale").decide(config, specs, results, decisions)
    return decisions, specs


def test_lr_scale_reuses_the_calibrated_and_the_baseline_run():
    config = config_of("optimizer=adam")
    decisions, specs = scaled(config)
    ids = {s.run_id for s in specs}
    assert decisions["calibrate"]["tracks"]["adam_none"]["run_id"] in ids
    assert decisions["lr_sweep"]["tracks"]["adam_none"]["run_id"] in ids
    assert {(s.role, s.lr_scale) for s in specs} == {(r, x) for r in ("none", "ebc") for x in (1, 2, 4)}


def test_the_surrogate_adds_a_fixed_radius_arm_from_the_median_s():
    config = config_of("optimizer=adam", "budget=surrogate")
    _, specs = scaled(config)
    fixed = [s for s in specs if s.role == "fixed_tau"]
    assert [s.lr_scale for s in fixed] == [1, 2, 4]
    assert {s.run.budget.target_kl for s in fixed} == {0.09}  # (0.6·1/2)²
    assert {s.run.controller.name for s in fixed} == {"fixed"}
    assert all(s.arm.endswith("_fixedtau") for s in fixed)


@pytest.mark.parametrize(("chosen", "runs"), [(2.0, 6), (1.0, 6), (4.0, 7)])
def test_finals_pair_every_arm_by_seed_and_merge_what_is_the_same(chosen, runs):
    config = config_of("optimizer=adam")
    decisions, _ = scaled(config, chosen)
    specs = stage_of("finals").runs(config, decisions, {})
    train = [s for s in specs if s.kind == "train"]
    assert len({s.role for s in train}) == 7
    assert len({s.run_id for s in train}) == runs * 3
    arms = {}
    for s in train:
        arms.setdefault(s.arm, set()).add((s.run.seed, s.run_id))
    assert all(len(a) == 3 for a in arms.values())  # two arms never share a name
    assert sum(s.kind == "overhead" for s in specs) == 1
    falling = next(s for s in train if s.role == "ebc_lindelta")
    found = decisions["calibrate"]["tracks"]["adam_none"]
    assert falling.run.budget.target_kl == pytest.approx(2 * found["delta_star"], rel=1e-2)
    assert falling.lr_scale == 2 * chosen
    assert all(s.run.evaluate == ["val", "test"] for s in train)


def test_arm_names_follow_their_pattern():
    config = config_of("optimizer=adam")
    decisions, _ = scaled(config)
    arms = {s.role: s.arm for s in stage_of("finals").runs(config, decisions, {}) if s.kind == "train"}
    delta = arms["ebc_x2"].split("_d")[1].split("_")[0]
    assert arms["baseline"] == "adam_none_baseline_x1"
    assert arms["ebc_x2"] == f"adam_none_ebc_d{delta}_shadow_x2"
    assert arms["control"] == "adam_none_baseline_x1_lrdecay"
    assert arms["ebc_lindelta"].endswith("_shadow_x4_lindelta")
    assert arms["ebc_lindelta_lrdecay"].endswith("_shadow_x4_lindelta_lrdecay")


@pytest.mark.parametrize("scale", ["smoke", "laptop", "paper"])
def test_the_forecast_is_ordered(scale):
    counts = [sum(map(len, stages.values())) for stages in forecast(config_of(scale=scale)).values()]
    assert counts == sorted(counts)
    assert counts[0] > 10


def test_a_run_id_is_readable_and_hangs_on_its_identity():
    config = config_of("optimizer=adam")
    first = stage_of("lr_sweep").runs(config, {}, {})[0]
    assert first.run_id.startswith("adam_none_baseline_lr0p001_n200_s100-")
    other = replace(first, role="other", stage="elsewhere", arm="x")
    assert other.run_id == first.run_id
    assert replace(first, run=replace(first.run, seed=101)).run_id != first.run_id
    assert distinct([first, other]) == [first]


def test_idle_workers_foresee_certain_runs_and_the_next_extension_only():
    config = config_of("optimizer=adam")
    decisions, _ = scaled(config)
    first = {"lr_sweep": decisions["lr_sweep"]}
    certain = stages_module.speculative_runs(config, first, [], ["lr_scale", "finals"])
    assert {s.role for s in certain} == {"none", "baseline", "control"}
    needed = {
        s.run_id for stage in ("lr_scale", "finals") for s in stage_of(stage).runs(config, decisions, {})
    }
    assert {s.run_id for s in certain} <= needed
    grid = stage_of("lr_sweep").runs(config, {}, {})
    assert stages_module.speculative_runs(config, {}, grid, []) == []
    results = {s.run_id: done(2 - s.run.optimizer.lr) for s in grid}
    extension = [s for s in stage_of("lr_sweep").runs(config, {}, results) if s.run_id not in results]
    assert [s.run.optimizer.lr for s in extension] == [16e-3]
    [guess] = stages_module.speculative_runs(config, {}, extension, [])
    results[extension[0].run_id] = done(1.9)
    assert guess.run_id in {s.run_id for s in stage_of("lr_sweep").runs(config, {}, results)}
    assert stages_module.speculative_runs(config, {}, [guess], []) == []


SEARCH = "study.stages=[lr_sweep,calibrate,controller_search,lr_scale,finals]"


def searched(config, ratios):
    """Decisions up to a controller search whose candidates reach these shares of their target; equal
    losses."""
    decisions = swept(config)
    for stage in ("calibrate", "controller_search"):

        def answer(s):
            return done(2.0, kl_ratio_median=ratios.get(s.role), surrogate_median=1.0)

        _, specs, results = played(stage, config, decisions, answer)
        decisions[stage] = stage_of(stage).decide(config, specs, results, decisions)
    return decisions, specs


def test_a_controller_search_tries_every_candidate_where_delta_was_calibrated():
    config = config_of("optimizer=adam", SEARCH)
    decisions, specs = searched(config, {"rsl": 1.1, "log_pi": 0.5})
    calibrated = decisions["calibrate"]["tracks"]["adam_none"]
    assert {s.role for s in specs} == set(config.controller_search.candidates)
    assert {s.run.budget.target_kl for s in specs} == {calibrated["delta_star"]}
    assert {s.lr_scale for s in specs} == {config.calibrate.lr_scale}
    assert len({s.run_id for s in specs}) == len(specs)


def test_the_controller_that_holds_its_target_is_used_from_then_on():
    config = config_of("optimizer=adam", SEARCH)
    decisions, _ = searched(config, {"rsl": 1.1, "log_pi": 0.5, "log_pi_often": 1.5})
    found = decisions["controller_search"]["tracks"]["adam_none"]
    assert (found["candidate"], found["settings"]) == ("rsl", {"controller": {"name": "rsl"}})
    _, specs, results = played("lr_scale", config, decisions, lambda s: done(2.0))
    ebc = [s for s in specs if s.role == "ebc"]
    assert {s.run.controller.name for s in ebc} == {"rsl"}
    assert all(s.run.stabilizer.name == "none" for s in specs if s.role == "none")
    decisions["lr_scale"] = stage_of("lr_scale").decide(config, specs, results, decisions)
    finals = stage_of("finals").runs(config, decisions, {})
    assert {s.run.controller.name for s in finals if s.run.stabilizer.name == "ebc"} == {"rsl"}


def test_a_search_in_which_none_holds_its_target_takes_the_nearest_and_says_so():
    config = config_of("optimizer=adam", SEARCH)
    decisions, _ = searched(config, {"rsl": 4.0, "log_pi": 0.5, "fixed": 0.1})
    assert decisions["controller_search"]["tracks"]["adam_none"]["candidate"] == "log_pi"
    assert "no candidate held the KL" in decisions["controller_search"]["notes"][0]


def test_without_a_search_nothing_waits_for_one():
    config = config_of("optimizer=adam")
    decisions = swept(config)
    _, specs, results = played("calibrate", config, decisions, lambda s: done(2.0))
    decisions["calibrate"] = stage_of("calibrate").decide(config, specs, results, decisions)
    assert any(s.role == "ebc" for s in stage_of("lr_scale").runs(config, decisions, {}))
    config = config_of("optimizer=adam", SEARCH)
    assert {s.role for s in stage_of("lr_scale").runs(config, decisions, {})} == {"none"}


def test_the_published_recipe_to_the_letter():
    config = config_of("study=published")
    decisions = swept(config)
    _, specs, results = played("calibrate", config, decisions, lambda s: done(2.0))
    assert [s.run.budget.target_kl for s in specs] == [0.03, 0.05, 0.07]
    run = specs[0].run
    assert (run.budget.name, run.budget.aggregate, run.budget.grouping) == ("surrogate", "l1", "matrices")
    assert (run.budget.cadence, run.budget.guard, run.budget.beta_init) == ("published", "shrink", "first")
    assert (run.controller.name, run.controller.kp, run.controller.ki) == ("pi", 0.15, 0.02)
    assert specs[0].lr_scale == 1
    decisions["calibrate"] = stage_of("calibrate").decide(config, specs, results, decisions)
    scales = stage_of("lr_scale").runs(config, decisions, {})
    assert [s.lr_scale for s in scales if s.role == "ebc"] == [1.5, 2, 3, 4]
    assert [s.lr_scale for s in scales if s.role == "none"] == [
        1,
        1.5,
        2,
        3,
        4,
    ]  # the plain run that all are judged by


def test_a_study_with_a_controller_search_can_be_planned():
    from ebc_lab.study.inspect.forecast import planned

    found = planned(config_of("optimizer=adam", SEARCH, scale="smoke"))["stages"]
    assert (
        found["controller_search"]["expected"]["runs"] == 5
    )  # six candidates; `fixed` is the calibrated run itself
    for more in ("controller=log_pi", "study=published"):
        assert (
            planned(compose(["scale=smoke", "device=cpu", SEARCH, more]))["stages"]["finals"]["max"]["runs"]
            > 0
        )


def test_a_stage_that_says_it_does_not_grow_asks_for_the_same_runs_whatever_its_results():
    """Of those that may be asked once only; a suite's `tune` is pinned by the suites' own tests."""
    config = config_of("optimizer=adam", SEARCH)
    decisions, _ = searched(config, {"rsl": 1.1})
    _, specs, results = played("lr_scale", config, decisions, lambda s: done(2.0))
    decisions["lr_scale"] = stage_of("lr_scale").decide(config, specs, results, decisions)
    fixed = {name for name in STAGES if not stage_of(name).grows}
    assert fixed == {"controller_search", "tune"}
    for stage in fixed - {"tune"}:
        first = stage_of(stage).runs(config, decisions, {})
        answered = {s.run_id: done(9.0, 0.1, surrogate_median=1.0) for s in first}
        assert [s.run_id for s in stage_of(stage).runs(config, decisions, answered)] == [
            s.run_id for s in first
        ]

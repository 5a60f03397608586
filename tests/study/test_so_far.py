"""What is said of a study before it is decided: right as far as it goes, and never more than is there."""

from unittest.mock import Mock

import pytest
from support.played import by_lr, config_of, decided, decided_through, done, played

from ebc_lab.cli.screen import View
from ebc_lab.config.compose import compose
from ebc_lab.records.locks import study_lock
from ebc_lab.study.autopilot import Listener, Progress, autopilot
from ebc_lab.study.inspect.forecast import expected_left
from ebc_lab.study.inspect.status import status
from ebc_lab.study.so_far import SoFar, leave_outlook, outlook, so_far
from ebc_lab.study.stages.stage import stage_of
from ebc_lab.study.store.study import Study


def line_of(config, decisions, results, expected=None, running=()):
    def results_of(specs):
        return {s.run_id: results[s.run_id] for s in specs if s.run_id in results}

    return so_far(config, decisions, results_of, expected).line(running)


def test_the_first_minutes_line_gets_better_run_by_run():
    config = config_of()
    specs = stage_of("lr_sweep").runs(config, {}, {})
    grid = {(s.run.optimizer.name, s.run.optimizer.lr): s.run_id for s in specs}
    expected = {"lr_sweep": 22}
    flying = [{"arm": "a", "val_loss": 3.125, "at_step": 50, "steps": 200}]
    nothing = "nothing to compare yet"
    assert line_of(config, {}, {}, expected) == f"{nothing} (0 of about 22 runs)"
    after = f"{nothing}; a had a validation loss of 3.125 after 50 of 200 steps (0 of about 22 runs)"
    assert line_of(config, {}, {}, expected, flying) == after
    results = {grid["muon", 8e-3]: done(2.5)}
    first = "Muon at lr 0.008 is the only result yet, validation loss 2.5000"
    first += " (nothing yet of Adam) (1 of about 22 runs)"
    assert line_of(config, {}, results, expected, flying) == first
    results[grid["muon", 16e-3]] = done(2.53)
    second = (
        "Muon at lr 0.008 leads, 0.0300 nats ahead of lr 0.016 (nothing yet of Adam) (2 of about 22 runs)"
    )
    assert line_of(config, {}, results, expected) == second
    results[grid["adam", 2e-3]] = done(2.45)
    third = "Adam at lr 0.002 leads, 0.0500 nats ahead of Muon at lr 0.008 (3 of about 22 runs)"
    assert line_of(config, {}, results, expected) == third


def test_runs_that_noise_explains_are_not_told_apart():
    config = config_of("optimizer=adam")
    decisions = {"lr_sweep": decided("lr_sweep", config, {}, by_lr(4e-3))}  # replicates 0.01 apart
    targets = stage_of("calibrate").runs(config, decisions, {})
    results = {targets[0].run_id: done(2.01)}
    assert "is the only result yet, validation loss 2.0100" in line_of(config, decisions, results)
    results[targets[1].run_id] = done(2.0)
    close = line_of(config, decisions, results)
    assert "leads, 0.0100 nats ahead of δ*" in close
    assert "not told apart by one run each" in close
    results[targets[1].run_id] = done(1.0)
    assert "not told apart" not in line_of(config, decisions, results)


def test_a_band_that_one_result_or_none_lies_in_is_said_and_not_that_it_is_the_only_result():
    config = config_of("optimizer=adam", "calibrate.choose=band")
    decisions = {"lr_sweep": decided("lr_sweep", config, {}, by_lr(4e-3))}
    targets = stage_of("calibrate").runs(config, decisions, {})
    results = {targets[0].run_id: done(2.01, c=0.05), targets[1].run_id: done(2.02, c=0.1)}
    known = line_of(config, decisions, results)
    nearest = f"δ* {targets[1].run.budget.target_kl:g} is the nearest to its band, in which none lies yet"
    assert nearest in known
    results[targets[1].run_id] = done(2.02, c=0.6)
    assert "is the only one inside its band, validation loss 2.0200" in line_of(config, decisions, results)


@pytest.mark.parametrize(("luck", "is_open"), [(0.0, False), (1.0, True)])
def test_the_finals_are_told_from_the_seeds_that_have_both_runs(luck, is_open):
    config = config_of("optimizer=adam")
    decisions = decided_through("lr_scale", config, by_lr(4e-3))
    gains = {0: -0.2, 1: -0.2 + luck}
    results = {}
    for spec in stage_of("finals").runs(config, decisions, {}):
        if spec.run.seed in gains and spec.kind == "train":
            ebc = spec.run.stabilizer.name == "ebc"
            results[spec.run_id] = done(2.0 + spec.run.seed + ebc * gains[spec.run.seed])
    line = line_of(config, decisions, results)
    assert f"EBC at ×2 {sum(gains.values()) / 2:+.4f} nats against the baseline, from 2 of 3 seeds" in line
    assert ("undecided so far" in line) == is_open
    nobody = {run_id: r for run_id, r in results.items() if "ebc" not in run_id}
    assert line_of(config, decisions, nobody).startswith("nothing to compare yet (")


@pytest.mark.thorough
@pytest.mark.parametrize("suite", ["optimizers", "stabilizers"])
def test_every_stage_of_a_suite_says_something_while_its_last_run_trains(suite):
    config = config_of(f"study={suite}", "study.name=s")
    decisions = {}
    for stage in config.study.stages:
        _, specs, results = played(stage, config, decisions, by_lr(4e-3))
        without = dict(list(results.items())[:-1])
        assert not line_of(config, decisions, without).startswith("nothing")
        decisions[stage] = stage_of(stage).decide(config, specs, results, decisions)
    assert so_far(config, decisions, lambda specs: {}) is None


def test_without_a_terminal_the_line_is_told_once_something_can_be_compared(capsys):
    from rich.console import Console

    view = View(Console(width=200))
    wanted = ["nothing to compare yet (0 of about 9 runs)", "Adam leads (2 of about 9 runs)"]
    for line in (*wanted, "Adam leads (3 …"):
        view.watch(Progress("s", "lr_sweep", 2, so_far=line))
    said = [line.partition("] ")[2] for line in capsys.readouterr().out.splitlines()]
    assert said == [f"lr_sweep so far: {line}" for line in wanted]


def test_who_asks_a_running_study_hears_what_its_driver_knows(tiny, tmp_path, monkeypatch):
    asked = [*tiny, "study.stages=[lr_sweep]", "launcher=inline", f"output_dir={tmp_path}", "study.name=s"]
    study = Study(tmp_path / "s")
    heard = []

    def watch(progress):
        if progress.so_far:
            found = status(study)
            assert found["state"] == "running"
            assert found["so_far"]["line"] == progress.so_far
            heard.append(found["eta_s"])

    monkeypatch.setattr("ebc_lab.study.inspect.status.expected_left", Mock(side_effect=AssertionError))
    autopilot(compose(asked), Listener(watch=watch, expect=expected_left))
    assert heard[0] is None
    assert heard[-1] >= 1.0
    assert outlook(study, None) is None
    assert outlook(study, {"pid": 1, "host": "another", "since": "2026-01-01 00:00:00"}) is None
    study.outlook_file.unlink()
    study.outlook_file.mkdir()  # nothing can be written there: no reason to stop
    with study_lock(study):
        leave_outlook(study, SoFar("lr_sweep", [], 0, 1), None)
        assert outlook(study, study.holder()) is None

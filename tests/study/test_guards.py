"""What stops a study early: failures alike, budgets, a request to cancel; and that each can be carried on."""

import json
import subprocess
from dataclasses import replace

import pytest
from support.drivers import CLI

from ebc_lab.config.compose import compose
from ebc_lab.config.errors import UserError
from ebc_lab.report.conclude import concluding
from ebc_lab.study.autopilot import autopilot
from ebc_lab.study.guards import Breaker, Limits, StageFailed, cause_class
from ebc_lab.study.stages import stage_of
from ebc_lab.study.store.study import Cancelled, Study

GOOD = {"outcome": "completed", "cause": None}


def bad(cause="RuntimeError: no kernel", outcome="failed"):
    return {"outcome": outcome, "cause": cause}


@pytest.fixture
def breaker(tmp_path):
    return lambda proven: Breaker("finals", Study(tmp_path), proven=proven)


def test_two_first_runs_that_fail_alike_stop_a_stage(breaker):
    b = breaker(False)
    b.saw("a", bad(), 5)
    with pytest.raises(
        StageFailed, match=r"its first 2 runs all failed with 'RuntimeError: no kernel'.*log\.txt"
    ):
        b.saw("b", bad(), 4)


def test_later_on_it_takes_three_in_a_row_that_differ_in_numbers_only(breaker):
    b = breaker(True)
    for i in range(2):
        b.saw(f"r{i}", bad(f"OutOfMemoryError: tried to allocate {i + 3}.{i} MiB at 0x7f{i}", "oom"), 9)
    b.saw("ok", GOOD, 8)
    for i in range(2):
        b.saw(f"s{i}", bad(f"OutOfMemoryError: tried to allocate {i + 3}.{i} MiB at 0x7f{i}", "oom"), 7)
    b.saw("other", bad("ValueError: something else"), 6)
    for i in range(2):
        b.saw(f"t{i}", bad(f"loss {i}"), 5)
    with pytest.raises(StageFailed, match="its last 3 runs"):
        b.saw("t2", bad("loss 2"), 1)


def test_a_failure_of_the_last_run_stops_nothing_and_divergence_is_no_failure(breaker):
    b = breaker(False)
    b.saw("a", bad(), 1)
    b.saw("b", bad(), 0)
    b = breaker(False)
    for i in range(9):
        b.saw(f"d{i}", {"outcome": "diverged", "cause": "the loss is nan at step 3"}, 9 - i)


def test_causes_are_told_apart_by_their_words_and_outcome():
    assert cause_class("oom", "tried 12 MiB at 0xdeadbeef") == cause_class("oom", "tried 1.5e3 MiB at 0x0")
    assert cause_class("oom", "x") != cause_class("failed", "x")
    assert cause_class("failed", "no kernel") != cause_class("failed", "no memory")


def specs_of(resolved):
    return stage_of("lr_sweep").runs(resolved, {}, {})


def test_hours_are_foretold_from_finished_runs_and_never_exceeded(resolved):
    specs = specs_of(resolved)
    limits = Limits(max_hours=10 / 3600)
    assert len(limits.admitted(specs)) == 1, "one run alone, to learn from"
    limits.spent_s = 4.0
    limits.ended(specs[0], {"outcome": "completed", "steps": specs[0].run.steps, "wall_s": 4.0})
    assert (
        limits.admitted(specs[1:]) == sorted(specs[1:], key=lambda s: -s.cost)[:1]
    )  # 4 s are spent, 4 fit, 8 do not
    limits.spent_s = 9.0
    assert limits.admitted(specs[2:]) == []
    limits.spent_s = 10.0
    with pytest.raises(StageFailed, match=r"--max-hours.*the same command carries on"):
        limits.tick(1)


def test_a_run_cut_short_teaches_the_rate_of_what_it_did(resolved):
    spec = specs_of(resolved)[0]
    limits = Limits(max_hours=1)
    limits.ended(spec, {"outcome": "diverged", "steps": spec.run.steps / 2, "wall_s": 3.0})
    assert limits.rate * spec.cost == pytest.approx(6.0)


@pytest.mark.parametrize("limit", [{"max_runs": 0}, {"max_hours": -1.0}, {"max_hours": 0.0}])
def test_a_limit_that_allows_nothing_is_refused(limit):
    with pytest.raises(UserError, match="must be > 0"):
        Limits(**limit)


def test_max_runs_stops_before_the_next_run_and_the_same_command_carries_on(finished, tiny, tmp_path):
    _, outcome, _ = finished
    config = compose([*tiny, "launcher=inline", f"output_dir={tmp_path}", "study.name=x"])
    with pytest.raises(StageFailed, match=r"budget is used up.*still to be trained"):
        autopilot(config, concluding(), limits=Limits(max_runs=4))
    assert len(list(tmp_path.glob("x/runs/*/result.json"))) == 4
    again = autopilot(config, concluding(), limits=Limits(max_runs=100))
    assert again.trained == outcome.trained - 4


def test_max_runs_holds_with_workers_that_have_spare_time(tiny, tmp_path):
    command = [
        *CLI,
        "autopilot",
        *tiny,
        "launcher.slots=2",
        f"output_dir={tmp_path}",
        "study.name=x",
        "--max-runs",
        "5",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3
    assert "stopped: the budget is used up" in done.stderr
    assert len(list(tmp_path.glob("x/runs/*/result.json"))) == 5
    assert len(list(tmp_path.glob("x/runs/*/attempts.jsonl"))) == 5


def test_cancel_reaches_a_driver_through_the_study_and_records_what_was_under_way(tiny, tmp_path):
    command = [
        *CLI,
        "autopilot",
        *tiny,
        "launcher.slots=2",
        f"output_dir={tmp_path}",
        "study.name=x",
        "calibrate.steps=20000",
    ]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    study = Study(tmp_path / "x")
    assert any("calibrate: " in line for line in driver.stdout)
    while not any(study.progress(d.name) for d in study.runs.iterdir()):
        pass
    done = subprocess.run(
        [*CLI, "cancel", "x", "--output-dir", str(tmp_path), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    out, _ = driver.communicate()
    assert driver.returncode == 130
    assert "cancelled" in out
    found = json.loads(done.stdout)
    assert found["driver"]["pid"] == driver.pid
    assert found["runs"]
    assert all(study.result(r)["outcome"] == "cancelled" for r in found["runs"])
    assert (study.run_dir(found["runs"][0]) / "checkpoint.pt").exists()
    assert study.holder() is None
    status = json.loads(
        subprocess.run(
            [*CLI, "status", "x", "--output-dir", str(tmp_path), "--json"], capture_output=True, text=True
        ).stdout
    )
    assert status["state"] == "interrupted"
    again = subprocess.run(
        [*CLI, "cancel", "x", "--output-dir", str(tmp_path), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(again.stdout) == {"study": "x", "driver": None, "jobs": 0, "runs": []}


def test_a_request_to_cancel_stops_an_inline_study_between_runs(tiny, tmp_path):
    config = compose([*tiny, "launcher=inline", f"output_dir={tmp_path}", "study.name=x"])
    study = Study(tmp_path / "x")

    def say(text):
        if text.startswith("calibrate: "):
            study.cancel_mark.touch()

    with pytest.raises(Cancelled):
        autopilot(config, concluding(say=say))
    assert list(study.decisions()) == ["lr_sweep"]
    assert autopilot(replace(config), concluding()).failed == []
    assert not study.cancel_mark.exists()


def test_cancel_of_a_study_that_is_not_there_says_so(tmp_path):
    done = subprocess.run(
        [*CLI, "cancel", "nope", "--output-dir", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "there is no study" in done.stderr

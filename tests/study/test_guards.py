"""What stops a study early: similar failures, budgets, a request to cancel; each can be continued."""

import os
import shlex
import signal
import subprocess
import sys

import pytest
import typer
from support.called import CLI, called
from support.drivers import until, until_true

from ebc_lab.config.compose import compose
from ebc_lab.config.errors import UserError
from ebc_lab.study.autopilot import Listener, autopilot
from ebc_lab.study.guards import Breaker, Limits, StageFailed
from ebc_lab.study.inspect.status import status
from ebc_lab.study.launch.cancel import cancel
from ebc_lab.study.stages.stage import stage_of
from ebc_lab.study.store.study import Cancelled, Study

GOOD = {"outcome": "completed", "cause": None}


def bad(cause="RuntimeError: no kernel", outcome="failed"):
    return {"outcome": outcome, "cause": cause}


@pytest.fixture
def breaker(tmp_path):
    return lambda proven: Breaker("finals", Study(tmp_path), proven=proven)


def test_two_first_runs_that_fail_alike_stop_a_stage(breaker):
    b = breaker(False)
    b.see("a", bad(), 5)
    words = r"its first 2 runs all failed with 'RuntimeError: no kernel'.*log\.txt"
    with pytest.raises(StageFailed, match=words):
        b.see("b", bad(), 4)


def test_later_on_it_takes_three_in_a_row_that_differ_in_numbers_only(breaker):
    b = breaker(True)
    for result in (GOOD, bad("ValueError: something else")):
        for i in range(2):
            b.see(f"r{i}", bad(f"OutOfMemoryError: tried to allocate {i + 3}.{i} MiB at 0x7f{i}", "oom"), 9)
        b.see("other", result, 8)
    for i in range(2):
        b.see(f"t{i}", bad(f"loss {i}"), 5)
    with pytest.raises(StageFailed, match="its last 3 runs"):
        b.see("t2", bad("loss 2"), 1)


def test_a_failure_of_the_last_run_stops_nothing_and_divergence_is_no_failure(breaker):
    b = breaker(False)
    b.see("a", bad(), 1)
    b.see("b", bad(), 0)
    b = breaker(False)
    for i in range(9):
        b.see(f"d{i}", {"outcome": "diverged", "cause": "the loss is nan at step 3"}, 9 - i)


def test_hours_are_foretold_from_finished_runs_and_never_exceeded(resolved):
    specs = stage_of("lr_sweep").runs(resolved, {}, {})
    limits = Limits(max_hours=10 / 3600)
    assert len(limits.admit(specs)) == 1, "one run alone, to learn from"
    limits.spent_s = 4.0
    half = {"outcome": "diverged", "steps": specs[0].run.steps / 2, "wall_s": 2.0}
    limits.record_end(specs[0], half)
    assert limits.rate * specs[0].cost == pytest.approx(4.0), "what it did, in its time"
    longest = sorted(specs[1:], key=lambda s: -s.cost)[:1]
    assert limits.admit(specs[1:]) == longest  # 4 s are spent, 4 fit, 8 do not
    limits.spent_s = 9.0
    assert limits.admit(specs[2:]) == []
    limits.spent_s = 10.0
    with pytest.raises(StageFailed, match=r"--max-hours.*the same command continues"):
        limits.tick(1)


@pytest.mark.parametrize("limit", [{"max_runs": 0}, {"max_hours": -1.0}, {"max_hours": 0.0}])
def test_a_limit_that_allows_nothing_is_refused(limit):
    with pytest.raises(UserError, match="must be > 0"):
        Limits(**limit)


@pytest.mark.thorough
def test_max_runs_stops_before_the_next_run_and_the_same_command_continues(finished, tiny, tmp_path):
    _, outcome, _ = finished
    config = compose([*tiny, "launcher=inline", f"output_dir={tmp_path}", "study.name=x"])
    with pytest.raises(StageFailed, match=r"limit of this call is reached.*still to be trained"):
        autopilot(config, Listener(), stages=["lr_sweep"], limits=Limits(max_runs=4))
    assert len(list(tmp_path.glob("x/runs/*/result.json"))) == 4
    again = autopilot(config, Listener(), stages=["lr_sweep"], limits=Limits(max_runs=100))
    needed = {c["run_id"] for c in outcome.study.decisions()["lr_sweep"]["candidates"]}
    assert again.trained == len(needed) - 4


@pytest.mark.slow
def test_max_runs_holds_with_workers_that_have_spare_time(tiny, tmp_path):
    config = compose([*tiny, "launcher.slots=2", f"output_dir={tmp_path}", "study.name=x"])
    with pytest.raises(StageFailed, match="limit of this call is reached"):
        autopilot(config, Listener(), limits=Limits(max_runs=4))
    assert len(list(tmp_path.glob("x/runs/*/result.json"))) == 4
    assert len(list(tmp_path.glob("x/runs/*/attempts.jsonl"))) == 4


def begun(*settings: str) -> subprocess.Popen:
    """A driver of its own process group, which has begun to train."""
    command, pipe = [*CLI, "autopilot", *settings], subprocess.PIPE
    driver = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    until(driver, "lr_sweep: ")
    return driver


@pytest.mark.thorough
def test_whoever_stops_a_study_is_told_once_what_happened_and_the_command_that_continues_it(
    tiny, text_file, tmp_path
):
    """The command is pasted, from another folder, and trains the study to its end; until then the runs that
    were in progress are recorded as cancelled, with their checkpoints."""
    words = tmp_path / "my words.txt"
    words.write_bytes(text_file.read_bytes())
    own = [*(w for w in tiny if not w.startswith("data.file")), "study.stages=[lr_sweep]", "study.name=x"]
    own += [f"data.file='{words}'", f"output_dir={tmp_path}", "launcher.slots=1", "lr_sweep.steps=2000"]
    study = Study(tmp_path / "x")
    driver = begun(*own, "lr_sweep.grids.adam=[1e-2,2e-2]")
    until_true(lambda: any((study.progress(run) or {}).get("step") for run in study.run_ids()))
    told = called("cancel", "x", "--output-dir", str(tmp_path), cwd=tmp_path)
    _, err = driver.communicate()
    assert driver.returncode == 130
    assert f"asking process {driver.pid} on " in told.stderr
    [run] = [r for r in study.run_ids() if (study.result(r) or {}).get("outcome") == "cancelled"]
    assert study.run_files(run).checkpoint.exists()
    assert cancel(study, print) == {"study": "x", "driver": None, "jobs": 0, "runs": []}
    assert status(study)["state"] == "interrupted"
    twice = called("cancel", "x", "--output-dir", str(tmp_path), cwd=tmp_path).stdout.splitlines()
    assert twice[0].startswith("x was cancelled already, so there is nothing to cancel; this continues it")
    assert twice[1:] == told.stdout.splitlines()[1:]
    what, command = err.strip().splitlines()
    assert what == "study x was cancelled; the same command continues from here:"
    assert shlex.split(command)[:2] == ["ebc-lab", "autopilot"]
    assert told.stdout.splitlines()[0].startswith("x: cancelled; ")
    cd, folder, and_, *pasted = shlex.split(told.stdout.splitlines()[1])
    assert (cd, folder, and_) == ("cd", os.getcwd(), "&&")
    shown = called("status", "x", "--output-dir", str(tmp_path), cwd=tmp_path)
    assert told.stdout.splitlines()[1] in shown.stdout
    assert "again:" not in shown.stdout
    assert called(*pasted[1:], cwd=folder).returncode == 0
    assert status(study)["state"] == "finished"


@pytest.mark.thorough
def test_an_interrupt_of_the_whole_process_group_is_one_line_and_leaves_checkpoints(tiny, tmp_path):
    """As from `timeout -s INT`, or a script that ends its group."""
    own = [*tiny, f"output_dir={tmp_path}", "study.name=x", "launcher.slots=2", "lr_sweep.steps=100000"]
    study = Study(tmp_path / "x")
    driver = begun(*own)
    until_true(lambda: any((study.progress(run) or {}).get("step") for run in study.run_ids()))
    os.killpg(driver.pid, signal.SIGINT)
    _, err = driver.communicate()
    assert driver.returncode == 130
    command = shlex.join(["ebc-lab", "autopilot", *own])
    assert err == f"interrupted; the same command continues from here: {command}\n"
    in_progress = [run_id for run_id in study.run_ids() if study.run_files(run_id).progress.exists()]
    assert in_progress
    assert all(study.run_files(run_id).checkpoint.exists() for run_id in in_progress)


def test_two_quick_interrupts_are_one_line_whatever_a_library_makes_of_the_first(monkeypatch, tmp_path):
    def cut_off(*_, **__):
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            raise AttributeError("'NoneType' object has no attribute 'flags'")

    def ended(code):  # the second one comes while Python ends
        signal.raise_signal(signal.SIGINT)
        raise SystemExit(code)

    monkeypatch.setattr(typer.Typer, "__call__", cut_off)
    monkeypatch.setattr(sys, "exit", ended)
    done = called("autopilot", "scale=smoke", cwd=tmp_path)
    told = "interrupted; the same command continues from here: ebc-lab autopilot scale=smoke\n"
    assert (done.returncode, done.stderr) == (130, told)


@pytest.mark.thorough
def test_a_request_to_cancel_stops_an_inline_study_between_runs(tiny, tmp_path):
    config = compose([*tiny, "launcher=inline", f"output_dir={tmp_path}", "study.name=x"])
    study = Study(tmp_path / "x")

    def say(text):
        if text.startswith("calibrate: "):
            study.cancel_mark.touch()

    with pytest.raises(Cancelled):
        autopilot(config, Listener(say=say))
    assert list(study.decisions()) == ["lr_sweep"]
    assert autopilot(config, Listener(), stages=["calibrate"]).failed == []
    assert not study.cancel_mark.exists()

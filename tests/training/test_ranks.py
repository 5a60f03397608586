"""One run trained by two processes: the losses of one process, resuming after an end of any kind, and that no
process is left."""

import json
import os
import re
import select
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.called import called
from support.drivers import struck_once
from support.runs import assert_over, ebc, killed_in_mid_run, plain
from support.smi import BUSY

from ebc_lab.config.choices import changed
from ebc_lab.config.errors import UserError
from ebc_lab.records.streams import read_columns
from ebc_lab.training import apart
from ebc_lab.training.ends import DeviceFailed, Interrupted
from ebc_lab.training.outcome import run_and_record

# Two halves of a batch are added up in another order, which changes a float32 sum by some 1e-7; this grows
# with every step by the sensitivity of training, to 1e-5 in 30 steps here. A row that is left out, or a KL
# measured on other rows, changes losses by 1e-2 within the first steps.
TOLERANCE = 2e-4

STAGES = ("lr_sweep", "calibrate", "finals")  # settings of a study


@pytest.fixture(scope="module", autouse=True)
def none_left():
    yield
    apart._close_idle()
    pids = [pid for own in apart._idle.values() for p in own for pid in processes_of(p.process.pid)]
    apart._idle.clear()
    assert pids == []


def processes_of(launcher: int) -> list[int]:
    """The processes that torchrun has started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def launcher() -> subprocess.Popen:
    [process] = apart._idle["auto", 2, 1]
    return process.process


def interrupted(run, folder: Path, processes: int) -> None:
    """Train in `folder` until a checkpoint after step 11."""
    seen: list[int] = []
    stop = {"on_progress": seen.append, "should_stop": lambda: bool(seen) and seen[-1] >= 11}
    with pytest.raises(Interrupted):
        run_and_record(run, folder, "x", processes=processes, **stop)


def same(a: Path, b: Path) -> None:
    """The steps of two runs are the same but for rounding."""
    one, two = read_columns(a / "steps.csv"), read_columns(b / "steps.csv")
    for column in ("loss", "c", "audit_tokens"):
        np.testing.assert_allclose(two[column], one[column], rtol=TOLERANCE)
    np.testing.assert_allclose(two["applied_kl"], one["applied_kl"], rtol=0.02)
    one, two = read_columns(a / "evals.csv"), read_columns(b / "evals.csv")
    np.testing.assert_allclose(two["val_loss"], one["val_loss"], rtol=TOLERANCE)
    np.testing.assert_allclose(two["val_se"], one["val_se"], rtol=0.01)


@pytest.mark.parametrize(
    ("budget", "accumulate"), [({"name": "shadow"}, 2), ({"name": "tracked", "probe_tokens": "held"}, 1)]
)
def test_two_processes_train_what_one_does(run, budget, accumulate, tmp_path):
    run = replace(ebc(run, **budget), batch_size=12, accumulate=accumulate, audit_every=5)
    run = replace(run, eval_windows=7)  # of which one has more than the other
    alone = run_and_record(run, tmp_path / "alone", "x")
    together = run_and_record(run, tmp_path / "together", "x", processes=2)
    assert (together["outcome"], together["identity"]) == ("completed", alone["identity"])
    assert together["test_loss"] == pytest.approx(alone["test_loss"], rel=TOLERANCE)
    same(tmp_path / "alone", tmp_path / "together")
    assert "2 processes together" in (tmp_path / "together" / "log.txt").read_text()


@pytest.mark.thorough
def test_what_one_process_has_begun_two_finish_and_the_other_way_round(run, tmp_path):
    run = ebc(run, name="shadow")
    run_and_record(run, tmp_path / "whole", "x")
    for first, then in ((1, 2), (2, 1)):
        folder = tmp_path / str(first)
        interrupted(run, folder, first)
        said: list[str] = []
        assert run_and_record(run, folder, "x", processes=then, say=said.append)["outcome"] == "completed"
        assert said == []
        same(tmp_path / "whole", folder)


@pytest.mark.thorough
def test_what_the_first_process_finds_of_a_checkpoint_holds_for_all(run, tmp_path):
    run = plain(run)
    run_and_record(run, tmp_path / "whole", "x", processes=2)
    folder, said = tmp_path / "broken", []
    interrupted(run, folder, 2)
    path = folder / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    run_and_record(run, folder, "x", processes=2, say=said.append)
    assert ["checkpoint.damaged-1.pt: it starts" in text for text in said] == [True]
    assert (tmp_path / "whole" / "steps.csv").read_bytes() == (folder / "steps.csv").read_bytes()


@pytest.mark.thorough
@pytest.mark.parametrize(
    "victim",
    ["one of them", pytest.param("launcher", marks=pytest.mark.slow)],
)
def test_kill_9_of_any_of_them_ends_all_and_the_run_goes_on_from_its_checkpoint(run, victim, tmp_path, capfd):
    # so long that it is not over before the others notice
    run = replace(plain(run), steps=600 if victim == "launcher" else 150)
    run_and_record(run, tmp_path / "whole", "x", processes=2)
    started = launcher()
    ranks = processes_of(started.pid)
    target = started.pid if victim == "launcher" else ranks[1]
    ends = [os.pidfd_open(pid) for pid in ranks]

    def kill(step: int) -> None:
        if step == 11:
            os.kill(target, signal.SIGKILL)

    with pytest.raises(DeviceFailed):
        run_and_record(run, tmp_path / "killed", "x", processes=2, checkpoint_every_s=0.0, on_progress=kill)
    for end in ends:
        assert select.select([end], [], [], 30)[0], "it goes on without the others"
        os.close(end)
    assert not (tmp_path / "killed" / "result.json").exists()
    log = tmp_path / "killed" / "log.txt"
    assert victim == "launcher" or "Traceback" in log.read_text()  # what the others say of it
    assert "Traceback" not in capfd.readouterr().err
    said: list[str] = []
    run_and_record(run, tmp_path / "killed", "x", processes=2, say=said.append)
    assert said == []
    assert list(read_columns(tmp_path / "killed" / "steps.csv")["step"]) == list(range(run.steps))
    same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.thorough
@pytest.mark.parametrize("at", ["ebc_lab.components.optimizer:build", "ebc_lab.training.ranks:joined"])
def test_a_gpu_that_fails_under_one_of_them_is_no_outcome_of_the_run(run, at, tmp_path, monkeypatch):
    for process in apart._idle.pop(("auto", 2, 1), []):
        process.close()
    error = f'RuntimeError("{BUSY}")'
    monkeypatch.setenv("PYTHONPATH", struck_once(tmp_path, error, at))
    with pytest.raises(DeviceFailed, match=re.escape(BUSY)):
        run_and_record(plain(run), tmp_path / "run", "x", processes=2)
    assert (tmp_path / "struck").exists()
    assert not (tmp_path / "run" / "result.json").exists()
    assert BUSY in (tmp_path / "run" / "log.txt").read_text()
    assert run_and_record(plain(run), tmp_path / "run", "x", processes=2)["outcome"] == "completed"


@pytest.mark.slow
def test_two_processes_of_a_run_do_not_share_a_gpu_and_gpus_that_are_not_shown_have_failed(
    run, tmp_path, monkeypatch
):
    run = replace(plain(run), device="cuda")
    with pytest.raises(UserError, match="takes a GPU for each process, and CUDA shows 0 to this worker"):
        run_and_record(run, tmp_path, "x", processes=2)
    for process in apart._idle.pop(("auto", 2, 1), []):
        process.close()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1,GPU-2")
    with pytest.raises(DeviceFailed, match="CUDA shows 0 of the 2 GPUs of this worker"):
        run_and_record(run, tmp_path, "x", processes=2)


@pytest.mark.slow
def test_they_die_with_the_process_that_started_them(run, tmp_path):
    run = replace(plain(run), steps=300)
    killed_in_mid_run(run, tmp_path / "killed", processes=2)
    assert_over(tmp_path)
    assert not (tmp_path / "killed" / "result.json").exists()


def test_what_one_of_them_alone_would_refuse_is_refused_before_they_are_started(run, tmp_path):
    with pytest.raises(UserError, match="must divide batch_size, which is 10"):
        run_and_record(plain(run), tmp_path, "x", processes=4)
    assert ("auto", 4, 1) not in apart._idle


@pytest.mark.slow
def test_a_run_that_diverges_does_so_in_all_of_them_and_one_that_fails_ends_them(run, tmp_path):
    wild = changed(plain(run), {"optimizer": {"lr": 1e6}})
    assert run_and_record(wild, tmp_path / "wild", "x", processes=2)["outcome"] == "diverged"
    before = launcher()
    (tmp_path / "failing").mkdir()
    (tmp_path / "failing" / "evals.csv").mkdir()  # the first process alone cannot go on
    failed = run_and_record(plain(run), tmp_path / "failing", "x", processes=2)
    assert failed["outcome"] == "failed"
    assert before.poll() is not None
    assert run_and_record(plain(run), tmp_path / "next", "x", processes=2)["outcome"] == "completed"


@pytest.mark.thorough
def test_signals_are_for_the_process_that_started_them(run, tmp_path):
    run_and_record(plain(run), tmp_path / "before", "x", processes=2)
    started = launcher()
    everybody = [started.pid, *processes_of(started.pid)]

    def alarm(step: int) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            for pid in everybody if step == 5 else ():
                os.kill(pid, number)

    done = run_and_record(plain(run), tmp_path / "run", "x", processes=2, on_progress=alarm)
    assert done["outcome"] == "completed"
    assert launcher() is started


def test_train_asks_for_several_processes_by_the_launcher(tiny, tmp_path):
    asked = ["stabilizer=none", "steps=10", "launcher.processes_per_run=2", f"hydra.run.dir={tmp_path}"]
    done = called("train", *[o for o in tiny if not o.startswith(STAGES)], *asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "completed" in done.stdout
    assert "2 processes together" in (tmp_path / "log.txt").read_text()
    assert json.loads((tmp_path / "result.json").read_text())["outcome"] == "completed"


def test_a_process_whose_launcher_is_gone_ends():
    command = "from ebc_lab.training.ranks import _end_with; _end_with(launcher=-1)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 1

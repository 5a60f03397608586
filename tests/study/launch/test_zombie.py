"""A worker on a node that is cut off: nothing is heard of it, its run is given to another, and it comes back.

It is a real process here, stopped by SIGSTOP while it holds the lock of its run, and continued by SIGCONT.
"""

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.drivers import until_true
from support.idle import RESOLVED, Bench

from ebc_lab.records.locks import run_lock
from ebc_lab.records.paths import RunFiles
from ebc_lab.study.launch import InlinePool
from ebc_lab.study.launch.local import WORKER
from ebc_lab.study.launch.session import Session, worker_settings
from ebc_lab.study.store import attempts
from ebc_lab.training.outcome import run_and_record


class CutOff:
    """A study with a worker of its own, as in a Slurm job whose driver has lost sight of it."""

    def __init__(self, out: Path, *overrides: str):
        self.bench = Bench(out, *overrides)
        settings = worker_settings(self.bench.config) | {"checkpoint_every_s": 0.0}
        self.session = Session.begin(self.bench.study, "slurm", bound=False, idle_s=0.0, **settings)
        self.worker: subprocess.Popen[str] | None = None

    def start(self, run_id: str) -> None:
        self.session.publish([run_id])
        command = [sys.executable, *WORKER, str(self.session.root), "lost"]
        self.worker = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def stop(self) -> None:
        self.worker.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.worker.pid, os.WSTOPPED)

    def come_back(self) -> str:
        """-> what it says before it ends."""
        self.worker.send_signal(signal.SIGCONT)
        _, said = self.worker.communicate()
        return said

    def close(self) -> None:
        self.bench.close()
        if self.worker is not None:
            self.worker.kill()
            self.worker.wait()
            self.worker.stderr.close()


@pytest.fixture
def cut_off():
    with ExitStack() as stack:

        def make(*asked) -> CutOff:
            made = CutOff(*asked)
            stack.callback(made.close)
            return made

        yield make


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_worker_that_comes_back_while_another_trains_its_run_disturbs_nothing(cut_off, tmp_path):
    made = cut_off(tmp_path)
    bench = made.bench
    [spec] = bench.idle(1, at=1, do="hold")
    files = bench.study.run_files(spec.run_id)
    made.start(spec.run_id)
    until_true(lambda: (bench.study.progress(spec.run_id) or {}).get("step"))
    made.stop()
    said = []

    def check_in(done, busy):
        # the second one holds the run as well, when the first comes back
        if busy and not said:
            said.append(made.come_back())
            bench.release(spec)

    bench.pool(heartbeat_s=2.0).run([spec], [], check_in, canary=False)
    events = bench.events(spec)
    assert [e["event"] for e in events] == ["begin", "lost", "begin", "refused", "end"]
    lost, mine = events[0]["attempt"], events[2]["attempt"]
    assert [e["attempt"] for e in events] == [lost, lost, mine, lost, mine]
    assert lost != mine
    assert f"no sign of life for 2 s of process {made.worker.pid}" in events[1]["cause"]
    assert f"{spec.run_id} was given to another attempt on {os.uname().nodename}" in said[0]
    assert "what it still had to write is refused, and it ends here" in said[0]
    assert bench.study.result(spec.run_id)["outcome"] == "completed"
    assert not [path.name for path in files.directory.glob(".*") if path != files.lock], "no token is left"


@pytest.mark.thorough
def test_the_late_checkpoint_and_result_of_a_lost_attempt_are_refused(cut_off, tiny, tmp_path):
    made = cut_off(tmp_path, *tiny, "dtype=float32", "threads_per_run=1", "compile=off")
    bench = made.bench
    spec = bench.spec("train", steps=150)
    files = bench.study.run_files(spec.run_id)
    made.start(spec.run_id)
    until_true(files.checkpoint.exists)
    made.stop()
    assert bench.study.progress(spec.run_id)["step"] < 150
    bench.run([spec], max_lost=9, heartbeat_s=10.0)
    bench.close()
    after = contents(files.directory)
    said = made.come_back()
    assert contents(files.directory) == after
    assert "what it still had to write is refused, and it ends here" in said
    assert not files.checkpoint.exists(), "that of a finished run is gone and stays so"
    events = [event["event"] for event in attempts.log(files.directory)]
    assert (events[:3], events[-1]) == (["begin", "lost", "begin"], "end")
    assert "refused" not in events, "the log of a finished run may be recorded"

    alone = RunFiles(tmp_path / "alone")
    run_and_record(spec.run, alone.directory, spec.run_id)
    assert files.steps.read_bytes() == alone.steps.read_bytes()
    results = [json.loads(path.read_text()) for path in (files.result, alone.result)]
    assert results[0]["val_loss"] == results[1]["val_loss"]


def test_a_worker_whose_job_was_started_again_elsewhere_leaves_its_run_to_others(cut_off, tmp_path):
    made = cut_off(tmp_path)
    bench = made.bench
    [spec] = bench.idle(1, at=1, do="hold")
    made.start(spec.run_id)
    until_true(lambda: attempts.log(bench.study.run_dir(spec.run_id)))
    until_true(lambda: made.session.notes().get("lost", {}).get("run_id"))
    made.session.note("process", "lost", host="other", pid=1)
    assert made.worker.wait() == 0
    _, said = made.worker.communicate()
    assert "ends: its job was started again on other (process 1)" in said
    assert bench.kinds(spec) == ["begin", "stopped"]
    bench.release(spec)
    bench.run([spec])
    assert bench.kinds(spec) == ["begin", "stopped", "begin", "end"]


def test_without_workers_too_a_run_whose_holder_is_silent_is_trained(tmp_path):
    bench = Bench(tmp_path, *RESOLVED, "launcher=inline", "launcher.heartbeat_s=0.1", "launcher.start_s=0.1")
    spec = bench.spec("train", steps=3)
    with run_lock(bench.study.run_dir(spec.run_id)) as token:
        assert token
        InlinePool(bench.config, bench.study).run([spec], [], lambda done, busy: None, canary=False)
    assert bench.study.result(spec.run_id)["outcome"] == "completed"
    assert [event["event"] for event in bench.events(spec)] == ["lost", "begin", "end"]


def test_a_job_that_is_told_to_end_and_does_not_takes_its_run_up_again(cut_off, tmp_path):
    """Slurm sends SIGTERM before it takes a node away, and may leave it after all."""
    made = cut_off(tmp_path, *RESOLVED, "launcher.heartbeat_s=1")
    bench = made.bench
    [spec] = bench.idle(1, at=1, do="hold")
    made.start(spec.run_id)
    until_true(lambda: (bench.study.progress(spec.run_id) or {}).get("step"))
    made.worker.send_signal(signal.SIGTERM)
    until_true(lambda: bench.kinds(spec)[2:] or made.worker.poll() is not None)
    bench.release(spec)
    assert made.worker.wait() == 0
    assert bench.kinds(spec) == ["begin", "stopped", "begin", "end"]

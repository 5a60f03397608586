"""On a real Slurm (make test-slurm): what happens to a study there, and that its results are those of one
process.

The quick ones (make test-slurm-quick) hold runs of kind `idle`, or train one stage.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.called import CLI
from support.drivers import end_jobs, jobs, shell, started, until, without_timing
from support.idle import Bench
from support.idle import driver as driver_of_idle_runs
from support.smi import gpu_uuid

from ebc_lab.config.compose import compose
from ebc_lab.report.conclude import concluding
from ebc_lab.study.autopilot import autopilot
from ebc_lab.study.launch.slurm import SlurmPool
from ebc_lab.study.store import attempts
from ebc_lab.study.store.study import Study

pytestmark = pytest.mark.slurm
QUIETLY = ["sbatch", "--parsable", "--output=/dev/null"]
WHOLE_NODE = [*QUIETLY, "--partition=high", "--gpus-per-node=2", "--wrap=true"]
IDLE = {"name": "slurm", "slots": 2, "gpus_per_node": 1, "queue_every_s": 1.0}


@pytest.fixture
def study(tiny, tmp_path):
    """A study on two jobs of one (fake) GPU each. No job is left in the queue, even if the test fails."""
    made = SlurmStudy(tiny, tmp_path)
    yield made
    end_jobs(made.study)


class SlurmStudy:
    def __init__(self, tiny, out):
        self.out = out
        asked = ["launcher=slurm", "launcher.slots=2", "launcher.gpus_per_node=1", "launcher.queue_every_s=1"]
        self.command = [*CLI, "autopilot", *tiny, *asked, f"output_dir={out}", "study.name=s"]
        self.study = Study(out / "s")

    def start(self, *more: str) -> subprocess.Popen:
        return started([*self.command, *more])

    def finish(self, *more: str) -> str:
        done = subprocess.run([*self.command, *more], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def call(self, *words: str) -> subprocess.CompletedProcess:
        return subprocess.run([*CLI, *words, "--output-dir", str(self.out)], capture_output=True, text=True)

    def live(self) -> list[str]:
        return [key for key, job in jobs(self.study).items() if job.live]


@pytest.fixture
def idle(tmp_path):
    """Runs of kind `idle` on two jobs of one (fake) GPU each, for pools that run in this process."""
    made = Bench(tmp_path)
    made.config = replace(made.config, launcher=replace(made.config.launcher, **IDLE))
    yield made
    end_jobs(made.study)


def slurm_pool(bench: Bench) -> SlurmPool:
    return SlurmPool(bench.config, bench.study, 2, bench.said.append)


def show_job(key: str) -> str:
    return shell("scontrol", "show", "job", key)


def same_as(finished, study: SlurmStudy) -> None:
    for table in ("summary_final.csv", "summary_lr_sweep.csv"):
        assert without_timing(study.study.root / table) == without_timing(finished[1].study.root / table)
    assert study.live() == []


def test_array_jobs_give_the_same_bytes_as_one_process_and_leave_nothing_in_the_queue(tiny, study, tmp_path):
    stage = "study.stages=[lr_sweep]"
    said = study.finish(stage)
    assert "submitted 2 Slurm job(s)" in said
    inline = ["launcher=inline", f"output_dir={tmp_path}", "study.name=inline", stage]
    autopilot(compose([*tiny, *inline]), concluding())
    table = "summary_lr_sweep.csv"
    assert without_timing(study.study.root / table) == without_timing(tmp_path / "inline" / table)
    assert {job.state for job in jobs(study.study).values()} == {"COMPLETED"}


def test_one_job_trains_a_run_by_two_processes_with_the_cores_of_both(study):
    stage = ["study.stages=[lr_sweep]", "lr_sweep.grids.adam=[1e-2,2e-2]", "lr_sweep.baseline_scales=[1.0]"]
    study.finish(*stage, "launcher.slots=1", "launcher.processes_per_run=2")
    records = study.study.records()
    assert {record.result["outcome"] for record in records} == {"completed"}
    logs = [attempts.log(study.study.run_dir(record.run_id)) for record in records]
    assert {event["processes"] for log in logs for event in log if event["event"] == "begin"} == {2}
    assert all("NumCPUs=2 " in show_job(key) for key in jobs(study.study))


def test_kill_9_of_the_driver_leaves_the_jobs_working_and_the_next_driver_adopts_them(idle, tmp_path):
    driver = started(driver_of_idle_runs(tmp_path, **IDLE))
    until(driver, "submitted 2 Slurm job(s)", "both are held")
    driver.kill()
    driver.communicate()
    specs = idle.idle(2)
    idle.release(*specs)
    pool = slurm_pool(idle)
    pool.run(specs, [], lambda done, busy: None, canary=False)
    pool.close()
    assert idle.said[0].startswith("adopted 2 Slurm job(s) of an earlier call: ")
    assert not any("submitted" in line for line in idle.said)
    assert [idle.kinds(spec) for spec in specs] == [["begin", "end"]] * 2
    gpus = {idle.events(spec)[0]["cuda_visible_devices"] for spec in specs}
    assert gpus == {"0", "1"}, "each job sees the one (fake) GPU that Slurm gave it"
    assert not any(job.live for job in jobs(idle.study).values())


@pytest.mark.parametrize("times", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_preemption_is_a_checkpoint_and_a_requeue(times, idle):
    """submitit counts every preemption of a job of at most ten minutes as a time-out, and by default gives a
    job up at the fourth."""
    idle.config = replace(idle.config, launcher=replace(idle.config.launcher, timeout_min=5))
    specs = idle.idle(2, at=1, do="hold")
    preempting: list[str] = []

    def check_in(done, busy) -> None:
        begun, stopped = ([idle.kinds(spec).count(kind) for spec in specs] for kind in ("begin", "stopped"))
        if len(busy) == 2 and max(stopped) == len(preempting) < min(begun) and len(preempting) < times:
            preempting.append(shell(*WHOLE_NODE))
        if min(stopped) == times:
            idle.release(*specs)

    pool = slurm_pool(idle)
    pool.run(specs, [], check_in, canary=False)
    shown = [show_job(key) for key in jobs(idle.study)]
    pool.close()
    assert [idle.kinds(spec) for spec in specs] == [[*["begin", "stopped"] * times, "begin", "end"]] * 2
    assert [idle.study.result(spec.run_id)["steps"] for spec in specs] == [5, 5]
    assert len(shown) == 2
    assert all(f"Restarts={times}" in text for text in shown), shown


def test_cancel_ends_driver_and_jobs(study):
    driver = study.start("calibrate.steps=20000")
    until(driver, "submitted", "calibrate: ")
    done = study.call("cancel", "s", "--json")
    out, _ = driver.communicate()
    assert (done.returncode, driver.returncode) == (0, 130), done.stderr + out
    assert "cancelled" in out
    assert study.live() == []
    assert study.study.holder() is None
    assert json.loads(study.call("status", "s", "--json").stdout)["state"] == "interrupted"


@pytest.fixture
def second_gpu():
    """The first of the node's two (fake) GPUs is taken by another job."""
    job = shell(*QUIETLY, "--partition=main", "--gpus-per-node=1", "--wrap=tail -f /dev/null")
    try:
        while "JobState=RUNNING" not in (shown := show_job(job)):
            assert "JobState=PENDING" in shown, shown
        yield
    finally:
        shell("scancel", job)


@pytest.mark.parametrize("change", ["", "unset CUDA_VISIBLE_DEVICES"])
def test_a_driver_in_a_job_uses_the_gpus_of_its_job_alone(change, machine_with, second_gpu, tmp_path):
    machine_with(2)
    done = in_a_job(tmp_path, change, "--gpus-per-node=1")
    assert done.returncode == 0, done.stdout
    study = Study(tmp_path / "s")
    begun = [
        event for run in study.runs.iterdir() for event in attempts.log(run) if event["event"] == "begin"
    ]
    assert [event["cuda_visible_devices"] for event in begun] == [gpu_uuid(1)] * 2
    assert len({event["pid"] for event in begun}) == 1, "one GPU, one worker"


def test_a_driver_in_a_job_without_gpus_uses_none_of_the_nodes(machine_with, tmp_path):
    machine_with(2)
    done = in_a_job(tmp_path, "")
    assert done.returncode != 0
    assert "Slurm gave no GPU to this job" in done.stdout


def in_a_job(out: Path, change: str, *options: str) -> subprocess.CompletedProcess:
    """A driver of idle runs on this machine's GPUs, as a job, after a change of its environment."""
    script = f"{change}\nexec {shlex.join(driver_of_idle_runs(out, device='cuda', slots=0, hold=False))}"
    command = ["srun", "--quiet", "--partition=main", *options, "bash", "-c", script]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_ctrl_c_says_what_continues_and_how_to_end_it(study, tmp_path, monkeypatch):
    driver = study.start("calibrate.steps=20000")
    until(driver, "calibrate: ")
    driver.send_signal(signal.SIGINT)
    out, _ = driver.communicate()
    assert driver.returncode == 130
    assert "continue without this driver" in out
    assert "ebc-lab cancel s" in out
    assert study.live()
    with monkeypatch.context() as elsewhere:  # the study itself remembers where its jobs meet
        elsewhere.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
        done = study.call("cancel", "s", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["jobs"] > 0
    assert study.live() == []


@pytest.mark.slow
def test_scancel_of_all_its_jobs_stops_the_study_and_the_same_command_continues(finished, study):
    driver = study.start("launcher.slots=1")
    until(driver, "submitted", "1 job(s) running", "calibrate: ")
    shell("scancel", *study.live())
    out, _ = driver.communicate()
    assert driver.returncode == 3, out
    assert "cancelled by somebody" in out
    study.finish()
    same_as(finished, study)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "code", "words"),
    [
        ("launcher.partition=nope", 2, "invalid partition.*launcher.partition"),
        ("launcher.setup=['exit 3']", 3, r"workers die before they take a run \(its job was FAILED.*read /"),
    ],
)
def test_jobs_that_cannot_work_are_named_and_none_is_left(study, setting, code, words):
    done = subprocess.run([*study.command, setting], capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert re.search(words, done.stderr, re.DOTALL)
    assert "Traceback" not in done.stderr
    assert study.live() == []


@pytest.mark.slow
def test_settings_reach_sbatch_and_precision_is_measured_on_a_node(study, tmp_path):
    asked = ["launcher.partition=high", "launcher.slots=1", "launcher.mem_gb=0.5", "launcher.timeout_min=7"]
    asked += ["+launcher.sbatch.comment=from-a-test", f"launcher.setup=['touch {tmp_path}/set-up']"]
    said = study.finish("study.stages=[lr_sweep]", "dtype=auto", *asked)
    in_each = r"dtype=(float32|bfloat16): steps/s [\d.]+ in float32 and [\d.]+ in bfloat16, one run of 1"
    assert re.search(in_each, said)
    [key] = jobs(study.study)
    shown = show_job(key)
    for expected in ("Partition=high", "TimeLimit=00:07:00", "MinMemoryNode=512M", "Comment=from-a-test"):
        assert expected in shown, shown
    assert "Requeue=1" in shown, shown
    assert (tmp_path / "set-up").exists()


@pytest.mark.slow
def test_a_queue_that_does_not_answer_for_a_while_is_asked_again(finished, study, tmp_path, monkeypatch):
    late = f"echo x >> {tmp_path}/asked; [ $(wc -l < {tmp_path}/asked) -gt 4 ]"
    fails = '{ echo "slurm_load_jobs error: timed out" >&2; exit 1; }'
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text(f'#!/bin/sh\n{late} || {fails}\nexec {shutil.which("squeue")} "$@"\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(squeue.parent), prepend=":")
    said = study.finish()
    assert "the queue does not answer (slurm_load_jobs error: timed out); trying again" in said
    same_as(finished, study)


@pytest.mark.slow
def test_the_commands_of_the_guide_work(tmp_path, monkeypatch):
    """docs/beyond.md, every line with a $, in order, in a folder as a user has it after the set-up."""
    here = Path(__file__).parents[3]
    (tmp_path / "examples").symlink_to(here / "examples")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    command = tmp_path / ".venv" / "bin" / "ebc-lab"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -c "from ebc_lab.cli import main; main()" "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(here))
    lines = [x[2:] for x in (here / "docs" / "beyond.md").read_text().splitlines() if x.startswith("$ ")]
    assert len(lines) >= 8
    said = {}
    for line in lines:
        done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True)
        said[line] = done.stdout + done.stderr
        assert done.returncode == 0, f"{line}\n{said[line]}"
    assert "in this call: 0 training runs" in said[[x for x in lines if "study.name=first" in x][-1]]
    assert (tmp_path / "outputs/ebc_ablation/second/acceptance.json").exists()
    assert len(list((tmp_path / "outputs/multirun").glob("*/*/*/result.json"))) == 2

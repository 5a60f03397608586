"""Against a real Slurm (make test-slurm): what happens to a study there, and that it ends as it does in one process."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.drivers import CLI, sessions, until, without_timing

from ebc_lab.study.launch import queue
from ebc_lab.study.store import attempts
from ebc_lab.study.store.study import Study

pytestmark = pytest.mark.slurm
WHOLE_NODE = [
    "sbatch",
    "--parsable",
    "--partition=high",
    "--gpus-per-node=2",
    "--output=/dev/null",
    "--wrap=true",
]


@pytest.fixture
def study(tiny, tmp_path):
    """A study on two jobs of one (fake) GPU each, that leaves nothing in the queue whatever becomes of the test."""
    made = SlurmStudy(tiny, tmp_path)
    yield made
    for session in sessions(made.study, "slurm"):
        queue.scancel(queue.job_name(session))


class SlurmStudy:
    def __init__(self, tiny, out):
        self.out = out
        asked = ["launcher=slurm", "launcher.slots=2", "launcher.gpus_per_node=1", "launcher.queue_every_s=1"]
        self.command = [*CLI, "autopilot", *tiny, *asked, f"output_dir={out}", "study.name=s"]
        self.study = Study(out / "s")

    def start(self, *more: str) -> subprocess.Popen:
        return subprocess.Popen(
            [*self.command, *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def finish(self, *more: str) -> str:
        done = subprocess.run([*self.command, *more], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def call(self, *words: str) -> subprocess.CompletedProcess:
        return subprocess.run([*CLI, *words, "--output-dir", str(self.out)], capture_output=True, text=True)

    def jobs(self) -> dict[str, queue.Job]:
        [session] = sessions(self.study, "slurm")
        return queue.jobs_named(queue.job_name(session))

    def live(self) -> list[str]:
        return [key for key, job in self.jobs().items() if job.live]

    def events(self) -> list[dict]:
        return [line for path in self.study.runs.iterdir() for line in attempts.log(path)]


def rest(process: subprocess.Popen) -> str:
    out, _ = process.communicate()
    assert process.returncode == 0, out
    return out


def same_as(finished, study: SlurmStudy) -> None:
    for table in ("summary_final.csv", "summary_lr_sweep.csv"):
        assert without_timing(study.study.root / table) == without_timing(finished[1].study.root / table)
    assert study.live() == []


def test_array_jobs_give_the_same_bytes_as_one_process_and_leave_nothing_in_the_queue(finished, study):
    said = study.finish()
    assert "submitted 2 Slurm job(s)" in said
    same_as(finished, study)
    assert {job.state for job in study.jobs().values()} == {"COMPLETED"}
    begun = [e for e in study.events() if e["event"] == "begin"]
    seen = {(e["slurm_array_task_id"], e["cuda_visible_devices"]) for e in begun}
    assert sorted(gpu for _, gpu in seen) == ["0", "1"], "each job sees the one (fake) GPU that Slurm gave it"


def test_kill_9_of_the_driver_leaves_the_jobs_at_work_and_the_next_call_adopts_them(finished, study):
    driver = study.start()
    until(driver, "submitted", "calibrate: ")
    driver.kill()
    driver.communicate()
    before = set(study.live())
    assert before
    said = study.finish()
    assert "of an earlier call" in said
    assert set(re.findall(r"\d+_\d", said.partition("adopted")[0])) <= before
    same_as(finished, study)


@pytest.mark.slow
def test_ctrl_c_says_what_goes_on_and_how_to_end_it(study):
    driver = study.start("calibrate.steps=20000")
    until(driver, "calibrate: ")
    driver.send_signal(signal.SIGINT)
    out, _ = driver.communicate()
    assert driver.returncode == 130
    assert "continue without this driver" in out
    assert "ebc-lab cancel s" in out
    assert study.live()
    done = study.call("cancel", "s", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["jobs"] > 0
    assert study.live() == []


def test_cancel_ends_driver_and_jobs_and_the_same_command_carries_on(finished, study, tiny):
    driver = study.start()
    until(driver, "submitted", "calibrate: ")
    done = study.call("cancel", "s", "--json")
    out, _ = driver.communicate()
    assert (done.returncode, driver.returncode) == (0, 130), done.stderr + out
    assert "cancelled" in out
    assert study.live() == []
    assert study.study.holder() is None
    status = json.loads(study.call("status", "s", "--json").stdout)
    assert status["state"] == "interrupted"
    study.finish()
    same_as(finished, study)


@pytest.mark.slow
def test_scancel_of_one_array_task_leaves_its_runs_to_the_other(finished, study):
    driver = study.start()
    until(driver, "submitted", "2 job(s) running", "calibrate: ")
    victim = study.live()[0]
    subprocess.run(["scancel", victim], check=True)
    rest(driver)
    assert study.jobs()[victim].state == "CANCELLED"
    same_as(finished, study)


@pytest.mark.slow
def test_scancel_of_all_its_jobs_stops_the_study_which_carries_on_with_the_same_command(finished, study):
    driver = study.start("launcher.slots=1")
    until(driver, "submitted", "1 job(s) running", "calibrate: ")
    subprocess.run(["scancel", *study.live()], check=True)
    out, _ = driver.communicate()
    assert driver.returncode == 3, out
    assert "cancelled by somebody" in out
    study.finish()
    same_as(finished, study)


def test_preemption_is_a_checkpoint_and_a_requeue(finished, study):
    driver = study.start()
    until(driver, "submitted", "2 job(s) running", "calibrate: ")
    jobs = study.live()
    bigger = subprocess.run(WHOLE_NODE, capture_output=True, text=True, check=True).stdout.strip()
    rest(driver)
    same_as(finished, study)
    shown = [
        subprocess.run(["scontrol", "show", "job", j], capture_output=True, text=True).stdout
        for j in [*jobs, bigger]
    ]
    assert any("Restarts=1" in text for text in shown), shown
    assert not [e for e in study.events() if e["event"] == "lost"]


@pytest.mark.slow
def test_a_requeue_by_hand_starts_again_from_the_last_checkpoint(finished, study):
    driver = study.start("launcher.slots=1", "launcher.checkpoint_every_s=0")
    until(driver, "submitted", "1 job(s) running", "lr_scale: ")
    subprocess.run(["scontrol", "requeue", *study.live()], check=True)
    rest(driver)
    same_as(finished, study)


def test_a_partition_that_is_not_there_is_named_and_nothing_is_left(study):
    done = subprocess.run([*study.command, "launcher.partition=nope"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "invalid partition" in done.stderr
    assert "launcher.partition" in done.stderr
    assert "Traceback" not in done.stderr
    assert study.live() == []


def test_settings_reach_sbatch(study, tmp_path):
    study.finish(
        "study.stages=[lr_sweep]",
        "launcher.partition=high",
        "launcher.slots=1",
        "launcher.mem_gb=0.5",
        "launcher.timeout_min=7",
        "+launcher.sbatch.comment=from-a-test",
        f"launcher.setup=['touch {tmp_path}/set-up']",
    )
    [key] = study.jobs()
    shown = subprocess.run(
        ["scontrol", "show", "job", key], capture_output=True, text=True, check=True
    ).stdout
    for expected in (
        "Partition=high",
        "TimeLimit=00:07:00",
        "MinMemoryNode=512M",
        "Comment=from-a-test",
        "Requeue=1",
    ):
        assert expected in shown, shown
    assert (tmp_path / "set-up").exists()


def test_status_asks_the_queue_once_however_often_it_is_called(study, tmp_path, monkeypatch):
    driver = study.start("calibrate.steps=20000")
    until(driver, "2 job(s) running", "calibrate: ")
    driver.kill()
    driver.communicate()
    asked = tmp_path / "asked"
    fake = tmp_path / "bin" / "squeue"
    fake.parent.mkdir()
    real = subprocess.run(["which", "squeue"], capture_output=True, text=True, check=True).stdout.strip()
    fake.write_text(f'#!/bin/sh\necho x >> {asked}\nexec {real} "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    [session] = sessions(study.study, "slurm")
    (session.root / "queue.json").unlink()
    for _ in range(3):
        found = json.loads(study.call("status", "s", "--json").stdout)
        assert found["queue"] == {"RUNNING": 2}
    assert asked.read_text().count("x") == 1


@pytest.mark.slow
def test_a_worker_killed_on_its_node_is_replaced_and_the_run_charged(finished, study):
    driver = study.start("launcher.slots=1")
    until(driver, "1 job(s) running", "calibrate: ")
    [session] = sessions(study.study, "slurm")
    [note] = session.notes().values()
    os.kill(note["pid"], signal.SIGKILL)
    out = rest(driver)
    assert "submitted 1 Slurm job(s)" in out, "another one, after the first"
    same_as(finished, study)


def test_jobs_that_die_before_they_train_stop_the_study_and_name_their_log(study):
    done = subprocess.run([*study.command, "launcher.setup=['exit 3']"], capture_output=True, text=True)
    assert done.returncode == 3, done.stdout + done.stderr
    assert re.search(r"workers die before they take a run \(its job was FAILED.*read /", done.stderr)
    assert study.live() == []


@pytest.mark.slow
def test_a_queue_that_falls_silent_for_a_while_is_asked_again(finished, study, tmp_path, monkeypatch):
    silent = tmp_path / "bin" / "squeue"
    silent.parent.mkdir()
    real = subprocess.run(["which", "squeue"], capture_output=True, text=True, check=True).stdout.strip()
    count = f"echo x >> {tmp_path}/asked; [ $(wc -l < {tmp_path}/asked) -gt 4 ]"
    silent.write_text(
        f'#!/bin/sh\n{{ {count}; }} || {{ echo "slurm_load_jobs error: timed out" >&2; exit 1; }}\nexec {real} "$@"\n'
    )
    silent.chmod(0o755)
    monkeypatch.setenv("PATH", f"{silent.parent}:{os.environ['PATH']}")
    said = study.finish()
    assert "the queue does not answer (slurm_load_jobs error: timed out); asking again" in said
    same_as(finished, study)


@pytest.mark.slow
def test_precision_is_measured_on_a_node(study):
    overrides = [o for o in study.command if not o.startswith("dtype")]
    done = subprocess.run(
        [*overrides, "dtype=auto", "study.stages=[lr_sweep]"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(
        r"dtype=(float32|bfloat16): steps/s [\d.]+ in float32 and [\d.]+ in bfloat16, one run of 1",
        done.stdout,
    )


@pytest.mark.slow
def test_cancel_finds_the_jobs_whatever_the_state_folder_of_the_one_who_asks(study, tmp_path):
    driver = study.start("calibrate.steps=20000")
    until(driver, "calibrate: ")
    driver.kill()
    driver.communicate()
    elsewhere = subprocess.run(
        [*CLI, "cancel", "s", "--output-dir", str(study.out)],
        capture_output=True,
        text=True,
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path / "other")},
    )
    assert elsewhere.returncode == 0, elsewhere.stderr  # the study itself remembers where its jobs meet
    assert study.live() == []


@pytest.mark.slow
def test_a_smoke_study_comes_through_preemption_time_out_scancel_and_kill_9_of_its_driver(
    tmp_path, text_file
):
    """All of it in one study, whose finals are long enough for Slurm's shortest time-outs, which are minutes."""
    asked = ["scale=smoke", "data=path", f"data.file={text_file}", "device=cpu", "finals.steps=1500"]
    study = SlurmStudy(asked, tmp_path)
    short = ["launcher.timeout_min=2", "launcher.signal_delay_s=60"]
    driver = study.start(*short)
    until(driver, "submitted", "2 job(s) running", "calibrate: ")
    first = set(study.live())
    subprocess.run(WHOLE_NODE, check=True, capture_output=True)
    until(driver, "waiting", "2 job(s) running", "finals: ")
    driver.kill()
    driver.communicate()
    driver = study.start(*short)
    assert "adopted" in until(driver, "finals: ")
    victim, survivor = sorted(study.live())
    subprocess.run(["scancel", victim], check=True)
    out = rest(driver)
    assert f"job {victim} was cancelled by somebody; 1 job(s) share what is left" in out
    assert study.live() == []
    shown = subprocess.run(
        ["scontrol", "show", "job", survivor], capture_output=True, text=True, check=True
    ).stdout
    assert survivor in first
    assert int(re.search(r"Restarts=(\d+)", shown)[1]) >= 2, "once for the preemption, and for the time-out"
    inline = [*CLI, "autopilot", *asked, "launcher=inline", f"output_dir={tmp_path}", "study.name=inline"]
    subprocess.run(inline, check=True, capture_output=True)
    for table in (
        "summary_lr_sweep.csv",
        "summary_calibrate.csv",
        "summary_lr_scale.csv",
        "summary_final.csv",
    ):
        assert without_timing(tmp_path / "s" / table) == without_timing(tmp_path / "inline" / table)


@pytest.mark.slow
def test_the_lines_of_the_guide_work_as_they_stand(tmp_path, monkeypatch):
    """docs/slurm.md, every line with a $, in order, in a folder as a user has it after the set-up."""
    here = Path(__file__).parents[3]
    (tmp_path / "scripts").symlink_to(here / "scripts")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    command = tmp_path / ".venv" / "bin" / "ebc-lab"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -c "from ebc_lab.cli import main; main()" "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(here))
    lines = [x[2:] for x in (here / "docs" / "slurm.md").read_text().splitlines() if x.startswith("$ ")]
    assert len(lines) >= 8
    said = {}
    for line in lines:
        done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True)
        said[line] = done.stdout + done.stderr
        assert done.returncode == 0, f"{line}\n{said[line]}"
    assert "0 run(s) trained in this call" in said[[x for x in lines if "study.name=first" in x][-1]]
    assert (tmp_path / "outputs/ebc_ablation/second/acceptance.json").exists()
    assert len(list((tmp_path / "outputs/multirun").glob("*/*/*/result.json"))) == 2

"""Worker processes on this machine: who they are, what they see, and that none is left behind."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.drivers import CLI, sessions, until, without_timing

from ebc_lab.config.schema import Config
from ebc_lab.records.paths import RunFiles
from ebc_lab.study.launch import pool as pool_module
from ebc_lab.study.launch.local import LocalPool
from ebc_lab.study.stages import stage_of
from ebc_lab.study.store import attempts
from ebc_lab.study.store.study import Study

PATIENCE_S = 60


def begin(tiny, out, *more, **how) -> tuple[subprocess.Popen, Study]:
    command = [*CLI, "autopilot", *tiny, "launcher.slots=2", f"output_dir={out}", "study.name=s", *more]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how
    ), Study(out / "s")


def notes(study: Study) -> dict[str, dict]:
    [session] = sessions(study, "local")
    return session.notes()


def watch(pids) -> dict[int, int]:
    """Process -> a descriptor that becomes readable when it has gone."""
    return {pid: os.pidfd_open(pid) for pid in pids}


def gone(watched: dict[int, int]) -> bool:
    return all(select.select([fd], [], [], PATIENCE_S)[0] for fd in watched.values())


def family(pid: int) -> list[int]:
    """All living descendants of a process."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [p for child in map(int, children) for p in (child, *family(child))]


@pytest.fixture
def pool_of(tiny, tmp_path):
    """A pool without a driver, on the first runs of a study."""
    from dataclasses import replace

    from ebc_lab.config.compose import compose
    from ebc_lab.study.resolve import resolve_study

    opened = []

    def make(gpus: list[str], slots: int, **launcher):
        study = Study(tmp_path / "s")
        study.prepare()
        config, _ = resolve_study(
            compose([*tiny, f"output_dir={tmp_path}", "study.name=s"]), study, print, force=False
        )
        config = replace(config, launcher=replace(config.launcher, **launcher))
        specs = stage_of("lr_sweep").runs(config, {}, {})
        for spec in specs:
            study.write_spec(spec)
        opened.append(LocalPool(config, study, gpus, slots, print))
        return opened[-1], study, specs

    yield make
    for pool in opened:
        pool.close()


def test_each_slot_is_pinned_to_its_own_gpu_as_its_worker_sees_it(pool_of, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PMI_RANK", "3")
    pool, study, specs = pool_of(["GPU-a", "GPU-b"], 3)
    pool.run(specs, [], lambda done, busy: None, canary=False)
    begun = [e for s in specs for e in attempts.log(study.run_dir(s.run_id)) if e["event"] == "begin"]
    seen = {e["pid"]: e["cuda_visible_devices"] for e in begun}
    slot_of = {note["pid"]: int(slot) for slot, note in notes(study).items()}
    assert seen
    assert all(gpu == ["GPU-a", "GPU-b", "GPU-a"][slot_of[pid]] for pid, gpu in seen.items())
    assert not any("slurm_job_id" in e for e in begun), "an enclosing job's variables reached a worker"
    worker = Path(f"/proc/{begun[0]['pid']}/environ").read_bytes()
    assert b"SLURM_JOB_ID" not in worker
    assert b"PMI_RANK" not in worker
    assert b"OMP_NUM_THREADS=1" in worker


def test_slots_follow_gpus_and_workers_per_gpu_and_cores(resolved, monkeypatch):
    from dataclasses import replace

    def on(config: Config, **launcher) -> int:
        return pool_module.slots(
            replace(config, launcher=replace(config.launcher, name="local", slots=0, **launcher))
        )

    monkeypatch.setattr(pool_module, "visible_gpus", lambda: ["0", "1", "2"])
    monkeypatch.setattr(pool_module, "cores", lambda: 8)
    cuda = replace(resolved, device="cuda")
    assert on(cuda) == 3
    assert on(cuda, workers_per_gpu=2) == 6
    assert (
        pool_module.at_a_time(replace(cuda, launcher=replace(cuda.launcher, name="local", runs_per_worker=4)))
        == 12
    )
    assert on(resolved) == 8
    assert on(replace(resolved, threads_per_run=3)) == 2
    assert pool_module.slots(replace(cuda, launcher=replace(cuda.launcher, name="local", slots=5))) == 5


def test_an_inherited_choice_of_gpus_is_respected(monkeypatch):
    from ebc_lab.config import machine

    monkeypatch.setattr(machine, "gpu_names", lambda: ("a", "b", "c", "d"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-3f")
    assert machine.visible_gpus() == ["2", "GPU-3f"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert machine.visible_gpus() == ["0", "1", "2", "3"]


@pytest.mark.parametrize("how", ["kill -9", "Ctrl-C", "kill"])
def test_no_process_is_left_when_the_driver_goes(tiny, tmp_path, how):
    driver, study = begin(tiny, tmp_path, "calibrate.steps=20000")
    until(driver, "calibrate: ")
    processes = watch([*family(driver.pid), *(n["pid"] for n in notes(study).values())])
    assert len(processes) >= 4
    driver.send_signal({"kill -9": signal.SIGKILL, "Ctrl-C": signal.SIGINT, "kill": signal.SIGTERM}[how])
    out, _ = driver.communicate()
    assert gone(processes)
    assert driver.returncode == (-9 if how == "kill -9" else 130), out
    assert "Traceback" not in out


def test_no_process_is_left_when_the_terminal_is_closed(tiny, tmp_path):
    ours, theirs = pty.openpty()
    command = [
        *CLI,
        "autopilot",
        *tiny,
        "launcher.slots=2",
        f"output_dir={tmp_path}",
        "study.name=s",
        "calibrate.steps=20000",
    ]
    wrapped = [
        sys.executable,
        "-c",
        "import os, pty, sys; os.login_tty(0); os.execv(sys.argv[1], sys.argv[1:])",
        *command,
    ]
    driver = subprocess.Popen(wrapped, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    seen = b""
    while b"lr_sweep decided" not in seen:
        seen += os.read(ours, 65536)
    processes = watch(
        [driver.pid, *family(driver.pid), *(n["pid"] for n in notes(Study(tmp_path / "s")).values())]
    )
    os.close(ours)
    assert driver.wait(timeout=PATIENCE_S) != 0
    assert gone(processes)


def test_a_worker_that_hangs_is_killed_and_its_run_trained_again(tiny, tmp_path):
    """A stopped process is as deaf as one that hangs in a driver call."""
    driver, study = begin(tiny, tmp_path, "launcher.heartbeat_s=8", "launcher.slots=1", "calibrate.steps=400")
    until(driver, "calibrate: ")
    while not (note := notes(study)["0"])["run_ids"]:
        pass
    [run_id] = note["run_ids"]
    os.kill(note["pid"], signal.SIGSTOP)
    out, _ = driver.communicate()
    assert driver.returncode == 0, out
    assert f"worker 0 on {run_id}: no sign of life for 8 s; it is killed" in out
    kinds = [e["event"] for e in attempts.log(study.run_dir(run_id))]
    assert kinds == ["begin", "lost", "begin", "end"]


def test_a_run_that_takes_longer_than_allowed_is_given_up_and_the_study_goes_on(tiny, tmp_path):
    allowed = ["launcher.run_timeout_s=6", "launcher.max_lost=0"]
    driver, study = begin(tiny, tmp_path, "calibrate.steps=200000", *allowed)
    out, _ = driver.communicate()
    lost = [
        r for p in study.runs.glob("*/result.json") if (r := json.loads(p.read_text()))["outcome"] == "lost"
    ]
    assert lost, out
    assert all("longer than launcher.run_timeout_s, 6 s" in r["cause"] for r in lost)
    assert driver.returncode == 3
    assert "calibrate could not decide: its worker died once, at last: longer than" in out


def test_a_worker_that_dies_is_logged_with_its_signal_and_the_run_retried(finished, tiny, tmp_path):
    driver, study = begin(tiny, tmp_path, "launcher.slots=1")
    until(driver, "lr_scale: ")
    [note] = notes(study).values()
    os.kill(note["pid"], signal.SIGKILL)
    out, _ = driver.communicate()
    assert driver.returncode == 0, out
    logs = {d.name: attempts.log(d) for d in study.runs.iterdir()}
    for events in logs.values():
        kinds = [e["event"] for e in events]
        assert kinds[-1] == "end"
        assert kinds.count("begin") == 1 + kinds.count("lost")
    causes = [e["cause"] for events in logs.values() for e in events if e["event"] == "lost"]
    assert all("SIGKILL" in c and "memory" in c for c in causes)
    assert without_timing(study.root / "summary_final.csv") == without_timing(
        finished[1].study.root / "summary_final.csv"
    )


def test_a_run_that_loses_every_worker_is_given_up_as_lost(pool_of):
    pool, study, specs = pool_of([], 1, max_lost=1)
    spec = specs[0]
    for _ in range(2):
        attempts.note(study.run_dir(spec.run_id), "begin")
        pool._bury(
            pool_module.Death("0", "killed by SIGKILL", Path("log")),
            {"run_ids": [spec.run_id]},
            {spec.run_id: spec},
        )
    result = json.loads((study.run_dir(spec.run_id) / "result.json").read_text())
    assert result["outcome"] == "lost"
    assert "2 times" in result["cause"]
    assert [e["event"] for e in attempts.log(study.run_dir(spec.run_id))] == ["begin", "lost"] * 2


def test_the_canary_goes_alone_until_it_has_taken_a_step(pool_of):
    pool, study, specs = pool_of([], 2)
    offered = []
    publish = pool.session.publish
    pool.session.publish = lambda runs, **how: (offered.append(list(runs)), publish(runs, **how))
    pool.run(specs, [], lambda done, busy: None, canary=True)
    assert len(offered[0]) == 1
    assert sorted(offered[-1]) == sorted(s.run_id for s in specs)
    first = study.result(offered[0][0])
    assert first["outcome"] == "completed"


def test_a_log_cut_off_by_a_crash_is_still_read(tmp_path):
    attempts.note(tmp_path, "begin", pid=1)
    with open(RunFiles(tmp_path).attempts, "a") as f:
        f.write('{"at": "2026-')
    attempts.note(tmp_path, "begin", pid=2)
    assert [e["pid"] for e in attempts.log(tmp_path)] == [1, 2]


def test_the_launcher_settings_of_another_launcher_are_refused():
    from ebc_lab.config.compose import compose
    from ebc_lab.config.errors import UserError

    with pytest.raises(UserError, match=r"launcher\.partition goes with launcher=slurm"):
        compose(["scale=smoke", "launcher.partition=gpu"])
    with pytest.raises(UserError, match=r"workers_per_gpu goes with launcher=local"):
        compose(["scale=smoke", "device=cpu", "launcher=slurm", "launcher.workers_per_gpu=2"])
    with pytest.raises(UserError, match=r"launcher\.sbatch\.array is set by the launcher"):
        compose(["scale=smoke", "device=cpu", "launcher=slurm", "+launcher.sbatch.array=3"])
    with pytest.raises(UserError, match="says nothing about the nodes"):
        compose(["scale=smoke", "launcher=slurm"])
    config = compose(["scale=smoke", "device=cpu", "launcher=slurm", "+launcher.sbatch.reservation=x"])
    assert config.launcher.sbatch == {"reservation": "x"}


def test_a_session_folder_is_private(pool_of):
    pool, _, _ = pool_of([], 1)
    for level in (pool.session.root, pool.session.root.parent, pool.session.root.parent.parent):
        assert level.stat().st_mode & 0o077 == 0

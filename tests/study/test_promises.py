"""What a study survives: real memory limits, full and read-only disks, jumping clocks, a second driver."""

import json
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from support.called import CLI, called, refused
from support.drivers import held_at_first, sessions, site, without_timing

from ebc_lab.config.compose import compose
from ebc_lab.config.errors import UserError
from ebc_lab.study.inspect.status import status
from ebc_lab.study.launch import open_pool
from ebc_lab.study.store.study import Study
from ebc_lab.study.store.verify import verify

JUMPING = """
import random, time
_true, _draw = time.time, random.Random(0)
time.time = lambda: _true() + _draw.uniform(-86400, 86400)  # a day forth or back, at every look
"""
TABLE = "summary_lr_sweep.csv"


def begin(tiny, out, *more, **how) -> subprocess.CompletedProcess:
    """The first stage of a study, which writes TABLE."""
    settings = [f"output_dir={out}", "study.name=s", *more]
    return subprocess.run(
        [*CLI, "stage", "lr_sweep", *tiny, *settings], capture_output=True, text=True, **how
    )


@pytest.fixture
def disk(tmp_path):
    """A small file system of its own: `disk(size)` mounts it; taken away after the test."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(*options: str) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", *options, "none", str(place)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        return place

    yield mount
    subprocess.run(["umount", "--lazy", str(place)], capture_output=True)


@pytest.mark.thorough
def test_a_full_disk_is_named_and_nothing_is_lost(finished, tiny, disk):
    place = disk("-o", "size=150k")
    done = begin(tiny, place, "launcher=inline")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "No space left on device" in done.stderr
    assert str(place) in done.stderr
    assert "Traceback" not in done.stderr
    study = Study(place / "s")
    outcomes = [json.loads(p.read_text())["outcome"] for p in study.runs.glob("*/result.json")]
    assert set(outcomes) <= {"completed"}, "a run was blamed for the disk"
    subprocess.run(["mount", "-o", "remount,size=100m", str(place)], check=True)
    done = begin(tiny, place, "launcher=inline")
    assert done.returncode == 0, done.stdout + done.stderr
    assert without_timing(study.root / TABLE) == without_timing(finished[1].study.root / TABLE)


@pytest.mark.thorough
def test_a_read_only_folder_is_named_before_anything_runs(finished, tiny, disk):
    place = disk("-o", "size=50m")
    shutil.copytree(finished[1].study.root, place / "s")
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    settings = [*tiny, f"output_dir={place}", "study.name=s"]
    for command in (["autopilot", *settings], ["report", "s", "--output-dir", str(place)]):
        assert str(place) in refused(*command, cwd=place)
    for command in (["status", "s"], ["why", "s"], ["verify", "s"], ["why", "s", "--replay"]):
        done = called(*command, "--output-dir", str(place), cwd=place)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.thorough
def test_memory_that_runs_out_is_an_oom_and_the_command_that_shows_it_again_works_as_pasted(tiny, tmp_path):
    """A real allocation that the system refuses: an address-space limit on the driver and all it starts."""
    smaller = [o for o in tiny if not o.startswith(("model.width", "model.blocks"))]
    big = [*smaller, "model.width=32768", "model.blocks=1"]  # one matrix takes 4 GiB
    limited = ["prlimit", f"--as={3 << 30}"]
    settings = ["launcher=inline", f"output_dir={tmp_path}", "study.name=s"]
    command = [*limited, *CLI, "stage", "lr_sweep", *big, *settings]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "its first 2 runs all failed" in done.stderr
    [failure] = status(Study(tmp_path / "s"))["failures"]
    assert failure["outcome"] == "oom", failure
    assert len(failure["runs"]) == 2, "runs that fail alike are one cause"
    ebc_lab = Path(sys.executable).with_name("ebc-lab")
    if not ebc_lab.exists():
        pytest.skip("the ebc-lab command is not installed next to this Python")
    env = {**os.environ, "PATH": f"{ebc_lab.parent}:{os.environ['PATH']}"}
    words = f"{' '.join(limited)} {failure['command']}"
    again = subprocess.run(words, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "oom after 0 steps" in again.stdout
    assert "the same numbers as recorded" in again.stdout
    assert shlex.split(failure["command"])[:2] == ["ebc-lab", "rerun"]


@pytest.mark.thorough
def test_checkpoints_damaged_after_kill_9_are_set_aside_and_change_no_byte(finished, tiny, tmp_path):
    settings = [*tiny, "launcher=local", "launcher.slots=2", "launcher.checkpoint_every_s=0"]
    command = [*CLI, "stage", "lr_sweep", *settings, f"output_dir={tmp_path}", "study.name=s"]
    study = Study(tmp_path / "s")
    held = {**os.environ, "PYTHONPATH": held_at_first(tmp_path)}  # no run ends
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True, env=held) as driver:
        while not (begun := list(study.runs.glob("*/checkpoint.pt"))):
            with suppress(subprocess.TimeoutExpired):
                pytest.fail(f"the driver ended with exit code {driver.wait(timeout=0.02)}")
        notes = [note for session in sessions(study, "local") for note in session.notes().values()]
        workers = [os.pidfd_open(note["pid"]) for note in notes]
        os.killpg(driver.pid, signal.SIGKILL)
        for worker in workers:
            signal.pidfd_send_signal(worker, signal.SIGKILL)
            assert select.select([worker], [], [], 30)[0]
            os.close(worker)
    left = {}
    for path in begun:
        left[path.parent.name] = path.read_bytes()[: path.stat().st_size // 2]
        path.write_bytes(left[path.parent.name])
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for run_id, content in left.items():
        why = "its checkpoint is damaged (its checksum does not match), and is now checkpoint.damaged-1.pt"
        assert f"lr_sweep: {run_id}: {why}: it starts from its first step" in done.stdout
        assert why in study.run_files(run_id).log.read_text()
        assert study.run_files(run_id).damaged(1).read_bytes() == content
    assert without_timing(study.root / TABLE) == without_timing(finished[1].study.root / TABLE)
    assert verify(study)["ok"]


@pytest.mark.thorough
def test_clocks_that_jump_change_nothing(finished, tiny, tmp_path):
    jumping = {**os.environ, "PYTHONPATH": site(tmp_path, JUMPING)}
    done = begin(tiny, tmp_path, "launcher.slots=1", env=jumping)
    assert done.returncode == 0, done.stdout + done.stderr
    found = tmp_path / "s" / TABLE
    assert without_timing(found) == without_timing(finished[1].study.root / TABLE)
    assert pd.read_csv(found).wall_s.between(0, 600).all(), "a duration was taken from a clock that jumps"


def test_a_study_of_a_gpu_is_refused_where_there_is_none_but_not_for_jobs_elsewhere(resolved, tmp_path):
    with (
        pytest.raises(UserError, match="nvidia-smi is not on PATH"),
        open_pool(replace(resolved, device="cuda"), Study(tmp_path)),
    ):
        pass  # begun on a GPU, continued without one
    assert compose(["scale=smoke", "device=cuda", "launcher=slurm"]).device == "cuda"
    assert compose(["scale=smoke", "device=cuda"], study=False, here=False).device == "cuda"

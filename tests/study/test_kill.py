"""kill -9 of driver and workers at random moments, then the same command again: the same bytes as an
undisturbed study.
"""

import collections
import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support.called import CLI
from support.drivers import TABLES, sessions, without_timing
from support.nodes import kill

from ebc_lab.study.store import attempts
from ebc_lab.study.store.study import Study
from ebc_lab.study.store.verify import verify

TRIALS = int(os.environ.get("EBC_LAB_KILL_TRIALS", "50"))
VICTIMS = ("driver", "worker", "workers", "both", "group")
SMALLER = [
    "seeds=[0]",
    "lr_sweep.grids.adam=[2e-2]",
    "lr_sweep.control_scales=[1]",
    "calibrate.multiples=[1]",
]
LAUNCHER = ["launcher=local", "launcher.slots=2", "launcher.checkpoint_every_s=0", "launcher.max_lost=9"]


def command(tiny: list[str], out: Path) -> list[str]:
    """A study that takes seconds, on two workers that write a checkpoint at every step."""
    return [*CLI, "autopilot", *tiny, *SMALLER, *LAUNCHER, f"output_dir={out}", "study.name=s"]


def disturbed(command: list[str], study: Study, draw: random.Random, lasts_s: float) -> str:
    """Run the command, kill one of its processes at a random moment, and let the rest go on -> what was
    killed."""
    driver = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    with contextlib.suppress(subprocess.TimeoutExpired):
        driver.wait(timeout=draw.uniform(0.1, 1.0) * lasts_s)
        return "nothing"
    victim = draw.choice(VICTIMS)
    at_work = [note["pid"] for session in sessions(study, "local") for note in session.notes().values()]
    if victim in ("worker", "workers", "both"):
        for pid in at_work if victim != "worker" else at_work[:1]:
            kill(pid)
    if victim == "group":  # the driver and what submitit started, as the kernel or an impatient user would
        os.killpg(driver.pid, signal.SIGKILL)
    elif victim in ("driver", "both"):
        driver.kill()
    driver.wait()
    return victim if victim in ("driver", "group") or at_work else "nothing"


@pytest.mark.slow
def test_kill_9_at_random_moments_never_changes_a_byte(tiny, tmp_path):
    begun_s = time.monotonic()
    whole = subprocess.run(command(tiny, tmp_path / "whole"), capture_output=True, text=True)
    lasts_s = time.monotonic() - begun_s
    assert whole.returncode == 0, whole.stdout + whole.stderr
    expected = [without_timing(tmp_path / "whole" / "s" / table) for table in TABLES]
    counts: collections.Counter[str] = collections.Counter()
    wrong = []
    for trial in range(TRIALS):
        draw, again = random.Random(trial), command(tiny, tmp_path / str(trial))
        study = Study(tmp_path / str(trial) / "s")
        for _ in range(draw.choice([1, 1, 2, 3])):
            counts[disturbed(again, study, draw, lasts_s)] += 1
        done = subprocess.run(again, capture_output=True, text=True)
        sound = done.returncode == 0 and verify(study)["ok"]
        if not sound or [without_timing(study.root / table) for table in TABLES] != expected:
            wrong.append((trial, done.returncode, done.stdout + done.stderr))
        begun = [e for d in study.runs.iterdir() for e in attempts.log(d) if e["event"] == "begin"]
        assert len(begun) >= len(list(study.runs.iterdir())), "an attempt went unrecorded"
    print(f"\n{TRIALS} trials, {TRIALS - len(wrong)} byte-identical; killed: {dict(counts)}")
    assert not wrong, wrong
    assert set(VICTIMS) <= set(counts) or TRIALS < 50

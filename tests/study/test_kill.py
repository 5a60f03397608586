"""kill -9 of driver and workers at random moments, then the same command again: the same bytes as an
undisturbed study.
"""

import collections
import contextlib
import os
import random
import signal
import subprocess
from pathlib import Path

import pytest
from support.called import CLI
from support.drivers import TABLES, sessions, without_timing
from support.nodes import kill

from ebc_lab.study.store import attempts
from ebc_lab.study.store.study import Study
from ebc_lab.study.store.verify import verify

TRIALS = int(os.environ.get("EBC_LAB_KILL_TRIALS", "50"))
PHASES = ("before the finals", "finals", "overhead", "plotting", "the end")  # in their order


def command(tiny: list[str], out: Path) -> list[str]:
    """A study of plain Adam and EBC that takes seconds, on two workers that write a checkpoint at every
    step.
    """
    smaller = [
        "seeds=[0]",
        "lr_sweep.grids.adam=[2e-2]",
        "lr_sweep.control_scales=[1]",
        "calibrate.multiples=[1]",
    ]
    launcher = ["launcher=local", "launcher.slots=2", "launcher.checkpoint_every_s=0", "launcher.max_lost=9"]
    return [*CLI, "autopilot", *tiny, *smaller, *launcher, f"output_dir={out}", "study.name=s"]


def workers(study: Study) -> list[int]:
    return [note["pid"] for session in sessions(study, "local") for note in session.notes().values()]


def ended(driver: subprocess.Popen, within_s: float) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        driver.wait(timeout=within_s)
    return driver.returncode is not None


def moment(study: Study) -> str:
    """What a study is busy with."""
    decided = study.decisions()
    if "finals" in decided:
        return "plotting" if not study.page_file.exists() else "the end"
    measured = [r for r in study.run_ids() if r.startswith("overhead_")]
    if any(not study.has_result(r) and attempts.log(study.run_dir(r)) for r in measured):
        return "overhead"
    return "finals" if "lr_scale" in decided else "before the finals"


def disturbed(command: list[str], study: Study, draw: random.Random) -> tuple[str, str]:
    """Run the command, kill one of its processes at a random moment of a random phase, and let the rest go
    on.

    -> what was killed, and what the study was busy with.
    """
    wanted, later_s = draw.choice(PHASES[:-1]), draw.expovariate(2.0)
    driver = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while moment(study) not in PHASES[PHASES.index(wanted) :]:
        if ended(driver, within_s=0.01):
            return "nothing", "the end"
    if ended(driver, within_s=later_s):
        return "nothing", "the end"
    victim = draw.choice(["driver", "worker", "workers", "both", "group"])
    at_work = workers(study)
    busy_with = moment(study)
    if victim in ("worker", "workers", "both"):
        for pid in at_work if victim != "worker" else at_work[:1]:
            kill(pid)
    if victim == "group":  # the driver and what submitit started, as the kernel or an impatient user would
        os.killpg(driver.pid, signal.SIGKILL)
    elif victim in ("driver", "both"):
        driver.kill()
    driver.wait()
    return victim if victim in ("driver", "group") or at_work else "nothing", busy_with


@pytest.mark.slow
def test_kill_9_at_random_moments_never_changes_a_byte(tiny, tmp_path):
    whole = subprocess.run(command(tiny, tmp_path / "whole"), capture_output=True, text=True)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    expected = [without_timing(tmp_path / "whole" / "s" / table) for table in TABLES]
    counts: collections.Counter[str] = collections.Counter()
    moments: collections.Counter[str] = collections.Counter()
    wrong = []
    for trial in range(TRIALS):
        draw, again = random.Random(trial), command(tiny, tmp_path / str(trial))
        study = Study(tmp_path / str(trial) / "s")
        for _ in range(draw.choice([1, 1, 2, 3])):
            victim, busy_with = disturbed(again, study, draw)
            counts[victim] += 1
            moments[busy_with] += 1
        done = subprocess.run(again, capture_output=True, text=True)
        sound = done.returncode == 0 and verify(study)["ok"]
        if not sound or [without_timing(study.root / table) for table in TABLES] != expected:
            wrong.append((trial, done.returncode, done.stdout + done.stderr))
        begun = [e for d in study.runs.iterdir() for e in attempts.log(d) if e["event"] == "begin"]
        assert len(begun) >= len(list(study.runs.iterdir())), "an attempt went unrecorded"
    print(f"\n{TRIALS} trials, {TRIALS - len(wrong)} byte-identical")
    print(f"killed: {dict(counts)}; during: {dict(moments)}")
    assert not wrong, wrong
    assert {"driver", "worker", "workers", "both", "group"} <= set(counts) or TRIALS < 50
    assert {"finals", "overhead", "plotting"} <= set(moments) or TRIALS < 50

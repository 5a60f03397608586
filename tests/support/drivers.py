"""Real drivers in processes of their own, for the tests of what happens to them."""

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ebc_lab.records.columns import TIMING_COLUMNS
from ebc_lab.study.launch import queue
from ebc_lab.study.launch.session import Session, state_dir
from ebc_lab.study.store.study import Study

TABLES = ("summary_lr_sweep.csv", "summary_calibrate.csv", "summary_lr_scale.csv", "summary_final.csv")


def without_timing(path: Path) -> str:
    """A summary as text, without the columns that no two runs share."""
    return pd.read_csv(path).drop(columns=list(TIMING_COLUMNS)).to_csv()


def sessions(study: Study, launcher: str) -> list[Session]:
    """Where the study's drivers and workers meet, or met."""
    return [Session(p.parent) for p in state_dir(study, launcher).glob("session-*/session.json")]


def jobs(study: Study) -> dict[str, queue.Job]:
    """The Slurm jobs of a study's driver, as `queue.jobs_named`."""
    [session] = sessions(study, "slurm")
    return queue.jobs_named(queue.job_name(session))


def end_jobs(study: Study) -> None:
    for session in sessions(study, "slurm"):
        queue.scancel(queue.job_name(session))


def shell(*command: str) -> str:
    """What a command prints, which must succeed."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def family(pid: int) -> list[int]:
    """All living descendants of a process."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [p for child in map(int, children) for p in (child, *family(child))]


def started(command: Sequence[str], **how: Any) -> subprocess.Popen[str]:
    """A process whose lines `until` reads."""
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how)


def until(driver: subprocess.Popen, *texts: str) -> str:
    """Read a driver's lines until one holds each of the texts, in this order. -> all that was read."""
    read = []
    for text in texts:
        for line in driver.stdout:
            read.append(line)
            if text in line:
                break
        else:
            raise AssertionError(f"never said {text!r}:\n{''.join(read)}")
    return "".join(read)


def until_true(condition: Callable[[], object], within_s: float = 120.0) -> Any:
    """Look again and again until the condition is true. -> its value"""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)
    return value


def site(folder: Path, code: str) -> str:
    """Return a PYTHONPATH under which every Python process begins with `code`, kept in `folder`/site."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(code)
    return os.pathsep.join([str(folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])


# the end of a sitecustomize: `change(module)` is called in workers and the processes that train for them
CHANGED = """
import sys
if any(name in " ".join(sys.orig_argv) for name in ("ebc_lab.study.launch.worker", "ebc_lab.training.child")):
    import importlib
    change(importlib.import_module({module!r}))
"""

STRIKING = """
import os

def change(module):
    called = module.{function}

    def broken(*asked, **named):
        if os.environ.get("RANK") == "1" and not os.path.exists({mark!r}):
            open({mark!r}, "w").close()
            raise {error}
        return called(*asked, **named)

    module.{function} = broken
"""

HOLDING = """
import os, select

def change(module):
    train = module.run_and_record

    def held(run, directory, run_id, *, on_progress, **hooks):
        steps = set()

        def report(step):
            on_progress(step)
            steps.add(step)
            go = [directory / "go", {go!r}]
            while len(steps) == {blocks} + 1 and not any(os.path.exists(file) for file in go):
                select.select([], [], [], 0.01)
                on_progress(step)

        return train(run, directory, run_id, on_progress=report, **hooks)

    module.run_and_record = held
"""


def struck_once(folder: Path, error: str, at: str) -> str:
    """A PYTHONPATH under which the second of the processes that train a run dies of `error` in a function
    `at` module:function, once; then `folder`/struck is there."""
    module, function = at.split(":")
    change = STRIKING.format(mark=str(folder / "struck"), error=error, function=function)
    return site(folder, change + CHANGED.format(module=module))


def held_at_first(folder: Path, blocks: int = 1) -> str:
    """A PYTHONPATH under which every run that a worker trains stays after its first block of steps, or so
    many, and a checkpoint of it, until a file `go` appears in its folder, or in `folder`.
    """
    change = HOLDING.format(blocks=blocks, go=str(folder / "go"))
    return site(folder, change + CHANGED.format(module="ebc_lab.training.outcome"))

"""The process that `study/launch/rehearse.py` starts: it tries runs with parts of one's own, one step each on
a small model, and says in a line of JSON each what is wrong with them. Nothing is recorded.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from ebc_lab.config.dicts import from_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.own.sources import find, line_of_fault, remember
from ebc_lab.config.schema import RunConfig

from .outcome import cause_of, is_oom
from .run import Training

SCHEDULE_S = 1.0  # that a schedule is asked for its steps; what it does later shows when it is trained


def tried(run: RunConfig, directory: Path) -> dict[str, str]:
    """What is wrong with a run, by one step of it: `refused`, why it cannot be trained, or `warned`; empty
    where nothing is.

    An error that did not come through a file of the user's is none here: memory, say, may do for the run.
    """
    with_parts = run.model.target is not None or run.workload.name != "gpt"
    small = run if with_parts else replace(run, model=replace(run.model, blocks=1))
    small = replace(small, compile="off", threads_per_run=1, capability="auto")
    try:
        training = Training(small, directory)
        before = [p.detach().clone() for p in training.model.parameters()]
        diverged = training.advance(1)
        _schedule_asked(run, training)
    except UserError as error:
        return {"refused": str(error).rstrip(".")}
    except Exception as error:
        mine = line_of_fault(error) is not None and not is_oom(error)
        return {"refused": cause_of(error)} if mine else {}
    moved = any(not a.equal(b) for a, b in zip(before, training.model.parameters(), strict=True))
    if run.optimizer.target is None or moved or diverged or not training.lr_at(0) > 0:
        return {}
    return {"warned": f"{find(run.optimizer.target).place}: its first step moved no parameter"}


def _schedule_asked(run: RunConfig, training: Training) -> None:
    """Ask a schedule of one's own for every step, as long as that is quick. Raises what it raises."""
    if run.lr_schedule.target is None:
        return
    until = time.monotonic() + SCHEDULE_S
    for step in range(run.steps):
        training.lr_at(step)
        if time.monotonic() > until:
            return


def answer(asked: dict[str, Any], answers: TextIO) -> None:
    """Try all that is asked, in order; a line as soon as one has ended."""
    if asked["own"] is not None:
        remember(Path(asked["own"]))
    for run in asked["runs"]:
        with tempfile.TemporaryDirectory(prefix="ebc-lab-") as folder:
            facts = tried(from_dict(RunConfig, run), Path(folder))
        answers.write(json.dumps(facts) + "\n")
        answers.flush()


if __name__ == "__main__":
    said = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a part prints is no answer
    answer(json.load(sys.stdin), said)

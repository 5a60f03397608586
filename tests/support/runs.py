"""Runs of the tests of training."""

import json
import os
import select
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ebc_lab.config.choices import changed
from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import run_part, to_dict
from ebc_lab.study.stages.rules import TIMING
from ebc_lab.training.ends import Interrupted
from ebc_lab.training.outcome import run_and_record
from ebc_lab.training.run import Training
from ebc_lab.workloads.corpus import locate


def resolved(run):
    """The run on the text as it is now."""
    return replace(run, data=replace(run.data, sha256=locate(run.data).sha256))


def short_run(tiny, *settings):
    """Return a run of seconds with these settings, on the text as it is now."""
    shared = [o for o in tiny if not o.startswith(("lr_s", "cal", "fin"))]
    return resolved(run_part(compose([*shared, "optimizer.lr=1e-2", *settings], study=False)))


def ebc(run, **budget):
    return changed(run, {"stabilizer": {"name": "ebc"}, "budget": budget})


def plain(run):
    return changed(run, {"stabilizer": {"name": "none"}})


def made(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    return path


def untimed(result):
    """A result without what a clock measured."""
    return {k: v for k, v in result.items() if k not in TIMING}


def resumed_after(run, folder, steps):
    """The result of a run that was interrupted after each of these steps."""
    for stop_at in steps:
        broken = Training(run, made(folder))
        with pytest.raises(Interrupted):
            broken.run(should_stop=lambda broken=broken, stop_at=stop_at: broken.step == stop_at)
        torch.manual_seed(99)  # whatever else happens in between
    return run_and_record(run, folder, "x")


def assert_run_resumes(run, folder, stops=(7, 23), files=("steps.csv",), outcome="completed"):
    """Interrupted after each of these steps a run ends with the bytes and the result of one that was not."""
    whole = run_and_record(run, made(folder / "whole"), "x")
    assert whole["outcome"] == outcome, whole["cause"]
    resumed = resumed_after(run, folder / "broken", stops)
    for name in files:
        assert (folder / "whole" / name).read_bytes() == (folder / "broken" / name).read_bytes(), name
    assert untimed(whole) == untimed(resumed)
    return whole


# has one other process train, or torchrun's several: its number is then in the file `pid`
APART = """
import json, sys
from pathlib import Path
from ebc_lab.config.dicts import from_dict
from ebc_lab.config.schema import RunConfig
from ebc_lab.training import apart
from ebc_lab.training.outcome import run_and_record

class Noted(apart._Process):
    def __init__(self, *asked):
        super().__init__(*asked)
        (folder.parent / "pid").write_text(str(self.process.pid))

def hold(step):
    if step >= 11:
        print("now", flush=True)
        sys.stdin.read()

folder = Path(sys.argv[2])
apart._Process = Noted
run = from_dict(RunConfig, json.loads(sys.argv[1]))
run_and_record(run, folder, "x", processes=int(sys.argv[3]), checkpoint_every_s=0.0, on_progress=hold)
"""


def assert_over(folder):
    """The process whose number is in `folder`/pid has ended, or does so in half a minute."""
    try:
        ended = os.pidfd_open(int((folder / "pid").read_text()))
    except ProcessLookupError:
        return
    try:
        assert select.select([ended], [], [], 30)[0], "it goes on without anyone to hear of it"
    finally:
        os.close(ended)


def killed_in_mid_run(run, folder, processes):
    """Kill -9 a process that has so many others train `run` in `folder`, once they are at step 11."""
    command = [sys.executable, "-c", APART, json.dumps(to_dict(run)), str(folder), str(processes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        process.kill()

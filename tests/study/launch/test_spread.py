"""Runs whose processes are spread over the nodes of a Slurm job, on four real nodes (make test-nodes):
the bits of one node, a node that is lost, other nodes and another number of processes from there on.
"""

import contextlib
import functools
import subprocess
from pathlib import Path

import numpy as np
import pytest
from support.called import CLI
from support.drivers import end_jobs, jobs, shell, until_true
from support.nodes import Node, kill

from ebc_lab.records.streams import read_columns
from ebc_lab.study.store import attempts
from ebc_lab.study.store.study import Study
from ebc_lab.study.store.verify import verify

pytestmark = [pytest.mark.nodes, pytest.mark.slow]
PATIENCE_S = 300
patiently = functools.partial(until_true, within_s=PATIENCE_S)
ONE_SEARCH = [  # which several processes can train: batches, probes and audits that they share
    *("batch_size=12", "budget.probe_sequences=4", "audit_tokens=64", "lr_sweep.grids.adam=[2e-2]"),
    *("lr_sweep.baseline_scales=[1.0]", "lr_sweep.control_scales=[1.0]", "study.stages=[lr_sweep]"),
    *("dtype=float32", "threads_per_run=1", "compile=off", "study.name=s"),
]
SLURM = [
    *("launcher=slurm", "launcher.slots=1", "launcher.partition=main", "launcher.queue_every_s=1"),
    *("launcher.checkpoint_every_s=0.2", "launcher.max_lost=9", "launcher.heartbeat_s=60"),
]
LONGER = "lr_sweep.steps=200"  # so that a run is not over before something happens to it
# Sums in another order: see tests/training/test_ranks.py
TOLERANCE = 2e-4


@pytest.fixture
def lose():
    """`lose(name)`: everything on a node is gone from one moment to the next, as when its power fails."""
    lost: list[Node] = []

    def lose(name: str) -> None:
        node = Node(name)
        lost.append(node)
        node.cut_off()
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"SLURMD_NODENAME={name}\0".encode() in place.joinpath("environ").read_bytes() + b"\0":
                    kill(int(place.name))
        node.set("down")

    yield lose
    for node in lost:
        node.restore()


class Spread:
    """A study of one search, of which each run is trained by several processes."""

    def __init__(self, overrides: list[str], out: Path):
        self.command = [*CLI, "autopilot", *overrides, *ONE_SEARCH, f"output_dir={out}"]
        self.study = Study(out / "s")
        self.out = out

    def start(self, *launcher: str) -> subprocess.Popen:
        self.out.mkdir(exist_ok=True)
        with open(self.out / "driver.log", "a", encoding="utf-8") as log:
            return subprocess.Popen([*self.command, *launcher], stdout=log, stderr=subprocess.STDOUT)

    def finish(self, driver: subprocess.Popen) -> None:
        assert driver.wait() == 0, (self.out / "driver.log").read_text()[-3000:]
        assert verify(self.study)["ok"]

    def in_progress(self) -> str | None:
        """A run that has a checkpoint."""
        saved = sorted(self.study.runs.glob("*/checkpoint.pt"))
        return saved[0].parent.name if saved else None

    def begins(self, run_id: str) -> list[dict]:
        return [event for event in attempts.log(self.study.run_dir(run_id)) if event["event"] == "begin"]

    def steps(self) -> dict[str, bytes]:
        return {path.parent.name: path.read_bytes() for path in self.study.runs.glob("*/steps.csv")}


@pytest.fixture
def spread(tiny, tmp_path):
    """`spread(name, *settings)`: such a study. No job is left in the queue, even if the test fails."""
    made = []

    def make(name: str, *settings: str) -> Spread:
        made.append(Spread([*tiny, *settings], tmp_path / name))
        return made[-1]

    yield make
    for study in made:
        end_jobs(study.study)


def test_a_run_on_two_nodes_of_which_one_is_lost_has_the_bits_of_one_node(spread, lose):
    study = spread("nodes", LONGER)
    asked = [*SLURM, "launcher.processes_per_run=4", "launcher.nodes_per_run=2"]
    driver = study.start(*asked)
    run_id = patiently(study.in_progress)
    [begun] = study.begins(run_id)
    head = begun["host"]
    [other] = expanded(begun["slurm_job_nodelist"]) - {head}
    lose(other)
    study.finish(driver)
    used = [expanded(event["slurm_job_nodelist"]) for event in study.begins(run_id)]
    assert len(used) > 1
    assert used[0] == {head, other}
    assert all(len(names) == 2 and other not in names for names in used[1:])
    assert {event["processes"] for event in study.begins(run_id)} == {4}
    here = spread("here", LONGER)
    here.finish(here.start("launcher=local", "launcher.slots=1", "launcher.processes_per_run=4"))
    same(study, here, run_id)


def test_another_number_of_processes_goes_on_with_a_run_on_other_nodes(spread, lose):
    study = spread("nodes", LONGER)
    driver = study.start(*SLURM, "launcher.processes_per_run=4", "launcher.nodes_per_run=2")
    run_id = patiently(study.in_progress)
    driver.kill()
    driver.wait()
    [begun] = study.begins(run_id)
    lose(begun["host"])
    study.finish(study.start(*SLURM, "launcher.processes_per_run=2", "launcher.nodes_per_run=2"))
    first, *_, last = study.begins(run_id)
    assert (first["processes"], last["processes"]) == (4, 2)
    assert begun["host"] not in expanded(last["slurm_job_nodelist"])
    assert not [event for event in attempts.log(study.study.run_dir(run_id)) if event["event"] == "restarted"]
    here = spread("here", LONGER)
    here.finish(here.start("launcher=local", "launcher.slots=1"))
    for name in here.steps():
        close(study, here, name)


def test_preemption_of_a_run_on_two_nodes_is_a_checkpoint_and_a_requeue(spread):
    study = spread("nodes", LONGER)
    driver = study.start(*SLURM, "launcher.processes_per_run=4", "launcher.nodes_per_run=2")
    run_id = patiently(study.in_progress)
    [job] = jobs(study.study)
    shell("scancel", "--signal=USR2", job)  # as on preemption, and before a time-out
    study.finish(driver)
    events = [event["event"] for event in attempts.log(study.study.run_dir(run_id))]
    assert events[:3] == ["begin", "stopped", "begin"]
    here = spread("here", LONGER)
    here.finish(here.start("launcher=local", "launcher.slots=1", "launcher.processes_per_run=4"))
    same(study, here, run_id)


def same(study: Spread, here: Spread, resumed: str) -> None:
    """The bits are those of one node; of the run that was resumed the first step after that and what follows
    are rounded otherwise, as they are on one node: DDP then arranges its first sums anew."""
    one, other = here.steps(), study.steps()
    assert {name: steps for name, steps in other.items() if name != resumed} == {
        name: steps for name, steps in one.items() if name != resumed
    }
    assert len(one) > 1
    close(study, here, resumed)


def close(study: Spread, here: Spread, run_id: str) -> None:
    columns = [read_columns(made.study.run_dir(run_id) / "steps.csv") for made in (here, study)]
    np.testing.assert_allclose(columns[1]["loss"], columns[0]["loss"], rtol=TOLERANCE)


def expanded(nodelist: str) -> set[str]:
    """The nodes of `n[1-2]`."""
    return set(shell("scontrol", "show", "hostnames", nodelist).split())

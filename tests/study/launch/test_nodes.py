"""On four real Slurm nodes (make test-nodes): nodes that are cut off and come back, drains, preemptions, and
kill -9 of everything; at the end the bytes are those of the same study undisturbed on this one machine.
"""

import collections
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support.called import CLI
from support.drivers import end_jobs, held_at_first, until_true
from support.nodes import NAMES, At, Node, NodesStudy, Witness, bytes_of, kill, parent_of, state_of

from ebc_lab.study.store.verify import verify

pytestmark = pytest.mark.nodes
TRIALS = int(os.environ.get("EBC_LAB_NODES_TRIALS", "30"))
PATIENCE_S = 240  # for a study that takes half a minute undisturbed
SAME = "the same bytes"
SWEEP = [
    "study.stages=[lr_sweep]",
    "lr_sweep.grids.adam=[5e-3,1e-2,2e-2,4e-2]",
    "lr_sweep.baseline_scales=[1.0]",
    "lr_sweep.control_scales=[1.0]",
]


@pytest.fixture
def study_of(tmp_path):
    """Studies on the nodes. No job is left in the queue and every node is up, even if the test fails."""
    made = []

    def make(overrides: list[str], name: str = "nodes") -> NodesStudy:
        made.append(NodesStudy(overrides, tmp_path / name))
        return made[-1]

    yield make
    for study in made:
        end_jobs(study.study)
    for name in NAMES:
        Node(name).restore()


class Undisturbed:
    """The same study on this machine without Slurm, trained while the other one waits for what is lost."""

    def __init__(self, overrides: list[str], out: Path):
        asked = ["launcher=local", "launcher.slots=2", "dtype=float32", "threads_per_run=1", "compile=off"]
        command = [*CLI, "autopilot", *overrides, *asked, f"output_dir={out}", "study.name=s"]
        self.root = out / "s"
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    def bytes(self) -> dict[str, bytes]:
        out, _ = self.process.communicate()
        assert self.process.returncode == 0, out
        return bytes_of(self.root)


def kill_driver(study: NodesStudy, driver: subprocess.Popen) -> subprocess.Popen:
    """-> the next one"""
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    return study.start()


def finish(study: NodesStudy, driver: subprocess.Popen) -> None:
    driver.wait()
    assert driver.returncode == 0, study.log.read_text()[-3000:]
    assert verify(study.study)["ok"]


def come_back(study: NodesStudy, lost: At) -> None:
    """A worker that was stopped goes on, may write no more, and says so."""
    kill(lost.pid, signal.SIGCONT)
    until_true(lambda: state_of(lost.pid) is None)
    assert "what it still had to write is refused, and it ends here" in study.said()


def test_a_lost_node_a_killed_worker_and_a_killed_driver_change_no_byte(
    tiny, study_of, tmp_path, monkeypatch
):
    asked = [*tiny, *SWEEP, "lr_sweep.steps=150"]
    study = study_of([*asked, "launcher.heartbeat_s=15"])
    # every run stays at step 100 until all four nodes are at one
    monkeypatch.setenv("PYTHONPATH", held_at_first(tmp_path, blocks=100))
    with Witness(study.study) as witness:
        driver = study.start()
        lost, drained, killed, _ = until_true(study.on_all)
        # a node hangs, and Slurm gives it up
        kill(lost.pid, signal.SIGSTOP)
        Node(lost.node).cut_off()
        Node(lost.node).set("down")
        Node(drained.node).set("drain")
        kill(killed.pid)
        driver = kill_driver(study, driver)
        (tmp_path / "go").touch()
        here = Undisturbed(asked, tmp_path / "here")
        finish(study, driver)
        come_back(study, lost)
        assert verify(study.study)["ok"]
    assert witness.two_at_once() == []
    for run_id in lost.runs:
        assert study.events(run_id)[:3] == ["begin", "lost", "begin"]
    assert bytes_of(study.study.root) == here.bytes()


VICTIMS = ("worker", "driver", "parent", "slurmd", "node")


def strike(study: NodesStudy, driver: subprocess.Popen, victim: str, at: At) -> subprocess.Popen:
    """Kill -9 something of a study -> its driver from now on."""
    if victim == "driver":
        return kill_driver(study, driver)
    if victim == "worker":
        kill(at.pid)
    if victim == "parent":
        kill(parent_of(at.pid))
    if victim == "node":
        kill(at.pid, signal.SIGSTOP)
    if victim in ("node", "slurmd"):
        Node(at.node).cut_off()
    return driver


def outcome_of(study: NodesStudy, victim: str, draw: random.Random, expected: dict[str, bytes]) -> str:
    """Run a study and kill something of it at a random moment -> what came of it."""
    count = sum(name.endswith("/steps") for name in expected)
    with Witness(study.study) as witness:
        driver = study.start()
        first, later_s = draw.randint(1, 5), draw.expovariate(1.0)
        until_true(lambda: study.begun() >= first)
        moment = time.monotonic() + later_s
        # the moment is random, but on a fast machine not after the end
        until_true(lambda: time.monotonic() > moment or study.begun() >= count)
        at = draw.choice(until_true(study.workers))
        driver = strike(study, driver, victim, at)
        ended = True
        try:
            driver.wait(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            ended = False
            os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
        if victim == "node":  # it comes back when all is over
            kill(at.pid, signal.SIGCONT)
            until_true(lambda: state_of(at.pid) is None)
    if not ended:
        return f"not finished after {PATIENCE_S} s"
    if driver.returncode:
        return f"exit code {driver.returncode}"
    if wrong := witness.two_at_once():
        return f"two at once: {wrong}"
    sound = bytes_of(study.study.root) == expected and verify(study.study)["ok"]
    return SAME if sound else "other bytes"


@pytest.mark.slow
def test_kill_9_at_random_never_changes_a_byte(tiny, study_of, tmp_path):
    """`slurmd`: that of a node, whose worker goes on unseen; `node`: with it the worker is stopped, and
    continued when the study is finished."""
    asked = [*tiny, *SWEEP, "lr_sweep.steps=4000"]
    expected = Undisturbed(asked, tmp_path / "here").bytes()
    outcomes: collections.Counter[tuple[str, str]] = collections.Counter()
    for trial in range(TRIALS):
        victim = VICTIMS[trial % len(VICTIMS)]
        study = study_of(asked, f"trial{trial}")
        outcome = outcome_of(study, victim, random.Random(trial), expected)
        outcomes[victim, outcome] += 1
        print(f"trial {trial}: {victim}: {outcome}", flush=True)
        end_jobs(study.study)
        for name in NAMES:
            Node(name).restore()
    print(f"\n{TRIALS} trials: {dict(outcomes)}")
    assert {outcome for _, outcome in outcomes} == {SAME}

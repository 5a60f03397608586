"""On four real Slurm nodes (make test-nodes): nodes that are cut off and come back, drains, preemptions, and
kill -9 of everything; at the end the bytes are those of the same study undisturbed on this one machine.
"""

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.called import CLI
from support.drivers import end_jobs, held_at_first, shell, started, until_true
from support.nodes import NAMES, At, Node, NodesStudy, bytes_of, kill, state_of

from ebc_lab.study.store.verify import verify

pytestmark = pytest.mark.nodes
TRIALS = int(os.environ.get("EBC_LAB_NODES_TRIALS", "30"))
VICTIMS = ("worker", "driver", "parent", "slurmd", "node")
PATIENCE_S = 300  # for a study that takes half a minute undisturbed
SWEEP = [
    "study.stages=[lr_sweep]",
    "lr_sweep.grids.adam=[5e-3,1e-2,2e-2,4e-2]",
    "lr_sweep.baseline_scales=[1.0]",
    "lr_sweep.control_scales=[1.0]",
]
SHORT, LONG = ([*SWEEP, f"lr_sweep.steps={steps}"] for steps in (150, 4000))


@contextlib.contextmanager
def on_nodes(overrides: list[str], out: Path) -> Iterator[NodesStudy]:
    """A study on the nodes. No job is left in the queue and every node is up, even if the test fails."""
    study = NodesStudy(overrides, out)
    try:
        yield study
    finally:
        end_jobs(study.study)
        for name in NAMES:
            Node(name).restore()


def undisturbed(overrides: list[str], out: Path) -> subprocess.Popen:
    """The same study on this machine without Slurm."""
    asked = ["launcher=local", "launcher.slots=2", "dtype=float32", "threads_per_run=1", "compile=off"]
    return started([*CLI, "autopilot", *overrides, *asked, f"output_dir={out}", "study.name=s"])


def kill_driver(study: NodesStudy, driver: subprocess.Popen) -> subprocess.Popen:
    """-> the next one"""
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    return study.start()


def finish(study: NodesStudy, driver: subprocess.Popen) -> None:
    assert driver.wait(timeout=PATIENCE_S) == 0, study.log.read_text()[-3000:]
    assert verify(study.study)["ok"]


def expected_of(here: subprocess.Popen, out: Path) -> dict[str, bytes]:
    said, _ = here.communicate()
    assert here.returncode == 0, said
    return bytes_of(out / "s")


def check(study: NodesStudy, expected: dict[str, bytes]) -> None:
    """No run has ended twice, and the bytes are those of the undisturbed study."""
    for run_id in study.study.run_ids():
        assert study.events(run_id).count("end") == 1, run_id
    assert bytes_of(study.study.root) == expected


@pytest.fixture
def study(tiny, tmp_path):
    with on_nodes([*tiny, *SHORT, "launcher.heartbeat_s=15"], tmp_path / "nodes") as it:
        yield it


def test_a_lost_node_a_killed_worker_and_a_killed_driver_change_no_byte(tiny, study, tmp_path, monkeypatch):
    # every run stays at step 100 until all four nodes are at one
    monkeypatch.setenv("PYTHONPATH", held_at_first(tmp_path, blocks=100))
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
    here = undisturbed([*tiny, *SHORT], tmp_path / "here")  # while the other one waits for what is lost
    finish(study, driver)
    # the worker that was stopped goes on, may write no more, and says so
    kill(lost.pid, signal.SIGCONT)
    until_true(lambda: state_of(lost.pid) is None)
    assert "what it still had to write is refused, and it ends here" in study.said()
    assert verify(study.study)["ok"]
    assert study.events(lost.run_id)[:3] == ["begin", "lost", "begin"]
    check(study, expected_of(here, tmp_path / "here"))


def strike(study: NodesStudy, driver: subprocess.Popen, victim: str, at: At) -> subprocess.Popen:
    """Kill -9 something of a study -> its driver from now on."""
    if victim == "driver":
        return kill_driver(study, driver)
    if victim == "worker":
        kill(at.pid)
    if victim == "parent":  # of the job on the node
        kill(int(shell("ps", "-o", "ppid=", "-p", str(at.pid))))
    if victim == "node":  # its worker hangs until all is over
        kill(at.pid, signal.SIGSTOP)
    if victim in ("node", "slurmd"):  # whose worker goes on unseen
        Node(at.node).cut_off()
    return driver


def strike_at_random(study: NodesStudy, victim: str, draw: random.Random, runs: int) -> None:
    """Run a study of so many runs, of which something is killed at a random moment, to its end."""
    driver = study.start()
    first, later_s = draw.randint(1, 5), draw.expovariate(1.0)
    until_true(lambda: study.begun() >= first)
    moment = time.monotonic() + later_s
    # the moment is random, but on a fast machine not after the end
    until_true(lambda: time.monotonic() > moment or study.begun() >= runs)
    at = draw.choice(until_true(study.workers))
    driver = strike(study, driver, victim, at)
    finish(study, driver)
    if victim == "node":
        kill(at.pid, signal.SIGCONT)
        until_true(lambda: state_of(at.pid) is None)


@pytest.mark.slow
def test_kill_9_at_random_moments_changes_no_byte(tiny, tmp_path):
    asked = [*tiny, *LONG]
    expected = expected_of(undisturbed(asked, tmp_path / "here"), tmp_path / "here")
    runs = sum(name.endswith("/steps") for name in expected)
    for trial in range(TRIALS):
        victim = VICTIMS[trial % len(VICTIMS)]
        with on_nodes(asked, tmp_path / f"trial{trial}") as study:
            strike_at_random(study, victim, random.Random(trial), runs)
            check(study, expected)
        print(f"trial {trial}: {victim}: the same bytes", flush=True)

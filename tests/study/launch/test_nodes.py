"""On four real Slurm nodes (make test-nodes): nodes that are cut off and come back, drains, preemptions, and
kill -9 of everything; at the end the bytes are those of the same study undisturbed on this one machine.
"""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from support.called import CLI
from support.drivers import end_jobs, held_at_first, started, until_true
from support.nodes import NAMES, Node, NodesStudy, bytes_of, kill, state_of

from ebc_lab.study.store.verify import verify

pytestmark = pytest.mark.nodes
SWEEP = [
    "study.stages=[lr_sweep]",
    "lr_sweep.grids.adam=[5e-3,1e-2,2e-2,4e-2]",
    "lr_sweep.baseline_scales=[1.0]",
    "lr_sweep.control_scales=[1.0]",
    "lr_sweep.steps=150",
]


@pytest.fixture
def study(tiny, tmp_path):
    """A study on the nodes. No job is left in the queue and every node is up, even if the test fails."""
    made = NodesStudy([*tiny, *SWEEP, "launcher.heartbeat_s=15"], tmp_path / "nodes")
    yield made
    end_jobs(made.study)
    for name in NAMES:
        Node(name).restore()


def undisturbed(tiny, out: Path) -> subprocess.Popen:
    """The same study on this machine without Slurm."""
    asked = ["launcher=local", "launcher.slots=2", "dtype=float32", "threads_per_run=1", "compile=off"]
    return started([*CLI, "autopilot", *tiny, *SWEEP, *asked, f"output_dir={out}", "study.name=s"])


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
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    driver = study.start()
    (tmp_path / "go").touch()
    here = undisturbed(tiny, tmp_path / "here")  # while the other one waits for what is lost
    assert driver.wait() == 0, study.log.read_text()[-3000:]
    assert verify(study.study)["ok"]
    # the worker that was stopped goes on, may write no more, and says so
    kill(lost.pid, signal.SIGCONT)
    until_true(lambda: state_of(lost.pid) is None)
    assert "what it still had to write is refused, and it ends here" in study.said()
    assert verify(study.study)["ok"]
    assert study.events(lost.run_id)[:3] == ["begin", "lost", "begin"]
    for run_id in study.study.run_ids():
        assert study.events(run_id).count("end") == 1, run_id
    out, _ = here.communicate()
    assert here.returncode == 0, out
    assert bytes_of(study.study.root) == bytes_of(tmp_path / "here" / "s")

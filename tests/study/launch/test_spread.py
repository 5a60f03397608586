"""A run whose processes are spread over the nodes of a Slurm job, on four real nodes (make test-nodes)."""

import contextlib
import subprocess
from pathlib import Path

import numpy as np
import pytest
from support.called import CLI
from support.drivers import end_jobs, shell, started, until_true
from support.nodes import NAMES, Node, kill

from ebc_lab.records.streams import read_columns
from ebc_lab.study.store import attempts
from ebc_lab.study.store.study import Study
from ebc_lab.study.store.verify import verify

pytestmark = [pytest.mark.nodes, pytest.mark.slow]
PATIENCE_S = 300
ONE_SEARCH = [  # which several processes can train: batches, probes and audits that they share
    *("batch_size=12", "budget.probe_sequences=4", "audit_tokens=64", "lr_sweep.grids.adam=[2e-2]"),
    *("lr_sweep.baseline_scales=[1.0]", "lr_sweep.control_scales=[1.0]", "study.stages=[lr_sweep]"),
    *("dtype=float32", "threads_per_run=1", "compile=off", "study.name=s"),
    "lr_sweep.steps=200",  # so that a run is not over before something happens to it
]
SLURM = [
    *("launcher=slurm", "launcher.nodes_per_run=2", "launcher.partition=main", "launcher.queue_every_s=1"),
    *("launcher.checkpoint_every_s=0.2", "launcher.max_lost=9", "launcher.heartbeat_s=60"),
]
TOLERANCE = 2e-4  # of sums in another order: see tests/training/test_ranks.py


def lose(node: Node) -> None:
    """Everything on a node is gone from one moment to the next, as when its power fails."""
    node.cut_off()
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"SLURMD_NODENAME={node.name}\0".encode() in place.joinpath("environ").read_bytes() + b"\0":
                kill(int(place.name))
    node.set("down")


def begun(out: Path, tiny: list[str], *launcher: str) -> subprocess.Popen:
    """The driver of a study of one search in `out`/s, of which four processes train each run."""
    asked = [*tiny, *ONE_SEARCH, "launcher.slots=1", "launcher.processes_per_run=4", *launcher]
    return started([*CLI, "autopilot", *asked, f"output_dir={out}"])


def finish(driver: subprocess.Popen, study: Study) -> dict[str, Path]:
    """-> the steps of each run"""
    out, _ = driver.communicate()
    assert driver.returncode == 0, out[-3000:]
    assert verify(study)["ok"]
    return {path.parent.name: path for path in study.runs.glob("*/steps.csv")}


def expanded(nodelist: str) -> set[str]:
    """The nodes of `n[1-2]`."""
    return set(shell("scontrol", "show", "hostnames", nodelist).split())


def test_a_run_on_two_nodes_of_which_one_is_lost_has_the_bits_of_one_node(tiny, tmp_path):
    study, here = (Study(tmp_path / name / "s") for name in ("nodes", "here"))
    try:
        driver = begun(tmp_path / "nodes", tiny, *SLURM)
        saved = until_true(lambda: sorted(study.runs.glob("*/checkpoint.pt")), within_s=PATIENCE_S)
        resumed = saved[0].parent.name
        [first] = attempts.log(study.run_dir(resumed))
        [other] = expanded(first["slurm_job_nodelist"]) - {first["host"]}
        lose(Node(other))
        spread = finish(driver, study)
    finally:
        end_jobs(study)
        for name in NAMES:
            Node(name).restore()
    begins = [event for event in attempts.log(study.run_dir(resumed)) if event["event"] == "begin"]
    assert {event["processes"] for event in begins} == {4}
    used = [expanded(event["slurm_job_nodelist"]) for event in begins]
    assert used[0] == {first["host"], other}
    assert len(used) > 1
    assert all(len(names) == 2 and other not in names for names in used[1:])
    alone = finish(begun(tmp_path / "here", tiny, "launcher=local"), here)
    assert spread.keys() == alone.keys() > {resumed}
    # of the run that was resumed what follows is rounded otherwise, as it is on one node: DDP then arranges
    # its first sums anew
    one, again = (read_columns(steps[resumed])["loss"] for steps in (alone, spread))
    np.testing.assert_allclose(again, one, rtol=TOLERANCE)
    for run_id in alone.keys() - {resumed}:
        assert spread[run_id].read_bytes() == alone[run_id].read_bytes(), run_id

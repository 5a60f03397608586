"""A run on several nodes, on a machine that is none: what the first one says to the others, and what they
start. tests/study/launch/test_nodes.py has real ones."""

import os
import signal
import subprocess
from types import SimpleNamespace

import pytest

from ebc_lab.records.json_files import read_json
from ebc_lab.training import nodes
from ebc_lab.training.nodes import Nodes, dismiss, invite, serve


@pytest.fixture
def first(tmp_path, monkeypatch):
    """The first of three nodes, whose address Slurm knows; a start of its job that was not the first one."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        '#!/bin/sh\n[ "$*" = "show node n1 --oneliner" ] && echo "NodeName=n1 NodeAddr=10.0.0.7 X=1"\n'
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    return Nodes(3, tmp_path / "nodes.json")


class Process:
    """What is started in the place of torchrun."""

    def __init__(self, words, **how):
        started.append(self)
        self.words, self.how, self.ends = words, how, []
        self.blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())

    def kill(self):
        self.ends.append("killed")

    def wait(self):
        self.ends.append("waited for")


started: list[Process] = []


@pytest.fixture
def processes(monkeypatch):
    started.clear()
    monkeypatch.setattr(nodes, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": Process}))
    return started


def test_each_node_starts_torchrun_as_the_first_one_asked_until_nothing_more_will_come(
    first, processes, monkeypatch
):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert invite(first, 6)[:2] == ["-m", "torch.distributed.run"]
    one = read_json(first.file)
    looks = []

    def look(seconds):
        """What happens between the looks of the other node."""
        looks.append(seconds)
        if len(looks) == 2:  # it has looked twice, and joined once
            assert len(processes) == 1
            invite(first, 3)
        elif len(looks) == 3:
            dismiss(first.file)

    monkeypatch.setattr(nodes, "time", SimpleNamespace(sleep=look))
    serve(first.file, 2, {"OWN": "1", "OMP_NUM_THREADS": "1"})
    assert looks == [nodes.POLL_S] * 3
    ones, others = processes
    assert ones.words[1:] == [
        *("-m", "torch.distributed.run", "--nnodes=3", "--node-rank=2", "--nproc-per-node=2"),
        *("--master-addr=10.0.0.7", f"--master-port={one['port']}", "-m", "ebc_lab.training.child"),
    ]
    assert "--nproc-per-node=1" in others.words
    assert f"--master-port={one['port']}" not in others.words
    assert ones.ends == others.ends == ["killed", "waited for"]
    environment = {"OMP_WAIT_POLICY": "passive", "OWN": "1", "OMP_NUM_THREADS": "1"}
    assert ones.how == {"env": environment, "stdin": subprocess.DEVNULL}
    assert ones.blocked >= {*nodes.NOT_FOR_TORCHRUN}  # a signal to all processes of a job does not end it
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_what_an_earlier_start_of_the_job_asked_means_nothing(first, processes, monkeypatch):
    invite(first, 6)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")

    def look(seconds):
        assert processes == []
        dismiss(first.file)

    monkeypatch.setattr(nodes, "time", SimpleNamespace(sleep=look))
    serve(first.file, 1, {})
    assert processes == []


def test_where_slurm_does_not_tell_the_address_it_is_the_name(first, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "other")
    assert "--master-addr=other" in invite(first, 3)
    assert "--node-rank=0" in invite(first, 3)
    monkeypatch.setenv("PATH", "")
    assert "--master-addr=other" in invite(first, 3)

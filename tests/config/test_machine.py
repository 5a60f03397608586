"""What this machine gives to a process."""

import os

import pytest

from ebc_lab.config import machine


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("150000 100000", 1), ("100 100000", 1), ("max 100000", None), ("900000000 100000", None), ("?", None)],
)
def test_a_containers_quota_cuts_the_cores(quota, cores, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "QUOTA", tmp_path / "cpu.max")
    everything = machine.cores()
    assert everything == len(os.sched_getaffinity(0))
    machine.QUOTA.write_text(quota)
    assert machine.cores() == (cores or everything)

"""What this machine gives to a process: cores, and GPUs, which here are those of a fake nvidia-smi."""

import os
import re

import pytest
from support.smi import MODEL, NO_DRIVER, gpu_uuid, mig_uuid

from ebc_lab.config import machine
from ebc_lab.config.compose import compose
from ebc_lab.config.errors import UserError


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


# -- GPUs ----------------------------------------------------------------------------------------------------

GPU = [gpu_uuid(number) for number in range(9)]
MIG = [mig_uuid(1, instance) for instance in range(2)]
DIVIDED = {1: ["3g.40gb", "1g.10gb"]}  # GPU 1 of several
SHORT = [uuid[:9] for uuid in GPU]


@pytest.mark.parametrize("count", [1, 2, 8])
def test_where_nothing_is_bound_every_gpu_is_used_by_its_uuid(count, machine_with):
    machine_with(count)
    assert machine.visible_gpus() == GPU[:count]
    assert machine.gpu_names() == (MODEL,) * count


def test_a_divided_gpu_is_used_by_its_instances_each_alone_and_not_as_a_whole(machine_with):
    machine_with(3, DIVIDED)
    assert machine.visible_gpus() == [GPU[0], *MIG, GPU[2]]
    assert machine.visible_gpus(together=2) == [GPU[0], GPU[2]], "a process sees one instance"
    assert machine.gpu_names() == (MODEL, f"{MODEL} MIG 3g.40gb", f"{MODEL} MIG 1g.10gb", MODEL)


CHOSEN = [
    ("3,0", [GPU[3], GPU[0]]),
    (" 2 , 1", [GPU[2], GPU[1]]),
    (f"{SHORT[2]},{SHORT[0]}", [GPU[2], GPU[0]]),
    (f"0,{GPU[2]}", [GPU[0], GPU[2]]),
    ("0,-1,1", [GPU[0]]),  # CUDA ends its list before what it does not know
    (f"{GPU[0]},{GPU[8]}", [GPU[0]]),
    ("GPU-,0", []),  # it may mean any of them
    ("", []),
    ("-1", []),
    ("NoDevFiles", []),
    ("0,1,0", []),
    (f"{GPU[1]},{SHORT[1]}", []),
    (f"1,{GPU[1]}", []),
]


CHOSEN_INSTANCES = [
    (MIG[1], [MIG[1]]),
    (f"{MIG[1]},{MIG[0]}", [MIG[1], MIG[0]]),
    (MIG[0][:12], [MIG[0]]),
    ("1", MIG),  # the GPU's number: all that it is divided into
    (GPU[1], MIG),
    (SHORT[1], MIG),
    (f"0,{MIG[0]}", [GPU[0], MIG[0]]),
    (f"{MIG[0]},{MIG[0]}", []),
    (f"1,{MIG[0]}", []),
    # as Slurm names them, and CUDA knows them under newer drivers as well
    (f"MIG-{GPU[1]}/2/0,MIG-{GPU[1]}/9/0", [f"MIG-{GPU[1]}/2/0", f"MIG-{GPU[1]}/9/0"]),
    (f"MIG-{GPU[1]}/2/0,MIG-{GPU[1]}/2/0", []),
    (f"MIG-{GPU[0]}/2/0", []),  # not divided
]


@pytest.mark.parametrize(
    ("value", "devices", "divided"),
    [*((*case, {}) for case in CHOSEN), *((*case, DIVIDED) for case in CHOSEN_INSTANCES)],
)
def test_an_inherited_choice_is_read_as_cuda_reads_it(value, devices, divided, machine_with, monkeypatch):
    machine_with(4, divided)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert machine.visible_gpus() == devices


def test_an_index_stays_one_where_cuda_may_count_otherwise(machine_with, monkeypatch):
    """Without CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA's first GPU is the fastest one, whatever nvidia-smi's is."""
    machine_with(2).rename(1, "NVIDIA H100 80GB HBM3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert machine.visible_gpus() == ["1", "0"]
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert machine.visible_gpus() == [GPU[1], GPU[0]]


def test_a_gpu_that_fell_off_the_bus_is_not_used_and_the_others_keep_their_numbers(machine_with, monkeypatch):
    machine_with(4).lose(1)
    assert machine.visible_gpus() == [GPU[0], GPU[2], GPU[3]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1,0")
    assert machine.visible_gpus() == [GPU[3]]


ALLOTTED = [
    ({"SLURM_JOB_GPUS": "1,3"}, [GPU[1], GPU[3]]),
    ({"SLURM_STEP_GPUS": "2", "SLURM_JOB_GPUS": "1,2"}, [GPU[2]]),
    ({"SLURM_JOB_GPUS": "1,3", "CUDA_VISIBLE_DEVICES": "3"}, [GPU[3]]),
    # only these four can be opened in the job, and the node has more
    ({"SLURM_JOB_GPUS": "4,5,6,7"}, GPU[:4]),
]


@pytest.mark.parametrize(("environment", "devices"), ALLOTTED)
def test_in_a_slurm_job_only_what_slurm_gave_is_used(environment, devices, machine_with, monkeypatch):
    machine_with(4)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert machine.visible_gpus() == devices


FAILURES = [
    (NO_DRIVER, 9, f"no GPU is found: nvidia-smi fails with exit code 9: {NO_DRIVER.strip()}"),
    ("No devices were found\n", 6, "nvidia-smi lists no GPU here."),
    ("", 139, "no GPU is found: nvidia-smi fails with exit code 139."),
]


def refused_without_gpu(told):
    assert machine.visible_gpus() == []
    assert machine.chosen_device("auto") == "cpu"
    with pytest.raises(UserError, match=f"^{re.escape(f'device=cuda, but {told}')}$"):
        compose(["scale=smoke", "device=cuda"])


@pytest.mark.parametrize(("text", "code", "told"), FAILURES)
def test_where_nvidia_smi_fails_there_is_no_gpu_and_it_is_said_why(text, code, told, machine_with):
    machine_with(2).fail(text, code)
    refused_without_gpu(told)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("#!/bin/sh\nexec tail -f /dev/null\n", "does not answer within 0.1 s"),
        ("", "cannot be started (Exec format error)"),
        (None, "is not on PATH"),
    ],
)
def test_an_nvidia_smi_that_cannot_answer_is_none(command, told, machine_with, monkeypatch, tmp_path):
    fake = machine_with(2)
    monkeypatch.setattr(machine, "SMI_PATIENCE_S", 0.1)
    if command is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        fake.replace(command)
    refused_without_gpu(f"no GPU is found: nvidia-smi {told}.")


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("", "CUDA_VISIBLE_DEVICES= leaves none of the 2 GPUs here"),
        ("7", "CUDA_VISIBLE_DEVICES=7 leaves none of the 2 GPUs here"),
        ("1,1", r"CUDA_VISIBLE_DEVICES=1,1 names a GPU twice \(1\), and CUDA then shows none"),
    ],
)
def test_a_choice_that_leaves_no_gpu_is_refused_with_the_reason(value, told, machine_with, monkeypatch):
    machine_with(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    with pytest.raises(UserError, match=f"^device=cuda, but {told}\\.$"):
        compose(["scale=smoke", "device=cuda"])


def test_one_run_is_not_spread_over_instances_of_a_gpu(machine_with):
    together = ["scale=smoke", "device=cuda", "launcher.processes_per_run=2"]
    fake = machine_with(3, DIVIDED)
    compose(together, study=False)
    fake.lose(2)
    machine.first_listing.cache_clear()
    with pytest.raises(UserError, match=r"1 can be seen here \(2 more are parts of one, MIG, and go alone\)"):
        compose(together, study=False)

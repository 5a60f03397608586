"""`python -m ebc_lab.verity`, in processes of their own, whose instructions are set before torch starts."""

import os
import subprocess
import sys

import pytest
import torch
from support.exact_gpt import GOLDEN, gpt, trained

from ebc_lab.verity import __main__ as program
from ebc_lab.verity import use_engine


@pytest.mark.thorough
def test_other_instructions_give_the_known_checksums():
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ebc_lab.verity", "--rounds", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    for said in (
        "DEFAULT, 1 thread",
        "platform cpu: ok",
        "engine eager: checksums ok",
        "times plain float32",
    ):
        assert said in done.stdout


def test_the_first_checksum_that_differs_is_named(monkeypatch, capsys):
    monkeypatch.setattr(program, "speeds", lambda kinds, device, rounds: {})
    monkeypatch.setitem(program.KNOWN, "whole", "0" * 16)
    assert program.main([]) == 1
    use_engine("auto")
    assert f"whole: {GOLDEN['gpt']['whole']['final']} instead of 0000000000000000" in capsys.readouterr().out


def test_a_platform_that_flushes_subnormal_numbers_is_told_so(capsys):
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormal numbers")
    try:
        assert program.main([]) == 1
    finally:
        torch.set_flush_denormal(False)
    assert "subnormal numbers are kept" in capsys.readouterr().out


def test_the_plain_step_is_of_the_same_model():
    model = gpt()
    tokens = torch.randint(0, 11, (2, 8), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(program.plain_logits(model, tokens), model(tokens), rtol=1e-4, atol=1e-7)


@pytest.mark.cuda
def test_a_gpu_gives_the_checksums_of_a_cpu():
    assert program.differing("cuda") is None


@pytest.mark.cuda
def test_more_steps_on_a_gpu_end_as_on_a_cpu():
    assert trained(steps=20, parts=2, device="cuda") == trained(steps=20, parts=2)

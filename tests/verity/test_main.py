"""`python -m ebc_lab.verity`, in processes of their own, whose instructions are set before torch starts."""

import os
import subprocess
import sys

import pytest
import torch
from support.exact_gpt import GOLDEN, gpt

from ebc_lab.verity import __main__ as program
from ebc_lab.verity import ops, use_engine, weights_checksum


def printed(**environment: str) -> str:
    """What it prints under these variables; it must find nothing wrong."""
    found = subprocess.run(
        [sys.executable, "-m", "ebc_lab.verity", "--rounds", "1"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return found.stdout


@pytest.mark.thorough
def test_other_instructions_give_the_known_checksums():
    output = printed(ATEN_CPU_CAPABILITY="default", OMP_NUM_THREADS="1")
    assert "DEFAULT, 1 thread" in output
    assert "platform cpu: ok" in output
    assert "engine eager: checksums ok" in output
    assert "times plain float32" in output


@pytest.mark.slow
@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
@pytest.mark.parametrize("mkl", ["", "SSE4_2", "AVX2"])
def test_every_combination_gives_the_known_checksums(capability, threads, mkl):
    output = printed(ATEN_CPU_CAPABILITY=capability, OMP_NUM_THREADS=threads, MKL_ENABLE_INSTRUCTIONS=mkl)
    assert "differ" not in output


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
def test_a_larger_model_trains_alike_on_a_gpu_and_on_a_cpu():
    def run(device: str) -> str:
        torch.manual_seed(0)
        model = gpt(seed=3, device=device)
        optimizer = program.VerityAdam(model.parameters(), lr=0.003, weight_decay=0.1)
        grids = program.Grids(model)
        generator = torch.Generator().manual_seed(1)
        for _ in range(20):
            rows = torch.randint(0, 11, (64, 9), generator=generator).to(device)
            finished = False
            while not finished:
                for part in rows.chunk(2):
                    ops.cross_entropy(model(part[:, :-1]), part[:, 1:]).backward()
                finished = grids.finish(64 * 8)
            optimizer.step()
        return weights_checksum(model)

    assert run("cuda") == run("cpu")

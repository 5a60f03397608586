"""Runs whose updates are made inside backward, and whose activations are packed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.runs import assert_run_resumes, made, plain, untimed

from ebc_lab.components.memory import Memory
from ebc_lab.config.choices import changed
from ebc_lab.records.streams import read_columns
from ebc_lab.training.outcome import run_and_record
from ebc_lab.training.run import Training

AXIOM = {"optimizer": {"name": "axiom", "rank": 2, "lr": 0.2}}
ALL = {**AXIOM, "memory": {"name": "all"}, "stabilizer": {"name": "none"}}
LAGGED = ALL | {"stabilizer": {"name": "ebc"}, "budget": {"name": "lagged", "target_kl": 0.002}}


@pytest.mark.thorough
def test_hooks_change_no_bit_of_a_run(run, tmp_path):
    run = changed(plain(run), AXIOM)
    hooked = changed(run, {"memory": {"name": "hooks"}})
    found = [run_and_record(run, tmp_path / "plain", "x"), run_and_record(hooked, tmp_path / "hooks", "x")]
    named = {"identity": ""}  # a step with a bad gradient would end otherwise: they have names of their own
    assert untimed(found[0] | named) == untimed(found[1] | named)
    assert len(found[0]["weights_checksum"]) == 16
    columns = [read_columns(tmp_path / name / "steps.csv") for name in ("plain", "hooks")]
    assert np.isnan(columns[1].pop("applied_norm")).all()  # hooks keep no weights of before
    columns[0].pop("applied_norm")
    np.testing.assert_equal(columns[0], columns[1])


def test_a_result_tells_the_bytes_beside_the_weights(run, tmp_path):
    result = run_and_record(changed(run, ALL | {"steps": 5}), tmp_path / "run", "x")
    fresh = Training(changed(run, ALL), made(tmp_path / "fresh"))
    sizes = [p.nbytes for p in fresh.model.parameters()]
    assert result["gradient_bytes"] == sum(sizes)
    assert result["largest_gradient_bytes"] == max(sizes)
    fresh.advance(2)
    state = fresh.optimizer.bases[0].memory_usage(verbose=False)["state_bytes"]
    assert result["state_bytes"] == state
    [packed] = [hook.activations for hook in fresh.hooks if isinstance(hook, Memory)]
    assert 0 < result["activation_bytes"] == packed.memory_stats()["compressed_bytes"]


@pytest.mark.thorough
@pytest.mark.parametrize("settings", [ALL, LAGGED], ids=["plain", "lagged"])
def test_it_resumes_to_the_same_bytes(run, tmp_path, settings):
    assert_run_resumes(changed(run, settings), tmp_path)


@pytest.mark.thorough
def test_lagged_holds_its_budget_in_the_median(run, tmp_path):
    run = changed(run, LAGGED | {"audit_every": 1, "steps": 60})
    result = run_and_record(run, tmp_path / "run", "x")
    assert result["clip_rate"] > 0.5
    assert 0.5 < result["kl_ratio_median"] < 2


def test_a_bad_gradient_inside_backward_is_a_skipped_step(run, tmp_path):
    training = Training(changed(run, ALL), made(tmp_path / "run"))
    training.advance(2)
    weight = training.model.blocks[0].q.weight
    before = weight.detach().clone()
    handle = weight.register_hook(lambda g: g * math.nan)
    training.advance(1)
    handle.remove()
    assert training.skips == 1
    assert torch.equal(weight, before)
    training.advance(1)
    assert training.skips == 0


def test_the_seed_of_the_rounding_is_the_runs_own(run, tmp_path):
    run = changed(run, ALL | {"steps": 4})
    ends = []
    for seed in (0, 0, 1):
        settings = {"memory": {"name": "all", "seed": seed}}
        ends.append(
            run_and_record(changed(run, settings), tmp_path / f"{len(ends)}", "x")["weights_checksum"]
        )
    assert ends[0] == ends[1] != ends[2]

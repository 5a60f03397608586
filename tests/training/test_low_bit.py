"""Runs with quantized weights, gradients and state: what they record, write, and resume to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.runs import assert_run_resumes, made

from ebc_lab.components import quantizer as quantizers
from ebc_lab.config.choices import changed
from ebc_lab.lowbit import inspect_packed, load_packed, quantize
from ebc_lab.records.streams import read_columns
from ebc_lab.training.outcome import run_and_record
from ebc_lab.training.run import Training
from ebc_lab.workloads.batches import windows
from ebc_lab.workloads.losses import evaluate

FEEDBACK = {"gradients": "ternary", "error_feedback": True, "state": "ternary"}
EVERYTHING = {
    "quantizer": {"name": "ternary", **FEEDBACK},
    "partition": {"name": "stratified", "clusters": 3},
    "policy": {"name": "auxnn"},
    "stabilizer": {"name": "trust_region", "strength": 1.0},
    "audit_every": 5,
}


@pytest.mark.thorough
@pytest.mark.parametrize(
    "settings",
    [
        EVERYTHING,
        {"quantizer": {"name": "five", "gradients": "five", "rounding": "stochastic", "state": "int8"}},
        {
            "quantizer": {"name": "ternary"},
            "stabilizer": {"name": "ebc"},
            "budget": {"name": "shadow", "exponent": "auto", "target_kl": 0.005},
            "curve_every": 10,
        },
    ],
)
def test_a_low_bit_run_resumes_to_the_same_bytes(run, tmp_path, settings):
    assert_run_resumes(changed(run, settings), tmp_path, files=("steps.csv", "model.ebcpack"))


@pytest.mark.thorough
@pytest.mark.parametrize("levels", ["ternary", "five"])
def test_the_packed_model_has_the_runs_own_loss(run, tmp_path, levels):
    run = changed(run, {"quantizer": {"name": levels}, "steps": 10})
    result = run_and_record(run, tmp_path / "run", "x")
    path = tmp_path / "run/model.ebcpack"
    fresh = Training(changed(run, {"quantizer": {"name": "none"}}), made(tmp_path / "fresh"))
    load_packed(path, fresh.model)
    tokens = fresh.workload.tokens["val"]
    found = evaluate(fresh.model, fresh.run_config, windows(tokens, run.model.context))
    assert found["loss"] == result["val_loss"]
    assert not torch.equal(fresh.model.blocks[0].q.weight, fresh.model.blocks[0].q.weight.round())
    assert result["packed_bytes"] == path.stat().st_size == inspect_packed(path)["file_bytes"]
    assert result["model_bytes_float32"] == 4 * sum(p.numel() for p in fresh.model.parameters())
    assert result["streams"]["model.ebcpack"]
    bits = {"ternary": 1.6, "five": 7 / 3}[levels]
    sizes = [p.numel() for p in fresh.workload.matrices(fresh.model)]
    assert result["bits_per_weight"] == pytest.approx(bits + 32 * len(sizes) / sum(sizes), rel=0.02)
    assert 0 < result["entropy_bits"] < bits
    assert 0.1 < result["zero_share"] < 0.6


def test_the_forward_uses_the_levels_and_the_optimizer_the_weights_beneath(run, tmp_path):
    training = Training(changed(run, {"quantizer": {"name": "five"}}), made(tmp_path / "run"))
    layer = training.model.blocks[0].mlp_in
    before = layer.weight.detach().clone()
    expected = quantize(before.numpy(), "five").values()
    assert np.array_equal(layer.effective().detach().numpy(), expected)
    training.advance(1)
    assert len(before.unique()) > 100
    assert len(layer.weight.detach().unique()) > 100
    assert len(layer.effective().unique()) == 5


@pytest.mark.thorough
def test_flips_are_recorded_at_audits_and_seen_against_ten_steps_before(run, tmp_path):
    run = changed(run, {"quantizer": {"name": "ternary"}, "audit_every": 4, "steps": 21})
    directory = made(tmp_path / "run")
    training = Training(run, directory)
    seen = []
    for _ in range(21):
        layers = [p.detach().numpy() for p in training.workload.matrices(training.model)]
        seen.append(np.concatenate([quantize(w, "ternary").codes.ravel() for w in layers]))
        training.advance(1)
    training.recording.close()
    recorded = read_columns(directory / "steps.csv")["flip_share"]
    expected = {t: np.mean(seen[t] != seen[t - 10]) for t in (12, 16, 20)}
    assert set(np.flatnonzero(~np.isnan(recorded))) == set(expected)
    assert all(abs(recorded[t] - share) < 1e-6 for t, share in expected.items())
    assert max(expected.values()) > 0


def test_a_skipped_step_keeps_the_residuals(run, tmp_path, monkeypatch):
    run = changed(run, {"quantizer": FEEDBACK})
    training = Training(run, made(tmp_path / "run"))
    training.advance(3)
    [quantizer] = [h.quantizer for h in training.hooks if isinstance(h, quantizers.LowBit)]
    residuals = [r.clone() for r in quantizer.residuals]
    take = training.optimizer.take_step
    skipped = torch.tensor(True)
    monkeypatch.setattr(training.optimizer, "take_step", lambda i: replace(take(i), skipped=skipped))
    training.advance(1)
    assert all(torch.equal(a, b) for a, b in zip(residuals, quantizer.residuals, strict=True))


def test_a_run_that_diverges_is_a_result_without_a_model(run, tmp_path):
    training = Training(changed(run, {"quantizer": {"name": "ternary"}}), made(tmp_path / "run"))
    training.model.blocks[0].q.weight.data.fill_(torch.nan)
    result = training.run()
    assert result["outcome"] == "diverged"
    assert "packed_bytes" not in result
    assert not (tmp_path / "run/model.ebcpack").exists()


def test_figures_of_gradients_and_state(run, tmp_path):
    run = changed(run, {"quantizer": {"gradients": "five", "state": "int8"}, "steps": 10})
    result = run_and_record(run, tmp_path / "run", "x")
    assert result["grad_bits"] == pytest.approx(7 / 3, rel=0.05)  # and a step for each matrix
    assert result["state_bits"] == pytest.approx(16.25, rel=0.01)
    assert 0 < result["grad_error"] < 1
    assert "packed_bytes" not in result
    assert not (tmp_path / "run/model.ebcpack").exists()

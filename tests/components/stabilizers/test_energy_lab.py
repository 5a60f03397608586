"""The energy budget as a stabilizer of the lab, on the lab's own model."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.perceptron import backward_on, batch, floats, grads, joint, same, small_model

from ebc_lab.components.optimizer import build as build_optimizers
from ebc_lab.components.stabilizers import build
from ebc_lab.components.stabilizers.energy import EnergyBudget, monitor_ebc_ratio
from ebc_lab.config.parts.model import ModelConfig
from ebc_lab.config.parts.stabilizer import StabilizerConfig
from ebc_lab.config.schema import RunConfig
from ebc_lab.workloads.gpt import build as build_model
from ebc_lab.workloads.gpt import hidden_matrices

RUN = RunConfig(audit_every=2, audit_tokens=32, model=ModelConfig(blocks=2, width=16, heads=2, context=8))


def lab(strength, norm="rms", **options):
    run = replace(RUN, stabilizer=StabilizerConfig(f"energy_{norm}", strength), **options)
    model = build_model(run.model, 11, 0)
    return model, build(model, build_optimizers(model, run.optimizer, hidden_matrices(model)), None, run)


def lab_step(model, step, dtype=None):
    tokens = torch.randint(11, (8, 8), generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        logits = model(tokens)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return tokens, logits


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("norm", ["raw", "rms"])
def test_every_layer_of_the_labs_model_is_limited(norm, dtype):
    model, stabilizer = lab(1e-6, norm)
    monitor = monitor_ebc_ratio(model, norm)
    for step in range(3):
        tokens, logits = lab_step(model, step, dtype)
        stats = stabilizer.step(tokens, logits)
        measured = floats(monitor())
        assert len(measured) == len(list(model.parameters()))
        assert max(measured.values()) <= 1e-6 * (1 + 1e-4)
        assert min(measured.values()) >= 1e-6 * (1 - 1e-4)
        assert stats.clip_coefficient == 1
        assert 0 < stats.gradient_scale < 1
        assert all(e.dtype == torch.float32 for e in stabilizer.record.energies.values())


def test_the_labs_audits_do_not_overwrite_what_training_recorded():
    model, stabilizer = lab(0.1)
    tokens, logits = lab_step(model, 0)
    before = {layer: e.clone() for layer, e in stabilizer.record.energies.items()}
    assert stabilizer.step(tokens, logits).applied_kl > 0  # audited: forwards were made
    assert {layer: float(e) for layer, e in stabilizer.record.energies.items()} == floats(before)


def test_only_what_the_optimizer_trains_is_limited():
    model = small_model()
    x, y = batch()
    stabilizer = EnergyBudget(
        model, torch.optim.SGD(model[2].parameters(), lr=0.1), strength=1e-3, audit_every=0
    )
    backward_on(model, x, y)
    before = grads(model)
    stats = stabilizer.step()
    assert same(grads(model)[:2], before[:2])
    assert float(stats.gradient_scale) == pytest.approx(
        joint(model[2].parameters()) / float(stats.grad_norm), rel=1e-5
    )
    assert stats.gradient_scale < 1

"""The base optimizers, on one contract, and what each of them does in one step."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from ebc_lab.config import ModelConfig, OptimizerConfig
from ebc_lab.model import build as build_model
from ebc_lab.model import hidden_matrices
from ebc_lab.optimizers import OPTIMIZERS, StackedMuon, build

LR = 1e-2
CONFIGS = {
    "adam": OptimizerConfig("adam", lr=LR, weight_decay=0.1),
    "adamw": OptimizerConfig("adamw", lr=LR, weight_decay=0.1),
    "sgd": OptimizerConfig("sgd", lr=LR, momentum=0.9),
    "muon": OptimizerConfig("muon", lr=LR, momentum=0.95),
}
every = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture
def model():
    return build_model(ModelConfig(blocks=2, width=16, heads=2, context=8), 11, seed=0)


def take_steps(model, bases, count, start=0):
    for i in range(start, start + count):
        tokens = torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(i))
        model.zero_grad()
        model(tokens).logsumexp(-1).mean().backward()
        for base in bases:
            base.step()


def test_the_table_is_whole():
    assert set(CONFIGS) == set(OPTIMIZERS)


@every
def test_every_parameter_belongs_to_exactly_one_optimizer(model, name):
    held = [id(p) for base in build(model, CONFIGS[name]) for group in base.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert all(group["lr"] == LR for base in build(model, CONFIGS[name]) for group in base.param_groups)


@every
def test_it_moves_every_parameter_and_keeps_its_kind(model, name):
    before = copy.deepcopy(model)
    take_steps(model, build(model, CONFIGS[name]), 2)
    for (key, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        assert p.shape == q.shape
        assert p.dtype == q.dtype
        assert p.isfinite().all()
        assert not torch.equal(p, q), key


@every
def test_a_zero_gradient_moves_nothing_but_decay(model, name):
    config = replace(CONFIGS[name], weight_decay=0.0)
    before = copy.deepcopy(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for base in build(model, config):
        base.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))


@every
def test_state_round_trip_is_exact(model, name):
    bases = build(model, CONFIGS[name])
    take_steps(model, bases, 3)
    twin = copy.deepcopy(model)
    others = build(twin, CONFIGS[name])
    for base, other in zip(bases, others, strict=True):
        other.load_state_dict(copy.deepcopy(base.state_dict()))
    take_steps(model, bases, 3, start=3)
    take_steps(twin, others, 3, start=3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def updates(model, config):
    """(gradient, weights before, weights after) of each parameter at a first step."""
    tokens = torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(0))
    model(tokens).logsumexp(-1).mean().backward()
    before = [p.detach().clone() for p in model.parameters()]
    for base in build(model, config):
        base.step()
    return [(p.grad, old, p.detach()) for p, old in zip(model.parameters(), before, strict=True)]


def test_adam_corrects_its_bias(model):
    """At the first step both corrections cancel: W - lr·g/(|g| + eps)."""
    config = OptimizerConfig("adam", lr=LR, eps=1e-6)
    for g, old, new in updates(model, config):
        torch.testing.assert_close(new, old - LR * g / (g.abs() + 1e-6))


def test_adamw_decays_the_weights_and_adam_the_gradient(model):
    twin = copy.deepcopy(model)
    for g, old, new in updates(model, OptimizerConfig("adamw", lr=LR, eps=1e-6, weight_decay=0.1)):
        torch.testing.assert_close(new, old * (1 - LR * 0.1) - LR * g / (g.abs() + 1e-6))
    for g, old, new in updates(twin, OptimizerConfig("adam", lr=LR, eps=1e-6, weight_decay=0.1)):
        g = g + 0.1 * old
        torch.testing.assert_close(new, old - LR * g / (g.abs() + 1e-6))


def test_sgd_has_heavy_ball_momentum(model):
    bases = build(model, OptimizerConfig("sgd", lr=LR, momentum=0.9))
    start = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        bases[0].step()
    for p, old in zip(model.parameters(), start, strict=True):
        torch.testing.assert_close(p.detach(), old - LR * (1 + 1.9))


def test_muon_takes_the_hidden_matrices_at_adams_rms(model):
    bases = build(model, OptimizerConfig("muon", lr=LR, momentum=0.95))
    assert [id(p) for p in bases[0].param_groups[0]["params"]] == [id(p) for p in hidden_matrices(model)]
    assert isinstance(bases[1], torch.optim.Adam)
    before = [p.detach().clone() for p in hidden_matrices(model)]
    for i, p in enumerate(hidden_matrices(model)):
        p.grad = 1e-3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    bases[0].step()
    for p, old in zip(hidden_matrices(model), before, strict=True):
        rms = (p.detach() - old).square().mean().sqrt().item()
        assert rms == pytest.approx(0.2 * LR, rel=0.2)  # Adam's updates have an rms of 0.2 to 0.4 lr
        values = torch.linalg.svdvals(p.detach() - old) / (0.2 * LR * math.sqrt(max(p.shape)))
        assert 0.7 < values.median() < 1.3  # nearly orthogonal: a few Newton-Schulz iterations
        assert values.max() < 1.3


def test_stacked_muon_is_torchs_muon_up_to_bfloat16_rounding(model):
    plain, stacked = copy.deepcopy(model), copy.deepcopy(model)
    settings = {"lr": LR, "momentum": 0.9, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    reference = torch.optim.Muon(hidden_matrices(plain), **settings)
    fast = StackedMuon(hidden_matrices(stacked), **settings)
    for i in range(4):
        for p, q in zip(hidden_matrices(plain), hidden_matrices(stacked), strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            q.grad = p.grad.clone()
        reference.step()
        fast.step()
    start = dict(model.named_parameters())
    for (name, p), q in zip(plain.named_parameters(), stacked.parameters(), strict=True):
        moved = (p - start[name]).norm()
        assert (p - q).norm() <= 0.01 * moved, name
    assert all(torch.equal(fast.state[q]["momentum_buffer"], reference.state[p]["momentum_buffer"]) for p, q in
               zip(hidden_matrices(plain), hidden_matrices(stacked), strict=True))  # fmt: skip


def test_muon_leaves_a_matrix_without_gradient_alone(model):
    matrices = hidden_matrices(model)
    before = [p.clone() for p in matrices]
    for p in matrices[1:]:
        p.grad = torch.ones_like(p)
    StackedMuon(matrices, lr=LR).step()
    assert torch.equal(matrices[0], before[0])
    assert not torch.equal(matrices[1], before[1])

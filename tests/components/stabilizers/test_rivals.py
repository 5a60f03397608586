"""The rivals of EBC: each against its formula written out plainly, on a model small enough to do so."""

import math
from dataclasses import replace

import pytest
import torch
from support.perceptron import (
    CLASSES,
    RATES,
    UPDATE,
    around,
    backward,
    grads,
    norm,
    same,
    sgd,
    small_model,
    values,
)
from torch import nn

from ebc_lab.components.optimizer import build as build_optimizers
from ebc_lab.components.stabilizers import build
from ebc_lab.components.stabilizers.rivals import AdaptiveGradientClip, NormClip, ValueClip, ZClip
from ebc_lab.config.parts.model import ModelConfig
from ebc_lab.config.parts.stabilizer import StabilizerConfig
from ebc_lab.config.schema import RunConfig
from ebc_lab.workloads.gpt import build as build_model
from ebc_lab.workloads.gpt import hidden_matrices

# -- what holds for all --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CLASSES, *RATES])
def test_built_from_a_run(name):
    cls = {**CLASSES, **RATES}[name]
    run = RunConfig(
        model=ModelConfig(blocks=1, width=8, heads=1, context=4),
        stabilizer=StabilizerConfig(name, schedule="linear"),
        steps=30,
    )
    for strength, expected in ((None, cls.default), (0.7, 0.7)):
        model = build_model(run.model, 5, 0)
        bases = build_optimizers(model, run.optimizer, hidden_matrices(model))
        made = build(model, bases, None, replace(run, stabilizer=replace(run.stabilizer, strength=strength)))
        assert type(made) is cls
        assert made.strength == expected
        if name == "trust_region":
            assert (made.radius.schedule, made.radius.total_steps) == ("linear", 30)
        if name.startswith("energy"):
            assert made.record.norm == name[-3:]


@pytest.mark.parametrize("strength", [0, -1.0, math.nan])
@pytest.mark.parametrize("name", CLASSES)
def test_a_strength_that_is_not_positive_is_refused(name, strength):
    model = small_model()
    with pytest.raises(ValueError, match="strength must be > 0"):
        around(name, model, sgd(model), strength=strength)


@pytest.mark.thorough
@pytest.mark.parametrize("strength", [1e30, math.inf])
@pytest.mark.parametrize("name", CLASSES)
def test_a_huge_strength_is_the_plain_optimizer(name, strength):
    model = small_model()
    plain = small_model()
    stabilizer = around(
        name, model, torch.optim.Adam(model.parameters(), lr=0.1), strength=strength, audit_every=3
    )
    base = torch.optim.Adam(plain.parameters(), lr=0.1)
    for step in range(30):
        x = backward(model, step, 0.1)  # its norm is below the one that adagc starts with
        stats = stabilizer.step(x)
        assert stats.clip_coefficient == 1
        assert stats.gradient_scale is None if name in UPDATE else stats.gradient_scale == 1
        backward(plain, step, 0.1)
        base.step()
    assert same(model.parameters(), plain.parameters())


@pytest.mark.parametrize("name", CLASSES)
def test_no_gradient_at_all(name):
    model = small_model()
    stabilizer = around(name, model, sgd(model))
    for _ in range(30):
        stats = stabilizer.step()
    assert not stats.skipped
    assert name in UPDATE or stats.gradient_scale == 1


@pytest.mark.parametrize("name", ["norm_clip", "value_clip", "agc", "energy_raw", "energy_rms"])
def test_gradient_scale_is_what_was_left_of_the_norm(name):
    model = small_model()
    stabilizer = around(name, model, sgd(model), strength=1e-3)
    x = backward(model)
    whole = norm(grads(model))
    stats = stabilizer.step(x)
    assert 0 < stats.gradient_scale < 0.9
    assert float(stats.gradient_scale) == pytest.approx(norm(grads(model)) / whole, rel=1e-5)
    assert float(stats.grad_norm) == pytest.approx(whole, rel=1e-5)
    assert stats.clip_coefficient == 1


@pytest.mark.parametrize("name", UPDATE)
def test_an_update_that_overflows_is_given_up(name):
    model = small_model()
    stabilizer = around(name, model, sgd(model, lr=1e38))
    backward(model)
    before = values(model)
    stats = stabilizer.step()
    assert stats.skipped
    assert stats.clip_coefficient == 0
    assert same(values(model), before)


# -- gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1e-3, 1.0, 100.0])
def test_norm_clip(factor):
    model = small_model()
    stabilizer = NormClip(model, sgd(model), strength=0.2, audit_every=0)
    backward(model, factor=factor)
    expected = [
        w - 0.5 * g * min(1, 0.2 / (norm(grads(model)) + 1e-6))
        for w, g in zip(values(model), grads(model), strict=True)
    ]
    stabilizer.step()
    torch.testing.assert_close(values(model), expected)


def test_value_clip():
    model = small_model()
    stabilizer = ValueClip(model, sgd(model), strength=0.02, audit_every=0)
    backward(model)
    assert 0 < sum(int((g.abs() > 0.02).sum()) for g in grads(model)) < 60  # some of the 74 are clipped
    expected = [w - 0.5 * g.clamp(-0.02, 0.02) for w, g in zip(values(model), grads(model), strict=True)]
    stabilizer.step()
    torch.testing.assert_close(values(model), expected)


@pytest.mark.parametrize("shape", [(4,), (), (4, 6), (4, 3, 5), (4, 3, 2, 2)])
@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0])
def test_agc_limits_each_unit(shape, scale):
    torch.manual_seed(1)
    model = nn.Module()
    model.w = nn.Parameter(torch.randn(shape))
    if len(shape) > 1:
        model.w.data[0] = 0  # a unit at zero has the floor 1e-3
    old = model.w.detach().clone()
    gradient = scale * torch.randn(shape)
    model.w.grad = gradient.clone()
    AdaptiveGradientClip(model, sgd(model), strength=1e-4, audit_every=0).step()
    expected = gradient.clone()
    for unit, weights in zip(expected, old, strict=True) if len(shape) > 1 else [(expected, old)]:
        most = 1e-4 * max(norm([weights]), 1e-3)
        unit.mul_(min(1.0, most / norm([unit])))
    torch.testing.assert_close(model.w.grad, expected, rtol=1e-5, atol=0)
    assert torch.equal(model.w.grad, gradient) == (
        scale == 1e-9
    )  # even there the library's own floor would clip


def noisy_norms(n, seed=0, outliers=(30, 31, 45)):
    draw = torch.Generator().manual_seed(seed)
    norms = (1 + 0.1 * torch.randn(n, generator=draw, dtype=torch.float64)).tolist()
    return [30 * x if i in outliers else x for i, x in enumerate(norms)]


def zclip_by_hand(norms, threshold=2.5, alpha=0.97):
    """The norms as ZClip leaves them, one by one in plain floats."""
    first = norms[:25]
    mean = sum(first) / 25
    variance = sum((x - mean) ** 2 for x in first) / 25
    out = list(first)
    for x in norms[25:]:
        z = (x - mean) / math.sqrt(variance)
        out.append(mean + threshold**2 / z * math.sqrt(variance) if z > threshold else x)
        mean = alpha * mean + (1 - alpha) * out[-1]
        variance = alpha * variance + (1 - alpha) * (out[-1] - mean) ** 2
    return out


def one_vector(strength=None):
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(9))
    return model, ZClip(model, sgd(model), strength=strength, audit_every=0)


def with_norm(model, size, step):
    direction = torch.randn(9, generator=torch.Generator().manual_seed(step))
    model.w.grad = direction * (size / direction.norm())


@pytest.mark.parametrize("strength", [2.5, 1.0])
def test_zclip(strength):
    norms = noisy_norms(60)
    model, stabilizer = one_vector(strength)
    left = []
    scales = []
    for step, size in enumerate(norms):
        with_norm(model, size, step)
        stats = stabilizer.step()
        left.append(norm([model.w.grad]))
        scales.append(float(stats.gradient_scale))
    expected = zclip_by_hand(norms, strength)
    assert left == pytest.approx(expected, rel=1e-4)
    assert scales == pytest.approx([e / n for e, n in zip(expected, norms, strict=True)], rel=1e-4)
    assert scales[:25] == [1] * 25
    assert max(left[30], left[31], left[45]) < 1.5  # of 30
    assert scales.count(1) > 40


def test_zclip_keeps_its_statistics_through_an_overflowing_norm():
    model, stabilizer = one_vector()
    for step, size in enumerate([*noisy_norms(29), 1e25, 1.0, 1.0]):  # its square is beyond float32
        with_norm(model, size, step)
        stats = stabilizer.step()
        assert torch.isfinite(model.w).all()
    assert stabilizer.mean == pytest.approx(1, abs=0.1)
    assert stats.gradient_scale == 1


@pytest.mark.parametrize("stop", [10, 25, 40])
def test_zclip_resumes_bit_for_bit(stop):
    norms = noisy_norms(60)
    model, stabilizer = one_vector()
    scales = []
    for step, size in enumerate(norms):
        if step == stop:
            weights, state = values(model), stabilizer.state_dict()
        with_norm(model, size, step)
        scales.append(stabilizer.step().gradient_scale)
    resumed, again = one_vector()
    resumed.w.data.copy_(weights[0])
    again.load_state_dict(state)
    for step in range(stop, 60):
        with_norm(resumed, norms[step], step)
        assert torch.equal(again.step().gradient_scale, scales[step])
    assert torch.equal(model.w, resumed.w)

"""The rivals that limit the update: each against its formula written out plainly."""

import math

import pytest
import torch
from support.perceptron import UPDATE, around, backward, grads, norm, small_model, values

from ebc_lab.components.stabilizers.rivals import KLClip, RMSClip, TrustRegion
from ebc_lab.ebc import EllipsotopeClip


@pytest.mark.thorough
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "hold_decay", "lr_squared"])
def test_the_trust_region_is_ebc_with_sensitivity_one(schedule, monkeypatch):
    monkeypatch.setattr("ebc_lab.ebc.sensitivity.probe_jvp", lambda *_: torch.tensor(1.0))
    model = small_model()
    other = small_model()
    strength = 0.05
    steps = 20
    options = {"schedule": schedule, "total_steps": steps, "audit_every": 0}
    region = TrustRegion(model, torch.optim.Adam(model.parameters(), lr=0.02), strength=strength, **options)
    ebc = EllipsotopeClip(
        other,
        torch.optim.Adam(other.parameters(), lr=0.02),
        target_kl=strength**2 / 4,
        budget="surrogate",
        grouping="global",
        **options,
    )
    clipped = []
    for step in range(steps):
        for optimizer in (region, ebc):
            optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        backward(model, step)
        stats = region.step()
        expected = ebc.step(backward(other, step)).clip_coefficient
        torch.testing.assert_close(stats.clip_coefficient, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(values(model), values(other), rtol=1e-6, atol=1e-7)
        clipped.append(bool(expected < 1))
    assert sum(clipped) > 3
    assert schedule != "constant" or sum(clipped) < 20  # both sides of the minimum were seen


def two_groups(model, weight_decay=0.0):
    groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters(), "lr": 0.05}]
    return torch.optim.SGD(groups, weight_decay=weight_decay)


@pytest.mark.parametrize(("strength", "clips"), [(1e-4, True), (1.0, False)])
def test_kl_clip_is_that_of_the_kfac_codes(strength, clips):
    model = small_model()
    stabilizer = KLClip(model, two_groups(model, weight_decay=0.3), strength=strength, audit_every=0)
    backward(model)
    old = values(model)
    gradients = grads(model)
    rates = [0.5, 0.5, 0.05, 0.05]
    directions = [g + 0.3 * w for g, w in zip(gradients, old, strict=True)]
    products = [float((v * g).sum()) for v, g in zip(directions, gradients, strict=True)]
    predicted = abs(sum(lr**2 * product for lr, product in zip(rates, products, strict=True)))
    c = min(1.0, math.sqrt(strength / predicted))
    assert (c < 1) == clips
    stats = stabilizer.step()
    assert float(stats.clip_coefficient) == pytest.approx(c, rel=1e-5)
    expected = [w - c * lr * v for w, v, lr in zip(old, directions, rates, strict=True)]
    torch.testing.assert_close(values(model), expected)


def test_rms_clip_limits_each_tensor_by_itself():
    model = small_model()
    stabilizer = RMSClip(model, two_groups(model), strength=0.06, audit_every=0)
    backward(model)
    old = values(model)
    gradients = grads(model)
    rates = [0.5, 0.5, 0.05, 0.05]
    factors = [
        1 / max(1.0, norm([g]) / math.sqrt(g.numel()) / 0.06) for g in gradients
    ]  # SGD's u is the gradient
    assert len({f for f in factors if f < 1}) > 1
    assert 1 in factors
    stats = stabilizer.step()
    updates = [-lr * g for g, lr in zip(gradients, rates, strict=True)]
    applied = [f * u for f, u in zip(factors, updates, strict=True)]
    torch.testing.assert_close(values(model), [w + u for w, u in zip(old, applied, strict=True)])
    assert float(stats.clip_coefficient) == pytest.approx(norm(applied) / norm(updates), rel=1e-5)
    for new, w, u, f in zip(values(model), old, updates, factors, strict=True):
        assert f < 1 or torch.equal(new, w + u)


class WithCopies(torch.optim.SGD):
    """SGD whose state holds a second point z, as Schedule-Free's does, which moves three times as far."""

    weight_copies = ("z",)

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            z = self.state[p].setdefault("z", p.detach().clone())
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"])
            z.sub_(p.grad, alpha=3 * self.param_groups[0]["lr"])


@pytest.mark.parametrize("name", UPDATE)
def test_copies_of_the_weights_are_scaled_alike(name):
    model = small_model()
    base = WithCopies(model.parameters(), lr=0.5)
    strength = {"trust_region": 0.05, "kl_clip": 1e-3, "rms_clip": 0.1}[name]
    stabilizer = around(name, model, base, strength=strength)
    for step in range(3):
        backward(model, step)
        weights = values(model)
        gradients = grads(model)
        copies = [
            base.state[p]["z"].clone() if step else w
            for p, w in zip(model.parameters(), weights, strict=True)
        ]
        stats = stabilizer.step()
        assert 0 < stats.clip_coefficient < 1
        for p, w, z, g in zip(model.parameters(), weights, copies, gradients, strict=True):
            c = norm([p - w]) / (0.5 * norm([g]))
            torch.testing.assert_close(base.state[p]["z"], z - 3 * c * 0.5 * g, rtol=1e-4, atol=1e-6)

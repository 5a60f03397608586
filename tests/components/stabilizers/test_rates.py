"""AdaGC and the rivals that set the rate, step by step against their papers."""

import math

import pytest
import torch
from support import rates_reference
from support.perceptron import backward_on, batch, same, small_model, values

from ebc_lab.components.stabilizers.adagc import AdaGC
from ebc_lab.components.stabilizers.rates import CDAT, AdaptiveWarmUp, GeN, peak_gap


def around(cls, model, peak, **options):
    base = torch.optim.Adam(model.parameters(), lr=peak)
    return cls(model, base, probe_sequences=6, audit_every=0, **options)


def drawn(step, dtype):
    """A batch whose labels can be learned in part; every twentieth is ten times as large."""
    x, y = batch(step)
    taught = (x @ torch.linspace(-1, 1, 20).view(5, 4).sin()).argmax(1)
    return (x * (10 if step % 20 == 19 else 1)).to(dtype), torch.where(y == 0, y, taught)


def take(model, stabilizer, step, dtype=torch.float64):
    x, y = drawn(step, dtype)
    model.zero_grad()
    backward_on(model, x, y)
    return stabilizer.step(x, model(x), targets=y)


REFERENCES = {  # name -> what is tested, its reference, and which c must have been seen
    "gen": (
        lambda model: around(GeN, model, 5.0),
        lambda model: rates_reference.GeN(model, 5.0),
        lambda c: min(c) < 0.12 and max(c) > 0.13,  # it began at 0.125
    ),
    "cdat": (
        lambda model: around(CDAT, model, 2.0, strength=0.5),
        lambda model: rates_reference.CDAT(model, 2.0, 0.5),
        lambda c: min(c) < 0.5,
    ),
    "adaptive_warmup": (
        lambda model: around(AdaptiveWarmUp, model, 0.3, strength=0.7),
        lambda model: rates_reference.AdaptiveWarmUp(model, 0.3, 0.7),
        lambda c: c[0] == pytest.approx(0.01) and c[-1] == 1 and len(set(c)) > 10,
    ),
    "adagc": (
        lambda model: around(AdaGC, model, 0.05),
        lambda model: rates_reference.AdaGC(model, 0.05, AdaGC.warm_up),
        lambda c: True,
    ),
}


@pytest.mark.parametrize("steps", [4, pytest.param(50, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("name", REFERENCES)
def test_steps_are_those_of_the_paper(name, steps, monkeypatch):
    monkeypatch.setattr(AdaGC, "warm_up", 10)
    exact = name == "adagc"  # of the others the order of operations differs
    dtype = torch.float32 if exact else torch.float64
    one, other = small_model().to(dtype), small_model().to(dtype)
    make, refer, varied = REFERENCES[name]
    made, reference = make(one), refer(other)
    shares = []
    for step in range(steps):
        stats = take(one, made, step, dtype)
        shares.append(reference.step(*drawn(step, dtype)))
        assert float(stats.clip_coefficient) == pytest.approx(shares[-1], rel=0 if exact else 1e-9)
        assert not exact or same(values(one), values(other)), step
        torch.testing.assert_close(values(one), values(other), rtol=1e-9, atol=1e-10)
    assert steps < 50 or varied(shares)


@pytest.mark.parametrize(("cls", "strength"), [(GeN, 1.0), (CDAT, 0.1)])
def test_the_rate_does_not_depend_on_the_schedule_that_multiplies_it(cls, strength):
    one, other = small_model().double(), small_model().double()
    full, half = (around(cls, model, 0.5, strength=strength) for model in (one, other))
    half.param_groups[0]["lr"] = 0.25
    start = values(one)
    c, same = (take(model, made, 0).clip_coefficient for model, made in ((one, full), (other, half)))
    assert 0 < c < 1
    assert float(same) == pytest.approx(float(c), rel=1e-9)
    moved = [(new - old) / 2 for new, old in zip(values(one), start, strict=True)]
    torch.testing.assert_close(values(other), [w + d for w, d in zip(start, moved, strict=True)])


@pytest.mark.parametrize("cls", [GeN, CDAT, AdaptiveWarmUp])
def test_without_targets_it_says_what_it_needs_and_touches_nothing(cls):
    model = small_model()
    made = around(cls, model, 0.5)
    x, y = drawn(0, torch.float32)
    backward_on(model, x, y)
    before = values(model)
    with pytest.raises(ValueError, match=r"give step\(tokens, logits, targets=...\)"):
        made.step(x, model(x))
    assert same(values(model), before)


def test_adagc_lets_a_tensor_move_whose_first_gradients_are_zero(monkeypatch):
    monkeypatch.setattr(AdaGC, "warm_up", 3)
    model = small_model()
    made = around(AdaGC, model, 0.1)
    for step in range(4):
        x, y = drawn(step, torch.float32)
        model.zero_grad()
        backward_on(model, x, y)
        if step == 0:
            model[0].weight.grad.zero_()
        made.step(x)
    assert model[0].weight.grad.norm() > 1e-3


def test_a_rate_is_halved_where_the_losses_around_are_not_finite():
    made = around(GeN, small_model(), 0.5)
    assert made._chosen(1.0, math.inf, 1.0) == made.rate / 2
    assert made._chosen(1.0, 1.5, 0.9) == made.rate  # uphill


def test_a_first_gap_of_two_hundredths_of_a_nat_needs_no_warm_up():
    assert peak_gap(0.02, 10.0, 100.0) == math.inf
    assert 0.01 <= peak_gap(0.021, 10.0, 100.0) <= 0.011

"""`curve_every`: the KL at many scales of the whole proposal, next to a step that nothing of it changes."""

import math

import pytest
import torch
from support.stepping import go, same, snapshot

from ebc_lab.ebc import EllipsotopeClip, StabilizedOptimizer, mean_kl
from ebc_lab.ebc.options import BUDGETS, CURVE_SCALES

LR = 0.02
EVERY = 4


def wrapped(model, budget, base=None, **options):
    base = base or torch.optim.Adam(model.parameters(), lr=LR)
    options = {"audit_every": 3, "audit_tokens": 48, "curve_every": EVERY, **options}
    if budget is None:
        return StabilizedOptimizer(model, base, **options)
    return EllipsotopeClip(model, base, target_kl=0.002, budget=budget, **options)


@pytest.mark.thorough
@pytest.mark.parametrize("grouping", ["block", "matrices"])
@pytest.mark.parametrize("budget", [None, *BUDGETS])
def test_it_is_measured_now_and_then_and_changes_nothing(make_gpt, batches, backward, budget, grouping):
    options = {} if budget is None else {"grouping": grouping}
    found = {}
    for every in (0, EVERY):
        model = make_gpt()
        optimizer = wrapped(model, budget, curve_every=every, **options)
        found[every] = ([go(model, optimizer, batch, backward) for batch in batches(10)], snapshot(model))
    plain, measured = (steps for steps, _ in found.values())
    assert same(found[0][1], found[EVERY][1])
    assert [t for t, s in enumerate(measured) if s.kl_curve is not None] == [4, 8]
    assert all(s.kl_curve is None for s in plain)
    for got, want in zip(measured, plain, strict=True):
        for key in ("clip_coefficient", "applied_kl", "measurements", "audit_tokens", "slope"):
            assert getattr(got, key) == getattr(want, key)


@pytest.mark.parametrize("options", [{"budget": None}, {"budget": "shadow"}, {"budget": "shadow", "m": True}])
def test_it_is_that_of_the_whole_proposal_on_the_rows_of_an_audit(make_gpt, batches, backward, options):
    model = make_gpt(dtype=torch.float64)
    own = {"grouping": "matrices"} if "m" in options else {}
    optimizer = wrapped(model, options["budget"], torch.optim.SGD(model.parameters(), lr=0.5), **own)
    for batch in batches(5):
        logits = backward(model, batch)
        before = snapshot(model)
        proposal = {n: -0.5 * p.grad for n, p in model.named_parameters()}
        stats = optimizer.step(batch[:, :-1], logits)
    curve = stats.kl_curve
    assert (curve.shape, curve.dtype) == ((len(CURVE_SCALES),), torch.float64)
    rows = batch[2:5, :-1]  # 48 tokens beside two probe rows
    with torch.no_grad():
        model.load_state_dict(before)
        z = model(rows)
        for c, kl in zip(CURVE_SCALES, curve.tolist(), strict=True):
            model.load_state_dict({n: w + c * proposal[n] for n, w in before.items()})
            assert kl == pytest.approx(mean_kl(z, model(rows)).item(), rel=1e-6)


def test_a_skipped_step_has_none_and_what_is_not_finite_is_nan(make_gpt, batches, backward):
    model = make_gpt()
    broken = [False]
    forward = lambda m, x: m(x) * (math.nan if broken[0] else 1)  # noqa: E731
    optimizer = wrapped(model, "shadow", forward=forward)
    data = batches(9)
    for t, batch in enumerate(data):
        logits = backward(model, batch)
        if t == 4:
            model.head.weight.grad[0, 0] = torch.nan
        broken[0] = t == 8
        stats = optimizer.step(batch[:, :-1], logits)
        assert bool(stats.skipped) == (t in (4, 8))
        assert stats.kl_curve is None

    model = make_gpt()
    optimizer = wrapped(model, None, forward=forward)
    for t, batch in enumerate(data[:5]):
        broken[0] = t == 4
        stats = go(model, optimizer, batch, backward)
    assert not stats.skipped
    assert stats.kl_curve.isnan().all()


def test_such_a_step_is_of_no_kind(make_gpt):
    for budget in (None, "shadow"):
        refined = {"refine_steps": 20} if budget else {}
        optimizer = wrapped(make_gpt(), budget, audit_every=0, **refined)
        assert [t for t in range(21, 33) if optimizer.kind(t) is None] == [24, 28, 32]
    assert wrapped(make_gpt(), None, audit_every=0).kind(0) == ()
    with pytest.raises(ValueError, match="curve_every must be at least 0, not -1"):
        wrapped(make_gpt(), None, curve_every=-1)

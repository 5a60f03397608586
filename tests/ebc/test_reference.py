"""The fast path against the slow plain transcription, step by step, on a real GPT in float64."""

import pytest
import torch

from ebc_lab.ebc import EllipsotopeClip, group_parameters
from ebc_lab.ebc.reference import ReferenceClip

STEPS = 44  # past the 20 steps that may measure three times, and the sweeps at 0, 10, 20
LR = 2e-2
SHADOW_REL = 1e-11  # the same arithmetic in another order
SURROGATE_REL = 1e-6  # the reference's central difference is good to about 1e-8 a step
SHADOW = [
    {"controller": controller, "schedule": schedule, "target_kl": 0.012}
    for controller in ("fixed", "pi", "log_pi")
    for schedule in ("constant", "linear")
]
SURROGATE = [
    {"aggregate": "l1", "controller": "fixed", "schedule": "constant", "target_kl": 0.05},
    {"aggregate": "l1", "controller": "log_pi", "schedule": "linear", "target_kl": 0.01},
    {"aggregate": "l1", "controller": "pi", "schedule": "constant", "target_kl": 0.05},
    {"aggregate": "sqrtl_l2", "controller": "log_pi", "schedule": "constant", "target_kl": 0.01},
    {"aggregate": "sqrtl_l2", "controller": "fixed", "schedule": "linear", "target_kl": 0.3},
    {"aggregate": "l2", "controller": "fixed", "schedule": "constant", "target_kl": 0.02},
    {"aggregate": "l2", "controller": "pi", "schedule": "linear", "target_kl": 0.02},
    {"aggregate": "l1", "controller": "fixed", "schedule": "constant", "target_kl": 0.05, "cadence": "published"},
]


def name(case):
    return "-".join(str(v) for k, v in case.items() if k != "target_kl")


def run_both(make_gpt, batches, backward, options, broken=()):
    """-> the steps of the fast path, those of the reference, and both models; at `broken` steps one gradient is NaN."""
    fast_model, slow_model = make_gpt(dtype=torch.float64), make_gpt(dtype=torch.float64)
    options = {"total_steps": STEPS, "audit_every": 4, "floor": 1e-7, **options}
    fast = EllipsotopeClip(fast_model, torch.optim.Adam(fast_model.parameters(), lr=LR), **options)
    groups = list(group_parameters([n for n, _ in slow_model.named_parameters()]).values())
    slow = ReferenceClip(slow_model, [torch.optim.Adam(slow_model.parameters(), lr=LR)], groups, **options)
    fast_steps, slow_steps = [], []
    for t, batch in enumerate(batches(STEPS)):
        logits = backward(fast_model, batch)
        backward(slow_model, batch)
        if t in broken:
            for model in (fast_model, slow_model):
                model.head.weight.grad[0, 0] = torch.nan
        fast_steps.append(fast.step(batch[:, :-1], logits))
        slow_steps.append(slow.step(batch[:, :-1]))
    return fast_steps, slow_steps, fast_model, slow_model


def compare(fast_steps, slow_steps, fast_model, slow_model, rel):
    for got, want in zip(fast_steps, slow_steps, strict=True):
        assert bool(got.skipped) == want.skipped
        assert got.clip_coefficient.item() == pytest.approx(want.c, rel=rel)
        assert got.delta.item() == pytest.approx(want.delta, rel=rel)
        assert (got.applied_kl is None) == (want.applied_kl is None)
        if want.applied_kl is not None:
            assert got.applied_kl.item() == pytest.approx(want.applied_kl, rel=rel)
            assert got.movement.item() == pytest.approx(want.T, rel=rel)
    for got, want in zip(fast_model.parameters(), slow_model.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=rel, atol=rel)


def clipped_steps(steps):
    return sum(step.c < 0.999 for step in steps)


@pytest.mark.parametrize("case", SHADOW, ids=name)
def test_shadow(make_gpt, batches, backward, case):
    fast_steps, slow_steps, *models = run_both(make_gpt, batches, backward, {"budget": "shadow", **case})
    compare(fast_steps, slow_steps, *models, rel=SHADOW_REL)
    assert clipped_steps(slow_steps) > STEPS // 2  # else the comparison would mean little
    for got, want in zip(fast_steps, slow_steps, strict=True):
        trial, kl = want.trace[-1]
        assert got.measurements == len(want.trace)
        assert got.trial.item() == pytest.approx(trial, rel=SHADOW_REL)
        assert got.trial_kl.item() == pytest.approx(kl, rel=SHADOW_REL)
    assert max(step.measurements for step in fast_steps) > 1
    assert {step.measurements for step in fast_steps[20:]} == {1}


@pytest.mark.parametrize("case", SURROGATE, ids=name)
def test_surrogate(make_gpt, batches, backward, case):
    fast_steps, slow_steps, *models = run_both(make_gpt, batches, backward, {"budget": "surrogate", **case})
    compare(fast_steps, slow_steps, *models, rel=SURROGATE_REL)
    assert clipped_steps(slow_steps) > STEPS // 2
    for got, want in zip(fast_steps, slow_steps, strict=True):
        assert got.surrogate.item() == pytest.approx(want.S, rel=SURROGATE_REL)
        assert got.contributions.tolist() == pytest.approx(want.s, rel=SURROGATE_REL)
        if want.T is not None:
            assert got.tightness.item() == pytest.approx(want.T / (want.c * want.S), rel=SURROGATE_REL)


@pytest.mark.parametrize("budget", ["shadow", "surrogate"])
def test_steps_with_a_bad_gradient(make_gpt, batches, backward, budget):
    options = {"budget": budget, "controller": "log_pi", "schedule": "linear", "target_kl": 0.01}
    fast_steps, slow_steps, *models = run_both(make_gpt, batches, backward, options, broken=(0, 1, 8, 30))
    compare(fast_steps, slow_steps, *models, rel=SHADOW_REL if budget == "shadow" else SURROGATE_REL)
    assert [t for t, step in enumerate(fast_steps) if step.skipped] == [0, 1, 8, 30]


@pytest.mark.parametrize("budget", ["shadow", "surrogate"])
def test_a_budget_that_binds_now_and_then(make_gpt, batches, backward, budget):
    options = {"budget": budget, "controller": "log_pi", "target_kl": 0.03 if budget == "shadow" else 0.1}
    fast_steps, slow_steps, *models = run_both(make_gpt, batches, backward, options)
    compare(fast_steps, slow_steps, *models, rel=SHADOW_REL if budget == "shadow" else SURROGATE_REL)
    audited = [step for step in slow_steps if step.T is not None]
    assert 0 < clipped_steps(audited) < len(audited)

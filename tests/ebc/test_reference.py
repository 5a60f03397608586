"""The fast path against the slow plain transcription, step by step, on a real GPT in float64.

Tolerances: `shadow` is the same arithmetic in another order. The other budgets meet the reference's central differences, good
to about 1e-9. `energy` meets a slope that the fast path sums up in float32.
"""

import math

import pytest
import torch

from ebc_lab.ebc import EllipsotopeClip, group_parameters
from ebc_lab.ebc.reference import ReferenceClip
from ebc_lab.workloads.gpt import hidden_matrices

STEPS = 44  # past the 20 steps that may measure three times, the sweeps at 0, 10 and 20, and the turn at 40
LR = 2e-2
EXACT = 1e-11
DIFFERENCES = 2e-8
SLOPES = 3e-6
SHADOW = {
    "fixed": {},
    "fixed-linear": {"schedule": "linear"},
    "pi-linear": {"controller": "pi", "schedule": "linear"},
    "log_pi-cosine": {"controller": "log_pi", "schedule": "cosine"},
    "rsl-lr_squared": {"controller": "rsl", "schedule": "lr_squared", "target_kl": 0.02},
    "energy": {"controller": "energy", "gain": 0.05},
    "matrices-log_pi": {"grouping": "matrices", "controller": "log_pi", "target_kl": 0.005},
    "held-rsl": {"held": True, "controller": "rsl"},
    "retracted": {"retracted": True, "target_kl": 0.004},
    "retracted-matrices-held": {"retracted": True, "grouping": "matrices", "held": True, "target_kl": 0.0002},
}
JUDGED = {  # one derivative at the audits
    "agreement": {"controller": "agreement", "target_kl": 0.002},
    "agreement-matrices-held": {
        "controller": "agreement",
        "grouping": "matrices",
        "held": True,
        "target_kl": 0.001,
    },
}
SURROGATE = {
    "l1": {"target_kl": 0.05},
    "l1-pi-published": {"controller": "pi", "cadence": "published", "target_kl": 0.02},
    "l1-log_pi-linear-dense": {"controller": "log_pi", "schedule": "linear", "cadence": "dense"},
    "l1-energy": {"controller": "energy", "gain": 0.2},
    "l1-lr_squared-global": {"schedule": "lr_squared", "grouping": "global", "target_kl": 0.1},
    "l1-per_lr-log_pi": {"units": "per_lr", "controller": "log_pi"},
    "l1-agreement-retracted": {"controller": "agreement", "retracted": True, "target_kl": 0.005},
    "sqrtl_l2-rsl-shrink-sweep": {
        "aggregate": "sqrtl_l2", "controller": "rsl", "guard": "shrink", "cadence": "sweep", "target_kl": 0.02,
    },
    "sqrtl_l2-linear-type": {"aggregate": "sqrtl_l2", "schedule": "linear", "grouping": "type", "target_kl": 0.3},
    "l2-log_pi-matrices": {"aggregate": "l2", "controller": "log_pi", "grouping": "matrices", "target_kl": 0.001},
    "matrices-shrink": {
        "aggregate": "l2", "guard": "shrink", "grouping": "matrices", "cadence": "published", "target_kl": 0.02,
    },
    "l2-shrink": {"aggregate": "l2", "guard": "shrink", "grouping": "tensor", "target_kl": 0.02},
    "l2-shrink_inflate-log_pi": {"aggregate": "l2", "guard": "shrink_inflate", "controller": "log_pi"},
}  # fmt: skip
PREDICTED = {
    "fisher": {"budget": "fisher"},
    "fisher-matrices-log_pi": {
        "budget": "fisher",
        "grouping": "matrices",
        "controller": "log_pi",
        "target_kl": 0.005,
    },
    "fisher-energy-cosine": {"budget": "fisher", "controller": "energy", "gain": 0.05, "schedule": "cosine"},
    "fisher-agreement-held": {
        "budget": "fisher",
        "controller": "agreement",
        "held": True,
        "target_kl": 0.002,
    },
    "fisher-retracted": {"budget": "fisher", "retracted": True},
    "calibrated-type-linear": {"budget": "calibrated", "grouping": "type", "schedule": "linear"},
    "calibrated-l2-dense-rsl": {
        "budget": "calibrated",
        "aggregate": "l2",
        "cadence": "dense",
        "controller": "rsl",
    },
    "calibrated-sweep-agreement": {
        "budget": "calibrated",
        "cadence": "sweep",
        "controller": "agreement",
        "target_kl": 0.001,
    },
    "calibrated-matrices-held": {
        "budget": "calibrated",
        "grouping": "matrices",
        "held": True,
        "target_kl": 0.004,
    },
}


def cases(table):
    return pytest.mark.parametrize("options", table.values(), ids=table)


def polar(sizes):
    """The exact retraction, by an SVD: each hidden matrix to its polar factor, all singular values `sizes`."""

    def retract(model):
        for w, size in zip(hidden_matrices(model), sizes, strict=True):
            u, _, vh = torch.linalg.svd(w, full_matrices=False)
            w.copy_(size * u @ vh)

    return retract


def run_both(make_gpt, batches, backward, options, broken=()):
    """-> the steps of the fast path, those of the reference, and both models; at `broken` steps one gradient is NaN."""
    fast_model, slow_model = make_gpt(dtype=torch.float64), make_gpt(dtype=torch.float64)
    options = {
        "target_kl": 0.012,
        "total_steps": STEPS,
        "audit_every": 4,
        "floor": 1e-7,
        "audit_tokens": 48,
        **options,
    }
    grouping, held, retracted = (
        options.pop("grouping", "block"),
        options.pop("held", False),
        options.pop("retracted", False),
    )
    gain = options.pop("gain", math.nan)
    if retracted:
        sizes = [(w.norm() / math.sqrt(min(w.shape))).item() for w in hidden_matrices(slow_model)]
        with torch.no_grad():
            for model in (fast_model, slow_model):
                polar(sizes)(model)
    fast = EllipsotopeClip(
        fast_model,
        torch.optim.Adam(fast_model.parameters(), lr=LR),
        grouping=grouping,
        gains={"a": gain} if options.get("controller") == "energy" else None,
        retract=(lambda: polar(sizes)(fast_model)) if retracted else None,
        **options,
    )
    groups = list(group_parameters([n for n, _ in slow_model.named_parameters()], grouping).values())
    adam = torch.optim.Adam(slow_model.parameters(), lr=LR)
    slow = ReferenceClip(
        slow_model, [adam], groups, gain=gain, retract=polar(sizes) if retracted else None, **options
    )
    fast_steps, slow_steps = [], []
    for t, (batch, other) in enumerate(zip(batches(STEPS), batches(STEPS, seed=1), strict=True)):
        for group in (*fast.param_groups, *adam.param_groups):
            group["lr"] = LR * (1 - 0.6 * t / STEPS)
        logits = backward(fast_model, batch)
        backward(slow_model, batch)
        if t in broken:
            for model in (fast_model, slow_model):
                model.head.weight.grad[0, 0] = torch.nan
        tokens, targets = batch[:, :-1], batch[:, 1:]
        probe = (other[:, :-1], other[:, 1:]) if held else None
        fast_steps.append(fast.step(tokens, logits, targets=targets, probe=probe))
        slow_steps.append(slow.step(tokens, targets, probe))
    return fast_steps, slow_steps, fast_model, slow_model


def compare(fast_steps, slow_steps, fast_model, slow_model, rel):
    def close(got, want):
        assert (got is None) == (want is None)
        if want is not None:
            assert got.item() == pytest.approx(want, rel=rel)

    for got, want in zip(fast_steps, slow_steps, strict=True):
        assert bool(got.skipped) == want.skipped
        assert got.target_kl == pytest.approx(want.target, rel=1e-13)
        close(got.clip_coefficient, want.c)
        close(got.delta, want.delta)
        close(got.applied_kl, want.applied_kl)
        close(got.movement, want.T)
        close(got.surrogate, want.S)
        close(got.predicted_kl, want.q)
        if want.slope is not None:
            assert got.slope.item() == pytest.approx(want.slope, rel=max(rel, SLOPES))
        if want.r is not None:
            close(got.agreement, want.r)
        if want.s is not None:
            assert got.contributions.tolist() == pytest.approx(want.s, rel=rel)
        if got.guard is not None:
            close(got.guard, want.guard)
        if want.tightness is not None:
            close(got.tightness, want.tightness)
    for got, want in zip(fast_model.parameters(), slow_model.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=rel, atol=rel)


def tolerance(options, rel):
    return SLOPES if options.get("controller") == "energy" else rel


def clipped_steps(steps):
    return sum(step.c < 0.999 for step in steps)


@cases(SHADOW | JUDGED)
def test_shadow(make_gpt, batches, backward, options):
    rel = tolerance(options, DIFFERENCES if options in JUDGED.values() else EXACT)
    fast_steps, slow_steps, *models = run_both(make_gpt, batches, backward, options)
    compare(fast_steps, slow_steps, *models, rel=rel)
    assert clipped_steps(slow_steps) > STEPS // 2  # else the comparison would mean little
    for got, want in zip(fast_steps, slow_steps, strict=True):
        trial, kl = want.trace[-1]
        assert got.measurements == len(want.trace)
        assert got.trial.item() == pytest.approx(trial, rel=rel)
        assert got.trial_kl.item() == pytest.approx(kl, rel=rel)
    assert max(step.measurements for step in fast_steps) > 1
    assert {step.measurements for step in fast_steps[20:]} == {1}


@cases(SURROGATE | PREDICTED)
def test_predicted(make_gpt, batches, backward, options):
    options = {"budget": "surrogate", **options}
    fast_steps, slow_steps, *models = run_both(make_gpt, batches, backward, options)
    compare(fast_steps, slow_steps, *models, rel=tolerance(options, DIFFERENCES))
    assert clipped_steps(slow_steps) > STEPS // 2
    if options["budget"] == "surrogate":
        assert {step.guard < 1 for step in slow_steps} == ({True, False} if "guard" in options else {False})
    if options["budget"] == "calibrated":
        assert 1 < sum(step.q is not None for step in slow_steps) < STEPS


@pytest.mark.parametrize("budget", ["shadow", "surrogate", "fisher", "calibrated"])
def test_steps_with_a_bad_gradient(make_gpt, batches, backward, budget):
    options = {"budget": budget, "controller": "log_pi", "schedule": "linear", "target_kl": 0.01}
    fast_steps, slow_steps, *models = run_both(make_gpt, batches, backward, options, broken=(0, 1, 8, 30))
    compare(fast_steps, slow_steps, *models, rel=EXACT if budget == "shadow" else DIFFERENCES)
    assert [t for t, step in enumerate(fast_steps) if step.skipped] == [0, 1, 8, 30]


@pytest.mark.parametrize(
    ("budget", "target_kl"), [("shadow", 0.03), ("surrogate", 0.1), ("fisher", 0.02), ("calibrated", 0.03)]
)
def test_a_budget_that_binds_now_and_then(make_gpt, batches, backward, budget, target_kl):
    options = {"budget": budget, "controller": "log_pi", "target_kl": target_kl}
    fast_steps, slow_steps, *models = run_both(make_gpt, batches, backward, options)
    compare(fast_steps, slow_steps, *models, rel=EXACT if budget == "shadow" else DIFFERENCES)
    audited = [step for step in slow_steps if step.T is not None]
    assert 0 < clipped_steps(audited) < len(audited)

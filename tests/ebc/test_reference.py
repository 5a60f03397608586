"""The fast path against the slow plain transcription, step by step, on a real GPT in float64."""

import pytest
from support.against_reference import (
    DIFFERENCES,
    EXACT,
    STEPS,
    clipped_steps,
    compare,
    run_both,
)

from ebc_lab.ebc.options import MEASURED

SHADOW = {
    "fixed": {},
    "fixed-linear": {"schedule": "linear"},
    "log_pi-hold_decay": {"controller": "log_pi", "schedule": "hold_decay"},
    "energy-cosine": {"controller": "energy", "gain": 0.05, "schedule": "cosine"},
    "confidence-hold_decay": {"controller": "confidence", "schedule": "hold_decay"},
    "held-rsl-lr_squared": {"held": True, "controller": "rsl", "schedule": "lr_squared"},
    "retracted": {"retracted": True, "target_kl": 0.004},
    "matrices-log_pi": {"grouping": "matrices", "controller": "log_pi", "target_kl": 0.005},
}
QUANTIZED = {
    "auto": {"exponent": "auto", "quantized": True},
    "auto-float": {"exponent": "auto"},
    "auto-high-floor": {"exponent": "auto", "quantized": True, "target_kl": 0.002, "floor": 1e-4},
    "square": {"quantized": True},
}  # fmt: skip
TRACKED = {
    "fixed": {},
    "log_pi-every-2nd": {"controller": "log_pi", "measure_every": 2},
    "when-needed": {"measure": "when_needed", "measure_above": 0.5},
    "energy": {"controller": "energy", "gain": 0.05},
    "matrices": {"grouping": "matrices", "target_kl": 0.005},
    "held-rsl": {"held": True, "controller": "rsl"},
    "retracted": {"retracted": True, "target_kl": 0.004},
    "now-and-then": {"target_kl": 0.03},
    "high-floor": {"target_kl": 0.002, "floor": 2e-4},
}
DOUBLE = {  # a radius beside the KL
    "shadow": {"radius": 0.2},
    "tracked-when-needed": {"budget": "tracked", "measure": "when_needed", "radius": 0.22},
    "tracked-relative": {
        "budget": "tracked", "measure": "when_needed", "radius": 0.03, "radius_unit": "initial",
        "schedule": "hold_decay", "controller": "confidence",
    },
    "confidence-steers": {
        "radius": 0.02, "radius_unit": "initial", "ramp": 20, "controller": "confidence", "steers": "radius",
        "target_kl": 0.02,
    },
    "tracked-matrices": {
        "budget": "tracked", "grouping": "matrices", "radius": 0.115, "radius_unit": "initial",
        "target_kl": 0.005,
    },
    "fisher": {"budget": "fisher", "radius": 0.2},
}  # fmt: skip
JUDGED = {  # one derivative at the audits
    "agreement": {"controller": "agreement", "target_kl": 0.002},
    "agreement-matrices-held": {
        "controller": "agreement", "grouping": "matrices", "held": True, "target_kl": 0.001,
    },
}  # fmt: skip
SURROGATE = {
    "l1": {"target_kl": 0.05},
    "l1-log_pi-linear-dense": {"controller": "log_pi", "schedule": "linear", "cadence": "dense"},
    "l1-energy": {"controller": "energy", "gain": 0.2},
    "l1-lr_squared-global": {"schedule": "lr_squared", "grouping": "global", "target_kl": 0.1},
    "sqrtl_l2-rsl-sweep": {
        "aggregate": "sqrtl_l2", "controller": "rsl", "cadence": "sweep", "target_kl": 0.02,
    },
    "sqrtl_l2-linear-type": {
        "aggregate": "sqrtl_l2", "schedule": "linear", "grouping": "type", "target_kl": 0.3,
    },
    "l2-tensor": {"aggregate": "l2", "grouping": "tensor", "target_kl": 0.02},
    "l2-log_pi-matrices": {
        "aggregate": "l2", "controller": "log_pi", "grouping": "matrices", "target_kl": 0.001,
    },
}  # fmt: skip
PREDICTED = {
    "fisher": {"budget": "fisher"},
    "fisher-matrices-log_pi": {
        "budget": "fisher", "grouping": "matrices", "controller": "log_pi", "target_kl": 0.005,
    },
    "fisher-agreement-held": {
        "budget": "fisher", "controller": "agreement", "held": True, "target_kl": 0.002,
    },
    "fisher-retracted": {"budget": "fisher", "retracted": True},
    "calibrated-l2-dense-rsl": {
        "budget": "calibrated", "aggregate": "l2", "cadence": "dense", "controller": "rsl",
    },
    "calibrated-matrices-held": {
        "budget": "calibrated", "grouping": "matrices", "held": True, "target_kl": 0.004,
    },
    "calibrated-type-linear": {"budget": "calibrated", "grouping": "type", "schedule": "linear"},
}  # fmt: skip


def cases(table):
    return pytest.mark.parametrize("options", table.values(), ids=table)


@cases(SHADOW | JUDGED | QUANTIZED)
def test_shadow(make_gpt, batches, backward, options):
    rel = DIFFERENCES if options in JUDGED.values() else EXACT
    fast_steps, slow_steps, *models = run_both(make_gpt, batches, backward, options)
    compare(fast_steps, slow_steps, *models, rel=rel)
    assert clipped_steps(slow_steps) > STEPS // 2  # else the comparison would mean little
    for got, want in zip(fast_steps, slow_steps, strict=True):
        trial, kl = want.trace[-1]
        assert got.measurements == len(want.trace)
        assert got.trial.item() == pytest.approx(trial, rel=rel)
        assert got.trial_kl.item() == pytest.approx(kl, rel=rel)
        assert (got.exponent is None) == ("exponent" not in options)
        if got.exponent is not None:
            assert got.exponent.item() == pytest.approx(want.p, rel=rel)
    if "quantized" in options and "exponent" in options:
        assert len({step.p for step in slow_steps}) > 3
    assert max(step.measurements for step in fast_steps) > 1
    refined = options.get("refine_steps", STEPS)
    assert all(step.measurements == 1 for step in fast_steps[refined:])


@cases(TRACKED)
def test_tracked(make_gpt, batches, backward, options):
    rel = EXACT
    options = {"budget": "tracked", **options}
    fast_steps, slow_steps, *models = run_both(make_gpt, batches, backward, options)
    compare(fast_steps, slow_steps, *models, rel=rel)
    assert clipped_steps(slow_steps) > 0
    for got, want in zip(fast_steps, slow_steps, strict=True):
        assert got.measurements == len(want.trace)
        assert got.tracked_scale.item() == pytest.approx(want.P, rel=rel)
        assert number(got.tracked_log_ratio) == pytest.approx(want.x, abs=10 * rel)
        assert number(got.tracked_variance) == pytest.approx(want.v, rel=rel)
        assert got.tracked_flicker.item() == pytest.approx(want.w, rel=10 * rel, abs=rel)
        assert number(got.innovation) == pytest.approx(want.innovation, abs=10 * rel)
    assert max(step.measurements for step in fast_steps) > 1
    every = options.get("measure_every", 1)
    measured = [t for t, step in enumerate(slow_steps) if step.trace]
    if "measure" in options:
        assert 22 < len(measured) < STEPS - 6  # sure enough at some, not at others
    else:
        assert len(measured) == pytest.approx(20 + (STEPS - 20) / every, abs=1)
    assert sum(step.innovation is not None for step in slow_steps) > len(measured) // 2


@cases(DOUBLE)
def test_double(make_gpt, batches, backward, options):
    rel = DIFFERENCES if "fisher" in options.values() else EXACT
    fast_steps, slow_steps, *models = run_both(make_gpt, batches, backward, options)
    compare(fast_steps, slow_steps, *models, rel=rel)
    ruled = [step.ruled for step in slow_steps]
    assert {"kl", "radius"} <= set(ruled)
    for got, want in zip(fast_steps, slow_steps, strict=True):
        assert got.update_norm * got.clip_coefficient <= got.radius_limit * (1 + 1e-12)
        assert got.ceiling.item() == pytest.approx(want.most, rel=rel)
    if "measure" in options:  # past the first steps, where the radius rules by far, no KL is measured
        assert sum(not step.trace for step in slow_steps) > 5


def number(value):
    """A figure that was measured, else None."""
    return None if value is None or value.isnan() else value.item()


@cases(SURROGATE | PREDICTED)
def test_predicted(make_gpt, batches, backward, options):
    options = {"budget": "surrogate", **options}
    fast_steps, slow_steps, *models = run_both(make_gpt, batches, backward, options)
    compare(fast_steps, slow_steps, *models, rel=DIFFERENCES)
    assert clipped_steps(slow_steps) > STEPS // 2
    if options["budget"] == "calibrated":
        assert 1 < sum(step.q is not None for step in slow_steps) < STEPS


@pytest.mark.parametrize("budget", ["shadow", "tracked", "surrogate", "fisher", "calibrated"])
def test_steps_with_a_bad_gradient(make_gpt, batches, backward, budget):
    options = {"budget": budget, "controller": "log_pi", "schedule": "linear", "target_kl": 0.01}
    fast_steps, slow_steps, *models = run_both(make_gpt, batches, backward, options, broken=(0, 1, 8, 30))
    compare(fast_steps, slow_steps, *models, rel=EXACT if budget in MEASURED else DIFFERENCES)
    assert [t for t, step in enumerate(fast_steps) if step.skipped] == [0, 1, 8, 30]


@pytest.mark.parametrize(
    ("budget", "target_kl"), [("shadow", 0.03), ("surrogate", 0.1), ("fisher", 0.02), ("calibrated", 0.03)]
)
def test_a_budget_that_binds_now_and_then(make_gpt, batches, backward, budget, target_kl):
    options = {"budget": budget, "controller": "log_pi", "target_kl": target_kl}
    fast_steps, slow_steps, *models = run_both(make_gpt, batches, backward, options)
    compare(fast_steps, slow_steps, *models, rel=EXACT if budget in MEASURED else DIFFERENCES)
    audited = [step for step in slow_steps if step.T is not None]
    assert 0 < clipped_steps(audited) < len(audited)

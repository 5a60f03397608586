"""A run of the fast path and the same run of the slow plain transcription, and how near they must be.

Tolerances: `shadow` is the same arithmetic in another order. The other budgets meet the reference's central
differences, good to about 1e-9; slopes, of which much cancels, are summed up in float64.
"""

import math

import pytest
import torch
from support.ebc_reference import ReferenceClip
from support.quantized import Ternary

from ebc_lab.ebc import EllipsotopeClip, group_parameters
from ebc_lab.ebc.options import RULED
from ebc_lab.workloads.gpt import hidden_matrices

STEPS = 44  # past the 20 steps that measure in any case, the sweeps at 0, 10 and 20, and the turn at 40
LR = 2e-2
EXACT = 1e-11
DIFFERENCES = 2e-8
SLOPES = 1e-10


def polar(sizes):
    """The exact retraction, by an SVD: each hidden matrix to its polar factor times its size."""

    def retract(model):
        for w, size in zip(hidden_matrices(model), sizes, strict=True):
            u, _, vh = torch.linalg.svd(w, full_matrices=False)
            w.copy_(size * u @ vh)

    return retract


def run_both(make_gpt, batches, backward, options, broken=(), classes=(EllipsotopeClip, ReferenceClip)):
    """-> the steps of both, and both models; at `broken` steps one gradient is NaN."""
    fast_model = make_gpt(dtype=torch.float64)
    slow_model = make_gpt(dtype=torch.float64)
    defaults = {
        "target_kl": 0.012,
        "total_steps": STEPS,
        "audit_every": 4,
        "floor": 1e-7,
        "audit_tokens": 48,
    }
    options = defaults | options
    grouping = options.pop("grouping", "block")
    held = options.pop("held", False)
    if options.pop("quantized", False):
        for matrix in (m for model in (fast_model, slow_model) for m in model.modules()):
            if hasattr(matrix, "quantize"):
                matrix.quantize = Ternary.apply
    gain = options.pop("gain", math.nan)
    retract = None
    if options.pop("retracted", False):
        retract = polar([(w.norm() / math.sqrt(min(w.shape))).item() for w in hidden_matrices(slow_model)])
        with torch.no_grad():
            retract(fast_model)
            retract(slow_model)
    fast = classes[0](
        fast_model,
        torch.optim.Adam(fast_model.parameters(), lr=LR),
        grouping=grouping,
        gains={"a": gain} if options.get("controller") == "energy" else None,
        retract=retract and (lambda: retract(fast_model)),
        **options,
    )
    groups = list(group_parameters([n for n, _ in slow_model.named_parameters()], grouping).values())
    adam = torch.optim.Adam(slow_model.parameters(), lr=LR)
    slow = classes[1](slow_model, [adam], groups, gain=gain, retract=retract, **options)
    fast_steps = []
    slow_steps = []
    for t, (batch, other) in enumerate(zip(batches(STEPS), batches(STEPS, seed=1), strict=True)):
        for group in (*fast.param_groups, *adam.param_groups):
            group["lr"] = LR * (1 - 0.6 * t / STEPS)
        logits = backward(fast_model, batch)
        backward(slow_model, batch)
        if t in broken:
            for model in (fast_model, slow_model):
                model.head.weight.grad[0, 0] = torch.nan
        tokens = batch[:, :-1]
        targets = batch[:, 1:]
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
        if want.ruled and not want.skipped:
            assert RULED[int(got.ruled)] == want.ruled
            assert (got.measurements > 0) == bool(want.trace)
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


def clipped_steps(steps):
    return sum(step.c < 0.999 for step in steps)

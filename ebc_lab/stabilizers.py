"""Everything that may act between backward and the applied update, on one contract.

A stabilizer is a torch optimizer around the base optimizers whose `step(tokens, logits)` returns `StepStats`. `none` is the
method's own wrapper with an infinite budget: bit-equal to the plain optimizer, with the same audits and the same rules for
failing steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import nn
from torch.optim import Optimizer

from .config import RunConfig
from .ebc import EllipsotopeClip

Projection = Callable[[], None] | None


def none(model: nn.Module, bases: Sequence[Optimizer], projection: Projection, run: RunConfig) -> EllipsotopeClip:
    return EllipsotopeClip(
        model,
        bases,
        target_kl=math.inf,
        probe_sequences=run.budget.probe_sequences,
        audit_every=run.audit_every,
        audit_tokens=run.audit_tokens,
        project=projection,
    )


def ebc(model: nn.Module, bases: Sequence[Optimizer], projection: Projection, run: RunConfig) -> EllipsotopeClip:
    b, c = run.budget, run.controller
    return EllipsotopeClip(
        model,
        bases,
        target_kl=b.target_kl,
        budget=b.name,
        aggregate=b.aggregate,
        grouping=b.grouping,
        controller=c.name,
        gains={k: v for k, v in (("kp", c.kp), ("ki", c.ki)) if v is not None},
        schedule=b.schedule,
        total_steps=run.steps,
        probe_sequences=b.probe_sequences,
        probe=b.probe,
        cadence=b.cadence,
        beta_init=b.beta_init,
        sensitivity_every=b.sensitivity_every,
        audit_every=run.audit_every,
        audit_tokens=run.audit_tokens,
        project=projection,
    )


STABILIZERS: dict[str, Callable[[nn.Module, Sequence[Optimizer], Projection, RunConfig], EllipsotopeClip]] = {
    "none": none,
    "ebc": ebc,
}


def build(model: nn.Module, bases: Sequence[Optimizer], projection: Projection, run: RunConfig) -> EllipsotopeClip:
    """The run's stabilizer around its base optimizers. Raises ValueError for a combination the method refuses."""
    return STABILIZERS[run.stabilizer.name](model, bases, projection, run)

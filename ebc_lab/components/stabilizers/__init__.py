"""The registry of stabilizers: none, EBC, and its rivals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ebc_lab.config.schema import RunConfig
from ebc_lab.ebc import EllipsotopeClip, StabilizedOptimizer

from .energy import EnergyBudget
from .rivals import (
    AdaptiveGradientClip,
    Build,
    KLClip,
    NormClip,
    Projection,
    Rival,
    RMSClip,
    TrustRegion,
    ValueClip,
    ZClip,
)

# -- by name ---------------------------------------------------------------------------------------------------------------


def none(model: nn.Module, bases: Sequence[Optimizer], run: RunConfig, **common: Any) -> StabilizedOptimizer:
    """The plain optimizer, audited."""
    return StabilizedOptimizer(model, bases, **common)


def ebc(model: nn.Module, bases: Sequence[Optimizer], run: RunConfig, **common: Any) -> EllipsotopeClip:
    b, c = run.budget, run.controller
    return EllipsotopeClip(
        model,
        bases,
        target_kl=b.target_kl,
        budget=b.name,
        aggregate=b.aggregate,
        grouping=b.grouping,
        controller=c.name,
        gains={k: v for k, v in (("kp", c.kp), ("ki", c.ki), ("a", c.a)) if v is not None},
        schedule=b.schedule,
        total_steps=run.steps,
        guard=b.guard,
        probe=b.probe,
        cadence=b.cadence,
        beta_init=b.beta_init,
        units=b.units,
        sensitivity_every=b.sensitivity_every,
        measure_every=b.measure_every,
        **common,
    )


def rival(
    cls: type[Rival] | type[EnergyBudget], of_run: Callable[[RunConfig], dict[str, Any]] | None = None
) -> Build:
    """What builds a class from a run: with the run's strength, and whatever else `of_run` reads from it."""

    def build(
        model: nn.Module, bases: Sequence[Optimizer], run: RunConfig, **common: Any
    ) -> StabilizedOptimizer:
        return cls(
            model, bases, strength=run.stabilizer.strength, **(of_run(run) if of_run else {}), **common
        )

    return build


HOOKED = (
    "energy_raw",
    "energy_rms",
)  # they listen to layers by forward hooks, which compiled code may leave out unasked
STABILIZERS: dict[str, Build] = {
    "none": none,
    "ebc": ebc,
    "norm_clip": rival(NormClip),
    "value_clip": rival(ValueClip),
    "agc": rival(AdaptiveGradientClip),
    "zclip": rival(ZClip),
    "energy_raw": rival(EnergyBudget, lambda run: {"norm": "raw"}),
    "energy_rms": rival(EnergyBudget, lambda run: {"norm": "rms"}),
    "trust_region": rival(
        TrustRegion, lambda run: {"schedule": run.stabilizer.schedule, "total_steps": run.steps}
    ),
    "kl_clip": rival(KLClip),
    "rms_clip": rival(RMSClip),
}


def build(
    model: nn.Module,
    bases: Sequence[Optimizer],
    projection: Projection,
    run: RunConfig,
    compiled: nn.Module | None = None,
) -> StabilizedOptimizer:
    """The run's stabilizer around its base optimizers; `compiled` is what training calls in the model's place, if it does.

    Raises ValueError for a combination that it refuses.
    """
    when = "retract" if getattr(projection, "retracts", False) else "project"
    return STABILIZERS[run.stabilizer.name](
        model,
        bases,
        run,
        probe_sequences=run.budget.probe_sequences,
        audit_every=run.audit_every,
        audit_tokens=run.audit_tokens,
        compiled=compiled,
        **{when: projection},
    )

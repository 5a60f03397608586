"""Stabilizers by name: none, EBC, and its rivals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ebc_lab.config.schema import RunConfig
from ebc_lab.ebc import EllipsotopeClip, StabilizedOptimizer

from ..forensics import ForensicClip, ForensicSettings
from .energy import EnergyBudget
from .rivals import (
    AdaptiveGradientClip,
    KLClip,
    NormClip,
    Rival,
    RMSClip,
    TrustRegion,
    ValueClip,
    ZClip,
)

Build = Callable[..., StabilizedOptimizer]


def none(model: nn.Module, bases: Sequence[Optimizer], run: RunConfig, **common: Any) -> StabilizedOptimizer:
    """The plain optimizer, audited."""
    return StabilizedOptimizer(model, bases, **common)


def ebc(model: nn.Module, bases: Sequence[Optimizer], run: RunConfig, **common: Any) -> EllipsotopeClip:
    """The method, or its forensic subclass if the run asks for a mistake of the earlier study."""
    budget = run.budget
    controller = run.controller
    gains = {"kp": controller.kp, "ki": controller.ki, "a": controller.a}
    settings = ForensicSettings(
        target_kl=budget.target_kl,
        budget=budget.name,
        aggregate=budget.aggregate,
        grouping=budget.grouping,
        controller=controller.name,
        gains={name: gain for name, gain in gains.items() if gain is not None},
        schedule=budget.schedule,
        total_steps=run.steps,
        until=budget.until,
        probe=budget.probe,
        cadence=budget.cadence,
        sensitivity_every=budget.sensitivity_every,
        measure_every=budget.measure_every,
        guard=budget.guard,
        beta_init=budget.beta_init,
        units=budget.units,
    )
    cls = ForensicClip if settings.forensic else EllipsotopeClip
    return cls(model, bases, settings=settings, **common)


def rival(
    cls: type[Rival] | type[EnergyBudget], of_run: Callable[[RunConfig], dict[str, Any]] = lambda run: {}
) -> Build:
    """What builds a class from a run: with the run's strength, and with what `of_run` reads from it."""

    def build(
        model: nn.Module, bases: Sequence[Optimizer], run: RunConfig, **common: Any
    ) -> StabilizedOptimizer:
        return cls(model, bases, strength=run.stabilizer.strength, **of_run(run), **common)

    return build


HOOKED = ("energy_raw", "energy_rms")  # they need forward hooks, which compiled code may silently leave out
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
    projection: Callable[[], None] | None,
    run: RunConfig,
    compiled: nn.Module | None = None,
) -> StabilizedOptimizer:
    """The run's stabilizer around its base optimizers; `compiled`: what training calls in the model's place.

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

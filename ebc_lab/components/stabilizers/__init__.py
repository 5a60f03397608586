"""Stabilizers by name: none, EBC, and its rivals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ebc_lab.config.errors import require
from ebc_lab.config.own.parts import describe_own_part, own_part
from ebc_lab.config.parts.budget import BudgetConfig
from ebc_lab.config.schema import RunConfig
from ebc_lab.ebc import EllipsotopeClip, InBackward, LaggedClip, StabilizedOptimizer
from ebc_lab.ebc.options import LAGGED, SETTLING
from ebc_lab.ebc.step import Arithmetic
from ebc_lab.lowbit.clustering import ParameterClustering
from ebc_lab.workloads import Workload

from ..forensics import ForensicClip, ForensicSettings
from .adagc import AdaGC
from .energy import EnergyBudget
from .rates import CDAT, AdaptiveWarmUp, GeN
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
Groups = Mapping[str, Sequence[str]]  # group -> its parameters' names
Effective = Callable[[], Sequence[Tensor]]  # the weights as the forward uses them now

# the settings of `conf/budget` that EBC takes by the same name
OF_BUDGET = {f.name for f in fields(ForensicSettings)} & {f.name for f in fields(BudgetConfig)}


def none(model: nn.Module, bases: Sequence[Optimizer], run: RunConfig, **common: Any) -> StabilizedOptimizer:
    """The plain optimizer, audited."""
    cls = InBackward if run.memory.hooks else StabilizedOptimizer
    return cls(model, bases, **common)


def ebc(
    model: nn.Module,
    bases: Sequence[Optimizer],
    run: RunConfig,
    *,
    grouping: str | Groups,
    **common: Any,
) -> EllipsotopeClip:
    """The method, its forensic subclass if the run asks for a mistake of the earlier study, or its rule for
    updates inside backward."""
    budget = run.budget
    controller = run.controller
    gains = {"kp": controller.kp, "ki": controller.ki, "a": controller.a}
    chosen: dict[str, Any] = {name: getattr(budget, name) for name in OF_BUDGET} | {
        "budget": budget.name,
        "grouping": grouping,
        "controller": controller.name,
        "gains": {name: gain for name, gain in gains.items() if gain is not None},
        "total_steps": run.steps,
        "steers": controller.steers,
        "measure": budget.measured_steps(),
        # later steps can be captured in a CUDA graph, and are as they were recorded
        "refine_steps": SETTLING,
    }
    settings = ForensicSettings(**chosen)
    if budget.name == LAGGED:
        return LaggedClip(model, bases, settings=settings, **common)
    cls = ForensicClip if settings.forensic else EllipsotopeClip
    return cls(model, bases, settings=settings, **common)


def rival(cls: type[Rival], of_run: Callable[[RunConfig], dict[str, Any]] = lambda run: {}) -> Build:
    """What builds a class from a run: with the run's strength, and with what `of_run` reads from it."""

    def build(
        model: nn.Module, bases: Sequence[Optimizer], run: RunConfig, **common: Any
    ) -> StabilizedOptimizer:
        return cls(model, bases, strength=run.stabilizer.strength, **of_run(run), **common)

    return build


def geometry(run: RunConfig) -> dict[str, Any]:
    """The norm in which the run's optimizer takes steps of a fixed length."""
    return {"geometry": {"muon": "spectral", "sgd": "frobenius"}.get(run.optimizer.name, "elementwise")}


def region(run: RunConfig) -> dict[str, Any]:
    """The radius of the run's trust region, how it moves, and what it is the radius of."""
    chosen = run.stabilizer
    moves = {"schedule": chosen.schedule, "total_steps": run.steps, "ramp": chosen.ramp}
    return moves | {"radius_unit": chosen.radius_unit, "per": chosen.per, "norm": chosen.norm}


def custom(
    model: nn.Module, bases: Sequence[Optimizer], run: RunConfig, **common: Any
) -> StabilizedOptimizer:
    """What the function of `target` makes of (model, bases, **options): the run's own options, its strength
    where it has one, and `arguments`. Raises UserError where that is no StabilizedOptimizer around them."""
    chosen = run.stabilizer
    strength = {} if chosen.strength is None else {"strength": chosen.strength}
    made = own_part(chosen)(model, bases, **common, **strength)
    key = describe_own_part(chosen)
    require(
        isinstance(made, StabilizedOptimizer),
        f"{key} returned {type(made).__name__}, not a StabilizedOptimizer of ebc_lab.ebc.",
    )
    wrapped: StabilizedOptimizer = made
    require(
        [id(base) for base in wrapped.bases] == [id(base) for base in bases],
        f"{key} wraps other optimizers than the run's: hand on those that it is given.",
    )
    return wrapped


HOOKED = ("energy_raw", "energy_rms")  # they need forward hooks, which compiled code may silently leave out
STABILIZERS: dict[str, Build] = {
    "none": none,
    "ebc": ebc,
    "norm_clip": rival(NormClip),
    "value_clip": rival(ValueClip),
    "agc": rival(AdaptiveGradientClip),
    "zclip": rival(ZClip),
    "adagc": rival(AdaGC),
    "energy_raw": rival(EnergyBudget, lambda run: {"norm": "raw"}),
    "energy_rms": rival(EnergyBudget, lambda run: {"norm": "rms"}),
    "trust_region": rival(TrustRegion, region),
    "kl_clip": rival(KLClip),
    "rms_clip": rival(RMSClip),
    "gen": rival(GeN),
    "cdat": rival(CDAT),
    "adaptive_warmup": rival(AdaptiveWarmUp, geometry),
}

# what some take beside the run
TAKEN: dict[str, tuple[str, ...]] = {"ebc": ("grouping",), "trust_region": ("grouping", "effective")}


def groups_of(model: nn.Module, run: RunConfig, workload: Workload) -> Groups | None:
    """Return the groups of the run's budget, where they do not follow from the names of the parameters."""
    if run.budget.grouping == "kmeans":
        clusters = ParameterClustering(run.budget.clusters, seed=run.seed)
        return clusters.groups({name: p.detach().cpu().numpy() for name, p in model.named_parameters()})
    return workload.groups([name for name, _ in model.named_parameters()], run.budget.grouping)


def build(
    model: nn.Module,
    bases: Sequence[Optimizer],
    projection: Callable[[], None] | None,
    run: RunConfig,
    compiled: nn.Module | None = None,
    *,
    groups: Groups | None = None,
    effective: Effective | None = None,
    arithmetic: Arithmetic | None = None,
) -> StabilizedOptimizer:
    """Return the run's stabilizer around its base optimizers.

    Args:
        compiled: what training calls in the model's place.
        groups: {group: parameter names}, instead of `budget.grouping`.
        effective: of a quantized model, see `TrustRegion`.
        arithmetic: what measures, in the place of torch.
    Raises:
        ValueError: a combination that the stabilizer refuses.
    """
    grouping = run.budget.grouping if groups is None else groups
    offered = {"grouping": grouping, "effective": effective}
    taken: dict[str, Any] = {key: offered[key] for key in TAKEN.get(run.stabilizer.name, ())}
    if arithmetic is not None:
        taken["arithmetic"] = arithmetic
    when = "retract" if getattr(projection, "retracts", False) else "project"
    made = STABILIZERS[run.stabilizer.name] if run.stabilizer.target is None else custom
    return made(
        model,
        bases,
        run,
        probe_sequences=run.budget.probe_sequences,
        audit_every=run.audit_every,
        audit_tokens=run.audit_tokens,
        curve_every=run.curve_every,
        compiled=compiled,
        **taken,
        **{when: projection},
    )

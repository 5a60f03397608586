"""Ellipsotope-Budgeted Clipping: scale each update so that predictions move by at most a chosen KL.

This package imports torch and nothing else of this project, so it can be copied into another one. Each part
of the theory has its own file:

* `logits`: how far predictions moved; `grouping` and `sensitivity`: beta, and the bound S
* `budgets`: how c is found, a class for each budget, and the radius beside it; `controller`: how delta
  evolves
* `clip`: the optimizer; `stabilized`: the order of its step, which every stabilizer takes, and the audits of
  what a step did to predictions; `in_backward`: the same around weights that move inside backward;
  `wrapping`: what schedulers and checkpoints see
* `options` and `settings`: names, constants and what can be chosen, without torch
* `attached`: the same step on optimizers that other code calls; `parallel`: on several processes
* `energy`: a limit on each layer's gradient instead, by the norm of its output
* `step`, `probe`, `proposal` and `flat`: what a step is given, its batch, its update, and the memory of the
  weights; `given`: what a user hands over, and what may be wrong with it

A bound on the KL of a step is the trust region of Schulman et al., arXiv:1502.05477; the ellipsotope that the
bound S belongs to is of Kousik, Dai & Gao, arXiv:2108.01750.

Torch is loaded at the first use of a name that needs it, so that `options` and `settings` can be imported
without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attached import Attached, attach
    from .budgets.radius import Radius
    from .budgets.schedules import schedule_multiplier
    from .budgets.surrogate import clip_coefficient, trust_radius
    from .clip import EllipsotopeClip
    from .controller import make_controller
    from .energy.clip import energy_budget_clip, monitor_ebc_ratio
    from .given.checks import EBCWarning
    from .grouping import group_parameters
    from .in_backward import InBackward, LaggedClip
    from .logits import centre, half_fisher, mean_kl, rms_norm
    from .proposal import Proposal
    from .sensitivity import SensitivityFilter, aggregate
    from .settings import ClipSettings
    from .stabilized import StabilizedOptimizer
    from .step import NonFiniteUpdateError, StepInputs, StepStats

__all__ = [
    "Attached",
    "ClipSettings",
    "EBCWarning",
    "EllipsotopeClip",
    "InBackward",
    "LaggedClip",
    "NonFiniteUpdateError",
    "Proposal",
    "Radius",
    "SensitivityFilter",
    "StabilizedOptimizer",
    "StepInputs",
    "StepStats",
    "aggregate",
    "attach",
    "centre",
    "clip_coefficient",
    "energy_budget_clip",
    "group_parameters",
    "half_fisher",
    "make_controller",
    "mean_kl",
    "monitor_ebc_ratio",
    "rms_norm",
    "schedule_multiplier",
    "trust_radius",
]

_FILES = (
    *("logits", "grouping", "sensitivity", "budgets.surrogate", "budgets.schedules", "controller"),
    *("settings", "step", "proposal", "budgets.radius", "stabilized", "clip", "in_backward"),
    *("given.checks", "attached", "energy.clip"),
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        for file in _FILES:
            module = import_module(f".{file}", __name__)
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Ellipsotope-Budgeted Clipping: scale each update so that predictions move by at most a chosen KL divergence.

The method alone: it imports torch and nothing else of this project, so that it can be lifted out. One file for each part
of the theory: `logits` (how far predictions moved), `grouping`, `sensitivity` (beta), `surrogate` (the bound S and its guard),
`budget` (how c is found), `controller` (how delta evolves), `stabilized` (a step, as every stabilizer takes it), `clip` (the
optimizer), `reference` (the same, slow and plain).
"""

from .budget import clip_coefficient, trust_radius
from .clip import EllipsotopeClip
from .controller import make_controller, schedule_multiplier
from .grouping import group_parameters
from .logits import centre, half_fisher, mean_kl, rms_norm
from .sensitivity import SensitivityFilter
from .stabilized import StabilizedOptimizer
from .step import NonFiniteUpdateError, StepStats
from .surrogate import Guard, aggregate

__all__ = [
    "EllipsotopeClip",
    "Guard",
    "NonFiniteUpdateError",
    "SensitivityFilter",
    "StabilizedOptimizer",
    "StepStats",
    "aggregate",
    "centre",
    "clip_coefficient",
    "group_parameters",
    "half_fisher",
    "make_controller",
    "mean_kl",
    "rms_norm",
    "schedule_multiplier",
    "trust_radius",
]

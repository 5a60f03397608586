"""The names and constants of the method, each stated once and without torch, for whatever checks settings.

The forensic names belong to `ebc_lab.components.forensics`, which subclasses the method to reproduce mistakes
of the earlier study; `EllipsotopeClip` itself refuses them.
"""

from __future__ import annotations

from collections.abc import Iterable

BUDGETS = ("shadow", "tracked", "surrogate", "fisher", "calibrated")
LAGGED = "lagged"  # of `LaggedClip` alone: c follows from the KL of earlier steps
MEASURED = ("shadow", "tracked")  # c follows from the KL of trial steps
MEASURING = (*MEASURED, LAGGED)  # c follows from measured KLs, which must exceed rounding noise
BOUNDED = ("surrogate", "calibrated")  # c follows from the bound S, which is needed at every step
AGGREGATES = ("l1", "sqrtl_l2", "l2")
GROUPINGS = ("block", "tensor", "type", "matrices", "global")
PROBES = ("jvp", "fd")
CADENCES = ("warm", "dense", "sweep")
CONTROLLERS = ("fixed", "log_pi", "rsl", "agreement", "energy", "confidence")
SCHEDULES = ("constant", "linear", "cosine", "hold_decay", "lr_squared")
EXPONENTS = ("square", "auto")  # of shadow: how KL is taken to grow with c
RADIUS_UNITS = (
    "absolute",
    "initial",
)  # a weight norm, or a share of ||W|| before the first step
RULED = ("nothing", "kl", "radius")  # what limited a step under a double budget, by its number in `ruled`

FORENSIC_CADENCES = (*CADENCES, "published")
FORENSIC_CONTROLLERS = (*CONTROLLERS, "pi")
CADENCES_OF_KL = ("every", "when_needed")  # of `MEASURED`: which steps measure a KL
GUARDS = ("none", "shrink", "shrink_inflate", "shrink_published")  # the first name of each is the method
BETA_INITS = ("first", "zero")
UNITS = ("logits", "per_lr")

CURVE_SCALES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # c of the points of a curve of KL against c
EXPONENT_RANGE = (1.0, 2.0)  # of exponent=auto: flips of codes alone, and a float model
EXPONENT_SPAN = 4.0  # of exponent=auto: it lies between the KL at c and at c over this
EXPONENTS_KEPT = 5  # of exponent=auto: audits whose median counts
# the settings with which all that depends on how a machine rounds goes through `step.Arithmetic`
WITH_ARITHMETIC: dict[str, tuple[str | int, ...]] = {
    "budget": ("shadow",),
    "controller": ("fixed",),
    "schedule": ("constant", "linear"),
    "exponent": ("square",),
    "measure_every": (1,),
    "sensitivity_every": (0,),
}

CLIPPED_BELOW = 0.999  # a step counts as clipped when c is below this
KL_FLOOR = {"float32": 1e-7, "bfloat16": 1e-5}  # nats per token: a smaller measured KL is rounding noise
LEAST_TARGET_KL = {"float32": 1e-6, "bfloat16": 1e-4}  # nats per token, of `MEASURED`: ten floors
SETTLING = 20  # of `MEASURED`: steps at the start in which a KL is measured at every one
# of `tracked`, fitted to measured series of Adam and Muon: by how much the variance of ln(KL/P) grows at
# one of the first SETTLING steps and at a later one; and its variance about that from step to step, at first
EARLY_DRIFT = 0.04
DRIFT = 0.002
FLICKER = 0.04
FLICKER_RATE = 0.02  # of `tracked`: the weight of a new measurement in what is known of the flicker
TOKEN_NOISE = 9.0  # of `tracked`: the variance of a measured ln KL, times the tokens it was measured on
SURPRISE = 4.0  # of `tracked`, standard deviations: a measurement further from its prediction shows a jump
REACH = 2.0  # of `tracked` beside a radius, standard deviations: a KL further off does not rule
DITHER = 7  # of `measure="when_needed"`: audits fall on as many different steps after a measurement
LEAST_COSINE = 0.05  # of `tracked`: a proposal is taken to promise as much of the steepest fall at least
LEAST_MULTIPLIER = {  # the end of a schedule's factor on the target KL
    "linear": 0.05,
    "cosine": 0.05,
    "hold_decay": 0.05,
}
DECAYING_SHARE = 0.4  # of a run, its last part, in which `hold_decay` falls


def check_option(key: str, value: str, allowed: Iterable[str]) -> None:
    """Raises ValueError unless `value` is one of the names that setting `key` takes."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{key}={value!r} is unknown; it takes {', '.join(allowed)}.")

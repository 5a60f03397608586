"""The names and constants of the method, each stated once and without torch, for whatever checks settings.

The forensic names belong to `ebc_lab.components.forensics`, which subclasses the method to reproduce mistakes
of the earlier study; `EllipsotopeClip` itself refuses them.
"""

from __future__ import annotations

from collections.abc import Iterable

BUDGETS = ("shadow", "surrogate", "fisher", "calibrated")
BOUNDED = ("surrogate", "calibrated")  # c follows from the bound S, which is needed at every step
AGGREGATES = ("l1", "sqrtl_l2", "l2")
GROUPINGS = ("block", "tensor", "type", "matrices", "global")
PROBES = ("jvp", "fd")
CADENCES = ("warm", "dense", "sweep")
CONTROLLERS = ("fixed", "log_pi", "rsl", "agreement", "energy")
SCHEDULES = ("constant", "linear", "cosine", "hold_decay", "lr_squared")

FORENSIC_CADENCES = (*CADENCES, "published")
FORENSIC_CONTROLLERS = (*CONTROLLERS, "pi")
GUARDS = ("none", "shrink", "shrink_inflate")  # the first name of each is the method
BETA_INITS = ("first", "zero")
UNITS = ("logits", "per_lr")

CLIPPED_BELOW = 0.999  # a step counts as clipped when c is below this
KL_FLOOR = {"float32": 1e-7, "bfloat16": 1e-5}  # nats per token: a smaller measured KL is rounding noise
LEAST_TARGET_KL = {"float32": 1e-6, "bfloat16": 1e-4}  # nats per token, of `shadow`: ten floors
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

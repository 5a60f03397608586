"""The names and constants of the method, each stated once and without torch, for whatever checks settings.

The forensic names belong to `ebc_lab.components.forensics`, which subclasses the method to reproduce mistakes
of the earlier study; `EllipsotopeClip` itself refuses them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

BUDGETS = ("shadow", "tracked", "surrogate", "fisher", "calibrated")
LAGGED = "lagged"  # of `LaggedClip` alone: c follows from the KL of earlier steps
MEASURED = ("shadow", "tracked")  # c follows from the KL of trial steps
MEASURING = (*MEASURED, LAGGED)  # c follows from measured KLs, which must exceed rounding noise
BOUNDED = ("surrogate", "calibrated")  # c follows from the bound S, which is needed at every step
GUARDED = ("surrogate",)  # c is the trust radius over S, and audits may correct that radius
AGGREGATES = ("l1", "sqrtl_l2", "l2")
GROUPINGS = ("block", "tensor", "type", "matrices", "global")
PROBES = ("jvp", "fd")
CADENCES = ("warm", "dense", "sweep")
CONTROLLERS = ("fixed", "log_pi", "rsl", "agreement", "energy", "confidence")
SCHEDULES = ("constant", "linear", "cosine", "hold_decay", "lr_squared")
EXPONENTS = ("square", "auto")  # of shadow: how KL is taken to grow with c
RADIUS_UNITS = ("absolute", "initial")  # a weight norm, or a share of ||W|| before the first step
STEERED = ("kl", "radius")  # which of two bounds a controller moves
RULED = ("nothing", *STEERED)  # what limited a step under a double budget, by its number in `ruled`

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


_FORENSIC = "ForensicClip of ebc_lab.components.forensics"
# what the earlier study calls its settings, without its prefix `ebc_`, and people theirs -> what to do here
ELSEWHERE = {
    name: told
    for told, names in {
        "type target_kl=…, nats per token": ("delta", "delta_star", "kl", "max_kl"),
        "type target_kl=tau**2 / (4 * tokens)": ("tau",),
        "EBC is on from attach(…) to detach()": ("enable",),
        f"cadence='warm', 'dense' or 'sweep' says when β is measured; two layers every 20 steps is "
        f"cadence='published' of {_FORENSIC}": ("update_every", "probe_layers", "beta_full_sweep"),
        "β is filtered by SensitivityFilter, at decay 0.95": ("beta_ema",),
        "β is filtered by SensitivityFilter, at huber 0.5": ("beta_huber_delta",),
        "type target_kl=delta / safety**2, which is the same": ("safety",),
        "type aggregate=…, and 'sqrtl_l2' for what is 'l2' there": ("aggregate",),
        "logits are always centred": ("center_logits",),
        "type grouping='block', or 'matrices' to leave embeddings and head free": ("include_embed_out",),
        f"type controller='log_pi', or 'pi' with {_FORENSIC}": ("ctrl_enable",),
        "type audit_every=…": ("ctrl_period",),
        f"type gains={{'kp': …, 'ki': …}}, and beside these half_life, low and high with {_FORENSIC}": (
            *("ctrl_kp", "ctrl_ki", "kp", "ki"),
            *("ctrl_ema_halflife", "ctrl_delta_min", "ctrl_delta_max"),
        ),
        f"only {_FORENSIC} has it, with the earlier study's mistakes": ("guard", "beta_init", "units"),
        f"only {_FORENSIC} has it; log_pi is the loop that keeps its target": ("controller=pi",),
        f"only {_FORENSIC} has it; 'warm' is the cadence that keeps β right": ("cadence=published",),
        f"guard='shrink' of {_FORENSIC} has no settings": (
            *("guard_warmup_steps", "tau_scale_floor", "tau_max_shrink_per_probe"),
            *("tau_recover_rate", "tau_shrink_exponent"),
        ),
    }.items()
    for name in names
}
ENERGY_ELSEWHERE = {  # the same for the energy clip
    "verbose": "print(clip()) shows each layer's share of its budget",
    "hook_handles": "leave it out, each clip keeps its hooks until clip.remove()",
    "max_norm": "type ratio=…, a share of the norm of each layer's output",
}


def near(word: str, choices: Sequence[str]) -> str:
    """` (did you mean …?)`, or nothing if nothing is near."""
    found = difflib.get_close_matches(word, choices, 1)
    return f" (did you mean {found[0]}?)" if found else ""


def check_option(key: str, value: str, allowed: Iterable[str]) -> None:
    """Raises ValueError unless `value` is one of the names that setting `key` takes."""
    allowed = tuple(allowed)
    if value not in allowed:
        told = ELSEWHERE.get(f"{key}={value}", f"it takes {', '.join(allowed)}")
        raise ValueError(f"{key}={value!r} is unknown; {told}.")


def check_number(key: str, value: Any, such_as: float) -> None:
    """Raises TypeError unless `value` is a number."""
    if isinstance(value, str | bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{key}={value!r} is no number: type {key}={such_as}.")


def check_names(owner: str, given: Iterable[str], known: Sequence[str], elsewhere: Mapping[str, str]) -> None:
    """Raises TypeError at the first of the `given` names that is not `known`, with what to type instead."""
    for name in given:
        if name not in known:
            bare = name.removeprefix("ebc_")
            told = f": {elsewhere[bare]}" if bare in elsewhere else near(bare, known)
            raise TypeError(f"{owner} takes no {name}{told}.")

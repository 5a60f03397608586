"""Checks of settings, losses and gradients, and the words of refusals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .update import CHUNK

NOT_FINITE = "is not finite or too large to be squared"
NAMED = 8  # things that a message lists by name
RANGES: dict[str, tuple[float, float]] = {  # setting of a parameter group -> least and largest value
    "lr": (0, math.inf),
    "weight_decay": (0, math.inf),
    "streak_boost": (1, math.inf),
    "snr_floor": (0, 1),
    "rank": (0, math.inf),
    "momentum_weight": (0, math.inf),
    "beta1": (0, 1),
    "rms_limit": (0, math.inf),
}
OPEN = ("rms_limit", "max_grad_norm")  # which must lie above the least value
BELOW = ("beta1",)  # which must lie below the largest one
OTHERS = {  # settings of other optimizers, and what to type instead
    "betas": "type beta1=0.9 and a rank for the momentum; the second moments' decay follows from the step",
    "eps": "leave it out, as 1e-30 is added to squared gradients",
    "total_steps": "leave it out, and take a schedule of torch.optim.lr_scheduler, such as OneCycleLR",
    "warmup_ratio": "leave it out, and take a schedule of torch.optim.lr_scheduler, such as OneCycleLR",
}


class AnomalyError(FloatingPointError):
    """A loss or a gradient is not finite. `bad`: the tensors; `moved`: those already updated, under hooks."""

    def __init__(self, message: str, bad: Sequence[str] = (), moved: Sequence[str] = ()):
        super().__init__(message)
        self.bad = list(bad)
        self.moved = list(moved)


def check_range(name: str, value: Any, least: float, most: float) -> None:
    """Raise ValueError unless the value is a finite number in its range, TypeError unless it is a number."""
    if isinstance(value, bool) or not isinstance(value, int | float | torch.Tensor):
        raise TypeError(f"{name} must be a number, not {value!r}.")
    number = float(value)
    inside = least <= number <= most and math.isfinite(number)
    if name in OPEN:
        inside = inside and number > least
    if name in BELOW:
        inside = inside and number < most
    if not inside:
        low = f"above {least:g}" if name in OPEN else f"at least {least:g}"
        high = f"below {most:g}" if name in BELOW else f"at most {most:g}"
        words = low if most == math.inf else f"{low} and {high}"
        raise ValueError(f"{name} must be {words}, not {value}.")


def refuse_others(settings: Mapping[str, Any]) -> None:
    """Raise TypeError if there is any setting, and say what to type instead of those that are known."""
    for name in settings:
        remedy = OTHERS.get(name, f"choose among {', '.join(RANGES)}, relative, max_grad_norm")
        raise TypeError(f"AXIOM has no setting {name}: {remedy}.")


def check_group(group: Mapping[str, Any]) -> None:
    """Raise ValueError or TypeError for a parameter group with a setting out of its range."""
    for name, (least, most) in RANGES.items():
        check_range(name, group[name], least, most)
    if group["rank"] != int(group["rank"]):
        raise ValueError(f"rank must be a whole number, not {group['rank']}.")
    for p in group["params"]:
        if not p.is_floating_point():
            raise TypeError(f"a parameter of dtype {p.dtype} cannot be trained: give floating ones only.")


def norm_of(g: torch.Tensor) -> torch.Tensor:
    """Return the L2 norm of a gradient in float32 or better, 0-dim; finite if and only if every square is."""
    wide = torch.promote_types(g.dtype, torch.float32)
    if g.dtype == wide or g.numel() <= CHUNK:
        norm: torch.Tensor = torch.linalg.vector_norm(g, dtype=wide)
        return norm
    # by parts: torch would make a copy of all of it
    parts = [torch.linalg.vector_norm(part, dtype=wide) for part in torch.split(g.reshape(-1), CHUNK)]
    return norm_of(torch.stack(parts))


def finite_loss(loss: Any) -> bool:
    """Tell whether a loss is finite, as far as there is one: None is."""
    if loss is None:
        return True
    return bool(torch.isfinite(loss).all()) if isinstance(loss, torch.Tensor) else math.isfinite(loss)


def loss_in_words(loss: Any) -> str:
    """Write a loss that is not finite in a message."""
    single = not isinstance(loss, torch.Tensor) or loss.numel() == 1
    return f"{float(loss)}" if single else "not finite"


def listed(names: Sequence[str]) -> str:
    """List the names in one phrase, the first of them where there are many."""
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")


def workers() -> int:
    """Count the processes that torch.distributed has joined; 1 without it."""
    distributed = torch.distributed
    joined = distributed.is_available() and distributed.is_initialized()
    return int(distributed.get_world_size()) if joined else 1

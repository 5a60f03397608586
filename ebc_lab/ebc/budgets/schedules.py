"""m(t), the factor on delta* over a run, and, as its square root, on a radius (docs/method.md)."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..options import DECAYING_SHARE, LEAST_MULTIPLIER, SCHEDULES, check_option

_OF_PROGRESS: dict[str, Callable[[float], float]] = {  # t/n -> m
    "linear": lambda x: max(LEAST_MULTIPLIER["linear"], 1 - x),
    "cosine": lambda x: LEAST_MULTIPLIER["cosine"] + 0.475 * (1 + math.cos(math.pi * min(x, 1.0))),
    "hold_decay": lambda x: max(LEAST_MULTIPLIER["hold_decay"], min(1, max(0, 1 - x) / DECAYING_SHARE) ** 2),
}


def schedule_multiplier(
    kind: str, step: int, total_steps: int | None, lr_ratio: float | None = None
) -> float:
    """m(t), the factor on delta* at `step` t (0-based) of `total_steps` n; `lr_ratio` is lr_t / lr_peak.

    `constant` 1; `linear` max(0.05, 1 - t/n); `cosine` 0.05 + 0.475·(1 + cos(pi·t/n)); `hold_decay`
    max(0.05, min(1, (1 - t/n)/0.4)²); these three 0.05 past the end; `lr_squared` lr_ratio². Raises
    ValueError on an unknown kind, or where what the kind needs is not given.
    """
    check_option("schedule", kind, SCHEDULES)
    if kind in _OF_PROGRESS:
        if not total_steps or total_steps < 1:
            raise ValueError(f"schedule={kind!r} needs total_steps, the length of the run.")
        return _OF_PROGRESS[kind](step / total_steps)
    if kind == "lr_squared":
        if lr_ratio is None:
            raise ValueError("schedule='lr_squared' needs lr_ratio, the learning rate over its peak.")
        return lr_ratio**2
    return 1.0

"""Every rule by which a run has diverged: a bad step, too many skipped steps, a loss that has risen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

SKIPS_TO_DIVERGE = 10  # skipped steps in a row
LAST_STEPS = 50  # whose mean loss must not exceed the initial loss


def fatal(step: int, figures: Mapping[str, Any]) -> str | None:
    """Why a run cannot continue after a step with these values; None if it can."""
    for name in ("loss", "loss_total"):
        if not math.isfinite(figures.get(name, 0.0)):
            return f"the {name.replace('_', ' ')} is {figures[name]} at step {step}"
    if figures.get("failed"):
        return f"step {step}: the optimizer proposed a non-finite update."
    return None


def stuck(skips: int, step: int) -> str | None:
    """Why a run whose last `skips` steps were all skipped is not continued; None if it is."""
    if skips < SKIPS_TO_DIVERGE:
        return None
    return f"{SKIPS_TO_DIVERGE} steps in a row were skipped, the last at step {step}"


def risen(figures: Mapping[str, Any], steps: int) -> str | None:
    """Why a run of `steps` steps that came to its end has diverged all the same; None if it has not."""
    initial = figures["initial_loss"]
    last = figures["last_loss"]
    if last is None or last <= initial:
        return None
    count = min(LAST_STEPS, steps)
    return f"the mean loss of the last {count} steps, {last:.3f}, is above the initial loss, {initial:.3f}"

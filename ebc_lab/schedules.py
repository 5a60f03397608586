"""Learning-rate schedules: a name -> the factor on the peak learning rate at a step.

The schedules of delta* belong to the method: `ebc_lab.ebc.schedule_multiplier`.
"""

from __future__ import annotations

from collections.abc import Callable

from .config import LRScheduleConfig


def constant(step: int, steps: int, config: LRScheduleConfig) -> float:
    return 1.0


def warmup_linear(step: int, steps: int, config: LRScheduleConfig) -> float:
    """Up linearly over `warmup_steps` (the first step already moves), then linearly down, to 0 just after the last step."""
    warmup = min(config.warmup_steps, steps - 1)
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (steps - step) / (steps - warmup))


LR_SCHEDULES: dict[str, Callable[[int, int, LRScheduleConfig], float]] = {
    "constant": constant,
    "warmup_linear": warmup_linear,
}


def lr_factor(config: LRScheduleConfig, step: int, steps: int) -> float:
    """The factor on the peak learning rate at `step` (0-based) of `steps`."""
    return LR_SCHEDULES[config.name](step, steps, config)

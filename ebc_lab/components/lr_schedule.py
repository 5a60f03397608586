"""Learning rates: a name -> the learning rate at every step of a run.

The schedules of delta* belong to the method: `ebc_lab.ebc.schedule_multiplier`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from ebc_lab.config.errors import UserError, require, shown
from ebc_lab.config.own.parts import describe_own_part, own_part
from ebc_lab.config.parts.lr_schedule import LRScheduleConfig
from ebc_lab.records.paths import RunFiles
from ebc_lab.records.streams import read_columns


def constant(step: int, steps: int, config: LRScheduleConfig) -> float:
    return 1.0


def warmup_linear(step: int, steps: int, config: LRScheduleConfig) -> float:
    """A factor that rises linearly to 1 over `warmup_steps`, then falls linearly to 0 after the last step.

    Warm-up: Goyal et al., arXiv:1706.02677. Linear decay: Defazio et al., arXiv:2310.07831.
    """
    warmup = _warmup(config, steps)
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (steps - step) / (steps - warmup))


def cosine(step: int, steps: int, config: LRScheduleConfig) -> float:
    """As `warmup_linear`, falling along half a wave of the cosine. Loshchilov & Hutter, arXiv:1608.03983."""
    warmup = _warmup(config, steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - warmup) / (steps - warmup)))


def trapezoid(step: int, steps: int, config: LRScheduleConfig) -> float:
    """Risen as in `warmup_linear`, held, then falling linearly to 0 over the last `decay_share` of the run.

    Where the warm-up reaches into the decay the smaller of the two factors applies, and 1 is never reached.
    Hägele et al., arXiv:2405.18392; as warm-up, stable, decay: Hu et al., arXiv:2404.06395.
    """
    warmup = _warmup(config, steps)
    rise = (step + 1) / warmup if step < warmup else 1.0
    return min(rise, max(0.0, (1 - step / steps) / config.decay_share))


def inverse_sqrt(step: int, steps: int, config: LRScheduleConfig) -> float:
    """Risen as in `warmup_linear`, then falling as 1/sqrt(step), whatever the run's length.

    Vaswani et al., arXiv:1706.03762.
    """
    warmup = max(1, _warmup(config, steps))
    return min((step + 1) / warmup, math.sqrt(warmup / (step + 1)))


def _warmup(config: LRScheduleConfig, steps: int) -> int:
    """The steps of warm-up: all but the last of the run at most."""
    return min(config.warmup_steps, steps - 1)


LR_SCHEDULES: dict[str, Callable[[int, int, LRScheduleConfig], float]] = {
    "constant": constant,
    "warmup_linear": warmup_linear,
    "cosine": cosine,
    "trapezoid": trapezoid,
    "inverse_sqrt": inverse_sqrt,
}


def lr_factor(config: LRScheduleConfig, step: int, steps: int) -> float:
    """The factor on the peak learning rate at `step` (0-based) of `steps`, with the warm-up in steps."""
    return LR_SCHEDULES[config.name](step, steps, config)


def _own_schedule(config: LRScheduleConfig, peak: float, steps: int) -> Callable[[int], float]:
    """step (0-based) -> learning rate, by the function of `target`, asked for the first and the last step at
    once. Raises UserError where it gives no finite number >= 0."""
    factor = own_part(config)
    key = describe_own_part(config)

    def rate(step: int) -> float:
        value = factor(step, steps)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        require(
            number and 0 <= value < math.inf,
            f"{key} gave {shown(value)} for step {step} of {steps}: it must be "
            "a finite number >= 0, the factor on the peak.",
        )
        return peak * float(value)

    rate(0)
    rate(steps - 1)
    return rate


def source_folder(config: LRScheduleConfig, beside: Path) -> Path:
    """The folder of the run to replay, as written or next to this one. Raises UserError if there is none."""
    named = Path(config.source or "").expanduser()
    folder = named if RunFiles(named).steps.exists() else beside / named
    steps = RunFiles(folder).steps
    if not steps.exists():
        raise UserError(f"lr_schedule.source={config.source}: there is no {steps} to replay.")
    return folder


def recorded_rates(folder: Path) -> list[float]:
    """The c·lr of every step of the run in `folder`. Raises UserError if its steps.csv is no such record."""
    path = RunFiles(folder).steps
    try:
        return [float(rate) for rate in read_columns(path, ["eta_eff"])["eta_eff"]]
    except (UserError, OSError):
        raise UserError(f"{path} is no record of a run: lr_schedule.source must be a run's folder.") from None


def lr_schedule(config: LRScheduleConfig, peak: float, steps: int, beside: Path) -> Callable[[int], float]:
    """step (0-based) -> learning rate; `replay`: the c·lr that another run recorded (see `source_folder`).

    Raises UserError when that record is not there or shorter than `steps`.
    """
    if config.target is not None:
        return _own_schedule(config, peak, steps)
    if config.name != "replay":
        return lambda step: peak * lr_factor(config, step, steps)
    folder = source_folder(config, beside)
    rates = recorded_rates(folder)
    if len(rates) < steps:
        raise UserError(
            f"{folder / 'steps.csv'} records {len(rates)} steps, fewer than the {steps} of this run."
        )
    return lambda step: rates[step]

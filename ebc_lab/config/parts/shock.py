"""One disturbance at one step, to see how a run recovers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..fields import setting
from ..limits import STEPS
from ..part import Mode, Part, Unfit

SHOCKS = ("label_noise", "lr_spike", "corrupt_gradient")


@dataclass
class ShockConfig:
    """One disturbance at one step, to see how a run recovers."""

    name: str = setting("none", "which disturbance", group="shock")
    step: int | None = setting(None, "when, counted from 0; empty: half-way", "step", low=0, high=STEPS)
    size: float = setting(
        1.0,
        "share of wrong targets, factor on lr, or noise over the gradient's norm",
        above=0,
        high=1e6,
        only=SHOCKS,
    )


def _neutral(shock: ShockConfig) -> bool:
    return shock.name == "none"


def _refuses(shock: ShockConfig) -> Iterator[str]:
    if shock.name == "label_noise" and shock.size > 1:
        yield (
            f"shock.size is the share of wrong targets under shock=label_noise: at most 1, not {shock.size}."
        )


def _unfit(shock: ShockConfig, mode: Mode) -> Unfit | None:
    if shock.name != "corrupt_gradient":
        return None
    if mode is Mode.EXACT:
        why = "its noise may differ between machines; choose shock=label_noise, lr_spike or none"
        return Unfit("shock=corrupt_gradient", why)
    if mode is Mode.IN_BACKWARD:
        return Unfit("shock=corrupt_gradient", "no gradient is left once backward has ended; choose another")
    return None


SHOCK = Part("shock", ShockConfig, neutral=_neutral, refuses=_refuses, unfit=_unfit)

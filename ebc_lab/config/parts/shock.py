from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ..fields import STEPS, setting
from ..part import Figure, Head, Mode, Part, Run, Versions

SHOCK_WINDOW = 20  # steps before a shock, whose mean loss is the level to recover to
RECOVERY_WINDOW = 10  # steps whose mean loss must be back at that level
SHOCKS = ("label_noise", "lr_spike", "corrupt_gradient")


def _back(completed: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Return the steps that each disturbed run took to recover, or None for a run that never recovered."""
    return [r.get("shock_recovery_steps") for r in completed if r.get("shock_peak") is not None]


def _recovery_steps(completed: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the mean number of steps that the disturbed runs took to recover. None if no run was disturbed,
    or if any of them never recovered: averaging only the rest would flatter the arm."""
    back = _back(completed)
    steps = [value for value in back if value is not None]
    return fmean(steps) if steps and len(steps) == len(back) else None


def _recovered(completed: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the share of disturbed runs that recovered, from 0 to 1, or None if no run was disturbed."""
    back = _back(completed)
    return sum(steps is not None for steps in back) / len(back) if back else None


@dataclass
class ShockConfig(Part):
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

    off = "none"
    place = 90
    timed = False
    figures = (
        Figure(
            "shock_peak",
            "nats/token",
            "how far the mean training loss of any 10 steps after a shock rose above that before it",
            Head("peak", beside="steps"),
            in_every_arm=True,
        ),
        Figure(
            "shock_recovery_steps",
            "steps",
            "until such a mean was back; empty where a seed's never was",
            Head("recovery", beside="steps"),
            of_arm=_recovery_steps,
            in_every_arm=True,
        ),
        Figure(
            "shock_recovered",
            "0–1",
            "seeds that came back",
            Head("recovered", form="percent", beside="steps"),
            of_arm=_recovered,
            in_every_arm=True,
        ),
    )
    picture = "recovery"
    versions = Versions("shocks", "disturbances", free="step")

    def refuses(self, run: Run) -> Iterator[str]:
        if self.name == "label_noise" and self.size > 1:
            yield (
                "shock.size is the share of wrong targets under shock=label_noise: at most 1, not "
                f"{self.size}."
            )
        if not self.changes_nothing() and self.step is not None and self.step >= run.steps:
            yield f"shock.step={self.step} lies beyond the run's {run.steps} steps (counted from 0)."

    def unfit(self, mode: Mode) -> Iterator[str]:
        whys = {
            Mode.EXACT: "its noise may differ between machines; choose shock=label_noise, lr_spike or none",
            Mode.IN_BACKWARD: "no gradient is left once backward has ended; choose another",
        }
        if mode in whys and self.name == "corrupt_gradient":
            yield f"shock=corrupt_gradient: {whys[mode]}"

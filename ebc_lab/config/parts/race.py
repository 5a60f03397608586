"""The losses above which a run of a search ends early, because it cannot win any more."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..fields import setting
from ..part import Part


@dataclass
class RaceConfig:
    """Losses above which a run ends early (docs/stages.md); the stage tune sets them by itself."""

    name: str = setting("none", "whether it can end early", group="race")
    above: dict[str, float] = setting(
        {},
        "step, as a text, → loss on the fixed windows above which the run ends there",
        "nats/token",
        only=("bounds",),
    )


def _refuses(race: RaceConfig) -> Iterator[str]:
    for step, loss in race.above.items():
        if not step.isdecimal() or int(step) == 0:
            yield f"race.above maps steps to losses: {step!r} is no step."
        if not math.isfinite(loss):
            yield f"race.above at step {step} must be a finite loss, not {loss}."
    if race.name == "bounds" and not race.above:
        yield "race=bounds ends no run without race.above, steps and losses."


def _clashes(race: RaceConfig, run: Any) -> Iterator[str]:
    for step in (int(step) for step in race.above if step.isdecimal()):
        if step % run.eval_every or step >= run.steps:
            yield (
                f"race.above has a bound at step {step}, where the run is not evaluated before its end: "
                f"choose a multiple of eval_every={run.eval_every} below {run.steps}."
            )


RACE = Part(
    "race",
    RaceConfig,
    place=200,
    neutral=lambda race: race.name == "none",
    refuses=_refuses,
    clashes=_clashes,
    timed=False,
)

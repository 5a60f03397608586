import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..fields import setting
from ..part import Part, Run


@dataclass
class RaceConfig(Part):
    """Losses above which a run ends early (docs/stages.md); the stage tune sets them by itself."""

    name: str = setting("none", "whether it can end early", group="race")
    above: dict[str, float] = setting(
        {},
        "step, as a text, → loss on the fixed windows above which the run ends there",
        "nats/token",
        only=("bounds",),
    )

    off = "none"
    place = 200
    timed = False

    def refuses(self, run: Run) -> Iterator[str]:
        for step, loss in self.above.items():
            if not step.isdecimal() or int(step) == 0:
                yield f"race.above maps steps to losses: {step!r} is no step."
            if not math.isfinite(loss):
                yield f"race.above at step {step} must be a finite loss, not {loss}."
        if self.name == "bounds" and not self.above:
            yield "race=bounds ends no run without race.above, steps and losses."
        for bound in (int(step) for step in self.above if step.isdecimal()):
            if bound % run.eval_every or bound >= run.steps:
                yield (
                    f"race.above has a bound at step {bound}, where the run is not evaluated before its end: "
                    f"choose a multiple of eval_every={run.eval_every} below {run.steps}."
                )

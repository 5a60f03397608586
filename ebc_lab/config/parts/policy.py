from collections.abc import Iterator
from dataclasses import dataclass

from ..fields import setting
from ..part import Figure, Head, Mode, Part, Run

STEERED = ("ebc", "trust_region")  # stabilizers with a trust radius that a policy can change


@dataclass
class PolicyConfig(Part):
    """What multiplies the learning rate and the trust radius from step to step (docs/lowbit.md)."""

    name: str = setting("constant", "nothing; random factors; or a small network that learns", group="policy")

    off = "constant"
    place = 130
    timed = False
    unfit_for = dict.fromkeys(set(Mode) - {Mode.EBM}, "choose policy=constant")
    words = {"auxnn": "policy of a small network", "random": "random policy"}
    measured = "low-bit training"
    columns = {
        "lr_factor": ("×", "the policy's factor, which `lr` contains"),
        "radius_factor": ("×", "its factor on the trust radius"),
    }
    figures = (
        Figure(
            "lr_factor",
            "×",
            "the policy's factor on the learning rate, median of the steps",
            Head(
                "Factor on the LR",
                "LR factor",
                "factor",
                note="factors: what the policy multiplied by, medians of a run",
            ),
            of_steps=True,
        ),
        Figure(
            "radius_factor",
            "×",
            "its factor on the trust radius, median of the steps",
            Head(
                "Factor on the radius",
                "radius factor",
                "factor",
                note="factors: what the policy multiplied by, medians of a run",
            ),
            of_steps=True,
        ),
    )
    table = "Policies"

    def refuses(self, run: Run) -> Iterator[str]:
        if not self.changes_nothing() and "lr_squared" in (run.budget.schedule, run.stabilizer.schedule):
            yield (
                f"policy={self.name} multiplies the learning rate, which schedule=lr_squared follows: choose "
                "another schedule."
            )

    def warnings(self, run: Run) -> Iterator[str]:
        stabilizer = run.stabilizer.name
        if not self.changes_nothing() and stabilizer not in STEERED:
            yield (
                f"policy={self.name} moves the learning rate alone: stabilizer={stabilizer} has no trust "
                "radius."
            )

"""What multiplies the learning rate and the trust radius from step to step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..fields import setting
from ..part import Figure, Mode, Part, Tail, Unfit

STEERED = ("ebc", "trust_region")  # stabilizers with a radius, which a policy can move
WORDS = {"auxnn": "policy of a small network", "random": "random policy"}


@dataclass
class PolicyConfig:
    """What multiplies the learning rate and the trust radius from step to step (docs/lowbit.md)."""

    name: str = setting("constant", "nothing; random factors; or a small network that learns", group="policy")


def _neutral(policy: PolicyConfig) -> bool:
    return policy.name == "constant"


def _unfit(policy: PolicyConfig, mode: Mode) -> Unfit | None:
    if _neutral(policy) or mode is Mode.EBM:
        return None
    return Unfit(f"policy={policy.name}", "choose policy=constant")


def _tail(policy: PolicyConfig) -> Iterator[Tail]:
    if not _neutral(policy):
        yield Tail(f"_{policy.name}", WORDS[policy.name])


def _clashes(policy: PolicyConfig, run: Any) -> Iterator[str]:
    if not _neutral(policy) and "lr_squared" in (run.budget.schedule, run.stabilizer.schedule):
        yield (
            f"policy={policy.name} multiplies the learning rate, which schedule=lr_squared follows: choose "
            "another schedule."
        )


def _warnings(policy: PolicyConfig, run: Any) -> Iterator[str]:
    stabilizer = run.stabilizer.name
    if not _neutral(policy) and stabilizer not in STEERED:
        yield (
            f"policy={policy.name} moves the learning rate alone: stabilizer={stabilizer} has no trust "
            "radius."
        )


ON_RATE = "the policy's factor, which `lr` contains"
ON_RADIUS = "its factor on the trust radius"
POLICY = Part(
    "policy",
    PolicyConfig,
    place=130,
    neutral=_neutral,
    unfit=_unfit,
    tail=_tail,
    clashes=_clashes,
    warnings=_warnings,
    measured="low-bit training",
    timed=False,
    columns={"lr_factor": ("×", ON_RATE), "radius_factor": ("×", ON_RADIUS)},
    figures=(
        Figure(
            "lr_factor",
            "×",
            "the policy's factor on the learning rate, median of the steps",
            title="Factor on the LR",
            short="LR factor",
            form="factor",
            of_steps=True,
        ),
        Figure(
            "radius_factor",
            "×",
            "its factor on the trust radius, median of the steps",
            title="Factor on the radius",
            short="radius factor",
            form="factor",
            of_steps=True,
        ),
    ),
    table="Policies",
    note="factors: what the policy multiplied the schedule by, medians of a run",
)

"""How the current budget δ follows δ*."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ebc_lab.ebc import options

from ..errors import any_of
from ..fields import setting
from ..part import Mode, Part, Tail, Unfit

OF_ONE_PROCESS = ("agreement", "confidence")  # what looks at the targets of one process's rows


@dataclass
class ControllerConfig:
    """How the current budget δ follows δ*. An empty gain is the controller's own default."""

    name: str = setting("auto", "auto: log_pi for surrogate, else fixed", group="controller")
    steers: str = setting(
        "kl",
        "what it moves: δ, or the radius beside it, by the square root of what it makes of δ/δ*",
        choices=options.STEERED,
        unnamed_at="kl",
    )
    kp: float | None = setting(
        None, "proportional gain", low=0, only=("pi", "log_pi"), high=100, in_run_id_even_unread=True
    )
    ki: float | None = setting(
        None, "integral gain", low=0, only=("pi", "log_pi"), high=100, in_run_id_even_unread=True
    )
    a: float | None = setting(
        None,
        "KL per predicted decrease of the loss; a study takes the baseline's",
        "nats/nat",
        low=0,
        only=("energy",),
        in_run_id_even_unread=True,
        high=1e6,
    )


def _unfit(controller: ControllerConfig, mode: Mode) -> Unfit | None:
    choice = f"controller={controller.name}"
    exact = [str(name) for name in options.WITH_ARITHMETIC["controller"]]
    if mode is Mode.EXACT and controller.name not in exact:
        return Unfit(choice, f"choose {any_of([f'controller={name}' for name in exact])}")
    if mode is Mode.SEVERAL_PROCESSES and controller.name in OF_ONE_PROCESS:
        return Unfit(choice, "it looks at the rows of one process; leave launcher.processes_per_run=1")
    if mode is Mode.EBM and controller.name == "agreement":
        return Unfit(choice, "it compares the fall of one loss with the slope of the sum of six")
    if mode is Mode.IN_BACKWARD and controller.name == "agreement":
        return Unfit(choice, "budget=lagged sees no whole step; choose a controller that compares no losses")
    return None


def _tail(controller: ControllerConfig) -> Iterator[Tail]:
    if controller.steers != "kl":
        yield Tail(f"_steers{controller.steers}", "its controller moving the radius")


def _clashes(controller: ControllerConfig, run: Any) -> Iterator[str]:
    if run.stabilizer.name == "ebc" and controller.steers == "radius" and run.budget.radius is None:
        yield "controller.steers=radius moves a radius: set budget.radius, too."


CONTROLLER = Part("controller", ControllerConfig, place=60, unfit=_unfit, tail=_tail, clashes=_clashes)

from collections.abc import Iterator
from dataclasses import dataclass

from ebc_lab.ebc import options

from ..errors import any_of
from ..fields import EVEN_UNREAD, setting
from ..part import Mode, Part, Run, Tail

NEEDS_ONE_PROCESS = ("agreement", "confidence")  # these use the targets, and a process has only its own rows
PI = ("pi", "log_pi")


@dataclass
class ControllerConfig(Part):
    """How the current budget δ follows δ*. An empty gain is the controller's own default."""

    name: str = setting("auto", "auto: log_pi for surrogate, else fixed", group="controller")
    steers: str = setting(
        "kl",
        "what it moves: δ, or the radius beside it, by the square root of what it makes of δ/δ*",
        choices=options.STEERED,
        unnamed_at="kl",
    )
    kp: float | None = setting(None, "proportional gain", low=0, high=100, only=PI, **EVEN_UNREAD)
    ki: float | None = setting(None, "integral gain", low=0, high=100, only=PI, **EVEN_UNREAD)
    a: float | None = setting(
        None,
        "KL per predicted decrease of the loss; a study takes the baseline's",
        "nats/nat",
        low=0,
        high=1e6,
        only=("energy",),
        **EVEN_UNREAD,
    )

    place = 60

    def refuses(self, run: Run) -> Iterator[str]:
        if run.stabilizer.name == "ebc" and self.steers == "radius" and run.budget.radius is None:
            yield "controller.steers=radius moves a radius: set budget.radius, too."

    def unfit(self, mode: Mode) -> Iterator[str]:
        choice = f"controller={self.name}"
        exact = [str(name) for name in options.WITH_ARITHMETIC["controller"]]
        if mode is Mode.EXACT and self.name not in exact:
            yield f"{choice}: choose {any_of([f'controller={name}' for name in exact])}"
        if mode is Mode.SEVERAL_PROCESSES and self.name in NEEDS_ONE_PROCESS:
            yield f"{choice}: it looks at the rows of one process; leave launcher.processes_per_run=1"
        if mode is Mode.EBM and self.name == "agreement":
            yield f"{choice}: it compares the fall of one loss with the slope of the sum of six"
        if mode is Mode.IN_BACKWARD and self.name == "agreement":
            yield f"{choice}: budget=lagged sees no whole step; choose a controller that compares no losses"

    def tail(self) -> Iterator[Tail]:
        if self.steers != "kl":
            yield Tail(f"_steers{self.steers}", "its controller moving the radius")

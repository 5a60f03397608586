from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ebc_lab.ebc import options

from ..fields import CUSTOM, OWN, OWN_ARGUMENTS, OWN_CHECKSUM, OWN_TARGET, STEPS, setting
from ..part import Mode, Part, Run, Tail

TRUST_REGION = ("trust_region",)
NO_WHOLE_STEP = "it looks at the whole step before it is applied, and there is no such moment"
RATES = ("gen", "cdat", "adaptive_warmup")  # these adapt the learning rate, choosing c from the loss
RIVALS = (
    *("norm_clip", "value_clip", "agc", "zclip", "adagc", "energy_raw", "energy_rms"),
    *("trust_region", "kl_clip", "rms_clip", *RATES, CUSTOM),
)
# these use activations or targets, and a process has only those of its own rows
NEEDS_ONE_PROCESS = ("energy_raw", "energy_rms", *RATES, CUSTOM)
SCHEDULES = {  # schedule of δ*, or of a squared radius -> its forms in names, titles and labels
    "constant": Tail("", ""),
    "linear": Tail("_lindelta", "KL target falling to 5%", "falling δ*"),
    "cosine": Tail("_cosdelta", "KL target falling to 5% as a cosine", "δ* falling as a cosine"),
    "hold_decay": Tail("_holddelta", "hold-decay KL target", "hold-decay δ*"),
    "lr_squared": Tail("_lrdelta", "KL target falling with the square of the learning rate", "δ* with LR²"),
}
RADIUS_UNIT = "{}: a weight norm, or the share of ‖W‖ before the first step"
RAMP = "over which a radius rises to its size"


def tail_of_radius(unit: str, ramp: int) -> Iterator[Tail]:
    """Yield what a radius adds to a run's name: its unit, unless that is `absolute`, and its ramp, if any."""
    if unit != "absolute":
        yield Tail(f"_{unit}radius", "radius in units of ‖W₀‖")
    if ramp > 1:
        yield Tail(f"_ramp{ramp}", f"radius rising over {ramp} steps")


@dataclass
class StabilizerConfig(Part):
    """What acts between backward and the update: EBC, one of its rivals, or nothing."""

    name: str = setting("none", "which stabilizer", group="stabilizer")
    strength: float | None = setting(
        None, "a rival's threshold; its file says in which unit", above=0, high=1e9, only=RIVALS
    )
    schedule: str = setting("constant", "of the squared radius", choices=options.SCHEDULES, only=TRUST_REGION)
    radius_unit: str = setting(
        "absolute",
        RADIUS_UNIT.format("strength"),
        choices=options.RADIUS_UNITS,
        only=TRUST_REGION,
        unnamed_at="absolute",
    )
    ramp: int = setting(0, RAMP, "steps", low=0, high=STEPS, only=TRUST_REGION, unnamed_at=0)
    per: str = setting(
        "all",
        "one radius for the whole update, or a share of it for each group of budget.grouping",
        choices=("all", "group"),
        only=TRUST_REGION,
    )
    norm: str = setting(
        "latent",
        "of the weights that the optimizer moves, or of the quantized ones that the forward uses",
        choices=("latent", "effective"),
        only=TRUST_REGION,
    )
    target: str | None = setting(None, OWN_TARGET.format("wraps the optimizers"), only=OWN)
    arguments: dict[str, Any] = setting({}, OWN_ARGUMENTS, only=OWN)
    sha256: str | None = setting(None, OWN_CHECKSUM, only=OWN)

    place = 40
    libraries = {"agc": "pytorch-optimizer"}

    def unread(self) -> Iterable[str]:
        # names from before these settings existed stand for one radius of all latent weights
        usual = (self.per, self.norm) == ("all", "latent")
        return ("per", "norm") if usual else ()

    def refuses(self, run: Run) -> Iterator[str]:
        if self.norm != "latent" and self.per != "all":
            yield "stabilizer.norm=effective halves the whole update until it fits: leave stabilizer.per=all."
        if self.norm != "latent" and self.radius_unit != "absolute":
            yield "stabilizer.radius_unit=initial is of latent weights: leave stabilizer.norm=latent."

    def unfit(self, mode: Mode) -> Iterator[str]:
        choice = f"stabilizer={self.name}"
        if mode is Mode.EXACT and self.name not in ("none", "ebc"):
            yield f"{choice}: choose stabilizer=none, or stabilizer=ebc with budget=shadow"
        if mode is Mode.SEVERAL_PROCESSES and self.name in NEEDS_ONE_PROCESS:
            yield f"{choice}: it looks at the rows of one process; leave launcher.processes_per_run=1"
        if mode is Mode.EBM and self.name in ("gen", "cdat"):
            yield f"{choice}: it looks at the cross-entropy alone, one of the six terms that are trained"
        if mode is Mode.IN_BACKWARD and self.name not in ("none", "ebc"):
            others = "stabilizer=none, stabilizer=ebc with budget=lagged, or memory.hooks=false"
            yield f"{choice}: {NO_WHOLE_STEP}; choose {others}"

    def tail(self) -> Iterator[Tail]:
        if self.name in TRUST_REGION:
            yield SCHEDULES[self.schedule]
            yield from tail_of_radius(self.radius_unit, self.ramp)

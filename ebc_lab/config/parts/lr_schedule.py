from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import any_of
from ..fields import CUSTOM, OWN, OWN_ARGUMENTS, OWN_TARGET, STEPS, number, setting
from ..part import Mode, Part, Run, Tail

WARMED = ("warmup_linear", "cosine", "trapezoid", "inverse_sqrt")
LR_SHAPES = ("constant", *WARMED)  # schedules that need no recorded run
REPLAY = ("replay",)
EXACT = ("constant", "warmup_linear", "trapezoid")  # the others use the platform's maths library
TAILS = {
    "constant": Tail("", ""),
    "warmup_linear": Tail("_lrdecay", "warm-up and decay", "LR decay"),
    "cosine": Tail("_cosine", "warm-up and half a cosine down", "cosine LR"),
    "trapezoid": Tail("_trapezoid", "trapezoid learning rate", "trapezoid LR"),
    "inverse_sqrt": Tail("_invsqrt", "warm-up, then down as 1/√t", "1/√t LR"),
    "replay": Tail("_replay", "the learning rate of another run", "LR replayed"),
    CUSTOM: Tail("_customlr", "a learning-rate schedule of one’s own", "own LR schedule"),
}


@dataclass
class LRScheduleConfig(Part):
    """How the learning rate changes during a run."""

    name: str = setting("constant", "which schedule", group="lr_schedule")
    warmup_steps: int = setting(20, "steps of linear warm-up", "steps", low=0, high=STEPS, only=WARMED)
    warmup_share: float | None = setting(
        None,
        "warm-up as a share of the run, instead of warmup_steps",
        low=0,
        below=1,
        only=WARMED,
        in_run_id=False,
    )
    decay_share: float = setting(
        0.4, "the share of the run that decays", above=0, high=1, only=("trapezoid",)
    )
    source: str | None = setting(
        None, "folder, or in a study id, of the run whose recorded c·lr is replayed", only=REPLAY
    )
    target: str | None = setting(None, OWN_TARGET.format("gives the factor on the peak"), only=OWN)
    arguments: dict[str, Any] = setting({}, OWN_ARGUMENTS, only=OWN)
    sha256: str | None = setting(
        None,
        "of replay: checksum of that record, filled in for a single run; of custom: of the module's file; "
        "filled in, then enforced",
        only=(*REPLAY, CUSTOM),
    )

    place = 70

    def unread(self) -> Iterable[str]:
        if self.name != "replay":
            return ()
        # a replay is identified by the checksum of its record if known, or else by the record's path
        return ("source",) if self.sha256 else ("sha256",)

    def refuses(self, run: Run) -> Iterator[str]:
        if self.name == "replay" and not self.source:
            yield (
                "lr_schedule=replay needs lr_schedule.source, the folder of the run whose learning rates it "
                "replays."
            )

    def unfit(self, mode: Mode) -> Iterator[str]:
        if mode is Mode.EXACT and self.name not in EXACT:
            yield f"lr_schedule={self.name}: its factors may differ between machines; choose {any_of(EXACT)}"

    def tail(self) -> Iterator[Tail]:
        if self.name not in TAILS:
            yield Tail(f"_{self.name}", f"learning-rate schedule {self.name}")
            return
        yield TAILS[self.name]
        usual = LRScheduleConfig()
        if self.name in WARMED and self.warmup_steps != usual.warmup_steps:
            steps = self.warmup_steps
            yield Tail(f"_w{steps}", f"{steps} steps of warm-up" if steps else "no warm-up")
        if self.name == "trapezoid" and self.decay_share != usual.decay_share:
            share = self.decay_share
            yield Tail(f"_e{number(share)}", f"decay over the last {100 * share:.3g}%")

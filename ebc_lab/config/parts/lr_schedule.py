"""How the learning rate changes during a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import any_of
from ..fields import CUSTOM, OWN, OWN_ARGUMENTS, number, setting
from ..limits import STEPS
from ..part import Mode, Part, Tail, Unfit, is_own

WARMED = ("warmup_linear", "cosine", "trapezoid", "inverse_sqrt")
LR_SHAPES = ("constant", "warmup_linear", "cosine", "trapezoid", "inverse_sqrt")  # schedules without a record
REPLAY = ("replay",)
EXACT = ("constant", "warmup_linear", "trapezoid")  # the others ask the platform's maths library
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
class LRScheduleConfig:
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
    target: str | None = setting(
        None, "of custom: module:function, which gives the factor on the peak (docs/extending.md)", only=OWN
    )
    arguments: dict[str, Any] = setting({}, OWN_ARGUMENTS, only=OWN)
    sha256: str | None = setting(
        None,
        "of replay: checksum of that record, filled in for a single run; of custom: of the module's file; "
        "filled in, then enforced",
        only=(*REPLAY, CUSTOM),
    )


def _idle(schedule: LRScheduleConfig) -> tuple[str, ...]:
    """A replay is named by its record where that is known, else by where it lies."""
    if schedule.name != "replay":
        return ()
    return ("source",) if schedule.sha256 else ("sha256",)


def _refuses(schedule: LRScheduleConfig) -> Iterator[str]:
    if schedule.name == "replay" and not schedule.source:
        yield (
            "lr_schedule=replay needs lr_schedule.source, the folder of the run whose learning rates it "
            "replays."
        )


def _unfit(schedule: LRScheduleConfig, mode: Mode) -> Unfit | None:
    if mode is Mode.EXACT and schedule.name not in EXACT:
        why = f"its factors may differ between machines; choose {any_of(EXACT)}"
        return Unfit(f"lr_schedule={schedule.name}", why)
    return None


def _tail(schedule: LRScheduleConfig) -> Iterator[Tail]:
    if is_own(schedule, TAILS):
        yield Tail(f"_{schedule.name}", f"learning-rate schedule {schedule.name}")
        return
    yield TAILS[schedule.name]
    usual = LRScheduleConfig()
    if schedule.name in WARMED and schedule.warmup_steps != usual.warmup_steps:
        steps = schedule.warmup_steps
        yield Tail(f"_w{steps}", f"{steps} steps of warm-up" if steps else "no warm-up")
    if schedule.name == "trapezoid" and schedule.decay_share != usual.decay_share:
        share = schedule.decay_share
        yield Tail(f"_e{number(share)}", f"decay over the last {100 * share:.3g}%")


LR_SCHEDULE = Part(
    "lr_schedule", LRScheduleConfig, place=70, idle=_idle, refuses=_refuses, unfit=_unfit, tail=_tail
)

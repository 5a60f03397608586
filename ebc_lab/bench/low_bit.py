"""What low-bit training adds to a step: paired ratios of steps as a run takes them, in one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ebc_lab.config.choices import changed
from ebc_lab.config.parts.memory import MemoryConfig
from ebc_lab.config.parts.quantizer import WITH_LOW_BIT_STATE
from ebc_lab.config.parts.stabilizer import StabilizerConfig
from ebc_lab.config.schema import RunConfig

from .pairs import steps_compared

PLAIN = "float32"
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {  # name -> settings, and what its time is compared with
    "ternary": ({"name": "ternary"}, PLAIN),
    "five": ({"name": "five"}, PLAIN),
    "ternary, ternary gradients with error feedback": (
        {"name": "ternary", "gradients": "ternary", "error_feedback": True},
        "ternary",
    ),
    "gradients ternary with error feedback": ({"gradients": "ternary", "error_feedback": True}, PLAIN),
    "state int8": ({"state": "int8"}, PLAIN),
    "state ternary": ({"state": "ternary"}, PLAIN),
}


def low_bit(run: RunConfig, rounds: int, limit_s: float, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Seconds of a step of each variant over those of what it is compared with, all taking turns.

    The runs have no stabilizer; their steps are recorded, with audits. `rounds` turns each, fewer where they
    would take longer than `limit_s` seconds.
    """
    say("low-bit training against the plain step")
    plain = dataclasses.replace(run, stabilizer=StabilizerConfig(), memory=MemoryConfig())
    stateful = run.optimizer.name in WITH_LOW_BIT_STATE
    asked = {name: found for name, found in VARIANTS.items() if stateful or "state" not in found[0]}
    runs = {PLAIN: plain}
    runs |= {name: changed(plain, {"quantizer": settings}) for name, (settings, _) in asked.items()}
    against = {name: other for name, (_, other) in asked.items()}
    return steps_compared(runs, against, rounds, limit_s)

"""How the figures of a judgement are written: with the decimals that their spread has a use for."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ebc_lab.judging.record import DifferenceRecord, Record

from ..text.table import Cell
from ..text.words import BADGES, NOTHING, brief, fixed, setting, signed

MOST_DECIMALS = 12
USUAL_DECIMALS = 4  # of losses of which no spread is known


@dataclass(frozen=True)
class Shown:
    """How a record's figures are written: with as many decimals as their spread has a use for."""

    unit: str  # of the outcomes: the judged column, or steps
    decimals: int
    higher: bool  # whether more is better

    @classmethod
    def of(cls, record: Record) -> Shown:
        unit = record.get("unit", record["loss"])
        return cls(unit, decimals_of(record), unit == record["loss"] and record["better"] == "higher")

    @property
    def best(self) -> str:
        return f"{'above' if self.higher else 'below'} zero is better"

    def value(self, x: float | None) -> str:
        return fixed(x, self.decimals)

    def spread(self, x: float | None) -> str:
        return fixed(x, min(self.decimals + 1, MOST_DECIMALS))

    def change(self, x: float | None) -> str:
        """Return a difference; of one that is not zero never `+0.0000`, which would hide its side."""
        decimals = self.decimals
        while x and round(x, decimals) == 0 and decimals < MOST_DECIMALS:
            decimals += 1
        return signed(x, decimals)


def verdict_cell(d: DifferenceRecord) -> Cell:
    """Return the verdict of a comparison; nothing where nothing could be tested."""
    return Cell(d["verdict"], tone=BADGES[d["verdict"]]) if d["method"] else Cell(NOTHING)


def decimals_of(record: Record) -> int:
    """Return how many decimals show two digits of an arm's usual spread, or else of the arms' differences."""
    spreads = [arm["sd"] for arm in record["arms"] if arm["sd"]]
    spreads = spreads or [abs(d["mean"]) for d in record["differences"] if d["mean"]]
    if not spreads:
        return USUAL_DECIMALS
    return min(max(0, 1 - math.floor(math.log10(statistics.median(spreads)))), MOST_DECIMALS)


def settings_in_words(settings: Mapping[str, Any]) -> str:
    """Return `lr 0.02, wd 0.1`."""
    return ", ".join(f"{name} {setting(value)}" for name, value in settings.items())


def in_steps(x: float | None) -> str:
    """Return a number of steps or epochs: a large one whole."""
    return brief(x) if x is None or abs(x) < 100 else f"{x:,.0f}"


def p_value(p: float | None) -> str:
    """Return a p-value with two digits; a tiny one as a bound."""
    if p is None:
        return NOTHING
    if p < 1e-4:
        return "< 0.0001"
    return f"{p:.2g}" if p < 0.095 else f"{p:.2f}"

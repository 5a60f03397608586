"""Where the intervals of a table lie on a drawn axis."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ebc_lab.records.decisions import Difference
from ebc_lab.study.stages.statistics import by_interval, centre_of

from ..text.table import Table


def draw_intervals(table: Table) -> Table:
    """Return a table with its intervals drawn on one axis; the table itself where it has none."""
    shown = [by_interval(c.interval, joint=True) for row in table.rows for c in row.cells if c.interval]
    if not shown:
        return table
    ruler = Ruler.over(shown, table.target, table.higher)
    rows = []
    for row in table.rows:
        cells = [
            replace(c, drawing=ruler.place(by_interval(c.interval, joint=True))) if c.interval else c
            for c in row.cells
        ]
        rows.append(replace(row, cells=cells))
    return replace(table, rows=rows)


class Ruler:
    """Where paired differences lie on an axis 240 wide, zero in its middle; what lies beyond is cut off."""

    WIDTH, EDGE = 240.0, 8.0

    def __init__(self, reach: float, margin: float | None, higher: bool = False):
        """`margin`: how far from zero still counts as no worse; `higher`: whether more is better."""
        self.reach = reach
        self.higher = higher
        self.zero = self.x(0.0)
        self.target = None if margin is None else self.x(-margin if higher else margin)
        edge = self.target or self.zero
        self.worse = (0.0, edge) if higher else (edge, round(self.WIDTH - edge, 1))  # from where, how wide

    @classmethod
    def over(cls, differences: Sequence[Difference], margin: float | None, higher: bool = False) -> Ruler:
        """Return an axis that shows most intervals whole: one wild arm does not squash the others."""
        limits = ((d["low"], d["high"], d["mean"]) for d in differences)
        largest = (max((abs(x) for x in ends if x is not None), default=0.0) for ends in limits)
        sizes = [size for size in largest if size > 0]
        reach = min(max(sizes), 1.5 * statistics.median(sizes)) if sizes else 1.0
        return cls(1.1 * max(reach, 2 * (margin or 0.0)), margin, higher)

    def x(self, value: float) -> float:
        share = max(-1.0, min(1.0, value / self.reach))
        return round(self.WIDTH / 2 + share * (self.WIDTH / 2 - self.EDGE), 1)

    def place(self, d: Difference) -> dict[str, Any] | None:
        """Return the ends of the interval and its middle on the axis; None where there is no interval."""
        low, high, middle = d.get("low"), d.get("high"), centre_of(d)
        if low is None and high is None:
            return None
        ends = (-math.inf if low is None else low, math.inf if high is None else high)
        side = "both"
        if ends[1] < 0:
            side = "worse" if self.higher else "better"
        elif ends[0] > 0:
            side = "better" if self.higher else "worse"
        return {
            "low": self.x(ends[0]),
            "high": self.x(ends[1]),
            "middle": None if middle is None or abs(middle) > self.reach else self.x(middle),
            "cut_low": ends[0] < -self.reach,
            "cut_high": ends[1] > self.reach,
            "side": side,
            "ruler": self,
        }

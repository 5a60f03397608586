"""Where each unit's best constant lies in each setting, in octaves from the usual setting's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ebc_lab.records.decisions import UnitCurve, UnitFound, UnitsTrack

from ..sheet.figure import GREY, INK, SMALL, Facts, Sheet, entry, page
from ..sheet.place import key, name_rows
from . import called, looks_of, seeds_of

ROW = 0.5  # inches; the names at a row's ends stand in between
NAMED = 2  # of the settings at one end of a row
MARKS = {None: "o", "low": "<", "high": ">", "both": "D"}  # by the edge that a best constant lies on


def draw_optima(facts: Facts, track: UnitsTrack) -> Sheet | None:
    """A row for each arm, a mark for each setting's best constant; the outermost ones are named."""
    spread = {arm: found for arm, found in track["arms"].items() if found["octaves"] is not None}
    if not spread:
        return None
    order = sorted(spread, key=lambda arm: (spread[arm]["octaves"] or 0.0, arm))
    settings = track["settings"]
    usual = next(iter(settings))
    what = "How far does the best constant move from setting to setting?"
    whom = "Each setting's best constant, by validation loss, in octaves from that of "
    whom += called(settings, usual)
    least, most = (f"{called(spread, arm)}: {_in_words(spread[arm])}" for arm in (order[0], order[-1]))
    finding = f"Least: {least}; most: {most}."
    size = (10.0, 2.6 + ROW * len(order))
    figure, axes = page(facts, what, whom, finding, seeds_of(track), (), "", size)
    axes.set_xlabel(f"octaves from the best constant in {called(settings, usual)}")
    axes.axvline(0, color=INK, lw=1.0)
    key(
        axes,
        [
            entry("a setting's best", GREY, marker="o", ls="", ms=6),
            entry("on the edge of what was tried", GREY, marker=">", ls="", ms=6),
        ],
    )
    looks = looks_of(track)
    name_rows(axes, [called(spread, arm) for arm in order])
    for row, arm in enumerate(order):
        at = octaves_from(spread[arm]["curves"], usual)
        colour = looks[arm][0]
        axes.plot([min(at.values()), max(at.values())], [row] * 2, color=colour, lw=1.4, alpha=0.5)
        for setting, octaves in at.items():
            mark = MARKS[spread[arm]["curves"][setting]["edge"]]
            axes.plot(octaves, row, mark, color=colour, ms=6, alpha=0.6)
        # points: the names of the lowest stand above the row, those of the highest below
        for end, side, away in ((min(at.values()), "bottom", 5), (max(at.values()), "top", -5)):
            if end != 0 and not facts.phone:
                names = _few([called(settings, name) for name, octaves in at.items() if octaves == end])
                place: dict[str, Any] = {"xytext": (0, away), "textcoords": "offset points", "ha": "center"}
                axes.annotate(names, (end, row), va=side, size=SMALL, color=GREY, **place)
    axes.margins(x=0.3)
    return figure


def octaves_from(curves: Mapping[str, UnitCurve], usual: str) -> dict[str, float]:
    """Return how far each setting's best constant lies from that of the usual one, or of the first that has
    one."""
    best = {name: curve["best"] for name, curve in curves.items() if curve["best"] is not None}
    origin = best.get(usual) or next(iter(best.values()))
    return {name: math.log2(value / origin) for name, value in best.items()}


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _in_words(found: UnitFound) -> str:
    return f"{'at least ' * found['open']}{found['octaves'] or 0.0:.1f} octaves"

"""A study that carries one constant of each unit to settings that it was not chosen on: what each unit loses
there, and where its best constant lies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ebc_lab.records.decisions import UnitCurve, UnitFound, UnitSetting, UnitsTrack

from ..text.words import capital, plural, signed
from .drawing.looks import GREY, INK, SMALL, Look, assign_looks
from .drawing.sheet import Facts, Sheet, entry, name_rows

ROW = 0.3  # inches of a setting
TALL_ROW = 0.5  # inches of a row whose ends are named
NAMED = 2  # of the settings at one end of a row
BEYOND = 0.05  # share of the marks that the axis may leave out: a broken run must not squash the rest
APART = 0.05  # of a row, between the arms of a setting, so that equal ones are seen
MARKS = {None: "o", "low": "<", "high": ">", "both": "D"}  # by the edge that a best constant lies on


def looks_of(track: UnitsTrack) -> dict[str, Look]:
    return assign_looks(track["arms"], track["challengers"], track["reference"])


def by_excess(track: UnitsTrack) -> list[str]:
    """Return the arms that were judged, the one that carries best first."""
    judged = {arm: found["excess"] for arm, found in track["arms"].items() if found["excess"] is not None}
    return sorted(judged, key=lambda arm: (judged[arm], arm))


def seeds_of(track: UnitsTrack) -> str:
    tests = [len(one["test"]) for found in track["arms"].values() for one in found["carried"].values()]
    return plural(max(tests, default=0), "seed")


def name_in_words(named: Mapping[str, UnitFound] | Mapping[str, UnitSetting], name: str) -> str:
    """Return what an arm or a setting is, in the study's words."""
    return named[name]["about"] or name


# -- what is lost --------------------------------------------------------------------------------------------


def draw_excess(facts: Facts, track: UnitsTrack) -> Sheet | None:
    """Draw a row for each setting, a mark for each arm at its excess test loss there."""
    order, settings = by_excess(track), track["settings"]
    if not order:
        return None
    whom = "Test loss at the constant chosen on the other settings, minus that of the setting's best arm at "
    sheet = Sheet(
        facts,
        "What does a constant lose in a setting that it was not chosen on?",
        (f"{whom}its best constant; mean of the seeds", _excess_finding(track, order)),
        (seeds_of(track),),
        heights=(1.2 + ROW * len(settings),),
    )
    [axes] = sheet.panels
    looks = looks_of(track)
    every = [one["excess"] for found in track["arms"].values() for one in found["carried"].values()]
    axes.set_xlabel("excess, nats per token (left is better)")
    axes.axvline(0, color=INK, lw=1.0)
    kept = {name: " (kept)" * setting["kept"] for name, setting in settings.items()}
    name_rows(axes, [name_in_words(settings, name) + kept[name] for name in settings])
    end, low = _end(every), min(0.0, *every)
    axes.set_xlim(low - 0.03 * (end - low), end + 0.03 * (end - low))
    for i, arm in enumerate(order):
        label = _with_excess(track, arm) + ", worst start" * track["arms"][arm].get("starts", False)
        sheet.key(entry(label, looks[arm].colour, marker=looks[arm].marker, ls="", ms=6))
        above = APART * (i - (len(order) - 1) / 2)
        for row, name in enumerate(settings):
            if one := track["arms"][arm]["carried"].get(name):
                beyond = one["excess"] > end
                place = (min(one["excess"], end), row + above, ">" if beyond else looks[arm].marker)
                axes.plot(*place, color=looks[arm].colour, ms=6, alpha=1.0 if beyond else 0.85)
    if max(every) > end:
        sheet.key(entry("beyond the axis", GREY, marker=">", ls="", ms=6))
    return sheet


def _excess_finding(track: UnitsTrack, order: Sequence[str]) -> str:
    best = track["arms"][order[0]]
    at_worst = ""
    if worst := best["worst"]:
        most = signed(best["carried"][worst]["excess"], 3)
        at_worst = f" (at worst {most}, {name_in_words(track['settings'], worst)})"
    rival = track["reference"]
    other = f"; {_with_excess(track, rival)}" if rival in order[1:] else ""
    return f"{capital(_with_excess(track, order[0]))} on average, the least{at_worst}{other}"


def _with_excess(track: UnitsTrack, arm: str) -> str:
    return f"{name_in_words(track['arms'], arm)}: {signed(track['arms'][arm]['excess'], 3)}"


def _end(every: Sequence[float]) -> float:
    ranked = sorted(every)
    within = ranked[math.ceil((1 - BEYOND) * len(ranked)) - 1]
    return max(0.02, min(1.25 * within, ranked[-1]))


# -- where the best constants lie ----------------------------------------------------------------------------


def draw_optima(facts: Facts, track: UnitsTrack) -> Sheet | None:
    """Draw a row for each arm, a mark for each setting's best constant; the outermost ones are named."""
    spread = {arm: found for arm, found in track["arms"].items() if found["octaves"] is not None}
    if not spread:
        return None
    order = sorted(spread, key=lambda arm: (spread[arm]["octaves"] or 0.0, arm))
    settings, looks = track["settings"], looks_of(track)
    usual = next(iter(settings))
    least, most = (
        f"{name_in_words(spread, arm)}: {_octaves_in_words(spread[arm])}" for arm in (order[0], order[-1])
    )
    whom = "Each setting's best constant, by validation loss, in octaves from that of "
    sheet = Sheet(
        facts,
        "How far does the best constant move from setting to setting?",
        (whom + name_in_words(settings, usual), f"Least: {least}; most: {most}"),
        (seeds_of(track),),
        heights=(1.2 + TALL_ROW * len(order),),
    )
    [axes] = sheet.panels
    axes.set_xlabel(f"octaves from the best constant in {name_in_words(settings, usual)}")
    axes.axvline(0, color=INK, lw=1.0)
    sheet.key(entry("a setting's best", GREY, marker="o", ls="", ms=6))
    sheet.key(entry("on the edge of what was tried", GREY, marker=">", ls="", ms=6))
    name_rows(axes, [name_in_words(spread, arm) for arm in order])
    for row, arm in enumerate(order):
        at = octaves_from(spread[arm]["curves"], usual)
        ends, colour = (min(at.values()), max(at.values())), looks[arm].colour
        axes.plot(ends, [row] * 2, color=colour, lw=1.4, alpha=0.5)
        for setting, octaves in at.items():
            mark = MARKS[spread[arm]["curves"][setting]["edge"]]
            axes.plot(octaves, row, mark, color=colour, ms=6, alpha=0.6)
        for end, side, points in zip(ends, ("bottom", "top"), (5, -5), strict=True):
            if end != 0 and not facts.narrow:
                names = [name_in_words(settings, name) for name, octaves in at.items() if octaves == end]
                look: dict[str, Any] = {"va": side, "ha": "center", "size": SMALL, "color": GREY}
                axes.annotate(_few(names), (end, row), (0, points), textcoords="offset points", **look)
    axes.margins(x=0.1 if facts.narrow else 0.3)
    return sheet


def octaves_from(curves: Mapping[str, UnitCurve], usual: str) -> dict[str, float]:
    """Return how far each setting's best constant lies from the usual one's, or else from the first there."""
    best = {name: curve["best"] for name, curve in curves.items() if curve["best"] is not None}
    origin = best.get(usual) or next(iter(best.values()))
    return {name: math.log2(value / origin) for name, value in best.items()}


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _octaves_in_words(found: UnitFound) -> str:
    return f"{'at least ' * found['open']}{found['octaves'] or 0.0:.1f} octaves"

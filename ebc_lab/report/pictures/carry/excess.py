"""What each unit loses in each setting when its constant is carried there, and how many of its runs broke."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from ebc_lab.records.decisions import BrokenRuns, UnitsTrack

from ...text.words import capital, signed
from ..sheet.figure import EBC, GREY, INK, Facts, Sheet, entry, page
from ..sheet.place import key, name_rows
from ..suite.windows import Look
from . import by_excess, called, looks_of, seeds_of

ROW = 0.3  # inches
BEYOND = 0.05  # share of the marks that the axis may leave out: a broken run must not squash the rest
BESIDE = 0.05  # of a row, between the arms of a setting, so that equal ones are seen


def draw_excess(facts: Facts, track: UnitsTrack) -> Sheet | None:
    """A row for each setting, a mark for each arm at its excess test loss there."""
    order = by_excess(track)
    if not order:
        return None
    settings = list(track["settings"])
    what = "What does a constant lose in a setting that it was not chosen on?"
    whom = "Test loss at the constant chosen on the other settings, minus that of the setting's best arm at "
    whom += "its best constant; mean of the seeds"
    figure, axes = page(
        facts, what, whom, _finding(track, order), seeds_of(track), (), "", (10.0, 2.8 + ROW * len(settings))
    )
    looks = looks_of(track)
    axes.set_xlabel("excess, nats per token (left is better)")
    axes.axvline(0, color=INK, lw=1.0)
    key(axes, _key(track, order, looks))
    name_rows(axes, [_row(track, name) for name in settings])
    end = _end(track)
    low = min(0.0, *_all(track))
    axes.set_xlim(low - 0.03 * (end - low), end + 0.03 * (end - low))
    for i, arm in enumerate(order):
        above = BESIDE * (i - (len(order) - 1) / 2)
        for row, name in enumerate(settings):
            if name in track["arms"][arm]["carried"]:
                _mark(axes, track["arms"][arm]["carried"][name]["excess"], row + above, end, looks[arm])
    return figure


def _finding(track: UnitsTrack, order: Sequence[str]) -> str:
    best = track["arms"][order[0]]
    at_worst = ""
    if worst := best["worst"]:
        most = signed(best["carried"][worst]["excess"], 3)
        at_worst = f" (at worst {most}, {called(track['settings'], worst)})"
    rival = track["reference"]
    beside = f"; {_with_excess(track, rival)}" if rival in order[1:] else ""
    return f"{capital(_with_excess(track, order[0]))} on average, the least{at_worst}{beside}."


def _with_excess(track: UnitsTrack, arm: str) -> str:
    return f"{called(track['arms'], arm)}: {signed(track['arms'][arm]['excess'], 3)}"


def _key(track: UnitsTrack, order: Sequence[str], looks: Mapping[str, Look]) -> list[object]:
    handles: list[object] = []
    for arm in order:
        colour, marker, _ = looks[arm]
        label = _with_excess(track, arm) + ", worst start" * track["arms"][arm].get("starts", False)
        handles.append(entry(label, colour, marker=marker, ls="", ms=6))
    if max(_all(track)) > _end(track):
        handles.append(entry("beyond the axis", GREY, marker=">", ls="", ms=6))
    return handles


def _row(track: UnitsTrack, name: str) -> str:
    return called(track["settings"], name) + " (kept)" * track["settings"][name]["kept"]


def _all(track: UnitsTrack) -> list[float]:
    return [one["excess"] for found in track["arms"].values() for one in found["carried"].values()]


def _end(track: UnitsTrack) -> float:
    ranked = sorted(_all(track))
    within = ranked[math.ceil((1 - BEYOND) * len(ranked)) - 1]
    return max(0.02, min(1.25 * within, ranked[-1]))


def _mark(axes: Axes, excess: float, row: float, end: float, look: Look) -> None:
    colour, marker, _ = look
    if excess > end:
        axes.plot(end, row, ">", color=colour, ms=6)
    else:
        axes.plot(excess, row, marker, color=colour, ms=6, alpha=0.85)


# -- broken runs ---------------------------------------------------------------------------------------------


def draw_broken(facts: Facts, track: UnitsTrack) -> Sheet | None:
    """A row for each arm: the share of its runs that broke, at carried constants and at all of its grid."""
    order = by_excess(track)
    if not order:
        return None
    arms = track["arms"]
    what = "Which units break runs?"
    whom = f"Share of runs that diverged, or ended more than {track['broken']:g} nats above their setting's "
    whom += "median"
    most = max(order, key=lambda arm: _share(arms[arm]["broken"]))
    least = min(order, key=lambda arm: _share(arms[arm]["broken"]))
    ends = (f"{called(arms, arm)}: {_count(arms[arm]['broken'])}" for arm in (least, most))
    finding = f"At carried constants, {'; '.join(ends)}."
    size = (10.0, 2.6 + ROW * len(order))
    figure, axes = page(facts, what, whom, finding, seeds_of(track), (), "", size)
    axes.set_xlabel("share of runs (left is better)")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    key(
        axes,
        [
            entry("at the carried constants", EBC, marker="o", ls="", ms=6),
            entry("at all constants of the grid", GREY, marker="s", ls="", ms=5),
        ],
    )
    name_rows(axes, [called(arms, arm) for arm in order])
    for row, arm in enumerate(order):
        axes.plot(_share(arms[arm]["broken_anywhere"]), row, "s", color=GREY, ms=5)
        axes.plot(_share(arms[arm]["broken"]), row, "o", color=EBC, ms=6)
    axes.set_xlim(left=-0.005)
    return figure


def _share(runs: BrokenRuns) -> float:
    return runs["broken"] / max(1, runs["runs"])


def _count(runs: BrokenRuns) -> str:
    return f"{runs['broken']} of {runs['runs']}"

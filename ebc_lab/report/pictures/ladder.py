"""A ladder: the loss of each arm over the compute of a run, and how far the compared arms lie apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes

from ebc_lab.config.schema import BASE
from ebc_lab.records.decisions import Climb, LadderTrack
from ebc_lab.study.stages.ladder import asked
from ebc_lab.study.stages.statistics import centre_of

from ..kinds.ladder import by_compute, ladder_in_words, sentence_of
from ..text.words import plural, signed
from .drawing.looks import INK
from .drawing.sheet import Facts, Sheet, entry, log_axis

APART = 1.06  # factor between marks at the same compute
BAR: dict[str, Any] = {"capsize": 2.5, "elinewidth": 1.0, "ls": ""}


def draw_ladder(facts: Facts, track: LadderTrack) -> Sheet | None:
    """Draw each arm's test loss on every rung, and below it the differences with their trend."""
    climbs, rungs = asked(track), track["rungs"]
    labels = list(dict.fromkeys(label for rung in rungs.values() for label in rung["arms"]))
    if not climbs or not labels:
        return None
    places = _places(track)
    lost = [f"{label} on {name}" for name in places for label in labels if _loss(track, name, label) is None]
    sheet = Sheet(
        facts,
        sentence_of(track),
        (f"Test loss on {ladder_in_words(track)}", *(climb["sentence"] for climb in climbs)),
        (
            plural(max(len(arm["runs"]) for rung in rungs.values() for arm in rung["arms"].values()), "seed"),
            "bars above: standard deviation; below: joint intervals, and the trend; below zero is better",
        ),
        f"no test loss: {', '.join(lost)}" if lost else "",
        grid=("a", "b"),
        heights=(3.2, 2.8),
    )
    losses, differences = sheet.panels
    for axes in sheet.panels:
        _name_rungs(axes, track, places)
    losses.set_ylabel("test loss, nats per token")
    for label in labels:
        _draw_losses(sheet, facts, track, label, places)
    differences.axhline(0, color=INK, lw=1.0)
    differences.set_ylabel("difference, nats per token")
    differences.set_xlabel("compute of a run, over that on base (log scale)")
    for nth, climb in enumerate(climbs):
        shift = APART ** (nth - (len(climbs) - 1) / 2)
        _draw_climb(sheet, facts, track, climb, {name: x * shift for name, x in places.items()})
    return sheet


def _loss(track: LadderTrack, rung: str, label: str) -> float | None:
    arm = track["rungs"][rung]["arms"].get(label)
    return arm["test_loss"] if arm else None


def _places(track: LadderTrack) -> dict[str, float]:
    """Return where each rung stands: its compute over that of base; those of one compute a little apart."""
    rungs = track["rungs"]
    times = {name: rungs[name]["compute"] / rungs[BASE]["compute"] for name in by_compute(track)}
    places = {}
    for name, x in times.items():
        alike = [other for other in times if math.isclose(times[other], x, rel_tol=0.01)]
        places[name] = x * APART ** (2 * alike.index(name) - len(alike) + 1)
    return places


def _name_rungs(axes: Axes, track: LadderTrack, places: Mapping[str, float]) -> None:
    """Name the rungs under their points; those that stand side by side in one label."""
    log_axis(axes, "x")
    groups: dict[float, list[str]] = {}
    for name, x in places.items():
        near = next((at for at in groups if x / at < APART**3), x)
        groups.setdefault(near, []).append(name)
    ticks = {fmean(places[name] for name in names): names for names in groups.values()}
    words = ["\n".join([*names, f"×{x:.3g}"]) for x, names in ticks.items()]
    axes.set_xticks([*ticks], words)
    axes.set_xlim(min(places.values()) / 1.3, max(places.values()) * 1.3)


def _draw_losses(
    sheet: Sheet, facts: Facts, track: LadderTrack, label: str, places: Mapping[str, float]
) -> None:
    axes, look = sheet.panels[0], facts.look(label)
    known = [name for name in by_compute(track) if _loss(track, name, label) is not None]
    if not known:
        return
    arms = [track["rungs"][name]["arms"][label] for name in known]
    x, y = [places[name] for name in known], [arm["test_loss"] or 0.0 for arm in arms]
    spread = [arm["test_sd"] or 0.0 for arm in arms]
    axes.errorbar(x, y, spread, color=look.colour, marker=look.marker, ms=5, **BAR)
    axes.plot(x, y, color=look.colour, ls=look.line, lw=1.2)
    mark = entry(label, look.colour, ls=look.line, lw=1.2, marker=look.marker, ms=5)
    sheet.label(axes, [(x[-1], y[-1], label, look.colour)], [mark])


def _draw_climb(
    sheet: Sheet, facts: Facts, track: LadderTrack, climb: Climb, places: Mapping[str, float]
) -> None:
    axes, look = sheet.panels[1], facts.look(climb["arm"])
    words = f"{climb['arm']} minus {climb['reference']}"
    for name, d in climb["rungs"].items():
        if (middle := centre_of(d)) is None:
            continue
        low, high = d["joint_low"], d["joint_high"]
        ends = [[middle - low if low is not None else 0.0], [high - middle if high is not None else 0.0]]
        axes.errorbar(places[name], middle, ends, color=look.colour, marker=look.marker, ms=5, **BAR)
    mark = entry(words, look.colour, ls="", marker=look.marker, ms=5)
    overall, trend = (d and centre_of(d) for d in (climb["overall"], climb["trend"]))
    if overall is None or trend is None:
        return sheet.key(mark)
    base = track["rungs"][BASE]["compute"]
    doublings = [math.log2(rung["compute"] / base) for rung in track["rungs"].values()]
    ends_of_line = (min(doublings), max(doublings))
    y = [overall + trend * (at - fmean(doublings)) for at in ends_of_line]
    axes.plot([2**at for at in ends_of_line], y, color=look.colour, ls=look.line, lw=1.2, alpha=0.8)
    words += f": {signed(trend)} per doubling"
    sheet.key(entry(words, look.colour, ls=look.line, marker=look.marker, ms=5))

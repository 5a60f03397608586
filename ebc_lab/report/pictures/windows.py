"""What a suite's sweeps show: the loss against the learning rate and against δ*, with each arm's window, and
the regrets of settings that were chosen at another size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from ebc_lab.study.stages.statistics import WINDOW_NATS, in_octaves
from ebc_lab.study.stages.suite import SAME_NATS

from ..text.words import largest_regrets, optimizer, regrets_of, rules_among
from .decisions import COLOURS, TRACKS
from .forest import missing, signed
from .sheet import (
    ALERT,
    EBC,
    GREY,
    INK,
    SEED,
    Facts,
    Sheet,
    another,
    beside,
    entry,
    key,
    log_axis,
    name_rows,
    page,
    stack,
)

Sweep = Mapping[str, Any]  # of one arm over one setting
Look = tuple[str, str, str]  # colour, marker, line
MOST_NATS = 1.0  # above the lowest loss: the axis ends there, and what lies higher leaves the frame
LABELS_FROM = 0.68  # of the width: the lines' labels stand beyond it
ROW = 0.26  # inches that one row of windows takes


def window_pictures(facts: Facts, track: str, found: Mapping[str, Any]) -> Iterator[tuple[str, Sheet]]:
    """(name, sheet) of what a track's sweeps and transfers show, where it has any."""
    sweeps = found.get("windows", {})
    of_rate = {name: own["lr_scale"] for name, own in sweeps.items() if "lr_scale" in own}
    of_delta = {name: own["delta"] for name, own in sweeps.items() if "delta" in own}
    if of_rate:
        yield "lr_windows", draw_rates(facts, track, found, of_rate)
    if of_delta:
        yield "delta_windows", draw_deltas(facts, track, found, of_delta)
    if found.get("transfer"):
        yield "transfer", draw_transfer(facts, track, found)


# -- sweeps
# ----------------------------------------------------------------------------------------------------------


def draw_rates(facts: Facts, track: str, found: Mapping[str, Any], sweeps: Mapping[str, Sweep]) -> Sheet:
    """Test loss against the learning rate, a line for each arm, and under it each arm's window as a bar."""
    what = "Over how many octaves of the learning rate does the loss stay near its best?"
    widest = max(sweeps, key=lambda name: _octaves(sweeps[name]))
    finding = f"Widest window: {widest}, {in_octaves(sweeps[widest]['window'])}"
    size = (10.4, 5.6 + ROW * len(sweeps))
    figure, bottom = _page(facts, track, found, sweeps, (what, finding), size)
    top = another(bottom)
    looks = _looks(list(sweeps), [name for name, own in sweeps.items() if own["points"][0]["delta_star"]])
    for axes in (top, bottom):
        log_axis(axes, "x")
    _draw_losses(top, sweeps, looks, "lr")
    bottom.set_xlim(top.get_xlim())
    top.tick_params(labelbottom=False)
    bottom.set_xlabel("learning rate at its peak (log scale)")
    _key(bottom, sweeps)
    rows = ROW * len(sweeps)
    stack((top, bottom), (max(1.0, figure.get_figheight() - 3.2 - rows), rows), 12, LABELS_FROM)
    _draw_windows(bottom, sweeps, looks)
    beside(top, _labels(sweeps, looks, "lr"))
    return figure


def draw_deltas(facts: Facts, track: str, found: Mapping[str, Any], sweeps: Mapping[str, Sweep]) -> Sheet:
    """Test loss against the δ* that runs start from, a line for each arm, a panel for each size of run."""
    shapes = list(dict.fromkeys(own["shape"] for own in sweeps.values()))
    what = "How much does the δ* that a run starts from matter?"
    judged = rules_among(sweeps)
    good = [name for name, own in judged.items() if own["every_start"]]
    finding = (
        f"Every start ends within {SAME_NATS:g} nats of the best fixed δ*: {', '.join(good) or 'no rule'}"
    )
    if not judged:
        name, own = next(iter(sweeps.items()))
        finding = f"{name}: {in_octaves(own['window'])} of δ*"
    size = (10.4, 2.6 + 2.6 * len(shapes))
    figure, last = _page(facts, track, found, sweeps, (what, finding), size)
    panels = [*(another(last) for _ in shapes[1:]), last]
    last.set_xlabel("δ* at the start, nats per token (log scale)")
    _key(last, sweeps)
    if len(shapes) > 1:  # room for the first panel's title
        box = last.get_position()
        last.set_position((box.x0, box.y0, box.width, box.height - 16 / 72 / figure.get_figheight()))
    stack(panels, [1.0] * len(panels), 34, LABELS_FROM)
    for shape, axes in zip(shapes, panels, strict=True):
        own = {name: sweep for name, sweep in sweeps.items() if sweep["shape"] == shape}
        if len(shapes) > 1:
            axes.set_title(shape or "the usual length", loc="left", size=9.5, color=INK)
        log_axis(axes, "x")
        looks = _looks(list(own), list(own)[:1])
        _draw_losses(axes, own, looks, "delta_star")
        beside(axes, _labels(own, looks, "delta_star"))
    return figure


def _page(
    facts: Facts,
    track: str,
    found: Mapping[str, Any],
    sweeps: Mapping[str, Sweep],
    said: tuple[str, str],
    size: tuple[float, float],
) -> tuple[Sheet, Axes]:
    """The header of a picture of sweeps. `said`: what it shows, and what was found."""
    seeds = max(len(p["seeds"]) for own in sweeps.values() for p in own["points"])
    whom = f"{optimizer(track)}: test loss, mean of the seeds"
    arms = {p["arm"]: found["arms"][p["arm"]] for own in sweeps.values() for p in own["points"]}
    return page(facts, said[0], whom, f"{said[1]}.", seeds, (), missing(arms), size)


def _looks(names: Sequence[str], first: Sequence[str]) -> dict[str, Look]:
    """How each arm's line is drawn; those of `first` as EBC is."""
    others = itertools.cycle(look for look in TRACKS if look[0] != EBC)
    looks = {name: (EBC, "o", "-") if name in first else next(others) for name in names}
    return looks


def _octaves(own: Sweep) -> float:
    return own["window"]["octaves"] if own["window"] else -1.0


def _key(axes: Axes, sweeps: Mapping[str, Sweep]) -> None:
    handles = [
        entry("each seed", GREY, **SEED),
        entry(f"window: within {WINDOW_NATS:g} nats of the arm's own best", GREY, lw=5, alpha=0.35),
    ]
    if any(p["loss"] is None for own in sweeps.values() for p in own["points"]):
        handles.append(entry("a seed diverged", GREY, ls="", marker="x", ms=7, mew=1.8))
    key(axes, handles)


def _draw_losses(axes: Axes, sweeps: Mapping[str, Sweep], looks: Mapping[str, Look], x: str) -> None:
    """A line for each arm; where a seed diverged it is broken, and a cross stands at the top."""
    finite = [p["loss"] for own in sweeps.values() for p in own["points"] if p["loss"] is not None]
    low = min(finite, default=0.0)
    high = min(max(finite, default=1.0), low + MOST_NATS)
    room = max(high - low, 0.02)
    for i, (name, own) in enumerate(sweeps.items()):
        colour, marker, line = looks[name]
        at = [p[x] for p in own["points"]]
        losses = [math.nan if p["loss"] is None else p["loss"] for p in own["points"]]
        axes.plot(at, losses, color=colour, ls=line, lw=1.6, marker=marker, ms=4, zorder=2.5)
        for p in own["points"]:
            seeds = [loss for loss in p["seeds"].values() if loss is not None]
            axes.plot([p[x]] * len(seeds), seeds, color=colour, zorder=1.5, **SEED)
            if p["loss"] is None:
                top = axes.get_xaxis_transform()
                axes.plot(p[x], 0.97 - 0.03 * (i % 8), "x", color=colour, ms=7, mew=1.8, transform=top)
        if own["window"] and x == "delta_star":
            ends = [_at(own, x, own["window"][end]) for end in ("low", "high")]
            limit = own["window"]["loss"] + WINDOW_NATS
            axes.plot(ends, [limit] * 2, color=colour, lw=5, alpha=0.35, solid_capstyle="butt")
    axes.set_ylim(low - 0.06 * room, high + 0.12 * room)
    axes.set_ylabel("test loss (nats per token)")


def _at(own: Sweep, x: str, value: float) -> float:
    """Where a value of the swept setting stands on the axis: both are proportional."""
    first = own["points"][0]
    return float(first[x] * value / first["value"])


def _draw_windows(axes: Axes, sweeps: Mapping[str, Sweep], looks: Mapping[str, Look]) -> None:
    """A bar for each arm from one end of its window to the other, an arrow where it goes on."""
    axes.grid(axis="y", visible=False)
    axes.set(yticks=[], ylim=(len(sweeps) - 0.5, -0.5), ylabel="windows")
    ends = []
    for row, (name, own) in enumerate(sweeps.items()):
        colour = looks[name][0]
        span = own["window"]
        last = own["points"][-1]["lr"]
        if span:
            low, high = (_at(own, "lr", span[end]) for end in ("low", "high"))
            axes.plot([low, high], [row] * 2, color=colour, lw=5, alpha=0.35, solid_capstyle="butt")
            axes.plot(_at(own, "lr", span["best"]), row, "|", color=colour, ms=8, mew=2)
            for there, edge, marker in ((span["open_low"], low, "<"), (span["open_high"], high, ">")):
                if there:
                    axes.plot(edge, row, marker, color=colour, ms=6)
            last = high
        ends.append((last, float(row), f"{name}  {in_octaves(span)}", colour))
    beside(axes, ends)


def _labels(
    sweeps: Mapping[str, Sweep], looks: Mapping[str, Look], x: str
) -> list[tuple[float, float, str, str]]:
    """Of each line, beside its last finite point: its arm, and what was found of it."""
    ends = []
    for name, own in sweeps.items():
        points = [p for p in own["points"] if p["loss"] is not None]
        if points:
            said = _found_of_rate(own) if x == "lr" else _found_of_delta(name, own)
            ends.append((points[-1][x], points[-1]["loss"], f"{name}  {said}", looks[name][0]))
    return ends


def _found_of_rate(own: Sweep) -> str:
    regret = own["regret_x4"]
    further = f", {signed(regret)} at ×4 of it" if regret is not None else ""
    return f"best {own['window']['loss']:.3f}{further}"


def _found_of_delta(name: str, own: Sweep) -> str:
    said = in_octaves(own["window"])
    if own.get("yardstick") in (None, name):
        return said
    return f"worst start {signed(own['worst'])}" if own["worst"] is not None else "a start diverged"


# -- transfer
# --------------------------------------------------------------------------------------------------------


def draw_transfer(facts: Facts, track: str, found: Mapping[str, Any]) -> Sheet:
    """The regret of each arm that kept its settings, at each size, beside the plain optimizer tuned there."""
    arms = found["arms"]
    rows = [(size, label) for size in found["transfer"] for label in size["kept"]]
    seeds = max(len(arms[label]["runs"]) for _, label in rows)
    whom = f"{optimizer(track)}: test loss minus that of the plain optimizer tuned again at that size"
    height = 2.6 + 0.42 * len(rows)
    shown = {label: arms[label] for _, label in rows}
    what = "Do settings that were chosen at one size serve at another?"
    said = _worst_regrets(found)
    figure, axes = page(facts, what, whom, said, seeds, (), missing(shown), (10.4, height))
    axes.set_xlabel("regret, nats per token (left is better)")
    axes.grid(axis="y", visible=False)
    axes.axvline(0, color=INK, lw=1.0)
    key(axes, _transfer_key(rows, arms))
    name_rows(axes, [arms[label]["about"] for _, label in rows])
    for row, (_, label) in enumerate(rows):
        _draw_regret(axes, row, arms[label])
    return figure


def _worst_regrets(found: Mapping[str, Any]) -> str:
    """The largest mean regret with EBC and of the plain optimizer."""
    told = []
    worst = largest_regrets(regrets_of(found), found["arms"])
    for words, ebc in (("EBC", True), ("the plain optimizer", False)):
        if ebc in worst:
            label, regret = worst[ebc]
            told.append(f"of {words} {signed(regret)} ({label})")
    return f"Largest regret {', '.join(told)}." if told else "No regret is known."


def _transfer_key(rows: Sequence[tuple[Any, str]], arms: Mapping[str, Any]) -> list[Any]:
    handles = [
        entry(words, colour, marker=marker, ls="-", lw=1.6)
        for words, ebc, colour, marker in (("EBC", True, EBC, "o"), ("plain", False, COLOURS[0], "s"))
        if any(bool(arms[label]["ebc"]) == ebc for _, label in rows)
    ]
    return [*handles, entry("its own 95% interval", GREY, lw=1.6)]


def _draw_regret(axes: Axes, row: int, arm: Mapping[str, Any]) -> None:
    difference = arm["difference"] or {}
    colour, marker = (EBC, "o") if arm["ebc"] else (COLOURS[0], "s")
    if difference.get("mean") is None:
        told = "diverged" if difference.get("diverged") else "no pair of seeds"
        axes.text(0.5, row, told, transform=axes.get_yaxis_transform(), color=ALERT, size=8, va="center")
        return
    if difference["low"] is not None:
        axes.plot([difference["low"], difference["high"]], [row] * 2, color=colour, lw=1.6)
    axes.plot(difference["mean"], row, marker, color=colour, ms=6)

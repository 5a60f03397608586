"""Decisions on the learning rate and on δ*: the sweep without EBC, the LR scales, the effective step, the
calibration."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from ebc_lab.study.stages.lr_sweep.fair_control import schedule_in_words
from ebc_lab.study.stages.statistics import WINDOW_NATS, in_octaves

from ..text.words import optimizer, schedules
from .sheet.figure import (
    ALERT,
    EBC,
    GOAL,
    GREY,
    INK,
    OTHER,
    PLAIN,
    ROUNDED,
    SEED,
    SMALL,
    SPARE,
    End,
    Facts,
    Sheet,
    another,
    entry,
    log_axis,
    page,
    say_of_band,
    tick,
)
from .sheet.place import beside, columns, key, keys, lowered, narrowed, stack

Rows = Sequence[Mapping[str, Any]]
Look = tuple[str, str, str]  # colour, marker, line

LR_ARMS = {  # role -> label, colour, marker, line, horizontal shift that keeps error bars apart
    "none": ("without EBC", PLAIN, "s", "--", 0.985),
    "ebc": ("with EBC", EBC, "o", "-", 1.015),
    "surrogate_x1": ("with EBC at ×1 (measures S)", SPARE, "v", ":", 1.0),
    "fixed_tau": ("with a fixed trust radius τ", OTHER, "D", "-.", 1.0),
}
UNKNOWN = ("v", ":")
COLOURS = (PLAIN, ALERT, GOAL, "C5", "C4", "C6", EBC, "black")
TRACKS = tuple(zip(COLOURS, "osDv^P*X", ("-", "--", "-.", ":") * 2, strict=True))
BUDGETS = ((EBC, "o", "-"), (OTHER, "D", "-."), (SPARE, "v", "--"), (PLAIN, "s", ":"))
LEAST_GAP = 0.06  # of the axis, between two ticks with labels
FEW = 4  # lines: they have their names at their ends
NAMES_FROM = 0.76  # of the width: the lines' names stand beyond it
RING: dict[str, Any] = {"marker": "o", "color": ALERT, "ms": 13, "mfc": "none", "mew": 1.6, "ls": ""}
ADDED: dict[str, Any] = {"ls": "", "mfc": "white", "mew": 1.5, "zorder": 3}
SQUARE: dict[str, Any] = {**RING, "marker": "s", "ms": 12, "color": INK}
FOOT = 0.11  # of the axes' height, for each LR window
MOST_TIMES = 2.0  # as far from the best loss as the baseline's, or the median: a higher one is off the axis
RATES = (1.0, 2.0, 4.0)  # ticks of a decade


def whole(row: Mapping[str, Any]) -> bool:
    return row["outcome"] == "completed" and row["val_loss"] is not None


def by_track(rows: Rows, tracks: Sequence[str]) -> dict[str, list[Mapping[str, Any]]]:
    """A stage's candidates by track: the first two words of their arm's name."""
    of_track = {track: [row for row in rows if row["arm"].startswith(f"{track}_")] for track in tracks}
    return {track: track_rows for track, track_rows in of_track.items() if track_rows}


def column(rows: Rows, name: str) -> list[Any]:
    return [row[name] for row in rows]


def seeds_in_words(rows: Rows) -> str:
    return ", ".join(sorted({str(row["seed"]) for row in rows}))


def ticks_at(axes: Axes, values: Sequence[float], labels: Sequence[str]) -> None:
    """Ticks of a log x axis at the values that were tried, except where a label would run into the one
    before."""
    low, high = np.log(axes.get_xlim())
    shown: list[int] = []
    for i, value in enumerate(values):
        if not shown or np.log(value / values[shown[-1]]) > LEAST_GAP * (high - low):
            shown.append(i)
    axes.set_xticks([values[i] for i in shown], [labels[i] for i in shown])


def crosses(axes: Axes, rows: Rows, x: str, colour: str, height: float, ceiling: float = math.inf) -> bool:
    """Near the top: runs that did not complete as crosses with their outcome, and those above the `ceiling`
    as arrows with their loss. -> whether there were any."""
    broken = [row for row in rows if not whole(row) or row["val_loss"] > ceiling]
    top = axes.get_xaxis_transform()
    for row in broken:
        mark = "^" if whole(row) else "x"
        axes.plot(row[x], height, mark, color=colour, ms=9, mew=2.2, transform=top)
        side = -1 if row[x] == max(column(rows, x)) else 1  # the last one's words stay on the page
        note = axes.annotate(
            f"{row['val_loss']:.3f}" if whole(row) else str(row["outcome"]),
            (row[x], height),
            xycoords=top,
            xytext=(7 * side, 0),
            textcoords="offset points",
        )
        note.set(color=colour, size=SMALL, va="center", ha="left" if side > 0 else "right")
    return bool(broken)


def make_room(axes: Axes, rows_of_crosses: int) -> None:
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.05 * (high - low), high + (0.05 + 0.12 * rows_of_crosses) * (high - low))


def bars(axes: Axes, x: Sequence[float], rows: Rows, colour: str) -> None:
    """The standard errors of the validation losses."""
    errors = [row["val_se"] or 0 for row in rows]
    axes.errorbar(x, column(rows, "val_loss"), errors, fmt="none", ecolor=colour, elinewidth=1)


# -- 1. the sweep without EBC --------------------------------------------------------------------------------


def draw_lr_sweep(facts: Facts, decision: Mapping[str, Any]) -> Sheet:
    """Validation loss by learning rate of the plain optimizers: left the grid of each, right the kept ones at
    full length, at constant rates with replicates, and on the schedules that the control was sought among."""
    rows, winners = decision["candidates"], decision["tracks"]
    grids = by_track(rows, [pair["track"] for pair in decision["pairs"]])
    edges = [
        f"{optimizer(t)}'s best constant rate is the {d['edge']}est" for t, d in winners.items() if d["edge"]
    ]
    plainly = " without EBC" if facts.ebc else ""
    whose = ", ".join(optimizer(track) for track in grids)
    whom = "; ".join((f"{whose},{plainly}" if plainly else whose, *edges))
    seeds = len({row["seed"] for row in rows})
    grid_seeds = seeds_in_words([row for row in rows if row["role"] == "grid"])
    small = (f"stage lr_sweep, grid with seed {grid_seeds}", "bars: ± s.e.")
    what = f"Which learning rate is best{plainly}, constant and on a schedule?"
    lines = sum(1 + len({_schedule_of(point) for point in d["control"]["grid"]}) for d in winners.values())
    size = (8.6, 5.4 + 0.2 * (lines + 3))  # the key needs the room
    figure, left = page(facts, what, whom, _sweep_finding(winners), seeds, small, size=size)
    of_grid = _draw_grids(left, facts, grids, winners)
    right = another(left)
    looks = itertools.cycle(TRACKS)
    low, ceiling = _framed(rows, winners)
    of_long: list[Any] = []
    for track in winners:
        whose = f"{optimizer(track)}, " if len(winners) > 1 else ""
        of_long += _draw_long(right, grids.get(track, []), winners[track], whose, looks, ceiling)
    if math.isfinite(ceiling):
        right.set_ylim(low - 0.1 * (ceiling - low), ceiling)
    make_room(right, 1)
    of_long.append(entry("each replicate seed", **SEED))
    of_long.append(entry("best constant rate" + ": the baseline from here on" * (not facts.arms), **RING))
    of_long.append(entry("best on a schedule" + ": the fair control" * (not facts.arms), **SQUARE))
    steps = [f", {n:,} steps" if n else "" for n in facts.sweep_steps]
    left.set_xlabel(f"learning rate (log scale): the grid{steps[0]}")
    right.set_xlabel(f"learning rate (log scale): around its best{steps[1]}")
    left.set_ylabel("validation loss (nats per token)")
    ends = _ends_of(of_grid) if len(grids) <= FEW and not facts.phone else []
    columns((left, right), 110 if ends else 34)
    of_grid = of_grid[len(ends) :]
    keys((left, right), [list({h.get_label(): h for h in own}.values()) for own in (of_grid, of_long)])
    for axes in (left, right):
        shown = [row for row in rows if (row["role"] == "grid") == (axes is left)]
        rates = sorted({row["lr"] for row in shown})
        # A log axis with room beside the first and the last rate, where the rings stay whole
        room = (rates[-1] / rates[0]) ** 0.06 if rates[-1] > rates[0] else 1.5
        axes.set_xlim(rates[0] / room, rates[-1] * room)
        ticks_at(axes, rates, [tick(rate) for rate in rates])
    if ends:
        beside(left, ends, right.get_position().x0 - 0.06)
    return figure


def _ends_of(lines: Sequence[Any]) -> list[End]:
    """Where lines end, each with its label; those of a key only, which end nowhere, are left out."""
    ends: list[End] = []
    for line in lines:
        if isinstance(line, Line2D) and line.axes:
            points = np.atleast_2d(line.get_xydata())
            if points.size:
                x, y = points[-1]
                ends.append((float(x), float(y), str(line.get_label()), str(line.get_color())))
    return ends


def _schedule_of(point: Mapping[str, Any]) -> str:
    """The schedule of a run of the control's search, in words."""
    return schedule_in_words({"name": point["schedule"], **point})


def _sweep_finding(winners: Mapping[str, Mapping[str, Any]]) -> str:
    best = min(winners, key=lambda track: winners[track]["val_loss"])
    winner = winners[best]
    sigma = winner.get("sigma")
    finding = f"Lowest at a constant rate: {optimizer(best)} at {winner['lr']:g}, {winner['val_loss']:.3f}"
    finding += f" (σ over fresh seeds {sigma:.3f})" if sigma is not None else ""
    control = winner["control"]
    schedule = schedule_in_words(control["lr_schedule"])
    finding += f"; {schedule}, at {control['lr']:g}: {control['val_loss']:.3f}"
    return f"{finding}."


def _draw_grids(
    axes: Axes, facts: Facts, grids: Mapping[str, Rows], winners: Mapping[str, Mapping[str, Any]]
) -> list[Any]:
    """The grid of every optimizer. -> its part of the key."""
    log_axis(axes, "x", RATES)
    rows_of_crosses = 0
    handles: list[Any] = []
    extended = False
    for (track, points), (colour, marker, dashes) in zip(grids.items(), TRACKS * len(grids), strict=False):
        grid = sorted((r for r in points if r["role"] == "grid"), key=lambda r: r["lr"])
        done = [row for row in grid if whole(row)]
        label = optimizer(track) + ("" if track in winners else ", not kept")
        look: dict[str, Any] = {"color": colour, "marker": marker, "ls": dashes}
        handles += axes.plot(column(done, "lr"), column(done, "val_loss"), **look, label=label)
        bars(axes, column(done, "lr"), done, colour)
        asked = facts.grids.get(track.rpartition("_")[0], ())
        added = [row for row in done if asked and not any(np.isclose(row["lr"], x) for x in asked)]
        look = {"color": colour, **ADDED, "marker": marker}
        axes.plot(column(added, "lr"), column(added, "val_loss"), **look)
        extended |= bool(added)
        rows_of_crosses += crosses(axes, grid, "lr", colour, 0.95 - 0.08 * rows_of_crosses)
    if extended:
        handles.append(entry("added: the best lay on the edge", ls="", marker="o", mfc="white"))
    make_room(axes, rows_of_crosses)
    return handles


def _draw_long(
    axes: Axes, rows: Rows, decided: Mapping[str, Any], whose: str, looks: Iterator[Look], ceiling: float
) -> list[Any]:
    """A kept optimizer at full length, each of its schedules in the next of `looks`; losses above the
    `ceiling` as figures. -> its part of the key."""
    log_axis(axes, "x", RATES)
    lines = {"constant rate": [row for row in rows if row["role"] == "baseline"]}
    by_run = {row["run_id"]: row for row in rows if row["role"] == "control"}
    for point in decided["control"]["grid"]:
        if point["run_id"] in by_run:  # it has a result
            lines.setdefault(_schedule_of(point), []).append(by_run[point["run_id"]])
    handles: list[Any] = []
    rows_of_crosses = 0
    for label, line in lines.items():
        colour, marker, dashes = next(looks)
        line = sorted(line, key=lambda row: row["lr"])
        done = [row for row in line if whole(row)]
        look: dict[str, Any] = {"color": colour, "marker": marker, "ls": dashes, "label": whose + label}
        handles += axes.plot(column(done, "lr"), column(done, "val_loss"), **look)
        bars(axes, column(done, "lr"), done, colour)
        rows_of_crosses += crosses(axes, line, "lr", colour, 0.95 - 0.08 * rows_of_crosses, ceiling)
    again = [row for row in rows if row["role"] == "replicate" and whole(row)]
    beside = [1.03 * row["lr"] for row in again]
    axes.plot(beside, column(again, "val_loss"), color=INK, **SEED)
    axes.plot(decided["lr"], decided["val_loss"], **RING)
    axes.plot(decided["control"]["lr"], decided["control"]["val_loss"], **SQUARE)
    return handles


def _framed(rows: Rows, winners: Mapping[str, Mapping[str, Any]]) -> tuple[float, float]:
    """The lowest loss at full length, and the one above which a few bad runs would press all others
    together: infinite where there are none such."""
    losses = [row["val_loss"] for row in rows if row["role"] in ("baseline", "control") and whole(row)]
    low = min(losses)
    taken = [loss for d in winners.values() for loss in (d["val_loss"], d["control"]["val_loss"])]
    middle = max(statistics.median(losses), *taken)
    limit = low + MOST_TIMES * (middle - low)
    return low, limit if max(losses) > limit > low else math.inf


# -- 2. the LR scales ----------------------------------------------------------------------------------------


def draw_lr_scale(facts: Facts, track: str, decision: Mapping[str, Any], swept: Mapping[str, Any]) -> Sheet:
    """Validation loss against the LR scale, with and without EBC, and each one's LR window; the best without
    EBC with its noise, the baseline, the chosen scale.

    `swept`: what lr_sweep decided for the track.
    """
    rows = [row for arm in decision["arms"].values() for row in arm]
    what = "How far can the learning rate rise?"
    whom = f"{optimizer(track)} with and without EBC; ×1 is its best constant learning rate, {swept['lr']:g}"
    small = (f"stage lr_scale, seed {seeds_in_words(rows)}",)
    seeds = len({str(row["seed"]) for row in rows})
    figure, axes = page(facts, what, whom, _scale_finding(decision), seeds, small, size=(8.6, 5.8))
    scales = {row["lr_scale"]: f"×{tick(row['lr_scale'])}\nlr {tick(row['lr'])}" for row in rows}
    for row in decision["arms"].get("ebc", []):
        scales[row["lr_scale"]] += f"\nc {row['c_median']:.2f}" if row["c_median"] is not None else ""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(scales), [scales[s] for s in sorted(scales)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(min(scales) / 1.15, max(scales) * 1.15)
    handles = _draw_references(axes, decision, swept)
    lines: list[Any] = []
    ring: list[Any] = []
    rows_of_crosses = 0
    for role, arm in decision["arms"].items():
        label, colour, marker, dashes, shift = LR_ARMS.get(role, (role, SPARE, *UNKNOWN, 1.0))
        done = [row for row in arm if whole(row)]
        x = [row["lr_scale"] * shift for row in done]
        look = {"color": colour, "marker": marker, "ls": dashes}
        label = ", ".join((label, *schedules(arm[0]["arm"].removeprefix(f"{track}_"))))
        lines += axes.plot(x, column(done, "val_loss"), **look, label=label)
        bars(axes, x, done, colour)
        for at, row in zip(x, done, strict=True):
            if row["inert"]:
                axes.plot(at, row["val_loss"], color=colour, **{**ADDED, "marker": marker})
            if row["run_id"] == decision["run_id"]:
                chosen = f"chosen, with EBC: ×{decision['lr_scale']:g}"
                axes.plot(at, row["val_loss"], **RING)
                ring = [entry(chosen, **RING)]
        rows_of_crosses += crosses(axes, arm, "lr_scale", colour, 0.95 - 0.08 * rows_of_crosses)
    ends = _ends_of(lines) if len(lines) <= FEW else []
    handles += [*(line for line in lines if not ends), *ring]
    if any(row["inert"] for row in rows):
        handles.append(entry("LR inert: the same run up to rounding", EBC, ls="", marker="o", mfc="white"))
    handles.append(entry(f"LR window: loss within {WINDOW_NATS:g} nats of the arm's own best", lw=4.0))
    make_room(axes, rows_of_crosses)
    _draw_windows(axes, decision["lr_window"])
    axes.set_xlabel(
        "learning rate at its peak, as a multiple of the best constant one; c: median clip coefficient of EBC"
    )
    axes.set_ylabel("validation loss (nats per token; bars: ± s.e.)")
    key(axes, handles)
    if ends:
        narrowed(axes, NAMES_FROM)
        beside(axes, ends)
    return figure


def _draw_references(axes: Axes, decision: Mapping[str, Any], swept: Mapping[str, Any]) -> list[Any]:
    """The best loss without EBC with its noise, and the baseline's where that is another. -> their part of
    the key."""
    best, sigma, constant = decision["baseline_val_loss"], decision["sigma"], swept["val_loss"]
    other = not math.isclose(best, constant)
    name = "best without EBC" if other else "baseline"
    label = f"{name} ± 1σ (σ = {sigma:.3f} over seeds)"
    handles: list[Any] = [axes.axhspan(best - sigma, best + sigma, color=GOAL, alpha=0.15, lw=0, label=label)]
    axes.axhline(best, color=GOAL, ls="--", lw=1.2)
    if other:
        label = f"baseline: constant rate ×1, {constant:.3f}"
        handles.append(axes.axhline(constant, color=GREY, ls=":", lw=1.4, label=label))
    return handles


def _draw_windows(axes: Axes, windows: Mapping[str, Any]) -> None:
    """Each arm's LR window as a bar at the foot of the axes, an arrow where it does not end within what was
    tried."""
    wide = {role: w for role, w in windows.items() if w and w["high"] > w["low"]}
    foot = FOOT * len(wide)
    low, high = axes.get_ylim()
    axes.set_ylim(low - foot / (1 - foot) * (high - low), high)
    across = axes.get_xaxis_transform()
    for i, (role, window) in enumerate(wide.items()):
        label, colour, *_ = LR_ARMS.get(role, (role, SPARE, *UNKNOWN))
        at = foot - FOOT * (i + 0.72)
        ends = (window["low"], window["high"])
        axes.plot(ends, (at, at), color=colour, lw=4.0, solid_capstyle="butt", transform=across)
        for end, tip in zip(("low", "high"), "<>", strict=True):
            look: dict[str, Any] = {"color": colour, "ms": 9, "transform": across, "clip_on": False}
            axes.plot(window[end], at, tip if window[f"open_{end}"] else "|", mew=2, **look)
        note = axes.annotate(
            f"{label}: {in_octaves(window)}",
            (math.sqrt(ends[0] * ends[1]), at),
            xycoords=across,
            xytext=(0, 6),
            textcoords="offset points",
        )
        note.set(ha="center", size=SMALL, color=colour)
        if note.get_window_extent().x0 < axes.bbox.x0:
            note.set(ha="left")
            note.xy = (axes.get_xlim()[0], at)


def _scale_finding(decision: Mapping[str, Any]) -> str:
    windows = {role: in_octaves(decision["lr_window"].get(role)) for role in ("ebc", "none")}
    finding = f"LR window: {windows['ebc']} with EBC, {windows['none']} without."
    tautology = " At hollow points c < 1 cancels the learning rate."
    return finding + (tautology if decision["headroom_is_tautology"] else "")


# -- 3. the effective learning rate --------------------------------------------------------------------------


def draw_eta_eff(
    facts: Facts, track: str, decision: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]
) -> Sheet | None:
    """Median c·lr of the LR scales' runs against their learning rate; None where none recorded it.

    `results`: by run id.
    """
    arms: dict[str, list[tuple[float, float, float, float]]] = {}
    for role, of_role in decision["arms"].items():
        for row in of_role:
            result = results.get(row["run_id"], {})
            if result.get("eta_eff_median") is not None and result.get("c_median"):
                applied = result["eta_eff_median"]
                spread = [applied * result[k] / result["c_median"] for k in ("c_p10", "c_p90")]
                arms.setdefault(role, []).append((row["lr"], applied, *spread))
    if not arms:
        return None
    rows = [row for of_role in decision["arms"].values() for row in of_role]
    finding = "No EBC run recorded its effective learning rate."
    if ebc := sorted(arms.get("ebc", [])):
        (low, slow, *_), (high, fast, *_) = ebc[0], ebc[-1]
        finding = f"With EBC the learning rate rises {high / low:.3g}×, "
        finding += f"the median step that is applied {fast / slow:.3g}×."
    whom = f"{optimizer(track)} with and without EBC: "
    whom += "the learning rate that is applied, η_eff = c·lr, against the one asked for"
    what = "What does EBC make of a higher learning rate?"
    small = (f"stage lr_scale, seed {seeds_in_words(rows)}",)
    figure, axes = page(facts, what, whom, finding, len({str(row["seed"]) for row in rows}), small)
    log_axis(axes, "x", RATES)
    log_axis(axes, "y")
    rates = column(rows, "lr")
    ends = (min(rates) / 1.1, max(rates) * 1.1)
    lines = axes.plot(ends, ends, color=GOAL, ls=":", lw=1.4, label="c = 1, at a constant rate: c·lr = lr")
    for role, points in arms.items():
        label, colour, marker, dashes, shift = LR_ARMS.get(role, (role, SPARE, *UNKNOWN, 1.0))
        lr, middle, below, above = np.array(sorted(points)).T
        label = ", ".join((label, *schedules(decision["arms"][role][0]["arm"].removeprefix(f"{track}_"))))
        lines += axes.plot(lr * shift, middle, color=colour, marker=marker, ls=dashes, label=label)
        spreads = np.maximum((middle - below, above - middle), 0)
        axes.errorbar(lr * shift, middle, spreads, fmt="none", ecolor=colour, elinewidth=1)
    few = len(lines) <= FEW
    handles = [*([] if few else lines), entry("bars: as c varies, 10th to 90th percentile", GREY, lw=1)]
    scales = sorted({(row["lr"], row["lr_scale"]) for row in rows})
    axes.set_xticks(sorted(set(rates)), [f"{tick(lr)}\n×{tick(scale)}" for lr, scale in scales])
    axes.set_xlabel(
        "learning rate asked for, at its peak, and as a multiple of the best constant one (log scale)"
    )
    axes.set_ylabel("median η_eff = c·lr (log scale)")
    key(axes, handles)
    if few:
        narrowed(axes, NAMES_FROM)
        beside(axes, _ends_of(lines))
    return figure


# -- 4. the calibration --------------------------------------------------------------------------------------


def budget_of(row: Mapping[str, Any]) -> str:
    """A candidate's budget, as its arm's name says it."""
    match = re.search(r"_ebc_d[^_]+_(.+?)_x", row["arm"])
    return match[1] if match else row["role"]


def draw_calibration(
    facts: Facts, track: str, decision: Mapping[str, Any], rows: Rows, natural: float
) -> Sheet:
    """Validation loss and median c against δ*, a line for every budget.

    Shown too: the δ* window, the natural KL, the winner, and the band for c where the rule aims at it.
    """
    low, high = facts.band
    done = [row for row in rows if whole(row) and row["c_median"] is not None]
    inside = sum(low <= row["c_median"] <= high for row in done)
    times = tick(decision["delta_star"] / natural, ROUNDED)
    finding = f"Chosen: δ* {decision['delta_star']:g}, {times} × the natural KL: "
    finding += f"median c {decision['c_median']:.2f}, validation loss {decision['val_loss']:.3f}; "
    what = "Which KL target δ* gives the lowest loss?"
    if facts.aims_at_band:
        what = "Which KL target δ* holds the updates back as much as wanted?"
        finding += f"{inside} of {len(rows)} runs inside the band."
    else:
        finding += f"δ* window {in_octaves(decision['delta_window'])}."
    whom = f"{optimizer(track)} with EBC at ×{decision['lr_scale']:g} the best constant learning rate: "
    whom += "loss and clip coefficient against δ*"
    small = (f"stage calibrate, seed {seeds_in_words(rows)}",)
    seeds = len({str(row["seed"]) for row in rows})
    figure, bottom = page(facts, what, whom, finding, seeds, small, size=(8.6, 6.2))
    top = another(bottom)
    for axes in (top, bottom):
        log_axis(axes, "x", RATES)
        axes.axvline(natural, color=GREY, ls=":", lw=1.2)
    handles: list[Any] = []
    if facts.aims_at_band:
        bottom.axhspan(low, high, color=GOAL, alpha=0.15, lw=0)
        say_of_band(bottom, high, f"target band for c, {low:g} to {high:g}")
    handles.append(entry(f"natural KL of the baseline, {natural:.3g}", GREY, ls=":", lw=1.2))
    lost = _draw_budgets(top, bottom, rows, done, decision, handles)
    handles.append(entry("chosen", **RING))
    make_room(top, int(lost))
    if window := decision["delta_window"]:
        top.axvspan(window["low"], window["high"], color=SPARE, alpha=0.12, lw=0)
        label = f"shaded: δ* window, {in_octaves(window)}, within {WINDOW_NATS:g} nats of the best"
        top.set_title(label, loc="left" if facts.phone else "right", size=SMALL, color=INK)
    targets = sorted({row["delta_star"] for row in rows})
    for axes in (bottom, top):
        axes.set_xlim(min(natural, *targets) / 1.05, max(natural, *targets) * 1.05)
        ticks_at(axes, targets, [f"{tick(delta)}\n{tick(delta / natural, ROUNDED)}×" for delta in targets])
    top.tick_params(labelbottom=False)
    top.set_ylabel("validation loss (nats per token)")
    bottom.set(ylabel="median c", ylim=(-0.02, 1.06))
    bottom.set_xlabel("KL target δ* (nats per token), and as a multiple of the natural KL (log scale)")
    key(bottom, handles)
    lowered(bottom, 12.0)
    stack((top, bottom), (1.0, 1.0), 14)
    return figure


def _draw_budgets(
    top: Axes, bottom: Axes, rows: Rows, done: Rows, decision: Mapping[str, Any], handles: list[Any]
) -> bool:
    """A line for every budget in both panels, through the means over the seeds; their legend goes to
    `handles`. -> whether a run did not complete."""
    lost = False
    budgets = list(dict.fromkeys(budget_of(row) for row in rows))
    several = len({row["seed"] for row in rows}) > 1
    for budget, (colour, marker, dashes) in zip(budgets, BUDGETS * len(budgets), strict=False):
        of_budget = sorted(
            (row for row in rows if budget_of(row) == budget), key=lambda row: row["delta_star"]
        )
        shown = [row for row in of_budget if row in done]
        x = sorted({row["delta_star"] for row in shown})
        style: dict[str, Any] = {"color": colour, "marker": marker, "ls": dashes}
        label = f"budget {budget}" + (", mean over the seeds" if several else "")
        for axes, name in ((top, "val_loss"), (bottom, "c_median")):
            means = {d: statistics.fmean(r[name] for r in shown if r["delta_star"] == d) for d in x}
            line = axes.plot(x, list(means.values()), **style, label=label)
            handles += line if axes is top else []
            if several:
                axes.plot(column(shown, "delta_star"), column(shown, name), color=colour, **SEED)
            for row in shown:
                if row["run_id"] == decision["run_id"]:
                    axes.plot(row["delta_star"], means[row["delta_star"]], **RING)
        if not several:
            bars(top, x, shown, colour)
        lost |= crosses(top, of_budget, "delta_star", colour, 0.93)
    return lost

"""Decisions on the learning rate and on δ*: the sweep without EBC, the LR scales, the calibration."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from ebc_lab.study.stages.lr_sweep.fair_control import schedule_in_words
from ebc_lab.study.stages.statistics import WINDOW_NATS, in_octaves

from ..text.words import optimizer, plural, schedules
from .drawing.looks import (
    DASHES,
    GOAL,
    GREY,
    GREY_PLACE,
    INK,
    PALETTE,
    PINK,
    RING,
    SEED,
    SKY,
    SMALL,
    UNKNOWN,
    Look,
    assign_looks,
)
from .drawing.losses import WINDOW_ROW, WITHIN, ceiling_of, draw_windows, frame_losses, where_it_ends
from .drawing.sheet import End, Facts, Sheet, entry, format_tick, log_axis, name_band

Rows = Sequence[Mapping[str, Any]]
ROLES = {  # of the LR scales' runs -> what the picture calls them, their look, a shift that parts error bars
    "none": ("without EBC", Look(GREY_PLACE, "--"), 0.985),
    "ebc": ("with EBC", Look(0), 1.015),
    "surrogate_x1": ("with EBC at ×1 (measures S)", Look(PALETTE.index(SKY), ":"), 1.0),
    "fixed_tau": ("with a fixed trust radius τ", Look(PALETTE.index(PINK), "-."), 1.0),
}
SQUARE: dict[str, Any] = {**RING, "marker": "s", "ms": 12}
HOLLOW: dict[str, Any] = {"ls": "", "mfc": "white", "mew": 1.5, "zorder": 3}
RATES = (1.0, 2.0, 4.0)  # ticks of a decade
ROUNDED = 1e-3  # how far the ratio of two figures of three digits may be off, relative


def is_whole(row: Mapping[str, Any]) -> bool:
    return row["outcome"] == "completed" and row["val_loss"] is not None


def column(rows: Rows, name: str) -> list[Any]:
    return [row[name] for row in rows]


def lowest_losses(groups: Iterable[Rows]) -> list[float]:
    """Return the lowest loss of each group of runs in which any completed."""
    done = [[row["val_loss"] for row in rows if is_whole(row)] for rows in groups]
    return [min(losses) for losses in done if losses]


def seeds_in_words(rows: Rows) -> str:
    return ", ".join(sorted({str(row["seed"]) for row in rows}))


def count_of(rows: Rows) -> str:
    return plural(len({str(row["seed"]) for row in rows}), "seed")


def by_track(rows: Rows, tracks: Iterable[str]) -> dict[str, list[Mapping[str, Any]]]:
    """Return a stage's candidates by track: the first two words of their arm's name."""
    found = {track: [row for row in rows if row["arm"].startswith(f"{track}_")] for track in tracks}
    return {track: own for track, own in found.items() if own}


def draw_beyond(
    sheet: Sheet, axes: Axes, rows: Rows, x: str, colour: str, row: int, ceiling: float = math.inf
) -> int:
    """Mark at the top the runs that did not complete, with their outcome where there is room, and those above
    the `ceiling`, with their loss; `row`: how far down. -> whether there were any, as a number of rows."""
    beyond = [one for one in rows if not is_whole(one) or one["val_loss"] > ceiling]
    height, top = 0.95 - 0.08 * row, axes.get_xaxis_transform()
    for one in beyond:
        axes.plot(one[x], height, "^" if is_whole(one) else "x", color=colour, ms=7, mew=2.0, transform=top)
        words = f"{one['val_loss']:.3f}" if is_whole(one) else str(one["outcome"])
        if sheet.narrow and not is_whole(one):
            sheet.key(entry(words, colour, ls="", marker="x", ms=7))
            continue
        side = -1 if one[x] == max(column(rows, x)) else 1  # the last one's words stay in the panel
        place: dict[str, Any] = {"xycoords": top, "xytext": (6 * side, 0), "textcoords": "offset points"}
        place |= {"va": "center", "ha": "left" if side > 0 else "right"}
        axes.annotate(words, (one[x], height), color=colour, size=SMALL, **place)
    return int(bool(beyond))


def draw_losses(axes: Axes, x: Sequence[float], rows: Rows, look: Look) -> Any:
    """Draw validation losses as a line with their standard errors. -> the line."""
    [line] = axes.plot(x, column(rows, "val_loss"), color=look.colour, marker=look.marker, ls=look.line)
    errors = [row["val_se"] or 0 for row in rows]
    axes.errorbar(x, column(rows, "val_loss"), errors, fmt="none", ecolor=look.colour, elinewidth=1)
    return line


def end_of(line: Any, label: str, ceiling: float = math.inf) -> list[End]:
    """Return where a line ends below the `ceiling`, with its label; nothing of one without points."""
    points = [*map(tuple, np.atleast_2d(line.get_xydata()))] if len(line.get_xdata()) else []
    return [(*where_it_ends(points, ceiling), label, line.get_color())] if points else []


# -- the sweep without EBC -----------------------------------------------------------------------------------


def draw_lr_sweep(facts: Facts, decision: Mapping[str, Any]) -> Sheet:
    """Draw validation loss by learning rate of the plain optimizers: left the grid of each, right the kept
    ones at full length, at constant rates with replicates, and on the schedules tried for the control."""
    rows, winners = decision["candidates"], decision["tracks"]
    grids = by_track(rows, [pair["track"] for pair in decision["pairs"]])
    edges = [
        f"{optimizer(t)}'s best constant rate is the {d['edge']}est" for t, d in winners.items() if d["edge"]
    ]
    plainly = " without EBC" if facts.ebc else ""
    whose = ", ".join(optimizer(track) for track in grids)
    whom = "; ".join((f"{whose},{plainly}" if plainly else whose, *edges))
    grid_seeds = seeds_in_words([row for row in rows if row["role"] == "grid"])
    sheet = Sheet(
        facts,
        f"Which learning rate is best{plainly}, constant and on a schedule?",
        (whom, _sweep_finding(winners)),
        (count_of(rows), f"stage lr_sweep, grid with seed {grid_seeds}", "bars: ± s.e."),
        grid=("ab",),
        heights=(4.4,),
    )
    left, right = sheet.panels
    looks = assign_looks(grids, winners)
    _draw_grids(sheet, left, facts, grids, looks)
    long = [row for row in rows if row["role"] in ("baseline", "control") and is_whole(row)]
    taken = [loss for d in winners.values() for loss in (d["val_loss"], d["control"]["val_loss"])]
    ceiling = ceiling_of(column(long, "val_loss"), taken)
    marks, places = 0, itertools.count(len(looks))
    for track, winner in winners.items():
        whose = f"{optimizer(track)}, " if len(winners) > 1 else ""
        lines = _lines_of(grids.get(track, []), winner)
        own = [looks[track], *(Look(next(places), DASHES[nth % 4]) for nth in range(1, len(lines)))]
        for (label, line), look in zip(lines.items(), own, strict=True):
            done = [row for row in line if is_whole(row)]
            draw_losses(right, column(done, "lr"), done, look)
            mark = entry(whose + label, look.colour, marker=look.marker, ls=look.line, ms=5)
            sheet.key(mark)
            marks += draw_beyond(sheet, right, line, "lr", look.colour, marks, ceiling)
        again = [row for row in grids.get(track, []) if row["role"] == "replicate" and is_whole(row)]
        right.plot([1.03 * row["lr"] for row in again], column(again, "val_loss"), color=INK, **SEED)
        right.plot(winner["lr"], winner["val_loss"], **RING)
        right.plot(winner["control"]["lr"], winner["control"]["val_loss"], **SQUARE)
    log_axis(right, "x", RATES)
    frame_losses(right, long, ceiling, marks)
    sheet.key(entry("each replicate seed", **SEED))
    sheet.key(entry("best constant rate" + ": the baseline from here on" * (not facts.arms), **RING))
    sheet.key(entry("best on a schedule" + ": the fair control" * (not facts.arms), **SQUARE))
    steps = [f", {n:,} steps" if n else "" for n in facts.sweep_steps]
    left.set_xlabel(f"learning rate (log scale): the grid{steps[0]}")
    right.set_xlabel(f"learning rate (log scale): around its best{steps[1]}")
    left.set_ylabel("validation loss (nats per token)")
    for axes in sheet.panels:
        rates = sorted({row["lr"] for row in rows if (row["role"] == "grid") == (axes is left)})
        room = (rates[-1] / rates[0]) ** 0.06 if rates[-1] > rates[0] else 1.5
        axes.set_xlim(rates[0] / room, rates[-1] * room)
        axes.set_xticks(rates, [format_tick(rate) for rate in rates])
    return sheet


def _sweep_finding(winners: Mapping[str, Mapping[str, Any]]) -> str:
    best = min(winners, key=lambda track: winners[track]["val_loss"])
    winner = winners[best]
    sigma, control = winner.get("sigma"), winner["control"]
    finding = f"Lowest at a constant rate: {optimizer(best)} at {winner['lr']:g}, {winner['val_loss']:.3f}"
    finding += f" (σ over fresh seeds {sigma:.3f})" if sigma is not None else ""
    schedule = schedule_in_words(control["lr_schedule"])
    return f"{finding}; {schedule}, at {control['lr']:g}: {control['val_loss']:.3f}"


def _draw_grids(
    sheet: Sheet, axes: Axes, facts: Facts, grids: Mapping[str, Rows], looks: Mapping[str, Look]
) -> None:
    """Draw validation loss over every optimizer's grid of rates; points that were added to it are hollow."""
    log_axis(axes, "x", RATES)
    of_grid = {track: [row for row in rows if row["role"] == "grid"] for track, rows in grids.items()}
    losses = [row["val_loss"] for rows in of_grid.values() for row in rows if is_whole(row)]
    ceiling = ceiling_of(losses, lowest_losses(of_grid.values())) if losses else math.inf
    marks = 0
    for track, rows in of_grid.items():
        look, rows = looks[track], sorted(rows, key=lambda row: row["lr"])
        done = [row for row in rows if is_whole(row)]
        line = draw_losses(axes, column(done, "lr"), done, look)
        sheet.label(axes, end_of(line, optimizer(track), ceiling))
        asked = facts.grids.get(track.rpartition("_")[0], ())
        added = [row for row in done if asked and not any(np.isclose(row["lr"], x) for x in asked)]
        hollow = {**HOLLOW, "color": look.colour, "marker": look.marker}
        axes.plot(column(added, "lr"), column(added, "val_loss"), **hollow)
        if added and not sheet.marks:
            sheet.key(entry("added: the best lay on the edge", ls="", marker="o", mfc="white"))
        marks += draw_beyond(sheet, axes, rows, "lr", look.colour, marks, ceiling)
    if losses:
        frame_losses(axes, [row for rows in of_grid.values() for row in rows], ceiling, marks)


def _lines_of(rows: Rows, decided: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Return the runs of a kept optimizer at full length by their schedule, the constant rate first."""
    lines = {"constant rate": [row for row in rows if row["role"] == "baseline"]}
    by_run = {row["run_id"]: row for row in rows if row["role"] == "control"}
    for point in decided["control"]["grid"]:
        if point["run_id"] in by_run:  # it has a result
            schedule = schedule_in_words({"name": point["schedule"], **point})
            lines.setdefault(schedule, []).append(by_run[point["run_id"]])
    return {label: sorted(line, key=lambda row: row["lr"]) for label, line in lines.items()}


# -- the LR scales -------------------------------------------------------------------------------------------


def draw_lr_scale(facts: Facts, track: str, decision: Mapping[str, Any], swept: Mapping[str, Any]) -> Sheet:
    """Draw validation loss against the LR scale, with and without EBC, and under it each one's LR window; the
    best without EBC with its noise, the baseline, the chosen scale.

    `swept`: what lr_sweep decided for the track.
    """
    arms = decision["arms"]
    rows = [row for of_role in arms.values() for row in of_role]
    named = {role: _name_role(role, of_role, track) for role, of_role in arms.items()}
    windows = {role: w for role, w in decision["lr_window"].items() if w and w["high"] > w["low"]}
    sheet = Sheet(
        facts,
        "How far can the learning rate rise?",
        (
            f"{optimizer(track)} with and without EBC; ×1 is its best constant rate, {swept['lr']:g}",
            _scale_finding(decision),
        ),
        (
            count_of(rows),
            f"stage lr_scale, seed {seeds_in_words(rows)}",
            "c: median clip coefficient of EBC",
            "bars: ± s.e.",
        ),
        grid=("a", "b") if windows else ("a",),
        heights=(3.9, 0.9 + WINDOW_ROW * len(windows)) if windows else (4.4,),
    )
    top, bottom = sheet.panels[0], sheet.panels[-1]
    sheet.key(*_draw_references(top, decision, swept))
    whole = [row for row in rows if is_whole(row)]
    constant = (decision["baseline_val_loss"], swept["val_loss"])
    ceiling = ceiling_of([*column(whole, "val_loss"), *constant], [*lowest_losses(arms.values()), *constant])
    marks = 0
    for role, of_role in arms.items():
        _, look, shift = ROLES.get(role, (role, UNKNOWN, 1.0))
        done = [row for row in of_role if is_whole(row)]
        shown = [row for row in done if row["val_loss"] <= ceiling]
        line = draw_losses(top, [row["lr_scale"] * shift for row in done], done, look)
        sheet.label(top, end_of(line, named[role], ceiling))
        for row in shown:
            place = (row["lr_scale"] * shift, row["val_loss"])
            if row["inert"]:
                top.plot(*place, color=look.colour, **{**HOLLOW, "marker": look.marker})
            if row["run_id"] == decision["run_id"]:
                top.plot(*place, **RING)
                sheet.key(entry(f"chosen, with EBC: ×{decision['lr_scale']:g}", **RING))
        marks += draw_beyond(sheet, top, of_role, "lr_scale", look.colour, marks, ceiling)
    if any(row["inert"] for row in rows):
        inert = entry("LR inert: the same run up to rounding", ROLES["ebc"][1].colour, ls="", marker="o")
        inert.set_markerfacecolor("white")
        sheet.key(inert)
    lines = [{"val_loss": loss, "val_se": decision["sigma"]} for loss in constant]
    frame_losses(top, [*rows, *lines], ceiling, marks)
    top.set_ylabel("validation loss (nats per token)")
    for axes in sheet.panels:
        _scale_axis(axes, rows, arms.get("ebc", []), labelled=axes is bottom)
    bottom.set_xlabel(
        "learning rate at its peak, as a multiple of the best constant one"
        + f"; bars: LR windows, {WITHIN}" * bool(windows)
    )
    if windows:
        of_roles = {role: ROLES.get(role, (role, UNKNOWN, 1.0)) for role in windows}
        looks = {name: look for name, look, _ in of_roles.values()}
        draw_windows(sheet, bottom, {of_roles[role][0]: w for role, w in windows.items()}, looks)
    return sheet


def _name_role(role: str, rows: Rows, track: str) -> str:
    """Return what the runs of a role are called, with their schedules where there are several runs."""
    words = ", ".join(schedules(rows[0]["arm"].removeprefix(f"{track}_"))) if len(rows) > 1 else ""
    return "  ".join(filter(None, (ROLES.get(role, (role,))[0], words)))


def _scale_axis(axes: Axes, rows: Rows, ebc: Rows, labelled: bool) -> None:
    """Give an axis of LR scales a tick at each one tried, labelled with the rate and EBC's c there."""
    scales = {r["lr_scale"]: f"×{format_tick(r['lr_scale'])}\nlr {format_tick(r['lr'])}" for r in rows}
    for row in ebc:
        scales[row["lr_scale"]] += f"\nc {row['c_median']:.2f}" if row["c_median"] is not None else ""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(scales), [scales[scale] if labelled else "" for scale in sorted(scales)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(min(scales) / 1.15, max(scales) * 1.15)


def _draw_references(axes: Axes, decision: Mapping[str, Any], swept: Mapping[str, Any]) -> list[Any]:
    """Draw the best loss without EBC with its noise, and the baseline's if it is another. -> their marks."""
    best, sigma, constant = decision["baseline_val_loss"], decision["sigma"], swept["val_loss"]
    other = not math.isclose(best, constant)
    label = f"{'best without EBC' if other else 'baseline'} ± 1σ (σ = {sigma:.3f} over seeds)"
    handles: list[Any] = [axes.axhspan(best - sigma, best + sigma, color=GOAL, alpha=0.15, lw=0, label=label)]
    axes.axhline(best, color=GOAL, ls="--", lw=1.2)
    if other:
        label = f"baseline: constant rate ×1, {constant:.3f}"
        handles.append(axes.axhline(constant, color=GREY, ls=":", lw=1.4, label=label))
    return handles


def _scale_finding(decision: Mapping[str, Any]) -> str:
    windows = {role: decision["lr_window"].get(role) for role in ("ebc", "none")}
    if all(window and (window["open_low"] or window["open_high"]) for window in windows.values()):
        finding = "Both LR windows, with EBC and without, go on beyond what was tried"
    else:
        with_ebc, without = (in_octaves(window) for window in windows.values())
        finding = f"LR window: {with_ebc} with EBC, {without} without"
    if decision["headroom_is_tautology"]:
        finding += "; at hollow points c < 1 cancels the learning rate"
    return finding


# -- the calibration -----------------------------------------------------------------------------------------


def budget_of(row: Mapping[str, Any]) -> str:
    """Return a candidate's budget, as its arm's name says it; where that says none, its role."""
    match = re.search(r"_ebc_d[^_]+_(.+?)_x", row["arm"])
    return match[1] if match else row["role"]


def draw_calibration(
    facts: Facts, track: str, decision: Mapping[str, Any], rows: Rows, natural: float
) -> Sheet:
    """Draw validation loss and median c against δ*, a line for every budget.

    Shown too: the δ* window, the natural KL, the winner, and the band for c where the rule aims at it.
    """
    low, high = facts.band
    window = decision["delta_window"]
    sheet = Sheet(
        facts,
        "Which KL target δ* holds the updates back as much as wanted?"
        if facts.aims_at_band
        else "Which KL target δ* gives the lowest loss?",
        (
            f"{optimizer(track)} with EBC at ×{decision['lr_scale']:g} the best constant learning rate: "
            "loss and clip coefficient against δ*",
            _calibration_finding(facts, decision, rows, natural),
        ),
        (count_of(rows), f"stage calibrate, seed {seeds_in_words(rows)}"),
        grid=("a", "b"),
        heights=(2.4, 2.6),
    )
    top, bottom = sheet.panels
    for axes in sheet.panels:
        log_axis(axes, "x", RATES)
        axes.axvline(natural, color=GREY, ls=":", lw=1.2)
    if facts.aims_at_band:
        bottom.axhspan(low, high, color=GOAL, alpha=0.15, lw=0)
        name_band(bottom, high, f"target band for c, {low:g} to {high:g}")
    sheet.key(entry(f"natural KL of the baseline, {natural:.3g}", GREY, ls=":", lw=1.2))
    _draw_budgets(sheet, rows, decision)
    sheet.key(entry("chosen", **RING))
    if window:
        top.axvspan(window["low"], window["high"], color=SKY, alpha=0.12, lw=0)
        label = f"shaded: δ* window, {in_octaves(window)}, within {WINDOW_NATS:g} nats of the best"
        top.set_title(label, loc="left")
    targets = sorted({row["delta_star"] for row in rows})
    labels = [f"{format_tick(x)}\n{format_tick(x / natural, ROUNDED)}×" for x in targets]
    for axes in sheet.panels:
        axes.set_xlim(min(natural, *targets) / 1.05, max(natural, *targets) * 1.05)
        axes.set_xticks(targets, labels if axes is bottom else [""] * len(targets))
    top.set_ylabel("validation loss (nats per token)")
    bottom.set(ylabel="median c", ylim=(-0.02, 1.06))
    bottom.set_xlabel("KL target δ* (nats per token), and as a multiple of the natural KL (log scale)")
    return sheet


def _calibration_finding(facts: Facts, decision: Mapping[str, Any], rows: Rows, natural: float) -> str:
    times = format_tick(decision["delta_star"] / natural, ROUNDED)
    finding = f"Chosen: δ* {decision['delta_star']:g}, {times} × the natural KL: "
    finding += f"median c {decision['c_median']:.2f}, validation loss {decision['val_loss']:.3f}; "
    if not facts.aims_at_band:
        return f"{finding}δ* window {in_octaves(decision['delta_window'])}"
    low, high = facts.band
    known = [row["c_median"] for row in rows if is_whole(row) and row["c_median"] is not None]
    return f"{finding}{sum(low <= c <= high for c in known)} of {len(rows)} runs inside the band"


def _draw_budgets(sheet: Sheet, rows: Rows, decision: Mapping[str, Any]) -> None:
    """Draw a line for every budget in both panels, through the means over the seeds."""
    top, bottom = sheet.panels
    several = len({row["seed"] for row in rows}) > 1
    losses = [row["val_loss"] for row in rows if is_whole(row)]
    ceiling = ceiling_of(losses, [decision["val_loss"]])
    marks = 0
    for budget, look in assign_looks([budget_of(row) for row in rows], ["shadow", "tracked"]).items():
        own = sorted((row for row in rows if budget_of(row) == budget), key=lambda row: row["delta_star"])
        shown = [row for row in own if is_whole(row) and row["c_median"] is not None]
        targets = sorted({row["delta_star"] for row in shown})
        style: dict[str, Any] = {"color": look.colour, "marker": look.marker, "ls": look.line}
        for axes, name in ((top, "val_loss"), (bottom, "c_median")):
            means = {x: statistics.fmean(r[name] for r in shown if r["delta_star"] == x) for x in targets}
            axes.plot(targets, list(means.values()), **style)
            if several:
                axes.plot(column(shown, "delta_star"), column(shown, name), color=look.colour, **SEED)
            for row in shown:
                if row["run_id"] == decision["run_id"]:
                    axes.plot(row["delta_star"], means[row["delta_star"]], **RING)
        sheet.key(entry(f"budget {budget}" + ", mean over the seeds" * several, ms=5, **style))
        if not several:
            errors = [row["val_se"] or 0 for row in shown]
            bars: dict[str, Any] = {"fmt": "none", "ecolor": look.colour, "elinewidth": 1}
            top.errorbar(column(shown, "delta_star"), column(shown, "val_loss"), errors, **bars)
        marks += draw_beyond(sheet, top, own, "delta_star", look.colour, marks, ceiling)
    frame_losses(top, rows, ceiling, marks)

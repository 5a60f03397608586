"""Decisions on the learning rate and on δ*: the sweep without EBC, the LR scales, the effective step, the
calibration."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from ..text.words import optimizer
from .sheet import (
    ALERT,
    EBC,
    GOAL,
    GREY,
    OTHER,
    PLAIN,
    SEED,
    SPARE,
    Facts,
    Sheet,
    another,
    entry,
    key,
    log_axis,
    page,
    stack,
)

Rows = Sequence[Mapping[str, Any]]

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
RING: dict[str, Any] = {"marker": "o", "color": ALERT, "ms": 13, "mfc": "none", "mew": 1.6, "ls": ""}
ADDED: dict[str, Any] = {"ls": "", "mfc": "white", "mew": 1.5, "zorder": 3}
CONTROL: dict[str, Any] = {"marker": "+", "ms": 8, "ls": ":", "lw": 1.2}
RATES = (1.0, 2.0, 4.0)  # ticks of a decade


def whole(row: Mapping[str, Any]) -> bool:
    return row["outcome"] == "completed" and row["val_loss"] is not None


def by_track(rows: Rows, tracks: Sequence[str]) -> dict[str, list[Mapping[str, Any]]]:
    """A stage's candidates by track: the first two words of their arm's name."""
    own = {track: [row for row in rows if row["arm"].startswith(f"{track}_")] for track in tracks}
    return {track: found for track, found in own.items() if found}


def column(rows: Rows, name: str) -> list[Any]:
    return [row[name] for row in rows]


def seeds_in_words(rows: Rows) -> str:
    return ", ".join(sorted({str(row["seed"]) for row in rows}))


def ticks_at(axes: Axes, values: Sequence[float], labels: Sequence[str]) -> None:
    """Ticks of a log x axis at the values that were tried, except where a label would run into the one
    before."""
    low, high = np.log(axes.get_xlim())
    kept: list[int] = []
    for i, value in enumerate(values):
        if not kept or np.log(value / values[kept[-1]]) > LEAST_GAP * (high - low):
            kept.append(i)
    axes.set_xticks([values[i] for i in kept], [labels[i] for i in kept])


def crosses(axes: Axes, rows: Rows, x: str, colour: str, height: float) -> bool:
    """Runs that did not complete, as crosses near the top, with their outcome. -> whether there were any."""
    broken = [row for row in rows if not whole(row)]
    top = axes.get_xaxis_transform()
    for row in broken:
        axes.plot(row[x], height, "x", color=colour, ms=9, mew=2.2, transform=top)
        side = -1 if row[x] == max(column(rows, x)) else 1  # the last one's words stay on the page
        told = axes.annotate(
            str(row["outcome"]),
            (row[x], height),
            xycoords=top,
            xytext=(7 * side, 0),
            textcoords="offset points",
        )
        told.set(color=colour, size=8, va="center", ha="left" if side > 0 else "right")
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
    """Validation loss by learning rate of every plain optimizer.

    Shown: grid, extensions, replicates, the fair control's search.
    """
    rows, kept = decision["candidates"], decision["tracks"]
    own = by_track(rows, [pair["track"] for pair in decision["pairs"]])
    whom = f"{', '.join(optimizer(track) for track in own)}, without EBC"
    seeds = len({row["seed"] for row in rows})
    grid_seeds = seeds_in_words([row for row in rows if row["role"] == "grid"])
    small = f"stage lr_sweep, grid with seed {grid_seeds}"
    what = "Which learning rate is best without EBC?"
    figure, axes = page(facts, what, whom, _sweep_finding(kept), seeds, (small,))
    log_axis(axes, "x", RATES)
    rows_of_crosses = 0
    handles: list[Any] = []
    extended = fair = False
    for (track, found), look in zip(own.items(), TRACKS * len(own), strict=False):
        line, added, control = _draw_swept(axes, track, found, look, facts, track in kept)
        handles += line
        extended |= added
        fair |= control
        grid = [row for row in found if row["role"] == "grid"]
        grid.sort(key=lambda row: row["lr"])
        rows_of_crosses += crosses(axes, grid, "lr", look[0], 0.95 - 0.08 * rows_of_crosses)
        if track in kept:
            axes.plot(kept[track]["lr"], kept[track]["val_loss"], **RING)
    handles.append(entry("the baseline from here on", **RING))
    if extended:
        handles.append(entry("added: the best lay on the edge", ls="", marker="o", mfc="white"))
    handles.append(entry("each replicate seed", **SEED))
    if fair:
        handles.append(entry("with warm-up and decay (control)", **CONTROL))
    make_room(axes, rows_of_crosses)
    rates = sorted({row["lr"] for row in rows})
    ticks_at(axes, rates, [f"{rate:g}" for rate in rates])
    axes.set_xlabel("learning rate (log scale)")
    axes.set_ylabel("validation loss (nats per token; bars: ± s.e.)")
    key(axes, handles)
    return figure


def _sweep_finding(kept: Mapping[str, Mapping[str, Any]]) -> str:
    best = min(kept, key=lambda track: kept[track]["val_loss"])
    sigma = kept[best].get("sigma")
    finding = f"Lowest: {optimizer(best)} at {kept[best]['lr']:g}, {kept[best]['val_loss']:.3f}"
    finding += f" (σ over fresh seeds {sigma:.3f})" if sigma is not None else ""
    edges = [
        f"{optimizer(t)}'s best is its grid's {d['edge']} edge" for t, d in kept.items() if d.get("edge")
    ]
    return "; ".join([finding, *edges]) + "."


def _draw_swept(
    axes: Axes, track: str, found: Rows, look: tuple[str, str, str], facts: Facts, kept: bool
) -> tuple[list[Any], bool, bool]:
    """The runs of an optimizer. -> its line, whether its grid was extended, whether a control was searched
    for."""
    colour, marker, dashes = look

    def of(role: str) -> list[Mapping[str, Any]]:
        return sorted((r for r in found if r["role"] == role and whole(r)), key=lambda r: r["lr"])

    done = of("grid")
    lr, loss = column(done, "lr"), column(done, "val_loss")
    label = optimizer(track) + ("" if kept else ", not kept")
    line = axes.plot(lr, loss, color=colour, marker=marker, ls=dashes, label=label)
    bars(axes, lr, done, colour)
    asked = facts.grids.get(track.rpartition("_")[0], ())
    added = [row for row in done if asked and not any(np.isclose(row["lr"], x) for x in asked)]
    axes.plot(column(added, "lr"), column(added, "val_loss"), color=colour, **{**ADDED, "marker": marker})
    again = [row for row in found if row["role"] == "replicate" and whole(row)]
    beside = [1.03 * row["lr"] for row in again]
    axes.plot(beside, column(again, "val_loss"), color=colour, **{**SEED, "marker": marker})
    control = of("control")
    axes.plot(column(control, "lr"), column(control, "val_loss"), color=colour, mew=1.6, **CONTROL)
    return line, bool(added), bool(control)


# -- 2. the LR scales ----------------------------------------------------------------------------------------


def draw_lr_scale(facts: Facts, track: str, found: Mapping[str, Any], best_lr: float) -> Sheet:
    """Validation loss against the LR scale, with and without EBC; the baseline's noise as a band; the chosen
    scale."""
    rows = [row for arm in found["arms"].values() for row in arm]
    what = "How far can the learning rate rise?"
    whom = f"{optimizer(track)} with and without EBC; ×1 is its best learning rate without EBC, {best_lr:g}"
    small = (f"stage lr_scale, seed {seeds_in_words(rows)}",)
    seeds = len({str(row["seed"]) for row in rows})
    figure, axes = page(facts, what, whom, _scale_finding(found), seeds, small)
    base, sigma = found["baseline_val_loss"], found["sigma"]
    label = f"baseline ± 1σ (σ = {sigma:.3f} over seeds)"
    axes.axhspan(base - sigma, base + sigma, color=GOAL, alpha=0.15, lw=0, label=label)
    axes.axhline(base, color=GOAL, ls="--", lw=1.2)
    scales = {row["lr_scale"]: f"×{row['lr_scale']:g}\nlr {row['lr']:g}" for row in rows}
    for row in found["arms"].get("ebc", []):
        scales[row["lr_scale"]] += f"\nc {row['c_median']:.2f}" if row["c_median"] is not None else ""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(scales), [scales[s] for s in sorted(scales)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(min(scales) / 1.15, max(scales) * 1.15)
    handles = axes.get_legend_handles_labels()[0]
    ring: list[Any] = []
    rows_of_crosses = 0
    for role, arm in found["arms"].items():
        label, colour, marker, dashes, shift = LR_ARMS.get(role, (role, SPARE, *UNKNOWN, 1.0))
        done = [row for row in arm if whole(row)]
        x = [row["lr_scale"] * shift for row in done]
        look = {"color": colour, "marker": marker, "ls": dashes}
        handles += axes.plot(x, column(done, "val_loss"), **look, label=label)
        bars(axes, x, done, colour)
        for at, row in zip(x, done, strict=True):
            if row["inert"]:
                axes.plot(at, row["val_loss"], color=colour, **{**ADDED, "marker": marker})
            if row["run_id"] == found["run_id"]:
                chosen = f"chosen for the finals: ×{found['lr_scale']:g}"
                ring = axes.plot(at, row["val_loss"], **RING, label=chosen)
        rows_of_crosses += crosses(axes, arm, "lr_scale", colour, 0.95 - 0.08 * rows_of_crosses)
    handles += ring
    if any(row["inert"] for row in rows):
        handles.append(entry("LR inert: the same run up to rounding", EBC, ls="", marker="o", mfc="white"))
    make_room(axes, rows_of_crosses)
    axes.set_xlabel(
        "learning rate, as a multiple of the best without EBC; c: median clip coefficient of EBC there"
    )
    axes.set_ylabel("validation loss (nats per token; bars: ± s.e.)")
    key(axes, handles)
    return figure


def _scale_finding(found: Mapping[str, Any]) -> str:
    reach = {arm: f"up to ×{s:g}" if s else "nowhere" for arm, s in found["headroom"].items()}
    finding = (
        f"Within 1σ of the baseline: with EBC {reach.get('ebc', '–')}, without {reach.get('none', '–')}."
    )
    tautology = " At hollow points c < 1 cancels the learning rate."
    return finding + (tautology if found["headroom_is_tautology"] else "")


# -- 3. the effective learning rate --------------------------------------------------------------------------


def draw_eta_eff(
    facts: Facts, track: str, found: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]
) -> Sheet | None:
    """Median c·lr of the LR scales' runs against their learning rate; None where none recorded it.

    `results`: by run id.
    """
    arms: dict[str, list[tuple[float, float, float, float]]] = {}
    for role, own in found["arms"].items():
        for row in own:
            result = results.get(row["run_id"], {})
            if result.get("eta_eff_median") is not None and result.get("c_p10") is not None:
                spread = (row["lr"] * result["c_p10"], row["lr"] * result["c_p90"])
                arms.setdefault(role, []).append((row["lr"], result["eta_eff_median"], *spread))
    if not arms:
        return None
    rows = [row for own in found["arms"].values() for row in own]
    finding = "No EBC run recorded its effective learning rate."
    if ebc := sorted(arms.get("ebc", [])):
        (low, slow, *_), (high, fast, *_) = ebc[0], ebc[-1]
        finding = f"With EBC the learning rate rises {high / low:.3g}×, "
        finding += f"the median step that is applied {fast / slow:.2g}×."
    whom = f"{optimizer(track)} with and without EBC: "
    whom += "the learning rate that is applied, η_eff = c·lr, against the one asked for"
    what = "What does EBC make of a higher learning rate?"
    small = (f"stage lr_scale, seed {seeds_in_words(rows)}",)
    figure, axes = page(facts, what, whom, finding, len({str(row["seed"]) for row in rows}), small)
    log_axis(axes, "x", RATES)
    log_axis(axes, "y")
    rates = column(rows, "lr")
    ends = (min(rates) / 1.1, max(rates) * 1.1)
    handles = axes.plot(ends, ends, color=GOAL, ls=":", lw=1.4, label="c = 1: c·lr = lr")
    for role, points in arms.items():
        label, colour, marker, dashes, shift = LR_ARMS.get(role, (role, SPARE, *UNKNOWN, 1.0))
        lr, middle, below, above = np.array(sorted(points)).T
        handles += axes.plot(lr * shift, middle, color=colour, marker=marker, ls=dashes, label=label)
        spreads = np.maximum((middle - below, above - middle), 0)
        axes.errorbar(lr * shift, middle, spreads, fmt="none", ecolor=colour, elinewidth=1)
    handles.append(entry("bars: 10th to 90th percentile of the steps", GREY, lw=1))
    scales = sorted({(row["lr"], row["lr_scale"]) for row in rows})
    axes.set_xticks(sorted(set(rates)), [f"{lr:g}\n×{scale:g}" for lr, scale in scales])
    axes.set_xlabel("learning rate asked for, and as a multiple of the best without EBC (log scale)")
    axes.set_ylabel("median η_eff = c·lr (log scale)")
    key(axes, handles)
    return figure


# -- 4. the calibration --------------------------------------------------------------------------------------


def budget_of(row: Mapping[str, Any]) -> str:
    """A candidate's budget, as its arm's name says it."""
    found = re.search(r"_ebc_d[^_]+_(.+?)_x", row["arm"])
    return found[1] if found else row["role"]


def draw_calibration(facts: Facts, track: str, found: Mapping[str, Any], rows: Rows, natural: float) -> Sheet:
    """Validation loss and median c against δ*, a line for every budget.

    Shown too: the band for c, the natural KL, the winner.
    """
    low, high = facts.band
    done = [row for row in rows if whole(row) and row["c_median"] is not None]
    inside = sum(low <= row["c_median"] <= high for row in done)
    finding = f"Chosen: δ* {found['delta_star']:g}, {found['delta_star'] / natural:.2g} × the natural KL: "
    finding += f"median c {found['c_median']:.2f}, validation loss {found['val_loss']:.3f}; "
    finding += f"{inside} of {len(rows)} runs inside the band."
    what = "Which KL target δ* holds the updates back as much as wanted?"
    whom = f"{optimizer(track)} with EBC at ×{found['lr_scale']:g} the best plain learning rate: "
    whom += "loss and clip coefficient against δ*"
    small = (f"stage calibrate, seed {seeds_in_words(rows)}",)
    seeds = len({str(row["seed"]) for row in rows})
    figure, bottom = page(facts, what, whom, finding, seeds, small, size=(8.6, 6.2))
    top = another(bottom)
    for axes in (top, bottom):
        log_axis(axes, "x", RATES)
        axes.axvline(natural, color=GREY, ls=":", lw=1.2)
    label = f"target band for c, {low:g} to {high:g}"
    handles: list[Any] = [bottom.axhspan(low, high, color=GOAL, alpha=0.15, lw=0, label=label)]
    handles.append(entry(f"natural KL of the baseline, {natural:.2g}", GREY, ls=":", lw=1.2))
    lost = _draw_budgets(top, bottom, rows, done, found["run_id"], handles)
    handles.append(entry("chosen", **RING))
    make_room(top, int(lost))
    targets = sorted({row["delta_star"] for row in rows})
    for axes in (bottom, top):
        axes.set_xlim(min(natural, *targets) / 1.05, max(natural, *targets) * 1.05)
        ticks_at(axes, targets, [f"{delta:g}\n{delta / natural:.2g}×" for delta in targets])
    top.tick_params(labelbottom=False)
    top.set_ylabel("validation loss (nats per token)")
    bottom.set(ylabel="median c", ylim=(-0.02, 1.06))
    bottom.set_xlabel("KL target δ* (nats per token), and as a multiple of the natural KL (log scale)")
    key(bottom, handles)
    stack((top, bottom), (1.0, 1.0), 14)
    return figure


def _draw_budgets(top: Axes, bottom: Axes, rows: Rows, done: Rows, chosen: str, handles: list[Any]) -> bool:
    """A line for every budget in both panels; their legend goes to `handles`. -> whether a run did not
    complete."""
    lost = False
    budgets = list(dict.fromkeys(budget_of(row) for row in rows))
    for budget, (colour, marker, dashes) in zip(budgets, BUDGETS * len(budgets), strict=False):
        own = sorted((row for row in rows if budget_of(row) == budget), key=lambda row: row["delta_star"])
        shown = [row for row in own if row in done]
        x = column(shown, "delta_star")
        style: dict[str, Any] = {"color": colour, "marker": marker, "ls": dashes}
        handles += top.plot(x, column(shown, "val_loss"), **style, label=f"budget {budget}")
        bars(top, x, shown, colour)
        bottom.plot(x, column(shown, "c_median"), **style)
        lost |= crosses(top, own, "delta_star", colour, 0.93)
        for row in shown:
            if row["run_id"] == chosen:
                top.plot(row["delta_star"], row["val_loss"], **RING)
                bottom.plot(row["delta_star"], row["c_median"], **RING)
    return lost

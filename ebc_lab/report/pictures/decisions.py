"""How far the learning rate can rise: the sweep without EBC, the LR scales with and without it, the effective step, and δ*."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ..text.words import optimizer
from .sheet import ALERT, EBC, GOAL, OTHER, PLAIN, SPARE, Facts, Sheet, another, key, page, stack

LR_ARMS = {  # role -> label, colour, marker, line, horizontal shift that keeps error bars apart
    "none": ("without EBC", PLAIN, "s", "--", 0.985),
    "ebc": ("with EBC", EBC, "o", "-", 1.015),
    "surrogate_x1": ("with EBC at ×1 (measures S)", SPARE, "v", ":", 1.0),
    "fixed_tau": ("with a fixed trust radius τ", OTHER, "D", "-.", 1.0),
}
UNKNOWN = ("v", ":")
TRACKS = tuple(
    zip(
        (PLAIN, ALERT, GOAL, "C5", "C4", "C6", EBC, "black"),
        "osDv^P*X",
        ("-", "--", "-.", ":") * 2,
        strict=True,
    )
)
LEAST_GAP = 0.06  # of the axis, between two ticks with labels
RING: dict[str, Any] = {"marker": "o", "color": ALERT, "ms": 13, "mfc": "none", "mew": 1.6, "ls": ""}


def whole(row: Mapping[str, Any]) -> bool:
    return row["outcome"] == "completed" and row["val_loss"] is not None


def by_track(rows: Sequence[Mapping[str, Any]], tracks: Sequence[str]) -> dict[str, list[Mapping[str, Any]]]:
    """A stage's candidates by track: the first two words of their arm's name."""
    own = {track: [row for row in rows if row["arm"].startswith(f"{track}_")] for track in tracks}
    return {track: found for track, found in own.items() if found}


def by_value(axes: Axes, name: str) -> None:
    """A log axis that is read in plain numbers."""
    axis = axes.xaxis if name == "x" else axes.yaxis
    (axes.set_xscale if name == "x" else axes.set_yscale)("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 4.0) if name == "x" else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def ticks_at(axes: Axes, values: Sequence[float], labels: Sequence[str]) -> None:
    """Ticks of a log x axis at the values that were tried, but for labels that would run into the one before."""
    low, high = np.log(axes.get_xlim())
    kept: list[int] = []
    for i, value in enumerate(values):
        if not kept or np.log(value / values[kept[-1]]) > LEAST_GAP * (high - low):
            kept.append(i)
    axes.set_xticks([values[i] for i in kept], [labels[i] for i in kept])


def crosses(axes: Axes, rows: Sequence[Mapping[str, Any]], x: str, colour: str, height: float) -> bool:
    """Runs that did not complete, as crosses near the top, with what became of them. -> whether there were any."""
    broken, top = [row for row in rows if not whole(row)], axes.get_xaxis_transform()
    for row in broken:
        axes.plot(row[x], height, "x", color=colour, ms=9, mew=2.2, transform=top)
        side = -1 if row[x] == max(r[x] for r in rows) else 1  # the last one's words stay on the page
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


# -- 1. the sweep without EBC -----------------------------------------------------------------------------------------


def draw_lr_sweep(facts: Facts, decision: Mapping[str, Any]) -> Sheet:
    """Validation loss by learning rate of every plain optimizer: grid, extensions, replicates, the fair control's search."""
    rows, kept = decision["candidates"], decision["tracks"]
    own = by_track(rows, [pair["track"] for pair in decision["pairs"]])
    best = min(kept, key=lambda track: kept[track]["val_loss"])
    finding = f"Lowest: {optimizer(best)} at {kept[best]['lr']:g}, {kept[best]['val_loss']:.3f}"
    finding += (
        f" (σ over fresh seeds {kept[best]['sigma']:.3f})" if kept[best].get("sigma") is not None else ""
    )
    edges = [
        f"{optimizer(t)}'s best is its grid's {d['edge']} edge" for t, d in kept.items() if d.get("edge")
    ]
    whom = f"{', '.join(optimizer(track) for track in own)}, without EBC"
    grid_seeds = sorted({str(row["seed"]) for row in rows if row["role"] == "grid"})
    seeds, small = (
        len({row["seed"] for row in rows}),
        f"stage lr_sweep, grid with seed {', '.join(grid_seeds)}",
    )
    what = "Which learning rate is best without EBC?"
    figure, axes = page(facts, what, whom, "; ".join([finding, *edges]) + ".", seeds, (small,))
    by_value(axes, "x")
    rows_of_crosses = 0
    handles: list[Any] = []
    extended = fair = False
    for (track, found), (colour, marker, dashes) in zip(own.items(), TRACKS * len(own), strict=False):
        grid = sorted((row for row in found if row["role"] == "grid"), key=lambda row: row["lr"])
        done = [row for row in grid if whole(row)]
        lr, loss = [row["lr"] for row in done], [row["val_loss"] for row in done]
        label = optimizer(track) + ("" if track in kept else ", not kept")
        handles += axes.plot(lr, loss, color=colour, marker=marker, ls=dashes, label=label)
        axes.errorbar(lr, loss, [row["val_se"] or 0 for row in done], fmt="none", ecolor=colour, elinewidth=1)
        asked = facts.grids.get(track.rpartition("_")[0], ())
        added = [row for row in done if asked and not any(np.isclose(row["lr"], x) for x in asked)]
        extended |= bool(added)
        axes.plot(
            [r["lr"] for r in added],
            [r["val_loss"] for r in added],
            marker,
            color=colour,
            mfc="white",
            mew=1.5,
            zorder=3,
        )
        again = [row for row in found if row["role"] == "replicate" and whole(row)]
        axes.plot(
            [1.03 * r["lr"] for r in again],
            [r["val_loss"] for r in again],
            marker,
            color=colour,
            ms=3.2,
            mew=0,
            alpha=0.45,
        )
        control = sorted(
            (row for row in found if row["role"] == "control" and whole(row)), key=lambda row: row["lr"]
        )
        fair |= bool(control)
        axes.plot(
            [r["lr"] for r in control],
            [r["val_loss"] for r in control],
            color=colour,
            marker="+",
            ms=8,
            mew=1.6,
            ls=":",
            lw=1.2,
        )
        rows_of_crosses += crosses(axes, grid, "lr", colour, 0.95 - 0.08 * rows_of_crosses)
        if track in kept:
            axes.plot(kept[track]["lr"], kept[track]["val_loss"], **RING)
    handles.append(Line2D([], [], **RING, label="the baseline from here on"))
    if extended:
        handles.append(
            Line2D(
                [],
                [],
                color="#333333",
                ls="",
                marker="o",
                mfc="white",
                label="added: the best lay on the edge",
            )
        )
    handles.append(
        Line2D(
            [], [], color="#333333", ls="", marker="o", ms=3.2, mew=0, alpha=0.45, label="each replicate seed"
        )
    )
    if fair:
        handles.append(
            Line2D(
                [],
                [],
                color="#333333",
                ls=":",
                marker="+",
                ms=8,
                lw=1.2,
                label="with warm-up and decay (control)",
            )
        )
    make_room(axes, rows_of_crosses)
    rates = sorted({row["lr"] for row in rows})
    ticks_at(axes, rates, [f"{rate:g}" for rate in rates])
    axes.set_xlabel("learning rate (log scale)")
    axes.set_ylabel("validation loss (nats per token; bars: ± s.e.)")
    key(axes, handles)
    return figure


# -- 2. the LR scales -------------------------------------------------------------------------------------------------


def draw_lr_scale(facts: Facts, track: str, found: Mapping[str, Any], best_lr: float) -> Sheet:
    """Validation loss against the LR scale, with and without EBC; the baseline's noise as a band; the chosen scale."""
    reach = {arm: f"up to ×{s:g}" if s else "nowhere" for arm, s in found["headroom"].items()}
    finding = (
        f"Within 1σ of the baseline: with EBC {reach.get('ebc', '–')}, without {reach.get('none', '–')}."
    )
    if found["headroom_is_tautology"]:
        finding += " At hollow points c < 1 cancels the learning rate."
    rows = [row for arm in found["arms"].values() for row in arm]
    seeds = sorted({str(row["seed"]) for row in rows})
    what = "How far can the learning rate rise?"
    whom = f"{optimizer(track)} with and without EBC; ×1 is its best learning rate without EBC, {best_lr:g}"
    figure, axes = page(facts, what, whom, finding, len(seeds), (f"stage lr_scale, seed {', '.join(seeds)}",))
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
    ring: list[Line2D] = []
    rows_of_crosses = 0
    for role, arm in found["arms"].items():
        label, colour, marker, dashes, shift = LR_ARMS.get(role, (role, SPARE, *UNKNOWN, 1.0))
        done = [row for row in arm if whole(row)]
        x, loss = [row["lr_scale"] * shift for row in done], [row["val_loss"] for row in done]
        handles += axes.plot(x, loss, color=colour, marker=marker, ls=dashes, label=label)
        axes.errorbar(x, loss, [row["val_se"] or 0 for row in done], fmt="none", ecolor=colour, elinewidth=1)
        for at, row in zip(x, done, strict=True):
            if row["inert"]:
                axes.plot(at, row["val_loss"], marker, color=colour, mfc="white", mew=1.5, zorder=3)
            if row["run_id"] == found["run_id"]:
                ring = axes.plot(
                    at, row["val_loss"], **RING, label=f"chosen for the finals: ×{found['lr_scale']:g}"
                )
        rows_of_crosses += crosses(axes, arm, "lr_scale", colour, 0.95 - 0.08 * rows_of_crosses)
    handles += ring
    if any(row["inert"] for row in rows):
        label = "LR inert: the same run up to rounding"
        handles.append(Line2D([], [], color=EBC, ls="", marker="o", mfc="white", label=label))
    make_room(axes, rows_of_crosses)
    axes.set_xlabel(
        "learning rate, as a multiple of the best without EBC; c: median clip coefficient of EBC there"
    )
    axes.set_ylabel("validation loss (nats per token; bars: ± s.e.)")
    key(axes, handles)
    return figure


# -- 3. the effective learning rate -----------------------------------------------------------------------------------


def draw_eta_eff(
    facts: Facts, track: str, found: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]
) -> Sheet | None:
    """Median c·lr of the LR scales' runs against their learning rate; None where none recorded it. `results`: by run id."""
    arms: dict[str, list[tuple[float, float, float, float]]] = {}
    for role, rows in found["arms"].items():
        for row in rows:
            result = results.get(row["run_id"], {})
            if result.get("eta_eff_median") is not None and result.get("c_p10") is not None:
                spread = (row["lr"] * result["c_p10"], row["lr"] * result["c_p90"])
                arms.setdefault(role, []).append((row["lr"], result["eta_eff_median"], *spread))
    if not arms:
        return None
    rows = [row for own in found["arms"].values() for row in own]
    seeds = sorted({str(row["seed"]) for row in rows})
    finding = "No EBC run recorded its effective learning rate."
    if own := sorted(arms.get("ebc", [])):
        (low, slow, *_), (high, fast, *_) = own[0], own[-1]
        finding = f"With EBC the learning rate rises {high / low:.3g}×, the median step that is applied {fast / slow:.2g}×."
    whom = f"{optimizer(track)} with and without EBC: the learning rate that is applied, η_eff = c·lr, against the one asked for"
    what = "What does EBC make of a higher learning rate?"
    figure, axes = page(facts, what, whom, finding, len(seeds), (f"stage lr_scale, seed {', '.join(seeds)}",))
    for name in "xy":
        by_value(axes, name)
    rates = [row["lr"] for row in rows]
    ends = (min(rates) / 1.1, max(rates) * 1.1)
    handles = axes.plot(ends, ends, color=GOAL, ls=":", lw=1.4, label="c = 1: c·lr = lr")
    for role, points in arms.items():
        label, colour, marker, dashes, shift = LR_ARMS.get(role, (role, SPARE, *UNKNOWN, 1.0))
        lr, middle, below, above = np.array(sorted(points)).T
        handles += axes.plot(lr * shift, middle, color=colour, marker=marker, ls=dashes, label=label)
        bars = np.maximum((middle - below, above - middle), 0)
        axes.errorbar(lr * shift, middle, bars, fmt="none", ecolor=colour, elinewidth=1)
    handles.append(Line2D([], [], color="#666666", lw=1, label="bars: 10th to 90th percentile of the steps"))
    axes.set_xticks(
        sorted(set(rates)),
        [f"{lr:g}\n×{scale:g}" for lr, scale in sorted({(r["lr"], r["lr_scale"]) for r in rows})],
    )
    axes.set_xlabel("learning rate asked for, and as a multiple of the best without EBC (log scale)")
    axes.set_ylabel("median η_eff = c·lr (log scale)")
    key(axes, handles)
    return figure


# -- 4. the calibration -----------------------------------------------------------------------------------------------


def budget_of(row: Mapping[str, Any]) -> str:
    """A candidate's budget, as its arm's name says it."""
    found = re.search(r"_ebc_d[^_]+_(.+?)_x", row["arm"])
    return found[1] if found else row["role"]


def draw_calibration(
    facts: Facts, track: str, found: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], natural: float
) -> Sheet:
    """Validation loss and median c against δ*, a line for every budget; the band for c, the natural KL, the winner."""
    low, high = facts.band
    done = [row for row in rows if whole(row) and row["c_median"] is not None]
    inside = sum(low <= row["c_median"] <= high for row in done)
    finding = (
        f"Chosen: δ* {found['delta_star']:g}, {found['delta_star'] / natural:.2g} × the natural KL: median c "
    )
    finding += f"{found['c_median']:.2f}, validation loss {found['val_loss']:.3f}; {inside} of {len(rows)} runs inside the band."
    seeds = sorted({str(row["seed"]) for row in rows})
    what, scale = "Which KL target δ* holds the updates back as much as wanted?", found["lr_scale"]
    whom = f"{optimizer(track)} with EBC at ×{scale:g} the best plain learning rate: loss and clip coefficient against δ*"
    small = (f"stage calibrate, seed {', '.join(seeds)}",)
    figure, bottom = page(facts, what, whom, finding, len(seeds), small, size=(8.6, 6.2))
    top = another(bottom)
    handles: list[Any] = []
    for axes in (top, bottom):
        by_value(axes, "x")
        axes.axvline(natural, color="#666666", ls=":", lw=1.2)
    handles.append(
        bottom.axhspan(
            low, high, color=GOAL, alpha=0.15, lw=0, label=f"target band for c, {low:g} to {high:g}"
        )
    )
    handles.append(
        Line2D([], [], color="#666666", ls=":", lw=1.2, label=f"natural KL of the baseline, {natural:.2g}")
    )
    lost = False
    budgets = list(dict.fromkeys(budget_of(row) for row in rows))
    looks = ((EBC, "o", "-"), (OTHER, "D", "-."), (SPARE, "v", "--"), (PLAIN, "s", ":"))
    for budget, (colour, marker, dashes) in zip(budgets, looks * len(budgets), strict=False):
        own = sorted((row for row in rows if budget_of(row) == budget), key=lambda row: row["delta_star"])
        shown = [row for row in own if row in done]
        x = [row["delta_star"] for row in shown]
        style: dict[str, Any] = {"color": colour, "marker": marker, "ls": dashes}
        handles += top.plot(x, [row["val_loss"] for row in shown], **style, label=f"budget {budget}")
        top.errorbar(
            x,
            [r["val_loss"] for r in shown],
            [r["val_se"] or 0 for r in shown],
            fmt="none",
            ecolor=colour,
            elinewidth=1,
        )
        bottom.plot(x, [row["c_median"] for row in shown], **style)
        lost |= crosses(top, own, "delta_star", colour, 0.93)
        for row in shown:
            if row["run_id"] == found["run_id"]:
                top.plot(row["delta_star"], row["val_loss"], **RING)
                bottom.plot(row["delta_star"], row["c_median"], **RING)
    handles.append(Line2D([], [], **RING, label="chosen"))
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

"""What the clip coefficient follows from, where it was measured: the groups' contributions s_g, and how tight
their sum is.

The columns `s_<group>`, `surrogate`, `radius` and `tightness` of steps.csv, which `ebc-lab columns` explains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.patches import Patch

from ...text.words import arm_title, optimizer, plural
from ..drawing.curves import Run, by_step, running_mean, thinned, trouble, window
from ..drawing.looks import ALERT, AMBER, BLACK, EBC, GOAL, INK, PINK, REST, SEED, SKY
from ..drawing.sheet import Arms, Facts, Sheet, entry, log_axis, name_rows, over_steps

NAMED = 6  # groups that have a layer of their own; the smaller ones share one
LAYERS = (EBC, AMBER, GOAL, SKY, ALERT, PINK)  # neighbours far apart, also for colour-blind readers


# -- the groups' contributions -------------------------------------------------------------------------------


def groups_of(runs: Sequence[Run]) -> list[str]:
    """Return the groups whose contributions these runs recorded, in the order of the file."""
    return list(dict.fromkeys(k.removeprefix("s_") for r in runs for k in r.steps if k.startswith("s_")))


def measured(runs: Sequence[Run], column: str) -> list[Mapping[str, np.ndarray]]:
    """Return the runs' streams at the steps where the column was measured."""
    streams: list[Mapping[str, np.ndarray]] = []
    for run in runs:
        rows = np.isfinite(run.steps[column]) if column in run.steps else np.zeros(0, dtype=bool)
        if rows.any():
            streams.append({k: v[rows] for k, v in run.steps.items()})
    return streams


def percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 0.01 else f"{100 * share:.1g}%"


def draw_groups(facts: Facts, name: str, arm: Mapping[str, Any], runs: Sequence[Run]) -> Sheet | None:
    """Draw the groups' contributions to S stacked over the steps, the largest by name; None without any."""
    streams, groups = measured(runs, "surrogate"), groups_of(runs)
    if not streams or not groups:
        return None
    steps, surrogate = by_step(streams, "surrogate")
    layers = {g: by_step(streams, f"s_{g}")[1].mean(axis=0).filled(0.0) for g in groups}
    bands, finding = _bands(layers)
    sheet = _sheet(facts, name, arm, runs, "Which groups of weights move the predictions?", finding)
    [axes] = sheet.panels
    axes.set_ylabel("contribution s_g (logits per token), stacked")
    at = thinned(len(steps))
    stacked = np.zeros(len(steps))
    for i, (label, layer) in enumerate(bands.items()):
        smooth = running_mean(np.ma.masked_invalid(layer[None]))[0].filled(0.0)
        look: dict[str, Any] = {"fc": LAYERS[i] if i < len(LAYERS) else REST, "hatch": "/" * (i % 2)}
        look |= {"alpha": 0.55, "ec": "white", "lw": 0.8}
        axes.fill_between(steps[at], stacked[at], (stacked + smooth)[at], **look)
        middle = float(stacked[-1] + smooth[-1] / 2)
        sheet.label(axes, [(float(steps[at[-1]]), middle, label, INK)], [Patch(label=label, **look)])
        stacked = stacked + smooth
    for row in surrogate if len(streams) > 1 else ():
        axes.plot(steps[at], running_mean(row[None])[0][at], color=BLACK, lw=0.6, alpha=0.4)
    label = f"S, what they add up to: mean over the seeds and {window(len(steps))} measured steps"
    total = running_mean(np.ma.masked_array(surrogate.mean(axis=0))[None])[0]
    axes.plot(steps[at], total[at], color=BLACK, lw=1.6, label=label)
    if np.isfinite(radius := by_step(streams, "radius")[1].mean(axis=0).filled(np.nan)).any():
        label = "trust radius τ: c = τ / S where S is above it"
        axes.plot(steps[at], radius[at], color=ALERT, lw=1.4, ls="--", label=label)
    axes.set_ylim(0, 1.08 * max(float(np.max(stacked[at])), float(total.max())))
    sheet.key(*axes.get_legend_handles_labels()[0])
    return sheet


def _sheet(
    facts: Facts, name: str, arm: Mapping[str, Any], runs: Sequence[Run], what: str, finding: str
) -> Sheet:
    """Return the sheet of one arm, its x axis the training steps."""
    about = [name, f"lr {arm['lr']:g}"]
    if "about" in arm:
        about = [optimizer(arm["track"]), *about[1:], *([f"δ* {arm['delta_star']:g}"] if arm["ebc"] else [])]
    notes = (plural(len(runs), "seed"), *about)
    sheet = Sheet(facts, what, (arm_title(name, arm), finding), notes, trouble(runs))
    last = max((float(r.steps["step"][-1]) for r in runs if r.steps), default=0.0)
    over_steps(facts, sheet.panels, last)
    return sheet


def _bands(layers: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], str]:
    """Return label -> layer, the largest first and the small ones as one; and what is to be said of them."""
    total = np.maximum(sum(layers.values()), np.finfo(float).tiny)
    share = {g: float(np.median(layer / total)) for g, layer in layers.items()}
    ranked = sorted(layers, key=lambda g: -share[g])
    top = ranked if len(ranked) <= NAMED + 1 else ranked[:NAMED]
    bands = {f"{g}  {100 * share[g]:.0f}%": layers[g] for g in top}
    if rest := [g for g in ranked if g not in top]:
        label = f"{len(rest)} other groups  {100 * sum(share[g] for g in rest):.0f}%"
        bands[label] = np.sum([layers[g] for g in rest], axis=0)
    finding = f"{ranked[0]} makes up most of it, {100 * share[ranked[0]]:.0f}% on median"
    finding += f"; {ranked[-1]} least, {percent(share[ranked[-1]])}" if len(ranked) > 1 else ""
    return bands, f"{finding} (of {len(ranked)} group{'s' * (len(ranked) > 1)})"


# -- tightness -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tightness:
    """T/(c·S) of an arm: every measured step of its seeds, and each seed's median."""

    values: np.ndarray
    seeds: Sequence[float]


def tightness_of(runs: Sequence[Run]) -> Tightness | None:
    """Return the tightness of an arm; None where no run measured it."""
    seeds = [values for s in measured(runs, "tightness") if len(values := s["tightness"][s["tightness"] > 0])]
    return Tightness(np.concatenate(seeds), [float(np.median(x)) for x in seeds]) if seeds else None


def draw_tightness(facts: Facts, track: str, arms: Arms, measured: Mapping[str, Tightness]) -> Sheet:
    """Draw a row for each arm that measured it: median, quartiles, 10th to 90th percentile, seeds faint."""
    whom = (
        f"{optimizer(track)}: tightness, the measured movement T over the predicted one, c·S, at the audits"
    )
    sheet = Sheet(
        facts,
        "Does a step move the predictions as far as the groups' sum says?",
        (whom, _tightness_finding(measured)),
        arms={name: arms[name] for name in measured},
        heights=(1.1 + 0.36 * len(measured),),
    )
    [axes] = sheet.panels
    axes.set_xlabel("T / (c·S), log scale\n← less than predicted        more →")
    log_axis(axes, "x", (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))
    axes.axvline(1.0, color=GOAL, lw=1.4, ls="--", zorder=1)
    for y, (name, tightness) in enumerate(measured.items()):
        look = facts.look(name)
        p10, p25, middle, p75, p90 = np.quantile(tightness.values, (0.1, 0.25, 0.5, 0.75, 0.9))
        axes.plot((p10, p90), (y, y), color=look.colour, lw=0.9)
        axes.plot((p25, p75), (y, y), color=look.colour, lw=3.0, solid_capstyle="butt")
        axes.plot(middle, y, look.marker, color=look.colour, ms=6.5, mec="white", zorder=3)
        axes.plot(tightness.seeds, [y + 0.25] * len(tightness.seeds), color=look.colour, **SEED)
    sheet.key(entry("1: exactly as predicted", GOAL, lw=1.4, ls="--"))
    sheet.key(entry("median and quartiles over all seeds' measured steps", marker="o", lw=3.0))
    sheet.key(entry("10th to 90th percentile", lw=0.9), entry("each seed's median", **SEED))
    name_rows(axes, list(measured))
    return sheet


def _tightness_finding(measured: Mapping[str, Tightness]) -> str:
    every = np.concatenate([t.values for t in measured.values()])
    share = 100 * float((every <= 1).mean())
    middles = {name: float(np.median(t.values)) for name, t in measured.items()}
    low, high = min(middles, key=lambda n: middles[n]), max(middles, key=lambda n: middles[n])
    finding = f"At most as far (≤ 1) on {share:.0f}% of {len(every)} measured steps; "
    finding += f"median {middles[low]:.2g} ({low})"
    return finding + (f" to {middles[high]:.2g} ({high})" if low != high else "")

"""One arm, of a study's finals or of a suite: the pictures of its clip coefficient and KL."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from ebc_lab.ebc.options import RULED
from ebc_lab.records.figures import KL_BAND, PLATEAU_C, WARM_STEPS, limited_by_kl

from ...text.words import arm_title, optimizer
from ..drawing.curves import (
    Line,
    Run,
    applied_c,
    audited,
    by_step,
    moving_quantiles,
    running_mean,
    thinned,
    trouble,
    window,
)
from ..drawing.looks import ALERT, BLACK, GOAL
from ..drawing.sheet import Facts, Sheet, count_seeds, lines, log_axis, over_steps

KL_RULES = "ruled"  # the column of steps.csv, of runs with a radius beside the KL
RULES = ("kl_ruled", "radius_ruled")
MOST_MARKS = 400


def arm_sheet(
    facts: Facts, name: str, arm: Mapping[str, Any], runs: Sequence[Run], what: str, finding: str
) -> Sheet:
    """Return the sheet of one arm, its x axis the training steps."""
    about = [name, f"lr {arm['lr']:g}"]
    if "about" in arm:
        about = [optimizer(arm["track"]), *about[1:], *([f"δ* {arm['delta_star']:g}"] if arm["ebc"] else [])]
    notes = (count_seeds(len(runs)), *about)
    sheet = Sheet(facts, what, (arm_title(name, arm), finding), notes, trouble(runs))
    last = max((float(r.steps["step"][-1]) for r in runs if r.steps), default=0.0)
    over_steps(facts, sheet.panels, last)
    return sheet


def draw_clip(facts: Facts, name: str, arm: Mapping[str, Any], runs: Sequence[Run]) -> Sheet | None:
    """Draw the clip coefficient over the steps: quantiles over the seeds and a moving window, and where it
    should lie; None where no step was recorded."""
    steps, table = applied_c(runs)
    if not len(steps):
        return None
    low, high = facts.band
    sheet = arm_sheet(
        facts, name, arm, runs, "How much of each update is applied", _clip_finding(facts, runs)
    )
    [axes] = sheet.panels
    axes.set(ylabel="clip coefficient c: applied share of the update", ylim=(-0.02, 1.06))
    label = f"plateau line, {PLATEAU_C:g}"
    if not facts.arms:  # a suite has no verdict
        band = f"{_band_in_words(facts)} for the median, {low:g} to {high:g}"
        axes.axhspan(low, high, color=GOAL, alpha=0.15, lw=0, label=band)
        label += ": the verdict asks EBC ×2 not to stay under it"
    axes.axhline(PLATEAU_C, color=ALERT, ls="--", lw=1.2, label=label)
    look, at = facts.look(name), thinned(len(steps))
    below, middle, above = moving_quantiles(table, (0.1, 0.5, 0.9), at)
    shade: dict[str, Any] = {"color": look.colour, "alpha": 0.16, "lw": 0}
    axes.fill_between(steps[at], below, above, **shade, label="10th to 90th percentile")
    each = np.ma.concatenate([moving_quantiles(row[None], (0.5,), at) for row in table])
    label = f"median, over the seeds and {window(len(steps))} steps"
    lines(axes, Line(steps[at], each, middle), look, ls="-", lw=2.2, label=label)
    if all(KL_RULES in run.steps for run in runs if run.steps):
        ruled = running_mean(by_step((r.steps for r in runs), KL_RULES)[1] == RULED.index("kl")).mean(0)
        label = "share of these steps that the KL limited; the radius limits the others"
        axes.plot(steps[at], ruled[at], color=BLACK, lw=1.2, ls="-.", label=label)
    sheet.key(*axes.get_legend_handles_labels()[0])
    return sheet


def _band_in_words(facts: Facts) -> str:
    """Return what the band is to an arm: δ* may have been chosen by it, or it is only checked."""
    return "target band" if facts.aims_at_band else "verdict’s band"


def _clip_finding(facts: Facts, runs: Sequence[Run]) -> str:
    low, high = facts.band
    results = [r.result for r in runs if r.result.get("c_median") is not None]
    if not results:
        return "No seed has a result"
    c = statistics.median(r["c_median"] for r in results)
    where = "inside"
    if not low <= c <= high:
        where = "below" if c < low else "above"
    clipped = 100 * statistics.fmean(r["clip_rate"] for r in results)
    longest = max(r["plateau_steps"] for r in results)
    finding = f"Median c {c:.2f}{'' if facts.arms else f', {where} the {_band_in_words(facts)}'}; "
    finding += f"{clipped:.0f}% of the steps are clipped"
    if all(r.get("kl_ruled") is not None for r in results):
        by_kl, by_radius = (100 * statistics.fmean(r[key] for r in results) for key in RULES)
        finding += f", {by_kl:.0f}% by the KL and {by_radius:.0f}% by the radius"
    return f"{finding}; longest stretch under {PLATEAU_C:g}: {longest} step{'s' * (longest != 1)}"


def draw_kl(
    facts: Facts, name: str, arm: Mapping[str, Any], runs: Sequence[Run], natural_kl: float
) -> Sheet | None:
    """Draw the applied KL at the audits on a log axis, with the target δ* of each step or the plain
    optimizer's natural KL; None where no step was audited."""
    audits = [audited(r.steps) for r in runs]
    steps, table = by_step(audits, "applied_kl")
    if not len(steps):
        return None
    what = "How far each step moves the predictions (KL divergence)"
    sheet = arm_sheet(facts, name, arm, runs, what, _kl_finding(arm, runs))
    [axes] = sheet.panels
    axes.set_ylabel("applied KL (nats per token, log scale)")
    log_axis(axes, "y")
    look = facts.look(name)
    if arm["ebc"]:
        at, targets = by_step((r.steps for r in runs), "target_kl")
        at, target = at[thinned(len(at))], targets.mean(0)[thinned(len(at))]
        around = (target * (1 - KL_BAND), target * (1 + KL_BAND))
        label = f"within ±{100 * KL_BAND:g}% of the target"
        axes.fill_between(at, *around, color=GOAL, alpha=0.2, lw=0, label=label)
        axes.plot(at, target, color=GOAL, lw=1.4, ls="--", label="target δ* of that step")
    else:
        label = f"natural KL: median of the unclipped baseline, {natural_kl:.3g}"
        axes.axhline(natural_kl, color=GOAL, lw=1.4, ls="--", label=label)
    line = Line(steps, table, np.ma.median(table, axis=0))
    lines(axes, line, look, ls="-", label="applied KL, median of the seeds")
    if arm["ebc"]:
        _mark_audits(axes, [a for a in audits if a], look.colour, math.ceil(table.count() / MOST_MARKS))
    sheet.key(*axes.get_legend_handles_labels()[0])
    return sheet


def _kl_finding(arm: Mapping[str, Any], runs: Sequence[Run]) -> str:
    results = [r.result for r in runs if r.result.get("kl_median") is not None]
    clipped = sum(r.get("kl_clipped_audits") or 0 for r in results)
    if not results:
        return "No seed has an audited step"
    if not arm["ebc"]:
        median = statistics.median(r["kl_median"] for r in results)
        return f"Without EBC nothing holds the KL; its median from step {WARM_STEPS} on is {median:.2g}"
    if not clipped:
        return "No audited step was clipped, so the target never acted"
    within = sum((r["kl_within_30pct"] or 0) * (r["kl_clipped_audits"] or 0) for r in results) / clipped
    ratio = statistics.median(r["kl_ratio_median"] for r in results if r["kl_ratio_median"] is not None)
    finding = f"Of {clipped} audited, clipped steps {100 * within:.0f}% lie within ±{100 * KL_BAND:g}% "
    return f"{finding}of the target; median KL / target {ratio:.2f}"


def _mark_audits(axes: Axes, audits: Sequence[Mapping[str, np.ndarray]], colour: str, every: int) -> None:
    """Mark one in `every` audited steps.

    What the KL did not limit lies under the target by right: hollow, so that it is not read as a miss.
    """
    some = f" (one in {every} marked)" if every > 1 else ""
    for face, clipped, label in (
        (colour, True, f"audited step, limited by the KL{some}"),
        ("white", False, "audited step, not limited by it"),
    ):
        chosen = [limited_by_kl(a) == clipped for a in audits]
        x, y = (
            np.concatenate([a[k][m] for a, m in zip(audits, chosen, strict=True)])
            for k in ("step", "applied_kl")
        )
        if len(x):
            look: dict[str, Any] = {"ms": 2.6, "mew": 0.7, "mec": colour, "mfc": face, "alpha": 0.8}
            axes.plot(x[::every], y[::every], "o", **look, label=label)

"""The picture of how a suite's arms recover from shocks."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from ebc_lab.config.parts.shock import RECOVERY_WINDOW, SHOCK_WINDOW

from ..text.words import optimizer
from .curves import ArmRuns, thinned
from .forest import missing, signed
from .sheet.figure import (
    ALERT,
    EBC,
    FAINT,
    GOAL,
    GREY,
    INK,
    LABELS_FROM,
    MOST_LINES,
    PLAIN,
    SMALL,
    Arms,
    Facts,
    Sheet,
    another,
    entry,
    page,
)
from .sheet.place import beside, key, lowered, stack

WITH_EBC = (EBC, GOAL, "C6", "black")  # the two palettes where arms with and without EBC share a panel
WITHOUT = (PLAIN, "C4", "C5", ALERT)
AFTER_SHOCK = 150  # steps shown after a shock
RECOVERY_POINTS = 100  # of a line
SHOCKS = {
    "label_noise": "one batch with {:.0%} of its targets drawn at random",
    "lr_spike": "one step at {:g} times the learning rate",
    "corrupt_gradient": "one gradient with noise of {:g} times its norm",
}


@dataclass(frozen=True)
class Recovery:
    """An arm's training loss around its shock.

    `loss`: minus its level before, by `offset` from the shock's step.
    """

    label: str
    kind: str  # of the shock
    size: float
    offset: np.ndarray
    loss: np.ndarray
    seeds: np.ndarray  # the same of each seed
    peaks: Sequence[float]  # of the seeds
    back: Sequence[float | None]  # steps until the loss was back, None: never


def gather(of: ArmRuns) -> Recovery | None:
    """Return the arm's recovery; None where it had no shock, or no run lasted long enough after it."""
    lines, peaks, back = [], [], []
    offset = np.arange(-SHOCK_WINDOW, AFTER_SHOCK + 1)
    # with the gap at the shock itself
    offset = offset[np.union1d(thinned(len(offset), RECOVERY_POINTS), SHOCK_WINDOW)]
    shock: Mapping[str, Any] = {}
    for run in of.runs:
        config = of.specs[run.seed].get("config", {})
        if run.result.get("shock_peak") is None or not run.steps or not config:
            continue
        shock = config["shock"]
        at = config["steps"] // 2 if shock["step"] is None else shock["step"]
        lines.append(around(run.steps["loss"], at, offset))
        peaks.append(float(run.result["shock_peak"]))
        back.append(run.result.get("shock_recovery_steps"))
    if not lines:
        return None
    mean = np.ma.masked_invalid(lines).mean(axis=0).filled(math.nan)
    return Recovery(of.label, shock["name"], shock["size"], offset, mean, np.array(lines), peaks, back)


def around(losses: np.ndarray, shock: int, offset: np.ndarray) -> np.ndarray:
    """Running mean of the last 10 losses, none from before the shock, minus the mean of the 20 before it.

    NaN outside the run, and at the shock itself, whose loss may be of corrupted targets.
    """
    out = np.full(len(offset), math.nan)
    level = losses[max(0, shock - SHOCK_WINDOW) : shock].mean()
    for i, step in enumerate(shock + offset):
        first = max(step - RECOVERY_WINDOW + 1, shock + 1 if step > shock else 0)
        if 0 <= step < len(losses) and step != shock:
            out[i] = losses[first : step + 1].mean() - level
    return out


def draw(facts: Facts, track: str, arms: Arms, drawn: Mapping[str, Recovery]) -> Sheet:
    """Draw a panel for each kind of shock, with a line for each arm that had it."""
    recoveries = list(drawn.values())
    kinds = list(dict.fromkeys((r.kind, r.size) for r in recoveries))
    of_kind = {kind: [r for r in recoveries if (r.kind, r.size) == kind] for kind in kinds}
    worst, least = (choose(recoveries, key=lambda r: statistics.fmean(r.peaks)) for choose in (max, min))
    text = f"Largest peak: {worst.label}, {signed(statistics.fmean(worst.peaks))}"
    text += (
        f"; smallest: {least.label}, {signed(statistics.fmean(least.peaks))}" if least is not worst else ""
    )
    what = "How does a run recover from a shock?"
    whom = f"{optimizer(track)}: training loss around a shock, "
    whom += f"minus its mean over the {SHOCK_WINDOW} steps before"
    small = ("peak: the highest mean of any 10 later steps",)
    seeds = max(len(arm["runs"]) for arm in arms.values())
    size = (10.0, 2.4 + 2.2 * len(kinds))
    figure, last = page(facts, what, whom, f"{text}.", seeds, small, missing(arms), size)
    panels = [*(another(last) for _ in kinds[1:]), last]
    last.set_xlabel("steps since the shock")
    handles = []
    for dashes, words, ebc in (("-", "with", True), ("--", "without", False)):
        label = f"{words} EBC, mean of the seeds over the last {RECOVERY_WINDOW} steps at most"
        if any(bool(arm["ebc"]) == ebc for arm in arms.values()):
            handles.append(entry(label, INK, ls=dashes))
    if any(len(of_one) <= MOST_LINES for of_one in of_kind.values()):
        handles.append(entry("each seed", GREY, **FAINT))
    handles.append(entry("the shock (its own step is left out)", ALERT, ls=":", lw=1.2))
    key(last, handles)
    lowered(last, 12.0)
    stack(panels, [1.0] * len(panels), 36, LABELS_FROM)
    for ((kind, strength), of_one), axes in zip(of_kind.items(), panels, strict=True):
        title = SHOCKS.get(kind, kind + " {:g}").format(strength)
        axes.set_title(title, loc="left", size=SMALL, color=INK)
        _draw_recoveries(axes, arms, of_one)
    return figure


def _draw_recoveries(axes: Axes, arms: Arms, recoveries: Sequence[Recovery]) -> None:
    """The lines of one kind of shock: thinner when the colours are used up, and dashed differently after
    that."""
    axes.set_ylabel("loss − before (nats)")
    axes.axhline(0, color="#999999", lw=0.8)
    axes.axvline(0, color=ALERT, ls=":", lw=1.2)
    looks = {
        ebc: itertools.cycle(itertools.product(dashes, (1.8, 0.9), palette))
        for ebc, dashes, palette in ((True, ("-", "-."), WITH_EBC), (False, ("--", ":"), WITHOUT))
    }
    ends = []
    for recovery in recoveries:
        dashes, width, colour = next(looks[bool(arms[recovery.label]["ebc"])])
        axes.plot(recovery.offset, recovery.loss, color=colour, lw=width, ls=dashes)
        if len(recoveries) <= MOST_LINES:
            axes.plot(recovery.offset, recovery.seeds.T, color=colour, lw=0.5, alpha=0.3, zorder=1.2)
        end = np.flatnonzero(np.isfinite(recovery.loss))[-1]
        ends.append((float(recovery.offset[end]), float(recovery.loss[end]), told(recovery), colour))
    axes.set_xlim(-SHOCK_WINDOW - 1, max(x for x, *_ in ends) + 1)
    beside(axes, ends)


def told(recovery: Recovery) -> str:
    """The arm with its peak, and after how many steps its loss was back."""
    back = [steps for steps in recovery.back if steps is not None]
    label = recovery.label.removesuffix(f"_{recovery.kind}")  # the panel says which shock it was
    text = f"{label}  peak {signed(statistics.fmean(recovery.peaks))}, "
    after = round(statistics.fmean(back)) if back else 0
    if after:
        text += f"back after {after} step{'s' * (after != 1)}"
    else:
        text += "back immediately" if back else "not back"
    some = 0 < len(back) < len(recovery.back)
    return text + (f" ({len(back)} of {len(recovery.back)} seeds)" if some else "")

"""The picture of how a suite's arms recover from shocks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ebc_lab.config.parts.shock import RECOVERY_WINDOW, SHOCK_WINDOW

from ..text.words import optimizer, signed
from .drawing.curves import ArmRuns, Line, thinned
from .drawing.looks import ALERT, FAINT, GREY, RULE
from .drawing.sheet import Arms, Facts, Sheet, entry, lines

AFTER_SHOCK = 150  # steps shown after a shock
RECOVERY_POINTS = 100  # of a line
SHOCKS = {
    "label_noise": "one batch with {:.0%} of its targets drawn at random",
    "lr_spike": "one step at {:g} times the learning rate",
    "corrupt_gradient": "one gradient with noise of {:g} times its norm",
}


@dataclass(frozen=True)
class Recovery:
    """An arm's training loss around its shock, minus its level before, by the steps since the shock."""

    label: str
    kind: str  # of the shock
    size: float
    loss: Line
    peaks: Sequence[float]  # of the seeds
    back: Sequence[float | None]  # steps until the loss was back, None: never


def gather(arm: ArmRuns) -> Recovery | None:
    """Return the arm's recovery; None where it had no shock, or no run lasted long enough after it."""
    losses, peaks, back = [], [], []
    offset = np.arange(-SHOCK_WINDOW, AFTER_SHOCK + 1)
    # with the gap at the shock itself
    offset = offset[np.union1d(thinned(len(offset), RECOVERY_POINTS), SHOCK_WINDOW)]
    shock: Mapping[str, Any] = {}
    for run in arm.runs:
        config = arm.specs[run.seed].get("config", {})
        if run.result.get("shock_peak") is None or not run.steps or not config:
            continue
        shock = config["shock"]
        at = config["steps"] // 2 if shock["step"] is None else shock["step"]
        losses.append(around(run.steps["loss"], at, offset))
        peaks.append(float(run.result["shock_peak"]))
        back.append(run.result.get("shock_recovery_steps"))
    if not losses:
        return None
    seeds = np.ma.masked_invalid(losses)
    loss = Line(offset, seeds, seeds.mean(axis=0))
    return Recovery(arm.label, shock["name"], shock["size"], loss, peaks, back)


def around(losses: np.ndarray, shock: int, offset: np.ndarray) -> np.ndarray:
    """Return the mean of the last 10 losses, none from before the shock, minus that of the 20 before it.

    NaN outside the run, and at the shock itself, whose loss may be of corrupted targets.
    """
    out = np.full(len(offset), math.nan)
    level = losses[max(0, shock - SHOCK_WINDOW) : shock].mean()
    for i, step in enumerate(shock + offset):
        first = max(step - RECOVERY_WINDOW + 1, shock + 1 if step > shock else 0)
        if 0 <= step < len(losses) and step != shock:
            out[i] = losses[first : step + 1].mean() - level
    return out


def draw(facts: Facts, track: str, arms: Arms, recoveries: Mapping[str, Recovery]) -> Sheet:
    """Draw a panel for each kind of shock, with a line for each arm that had it."""
    kinds = list(dict.fromkeys((r.kind, r.size) for r in recoveries.values()))
    whom = (
        f"{optimizer(track)}: training loss around a shock, minus its mean of the {SHOCK_WINDOW} steps before"
    )
    sheet = Sheet(
        facts,
        "How does a run recover from a shock?",
        (whom, _finding(list(recoveries.values()))),
        (
            "peak: the highest mean of any 10 later steps",
            f"mean of the seeds over the last {RECOVERY_WINDOW} steps at most",
        ),
        arms=arms,
        grid=[chr(ord("a") + i) for i in range(len(kinds))],
        heights=[2.7] * len(kinds),
    )
    for (kind, size), axes in zip(kinds, sheet.panels, strict=True):
        axes.set_title(SHOCKS.get(kind, kind + " {:g}").format(size), loc="left")
        axes.set_ylabel("loss − before (nats)")
        axes.axhline(0, color=RULE, lw=0.8)
        axes.axvline(0, color=ALERT, ls=":", lw=1.2)
        for name, recovery in recoveries.items():
            if (recovery.kind, recovery.size) != (kind, size):
                continue
            look = facts.look(name)
            if end := lines(axes, recovery.loss, look):
                sheet.label(axes, [(*end, _recovery_in_words(recovery), look.colour)])
        axes.set_xlim(-SHOCK_WINDOW - 1, AFTER_SHOCK + 1)
    last = sheet.panels[-1]
    last.set_xlabel("steps since the shock")
    sheet.key(entry("each seed", GREY, **FAINT))
    sheet.key(entry("the shock (its own step is left out)", ALERT, ls=":", lw=1.2))
    return sheet


def _finding(recoveries: Sequence[Recovery]) -> str:
    worst, least = (choose(recoveries, key=lambda r: statistics.fmean(r.peaks)) for choose in (max, min))
    text = f"Largest peak: {worst.label}, {signed(statistics.fmean(worst.peaks), 3)}"
    if least is worst:
        return text
    return f"{text}; smallest: {least.label}, {signed(statistics.fmean(least.peaks), 3)}"


def _recovery_in_words(recovery: Recovery) -> str:
    """Return the arm with its peak, and after how many steps its loss was back."""
    back = [steps for steps in recovery.back if steps is not None]
    label = recovery.label.removesuffix(f"_{recovery.kind}")  # the panel says which shock it was
    text = f"{label}  peak {signed(statistics.fmean(recovery.peaks), 3)}, "
    after = round(statistics.fmean(back)) if back else 0
    if after:
        text += f"back after {after} step{'s' * (after != 1)}"
    else:
        text += "back immediately" if back else "not back"
    some = 0 < len(back) < len(recovery.back)
    return text + (f" ({len(back)} of {len(recovery.back)} seeds)" if some else "")

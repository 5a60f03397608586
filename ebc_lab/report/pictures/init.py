"""The picture of what arms that start from other weights learn of the new text and forget of the old one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np

from ..text.words import optimizer, plural
from .drawing.curves import ArmRuns
from .drawing.looks import INK
from .drawing.sheet import Arms, Facts, Sheet, entry

NEW, OLD = "val_loss", "init_val_loss"
END: dict[str, Any] = {"marker": "o", "ms": 6, "ls": ""}
POINTS: dict[str, Any] = {"marker": ".", "ms": 5, "lw": 1.2}


@dataclass(frozen=True)
class Trade:
    """What an arm learned and forgot: losses on the new text and on the old one, after the last step.

    `new`, `old`: of each point that it was tuned over, from the shortest steps to the longest; those that
    learned less than the shortest did are left out. `seeds`: of a point. `end`: at the chosen point, means of
    its completed seeds.
    """

    new: np.ndarray
    old: np.ndarray
    seeds: int
    end: tuple[float, float]
    moved: float | None  # ‖W − W₀‖ over ‖W₀‖ there

    def forgotten_at(self, new: float) -> float | None:
        """Return the old text's loss where the new one's is `new`, between two points; None where the arm's
        points do not get there. Of the points those from the shortest steps to the best."""
        if not len(self.new):
            return None
        learning = slice(int(self.new.argmin()) + 1)
        learned, old = self.new[learning], self.old[learning]
        order = np.argsort(learned)
        inside = learned.min() <= new <= learned.max()
        return float(np.interp(new, learned[order], old[order])) if inside else None


def gather(arm: ArmRuns) -> Trade | None:
    """Return the arm's trade; None where no completed run measured an old text."""
    done = [run.result for run in arm.runs if _measured(run.result)]
    if not done:
        return None
    points: dict[str, list[Mapping[str, Any]]] = {}
    for name, result in arm.tried():
        points.setdefault(name, []).append(result)
    whole = [results for results in points.values() if all(map(_measured, results))]
    whole.sort(key=lambda results: _mean(results, "weights_moved"))
    at = np.array([(_mean(results, NEW), _mean(results, OLD)) for results in whole]).reshape(-1, 2)
    at = at[at[:, 0] <= at[:1, 0].max(initial=-np.inf)]
    end, seeds = (_mean(done, NEW), _mean(done, OLD)), max(map(len, whole), default=0)
    return Trade(at[:, 0], at[:, 1], seeds, end, arm.decided["figures"].get("weights_moved"))


def _measured(result: Mapping[str, Any]) -> bool:
    return result.get("outcome") == "completed" and result.get(OLD) is not None


def _mean(results: Iterable[Mapping[str, Any]], name: str) -> float:
    return fmean(result[name] for result in results)


def draw(facts: Facts, track: str, arms: Arms, trades: Mapping[str, Trade]) -> Sheet:
    """Draw the loss on the old text over that on the new one: a line through each arm's points."""
    whom = f"{optimizer(track)}: losses on both texts at the end of each run, from short steps to long ones"
    what = "What does a run forget for what it learns?"
    words = (whom, _finding(trades))
    sheet = Sheet(facts, what, words, arms=arms, heights=(4.4,))
    [axes] = sheet.panels
    axes.set_xlabel("loss on the new text (nats per token): learning goes to the left")
    axes.set_ylabel("loss on the old text (nats per token)")
    for label, trade in trades.items():
        look = facts.look(label)
        moved = "" if trade.moved is None else f": weights moved {trade.moved:.0%}"
        axes.plot(trade.new, trade.old, color=look.colour, ls=look.line, **POINTS)
        axes.plot(*trade.end, color=look.colour, **END)
        mark = entry(label, look.colour, ls=look.line, marker="o", ms=5)
        sheet.label(axes, [(*trade.end, label + moved, look.colour)], [mark])
    if tried := max(trade.seeds for trade in trades.values()):
        sheet.key(entry(f"points that it was tuned over, {plural(tried, 'seed')} each", INK, **POINTS))
    sheet.key(entry("at the chosen point, mean of the seeds", INK, **END))
    return sheet


def _finding(trades: Mapping[str, Trade]) -> str:
    """Return what was forgotten at equal learning: at the loss that most arms' points get to, the middle one
    of those; where no two meet, who learned most and who forgot least."""
    met = {x: _forgotten(trades, x) for trade in trades.values() for x in trade.new}
    most = max(map(len, met.values()), default=0)
    if most < 2:
        best, least = (min(trades, key=lambda label: trades[label].end[i]) for i in (0, 1))
        learned = f"Learned most: {best}, {trades[best].end[0]:.3f}"
        return f"{learned}; forgot least: {least}, {trades[least].end[1]:.3f}"
    asked = [x for x, of in met.items() if len(of) == most]
    at = min(asked, key=lambda x: abs(x - median(asked)))
    low, high = (by(met[at], key=lambda label: met[at][label]) for by in (min, max))
    text = f"Learned as much, to {at:.2f}, arms end on the old text at {met[at][low]:.2f} ({low})"
    text += f" to {met[at][high]:.2f} ({high})"
    never = [label for label in trades if label not in met[at]]
    if never:
        text += f"; {' and '.join(never)} {'does' if len(never) == 1 else 'do'} not get there"
    return text


def _forgotten(trades: Mapping[str, Trade], new: float) -> dict[str, float]:
    """Return arm -> its loss on the old text where that on the new one is `new`, of arms that get there."""
    found = {label: trade.forgotten_at(new) for label, trade in trades.items()}
    return {label: old for label, old in found.items() if old is not None}

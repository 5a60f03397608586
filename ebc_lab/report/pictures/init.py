"""The picture of what arms that start from other weights learn of the new text and forget of the old one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..text.words import optimizer
from .curves import Run
from .forest import missing
from .sheet.figure import EBC, GREY, INK, LABELS_FROM, PLAIN, Arms, Facts, Sheet, entry, page
from .sheet.place import beside, key, narrowed

OLD = "init_val_loss"
END: dict[str, Any] = {"marker": "o", "ms": 6, "ls": ""}
COLOURS = (PLAIN, "C4", EBC, "C6", "C5", "black", GREY)


@dataclass(frozen=True)
class Path:
    """An arm's way from evaluation to evaluation, mean of its completed seeds; the last is its end."""

    new: np.ndarray  # loss on the new text
    old: np.ndarray  # loss on the old text
    moved: float | None  # ‖W − W₀‖ over ‖W₀‖ at the end


def gather(
    label: str, arm: Mapping[str, Any], runs: Sequence[Run], specs: Mapping[str, Mapping[str, Any]]
) -> Path | None:
    """Return the arm's way; None where no completed run measured an old text."""
    completed = [run for run in runs if run.outcome == "completed"]
    done = [run for run in completed if len(run.evals.get(OLD, ()))]
    if not done:
        return None
    new = np.array([run.evals["val_loss"] for run in done]).mean(axis=0)
    old = np.array([run.evals[OLD] for run in done]).mean(axis=0)
    return Path(new, old, arm["figures"].get("weights_moved"))


def draw(facts: Facts, track: str, arms: Arms, drawn: Mapping[str, Path]) -> Sheet:
    """Draw the loss on the old text over that on the new one, a line for each arm."""
    best = min(drawn, key=lambda label: drawn[label].new[-1])
    least = min(drawn, key=lambda label: drawn[label].old[-1])
    what = "What does a run forget for what it learns?"
    whom = f"{optimizer(track)}: losses on both texts, from evaluation to evaluation"
    finding = f"Learned most: {best}, {drawn[best].new[-1]:.3f}"
    finding += f"; forgot least: {least}, {drawn[least].old[-1]:.3f}."
    seeds = max(len(arms[label]["runs"]) for label in drawn)
    small = (f"validation loss on {facts.windows} fixed windows of each text",)
    figure, axes = page(facts, what, whom, finding, seeds, small, missing(arms))
    axes.set_xlabel("loss on the new text (nats per token): learning goes to the left")
    axes.set_ylabel("loss on the old text (nats per token)")
    key(axes, [entry("from the first evaluation, mean of the seeds", INK), entry("the end", INK, **END)])
    narrowed(axes, LABELS_FROM)
    ends = []
    for label, colour in zip(drawn, _colours(len(drawn)), strict=True):
        path = drawn[label]
        axes.plot(path.new, path.old, color=colour, lw=1.2)
        axes.plot(path.new[-1:], path.old[-1:], color=colour, **END)
        ends.append((float(path.new[-1]), float(path.old[-1]), _told(label, path), colour))
    beside(axes, ends)
    return figure


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _told(label: str, path: Path) -> str:
    """The arm with how far its weights went."""
    moved = "" if path.moved is None else f": weights moved {path.moved:.0%}"
    return f"{label}{moved}"

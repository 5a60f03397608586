"""The loss curves of several arms over each other: the whole run on the left, its end enlarged on the right.

What is drawn is the validation loss on the fixed windows, which every arm's runs look at after the same
steps; the mean over the seeds that completed, each seed as a thin line.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from ...text.words import plural, signed
from ..drawing.curves import Line, by_step, evals_of, known, missing
from ..drawing.looks import ALERT, FAINT, GREY, REST
from ..drawing.losses import ceiling_of
from ..drawing.sheet import MOST_LINES, Facts, Sheet, entry, lines

END = 0.25  # of the run: what is enlarged
LEAST_ENDS = 3  # evaluations of it, where the run has as many
FRAMED_FROM = 0.1  # of the run: what lies before may leave the frame of the left panel


@dataclass(frozen=True)
class Losses(Line):
    """An arm's validation loss over the runs that completed; the line is their mean."""

    arm: Mapping[str, Any]

    @property
    def end(self) -> float:
        return float(self.middle[-1])

    @property
    def end_in_words(self) -> str:
        ends = self.seeds[:, -1]
        return f"{self.end:.3f}" + (f" ± {ends.std(ddof=1):.3f}" if ends.count() > 1 else "")


def losses_of(root: Path, arm: Mapping[str, Any]) -> Losses | None:
    """Return what evals.csv of an arm's completed runs says; None where no run completed, or kept it."""
    done = [run for run in arm["runs"].values() if known(root, run).get("outcome") == "completed"]
    steps, losses = by_step((evals_of(root, run) for run in done), "val_loss")
    return Losses(steps, losses, losses.mean(axis=0), arm) if len(steps) and losses[:, -1].count() else None


def draw_overlaid(
    facts: Facts, whom: str, courses: Mapping[str, Losses], mine: Sequence[str] = (), reference: str = ""
) -> Sheet:
    """Draw the loss curves of arms. `mine`: those asked about; `reference`: is named whatever its loss."""
    order = sorted(courses, key=lambda name: (name not in mine, name != reference, courses[name].end))
    named = order[:MOST_LINES]
    arms = {name: course.arm for name, course in courses.items()}
    seeds = plural(max(len(arm["runs"]) for arm in arms.values()), "seed")
    sheet = Sheet(
        facts,
        "How does the loss of each arm fall?",
        (whom, _finding(courses, mine)),
        (seeds, f"validation loss on {facts.windows} fixed windows", "labels: mean ± deviation of the seeds"),
        missing(arms, facts.arms),
        grid=("ab",),
        heights=(4.2,),
    )
    left, right = sheet.panels
    left.set_ylabel("validation loss (nats per token)")
    left.set_xlabel(f"training step  (one step = {facts.tokens_per_step:,} tokens)")
    right.set_xlabel("the end of the run, enlarged")
    for axes in sheet.panels:
        for name in reversed(order):  # those asked about on top
            course, look = courses[name], facts.look(name)
            if name not in named:
                axes.plot(course.steps, course.middle, color=REST, lw=1.0, zorder=1.5)
                continue
            width, above = (2.6, 2.8) if name in mine else (1.4, 2.5)
            lines(axes, course, look, lw=width, zorder=above)
    needed = [courses[name].end for name in (*mine, reference) if name in courses]
    _frame(left, right, courses.values(), needed)
    for name in named:
        course = courses[name]
        label = f"{name}  {course.end_in_words}"
        sheet.label(right, [(float(course.steps[-1]), course.end, label, facts.look(name).colour)])
    sheet.key(entry("mean of the seeds", GREY), entry("each seed", GREY, **FAINT))
    if others := len(order) - len(named):
        sheet.key(entry(f"{others} other arms", REST, lw=1.0))
    return sheet


def _finding(courses: Mapping[str, Losses], mine: Sequence[str]) -> str:
    """Say who ends lowest, and how far the next one is; of a study that asks about arms, where they end. What
    is claimed of the arms is not decided here."""
    rising = sorted(courses, key=lambda name: courses[name].end)
    best = rising[0]
    text = f"At the end, mean of the seeds, not yet the test loss: lowest {best}, {courses[best].end:.3f}"
    others = [name for name in rising[1:] if name in mine] or rising[1:2]
    return text + "".join(f"; {name} {signed(courses[name].end - courses[best].end, 3)}" for name in others)


def _frame(left: Axes, right: Axes, courses: Collection[Losses], needed: Sequence[float]) -> None:
    """Show on the left the run from its steep start on, on the right its end, whose place the left one marks;
    a few bad arms may leave either, but not the ends that are `needed`."""
    last = max(float(course.steps[-1]) for course in courses)
    first = min(_start_of_the_end(course.steps) for course in courses)
    ends = [course.end for course in courses]
    top = ceiling_of(ends, needed)
    after = [course.middle[course.steps >= FRAMED_FROM * last] for course in courses if course.end <= top]
    low, high = min(ends), max([top, *(float(mean.max()) for mean in after if mean.count())])
    room = max(high - low, 0.02)
    left.set(xlim=(-0.01 * last, 1.02 * last), ylim=(low - 0.06 * room, high + 0.04 * room))
    seen = [course.middle[course.steps >= first].compressed() for course in courses if course.end <= top]
    seen += [course.seeds[:, -1].compressed() for course in courses]
    within = [loss for loss in np.concatenate(seen) if loss <= top + 0.5 * (top - low)]
    room = max(max(within) - min(within), 0.005)
    span = last - first
    right.set_xlim(first - 0.02 * span, last + 0.02 * span)
    right.set_ylim(min(within) - 0.08 * room, max(within) + 0.08 * room)
    low, high = right.get_ylim()
    look: dict[str, Any] = {"fc": "none", "ec": ALERT, "lw": 0.8, "ls": ":", "zorder": 3}
    left.add_patch(Rectangle((first, low), 1.015 * span, high - low, **look))


def _start_of_the_end(steps: np.ndarray) -> float:
    """Return where the enlarged end begins: at the last quarter, or with enough evaluations for a line."""
    return min(float(steps[-1]) * (1 - END), float(steps[-min(LEAST_ENDS, len(steps))]))

"""The loss curves of several arms over each other: the whole run on the left, its end enlarged on the right.

What is drawn is the validation loss on the fixed windows, which every arm's runs look at after the same
steps; the mean over the seeds that completed, each seed as a thin line.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from .curves import by_step, evals_of, known
from .forest import missing, signed
from .sheet.figure import ALERT, FAINT, GREY, MOST_LINES, REST, Facts, Sheet, another, entry, page
from .sheet.place import beside, columns, key, narrowed
from .suite.windows import Look

END = 0.25  # of the run: what is enlarged
LEAST_ENDS = 3  # evaluations of it, where the run has as many
FRAMED_FROM = 0.1  # of the run: what lies before may leave the frame of the left panel
LABELS_FROM = 0.7  # of the width: the lines' labels stand beyond it
SIZE = (10.0, 5.4)


@dataclass(frozen=True)
class Course:
    """An arm's validation loss over its runs: the steps, and (seeds, steps) of the runs that completed."""

    steps: np.ndarray
    losses: np.ma.MaskedArray
    arm: Mapping[str, Any]

    @property
    def mean(self) -> np.ma.MaskedArray:
        mean: np.ma.MaskedArray = self.losses.mean(axis=0)
        return mean

    @property
    def end(self) -> float:
        return float(self.mean[-1])


def course_of(root: Path, arm: Mapping[str, Any]) -> Course | None:
    """What evals.csv of an arm's completed runs says; None where no run completed."""
    done = [run for run in arm["runs"].values() if known(root, run).get("outcome") == "completed"]
    steps, losses = by_step((evals_of(root, run) for run in done), "val_loss")
    return Course(steps, losses, arm) if len(steps) and losses[:, -1].count() else None


def draw_overlaid(
    facts: Facts,
    whom: str,
    courses: Mapping[str, Course],
    looks: Mapping[str, Look],
    mine: Sequence[str] = (),
    reference: str = "",
) -> Sheet:
    """The loss curves of arms, label -> course. `looks`: how each one's line is drawn; `mine`: those asked
    about; `reference`: the one that is named whatever its loss."""
    order = sorted(courses, key=lambda name: (name not in mine, name != reference, courses[name].end))
    named = order[:MOST_LINES]
    what = "How does the loss of each arm fall?"
    arms = {name: course.arm for name, course in courses.items()}
    seeds = max(len(arm["runs"]) for arm in arms.values())
    small = (f"validation loss on {facts.windows} fixed windows",)
    figure, left = page(facts, what, whom, _finding(courses, mine), seeds, small, missing(arms), SIZE)
    right = another(left)
    handles = [entry("mean of the seeds", GREY), entry("each seed", GREY, **FAINT)]
    if others := len(order) - len(named):
        handles.append(entry(f"{others} other arms", REST, lw=1.0))
    left.set_ylabel("validation loss (nats per token)")
    left.set_xlabel(f"training step  (one step = {facts.tokens_per_step:,} tokens)")
    right.set_xlabel("the end of the run, enlarged")
    key(right if facts.phone else left, handles)
    columns((left, right), 42)
    narrowed(right, LABELS_FROM)
    for axes in (left, right):
        for name in reversed(order):  # those asked about on top
            _draw(axes, courses[name], looks[name] if name in named else None, name in mine)
    _frame(left, right, courses.values(), [courses[n].end for n in (*mine, reference) if n in courses])
    beside(right, [_label(name, courses[name], looks[name][0]) for name in named])
    return figure


def _finding(courses: Mapping[str, Course], mine: Sequence[str]) -> str:
    """Who ends lowest, and how far the next one is; of a study that asks about arms, where they end. What is
    claimed of the arms is not decided here."""
    rising = sorted(courses, key=lambda name: courses[name].end)
    best = rising[0]
    text = f"At the end, mean of the seeds, not yet the test loss: lowest {best}, {courses[best].end:.3f}"
    others = [name for name in rising[1:] if name in mine] or rising[1:2]
    text += "".join(f"; {name} {signed(courses[name].end - courses[best].end)}" for name in others)
    return f"{text}."


def _draw(axes: Axes, course: Course, look: Look | None, strong: bool) -> None:
    """An arm's mean and its seeds; without a look it is one of the rest."""
    if look is None:
        axes.plot(course.steps, course.mean, color=REST, lw=1.0, zorder=1.5)
        return
    colour, _, line = look
    if len(course.losses) > 1:
        axes.plot(course.steps, course.losses.T, color=colour, lw=0.5, alpha=0.35, zorder=1.2)
    width, above = (2.6, 2.8) if strong else (1.4, 2.5)
    axes.plot(course.steps, course.mean, color=colour, ls=line, lw=width, zorder=above)


def _frame(left: Axes, right: Axes, courses: Iterable[Course], shown: Sequence[float]) -> None:
    """The left panel from the steep start on, the right one on the end, whose place the left one marks; there
    a few bad arms may leave the frame, but not the ends `shown`."""
    every = list(courses)
    last = max(float(c.steps[-1]) for c in every)
    ends = [c.end for c in every]
    first = min(_start_of_the_end(c.steps) for c in every)
    tops = [
        float(c.mean[c.steps >= FRAMED_FROM * last].max()) for c in every if c.steps[-1] >= FRAMED_FROM * last
    ]
    low, high = min(ends), max([*tops, max(ends)])
    room = max(high - low, 0.02)
    left.set(xlim=(-0.01 * last, 1.02 * last), ylim=(low - 0.06 * room, high + 0.04 * room))
    seen = [x for c in every for x in c.mean[c.steps >= first].compressed()]
    seen += [x for c in every for x in c.losses[:, -1].compressed()]
    middle = float(np.median(ends))
    cap = max(middle, *shown, min(max(seen, default=high), low + 3 * max(middle - low, 0.01)))
    room = max(cap - low, 0.005)
    span = last - first
    right.set(
        xlim=(first - 0.02 * span, last + 0.02 * span), ylim=(min(seen) - 0.08 * room, cap + 0.08 * room)
    )
    low, high = right.get_ylim()
    box = Rectangle((first, low), 1.015 * span, high - low, fc="none", ec=ALERT, lw=0.8, ls=":", zorder=3)
    left.add_patch(box)


def _start_of_the_end(steps: np.ndarray) -> float:
    """Where the enlarged part of a run begins: its last quarter, or as many evaluations as make a line."""
    from_share = float(steps[-1]) * (1 - END)
    return min(from_share, float(steps[-min(LEAST_ENDS, len(steps))]))


def _label(name: str, course: Course, colour: str) -> tuple[float, float, str, str]:
    """The end of an arm's line, with its name and its last loss."""
    spread = f" ± {course.losses[:, -1].std(ddof=1):.3f}" if course.losses[:, -1].count() > 1 else ""
    end = course.end if math.isfinite(course.end) else 0.0
    return float(course.steps[-1]), end, f"{name}  {end:.3f}{spread}", colour

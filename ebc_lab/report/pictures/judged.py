"""The pictures of runs that somebody else made: how each arm's runs ended, and how their curves come to that.

Drawn with few artists, and thinned first: a file does not grow with the rows of a large study.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from ebc_lab.judging.record import ArmRecord, Record
from ebc_lab.study.stages.statistics import centre_of

from ..kinds.judged_figures import Shown
from ..text.words import plural
from .arms.overlaid import END, FRAMED_FROM
from .drawing.looks import ALERT, GOAL, GREY, INK, REST, RULE, SKY, SMALL, Look, assign_looks
from .drawing.sheet import MOST_LINES, ROW_NAME, Sheet, entry, name_rows

if TYPE_CHECKING:
    from ebc_lab.judging.runs import Runs

MOST_ROWS = 48  # arms of a picture of outcomes
MOST_DOTS = 60  # runs that are drawn of an arm
ROW, FOLDED_ROW = 0.2, 0.34  # inches of an arm, and of one whose name may take two lines
WIDEST_ROW, FEW_ROWS = 0.42, 2.6  # inches: of few arms each takes more, together at least so much
OUTSIDE = 0.9  # inches above and below the arms
REACH = 4.0  # of the axis of outcomes, in usual distances from the best arm
MOST_STEPS = 160  # steps at which a curve is drawn
MOST_GREY = 60  # curves that are not told apart

LOOKS = {  # verdict -> colour, mark
    "better": (GOAL, "D"),
    "worse": (ALERT, "s"),
    "level": (SKY, "o"),
    "undecided": (GREY, "o"),
}


@dataclass(frozen=True)
class Source:
    """Where a picture's data come from, and whether it is drawn for a phone or a column of a paper."""

    source: str
    narrow: bool = False


# -- outcomes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """What a row shows: an arm, its runs that ended in a number, and the rest as a count."""

    arm: ArmRecord
    outcomes: Sequence[float]
    verdict: str  # empty of the reference, and of an arm that nothing is compared with

    @property
    def middle(self) -> float | None:
        return centre_of(self.arm)

    @property
    def limits(self) -> tuple[float | None, float | None]:
        """Return the interval of the mean; of the median where a run diverged."""
        if self.arm["diverged"]:
            return self.arm["median_low"], self.arm["median_high"]
        return self.arm["low"], self.arm["high"]


def draw_outcomes(record: Record, source: Source) -> Sheet:
    """Draw the outcome of every run, a row an arm, the best on top, with the interval of each arm."""
    rows = rows_of(record)
    shown = Shown.of(record)
    higher = shown.higher
    left_out = len(record["arms"]) - len(rows)
    counts = Counter(row.verdict for row in rows if row.verdict)
    found = ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
    best = rows[0].arm["arm"]
    sheet = Sheet(
        source,
        "How did the runs of each arm end?",
        (
            f"{record['outcome']}, {'more' if higher else 'less'} is better; best: {best}",
            f"Against {record['reference']}: {found}" if found else "",
        ),
        (
            "bar: 95% interval of the mean; of the median, by rank, where a run diverged",
            *([f"the best {len(rows)} of {len(record['arms'])} arms"] if left_out else []),
        ),
    )
    names = [row.arm["arm"] for row in rows]
    folded = max(map(len, names)) > ROW_NAME[source.narrow]
    tall = max(FOLDED_ROW if folded else ROW, min(WIDEST_ROW, FEW_ROWS / len(rows)))
    sheet.set_figheight(OUTSIDE + tall * len(rows) + sum(sheet.strips) / 72)
    [axes] = sheet.panels
    low, high = frame_of(rows, higher)
    axes.set_xlim(low, high)
    name_rows(axes, names)
    axes.set_xlabel(shown.unit)
    axes.grid(axis="y", visible=False)
    reference = next((row for row in rows if row.arm["arm"] == record["reference"]), None)
    if reference and reference.middle is not None:
        axes.axvline(reference.middle, color=RULE, lw=1, ls="--", zorder=1)
        axes.get_yticklabels()[rows.index(reference)].set_fontweight("bold")
        sheet.key(entry(f"the reference, {record['reference']}", RULE, lw=1, ls="--"))
    if shown.unit == record["loss"]:
        _draw_target(axes, sheet, record, across=True)
    _draw_rows(sheet, axes, rows, higher)
    return sheet


def rows_of(record: Record) -> list[Drawn]:
    """Return the arms that are drawn: the best, and the reference whichever its place."""
    verdicts: dict[str, str] = {}
    for d in record["differences"]:
        if d["reference"] == record["reference"]:
            verdicts[d["arm"]] = d["verdict"]
    ended: dict[str, list[float]] = {}
    for run in record["runs"]:
        if run["outcome"] is not None and math.isfinite(run["outcome"]):
            ended.setdefault(run["arm"], []).append(run["outcome"])
    arms = record["arms"][:MOST_ROWS]
    arms += [arm for arm in record["arms"][MOST_ROWS:] if arm["arm"] == record["reference"]]
    return [Drawn(a, thinned(sorted(ended.get(a["arm"], []))), verdicts.get(a["arm"], "")) for a in arms]


def thinned(values: Sequence[float], most: int = MOST_DOTS) -> list[float]:
    """Return at most so many of sorted values, evenly by rank, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def frame_of(rows: Sequence[Drawn], higher: bool) -> tuple[float, float]:
    """Return the ends of the axis of outcomes. A few bad arms may lie beyond, and do not press the others."""
    sign = -1.0 if higher else 1.0
    ends = [[sign * x for x in (*row.outcomes, *row.limits) if x is not None] for row in rows]
    ends = [own for own in ends if own]
    if not ends:
        return 0.0, 1.0
    best = min(map(min, ends))
    usual = statistics.median(max(own) - best for own in ends)
    worst = min(max(map(max, ends)), best + REACH * usual) if usual else max(map(max, ends))
    span = (worst - best) or abs(best) * 0.01 or 1.0
    low, high = best - 0.05 * span, worst + 0.08 * span
    return (-high, -low) if higher else (low, high)


def _draw_rows(sheet: Sheet, axes: Axes, rows: Sequence[Drawn], higher: bool) -> None:
    """Draw dots, intervals and middles, and at the axis's worse end what lies beyond it."""
    low, high = axes.get_xlim()
    edge = low if higher else high
    dots, bars, colours, beyond = [], [], [], []
    for y, row in enumerate(rows):
        colour, mark = LOOKS.get(row.verdict, (INK, "o"))
        for nth, x in enumerate(row.outcomes):
            if low <= x <= high:
                dots.append((x, y + 0.16 * (nth % 3 - 1)))
            else:
                beyond.append(y)
        ends = row.limits
        left, right = (low if ends[0] is None else ends[0]), (high if ends[1] is None else ends[1])
        if ends != (None, None) and left < high and right > low:
            bars.append([(max(left, low), y), (min(right, high), y)])
            colours.append(colour)
        if row.middle is not None and low <= row.middle <= high:
            axes.plot(row.middle, y, mark, color=colour, ms=6, mec="white", mew=0.7, zorder=4)
        elif row.middle is not None:
            beyond.append(y)
        if row.arm["diverged"]:
            words = f"{row.arm['diverged']} ×"
            side = "left" if higher else "right"
            axes.text(edge, y - 0.05, f"  {words}  ", color=ALERT, ha=side, va="bottom", size=SMALL)
    axes.add_collection(LineCollection(bars, colors=colours, lw=2.4, zorder=3))
    if dots:
        axes.plot(*zip(*dots, strict=True), "o", color=INK, ms=3, mew=0, alpha=0.35, zorder=2)
        sheet.key(entry("a run", INK, ls="", marker="o", ms=3, mew=0, alpha=0.5))
    if beyond:
        tip = "<" if higher else ">"
        axes.plot([edge] * len(set(beyond)), sorted(set(beyond)), tip, color=GREY, ms=5, clip_on=False)
        sheet.key(entry("runs beyond the axis", GREY, ls="", marker=tip, ms=5))
    if any(row.arm["diverged"] for row in rows):
        sheet.key(entry("so many runs diverged", ALERT, ls="", marker="x", ms=5))
    for verdict, (colour, mark) in LOOKS.items():
        if any(row.verdict == verdict for row in rows):
            sheet.key(entry(verdict, colour, lw=2.4, marker=mark, ms=6))


def _draw_target(axes: Axes, sheet: Sheet, record: Record, across: bool = False) -> None:
    """Draw the target of the loss as a line, where there is one within the axes."""
    target = (record["steps"] or {}).get("target")
    if target is None:
        return
    low, high = sorted(axes.get_xlim() if across else axes.get_ylim())
    if low <= target <= high:
        (axes.axvline if across else axes.axhline)(target, color=ALERT, lw=1, ls=":", zorder=1.5)
        sheet.key(entry(f"target {target:g}", ALERT, lw=1, ls=":"))


# -- curves --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Course:
    """The curves of an arm's runs at the same steps: their median, and the range over the runs. A run that
    diverged is infinite, and no run of which nothing is known any more is carried on."""

    steps: np.ndarray
    middle: np.ndarray
    low: np.ndarray
    high: np.ndarray


def courses_of(record: Record, runs: Runs) -> dict[str, Course]:
    """Return arm -> its course, of arms that have curves, over the runs that were judged. At most MOST_STEPS
    steps of each are kept, those of the end of the run more densely."""
    curves = runs.by_run
    arms, names = runs.table["arm"].tolist(), runs.table["run"].tolist()
    judged = {(of_run["arm"], of_run["run"]) for of_run in record["runs"]}
    own: dict[str, list[slice]] = {}
    for number, first, last in zip(curves.run, curves.start, curves.end, strict=True):
        if (arms[number], names[number]) in judged:
            own.setdefault(arms[number], []).append(slice(first, last))
    worst = -math.inf if record["better"] == "higher" else math.inf
    return {arm: _course(curves.step, curves.loss, runs, worst) for arm, runs in own.items()}


def _course(step: np.ndarray, loss: np.ndarray, runs: Sequence[slice], worst: float) -> Course:
    longest = max(runs, key=lambda rows: (step[rows.stop - 1], rows.stop - rows.start))
    grid = chosen_steps(step[longest])
    values = np.full((len(runs), len(grid)), np.nan)
    for row, rows in zip(values, runs, strict=True):
        place = np.searchsorted(step[rows], grid, side="right") - 1
        there = (place >= 0) & (grid <= step[rows.stop - 1])
        row[there] = loss[rows][place[there]]
    values[np.isinf(values)] = worst
    known = ~np.isnan(values).all(axis=0)
    grid, values = grid[known], values[:, known]
    with np.errstate(invalid="ignore"):  # the middle of −∞ and ∞ is not known
        return Course(grid, *(of(values, axis=0) for of in (np.nanmedian, np.nanmin, np.nanmax)))


def chosen_steps(steps: np.ndarray) -> np.ndarray:
    """Return at most MOST_STEPS of a run's steps, half of them from its end."""
    places = np.arange(len(steps))
    if len(steps) > MOST_STEPS:
        first = int(np.searchsorted(steps, steps[-1] * (1 - END)))
        half = MOST_STEPS // 2
        early = np.linspace(0, max(first - 1, 0), min(half, first) or 1)
        late = np.linspace(first, len(steps) - 1, min(half, len(steps) - first))
        places = np.unique(np.r_[early, late].round().astype(int))
    chosen: np.ndarray = steps[places]
    return chosen


def draw_curves(record: Record, runs: Runs, source: Source) -> Sheet | None:
    """Draw the curves over each other, whole on the left, the end enlarged on the right; None without any."""
    courses = courses_of(record, runs)
    order = [arm["arm"] for arm in record["arms"] if arm["arm"] in courses]
    reference = record["reference"]
    if not order or all(len(course.steps) < 2 for course in courses.values()):
        return None
    order.sort(key=lambda arm: arm != reference)
    named = order[:MOST_LINES]
    looks = assign_looks(named, (), reference if reference in named else None)
    others = order[MOST_LINES:]
    higher = record["better"] == "higher"
    sheet = Sheet(
        source,
        f"{record['loss']} over the {record['step']}s of each arm",
        (f"{plural(len(order), 'arm')}, those told apart are the best and the reference",) if others else (),
        ("median of the runs at each step; shaded: from the lowest to the highest run",),
        grid=("ab",),
        heights=(4.2,),
    )
    left, right = sheet.panels
    left.set_ylabel(record["loss"])
    left.set_xlabel(record["step"])
    right.set_xlabel(f"{record['step']}: the end, enlarged")
    _frame(left, right, [courses[arm] for arm in named], higher, (record["steps"] or {}).get("target"))
    grey = [np.column_stack([courses[arm].steps, courses[arm].middle]) for arm in others[:MOST_GREY]]
    for axes in sheet.panels:
        axes.add_collection(LineCollection([line for line in grey if len(line) > 1], colors=REST, lw=0.8))
        for arm in reversed(named):
            _draw_course(axes, courses[arm], looks[arm], shaded=axes is right)
    for arm in named:
        sheet.key(entry(arm, looks[arm].colour, ls=looks[arm].line, lw=1.8))
    if others:
        sheet.key(entry(f"{len(others)} other arms", REST, lw=0.8))
    _draw_target(right, sheet, record)
    return sheet


def _draw_course(axes: Axes, course: Course, look: Look, *, shaded: bool) -> None:
    low, high = axes.get_ylim()
    seen = course.steps >= axes.get_xlim()[0]
    seen = seen | np.r_[seen[1:], False]  # and the one before, from which the line comes
    steps, middle = course.steps[seen], course.middle[seen]
    axes.plot(steps, np.where(np.isfinite(middle), middle, np.nan), color=look.colour, ls=look.line, lw=1.6)
    if shaded and np.any(course.low < course.high):
        far = 2 * (high - low)
        ends = (np.clip(side[seen], low - far, high + far) for side in (course.low, course.high))
        axes.fill_between(steps, *ends, color=look.colour, alpha=0.13, lw=0)


def _frame(left: Axes, right: Axes, courses: Sequence[Course], higher: bool, target: float | None) -> None:
    """Show on the left the run from its steep start on, on the right its end, up to what named arms need."""
    last = max(float(course.steps[-1]) for course in courses)
    first = min(float(course.steps[-1]) for course in courses) * (1 - END)
    left.set_xlim(min(0.0, *(float(course.steps[0]) for course in courses)), 1.02 * last)
    right.set_xlim(first, last + 0.02 * (last - first))
    for axes, start in ((left, FRAMED_FROM * last), (right, first)):
        seen = [c.middle[(c.steps >= start) & np.isfinite(c.middle)] for c in courses]
        ends = [float(own[-1]) for own in seen if len(own)]
        if not ends:
            continue
        whole = np.concatenate(seen)
        bands = [(c.low[-1], c.high[-1]) for c in courses if np.isfinite((c.low[-1], c.high[-1])).all()]
        best = float(whole.max() if higher else whole.min())
        needed = [*ends, best, *itertools.chain(*bands), *([target] if target is not None else [])]
        low, high = min(needed), max(needed)
        least = 1e-9 * max(1.0, abs(low), abs(high))  # of which floats of this size still have some
        span = max(high - low, 0.25 * float(whole.max() - whole.min()), least)
        if axes is left:
            low, high = float(whole.min()), float(whole.max())
            span = max(high - low or 1.0, least)
            axes.set_ylim(low - 0.05 * span, high + 0.05 * span)
        else:
            below, above = (0.6, 0.15) if higher else (0.15, 0.6)
            axes.set_ylim(low - below * span, high + above * span)

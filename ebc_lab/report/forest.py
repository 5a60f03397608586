"""The picture that carries a suite's argument: every arm's paired difference in test loss from its reference, best first."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import blended_transform_factory

from .arm import colour_of, optimizer
from .curves import read_results
from .sheet import ALERT, EBC, GOAL, PLAIN, RIGHT, Facts, Sheet, fit, key, page, seeds_of

WIDTH, LEFT = 11.0, 0.02  # inches; the left margin, a share of it
NAMES, PLOT = (LEFT, 0.322), (0.335, 0.7)  # where the labels and the axes lie
COLUMNS = ((0.845, "difference ± 95%"), (0.912, "test loss"), (RIGHT, "val loss"))  # right edge of each, and its heading
LINE = 11.0  # points from one line of a row's words to the next
OWN = 34  # characters of a label that is followed by another
WORDS = 62  # characters of them that a line holds
OFF_SCALE = 4.0  # times the rows' median reach: an axis that went further would leave no room to tell the others apart


@dataclass(frozen=True)
class Row:
    """An arm of the picture. `seeds`: its difference in test loss from its reference, seed by seed."""

    label: str
    arm: Mapping[str, Any]
    seeds: Sequence[float]
    elsewhere: bool  # its reference is another arm than the suite's

    @property
    def difference(self) -> Mapping[str, Any]:
        return self.arm["difference"] or {}

    @property
    def mean(self) -> float | None:
        """None where there is nothing to compare; 0 of the reference itself."""
        return self.difference.get("mean") if self.arm["versus"] else 0.0

    @property
    def limits(self) -> tuple[float, float]:
        """The 95% interval, or the mean twice where there is none."""
        mean = self.mean or 0.0
        return (self.difference["low"], self.difference["high"]) if self.difference.get("low") is not None else (mean, mean)

    @property
    def place(self) -> tuple[int, float]:
        """Best first; without a difference because the reference diverged, because the arm did, for lack of results."""
        if self.mean is not None:
            return 0, self.mean
        return (2 if self.arm["outcomes"].get("diverged") else 1 if self.difference.get("diverged") else 3), 0.0

    @property
    def name(self) -> str:
        """The label, and the arm it is compared with where that is not the suite's reference."""
        if not self.elsewhere:
            return self.label
        own = self.label if len(self.label) <= OWN else f"{self.label[: OWN - 1]}…"  # so that the other name stays on the page
        return f"{own}  (vs {self.arm['versus']})"

    @property
    def words(self) -> list[str]:
        """What the arm is and what was tuned, in lines; nothing where that says no more than the label."""
        tuned = ", ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in (self.arm["point"] or {}).items())
        about = self.arm["about"] if self.arm["about"] != self.label else ""
        text = "; ".join(part for part in (about, tuned and f"tuned: {tuned}") if part)
        return wrap(text, WORDS, max_lines=2, placeholder=" …")


def signed(value: float) -> str:
    """A difference in nats, `−0.031`."""
    return "0.000" if abs(value) < 0.0005 else f"{value:+.3f}".replace("-", "−")


def rows_of(root: Path, found: Mapping[str, Any]) -> list[Row]:
    """The arms of a track, best first, with their differences seed by seed."""
    losses = {}
    for label, arm in found["arms"].items():
        done = {s: r for s, r in read_results(root, arm).items() if r.get("outcome") == "completed"}
        losses[label] = {s: float(r["test_loss"]) for s, r in done.items() if r.get("test_loss") is not None}
    rows = []
    for label, arm in found["arms"].items():
        against = losses.get(arm["versus"], {})
        seeds = [loss - against[s] for s, loss in losses[label].items() if s in against]
        rows.append(Row(label, arm, seeds, arm["versus"] not in (None, found["reference"])))
    return sorted(rows, key=lambda row: row.place)


def missing(arms: Mapping[str, Mapping[str, Any]], asked: Sequence[str] = ()) -> str:
    """What the reader must know about arms that are not whole; empty when all are."""
    kinds: dict[str, list[str]] = {"diverged": [], "without a result": []}
    for label, arm in arms.items():
        of, diverged = len(arm["runs"]), arm["outcomes"].get("diverged", 0)
        for kind, n in zip(kinds, (diverged, of - diverged - arm["outcomes"].get("completed", 0)), strict=True):
            kinds[kind] += [f"{label} ({n} of {seeds_of(of)})"] if n else []
    kinds["could not be made"] = [label for label in asked if label not in arms]
    return "; ".join(f"{kind}: {', '.join(labels)}" for kind, labels in kinds.items() if labels)


def draw_forest(facts: Facts, track: str, found: Mapping[str, Any], rows: Sequence[Row], rule: str) -> Sheet:
    """One row per arm: its difference from its reference with the 95% interval, its seeds faint, its losses beside it."""
    arms, reference = found["arms"], found["reference"]
    tall = LINE * (1 + max((len(row.words) for row in rows), default=0)) + 5  # points of a row
    height = 2.6 + tall / 72 * max(len(rows), 2)
    what = "What does each change do to the test loss?"
    whom = facts.question or f"{optimizer(track)}: every arm against {reference}, paired seed by seed"
    seeds = max((len(arm["runs"]) for arm in arms.values()), default=0)
    small = (optimizer(track), f"{len(rows)} arms", rule)
    figure, axes = page(facts, what, whom, finding(rows), seeds, small, missing(arms, facts.arms), (WIDTH, height), LEFT)
    axes.set_xlabel("test loss minus its reference's (nats per token)\n← better        worse →")
    key(axes, handles_of(rows), LEFT)
    box, head = axes.get_position(), 22 / 72 / height
    axes.set_position((PLOT[0], box.y0, PLOT[1] - PLOT[0], box.height - head))
    axes.set(xlim=frame(rows), ylim=(len(rows) - 0.5, -0.5), yticks=[])
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}".replace("-", "−") if value else "0"))
    axes.axvline(0, color=GOAL, lw=1.4, ls="--", zorder=1)
    head_of(axes, arms, reference)
    for y, row in enumerate(rows):
        draw_row(axes, y, row, arms)
        write_row(axes, y, row)
    return figure


def finding(rows: Sequence[Row]) -> str:
    """The best arm against the suite's reference, and how many intervals exclude zero; without arms judged on another text."""
    compared = [row for row in rows if row.arm["versus"] and row.mean is not None and row.arm.get("comparable", True)]
    if not compared:
        return "No arm can be compared with its reference."
    suites_own = next((row.label for row in rows if row.arm["versus"] is None), None)
    best = next((row for row in compared if row.arm["versus"] == suites_own), compared[0])
    text = f"Lowest against {best.arm['versus']}: {best.label}, {signed(best.mean or 0.0)}"
    low, high = best.limits
    if low == high:
        return f"{text} (one seed: no interval)."
    text += f" (95%: {signed(low)} to {signed(high)}). Of {len(compared)} intervals "
    worse, better = (sum(test(row) for row in compared) for test in (lambda r: r.limits[0] > 0, lambda r: r.limits[1] < 0))
    text += f"{better} lie{'s' * (better == 1)} below zero, {worse} above, {len(compared) - better - worse} hold it"
    return f"{text} (each 95% by itself)." if len(compared) > 1 else f"{text}."


def frame(rows: Sequence[Row]) -> tuple[float, float]:
    """Limits of x: everything, unless a few rows would press the others together."""
    shown = [row for row in rows if row.arm["versus"] and row.mean is not None]
    reaches = [max(map(abs, (*row.limits, row.mean or 0.0))) for row in shown]
    most = OFF_SCALE * statistics.median(reaches) if reaches else 0.0
    points = [x for row in shown if abs(row.mean or 0.0) <= most for x in (*row.limits, *row.seeds)]
    low, high = max(min(points, default=0.0), -most), min(max(points, default=0.0), most)
    low, high = min(low, 0.0), max(high, 0.0)
    room = 0.07 * (high - low) or 0.01
    return low - room, high + room


def handles_of(rows: Sequence[Row]) -> list[Line2D]:
    """The key: only what the picture holds."""
    handles = [
        Line2D([], [], color=colour, marker="o", lw=1.6, label=f"{words}: mean and 95% interval over the paired seeds")
        for colour, words in ((EBC, "with EBC"), (PLAIN, "without EBC"))
        if any(colour_of(row.arm) == colour for row in rows)
    ]
    low, high = frame(rows)
    handles.append(Line2D([], [], color="#333333", ls="", marker="o", ms=3.2, mew=0, alpha=0.45, label="a single seed"))
    if any(row.elsewhere for row in rows):
        handles.append(Line2D([], [], color="#333333", ls="", marker="D", label="compared with the arm its row names"))
    if any(row.mean is not None and not low <= row.mean <= high for row in rows):
        handles.append(Line2D([], [], color="#333333", ls="", marker=">", label="beyond the axis: see its figure"))
    if any(row.mean is None and row.arm["outcomes"].get("diverged") for row in rows):
        handles.append(Line2D([], [], color=ALERT, ls="", marker="x", mew=2, label="diverged"))
    return handles


def head_of(axes: Axes, arms: Mapping[str, Mapping[str, Any]], reference: str) -> None:
    """What stands above the rows: what zero is, and the columns' headings."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    zero = arms[reference]["test_loss"] if reference in arms else None
    said = f"0 = {reference}, test loss {zero:.3f}" if zero is not None else f"0 = {reference}, which has no test loss"
    low, high = axes.get_xlim()
    side = "left" if -low / (high - low) < 0.3 else "right" if -low / (high - low) > 0.7 else "center"
    above = {"xytext": (0, 5), "textcoords": "offset points", "annotation_clip": False}
    data = blended_transform_factory(axes.transData, axes.transAxes)
    axes.annotate(said, (0, 1), xycoords=data, ha=side, size=8.5, color=GOAL, **above)  # type: ignore[arg-type]
    across = blended_transform_factory(figure.transFigure, axes.transAxes)
    for x, heading in COLUMNS:
        axes.annotate(heading, (x, 1), xycoords=across, ha="right", size=8, color="#666666", **above)  # type: ignore[arg-type]


def draw_row(axes: Axes, y: int, row: Row, arms: Mapping[str, Mapping[str, Any]]) -> None:
    """The row's mark: a mean with its interval, an arrow to what lies off the axis, or a cross with words."""
    colour, across = colour_of(row.arm), axes.get_yaxis_transform()
    low, high = axes.get_xlim()
    axes.plot(row.seeds, [y + 0.2] * len(row.seeds), "o", color=colour, ms=3.2, mew=0, alpha=0.45)
    if row.mean is None:
        n, of = row.arm["outcomes"].get("diverged", 0), len(row.arm["runs"])
        other = arms.get(row.arm["versus"])
        words = "no pair of seeds to compare"
        if n:
            axes.plot(0.985, y, "x", color=ALERT, ms=8, mew=2.2, transform=across)
            words = f"{n} of {seeds_of(of)} diverged"
        elif row.difference.get("diverged") and other:
            words = f"{row.arm['versus']} diverged in {other['outcomes'].get('diverged', 0)} of {seeds_of(len(other['runs']))}"
        axes.text(0.955 if n else 0.985, y, words, transform=across, ha="right", va="center", size=8, color=ALERT)
    elif not row.arm["versus"]:
        axes.plot(0.0, y, "o", color=colour, mfc="white", mew=1.6, ms=6, zorder=3)
    elif not low <= row.mean <= high:
        over = row.mean > high
        axes.plot(0.985 if over else 0.015, y, ">" if over else "<", color=colour, ms=7, transform=across)
    else:
        axes.plot(row.limits, (y, y), color=colour, lw=1.8, solid_capstyle="butt")
        axes.plot(row.mean, y, "D" if row.elsewhere else "o", color=colour, ms=5.5 if row.elsewhere else 6.5, zorder=3)


def write_row(axes: Axes, y: int, row: Row) -> None:
    """The row's label and words on the left, its figures on the right, on a strip of its own."""
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Sheet)
    across = blended_transform_factory(figure.transFigure, axes.transData)
    if y % 2 == 0:
        strip = Rectangle((0.5 * LEFT, y - 0.5), 1 - LEFT, 1, transform=across, fc="#F4F4F4", lw=0, zorder=-1)
        strip.set_clip_on(False)
        axes.add_artist(strip)
    lines = [(row.name, 8.5, "bold", colour_of(row.arm)), *((words, 7.5, "normal", "#555555") for words in row.words)]
    for i, (line, size, weight, colour) in enumerate(lines):
        text = axes.annotate(
            line,
            (NAMES[0], y),
            xycoords=across,
            xytext=(0, LINE * ((len(lines) - 1) / 2 - i)),
            textcoords="offset points",
            va="center",
            size=size,
            weight=weight,
            color=colour,
            annotation_clip=False,
        )
        fit(text, (NAMES[1] - NAMES[0]) * figure.bbox.width)
    beyond = f"{signed(row.mean)}" if row.mean is not None else "–"
    if row.difference.get("low") is not None:
        beyond += f" ± {row.difference['high'] - (row.mean or 0.0):.3f}"
    losses = ("–" if (loss := row.arm[k]) is None else f"{loss:.3f}" for k in ("test_loss", "val_loss"))
    for (x, _), cell in zip(COLUMNS, (beyond if row.arm["versus"] else "reference", *losses), strict=True):
        axes.text(x, y, cell, transform=across, ha="right", va="center", size=8.5)

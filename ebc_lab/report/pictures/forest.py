"""The picture that carries the argument: every arm's paired difference in test loss from its reference, best first.

Of a suite's arms, and of the finals' against the baseline and against the fair control. The thick line is the 95% interval of a
difference by itself; the thin one, where the decision holds it, that of all differences together.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import blended_transform_factory

from ..text.words import optimizer, short, words
from .arm import colour_of, mark_of
from .curves import read_results
from .sheet import ALERT, GOAL, RIGHT, Facts, Sheet, fit, key, page, seeds_of

WIDTH, LEFT = 11.0, 0.02  # inches; the left margin, a share of it
NAMES, PLOT = (LEFT, 0.322), (0.335, 0.7)  # where the labels and the axes lie
COLUMNS = (
    (0.845, "difference ± 95%"),
    (0.912, "test loss"),
    (RIGHT, "val loss"),
)  # right edge of each, and its heading
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
    def by_rank(self) -> bool:
        """Whether a diverged run made ranks decide: the middle is then a median, and a limit may be infinite."""
        return self.difference.get("method") == "rank"

    @property
    def mean(self) -> float | None:
        """By rank the median; None where there is nothing to compare; 0 of the reference itself."""
        return self.difference.get("median" if self.by_rank else "mean") if self.arm["versus"] else 0.0

    @property
    def limits(self) -> tuple[float, float]:
        """The 95% interval, or the mean twice where there is none."""
        return self.interval("low", "high") or (self.mean or 0.0, self.mean or 0.0)

    def interval(self, *names: str) -> tuple[float, float] | None:
        """Two of the difference's limits; None where they were not computed. By rank, one that is null is infinite."""
        low, high = (self.difference.get(name) for name in names)
        if low is None and high is None:
            return None
        if not self.by_rank and (low is None or high is None):
            return None
        return (-math.inf if low is None else low, math.inf if high is None else high)

    @property
    def place(self) -> tuple[int, float]:
        """Best first; without a difference because the reference diverged, because the arm did, for lack of results."""
        if self.mean is not None:
            return 0, self.mean
        return (
            2 if self.arm["outcomes"].get("diverged") else 1 if self.difference.get("diverged") else 3
        ), 0.0

    @property
    def name(self) -> str:
        """The label, and the arm it is compared with where that is not the suite's reference."""
        if not self.elsewhere:
            return self.label
        own = (
            self.label if len(self.label) <= OWN else f"{self.label[: OWN - 1]}…"
        )  # so that the other name stays on the page
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
    results = {label: read_results(root, arm) for label, arm in found["arms"].items()}
    rows = [
        Row(
            label,
            arm,
            seed_differences(results[label], results.get(arm["versus"], {})),
            arm["versus"] not in (None, found["reference"]),
        )
        for label, arm in found["arms"].items()
    ]
    return sorted(rows, key=lambda row: row.place)


def missing(arms: Mapping[str, Mapping[str, Any]], asked: Sequence[str] = ()) -> str:
    """What the reader must know about arms that are not whole; empty when all are."""
    kinds: dict[str, list[str]] = {"diverged": [], "without a result": []}
    for label, arm in arms.items():
        of, diverged = len(arm["runs"]), arm["outcomes"].get("diverged", 0)
        for kind, n in zip(
            kinds, (diverged, of - diverged - arm["outcomes"].get("completed", 0)), strict=True
        ):
            kinds[kind] += [f"{label} ({n} of {seeds_of(of)})"] if n else []
    kinds["could not be made"] = [label for label in asked if label not in arms]
    return "; ".join(f"{kind}: {', '.join(labels)}" for kind, labels in kinds.items() if labels)


def draw_forest(facts: Facts, track: str, found: Mapping[str, Any], rows: Sequence[Row], rule: str) -> Sheet:
    """A suite's arms: one row each, its difference from its reference with its intervals, seeds faint, losses beside it."""
    arms, reference = found["arms"], found["reference"]
    zero = arms[reference]["test_loss"] if reference in arms else None
    said = (
        f"0 = {reference}, test loss {zero:.3f}"
        if zero is not None
        else f"0 = {reference}, which has no test loss"
    )
    whom = facts.question or f"{optimizer(track)}: every arm against {reference}, paired seed by seed"
    small = (optimizer(track), f"{len(rows)} arms", rule.partition(";")[0])
    what = "What does each change do to the test loss?"
    figure, axes, key_of = rows_page(
        facts, what, whom, finding(rows), small, missing(arms, facts.arms), rows, 0
    )
    key(axes, key_of, LEFT)
    head_of(axes, said)
    for y, row in enumerate(rows):
        draw_row(axes, y, row, arms)
        write_row(axes, y, row)
    return figure


def draw_finals(
    facts: Facts,
    track: str,
    found: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Mapping[str, Any]]],
    rule: str,
) -> Sheet:
    """The final arms against the baseline, and under them against the fair control, with zero and the target's margin."""
    arms, margin = found["arms"], facts.margin
    groups: dict[str, list[Row]] = {}
    parts = []
    for role, words_of in (("baseline", "the baseline"), ("control", "the fair control")):
        reference = found["roles"][role]
        rows = [
            Row(
                short(name, arms[name]) + (f" · {difference['judged']}" if difference.get("judged") else ""),
                {
                    **arms[name],
                    "versus": reference,
                    "difference": difference,
                    "about": words(name, arms[name]),
                    "point": None,
                },
                seed_differences(results[name], results[reference]),
                False,
            )
            for name, difference in found["differences"][role].items()
        ]
        loss = arms[reference]["test_loss"]
        heading = f"Against {words_of}\n{short(reference, arms[reference]).partition(' (')[0]}"
        groups[heading + (f", test loss {loss:.3f}" if loss is not None else "")] = sorted(
            rows, key=lambda row: row.place
        )
        parts.append(f"against {words_of}, {counts(rows)}")
    rows = [row for own in groups.values() for row in own]
    text = "; ".join(parts)
    whom = f"{optimizer(track)}: every final arm, paired seed by seed"
    what = "Is any arm better than the baseline, or the fair control?"
    headings = len(groups)
    figure, axes, key_of = rows_page(
        facts,
        what,
        whom,
        f"{text[0].upper()}{text[1:]}.",
        (rule.partition(";")[0],),
        missing(arms),
        rows,
        headings,
        margin,
    )
    if margin is not None:
        axes.axvline(margin, color=ALERT, lw=1.2, ls=":", zorder=1)
        key_of.append(
            Line2D([], [], color=ALERT, lw=1.2, ls=":", label=f"+{margin:g}: the target's margin, “no worse”")
        )
    key(axes, key_of, LEFT)
    head_of(axes, "0 = the reference")
    y = 0
    for heading, own in groups.items():
        title = axes.annotate(
            heading, (LEFT, y), xycoords=across_of(axes), va="center", size=9, annotation_clip=False
        )
        title.set(style="italic", color="#333333")
        for row in own:
            y += 1
            draw_row(axes, y, row, arms)
            write_row(axes, y, row)
        y += 1
    return figure


def seed_differences(
    own: Mapping[str, Mapping[str, Any]], reference: Mapping[str, Mapping[str, Any]]
) -> list[float]:
    """Test loss minus the reference's of the same seed, where both completed."""
    losses = [
        {
            s: float(r["test_loss"])
            for s, r in results.items()
            if r.get("outcome") == "completed" and r.get("test_loss") is not None
        }
        for results in (own, reference)
    ]
    return [loss - losses[1][seed] for seed, loss in losses[0].items() if seed in losses[1]]


def counts(rows: Sequence[Row]) -> str:
    """How the arms fared against one reference: by the decision's own word where it has one, else by their intervals."""
    judged = [row.difference.get("judged") for row in rows]
    if any(judged):
        kinds = (("beats", "better"), ("meets", "no worse"), ("misses", "worse"), ("undecided", "undecided"))
        found = [f"{judged.count(kind)} {said}" for kind, said in kinds if kind in judged]
        return f"of {len(rows)} arms {', '.join(found)}"
    below, above = (
        sum(test(row) for row in rows) for test in (lambda r: r.limits[1] < 0, lambda r: r.limits[0] > 0)
    )
    return f"{below} of {len(rows)} intervals lie below zero, {above} above"


def rows_page(
    facts: Facts,
    what: str,
    whom: str,
    found: str,
    small: Sequence[str],
    alert: str,
    rows: Sequence[Row],
    headings: int,
    margin: float | None = None,
) -> tuple[Sheet, Axes, list[Line2D]]:
    """A page for rows and their headings. -> it, its axes framed, and what its key must say."""
    tall = LINE * (1 + max((len(row.words) for row in rows), default=0)) + 5  # points of a row
    slots = len(rows) + headings
    height = 2.6 + tall / 72 * max(slots, 2)
    seeds = max((len(row.arm["runs"]) for row in rows), default=0)
    figure, axes = page(facts, what, whom, found, seeds, small, alert, (WIDTH, height), LEFT)
    axes.set_xlabel("test loss minus its reference's (nats per token)\n← better        worse →")
    axes.set(xlim=frame(rows, margin), ylim=(slots - 0.5, -0.5), yticks=[])
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:+g}".replace("-", "−") if value else "0")
    )
    axes.axvline(0, color=GOAL, lw=1.4, ls="--", zorder=1)
    return figure, axes, handles_of(rows, axes.get_xlim())


def finding(rows: Sequence[Row]) -> str:
    """The best arm against the suite's reference, and how many intervals exclude zero; without arms judged on another text."""
    compared = [
        row for row in rows if row.arm["versus"] and row.mean is not None and row.arm.get("comparable", True)
    ]
    if not compared:
        return "No arm can be compared with its reference."
    suites_own = next((row.label for row in rows if row.arm["versus"] is None), None)
    best = next((row for row in compared if row.arm["versus"] == suites_own), compared[0])
    text = f"Lowest against {best.arm['versus']}: {best.label}, {signed(best.mean or 0.0)}"
    low, high = best.limits
    if low == high:
        return f"{text} (one seed: no interval)."
    text += f" (95%: {signed(low)} to {signed(high)}). Of {len(compared)} intervals "
    worse, better = (
        sum(test(row) for row in compared) for test in (lambda r: r.limits[0] > 0, lambda r: r.limits[1] < 0)
    )
    text += f"{better} lie{'s' * (better == 1)} below zero, {worse} above, {len(compared) - better - worse} hold it"
    return f"{text} (each 95% by itself)." if len(compared) > 1 else f"{text}."


def frame(rows: Sequence[Row], margin: float | None = None) -> tuple[float, float]:
    """Limits of x: everything, unless a few rows would press the others together."""
    shown = [row for row in rows if row.arm["versus"] and row.mean is not None]
    spans = [
        (*(row.interval("joint_low", "joint_high") or ()), *row.limits, row.mean or 0.0) for row in shown
    ]
    reaches = [max(abs(x) for x in span if math.isfinite(x)) for span in spans]
    most = OFF_SCALE * statistics.median(reaches) if reaches else 0.0
    reached = [
        x
        for row, span in zip(shown, spans, strict=True)
        if abs(row.mean or 0.0) <= most
        for x in (*span, *row.seeds)
    ]
    points = [x for x in (*reached, *((margin,) if margin is not None else ())) if math.isfinite(x)]
    low, high = max(min(points, default=0.0), -most), min(max(points, default=0.0), most)
    low, high = min(low, 0.0), max(high, 0.0)
    room = 0.07 * (high - low) or 0.01
    return low - room, high + room


def handles_of(rows: Sequence[Row], framed: tuple[float, float]) -> list[Line2D]:
    """The key: only what the picture holds."""
    looks = {bool(row.arm["ebc"]): (colour_of(row.arm), mark_of(row.arm)) for row in rows}
    handles = [
        Line2D(
            [],
            [],
            color=colour,
            marker=mark,
            lw=2.4,
            label=f"{said} EBC: mean and 95% interval over the paired seeds",
        )
        for said, (colour, mark) in (
            (("without", "with")[ebc], looks[ebc]) for ebc in sorted(looks, reverse=True)
        )
    ]
    low, high = framed
    if several := [
        n
        for row in rows
        if row.interval("joint_low", "joint_high") and (n := row.difference.get("comparisons"))
    ]:
        label = (
            f"95% for all {several[0]} comparisons together"
            if len(set(several)) == 1
            else "95% for all comparisons together"
        )
        handles.append(Line2D([], [], color="#333333", lw=0.9, label=label))
    handles.append(
        Line2D([], [], color="#333333", ls="", marker="o", ms=3.2, mew=0, alpha=0.45, label="a single seed")
    )
    if any(row.elsewhere for row in rows):
        handles.append(
            Line2D(
                [],
                [],
                color="#333333",
                ls="",
                marker="D",
                label="diamond: compared with the arm its row names",
            )
        )
    if any(row.mean is not None and not low <= row.mean <= high for row in rows):
        handles.append(
            Line2D([], [], color="#333333", ls="", marker=">", label="beyond the axis: see its figure")
        )
    if any(row.arm["outcomes"].get("diverged") for row in rows):
        handles.append(Line2D([], [], color=ALERT, ls="", marker="x", mew=2, label="diverged"))
    return handles


def across_of(axes: Axes) -> Any:
    """x as a share of the page, y in rows."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    return blended_transform_factory(figure.transFigure, axes.transData)


def head_of(axes: Axes, said: str) -> None:
    """Put the axes between the names and the figures; above the rows, what zero is, and the columns' headings."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    box, head = axes.get_position(), 22 / 72 / figure.get_figheight()
    axes.set_position((PLOT[0], box.y0, PLOT[1] - PLOT[0], box.height - head))
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
    n, of = row.arm["outcomes"].get("diverged", 0), len(row.arm["runs"])
    if n:
        axes.plot(0.985, y, "x", color=ALERT, ms=8, mew=2.2, transform=across)
        said = f"{n} of {seeds_of(of)} diverged"
        axes.text(0.955, y, said, transform=across, ha="right", va="center", size=8, color=ALERT)
    if row.mean is None and not n:
        other = arms.get(row.arm["versus"])
        said = "no pair of seeds to compare"
        if row.difference.get("diverged") and other:
            said = f"{row.arm['versus']} diverged in {other['outcomes'].get('diverged', 0)} of {seeds_of(len(other['runs']))}"
        axes.text(0.985, y, said, transform=across, ha="right", va="center", size=8, color=ALERT)
    elif row.mean is None:
        return
    elif not row.arm["versus"]:
        axes.plot(0.0, y, mark_of(row.arm), color=colour, mfc="white", mew=1.6, ms=6, zorder=3)
    elif not low <= row.mean <= high:
        over = row.mean > high
        axes.plot(0.985 if over else 0.015, y, ">" if over else "<", color=colour, ms=7, transform=across)
    else:
        for limits, width in (
            (row.interval("joint_low", "joint_high"), 0.9),
            (row.interval("low", "high"), 2.4),
        ):
            if limits:
                axes.plot(np.clip(limits, low, high), (y, y), color=colour, lw=width, solid_capstyle="butt")
        mark = ("D" if row.arm["ebc"] else "d") if row.elsewhere else mark_of(row.arm)
        axes.plot(row.mean, y, mark, color=colour, ms=5.5 if row.elsewhere else 6.5, zorder=3)


def write_row(axes: Axes, y: int, row: Row) -> None:
    """The row's label and words on the left, its figures on the right, on a strip of its own."""
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Sheet)
    across = across_of(axes)
    if y % 2 == 0:
        strip = Rectangle((0.5 * LEFT, y - 0.5), 1 - LEFT, 1, transform=across, fc="#F4F4F4", lw=0, zorder=-1)
        strip.set_clip_on(False)
        axes.add_artist(strip)
    lines = [
        (row.name, 8.5, "bold", colour_of(row.arm)),
        *((words, 7.5, "normal", "#555555") for words in row.words),
    ]
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
    if row.by_rank and row.mean is not None and row.interval("low", "high"):
        beyond += " [{}, {}]".format(
            *(signed(x) if math.isfinite(x) else "−∞" if x < 0 else "∞" for x in row.limits)
        )
    elif row.mean is not None and row.interval("low", "high"):
        beyond += f" ± {row.difference['high'] - row.mean:.3f}"
    losses = ("–" if (loss := row.arm[k]) is None else f"{loss:.3f}" for k in ("test_loss", "val_loss"))
    for (x, _), cell in zip(COLUMNS, (beyond if row.arm["versus"] else "reference", *losses), strict=True):
        axes.text(x, y, cell, transform=across, ha="right", va="center", size=8.5)

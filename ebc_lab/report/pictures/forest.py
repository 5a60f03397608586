"""The main result: every arm's paired difference in test loss from its reference, best first.

Of a suite's arms, and of the finals' against the baseline and against the fair control. The thick line is the
95% interval of one difference; the thin one, where the decision holds it, that of all differences together.
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

from ebc_lab.study.stages.compare_arms import reference_of
from ebc_lab.study.stages.statistics import level
from ebc_lab.study.stages.suite import point_in_words

from ..text.words import FAMILIES, arm_label, arm_title, capital, optimizer, plural
from .arm import colour_of, mark_of
from .curves import read_results
from .sheet.figure import (
    ALERT,
    GOAL,
    GREY,
    INK,
    MARGIN,
    RIGHT,
    SEED,
    SMALL,
    Arms,
    Facts,
    Results,
    Sheet,
    entry,
    page,
    seeds_of,
    sheet_of,
    tick,
    wrapped,
)
from .sheet.narrow import BACKED
from .sheet.place import key, lowered

WIDTH = 10.0  # inches
LEFT = 0.02  # of the width, the left margin
NAMES = (LEFT, 0.35)  # of the width, where the labels lie
PLOT = (0.365, 0.7)  # of the width, where the axes lie
COLUMNS = ((0.842, "difference ±"), (0.912, "test loss"), (RIGHT, "val loss"))  # right edge, heading
LINE = 11.5  # points from one line of a row's words to the next
OWN, WORDS = 37, 45  # characters of a label, and of words, that a line holds
OWN_ON_PHONE, WORDS_ON_PHONE = 25, 48
STRIP = 32.0  # points of a phone's row that the interval takes, under the words
HEADING = 36.0  # points of a heading
LOSSES = ("test loss", "val loss")
OFF_SCALE = 4.0  # times the rows' median reach: a longer axis would leave no room to tell the others apart


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
        """Whether a diverged run made ranks decide: the middle is then a median, and a limit may be
        infinite."""
        return self.difference.get("method") == "rank"

    @property
    def mean(self) -> float | None:
        """By rank the median; None where there is nothing to compare; 0 of the reference itself."""
        return self.difference.get("median" if self.by_rank else "mean") if self.arm["versus"] else 0.0

    @property
    def limits(self) -> tuple[float, float]:
        """The interval by itself, or the mean twice where there is none."""
        return self.interval("low", "high") or (self.mean or 0.0, self.mean or 0.0)

    @property
    def judged_by(self) -> tuple[float, float]:
        """The interval that holds for all comparisons together, where there is one."""
        return self.interval("joint_low", "joint_high") or self.limits

    def interval(self, *names: str) -> tuple[float, float] | None:
        """Two of the difference's limits; None where they were not computed.

        By rank, one that is null is infinite.
        """
        low, high = (self.difference.get(name) for name in names)
        if low is None and high is None:
            return None
        if not self.by_rank and (low is None or high is None):
            return None
        return (-math.inf if low is None else low, math.inf if high is None else high)

    @property
    def place(self) -> tuple[int, float]:
        """Best first; without a difference because the reference diverged, because the arm did, for lack of
        results."""
        if self.mean is not None:
            return 0, self.mean
        if self.arm["outcomes"].get("diverged"):
            return 2, 0.0
        return 1 if self.difference.get("diverged") else 3, 0.0

    def lines(self, phone: bool) -> list[tuple[str, bool]]:
        """Its words in lines, each with whether it is of the name: the label, with the arm it is compared
        with where that is not the suite's reference; what the arm is and what was tuned, where that says more
        than the label; on a phone the losses."""
        name = f"{self.label}  (vs {self.arm['versus']})" if self.elsewhere else self.label
        tuned = point_in_words(self.arm["point"])
        about = self.arm["about"] if self.arm["about"] != self.label else ""
        text = "; ".join(part for part in (about, tuned and f"tuned: {tuned}") if part)
        lines = [(line, True) for line in wrap(name, OWN_ON_PHONE if phone else OWN)]
        lines += [
            (line, False) for line in wrap(text, WORDS_ON_PHONE if phone else WORDS, break_on_hyphens=False)
        ]
        if phone:
            lines.append(
                (", ".join(f"{of} {loss}" for of, loss in zip(LOSSES, self.losses, strict=True)), False)
            )
        return lines

    @property
    def losses(self) -> list[str]:
        """Its losses as LOSSES names them."""
        return ["–" if (loss := self.arm[k]) is None else f"{loss:.3f}" for k in ("test_loss", "val_loss")]


def signed(value: float) -> str:
    """A difference in nats, `−0.031`."""
    return "0.000" if abs(value) < 0.0005 else f"{value:+.3f}".replace("-", "−")


def rows_of(root: Path, decision: Mapping[str, Any]) -> list[Row]:
    """The arms of a track, best first, with their differences seed by seed."""
    results = {label: read_results(root, arm) for label, arm in decision["arms"].items()}
    rows = []
    for label, arm in decision["arms"].items():
        differences = seed_differences(results[label], results.get(arm["versus"], {}))
        rows.append(Row(label, arm, differences, arm["versus"] not in (None, decision["reference"])))
    return sorted(rows, key=lambda row: row.place)


def missing(arms: Arms, asked: Sequence[str] = ()) -> str:
    """What the reader must know about arms that are incomplete; empty when all are complete."""
    kinds: dict[str, list[str]] = {"diverged": [], "without a result": []}
    for label, arm in arms.items():
        of, diverged = len(arm["runs"]), arm["outcomes"].get("diverged", 0)
        without = of - diverged - arm["outcomes"].get("completed", 0)
        for kind, n in zip(kinds, (diverged, without), strict=True):
            kinds[kind] += [f"{label} ({n} of {seeds_of(of)})"] if n else []
    kinds["could not be made"] = [label for label in asked if label not in arms]
    return "; ".join(f"{kind}: {', '.join(labels)}" for kind, labels in kinds.items() if labels)


def draw_forest(
    facts: Facts, track: str, decision: Mapping[str, Any], rows: Sequence[Row], rule: str
) -> Sheet:
    """A suite's arms: one row each, its difference from its reference with its intervals, seeds faint, its
    losses."""
    arms, reference = decision["arms"], decision["reference"]
    zero = arms[reference]["test_loss"] if reference in arms else None
    zero_line = f"0 = {reference}, which has no test loss"
    if zero is not None:
        zero_line = f"0 = {reference}, test loss {zero:.3f}"
    what = "What does each change do to the test loss?"
    whom = f"{optimizer(track)}: every arm against {reference}, paired seed by seed"
    small = (plural(len(rows), "arm"), rule.partition(";")[0])
    alert = missing(arms, facts.arms)
    figure, axes, handles, tall = rows_page(facts, what, whom, finding(rows), small, alert, rows, 0)
    key(axes, handles, LEFT)
    head_of(axes, zero_line)
    for y, row in enumerate(rows):
        show_row(axes, y, row, arms, tall, y % 2 == 0)
    return figure


def draw_finals(facts: Facts, track: str, decision: Mapping[str, Any], results: Results, rule: str) -> Sheet:
    """The final arms against the baseline, under them against the fair control and against the plain arm of
    the same rate, with zero and the target's margin."""
    arms, margin = decision["arms"], facts.margin
    groups: dict[str, list[Row]] = {}
    parts = []
    for family, words_of in FAMILIES.items():
        if family not in decision["differences"]:
            continue
        rows = _final_rows(decision, family, results)
        groups[_heading(decision, family, words_of)] = rows
        whom = f"against {words_of}" if family in decision["roles"] else "against plain at its rate"
        parts.append(f"{whom}, {counts(rows)}")
    rows = [row for group in groups.values() for row in group]
    text = "; ".join(parts)
    what = "Is any arm better than the baseline, or the fair control?"
    whom = f"{optimizer(track)}: every final arm, paired seed by seed"
    named = {arm_label(name, arm): arm for name, arm in arms.items()}
    notes = (f"{capital(text)}.", (rule.partition(";")[0],), missing(named))
    figure, axes, handles, tall = rows_page(facts, what, whom, *notes, rows, len(groups), margin)
    if margin is not None:
        axes.axvline(margin, color=ALERT, lw=1.2, ls=":", zorder=1)
        handles.append(entry(f"+{margin:g}: the target's margin, “no worse”", ALERT, lw=1.2, ls=":"))
    key(axes, handles, LEFT)
    head_of(axes, "0 = the reference")
    own = HEADING / tall
    edge = -0.5
    for heading, group in groups.items():
        look = {"xycoords": across_of(axes), "va": "center", "size": SMALL, "annotation_clip": False}
        title = axes.annotate(heading, (LEFT, edge + own / 2), **look)
        title.set(style="italic", color=INK)
        wrapped(title, (1 - 2 * LEFT) * figure.bbox.width)
        title.set_bbox(BACKED)
        edge += own
        for i, row in enumerate(group):
            show_row(axes, edge + 0.5, row, arms, tall, i % 2 == 0)
            edge += 1
    return figure


def _heading(decision: Mapping[str, Any], family: str, words_of: str) -> str:
    """Above the rows of one family: what they are compared with, and, where that is one arm, its loss."""
    if family not in decision["roles"]:
        return f"Against {words_of}"
    reference = decision["roles"][family]
    arm = decision["arms"][reference]
    loss = f", test loss {arm['test_loss']:.3f}" if arm["test_loss"] is not None else ""
    return f"Against {words_of}\n{arm_label(reference, arm).partition(' (')[0]}{loss}"


def _final_rows(decision: Any, family: str, results: Results) -> list[Row]:
    """The final arms of one family of differences, best first."""
    arms = decision["arms"]
    rows = []
    for name, difference in decision["differences"][family].items():
        arm = arms[name]
        reference = reference_of(decision, family, name)
        judged = f" · {difference['judged']}" if difference.get("judged") else ""
        compared = {
            "versus": reference,
            "difference": difference,
            "about": arm_title(name, arm),
            "point": None,
        }
        seeds = seed_differences(results[name], results[reference])
        rows.append(Row(arm_label(name, arm) + judged, {**arm, **compared}, seeds, False))
    return sorted(rows, key=lambda row: row.place)


def seed_differences(
    results_of: Mapping[str, Mapping[str, Any]], reference: Mapping[str, Mapping[str, Any]]
) -> list[float]:
    """Test loss minus the reference's of the same seed, where both completed."""

    def losses(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
        done = {s: r.get("test_loss") for s, r in results.items() if r.get("outcome") == "completed"}
        return {seed: float(loss) for seed, loss in done.items() if loss is not None}

    others = losses(reference)
    return [loss - others[seed] for seed, loss in losses(results_of).items() if seed in others]


def counts(rows: Sequence[Row]) -> str:
    """How the arms fared against one reference: as the decision judged them, else by their intervals."""
    judged = [row.difference.get("judged") for row in rows]
    if any(judged):
        kinds = (("beats", "better"), ("meets", "no worse"), ("misses", "worse"), ("undecided", "undecided"))
        tallies = [f"{judged.count(kind)} {phrase}" for kind, phrase in kinds if kind in judged]
        return f"of {plural(len(rows), 'arm')} {', '.join(tallies)}"
    below, above = excluding_zero(rows)
    return f"of {plural(len(rows), 'interval')} {below} lie{'s' * (below == 1)} below zero, {above} above"


def excluding_zero(rows: Sequence[Row]) -> tuple[int, int]:
    """How many of the intervals that judge the arms lie below zero, and how many above."""
    return sum(row.judged_by[1] < 0 for row in rows), sum(row.judged_by[0] > 0 for row in rows)


def rows_page(
    facts: Facts,
    what: str,
    whom: str,
    finding_text: str,
    small: Sequence[str],
    alert: str,
    rows: Sequence[Row],
    headings: int,
    margin: float | None = None,
) -> tuple[Sheet, Axes, list[Line2D], float]:
    """A page for rows and their headings. -> it, its axes framed, what its key must say, points of a row."""
    lines = max((len(row.lines(facts.phone)) for row in rows), default=1)
    tall = LINE * lines + (STRIP if facts.phone else 6)
    slots = len(rows) + headings * HEADING / tall
    height = 2.6 + tall / 72 * max(slots, 2)
    seeds = max((len(row.arm["runs"]) for row in rows), default=0)
    figure, axes = page(facts, what, whom, finding_text, seeds, small, alert, (WIDTH, height), LEFT)
    axes.set_xlabel("test loss minus its reference's (nats per token)\n← better        worse →")
    axes.set(xlim=frame(rows, margin), ylim=(slots - 0.5, -0.5), yticks=[])
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(4 if facts.phone else 6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: ("+" if x > 0 else "") + tick(x)))
    axes.axvline(0, color=GOAL, lw=1.4, ls="--", zorder=1)
    if facts.phone:
        figure.panels[axes].height = tall * max(slots, 1)
    return figure, axes, handles_of(rows, axes.get_xlim()), tall


def finding(rows: Sequence[Row]) -> str:
    """Which arms are told apart from their reference by the interval that judges them, and the one that lies
    lowest. Arms that were judged on another text are left out."""
    paired = [row for row in rows if row.arm["versus"] and row.mean is not None]
    compared = [row for row in paired if row.arm.get("comparable", True)]
    if not compared:
        return "No arm can be compared with its reference."
    suites_own = next((row.label for row in rows if row.arm["versus"] is None), None)
    lowest = next((row for row in compared if row.arm["versus"] == suites_own), compared[0])
    text = f"Lowest against {lowest.arm['versus']}: {lowest.label}, {signed(lowest.mean or 0.0)}"
    low, high = lowest.judged_by
    if low == high:
        return f"{text} (one seed: no interval)."
    better, worse = excluding_zero(compared)
    hold = len(compared) - better - worse
    text += f" ({level([lowest.difference])}: {signed(low)} to {signed(high)}). "
    text += f"Of {plural(len(compared), 'interval')} {better} lie{'s' * (better == 1)} below zero, "
    text += f"{worse} above, {hold} hold{'s' * (hold == 1)} it"
    joint = any(row.interval("joint_low", "joint_high") for row in compared)
    how = "all at once" if joint else "each by itself"
    return f"{text} ({how})." if len(compared) > 1 else f"{text}."


def frame(rows: Sequence[Row], margin: float | None = None) -> tuple[float, float]:
    """Limits of x: everything, unless a few rows would press the others together."""
    shown = [row for row in rows if row.arm["versus"] and row.mean is not None]
    spans = [
        (*(row.interval("joint_low", "joint_high") or ()), *row.limits, row.mean or 0.0) for row in shown
    ]
    reaches = [max(abs(x) for x in span if math.isfinite(x)) for span in spans]
    most = OFF_SCALE * statistics.median(reaches) if reaches else 0.0
    reached = [] if margin is None else [margin]
    for row, span in zip(shown, spans, strict=True):
        reached += [*span, *row.seeds] if abs(row.mean or 0.0) <= most else []
    points = [x for x in reached if math.isfinite(x)]
    low = min(max(min(points, default=0.0), -most), 0.0)
    high = max(min(max(points, default=0.0), most), 0.0)
    room = 0.07 * (high - low) or 0.01
    return low - room, high + room


def handles_of(rows: Sequence[Row], framed: tuple[float, float]) -> list[Line2D]:
    """The key: only what the picture holds."""
    looks = {bool(row.arm["ebc"]): (colour_of(row.arm), mark_of(row.arm)) for row in rows}
    handles, sure = [], level(row.difference for row in rows)
    for ebc, (colour, mark) in sorted(looks.items(), reverse=True):
        whose = f"{'with' if ebc else 'without'} EBC: " if True in looks else ""
        label = f"{whose}mean and {sure} interval over the paired seeds"
        handles.append(entry(label, colour, marker=mark, lw=2.4))
    joint = [row for row in rows if row.interval("joint_low", "joint_high")]
    if several := [n for row in joint if (n := row.difference.get("comparisons", 0)) > 1]:
        all_of_them = f"all {several[0]}" if len(set(several)) == 1 else "all"
        handles.append(entry(f"{sure} for {all_of_them} comparisons together", lw=0.9))
    handles.append(entry("a single seed", **SEED))
    if any(row.elsewhere for row in rows):
        handles.append(entry("diamond: compared with the arm its row names", ls="", marker="D"))
    low, high = framed
    compared = [row for row in rows if row.mean is not None and row.arm["versus"]]
    spans = [(row.mean or 0.0, *row.limits, *_joint(row)) for row in compared]
    if any(min(span) < low or max(span) > high for span in spans):
        handles.append(entry("arrow: goes on beyond the axis, see its figure", ls="", marker=">"))
    if any(row.arm["outcomes"].get("diverged") for row in rows):
        handles.append(entry("diverged", ALERT, ls="", marker="x", mew=2))
    return handles


def _joint(row: Row) -> tuple[float, ...]:
    """The interval that holds for all comparisons, where there is one."""
    return row.interval("joint_low", "joint_high") or ()


def across_of(axes: Axes) -> Any:
    """x as a share of the page, y in rows."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    return blended_transform_factory(figure.transFigure, axes.transData)


def head_of(axes: Axes, title: str) -> None:
    """Put the axes between the names and the figures; above the rows, what zero is, and the columns'
    headings."""
    figure = sheet_of(axes)
    if not figure.phone:
        lowered(axes, 22.0)
        box = axes.get_position()
        axes.set_position((PLOT[0], box.y0, PLOT[1] - PLOT[0], box.height))
    low, high = axes.get_xlim()
    zero = -low / (high - low)  # as a share of the axis
    side, room = "center", 2 * min(zero, 1 - zero)
    if not 0.4 <= zero <= 0.6:
        side, room = ("left", 1 - zero) if zero < 0.4 else ("right", zero)
    above: dict[str, Any] = {"xytext": (0, 5), "textcoords": "offset points", "annotation_clip": False}
    data = blended_transform_factory(axes.transData, axes.transAxes)
    named = axes.annotate(title, (0, 1), xycoords=data, ha=side, size=SMALL, color=GOAL, **above)
    wrapped(named, room * axes.bbox.width)
    across = blended_transform_factory(figure.transFigure, axes.transAxes)
    for x, heading in () if figure.phone else COLUMNS:
        axes.annotate(heading, (x, 1), xycoords=across, ha="right", size=SMALL, color=GREY, **above)


def show_row(axes: Axes, y: float, row: Row, arms: Arms, tall: float, striped: bool) -> None:
    """A row around `y` with its mark and its words; on a phone, `tall` points high, the mark lies under the
    words."""
    if sheet_of(axes).phone:
        draw_row(axes, y + 0.5 - 0.6 * STRIP / tall, row, arms, 0.28 * STRIP / tall)
        _write_row_above(axes, y, row, 1 - STRIP / tall)
    else:
        draw_row(axes, y, row, arms)
        write_row(axes, y, row, striped)


def draw_row(axes: Axes, y: float, row: Row, arms: Arms, under: float = 0.2) -> None:
    """The row's mark: a mean with its interval, arrows to what lies off the axis, or a cross with words.

    `under`: how far the seeds lie below it.
    """
    colour, across = colour_of(row.arm), axes.get_yaxis_transform()
    low, high = axes.get_xlim()
    axes.plot(row.seeds, [y + under] * len(row.seeds), color=colour, **SEED)
    n, of = row.arm["outcomes"].get("diverged", 0), len(row.arm["runs"])
    if n:
        axes.plot(0.985, y, "x", color=ALERT, ms=8, mew=2.2, transform=across)
        words = f"{n} of {seeds_of(of)} diverged"
        above: dict[str, Any] = {
            "xytext": (0, 9),
            "textcoords": "offset points",
            "ha": "right",
            "va": "center",
        }
        axes.annotate(words, (0.985, y), xycoords=across, size=SMALL, color=ALERT, **above)
    if row.mean is None and not n:
        other = arms.get(row.arm["versus"])
        words = "no pair of seeds to compare"
        if row.difference.get("diverged") and other:
            diverged, seeds = other["outcomes"].get("diverged", 0), seeds_of(len(other["runs"]))
            words = f"{row.arm['versus']} diverged in {diverged} of {seeds}"
        axes.text(0.985, y, words, transform=across, ha="right", va="center", size=SMALL, color=ALERT)
    elif row.mean is None:
        return
    elif not row.arm["versus"]:
        axes.plot(0.0, y, mark_of(row.arm), color=colour, mfc="white", mew=1.6, ms=6, zorder=3)
    else:
        reach = [row.mean]
        for names, width in ((("joint_low", "joint_high"), 0.9), (("low", "high"), 2.4)):
            limits = row.interval(*names)
            if limits:
                axes.plot(np.clip(limits, low, high), (y, y), color=colour, lw=width, solid_capstyle="butt")
                reach += limits
        _arrows(axes, y, min(reach), max(reach), colour)
        mark = mark_of(row.arm)
        if row.elsewhere:
            mark = "D" if row.arm["ebc"] else "d"
        if low <= row.mean <= high:
            axes.plot(row.mean, y, mark, color=colour, ms=5.5 if row.elsewhere else 6.5, zorder=3)


def _arrows(axes: Axes, y: float, first: float, last: float, colour: str) -> None:
    """At each edge of the axis that what lies between these two values reaches beyond, an arrow."""
    low, high = axes.get_xlim()
    across = axes.get_yaxis_transform()
    for beyond, x, mark in ((first < low, 0.015, "<"), (last > high, 0.985, ">")):
        if beyond:
            axes.plot(x, y, mark, color=colour, ms=7, transform=across, zorder=3)


def write_row(axes: Axes, y: float, row: Row, striped: bool) -> None:
    """The row's label and words on the left, its figures on the right; every other one on a strip."""
    figure = sheet_of(axes)
    across = across_of(axes)
    if striped:
        strip = Rectangle((0.5 * LEFT, y - 0.5), 1 - LEFT, 1, transform=across, fc="#F4F4F4", lw=0, zorder=-1)
        strip.set_clip_on(False)
        axes.add_artist(strip)
    lines = row.lines(phone=False)
    for i, (line, of_name) in enumerate(lines):
        offset = {"xytext": (0, LINE * ((len(lines) - 1) / 2 - i)), "textcoords": "offset points"}
        look: dict[str, Any] = {"va": "center", **offset, **_look_of(row, of_name)}
        text = axes.annotate(line, (NAMES[0], y), xycoords=across, annotation_clip=False, **look)
        wrapped(text, (NAMES[1] - NAMES[0]) * figure.bbox.width)
    for (x, _), cell in zip(COLUMNS, (_difference_in_words(row), *row.losses), strict=True):
        axes.text(x, y, cell, transform=across, ha="right", va="center", size=SMALL)


def _write_row_above(axes: Axes, y: float, row: Row, share: float) -> None:
    """The row's label and words over a `share` of it, its difference beside the label, under a thin line."""
    across = across_of(axes)
    edge = Line2D((MARGIN, 1 - MARGIN), (y - 0.5, y - 0.5), color="#DDDDDD", lw=0.6, transform=across)
    edge.set_clip_on(False)
    axes.add_artist(edge)
    blank = Rectangle(
        (0, y - 0.499), 1, share, transform=axes.get_yaxis_transform(), fc="white", lw=0, zorder=1.5
    )
    axes.add_artist(blank)
    cells = [(1 - MARGIN, "right", 0, _difference_in_words(row), _look_of(row, False) | {"color": INK})]
    cells += [
        (MARGIN, "left", i, line, _look_of(row, of_name)) for i, (line, of_name) in enumerate(row.lines(True))
    ]
    for x, side, line, cell, look in cells:
        place: dict[str, Any] = {"xytext": (0, -3 - LINE * line), "textcoords": "offset points", "va": "top"}
        place |= {"xycoords": across, "annotation_clip": False, "ha": side}
        wrapped(
            axes.annotate(cell, (x, y - 0.5), **place, **look), (1 - 2 * MARGIN) * sheet_of(axes).bbox.width
        )


def _look_of(row: Row, of_name: bool) -> dict[str, Any]:
    colour, weight = (colour_of(row.arm), "bold") if of_name else ("#555555", "normal")
    return {"size": SMALL, "weight": weight, "color": colour}


def _difference_in_words(row: Row) -> str:
    if not row.arm["versus"]:
        return "reference"
    if row.mean is None:
        return "–"
    if not row.interval("low", "high"):
        return signed(row.mean)
    if row.by_rank:
        low, high = (signed(x) if math.isfinite(x) else f"{x:g}" for x in row.limits)
        return f"{signed(row.mean)} [{low}, {high}]".replace("-inf", "−∞").replace("inf", "∞")
    return f"{signed(row.mean)} ± {row.difference['high'] - row.mean:.3f}"

"""A picture: panels, keys and labels, drawn wide or for a narrow column, and in words what the page says.

Only what stands inside a picture is laid out here, by matplotlib's tight layout. What is said around it, who
is shown, what was found and what to know, the page sets as text; a picture's file has its title and, at its
foot, where the data come from.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from textwrap import TextWrapper, wrap
from typing import Any, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import TightLayoutEngine
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox

from ...text.words import plural
from ..catalogue import Entry
from .curves import Line, missing
from .looks import GOAL, GREY, INK, SMALL, UNKNOWN, Look

STYLE = Path(__file__).parent / "style.mplstyle"
MOST_LINES = 8  # of a panel that are all told apart
CHARACTER = 5.4  # points that a letter of these takes
LINE = 12.5  # points from one line of words to the next
GAP = 6.0  # points between things that stand beside each other
SAMPLE = 32.0  # points of a mark in a key
WIDE, NARROW = 10.0, 3.75  # inches; 3.75 are 360 CSS pixels, and a column of a paper
NARROW_PANEL = 2.1  # inches of a panel that is one of several
NARROW_ALONE = 2.7
WIDEST_LABEL = 48  # characters of a label beside a line
ROW_NAME = {False: 34, True: 17}  # characters of a row's name, wide and narrow
NEAR_THE_EDGE, NEAR_THE_TOP = 0.85, 0.8  # of the axes: a line that ends before has its label at its end
LABEL_APART = 0.07  # of the axes' height, between labels that stand in them
MOST_OF_KEY = 8.5  # points of a mark in a key
BACKED: dict[str, Any] = {"fc": "white", "ec": "none", "pad": 0.5, "alpha": 0.7}

Decisions = Mapping[str, Mapping[str, Any]]
Arms = Mapping[str, Mapping[str, Any]]
End = tuple[float, float, str, str]  # of a line: x, y, label, colour


@dataclass(frozen=True)
class Facts:
    """What every picture of a study says about it, or is drawn with."""

    name: str
    corpus: str
    warning: str | None
    scale: str
    tokens_per_step: int
    windows: int  # of validation text, always the same, that evaluations during a run look at
    band: tuple[float, float]  # where the verdict wants the median c
    grids: Mapping[str, Sequence[float]] = field(default_factory=dict)  # optimizer -> rates asked for
    aims_at_band: bool = False  # whether δ* is chosen by that band, too, instead of by the loss
    sweep_steps: tuple[int, int] = (0, 0)  # of the sweep's grid, and of its other runs
    arms: tuple[str, ...] = ()  # of a suite, as asked for; of other studies none
    ebc: bool = True  # whether anything in the study has EBC: where nothing has, it is not spoken of
    looks: Mapping[str, Look] = field(default_factory=dict)  # of the arms, by name
    narrow: bool = False  # whether a picture is drawn for a phone, or a column of a paper

    def look(self, name: str) -> Look:
        return self.looks.get(name, UNKNOWN)

    @property
    def source(self) -> str:
        text = f"study {self.name} · {self.scale} scale · {self.corpus}"
        return f"{text}. Corpus: {self.warning}" if self.warning else text


class Shown(Protocol):
    """What a sheet has to know of what it shows: whether it is narrow, and where the data come from."""

    @property
    def narrow(self) -> bool: ...

    @property
    def source(self) -> str: ...


class Sheet(Figure):
    """A picture with its panels, and in words what the page says around it."""

    def __init__(
        self,
        facts: Shown,
        title: str,
        about: Sequence[str],
        notes: Sequence[str] = (),
        alert: str = "",
        *,
        arms: Arms | None = None,
        grid: Sequence[str] = ("a",),
        heights: Sequence[float] = (3.9,),
    ) -> None:
        """`about`: whom it shows and what was found, in sentences; `notes`: how to read it; `alert`: what is
        missing; of `arms` the seeds and what is missing are said here. `grid`: rows of panels, a letter each;
        `heights`: inches of these rows on a wide sheet."""
        self.narrow = facts.narrow
        if facts.narrow:
            grid = list(dict.fromkeys("".join(grid)))
            several = len(grid) > 1
            heights = [NARROW_PANEL if several else max(NARROW_ALONE, 0.8 * heights[0])] * len(grid)
        width = NARROW if facts.narrow else WIDE
        self.title = " ".join(title.split())
        self.alt = " ".join(f"{text.rstrip('.')}." for text in about if text)
        if arms is not None:
            notes = (plural(max((len(arm["runs"]) for arm in arms.values()), default=0), "seed"), *notes)
        self.note = " · ".join(notes)
        self.alert = alert or missing(arms or {})
        self.source = facts.source
        head = wrap(self.title, int(72 * width / 8.6))
        foot = wrap(" ".join(self.source.split()), int((72 * width - 2 * GAP) / CHARACTER))
        # points above and below the panels
        self.strips = (17.0 * len(head) + 2 * GAP, LINE * len(foot) + GAP)
        height = sum(heights) + sum(self.strips) / 72
        super().__init__(figsize=(width, height))
        FigureCanvasAgg(self)
        self.alone = [
            self.text(0, 0, "\n".join(head), size=13, weight="bold", va="top"),
            self.text(0, 0, "\n".join(foot), size=SMALL, color=GREY, va="bottom"),
        ]
        panels = self.subplot_mosaic([list(row) for row in grid], height_ratios=list(heights))
        self.panels: list[Axes] = [panels[letter] for letter in sorted(panels)]
        self.marks: list[Any] = []  # what the key explains
        self.ends: dict[Axes, list[tuple[Any, End]]] = {}  # of a panel's lines: a mark, and where each ends

    def key(self, *marks: Any) -> None:
        """Explain these marks under the panels."""
        self.marks.extend(marks)

    def label(self, axes: Axes, ends: Sequence[End], handles: Sequence[Any] = ()) -> None:
        """Write a label where each line ends; in a narrow picture the labels stand in the key.

        `handles`: how each is shown there where it is no line.
        """
        marks = list(handles) or [_as_drawn(axes, end) for end in ends]
        self.ends.setdefault(axes, []).extend(zip(marks, ends, strict=True))

    def taller(self, points: float) -> None:
        self.set_figheight(self.get_figheight() + points / 72)

    @property
    def drawing(self) -> Bbox:
        """Return the place of the panels in inches, without the words above and below."""
        head, foot = (points / 72 for points in self.strips)
        return Bbox.from_extents(0, foot, self.get_figwidth(), self.get_figheight() - head)

    @contextmanager
    def without_words(self) -> Iterator[None]:
        """Leave out what is said around a picture as long as this lasts."""
        for text in self.alone:
            text.set_visible(False)
        yield
        for text in self.alone:
            text.set_visible(True)

    def settle(self) -> None:
        """Lay out everything. Nothing may be added afterwards."""
        for axes in self.panels:
            self._break_words(axes)
        if self.narrow:
            self.marks = [*self._named_marks(), *self.marks]
            self.ends = {}
        placed = {axes: self._place_labels(axes, [end for _, end in own]) for axes, own in self.ends.items()}
        key = self._draw_key() if self.marks else None
        depth = 72 * key.get_window_extent().height / self.dpi + GAP if key else 0.0
        self.taller(depth)
        self.set_figheight(math.ceil(self.get_figheight() * self.dpi) / self.dpi)  # whole pixels
        height, width = 72 * self.get_figheight(), 72 * self.get_figwidth()
        head, foot = self.strips
        self.alone[0].set_position((GAP / width, 1 - GAP / height))
        self.alone[1].set_position((GAP / width, GAP / 2 / height))
        if key:
            key.set_bbox_to_anchor((GAP / width, foot / height), transform=self.transFigure)
        layout = TightLayoutEngine(rect=(0, (foot + depth) / height, 1, 1 - head / height))
        layout.execute(self)
        for axes, labels in placed.items():
            _spread(axes, labels)
        for axes in self.panels:
            _thin_ticks(axes)
            axes.patch.set_visible(False)
            for line in (*axes.get_xgridlines(), *axes.get_ygridlines()):
                line.set_clip_on(False)

    def _break_words(self, axes: Axes) -> None:
        """Break what an axis shows into lines that its panel holds."""
        labelled = 0 if self.narrow or axes not in self.ends else WIDEST_LABEL / 2 * CHARACTER
        panel = axes.get_subplotspec()
        assert panel is not None
        columns = panel.get_gridspec().ncols
        broad = int((72 * self.get_figwidth() / columns - 60 - labelled) / CHARACTER)
        tall = int((72 * self.get_figheight() * panel.get_position(self).height - 20) / CHARACTER)
        axes.set_xlabel(_broken(axes.get_xlabel(), broad))
        axes.set_ylabel(_broken(axes.get_ylabel(), tall))
        axes.set_title(_broken(axes.get_title(loc="left"), broad), loc="left", size=SMALL, color=INK)

    def _named_marks(self) -> list[Any]:
        """Return a mark for each name, the highest line first, with all that the panels say of it."""
        named: dict[str, tuple[Any, list[str]]] = {}
        for ends in self.ends.values():
            for mark, (_, _, label, _) in sorted(ends, key=lambda end: -end[1][1]):
                name, _, found = label.partition("  ")
                named.setdefault(name, (mark, []))[1].extend([found] if found else [])
        for name, (mark, words) in named.items():
            mark.set_label(f"{name}  {'; '.join(words)}")
        return [mark for mark, _ in named.values()]

    def _draw_key(self) -> Legend:
        """Draw the key in as many columns as fit; its place is still open."""
        room = 72 * self.get_figwidth() - 2 * GAP
        labels = [_broken(str(mark.get_label()), int((room - SAMPLE) / CHARACTER)) for mark in self.marks]
        widest = max(len(line) for label in labels for line in label.split("\n"))
        columns = max(1, min(5, len(labels), int(room / (widest * CHARACTER + SAMPLE + 2 * GAP))))
        return self.legend(self.marks, labels, loc="lower left", ncols=columns, borderaxespad=0)

    def _place_labels(self, axes: Axes, ends: Sequence[End]) -> list[tuple[Text, float, float]]:
        """Write the labels of lines that end at the right edge beside it, the others at their ends.
        -> the former, each with where its line ends, as shares of the axes."""
        axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # fixed, so that leaders do not move them
        share = axes.transData + axes.transAxes.inverted()
        beside = []
        inside: list[float] = []  # heights of labels that stand in the panel
        for x, y, label, colour in ends:
            across, up = share.transform((x, y))
            words = _broken(label, WIDEST_LABEL)
            free = all(abs(up - other) > LABEL_APART for other in inside)
            if across < NEAR_THE_EDGE and 0 <= up < NEAR_THE_TOP and len(words) < WIDEST_LABEL and free:
                place: dict[str, Any] = {"xytext": (GAP, GAP), "textcoords": "offset points", "va": "bottom"}
                axes.annotate(words, (x, y), size=SMALL, color=colour, bbox=BACKED, **place)
                inside.append(up)
                continue
            up = float(np.clip(up, 0, 1))
            text = axes.text(1.03, up, words, transform=axes.transAxes, va="center", size=SMALL, color=colour)
            beside.append((text, float(across), up))
        return beside


class _Lines(TextWrapper):
    """Words in lines; the name of an arm breaks after its underscores."""

    wordsep_simple_re = re.compile(r"(\s+|(?<=_)(?=[^_\s]))")


def _broken(words: str, most: int) -> str:
    """Return words in lines of at most `most` characters, those that are there kept."""
    wrapper = _Lines(max(most, 8), break_on_hyphens=False)
    lines = map(wrapper.wrap, words.split("\n"))
    return "\n".join(itertools.chain.from_iterable(lines))


def _as_drawn(axes: Axes, end: End) -> Any:
    """Return a mark for a key with the look of the line that ends there, else of one of its colour."""
    x, y, label, colour = end
    alike = [line for line in axes.get_lines() if line.get_color() == colour and line.get_linewidth() > 0.6]
    points = [np.ma.filled(np.ma.atleast_2d(line.get_xydata()), np.nan) for line in alike]
    whole = [(line, own[-1]) for line, own in zip(alike, points, strict=True) if len(own) > 1]
    for line, _ in sorted(whole, key=lambda one: not np.allclose(one[1], (x, y))):
        look = {"ls": line.get_linestyle(), "lw": line.get_linewidth(), "marker": line.get_marker()}
        return entry(label, colour, ms=4, **look)
    return entry(label, colour, lw=2.0)


def _spread(axes: Axes, labels: list[tuple[Text, float, float]]) -> None:
    """Move labels beside a panel apart, in the order of their lines' ends, and lead to each from its line."""
    labels.sort(key=lambda label: (label[2], -label[1]))
    tall = [text.get_window_extent().height / axes.bbox.height for text, _, _ in labels]
    squeezed = min(1.0, 1 / max(sum(tall), 1e-9))
    gaps = [squeezed * 0.5 * (a + b) for a, b in itertools.pairwise(tall)]
    for (text, x, y), place in zip(labels, spread([y for _, _, y in labels], gaps), strict=True):
        text.set_y(place)
        leader = Line2D([min(x, 1.0), 1.02], [y, place], color="#AAAAAA", lw=0.6, label="_leader")
        leader.set_transform(axes.transAxes)
        axes.add_artist(leader).set_clip_on(False)


def spread(wanted: Sequence[float], gaps: Sequence[float]) -> list[float]:
    """Return ascending places in [0, 1] near those wanted, with at least these gaps between them."""
    places = list(wanted)
    for i, gap in enumerate(gaps):
        places[i + 1] = max(places[i + 1], places[i] + gap)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], 1.0 if i == len(gaps) else places[i + 1] - gaps[i])
    return places


def _thin_ticks(axes: Axes) -> None:
    """Leave out the label of a tick of the x axis that would run into the one before."""
    low, high = sorted(axes.get_xlim())
    end = -math.inf
    ticks = [tick for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    shown = []
    for tick in sorted(ticks, key=lambda tick: tick.label1.get_window_extent().x0):
        box = tick.label1.get_window_extent()
        if box.x0 > end + 4:
            shown.append((tick.get_loc(), tick.label1.get_text()))
            end = box.x1
    if len(shown) < len(ticks):
        axes.set_xticks([place for place, _ in shown], [label for _, label in shown])
        axes.set_xlim(low, high)


# -- what is drawn in panels ---------------------------------------------------------------------------------


def entry(label: str, color: str = INK, **look: Any) -> Line2D:
    """Return a mark for a key, no larger than a line of words."""
    if "ms" in look:
        look["ms"] = min(look["ms"], MOST_OF_KEY)
    return Line2D([], [], color=color, label=label, **look)


def lines(axes: Axes, line: Line, look: Look, **more: Any) -> tuple[float, float] | None:
    """Draw the line that stands for an arm's seeds, and each seed faintly. -> its last point, if any."""
    style = {"color": look.colour, "ls": look.line, "lw": 1.6, "zorder": 2.5, **more}
    axes.plot(line.steps, line.middle, **style)
    if len(line.seeds) > 1:
        axes.plot(line.steps, line.seeds.T, color=look.colour, lw=0.5, alpha=0.35, zorder=1.2)
    return line.last


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Give a panel a row for each name, from the top."""
    sheet = axes.get_figure(root=True)
    assert isinstance(sheet, Sheet)
    names = [_broken(name, ROW_NAME[sheet.narrow]) for name in names]
    axes.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    tallest = max((1 + name.count("\n") for name in names), default=1)
    if tallest > 2:
        sheet.taller(LINE * (tallest - 2) * len(names))


def over_steps(facts: Facts, panels: Sequence[Axes], last: float) -> None:
    """Let stacked panels share an x axis of training steps up to `last`, which the lowest one names."""
    for axes in panels:
        axes.set_xlim(-0.01 * last, 1.01 * last + 1)
        axes.tick_params(labelbottom=axes is panels[-1])
    panels[-1].set_xlabel(f"training step  (one step = {facts.tokens_per_step:,} tokens)")


class _TicksOfDecades(LogLocator):
    """Ticks inside of a decade, too; matplotlib's leaves an axis bare where its ticks skip decades."""

    def tick_values(self, vmin: float, vmax: float) -> Any:
        ticks = super().tick_values(vmin, vmax)
        if len(ticks):
            return ticks
        decades = LogLocator()
        decades.set_axis(self.axis)
        return decades.tick_values(vmin, vmax)


def log_axis(axes: Axes, name: str, subs: Sequence[float] = (1.0, 2.0, 5.0)) -> None:
    """Make an axis logarithmic, and read in plain numbers."""
    axis = axes.xaxis if name == "x" else axes.yaxis
    axes.set(**{f"{name}scale": "log"})
    axis.set_major_locator(_TicksOfDecades(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_tick(value)))
    axis.set_minor_locator(NullLocator())


def format_tick(value: float, within: float = 1e-6) -> str:
    """Return the label of a tick: as few digits as say its value, never another one. `within`: relative."""
    short = (f"{value:.{digits}g}" for digits in range(1, 7))
    shown = next((x for x in short if math.isclose(float(x), value, rel_tol=within)), f"{value:.6g}")
    return f"{float(shown):g}".replace("-", "−")


def name_band(axes: Axes, high: float, words: str) -> None:
    """Write under the upper edge of a band across the axes what it is."""
    place: dict[str, Any] = {"xytext": (-4, -3), "textcoords": "offset points", "ha": "right", "va": "top"}
    axes.annotate(words, (1, high), xycoords=axes.get_yaxis_transform(), color=GOAL, size=SMALL, **place)


# -- a picture in its sizes ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A picture's place among those of a study, and how it is drawn.

    `name`: stem of its files; `arm`: whose it is, empty where it is of several; such a one is narrow only.
    """

    name: str
    section: str
    draw: Callable[[Facts], Sheet | None]
    facts: Facts
    arm: str = ""

    def sheet(self, narrow: bool = False) -> Sheet | None:
        """Draw it; None where there is nothing to show."""
        sheet = self.draw(replace(self.facts, narrow=narrow or bool(self.arm)))
        if sheet:
            sheet.settle()
        return sheet

    def describe(self, sheet: Sheet) -> Entry:
        """Return its line in the study's catalogue."""
        return {
            "name": self.name,
            "section": self.section,
            "title": sheet.title,
            "alt": sheet.alt,
            "arm": self.arm,
            "note": sheet.note,
            "alert": sheet.alert,
        }

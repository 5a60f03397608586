"""A picture's page: its header in words, its first axes, and what all pictures draw alike.

A picture is drawn for one of two readers, `Facts.phone`: wide, as the page of a study and papers show it, or
for a phone, 360 CSS pixels wide. What a page says around every picture, its title, the study and the corpus,
is drawn in strips at the top and at the foot of a wide one, which the SVG leaves out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

STYLE = Path(__file__).parents[1] / "style.mplstyle"
# places in the style's palette
EBC = "C0"
PLAIN = "C1"
GOAL = "C2"
ALERT = "C3"
OTHER = "C5"
SPARE = "C6"
DASHES = ("-", "--", "-.")  # of lines, when the colours are used up
INK = "#333333"
GREY = "#666666"
REST = "#BBBBBB"  # of lines that are not told apart
STRONG = (EBC, ALERT, GOAL)  # of the arms that a study asks about
MOST_LINES = 8  # of a panel that are all told apart
LABELS_FROM = 0.7  # of the width: the lines' labels stand beyond it
LEFT, RIGHT = 0.095, 0.975  # margins, as shares of the width
PHONE_WIDTH = 3.75  # inches: 360 CSS pixels
MARGIN = 0.025  # of a phone's width
EDGE = 8.0  # points above and below
SMALL = 9.0  # points of the smallest text: 12 CSS pixels where a picture has its own size
MOST_OF_KEY = 8.5  # points of a mark in a key
USUAL_HEAD = 68.0  # points of the header that the heights of pictures are meant for
ROUNDED = 1e-3  # how far the ratio of two figures of three digits may be off, relative
SEED: dict[str, Any] = {
    "ls": "",
    "marker": "o",
    "ms": 3.2,
    "mew": 0,
    "alpha": 0.45,
}  # the point of a single seed
FAINT: dict[str, Any] = {"lw": 0.5, "alpha": 0.6}  # the line of a single seed, in the key

Decisions = Mapping[str, Mapping[str, Any]]
Arms = Mapping[str, Mapping[str, Any]]
Results = Mapping[str, Mapping[str, Mapping[str, Any]]]  # arm -> seed -> result
End = tuple[float, float, str, str]  # of a line: x, y, label, colour
Line = tuple[str, float, str, str]  # of a header: words, points, weight, colour


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
    margin: float | None = None  # nats of test loss that "no worse" allows
    grids: Mapping[str, Sequence[float]] = field(
        default_factory=dict
    )  # optimizer -> learning rates asked for
    aims_at_band: bool = False  # whether δ* is chosen by that band, too, instead of by the loss
    sweep_steps: tuple[int, int] = (0, 0)  # of the sweep's grid, and of its other runs
    arms: tuple[str, ...] = ()  # of a suite, as asked for; of other studies none
    ebc: bool = True  # whether anything in the study has EBC: where nothing has, it is not spoken of
    phone: bool = False  # whether a picture is drawn for a phone


@dataclass
class Panel:
    """What stands with the axes of a phone's picture, which are placed when all of it is drawn."""

    height: float = 190.0  # points
    handles: list[Any] = field(default_factory=list)  # of its key, which stands under it
    right: float = 1 - MARGIN  # where it ends, a share of the width


class Sheet(Figure):
    """A figure that knows its own header: its title, and what can be said of it to somebody who cannot see
    it."""

    def __init__(self, size: tuple[float, float], phone: bool) -> None:
        super().__init__(figsize=size)
        FigureCanvasAgg(self)
        self.phone = phone
        self.title = ""
        self.alt = ""
        self.source = ""  # where the data come from, with the corpus' warning
        self.alone: list[Text] = []  # only drawn where nothing around the picture says it
        self.strips = (0.0, 0.0)  # points that these take at the top and at the foot
        self.header: list[Text] = []  # its lines on a phone, from the top
        self.panels: dict[Axes, Panel] = {}  # of a phone, from the top


def page(
    facts: Facts,
    what: str,
    whom: str,
    finding: str,
    seeds: int,
    small: Sequence[str] = (),
    alert: str = "",
    size: tuple[float, float] = (8.6, 5.2),
    left: float = LEFT,
) -> tuple[Sheet, Axes]:
    """A figure with its header: what it shows (bold), of whom, what was found, notes, what is missing; at its
    foot where the data come from.

    `size`: inches, of a wide one with a header of the usual height; `left`: its margin, as a share of the
    width.
    """
    if facts.phone:
        size, left = (PHONE_WIDTH, size[1]), MARGIN
    figure = Sheet(size, facts.phone)
    sentences = filter(None, (text.rstrip(".") for text in (whom, finding, alert)))
    figure.title = " ".join(what.split())
    figure.alt = " ".join(". ".join((*sentences, "")).split())
    source = " · ".join((f"study {facts.name}", f"{facts.scale} scale", facts.corpus))
    warning = f"Corpus: {facts.warning}" if facts.warning else ""
    figure.source = ". ".join(filter(None, (source, warning)))
    title = (figure.title, 13.0, "bold", "black")
    notes = (" · ".join((seeds_of(seeds), *small)), SMALL, "normal", GREY)
    head: list[Line] = [(whom, 11.0, "normal", "black"), (finding, 10.0, "normal", INK), notes]
    head.append((alert, SMALL, "bold", ALERT))
    if facts.phone:
        figure.header = _words(figure, left, head)
        axes = figure.add_axes((left, 0.2, 1 - 2 * left, 0.5))
        figure.panels[axes] = Panel()
        return figure, axes
    above = _words(figure, left, [title])
    lines = _words(figure, left, head)
    below = _words(figure, left, [(source, SMALL, "normal", GREY), (warning, SMALL, "bold", ALERT)])
    figure.alone = [*above, *below]
    foot = sum(_height_of(text) for text in below)
    figure.strips = (EDGE / 2 + sum(_height_of(text) for text in above), foot)
    taller = sum(_height_of(text) for text in (*above, *lines)) + EDGE - USUAL_HEAD
    figure.set_figheight(
        math.ceil((size[1] + (taller + foot) / 72) * figure.dpi) / figure.dpi
    )  # whole pixels
    used = hang_words(figure, [*above, *lines], EDGE)
    height = figure.get_figheight() * 72
    hang_words(figure, below, height - foot)
    bottom = 0.2 + foot / height
    return figure, figure.add_axes((left, bottom, RIGHT - left, 1 - (used + EDGE) / height - bottom))


def _words(figure: Sheet, left: float, lines: Sequence[Line]) -> list[Text]:
    """Lines of words as wide as the page, broken where they are longer; their heights are still open."""
    right = 1 - MARGIN if figure.phone else RIGHT
    shown = []
    for words, points, weight, colour in lines:
        if words := " ".join(words.split()):
            look = {"size": points, "weight": weight, "color": colour, "va": "top"}
            shown.append(figure.text(left, 0.5, words, **look))  # type: ignore[arg-type]
            wrapped(shown[-1], (right - left) * figure.bbox.width)
    return shown


def _height_of(text: Text) -> float:
    """Points that a line of words takes, with the room under it."""
    lines = text.get_text().count("\n")
    return (1.45 + 1.2 * lines) * float(text.get_fontsize())


def hang_words(figure: Sheet, lines: Sequence[Text], used: float) -> float:
    """Put lines of words under one another, the first one `used` points from the top. -> where they end."""
    height = figure.get_figheight() * 72
    for text in lines:
        text.set_y(1 - used / height)
        used += _height_of(text)
    return used


def wrapped(text: Text, room: float) -> None:
    """Break a text wider than `room` pixels into as many lines as it takes, where two spaces stand at first;
    nothing of it is left out."""
    if (width := text.get_window_extent().width) <= room:
        return
    whole = re.sub(r"(?<! )  (?! )", "\n", text.get_text()).split("\n")
    text.set_text("\n".join(whole))
    width = text.get_window_extent().width
    characters = int(max(map(len, whole)) * room / max(width, 1.0)) + 2
    while width > room and characters > 1:
        lines = [line for words in whole for line in wrap(words, characters, break_on_hyphens=False) or [""]]
        text.set_text("\n".join(lines))
        width = text.get_window_extent().width
        characters -= 1


def sheet_of(axes: Axes) -> Sheet:
    """Return the page that axes stand on."""
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Sheet)
    return figure


def entry(label: str, color: str = INK, **look: Any) -> Line2D:
    """A line of the key that no drawn line has of itself, its mark no larger than a line of words."""
    if "ms" in look:
        look["ms"] = min(look["ms"], MOST_OF_KEY)
    return Line2D([], [], color=color, label=label, **look)


class _OfDecades(LogLocator):
    """Ticks inside of a decade, too; matplotlib's leaves an axis bare where its ticks skip decades."""

    def tick_values(self, vmin: float, vmax: float) -> Any:
        ticks = super().tick_values(vmin, vmax)
        if len(ticks):
            return ticks
        decades = LogLocator()
        decades.set_axis(self.axis)
        return decades.tick_values(vmin, vmax)


def log_axis(axes: Axes, name: str, subs: Sequence[float] = (1.0, 2.0, 5.0)) -> None:
    """A log axis that is read in plain numbers."""
    axis = axes.xaxis if name == "x" else axes.yaxis
    axes.set(**{f"{name}scale": "log"})
    axis.set_major_locator(_OfDecades(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axis.set_minor_locator(NullLocator())


def tick(value: float, within: float = 1e-6) -> str:
    """The label of a tick: as few digits as say its value, never another one. `within`: relative."""
    short = (f"{value:.{digits}g}" for digits in range(1, 7))
    shown = next((x for x in short if math.isclose(float(x), value, rel_tol=within)), f"{value:.6g}")
    return f"{float(shown):g}".replace("-", "−")


def seeds_of(number: int) -> str:
    return f"{number} seed{'s' * (number != 1)}"


def another(axes: Axes) -> Axes:
    """A further panel in the place of this one, to be told apart from it by `stack`."""
    figure = sheet_of(axes)
    box = axes.get_position()
    further = figure.add_axes((box.x0, box.y0, box.width, box.height))
    if figure.phone:
        figure.panels[further] = Panel()
    return further


def above_over_steps(facts: Facts, bottom: Axes, last: float) -> Axes:
    """Return a further panel for `bottom`, both over the training steps up to `last`; `bottom` names them."""
    top = another(bottom)
    for axes in (top, bottom):
        axes.set_xlim(-0.01 * last, 1.01 * last + 1)
    bottom.set_xlabel(f"training step  (one step = {facts.tokens_per_step:,} tokens)")
    top.tick_params(labelbottom=False)
    return top


def draw_line(
    axes: Axes, x: np.ndarray, middle: np.ma.MaskedArray, seeds: np.ma.MaskedArray, alpha: float, **look: Any
) -> tuple[float, float] | None:
    """Draw the seeds' median with the look of a line, and each seed faintly. -> its last point, if any.

    `seeds`: (seeds, steps); `alpha`: of a seed's line.
    """
    axes.plot(x, middle, lw=1.6, zorder=2.5, **look)
    axes.plot(x, seeds.T, color=look["color"], lw=0.5, alpha=alpha, zorder=1.2)
    return last_point(x, middle)


def last_point(x: np.ndarray, y: np.ma.MaskedArray) -> tuple[float, float] | None:
    """Return the last point of a line that is not masked; None where all are."""
    seen = np.flatnonzero(~np.ma.getmaskarray(y))
    return (float(x[seen[-1]]), float(y[seen[-1]])) if len(seen) else None


def say_of_band(axes: Axes, high: float, words: str) -> None:
    """Write under the upper edge of a band across the axes what it is."""
    place = {"xytext": (-4, -3), "textcoords": "offset points", "ha": "right", "va": "top", "size": SMALL}
    axes.annotate(words, (1, high), xycoords=axes.get_yaxis_transform(), color=GOAL, **place)  # type: ignore[arg-type]


def say_nothing_to_draw(axes: Axes) -> None:
    axes.grid(False)
    axes.set(xticks=[], yticks=[])
    text = "no run of this arm recorded a single step"
    axes.text(0.5, 0.5, text, ha="center", va="center", color=ALERT, size=12)

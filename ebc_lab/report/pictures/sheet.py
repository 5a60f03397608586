"""A picture's page: its header in words, its axes, and its key under them where it hides no data.

The layout is computed here, once, from the measured text: matplotlib's layout engines take several times as
long.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

STYLE = Path(__file__).with_name("style.mplstyle")
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
LEFT, RIGHT = 0.085, 0.975  # margins, as shares of the width
EDGE = 8.0  # points above and below
ROWS_FROM = 0.38  # of the width: the names of rows end there at most
ROUNDED = 1e-3  # how far the ratio of two figures of three digits may be off, relative
WARNING_WIDTH = 100  # characters of bold small print that a line surely holds
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
    question: str = ""  # what a suite asks
    arms: tuple[str, ...] = ()  # of a suite, as asked for
    ebc: bool = True  # whether anything in the study has EBC: where nothing has, it is not spoken of


class Sheet(Figure):
    """A figure that knows its own header: its title, and what can be said of it to somebody who cannot see
    it."""

    title = ""
    alt = ""


@dataclass(frozen=True)
class Picture:
    """A sheet with its place among a study's pictures.

    `name`: stem of its files; `arm`: whose picture it is, empty where it is of several.
    """

    name: str
    section: str
    sheet: Sheet
    arm: str = ""

    @property
    def entry(self) -> dict[str, str]:
        """Its line in the study's catalogue."""
        about = {"title": self.sheet.title, "alt": self.sheet.alt}
        return {"name": self.name, "section": self.section, **about, "arm": self.arm}


def page(
    facts: Facts,
    what: str,
    whom: str,
    finding: str,
    seeds: int,
    small: Sequence[str] = (),
    alert: str = "",
    size: tuple[float, float] | None = None,
    left: float = LEFT,
) -> tuple[Sheet, Axes]:
    """A figure with its header: what it shows (bold), of whom, what was found, where the data come from,
    warnings.

    `size`: inches, where not the style's; `left`: the margin, as a share of the width.
    """
    figure = Sheet(figsize=size)
    FigureCanvasAgg(figure)
    source = (seeds_of(seeds), f"{facts.scale} scale", f"study {facts.name}", facts.corpus, *small)
    sentences = filter(None, (text.rstrip(".") for text in (whom, finding, alert)))
    figure.title = " ".join(what.split())
    figure.alt = " ".join(". ".join((*sentences, "")).split())
    warnings = (f"Corpus: {facts.warning}" if facts.warning else "", alert)
    wrapped = [line for text in warnings for line in wrap(text, WARNING_WIDTH, max_lines=2, placeholder=" …")]
    lines = [
        (what, 13.0, "bold", "black"),
        (whom, 11.0, "normal", "black"),
        (finding, 9.5, "normal", INK),
        (" · ".join(source), 7.5, "normal", GREY),
        *((line, 8.5, "bold", ALERT) for line in wrapped),
    ]
    height = figure.get_figheight() * 72
    used = EDGE
    for text, points, weight, colour in lines:
        shown = {"size": points, "weight": weight, "color": colour, "va": "top"}
        line = figure.text(left, 1 - used / height, " ".join(text.split()), **shown)  # type: ignore[arg-type]
        fit(line, (RIGHT - left) * figure.bbox.width)
        used += 1.45 * points
    return figure, figure.add_axes((left, 0.2, RIGHT - left, 1 - (used + EDGE) / height - 0.2))


def entry(label: str, color: str = INK, **look: Any) -> Line2D:
    """A line of the key that no drawn line has of itself."""
    return Line2D([], [], color=color, label=label, **look)


def log_axis(axes: Axes, name: str, subs: Sequence[float] = (1.0, 2.0, 5.0)) -> None:
    """A log axis that is read in plain numbers."""
    axis = axes.xaxis if name == "x" else axes.yaxis
    axes.set(**{f"{name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axis.set_minor_locator(NullLocator())


def tick(value: float, within: float = 1e-6) -> str:
    """The label of a tick: as few digits as say its value, never another one. `within`: relative."""
    short = (f"{value:.{digits}g}" for digits in range(1, 7))
    shown = next((x for x in short if math.isclose(float(x), value, rel_tol=within)), f"{value:.6g}")
    return f"{float(shown):g}".replace("-", "−")


def seeds_of(number: int) -> str:
    return f"{number} seed{'s' * (number != 1)}"


def fit(text: Text, room: float) -> None:
    """Shrink a line wider than `room` pixels by up to a fifth, and cut what still does not fit."""
    if (width := text.get_window_extent().width) <= room:
        return
    text.set_fontsize(max(0.8, 0.99 * room / width) * float(text.get_fontsize()))
    while (width := text.get_window_extent().width) > room:
        whole = text.get_text().rstrip("…")
        text.set_text(whole[: min(len(whole) - 1, int(len(whole) * room / width))].rstrip() + "…")


def another(axes: Axes) -> Axes:
    """A further panel in the place of this one, to be told apart from it by `stack`."""
    figure = axes.get_figure(root=True)
    box = axes.get_position()
    assert figure is not None
    return figure.add_axes((box.x0, box.y0, box.width, box.height))


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


def key(axes: Axes, handles: Sequence[Any] | None = None, left: float = LEFT) -> None:
    """The legend under the axes, where it hides nothing, in as many columns as the page holds."""
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    shown = list(handles) if handles is not None else axes.get_legend_handles_labels()[0]
    tall = _hang([_legend(figure, shown, RIGHT - left)], [left])
    axes.set_position(_above(axes, tall, left, RIGHT - left))


def keys(panels: Sequence[Axes], handles: Sequence[Sequence[Any]]) -> None:
    """A legend of its own under each of several panels that stand beside one another."""
    figure = panels[0].get_figure(root=True)
    assert isinstance(figure, Figure)
    boxes = [axes.get_position() for axes in panels]
    legends = [_legend(figure, of_panel, box.width) for of_panel, box in zip(handles, boxes, strict=True)]
    tall = _hang(legends, [box.x0 for box in boxes])
    for axes, box in zip(panels, boxes, strict=True):
        axes.set_position(_above(axes, tall, box.x0, box.width))


def _legend(figure: Figure, handles: Sequence[Any], width: float) -> Legend:
    """A legend in as many columns as fit a share of the page's width; its place is still open. In a single
    column words that are too long are cut."""
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0, 1), "borderaxespad": 0}
    room = width * figure.bbox.width
    for columns in (4, 3, 2):
        legend = figure.legend(handles=handles, ncols=columns, **place)
        if legend.get_window_extent().width <= room:
            return legend
        legend.remove()
    legend = figure.legend(handles=handles, ncols=1, **place)
    texts = legend.get_texts()
    widest = max((text.get_window_extent().width for text in texts), default=0.0)
    beside = legend.get_window_extent().width - widest
    for text in texts:
        fit(text, room - beside)
    return legend


def _hang(legends: Sequence[Legend], lefts: Sequence[float]) -> float:
    """Put legends at the foot of the page, their first lines at one height. -> the tallest one's, pixels."""
    figure = legends[0].get_figure(root=True)
    assert figure is not None
    tall = max(legend.get_window_extent().height for legend in legends)
    top = (EDGE * figure.dpi / 72 + tall) / figure.bbox.height
    for legend, left in zip(legends, lefts, strict=True):
        legend.set_bbox_to_anchor((left, top), transform=figure.transFigure)
    return float(tall)


def _above(axes: Axes, tall: float, left: float, width: float) -> tuple[float, float, float, float]:
    """Where axes stand above a legend of this height, pixels, with their labels between the two."""
    figure = axes.get_figure(root=True)
    labels = axes.xaxis.get_tightbbox()
    assert figure is not None
    assert labels is not None
    edge = EDGE * figure.dpi / 72
    bottom = (tall + 2.2 * edge + axes.bbox.y0 - labels.y0) / figure.bbox.height
    return left, bottom, width, axes.get_position().y1 - bottom


def say_nothing_to_draw(axes: Axes) -> None:
    axes.grid(False)
    axes.set(xticks=[], yticks=[])
    text = "no run of this arm recorded a single step"
    axes.text(0.5, 0.5, text, ha="center", va="center", color=ALERT, size=12)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Ascending places in [0, 1], at least `gap` apart, near those wanted."""
    places = list(wanted)
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], 1.0 if i == len(places) - 1 else places[i + 1] - gap)
    return places


def stack(axes: Sequence[Axes], heights: Sequence[float], gap: float, right: float = RIGHT) -> None:
    """Panels under one another in the place of the last one, from the top.

    `heights`: their shares of it; `gap`: points between them.
    """
    figure = axes[-1].get_figure(root=True)
    box = axes[-1].get_position()
    assert isinstance(figure, Figure)
    between = gap / 72 / figure.get_figheight()
    room = box.height - between * (len(axes) - 1)
    top = box.y1
    for panel, share in zip(axes, heights, strict=True):
        height = room * share / sum(heights)
        panel.set_position((box.x0, top - height, right - box.x0, height))
        top -= height + between


def columns(axes: Sequence[Axes], gap: float) -> None:
    """Panels of one width beside one another in the place of the first one; `gap`: points between them."""
    figure = axes[0].get_figure(root=True)
    box = axes[0].get_position()
    assert isinstance(figure, Figure)
    between = gap / 72 / figure.get_figwidth()
    width = (box.width - between * (len(axes) - 1)) / len(axes)
    for i, panel in enumerate(axes):
        panel.set_position((box.x0 + i * (width + between), box.y0, width, box.height))


def beside(axes: Axes, ends: Sequence[End]) -> None:
    """A label for each line, right of the axes in the order of their last points: (x, y, label, colour)."""
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # fixed, so that the leader lines do not move them
    to_share = axes.transData + axes.transAxes.inverted()
    placed = [(to_share.transform((x, y)), label, colour) for x, y, label, colour in ends]
    placed.sort(key=lambda end: float(end[0][1]))
    gap = min(11 / 72 * figure.dpi / axes.bbox.height, 1 / max(len(placed), 1))
    places = spread([float(np.clip(at[1], 0.0, 1.0)) for at, _, _ in placed], gap)
    for (at, label, colour), place in zip(placed, places, strict=True):
        heights = [np.clip(at[1], 0, 1), place]
        leader = Line2D([at[0], 1.02], heights, color="#AAAAAA", lw=0.6, transform=axes.transAxes)
        leader.set_clip_on(False)
        axes.add_artist(leader)
        text = axes.text(1.025, place, label, transform=axes.transAxes, va="center", size=8, color=colour)
        fit(text, figure.bbox.width - text.get_window_extent().x0 - 2)


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """One row for each name, from the top; the names stand left of the axes, which make room for them."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    axes.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    labels = axes.get_yticklabels()
    for label in labels:
        fit(label, (ROWS_FROM - LEFT) * figure.bbox.width)
    widest = max((label.get_window_extent().width for label in labels), default=0)
    start = LEFT + widest / figure.bbox.width + 0.012
    box = axes.get_position()
    axes.set_position((start, box.y0, RIGHT - start, box.height))

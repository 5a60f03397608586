"""Where axes, keys and labels stand on a wide page; on a phone's they are noted, for `narrow` to place.

The layout is computed here, once, from the measured text: matplotlib's layout engines take several times as
long.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.legend import Legend
from matplotlib.lines import Line2D

from . import narrow
from .figure import EDGE, LEFT, RIGHT, SMALL, End, Sheet, sheet_of, wrapped

ROWS_FROM = 0.38  # of the width: the names of rows end there at most


# -- keys ----------------------------------------------------------------------------------------------------


def key(axes: Axes, handles: Sequence[Any] | None = None, left: float = LEFT) -> None:
    """The legend under the axes, where it hides nothing, in as many columns as the page holds."""
    figure = sheet_of(axes)
    shown = list(handles) if handles is not None else axes.get_legend_handles_labels()[0]
    if figure.phone:
        figure.panels[axes].handles += shown
    elif shown:
        tall = _hang([_legend(figure, shown, RIGHT - left)], [left])
        axes.set_position(_above(axes, tall, left, RIGHT - left))


def keys(panels: Sequence[Axes], handles: Sequence[Sequence[Any]]) -> None:
    """A legend of its own under each of several panels that stand beside one another."""
    figure = sheet_of(panels[0])
    if figure.phone:
        for axes, of_panel in zip(panels, handles, strict=True):
            figure.panels[axes].handles += of_panel
        return
    boxes = [axes.get_position() for axes in panels]
    legends = [
        _legend(figure, of_panel, box.width) for of_panel, box in zip(handles, boxes, strict=True) if of_panel
    ]
    tall = _hang(legends, [box.x0 for box, of_panel in zip(boxes, handles, strict=True) if of_panel])
    for axes, box in zip(panels, boxes, strict=True):
        axes.set_position(_above(axes, tall, box.x0, box.width))


def _legend(figure: Sheet, handles: Sequence[Any], width: float) -> Legend:
    """A legend in as many columns as fit a share of the page's width; its place is still open."""
    return narrow.legend(figure, handles, width * figure.bbox.width, (5, 4, 3, 2))


def _hang(legends: Sequence[Legend], lefts: Sequence[float]) -> float:
    """Put legends at the foot of the page, their first lines at one height. -> the tallest one's, pixels."""
    if not legends:
        return 0.0
    figure = legends[0].get_figure(root=True)
    assert isinstance(figure, Sheet)
    tall = max(legend.get_window_extent().height for legend in legends)
    top = ((EDGE + figure.strips[1]) * figure.dpi / 72 + tall) / figure.bbox.height
    for legend, left in zip(legends, lefts, strict=True):
        legend.set_bbox_to_anchor((left, top), transform=figure.transFigure)
    return float(tall)


def _above(axes: Axes, tall: float, left: float, width: float) -> tuple[float, float, float, float]:
    """Where axes stand above a legend of this height, pixels, with their labels between the two."""
    figure = sheet_of(axes)
    labels = axes.xaxis.get_tightbbox()
    assert labels is not None
    edge = EDGE * figure.dpi / 72
    foot = figure.strips[1] * figure.dpi / 72
    bottom = (tall + 2.2 * edge + foot + axes.bbox.y0 - labels.y0) / figure.bbox.height
    return left, bottom, width, axes.get_position().y1 - bottom


# -- panels --------------------------------------------------------------------------------------------------


def stack(axes: Sequence[Axes], heights: Sequence[float], gap: float, right: float = RIGHT) -> None:
    """Panels under one another in the place of the last one, from the top.

    `heights`: their shares of it; `gap`: points between them.
    """
    figure = sheet_of(axes[-1])
    if figure.phone:
        narrow.stack(axes, heights)
        return
    box = axes[-1].get_position()
    between = gap / 72 / figure.get_figheight()
    room = box.height - between * (len(axes) - 1)
    top = box.y1
    for panel, share in zip(axes, heights, strict=True):
        height = room * share / sum(heights)
        panel.set_position((box.x0, top - height, right - box.x0, height))
        top -= height + between


def columns(axes: Sequence[Axes], gap: float) -> None:
    """Panels of one width beside one another in the place of the first one; `gap`: points between them."""
    figure = sheet_of(axes[0])
    if figure.phone:
        narrow.stack(axes, [1.0] * len(axes))
        return
    box = axes[0].get_position()
    between = gap / 72 / figure.get_figwidth()
    width = (box.width - between * (len(axes) - 1)) / len(axes)
    for i, panel in enumerate(axes):
        panel.set_position((box.x0 + i * (width + between), box.y0, width, box.height))


def narrowed(axes: Axes, right: float) -> None:
    """Let axes end at `right`, a share of the page's width, so that labels have room beyond."""
    if not sheet_of(axes).phone:
        box = axes.get_position()
        axes.set_position((box.x0, box.y0, right - box.x0, box.height))


def lowered(axes: Axes, head: float) -> None:
    """Leave `head` points above axes free."""
    figure = sheet_of(axes)
    if not figure.phone:
        box = axes.get_position()
        axes.set_position((box.x0, box.y0, box.width, box.height - head / 72 / figure.get_figheight()))


# -- labels --------------------------------------------------------------------------------------------------


def spread(wanted: Sequence[float], gaps: Sequence[float]) -> list[float]:
    """Ascending places in [0, 1] near those wanted, each at least its gap from the next."""
    places = list(wanted)
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gaps[i - 1])
    for i in reversed(range(len(places))):
        places[i] = min(places[i], 1.0 if i == len(places) - 1 else places[i + 1] - gaps[i])
    return places


def beside(axes: Axes, ends: Sequence[End], right: float = 1.0, handles: Sequence[Any] = ()) -> None:
    """A label for each line, right of the axes in the order of their last points: (x, y, label, colour).

    `right`: where their room ends, a share of the page's width; `handles`: of what ends there, in the same
    order, where that is no line.
    """
    figure = sheet_of(axes)
    if figure.phone:
        narrow.name_lines(axes, ends, handles)
        return
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # fixed, so that the leader lines do not move them
    to_share = axes.transData + axes.transAxes.inverted()
    placed = [(to_share.transform((x, y)), label, colour) for x, y, label, colour in ends]
    placed.sort(key=lambda end: float(end[0][1]))
    texts = [
        axes.text(1.025, 0, label, transform=axes.transAxes, va="center", size=SMALL, color=colour)
        for _, label, colour in placed
    ]
    for text in texts:
        wrapped(text, right * figure.bbox.width - text.get_window_extent().x0 - 2)
    tall = [text.get_window_extent().height / axes.bbox.height for text in texts]
    squeezed = min(1.0, 1 / max(sum(tall), 1e-9))
    gaps = [squeezed * 0.5 * (a + b) for a, b in itertools.pairwise(tall)] + [0.0]
    places = spread([float(np.clip(at[1], 0.0, 1.0)) for at, _, _ in placed], gaps)
    for (at, _, _), place, text in zip(placed, places, texts, strict=True):
        text.set_y(place)
        heights = [np.clip(at[1], 0, 1), place]
        leader = Line2D(
            [at[0], 1.02], heights, color="#AAAAAA", lw=0.6, transform=axes.transAxes, label="_leader"
        )
        leader.set_clip_on(False)
        axes.add_artist(leader)


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """One row for each name, from the top; the names stand left of the axes, which make room for them; on a
    phone they stand above their rows."""
    figure = sheet_of(axes)
    axes.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    if figure.phone:
        narrow.name_rows(axes, names)
        return
    labels = axes.get_yticklabels()
    for label in labels:
        wrapped(label, (ROWS_FROM - LEFT) * figure.bbox.width)
    axes.set_yticks(range(len(names)), [label.get_text() for label in labels])  # a tick forgets its label
    widest = max((label.get_window_extent().width for label in labels), default=0)
    start = LEFT + widest / figure.bbox.width + 0.012
    box = axes.get_position()
    axes.set_position((start, box.y0, RIGHT - start, box.height))

"""A picture drawn for a phone: its panels under one another, the key of each under it, its width 360 CSS
pixels.

While a picture is drawn its axes are only as wide as they will be; `arrange` gives everything its height at
the end, when all words are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.legend import Legend
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from .figure import EDGE, GREY, INK, MARGIN, SMALL, End, Sheet, entry, hang_words, sheet_of, wrapped

OF_SEVERAL = 150.0  # points of each panel where there are several, on average
LEAST, MOST = 0.6, 1.5  # shares of that
ROW = 40.0  # points of a row that has its name above it
BROAD = 0.2  # of the width: a name of a row that is as narrow stands left of it
FAR = 900.0  # points: a page on which everything surely fits while it is measured
BACKED: dict[str, Any] = {"fc": "white", "ec": "none", "pad": 0.5}  # so that no line runs through words
GAP = 9.0  # points between one panel's things and the next one's


def stack(axes: Sequence[Axes], heights: Sequence[float]) -> None:
    """Note the panels' order from the top, and their shares of the height."""
    figure = sheet_of(axes[0])
    mean = sum(heights) / len(heights)
    for panel, share in zip(axes, heights, strict=True):
        noted = figure.panels.pop(panel)
        noted.height = OF_SEVERAL * min(max(share / mean, LEAST), MOST)
        figure.panels[panel] = noted


def name_lines(axes: Axes, ends: Sequence[End], handles: Sequence[Any] = ()) -> None:
    """Note the names of lines for the key, before what it says of all of them, the highest one first."""
    looks = list(handles) or [_as_drawn(axes, end) for end in ends]
    order = sorted(range(len(ends)), key=lambda i: -ends[i][1])
    panel = sheet_of(axes).panels[axes]
    panel.handles = [*(looks[i] for i in order), *panel.handles]


def _as_drawn(axes: Axes, end: End) -> Any:
    """A line of the key with the look of the line that ends there."""
    x, y, label, colour = end
    for line in axes.get_lines():
        points = np.ma.filled(np.atleast_2d(line.get_xydata()).astype(float), np.nan)
        mean = line.get_color() == colour and line.get_linewidth() > 0.6 and len(points) > 1
        if mean and np.any((points[:, 0] == x) & (points[:, 1] == y)):
            look = {"ls": line.get_linestyle(), "lw": line.get_linewidth(), "marker": line.get_marker()}
            return entry(label, colour, ms=4, alpha=line.get_alpha(), **look)
    return entry(label, colour, lw=2.0)


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Put the names of rows above them, or left where all of them are short."""
    figure = sheet_of(axes)
    panel = figure.panels[axes]
    panel.height = max(ROW * len(names), 1.5 * ROW)
    if max(label.get_window_extent().width for label in axes.get_yticklabels()) < BROAD * figure.bbox.width:
        return
    axes.set_yticks(range(len(names)), [""] * len(names))
    tallest = 1
    for row, name in enumerate(names):
        words = ", ".join(name.split("\n"))
        place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "top", "size": SMALL}
        text = axes.text(0.0, row - 0.5, words, color=INK, bbox=BACKED, **place)
        wrapped(text, (1 - 2 * MARGIN) * figure.bbox.width)
        tallest = max(tallest, 1 + text.get_text().count("\n"))
    panel.height *= 1 + 0.75 * (tallest - 1)


def legend(figure: Sheet, handles: Sequence[Any], room: float, columns: Sequence[int]) -> Legend:
    """A legend in the first number of columns that fits `room` pixels, else in one, its words broken; its
    place is still open."""
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0, 1), "borderaxespad": 0}
    for number in columns:
        if number <= len(handles):
            tried = figure.legend(handles=handles, ncols=number, **place)
            if tried.get_window_extent().width <= room:
                return tried
            tried.remove()
    single = figure.legend(handles=handles, ncols=1, **place)
    texts = single.get_texts()
    widest = max((text.get_window_extent().width for text in texts), default=0.0)
    sample = single.get_window_extent().width - widest
    for text in texts:
        wrapped(text, room - sample)
    return single


# -- the end -------------------------------------------------------------------------------------------------


@dataclass
class _Placed:
    """A panel with what stands above and below it, and where: points from the top of the page."""

    axes: Axes
    height: float
    above: list[Text]
    key: Legend | None
    top: float = 0.0
    key_top: float = 0.0


def arrange(figure: Sheet) -> None:
    """Place a phone's panels from the top, and cut the page to what they take."""
    figure.set_figheight(FAR / 72)
    pixels = figure.dpi / 72
    head = hang_words(figure, figure.header, EDGE)
    words = {axes: _words_above(figure, axes) for axes in figure.panels}
    left = _left(figure)
    used = head + EDGE / 2
    placed = []
    for axes, panel in figure.panels.items():
        one = _Placed(axes, panel.height, words[axes], None)
        used += sum(text.get_window_extent().height / pixels + 3 for text in one.above)
        one.top = used = used + _over(axes) / pixels
        axes.set_position((left, 0.2, panel.right - left, panel.height / FAR))
        wrapped(axes.xaxis.label, axes.bbox.width)
        labels = _thinned(axes)
        used += panel.height
        if labels and (beyond := labels.x1 - figure.bbox.width) > 0:
            panel.right -= beyond / figure.bbox.width + 0.005
        used += max(0.0, axes.bbox.y0 - labels.y0) / pixels if labels else 0.0
        if panel.handles:
            one.key = legend(figure, panel.handles, (1 - 2 * MARGIN) * figure.bbox.width, (2,))
            one.key_top = used = used + GAP
            used += one.key.get_window_extent().height / pixels
        used += GAP
        placed.append(one)
    _cut(figure, used, left, placed)


def _cut(figure: Sheet, height: float, left: float, placed: Sequence[_Placed]) -> None:
    """Give the page its height in points, and everything its place in that."""
    pixels = figure.dpi / 72
    figure.set_figheight(height / 72)
    hang_words(figure, figure.header, EDGE)
    for one in placed:
        bottom = 1 - (one.top + one.height) / height
        one.axes.set_position((left, bottom, figure.panels[one.axes].right - left, one.height / height))
        over = one.top - _over(one.axes) / pixels - 3
        for text in reversed(one.above):
            over -= text.get_window_extent().height / pixels
            text.set_position((MARGIN, 1 - over / height))
            over -= 3
        if one.key:
            one.key.set_bbox_to_anchor((MARGIN, 1 - one.key_top / height), transform=figure.transFigure)


def _words_above(figure: Sheet, axes: Axes) -> list[Text]:
    """The title of axes and what their y axis shows, as lines of the page above them, which take none of its
    width; where they stand is still open."""
    lines = [(axes.get_title(loc="left"), INK), (axes.get_ylabel(), GREY)]
    axes.set_title("", loc="left")
    axes.set_ylabel("")
    texts = []
    for words, colour in lines:
        if words:
            text = figure.text(MARGIN, 0.5, words, size=SMALL, color=colour, va="top")
            wrapped(text, (1 - 2 * MARGIN) * figure.bbox.width)
            texts.append(text)
    return texts


def _over(axes: Axes) -> float:
    """Pixels that words of the axes' own reach above them."""
    shown = (text.get_window_extent().y1 for text in axes.texts if text.get_text())
    return max(0.0, max(shown, default=0.0) - axes.bbox.y1) if axes.texts else 0.0


def _left(figure: Sheet) -> float:
    """Where all axes begin, a share of the width: what the widest label of a y axis leaves."""
    widest = 0.0
    for axes, panel in figure.panels.items():
        axes.set_position((0.15, 0.2, 0.8, panel.height / FAR))
        box = axes.yaxis.get_tightbbox()
        widest = max(widest, axes.bbox.x0 - box.x0 if box else 0.0)
    return MARGIN + widest / figure.bbox.width + 0.005


def _thinned(axes: Axes) -> Bbox | None:
    """Leave out the label of a tick of the x axis that would run into the one before. -> what the axis takes,
    if anything."""
    taken: Bbox | None = axes.xaxis.get_tightbbox()  # gives the ticks their labels, too
    low, high = sorted(axes.get_xlim())
    ticks = [t for t in axes.xaxis.get_major_ticks() if low <= t.get_loc() <= high and t.label1.get_text()]
    shown, end = [], -np.inf
    ticks.sort(key=lambda t: t.label1.get_window_extent().x0)
    for one in ticks:
        box = one.label1.get_window_extent()
        if box.x0 > end + 4:
            shown.append(one)
            end = box.x1
    if len(shown) < len(ticks):
        axes.set_xticks([t.get_loc() for t in shown], [t.label1.get_text() for t in shown])
        axes.set_xlim(low, high)
        taken = axes.xaxis.get_tightbbox()
    return taken

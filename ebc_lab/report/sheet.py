"""A picture's page: its header in words, its axes, and its key under them where it hides no data.

The layout is computed here, once, from the measured text: matplotlib's own layout engines take several times as long.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

STYLE = Path(__file__).with_name("style.mplstyle")
EBC, PLAIN, GOAL, ALERT, OTHER, SPARE = "C0", "C1", "C2", "C3", "C5", "C6"  # places in the style's palette
LEFT, RIGHT, EDGE = 0.085, 0.975, 8.0  # margins: shares of the width; points above and below
WARNING_WIDTH = 100  # characters of bold small print that a line surely holds


@dataclass(frozen=True)
class Facts:
    """What every picture of a study says about it."""

    name: str
    corpus: str
    warning: str | None
    scale: str
    tokens_per_step: int
    windows: int  # of validation text, always the same, that evaluations during a run look at
    band: tuple[float, float]  # where the median c should lie


def page(facts: Facts, what: str, whom: str, finding: str, small: Sequence[str], alert: str = "") -> tuple[Figure, Axes]:
    """A figure with its header written: what it shows (bold), of whom, what was found, the small print, warnings."""
    figure = Figure()
    FigureCanvasAgg(figure)
    source = " · ".join((*small, f"study {facts.name}", facts.corpus, f"{facts.scale} scale"))
    lines = [(what, 13.0, "bold", "black"), (whom, 11.0, "normal", "black"), (finding, 9.5, "normal", "#333333")]
    lines += [(source, 7.5, "normal", "#666666")]
    warnings = (f"Corpus: {facts.warning}" if facts.warning else "", alert)
    wrapped = [line for text in warnings for line in wrap(text, WARNING_WIDTH, max_lines=2, placeholder=" …")]
    lines += [(line, 8.5, "bold", ALERT) for line in wrapped]
    height = figure.get_figheight() * 72
    used = EDGE
    for text, size, weight, colour in lines:
        y = 1 - used / height
        line = figure.text(LEFT, y, " ".join(text.split()), size=size, weight=weight, color=colour, va="top")
        fit(line, (RIGHT - LEFT) * figure.bbox.width)
        used += 1.45 * size
    return figure, figure.add_axes((LEFT, 0.2, RIGHT - LEFT, 1 - (used + EDGE) / height - 0.2))


def fit(text: Text, room: float) -> None:
    """Shrink a line wider than `room` pixels by up to a fifth, and cut what still does not fit."""
    if (width := text.get_window_extent().width) <= room:
        return
    text.set_fontsize(max(0.8, 0.99 * room / width) * float(text.get_fontsize()))
    while (width := text.get_window_extent().width) > room:
        whole = text.get_text().rstrip("…")
        text.set_text(whole[: min(len(whole) - 1, int(len(whole) * room / width))].rstrip() + "…")


def key(axes: Axes, handles: Sequence[Any] | None = None) -> None:
    """The legend under the axes, where it hides nothing, in as many columns as the page holds."""
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    shown = list(handles) if handles is not None else axes.get_legend_handles_labels()[0]
    height, edge = figure.bbox.height, EDGE * figure.dpi / 72
    for columns in (4, 3, 2, 1):
        legend = figure.legend(
            handles=shown, loc="lower left", bbox_to_anchor=(LEFT, edge / height), borderaxespad=0, ncols=columns
        )
        box = legend.get_window_extent()
        if columns == 1 or box.width <= (RIGHT - LEFT) * figure.bbox.width:
            break
        legend.remove()
    labels = axes.xaxis.get_tightbbox()
    assert labels is not None
    bottom = (box.height + 2.2 * edge + axes.bbox.y0 - labels.y0) / height
    axes.set_position((LEFT, bottom, RIGHT - LEFT, axes.get_position().y1 - bottom))


def say_nothing_to_draw(axes: Axes) -> None:
    axes.grid(False)
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, "no run of this arm recorded a single step", ha="center", va="center", color=ALERT, size=12)


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes, without anything that changes from call to call."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()

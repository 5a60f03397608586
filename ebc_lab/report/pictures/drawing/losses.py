"""An axis of losses that a few bad runs do not squash, and the windows in which losses stay near the best."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ebc_lab.study.stages.statistics import WINDOW_NATS, in_octaves

from .looks import Look
from .sheet import Sheet

WITHIN = f"within {WINDOW_NATS:g} nats of the arm's own best"
WINDOW_ROW = 0.26  # inches of a window
MOST_TIMES = 2.0  # as far above the lowest loss as the median, or as what is needed: the axis ends there
LEAST_SPAN = 3 * WINDOW_NATS  # that an axis of losses shows


def ceiling_of(losses: Sequence[float], needed: Sequence[float]) -> float:
    """Return where an axis of losses ends: above what the finding needs, below runs that would squash it."""
    low, top = min(losses), max(losses)
    middle = max([statistics.median(losses), *needed])
    limit = low + max(MOST_TIMES * (middle - low), LEAST_SPAN)
    return limit if top > low + 1.25 * (limit - low) else top


def where_it_ends(points: Sequence[tuple[float, float]], ceiling: float) -> tuple[float, float]:
    """Return the last point (x > 0, y) of a line, or where it last rises above the `ceiling`."""
    for (x, y), (next_x, next_y) in reversed([*itertools.pairwise(points)]):
        if y <= ceiling < next_y:
            return x * (next_x / x) ** ((ceiling - y) / (next_y - y)), ceiling
        if next_y <= ceiling:
            return next_x, next_y
    return points[-1]


def frame_losses(axes: Axes, rows: Sequence[Mapping[str, Any]], ceiling: float, rows_of_marks: int) -> None:
    """Show losses up to the `ceiling` with their standard errors, and room above for rows of marks."""
    known = [(row["val_loss"], row["val_se"] or 0.0) for row in rows if row["val_loss"] is not None]
    low = min((loss - error for loss, error in known), default=0.0)
    high = max((loss + error for loss, error in known if loss <= ceiling), default=1.0)
    span = max(high - low, 0.02)
    axes.set_ylim(low - 0.06 * span, high + (0.05 + 0.11 * rows_of_marks) * span)


def draw_windows(
    sheet: Sheet,
    axes: Axes,
    windows: Mapping[str, Any],
    looks: Mapping[str, Look],
    chosen: Mapping[str, float] = {},
) -> None:
    """Give each arm a row with a bar from one end of its window to the other, an arrow where it goes on
    beyond what was tried, and a stroke at the value that is `chosen`, else at the best."""
    axes.grid(axis="y", visible=False)
    axes.set(yticks=[], ylim=(len(windows) - 0.5, -0.5), ylabel="windows")
    edge = axes.get_xlim()[1]
    for row, (name, window) in enumerate(windows.items()):
        colour = looks[name].colour
        if window:
            ends = (window["low"], window["high"])
            axes.plot(ends, (row, row), color=colour, lw=5, alpha=0.35, solid_capstyle="butt")
            axes.plot(chosen.get(name, window["best"]), row, "|", color=colour, ms=8, mew=2)
            for end, tip in (("low", "<"), ("high", ">")):
                if window[f"open_{end}"]:
                    axes.plot(window[end], row, tip, color=colour, ms=7, clip_on=False)
        bar = Line2D([], [], color=colour, lw=5, alpha=0.35)
        sheet.label(axes, [(edge, row, f"{name}  {in_octaves(window)}", colour)], [bar])


def widest_in_words(windows: Mapping[str, Any]) -> str:
    """Say whose window is widest. Of windows that go on beyond what was tried none is wider than another."""
    known = {name: window for name, window in windows.items() if window}
    still_open = [name for name, window in known.items() if window["open_low"] or window["open_high"]]
    closed = [name for name in known if name not in still_open]
    parts = []
    if still_open:
        parts.append(f"Beyond what was tried: {', '.join(still_open)}")
    if closed:
        widest = max(closed, key=lambda name: known[name]["octaves"])
        parts.append(f"widest of the others: {widest}, {in_octaves(known[widest])}")
    if not still_open:
        parts = [part.replace("widest of the others", "Widest window") for part in parts]
    return "; ".join(parts) or "No window: every run diverged"

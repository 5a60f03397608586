"""How busy the slots were: one row a slot, one bar a run, coloured by its stage; what is white idled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ebc_lab.config.errors import clock
from ebc_lab.config.schema import STAGES
from ebc_lab.study.inspect.slots import Bar, Timeline, idle_by_stage

from ..text.words import plural
from .drawing.looks import INK
from .drawing.sheet import Facts, Sheet, name_rows

COLOURS = ("C0", "C4", "C2", "C3", "C5", "C1")  # of the stages, in their order
ROW = 0.42  # inches
MOST_ROWS = 32  # slots that have a row of their own; the others are left out, and said so
HATCH = "////"  # of a measurement of time, which no other run may disturb


def draw_slots(facts: Facts, busy: Timeline) -> Sheet:
    """Draw every attempt of a study's runs on its slot."""
    slots, seconds = busy.use["slots"], busy.use["seconds"]
    rows = min(slots, MOST_ROWS)
    cut = f"only the first {rows} slots are drawn" if rows < slots else ""
    whom = f"{plural(slots, 'slot')}, {len(busy.bars)} runs and measurements"
    sheet = Sheet(
        facts,
        "Slots over time: when did each run train, and what idled?",
        (whom, f"Idle {busy.use['idle']['whole']:.0%} of {clock(seconds)}: {idle_by_stage(busy.use)}"),
        (plural(len({bar.seed for bar in busy.bars}), "seed"),),
        cut,
        heights=(1.1 + ROW * rows,),
    )
    [axes] = sheet.panels
    drawn = {bar.stage for bar in busy.bars}  # one that trained beside another too
    stages = [stage for stage in STAGES if stage in drawn]
    colours = {stage: COLOURS[i % len(COLOURS)] for i, stage in enumerate(stages)}
    axes.set_xlim(0, 1.03 * seconds)  # the last label of the axis stays on the page
    axes.set_xlabel("time since the first run began")
    axes.xaxis.set_major_locator(MaxNLocator(4 if facts.narrow else 8, steps=[1, 1.5, 2, 3, 6, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: clock(value)))
    axes.grid(False)
    for bar in busy.bars:
        if bar.slot < rows:
            _draw(axes, bar, colours[bar.stage])
    sheet.key(*_handles(busy, colours))
    name_rows(axes, [f"slot {slot + 1}" for slot in range(rows)])
    return sheet


def _draw(axes: Axes, bar: Bar, colour: str) -> None:
    look: dict[str, Any] = {"color": colour, "edgecolor": "white", "linewidth": 0.6}
    look["hatch"] = HATCH if bar.kind != "train" else None
    axes.barh(bar.slot, bar.end - bar.begin, left=bar.begin, height=0.72, **look)


def _handles(busy: Timeline, colours: dict[str, str]) -> Iterator[Patch]:
    for stage, colour in colours.items():
        yield Patch(facecolor=colour, label=stage)
    if any(bar.kind != "train" for bar in busy.bars):
        yield Patch(facecolor="white", edgecolor=INK, hatch=HATCH, label="a measurement of time, alone")

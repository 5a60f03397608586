"""Training an energy-based model: the parts of its loss over the run, and what its splats know of the score.

The columns of workload=ebm in steps.csv and evals.csv, which `ebc-lab columns` explains.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from ...text.words import optimizer
from ..drawing.curves import Line, Run, by_step, smooth_line, window
from ..drawing.looks import FAINT, GREY, Look
from ..drawing.sheet import Arms, Facts, Sheet, entry, lines, log_axis, over_steps

PARTS = {  # column of steps.csv -> its name beside the line
    "loss": "cross-entropy",
    "loss_noised": "cross-entropy, noised states",
    "loss_mle": "likelihood of the states",
    "loss_dsm": "score matching",
    "balance": "balance of the experts",
}
LEVEL = re.compile(r"r2_(\d+(?:p\d+)?)")


@dataclass(frozen=True)
class States:
    """An energy-based arm over the run."""

    parts: Mapping[str, Line]
    scores: Mapping[float, Line]  # noise level in radians -> R² of the score
    matched: Mapping[float, Line]  # the same: of states spread as their own splats are


def states_of(runs: Sequence[Run]) -> States | None:
    """Return what is drawn of an arm; None where no run is of an energy-based model with splats."""
    levels = {
        float(match[1].replace("p", ".")): match[1]
        for run in runs
        for column in run.evals
        if (match := LEVEL.fullmatch(column))
    }
    if not levels:
        return None
    order = sorted(levels)
    scores = {sigma: _line(runs, "evals", f"r2_{levels[sigma]}") for sigma in order}
    matched = {sigma: _line(runs, "evals", f"matched_{levels[sigma]}") for sigma in order}
    there = [name for name in PARTS if any(name in run.steps for run in runs)]
    return States({name: _line(runs, "steps", name) for name in there}, scores, matched)


def _line(runs: Sequence[Run], stream: str, column: str) -> Line:
    """Return a column of steps.csv as running means, of evals.csv as it is."""
    every: list[Mapping[str, np.ndarray]] = [getattr(run, stream) for run in runs]
    steps, table = by_step([rows for rows in every if column in rows], column)
    return smooth_line(steps, table) if stream == "steps" else Line(steps, table, np.ma.median(table, axis=0))


def draw_states(facts: Facts, track: str, arms: Arms, found: Mapping[str, States]) -> Sheet:
    """Draw the parts of the only arm's loss above, R² at every noise level below, matched values dashed."""
    [(label, states)] = found.items()
    ends = [line.last for line in (*states.parts.values(), *states.scores.values())]
    last = max((end[0] for end in ends if end), default=0.0)
    whom = (
        f"{optimizer(track)}, {label}: parts of its loss, and the share of the score that its splats explain"
    )
    sheet = Sheet(
        facts,
        "How does the energy-based model learn?",
        (whom, _finding(states)),
        (
            f"medians of the seeds; parts unweighted, running means over {window(round(last) + 1)} steps",
            "R² where above 0; dashed: if spread as their splats are",
        ),
        arms=arms,
        grid=("a", "b"),
        heights=(2.7, 3.2),
    )
    top, bottom = sheet.panels
    over_steps(facts, sheet.panels, last)
    log_axis(bottom, "y", (1.0, 3.0))
    bottom.set_ylabel("R² of the score (log scale)")
    top.set_ylabel("parts of the loss")
    for place, (name, line) in enumerate(states.parts.items()):
        _draw_line(sheet, top, PARTS[name], line, Look(place))
    for place, (sigma, line) in enumerate(states.scores.items()):
        _draw_line(sheet, bottom, f"{sigma:g} radians", line, Look(place), above=0.0)
        matched = states.matched[sigma]
        shown = np.ma.masked_less_equal(matched.middle, 0.0)
        bottom.plot(matched.steps, shown, color=Look(place).colour, ls="--", lw=1.2, zorder=2)
    sheet.key(entry("each seed", GREY, **FAINT))
    return sheet


def _draw_line(sheet: Sheet, axes: Axes, label: str, line: Line, look: Look, above: float = -np.inf) -> None:
    """Draw a line and its seeds; values not above `above` are left out."""
    if end := lines(axes, line.above(above), look):
        value = f"{end[1]:.2g}".replace("-", "−")
        sheet.label(axes, [(*end, f"{label}  {value}", look.colour)])


def _finding(states: States) -> str:
    """Return R² at the end as a share of its matched value, level by level."""
    shares = []
    for sigma, line in states.scores.items():
        r2, matched = line.last, states.matched[sigma].last
        if r2 and matched and matched[1] > 0:
            shares.append(f"{r2[1] / matched[1]:.2f} at {sigma:g}")
    if not shares:
        return "No evaluation of the score"
    return f"R² at the end over its matched value: {', '.join(shares)} radians"

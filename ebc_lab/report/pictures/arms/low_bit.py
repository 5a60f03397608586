"""What few levels change, and what a policy did: the KL against the size of a step, with the law fitted to
it, and a policy's factors over the run.

The keys `kl_curve` and `kl_law` of result.json and the columns `lr_factor` and `radius_factor` of steps.csv,
which `ebc-lab columns` explains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from ebc_lab.records.figures import kl_law

from ...text.words import optimizer
from ..drawing.curves import Line, Run, by_step, smooth_line, window
from ..drawing.looks import FAINT, GREY, INK, RULE, SMALL, Look
from ..drawing.sheet import Arms, Facts, Sheet, entry, lines, log_axis, over_steps

WEDGE = 3.0  # how far, as a factor, the lines of slope 1 and 2 stand off the data
LAW_POINTS = 80
NEGLIGIBLE = 10.0  # a part of the law that is nowhere as much as a tenth of the other one
STEEP, FLAT = 2.0, 1.0  # exponents of a float model, and of flips alone
RING: dict[str, Any] = {"marker": "o", "ms": 9.5, "mew": 1.4, "mfc": "none", "ls": ""}  # where a law turns


# -- KL against c --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """KL against c of an arm: each seed's points, and the seeds' median at every c that any has."""

    seeds: Sequence[np.ndarray]  # of (c, KL > 0), c rising
    points: np.ndarray  # (c, median, least, most)
    law: tuple[float, float] | None  # A and B of KL = A c² + B c through the medians


def curve_of(runs: Sequence[Run]) -> Curve | None:
    """Return the curve of an arm; None where no completed run measured it."""
    measured = [run.result.get("kl_curve") for run in runs if run.outcome == "completed"]
    seeds = [np.array(sorted(curve)) for curve in measured if curve]
    if not seeds:
        return None
    every = np.concatenate(seeds)
    points = []
    for c in np.unique(every[:, 0]):
        at_c = every[every[:, 0] == c, 1]
        points.append((c, np.median(at_c), at_c.min(), at_c.max()))
    law = kl_law([[c, kl] for c, kl, *_ in points])
    return Curve(seeds, np.array(points), (law[0], law[1]) if law else None)


def exponent_of(law: tuple[float, float], c: float) -> float:
    """Return d ln KL / d ln c of the law at c."""
    a, b = law
    return (2 * a * c + b) / (a * c + b)


def draw_kl_curve(facts: Facts, track: str, arms: Arms, curves: Mapping[str, Curve]) -> Sheet:
    """Draw KL against c, with the law dashed."""
    whom = f"{optimizer(track)}: KL between W and W + c·ΔW, median of a run's audits, median of the seeds"
    law = "a float model: KL = A c²; with few levels A c² + B c, A and B in nats per token"
    sheet = Sheet(
        facts,
        "How does the KL grow with the size of a step?",
        (whom, _finding(curves)),
        (law,),
        arms=arms,
        heights=(4.4,),
    )
    [axes] = sheet.panels
    log_axis(axes, "x", (1.0, 3.0))
    log_axis(axes, "y", (1.0,))
    low, high = _widest(curves)
    axes.set_xlim(low / 1.12, high * 1.12)
    axes.set_ylabel("KL, nats per token (log scale)")
    axes.set_xlabel("c: share of the update ΔW that is applied (log scale)")
    _draw_slopes(axes, curves)
    for label, curve in curves.items():
        _draw_curve(sheet, label, curve, facts.look(label))
    sheet.key(*_handles(curves))
    return sheet


def _finding(curves: Mapping[str, Curve]) -> str:
    """Return the laws' exponent at the smallest c: the flattest arm's and the steepest one's."""
    low, _ = _widest(curves)
    first = {label: exponent_of(curve.law, low) for label, curve in curves.items() if curve.law}
    if not first:
        return "Too few points for a law"
    flattest, steepest = min(first, key=first.__getitem__), max(first, key=first.__getitem__)
    text = f"The law's exponent at c = {low:g}: {first[flattest]:.2f} ({flattest})"
    return text + (f" to {first[steepest]:.2f} ({steepest})" if flattest != steepest else "")


def _widest(curves: Mapping[str, Curve]) -> tuple[float, float]:
    every = np.concatenate([curve.points[:, 0] for curve in curves.values()])
    return float(every.min()), float(every.max())


def _handles(curves: Mapping[str, Curve]) -> list[Any]:
    handles = [entry("median of the seeds", GREY, marker="o", ls="")]
    if any(len(curve.seeds) > 1 for curve in curves.values()):
        handles.append(entry("from the least to the greatest seed", GREY, lw=1.2))
    return [
        *handles,
        entry("A c² + B c, fitted to the medians", GREY, ls="--", lw=1.3),
        entry("c = B / A: both terms are equal, the exponent is 1.5", GREY, **RING),
        entry("slopes 1 and 2", RULE, ls=":", lw=1.0),
    ]


def _draw_slopes(axes: Axes, curves: Mapping[str, Curve]) -> None:
    """Draw lines of slope 1 above the data and of slope 2 below them: a law of any A and B lies between."""
    low, high = _widest(curves)
    at = np.array([low, high])
    ends = [curve.points[-1, 1] * (high / curve.points[-1, 0]) ** STEEP for curve in curves.values()]
    guides = (
        (FLAT, max(ends) * WEDGE, "∝ c", 0.12, (-5, 5), {"ha": "right", "va": "bottom"}),
        (STEEP, min(ends) / WEDGE, "∝ c²", 0.88, (5, -5), {"ha": "left", "va": "top"}),
    )
    for slope, end, name, share, off, beside_it in guides:
        axes.plot(at, end * (at / high) ** slope, color=RULE, lw=1.0, ls=":", zorder=1)
        c = low * (high / low) ** share
        place: dict[str, Any] = {"xytext": off, "textcoords": "offset points", **beside_it}
        axes.annotate(name, (c, end * (c / high) ** slope), color=GREY, size=SMALL, **place)


def _draw_curve(sheet: Sheet, label: str, curve: Curve, look: Look) -> None:
    axes, colour = sheet.panels[0], look.colour
    c, kl, least, most = curve.points.T
    axes.vlines(c, least, most, color=colour, lw=1.2, alpha=0.7, zorder=2)
    axes.plot(c, kl, look.marker, color=colour, ms=5.5, mec="white", mew=0.6, zorder=3)
    if curve.law:
        a, b = curve.law
        at = np.geomspace(c[0], c[-1], LAW_POINTS)
        axes.plot(at, a * at**2 + b * at, color=colour, ls="--", lw=1.3, zorder=2.5)
        if turn := _turn(curve):
            axes.plot(turn, a * turn**2 + b * turn, color=colour, zorder=4, **RING)
    mark = entry(label, colour, marker=look.marker, ls="--", ms=5)
    sheet.label(axes, [(float(c[-1]), float(kl[-1]), f"{label}  {law_in_words(curve)}", colour)], [mark])


def _turn(curve: Curve) -> float | None:
    """Return c = B/A where it lies within the points."""
    if not curve.law or not all(curve.law):
        return None
    at = curve.law[1] / curve.law[0]
    return at if curve.points[0, 0] <= at <= curve.points[-1, 0] else None


def law_in_words(curve: Curve) -> str:
    """Write `A 0.02, B 0.001, B/A 0.05`, without a part that is nowhere of weight."""
    if curve.law is None:
        return "one point, no law"
    a, b = curve.law
    if b * NEGLIGIBLE < a * curve.points[0, 0]:
        return f"A {a:.2g}, ∝ c² throughout"
    if a * NEGLIGIBLE * curve.points[-1, 0] < b:
        return f"B {b:.2g}, ∝ c throughout"
    return f"A {a:.2g}, B {b:.2g}, B/A {b / a:.2g}"


# -- a policy's factors --------------------------------------------------------------------------------------


FACTORS = {"lr_factor": "LR factor", "radius_factor": "radius factor"}


@dataclass(frozen=True)
class Factors:
    """A policy's factors over the run, by column, as running geometric means."""

    lines: Mapping[str, Line]
    medians: Mapping[str, float]  # over all steps of all seeds


def factors_of(runs: Sequence[Run]) -> Factors | None:
    """Return the factors of an arm; None where no run has a policy."""
    streams = [run.steps for run in runs if set(FACTORS) <= set(run.steps)]
    if not streams:
        return None
    tables = {column: by_step(streams, column) for column in FACTORS}
    medians = {column: float(np.median(table.compressed())) for column, (_, table) in tables.items()}
    return Factors({column: smooth_line(*table, log=True) for column, table in tables.items()}, medians)


def draw_factors(facts: Facts, track: str, arms: Arms, courses: Mapping[str, Factors]) -> Sheet:
    """Draw the factor on the learning rate above, the one on the trust radius below, a line for every arm."""
    least, most = (choose(courses, key=lambda n: courses[n].medians["lr_factor"]) for choose in (min, max))
    medians = [f"{courses[name].medians['lr_factor']:.2g} ({name})" for name in dict.fromkeys((least, most))]
    last = max(float(factors.lines["lr_factor"].steps[-1]) for factors in courses.values())
    sheet = Sheet(
        facts,
        "What did the policy do over the run?",
        (
            f"{optimizer(track)}: its factors on the learning rate (LR) and on the trust radius",
            f"Median factor on the learning rate: {' to '.join(medians)}",
        ),
        (f"running geometric mean over {window(round(last) + 1)} steps, median of the seeds",),
        arms=arms,
        grid=("a", "b"),
        heights=(2.4, 2.7),
    )
    over_steps(facts, sheet.panels, last)
    for axes, (column, name) in zip(sheet.panels, FACTORS.items(), strict=True):
        log_axis(axes, "y", (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))
        axes.set_ylabel(f"{name} (log scale)")
        axes.axhline(1.0, color=INK, lw=1.0, ls=":", zorder=1)
        for label, factors in courses.items():
            look = facts.look(label)
            if end := lines(axes, factors.lines[column], look):
                words = f"{label}  median {factors.medians[column]:.2g}"
                sheet.label(axes, [(*end, words, look.colour)])
    sheet.key(entry("each seed", GREY, **FAINT))
    sheet.key(entry("1: the schedule as it is", INK, lw=1.0, ls=":"))
    return sheet

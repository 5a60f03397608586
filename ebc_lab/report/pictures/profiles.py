"""Performance profiles: on which share of the workloads each method is within a ratio of the best one's time;
and these ratios, method by workload."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Patch

from ebc_lab.study.stages.profiles import score_in_words
from ebc_lab.study.stages.profiles.scores import share_within

from .sheet.figure import ALERT, EBC, GOAL, INK, LABELS_FROM, REST, SMALL, Facts, Sheet, entry, page, sheet_of
from .sheet.place import beside, key, name_rows, narrowed

ASKED = tuple(product(("-", ":", "--"), (EBC, ALERT, GOAL, "C4")))
OTHERS = (("-", "C1"), ("--", "C5"), ("-.", "C6"))
ROW = 0.3  # inches of a method's row
TICKS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
SHADES = LinearSegmentedColormap.from_list("ratios", ["#2a7f9e", "#9cc9d6", "#f4f1ea"])  # from the best on
DARK = 0.3  # of the shades: on these the figures are white


def ranked(track: Mapping[str, Any]) -> list[str]:
    """Return the methods, the highest score first."""
    methods = track["methods"]
    return sorted(methods, key=lambda method: (methods[method]["place"], method))


def looks_of(track: Mapping[str, Any]) -> dict[str, tuple[str, str, float]]:
    """Return colour, dashes and width of the methods that are told apart: those asked about, and the best of
    the others."""
    asked = [method for method in ranked(track) if method in track["asked_about"]]
    others = [method for method in ranked(track) if method not in asked]
    looks = {m: (colour, dashes, 2.4) for m, (dashes, colour) in zip(asked, ASKED, strict=False)}
    return looks | {m: (colour, dashes, 1.6) for m, (dashes, colour) in zip(others, OTHERS, strict=False)}


def ratios_of(track: Mapping[str, Any], method: str) -> list[float]:
    """Return a method's ratios, infinite where it missed."""
    at = track["methods"][method]["workloads"].values()
    return [np.inf if of["ratio"] is None else of["ratio"] for of in at]


def draw_profiles(facts: Facts, track: Mapping[str, Any]) -> Sheet:
    """Draw ρ(τ) of every method as steps, τ on a log axis."""
    methods, most = track["methods"], track["most"]
    judged = [name for name, target in track["workloads"].items() if target["loss"] is not None]
    first = ranked(track)[0]
    figure, axes = page(
        facts,
        "How soon does each method reach the target?",
        f"one configuration each for all of {len(judged)} workloads: {', '.join(judged)}",
        f"Highest score: {first}, {score_in_words(methods[first])} of 1",
        _seeds_in(track),
        ("time: steps to the loss that the yardstick, tuned on each workload, reached",),
        size=(9.6, 3.4 + 0.17 * len(methods)),
    )
    axes.set(xscale="log", xlim=(1, most), ylim=(-0.02, 1.03))
    axes.set_xticks([t for t in TICKS if t <= most], [f"{t:g}" for t in TICKS if t <= most], minor=False)
    axes.minorticks_off()
    axes.set_xlabel("τ: ratio to the best method’s time (log scale)")
    axes.set_ylabel("share of workloads within τ")
    looks = looks_of(track)
    ends = []
    for nth, method in enumerate(reversed(ranked(track))):  # the best on top
        colour, dashes, width = looks.get(method, (REST, "-", 1.2))
        x, y = steps_of(ratios_of(track, method), most)
        axes.step(x, y, where="post", color=colour, ls=dashes, lw=width, zorder=2 + nth / 100)
        shade = colour if method in looks else "#777777"
        ends.append((x[-1], y[-1], f"{method}  {methods[method]['score']:.2f}", shade))
    told = {
        "thick: the study asks about it": (INK, 2.4, bool(track["asked_about"])),
        "grey: lower scores": (REST, 1.2, len(looks) < len(methods)),
    }
    key(axes, [entry(label, colour, lw=width) for label, (colour, width, there) in told.items() if there])
    narrowed(axes, LABELS_FROM)
    beside(axes, ends)
    return figure


def steps_of(ratios: Sequence[float], most: float) -> tuple[list[float], list[float]]:
    """Return where ρ rises, from 1 to `most`, and its value from there on."""
    x = sorted({1.0, most, *(r for r in ratios if r < most)})
    return x, [share_within(ratios, tau) for tau in x]


def draw_ratios(facts: Facts, track: Mapping[str, Any]) -> Sheet:
    """Draw each method's ratio on each workload, the darker the nearer to the best."""
    order, most = ranked(track), track["most"]
    places = list(track["workloads"])
    never = [name for name, w in track["workloads"].items() if w["best_steps"] is None]
    figure, axes = page(
        facts,
        "On which workloads is a method fast?",
        "steps to the target over those of the best method there",
        f"reached by none: {', '.join(never)}" if never else "",
        _seeds_in(track),
        ("– missed", "* no configuration was chosen on it"),
        size=(8.6, 2.3 + ROW * len(order)),
    )
    axes.grid(False)
    for row, method in enumerate(order):
        _draw_row(axes, row, track["methods"][method]["workloads"], places, most)
    chose = [track["workloads"][name]["calibrates"] for name in places]
    labels = [name + "*" * (not chosen) for name, chosen in zip(places, chose, strict=True)]
    axes.set(xlim=(-0.5, len(places) - 0.5))
    axes.set_xticks(range(len(places)), labels)
    axes.tick_params(axis="x", length=0)
    axes.spines["bottom"].set_visible(False)
    shades = (("as fast as the best", SHADES(0.0)), (f"{most:g} times as long, or longer", SHADES(1.0)))
    key(axes, [Patch(facecolor=colour, label=label) for label, colour in shades])
    name_rows(axes, order)
    return figure


def _draw_row(axes: Axes, row: int, workloads: Mapping[str, Any], places: Sequence[str], most: float) -> None:
    for column, name in enumerate(places):
        ratio = (workloads.get(name) or {}).get("ratio")
        share = 1.0 if ratio is None else min(1.0, np.log(ratio) / np.log(most))
        colour = SHADES(share) if ratio is not None else "white"
        # on a phone the names stand above their rows
        height = 0.56 if sheet_of(axes).phone else 0.92
        axes.barh(row, 0.96, left=column - 0.48, height=height, color=colour)
        shown = "–" if ratio is None else f"{ratio:.2f}"
        ink = "white" if ratio is not None and share < DARK else INK
        axes.text(column, row, shown, ha="center", va="center", size=SMALL, color=ink)


def _seeds_in(track: Mapping[str, Any]) -> int:
    """Return the most seeds that a method has on a workload."""
    at = [of for method in track["methods"].values() for of in method["workloads"].values()]
    return max((len(of["lowest"]) for of in at), default=0)

"""Performance profiles: on which share of the workloads each method is within a ratio of the best one's time;
and these ratios, method by workload."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Patch

from ebc_lab.study.stages.profiles import score_in_words
from ebc_lab.study.stages.profiles.scores import share_within

from .drawing.looks import Look, assign_looks
from .drawing.sheet import GREY, INK, REST, SMALL, Facts, Sheet, count_seeds, entry, name_rows

TOLD_APART = 3  # of the methods that are not asked about: the best
ROW = 0.3  # inches of a method's row
TICKS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
SHADES = LinearSegmentedColormap.from_list("ratios", ["#2a7f9e", "#9cc9d6", "#f4f1ea"])  # from the best on
DARK = 0.3  # of the shades: on these the figures are white


def ranked(track: Mapping[str, Any]) -> list[str]:
    """Return the methods, the highest score first."""
    methods = track["methods"]
    return sorted(methods, key=lambda method: (methods[method]["place"], method))


def looks_of(track: Mapping[str, Any]) -> dict[str, Look]:
    """Return the looks of the methods that are told apart: those asked about, and the best of the others."""
    asked = [method for method in ranked(track) if method in track["asked_about"]]
    others = [method for method in ranked(track) if method not in asked]
    return assign_looks([*asked, *others[:TOLD_APART]], asked)


def ratios_of(track: Mapping[str, Any], method: str) -> list[float]:
    """Return a method's ratios, infinite where it missed."""
    at = track["methods"][method]["workloads"].values()
    return [np.inf if of["ratio"] is None else of["ratio"] for of in at]


def draw_profiles(facts: Facts, track: Mapping[str, Any]) -> Sheet:
    """Draw ρ(τ) of every method as steps, τ on a log axis."""
    methods, most = track["methods"], track["most"]
    judged = [name for name, target in track["workloads"].items() if target["loss"] is not None]
    first, looks = ranked(track)[0], looks_of(track)
    sheet = Sheet(
        facts,
        "How soon does each method reach the target?",
        (
            f"one configuration each for all of {len(judged)} workloads: {', '.join(judged)}",
            f"Highest score: {first}, {score_in_words(methods[first])} of 1",
        ),
        (
            count_seeds(_seeds_in(track)),
            "time: steps to the loss that the yardstick, tuned on each workload, reached",
        ),
        heights=(2.4 + 0.17 * len(methods),),
        width=10.0,
    )
    [axes] = sheet.panels
    axes.set(xscale="log", xlim=(1, most), ylim=(-0.02, 1.03))
    axes.set_xticks([t for t in TICKS if t <= most], [f"{t:g}" for t in TICKS if t <= most], minor=False)
    axes.minorticks_off()
    axes.set_xlabel("τ: ratio to the best method’s time (log scale)")
    axes.set_ylabel("share of workloads within τ")
    for nth, method in enumerate(reversed(ranked(track))):  # the best on top
        look = looks.get(method)
        colour, dashes = (look.colour, look.line) if look else (REST, "-")
        width = 2.4 if method in track["asked_about"] else 1.4
        x, y = steps_of(ratios_of(track, method), most)
        axes.step(x, y, where="post", color=colour, ls=dashes, lw=width, zorder=2 + nth / 100)
        words = f"{method}  {methods[method]['score']:.2f}"
        mark = entry(words, colour, ls=dashes, lw=width)
        sheet.label(axes, [(x[-1], y[-1], words, colour if look else GREY)], [mark])
    if track["asked_about"]:
        sheet.key(entry("thick: the study asks about it", INK, lw=2.4))
    if len(looks) < len(methods):
        sheet.key(entry("grey: lower scores", REST, lw=1.2))
    return sheet


def steps_of(ratios: Sequence[float], most: float) -> tuple[list[float], list[float]]:
    """Return where ρ rises, from 1 to `most`, and its value from there on."""
    x = sorted({1.0, most, *(r for r in ratios if r < most)})
    return x, [share_within(ratios, tau) for tau in x]


def draw_ratios(facts: Facts, track: Mapping[str, Any]) -> Sheet:
    """Draw each method's ratio on each workload, the darker the nearer to the best."""
    order, most = ranked(track), track["most"]
    places = list(track["workloads"])
    never = [name for name, w in track["workloads"].items() if w["best_steps"] is None]
    sheet = Sheet(
        facts,
        "On which workloads is a method fast?",
        (
            "steps to the target over those of the best method there",
            f"reached by none: {', '.join(never)}" if never else "",
        ),
        (count_seeds(_seeds_in(track)), "– missed", "* no configuration was chosen on it"),
        heights=(1.2 + ROW * len(order),),
    )
    [axes] = sheet.panels
    axes.grid(False)
    for row, method in enumerate(order):
        for place, name in enumerate(places):
            ratio = (track["methods"][method]["workloads"].get(name) or {}).get("ratio")
            _draw_cell(axes, row, place, ratio, most)
    chose = [track["workloads"][name]["calibrates"] for name in places]
    labels = [name + "*" * (not chosen) for name, chosen in zip(places, chose, strict=True)]
    axes.set(xlim=(-0.5, len(places) - 0.5))
    axes.set_xticks(range(len(places)), labels, rotation=90 if facts.narrow else 0)
    axes.tick_params(axis="x", length=0)
    axes.spines["bottom"].set_visible(False)
    shades = (("as fast as the best", SHADES(0.0)), (f"{most:g} times as long, or longer", SHADES(1.0)))
    sheet.key(*[Patch(facecolor=colour, label=label) for label, colour in shades])
    name_rows(axes, order)
    return sheet


def _draw_cell(axes: Axes, row: int, place: int, ratio: float | None, most: float) -> None:
    """Draw a method's ratio on a workload, None where it missed the target."""
    share = 1.0 if ratio is None else min(1.0, np.log(ratio) / np.log(most))
    axes.barh(row, 0.96, left=place - 0.48, height=0.92, color="white" if ratio is None else SHADES(share))
    shown = "–" if ratio is None else f"{ratio:.2f}"
    ink = "white" if ratio is not None and share < DARK else INK
    axes.text(place, row, shown, ha="center", va="center", size=SMALL, color=ink)


def _seeds_in(track: Mapping[str, Any]) -> int:
    """Return the most seeds that a method has on a workload."""
    at = [of for method in track["methods"].values() for of in method["workloads"].values()]
    return max((len(of["lowest"]) for of in at), default=0)

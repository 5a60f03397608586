"""Performance profiles: on which share of the workloads each method is within a ratio of the best one's
time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ebc_lab.records.decisions import ProfilesTrack
from ebc_lab.study.stages.profiles import score_in_words
from ebc_lab.study.stages.profiles.scores import share_within

from ..kinds.profiles import ranked
from ..text.words import plural
from .drawing.looks import GREY, INK, REST, Look, assign_looks
from .drawing.sheet import Facts, Sheet, entry

TOLD_APART = 3  # of the methods that are not asked about: the best
TICKS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)


def looks_of(track: ProfilesTrack) -> dict[str, Look]:
    """Return the looks of the methods that are told apart: those asked about, and the best of the others."""
    order = [method for method, _ in ranked(track)]
    asked = [method for method in order if method in track["asked_about"]]
    others = [method for method in order if method not in asked]
    return assign_looks([*asked, *others[:TOLD_APART]], asked)


def draw_profiles(facts: Facts, track: ProfilesTrack) -> Sheet:
    """Draw ρ(τ) of every method as steps, τ on a log axis."""
    methods, most = track["methods"], track["most"]
    judged = [name for name, target in track["workloads"].items() if target["loss"] is not None]
    seeds = [len(at["lowest"]) for method in methods.values() for at in method["workloads"].values()]
    (first, _), looks = ranked(track)[0], looks_of(track)
    sheet = Sheet(
        facts,
        "How soon does each method reach the target?",
        (
            f"one configuration each for all of {len(judged)} workloads: {', '.join(judged)}",
            f"Highest score: {first}, {score_in_words(methods[first])} of 1",
        ),
        (
            plural(max(seeds, default=0), "seed"),
            "time: steps to the loss that the yardstick, tuned on each workload, reached",
        ),
        heights=(2.4 + 0.17 * len(methods),),
    )
    [axes] = sheet.panels
    axes.set(xscale="log", xlim=(1, most), ylim=(-0.02, 1.03))
    axes.set_xticks([t for t in TICKS if t <= most], [f"{t:g}" for t in TICKS if t <= most], minor=False)
    axes.minorticks_off()
    axes.set_xlabel("τ: ratio to the best method’s time (log scale)")
    axes.set_ylabel("share of workloads within τ")
    for nth, (method, found) in enumerate(reversed(ranked(track))):  # the best on top
        look = looks.get(method)
        colour, dashes = (look.colour, look.line) if look else (REST, "-")
        width = 2.4 if method in track["asked_about"] else 1.4
        ratios = [np.inf if at["ratio"] is None else at["ratio"] for at in found["workloads"].values()]
        x, y = steps_of(ratios, most)
        axes.step(x, y, where="post", color=colour, ls=dashes, lw=width, zorder=2 + nth / 100)
        words = f"{method}  {found['score']:.2f}"
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

"""The final arms side by side: how soon each reaches the baseline's loss.

Their paired differences in test loss are `forest`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ebc_lab.study.stages import compare_arms

from ..text.words import arm_label, optimizer
from .arm import Rival, colour_of, draw_clip, draw_kl, draw_loss, mark_of
from .curves import Run, read_results, read_runs
from .ebm import draw_states, states_of
from .forest import draw_finals
from .mechanism import Tightness, draw_groups, draw_tightness, tightness_of
from .overlaid import course_of, draw_overlaid
from .sheet.figure import (
    ALERT,
    RIGHT,
    SEED,
    SMALL,
    Arms,
    Decisions,
    Facts,
    Results,
    Sheet,
    another,
    entry,
    page,
    tick,
)
from .sheet.picture import Picture, picture
from .sheet.place import key, name_rows
from .suite.windows import strong_looks


def final_pictures(root: Path, facts: Facts, section: str, decisions: Decisions) -> Iterator[Picture]:
    """All final arms together, and each alone. `section`: the stage that compares them."""
    decision = decisions[section]
    tracks = decision["tracks"]
    several = len(tracks) > 1
    for track, track_decision in tracks.items():
        tail = f"_{track}" * several
        own_results = {name: read_results(root, arm) for name, arm in track_decision["arms"].items()}
        yield from _overlaid(root, facts, track, track_decision, f"curves{tail}")
        of_track = (track, track_decision, own_results)
        yield from picture(f"finals{tail}", "verdict", facts, draw_finals, *of_track, decision["rule"])
        yield from picture(f"efficiency{tail}", section, facts, draw_efficiency, *of_track)
    for track, track_decision in tracks.items():
        baseline = read_runs(root, track_decision["arms"][track_decision["roles"]["baseline"]])
        if states := states_of(baseline):
            arm = track_decision["arms"][track_decision["roles"]["baseline"]]
            name = "ebm" + f"_{track}" * several
            yield from picture(name, section, facts, draw_states, track, "the baseline", arm, states)
        tight: dict[str, Tightness] = {}
        natural_kl = decisions["lr_sweep"]["tracks"][track]["natural_kl"]
        yield from _arm_pictures(root, facts, track_decision, baseline, natural_kl, tight)
        if tight:
            names = {name: arm_label(name, track_decision["arms"][name]) for name in tight}
            of = (track, names, track_decision["arms"], tight)
            yield from picture("tightness" + f"_{track}" * several, section, facts, draw_tightness, *of)


def _overlaid(
    root: Path, facts: Facts, track: str, decision: Mapping[str, Any], name: str
) -> Iterator[Picture]:
    """The final arms' loss curves over each other, those with EBC in strong colours; none where no run
    completed."""
    named = {arm_label(name, arm): course_of(root, arm) for name, arm in decision["arms"].items()}
    courses = {label: course for label, course in named.items() if course}
    if not courses:
        return
    ebc = [label for label, course in courses.items() if course.arm["ebc"]]
    baseline = decision["roles"]["baseline"]
    whom = f"{optimizer(track)}: the final arms over each other, those with EBC in colour"
    looks = strong_looks(list(courses), ebc)
    named_too = arm_label(baseline, decision["arms"][baseline])
    yield from picture(name, "verdict", facts, draw_overlaid, whom, courses, looks, ebc, named_too)


def _arm_pictures(
    root: Path,
    facts: Facts,
    decision: Mapping[str, Any],
    baseline: Sequence[Run],
    natural_kl: float,
    tight: dict[str, Tightness],
) -> Iterator[Picture]:
    """Every arm's own pictures; each run is read once, the baseline's before. What tightness it measured goes
    to `tight`."""
    reference = decision["roles"]["baseline"]
    for name, arm in decision["arms"].items():
        itself = name == reference
        runs = baseline if itself else read_runs(root, arm)
        there = "most seeds do not get there"
        if reached := decision["efficiency"].get(name):
            there = f"{reached['seeds']} of {len(runs)} seeds get there, at step {reached['steps']:.0f}"
        rival = Rival("the baseline", baseline, f"; {there}", itself=itself)
        own: dict[str, tuple[Any, ...]] = {
            "loss": (draw_loss, rival),
            "clip": (draw_clip,),
            "kl": (draw_kl, natural_kl),
        }
        for kind, (draw, *more) in (own | {"groups": (draw_groups,)}).items():
            yield from picture(f"{name}_{kind}", "arms", facts, draw, name, arm, runs, *more, arm_of=name)
        if measured := tightness_of(runs):
            tight[name] = measured


# -- how soon the baseline's loss is reached -----------------------------------------------------------------


def draw_efficiency(facts: Facts, track: str, decision: Mapping[str, Any], results: Results) -> Sheet:
    """Steps, tokens and training seconds until an arm's validation loss is at the baseline's final one, seeds
    faint.

    Arms that never got there say so.
    """
    arms, reached = decision["arms"], decision["efficiency"]
    seed_runs = _each_seed(facts, decision, results)
    what = "How soon does each arm reach the baseline's final loss?"
    whom = f"{optimizer(track)}: validation loss on the fixed windows"
    small = (
        "medians over the seeds, paired with the baseline's; an arm is there when half of its seeds are",
    )
    size = (8.6, 3.0 + 0.34 * len(arms))
    seeds = max((len(arm["runs"]) for arm in arms.values()), default=0)
    figure, left = page(facts, what, whom, _first_there(decision), seeds, small, size=size)
    left.set_xlabel("training steps  (tokens on top)")
    names = [arm_label(name, arm) for name, arm in arms.items()]
    right = another(left)
    key(right if facts.phone else left, efficiency_key(arms))
    name_rows(left, names)
    name_rows(right, names if facts.phone else [""] * len(names))
    right.set_xlabel("training seconds on this machine")
    if facts.phone:
        left.set_xlabel(f"training steps  (one step = {facts.tokens_per_step:,} tokens)")
    else:
        box, head = left.get_position(), 30 / 72 / figure.get_figheight()
        middle = (box.x0 + RIGHT) / 2
        left.set_position((box.x0, box.y0, middle - box.x0 - 0.015, box.height - head))
        right.set_position((middle + 0.015, box.y0, RIGHT - middle - 0.015, box.height - head))
    for axes, unit in ((left, "steps"), (right, "train_s")):
        shown = [x[unit] for some in (reached.values(), *seed_runs.values()) for x in some if x]
        axes.set_xlim(0, 1.18 * max(shown, default=1.0))
        for y, (name, arm) in enumerate(arms.items()):
            draw_reached(axes, y, arm, reached.get(name), seed_runs[name], unit)
        make_room_for_figures(axes)
    if facts.phone:
        return figure
    a_step = facts.tokens_per_step
    both_ways = (lambda x: np.multiply(x, a_step), lambda x: np.divide(x, a_step))
    tokens = left.secondary_xaxis("top", functions=both_ways)
    tokens.xaxis.set_major_formatter(lambda value, _: tokens_in_words(value))
    tokens.spines["top"].set_visible(False)
    return figure


def tokens_in_words(value: float) -> str:
    if value >= 1e6:
        return f"{tick(value / 1e6)}M"
    return f"{tick(value / 1e3)}k" if value else "0"


def _each_seed(
    facts: Facts, decision: Mapping[str, Any], results: Results
) -> dict[str, list[Mapping[str, float]]]:
    """Arm -> where each of its seeds that got there reached the loss of the baseline's run of that seed."""
    arms, baseline = decision["arms"], decision["roles"]["baseline"]
    flat: dict[str, Any] = {
        arms[name]["runs"][seed]: result
        for name, by_seed in results.items()
        for seed, result in by_seed.items()
    }
    by_seed: dict[str, Any] = {}
    for name, arm in arms.items():
        pairs = [s for s in arm["runs"] if s in arms[baseline]["runs"]]
        alone: Any = ({n: {"runs": {s: arms[n]["runs"][s]}} for n in (baseline, name)} for s in pairs)
        seen: list[Any] = [
            compare_arms.efficiency(one, baseline, flat, facts.tokens_per_step)[name] for one in alone
        ]
        by_seed[name] = [at for at in seen if at]
    return by_seed


def _first_there(decision: Mapping[str, Any]) -> str:
    arms, reached, baseline = decision["arms"], decision["efficiency"], decision["roles"]["baseline"]
    there = {name: at for name, at in reached.items() if at and name != baseline}
    if not there:
        return "No other arm gets to the baseline's final loss."
    first, last = min(there, key=lambda n: there[n]["steps"]), reached[baseline]
    finding = f"First: {arm_label(first, arms[first])}, at step {there[first]['steps']:.0f}"
    finding += f", {there[first]['steps'] / last['steps']:.0%} of the baseline's" if last else ""
    return f"{finding}; {len(there)} of {len(arms) - 1} other arms get there."


def draw_reached(
    axes: Axes,
    y: int,
    arm: Mapping[str, Any],
    reached: Mapping[str, float] | None,
    seeds: Sequence[Mapping[str, float]],
    unit: str,
) -> None:
    """An arm's row in one unit: its seeds faint, its median with the figure beside it, or that it never got
    there."""
    colour, runs = colour_of(arm), len(arm["runs"])
    axes.plot([x[unit] for x in seeds], [y + 0.25] * len(seeds), color=colour, **SEED)
    if not reached:
        across = axes.get_yaxis_transform()
        axes.plot(0.035, y, "x", color=ALERT, ms=7, mew=2, transform=across)
        words = f"not reached by {runs - len(seeds)} of {runs} seeds"
        axes.text(0.065, y, words, transform=across, va="center", size=SMALL, color=ALERT)
        return
    at = reached[unit]
    axes.plot((0, at), (y, y), color=colour, lw=1.0, alpha=0.5)
    axes.plot(at, y, mark_of(arm), color=colour, ms=6.5, zorder=3)
    value = f"{at:,.0f}" if unit == "steps" else f"{at:.3g} s"
    value += f"  ({reached['seeds']} of {runs} seeds)" if reached["seeds"] < runs else ""
    axes.annotate(value, (at, y), xytext=(6, 4), textcoords="offset points", size=SMALL, color=colour)


def make_room_for_figures(axes: Axes) -> None:
    """Lengthen the x axis until every figure beside a mark ends within it."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    for _ in range(4):  # a longer axis moves the marks, and with them what stands beside them
        right = max((text.get_window_extent().x1 for text in axes.texts), default=0.0)
        if right <= axes.bbox.x1:
            return
        low, high = axes.get_xlim()
        axes.set_xlim(low, low + (high - low) * (1.02 + (right - axes.bbox.x1) / axes.bbox.width))


def efficiency_key(arms: Arms) -> list[Line2D]:
    kinds = {bool(arm["ebc"]): arm for arm in arms.values()}
    handles = []
    for ebc, arm in sorted(kinds.items()):
        label = f"{'with' if ebc else 'without'} EBC"
        handles.append(entry(label, colour_of(arm), marker=mark_of(arm), lw=1.0))
    return [*handles, entry("each seed", **SEED)]

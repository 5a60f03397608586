"""How soon each final arm reaches the baseline's final loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes

from ebc_lab.study.stages import compare_arms

from ...text.words import arm_label, optimizer
from ..drawing.looks import ALERT, Look
from ..drawing.sheet import INK, SEED, SMALL, Facts, Sheet, count_seeds, entry, format_tick, name_rows

Results = Mapping[str, Mapping[str, Mapping[str, Any]]]  # arm -> seed -> result


def draw_efficiency(facts: Facts, track: str, decision: Mapping[str, Any], results: Results) -> Sheet:
    """Draw a row for each arm: when its validation loss is at the baseline's final one, in steps, tokens and
    seconds. Arms that never got there say so."""
    arms, reached = decision["arms"], decision["efficiency"]
    seeds = _each_seed(facts, decision, results)
    sheet = Sheet(
        facts,
        "How soon does each arm reach the baseline's final loss?",
        (f"{optimizer(track)}: validation loss on the fixed windows", _first_there(decision)),
        (
            count_seeds(max((len(arm["runs"]) for arm in arms.values()), default=0)),
            "medians over the seeds, paired with the baseline's; an arm is there when half of its seeds are",
            "seconds: of training on this machine",
        ),
        heights=(1.0 + 0.42 * len(arms),),
    )
    [axes] = sheet.panels
    axes.set_xlabel(f"training steps  (one step = {facts.tokens_per_step:,} tokens)")
    name_rows(axes, [arm_label(name, arm) for name, arm in arms.items()])
    characters = 30 if facts.narrow else 80
    for row, (name, arm) in enumerate(arms.items()):
        _draw_row(axes, row, facts.look(name), len(arm["runs"]), reached.get(name), seeds[name], characters)
    axes.set_xlim(left=0)
    sheet.key(entry("each seed", **SEED))
    return sheet


def format_tokens(value: float) -> str:
    if value >= 1e6:
        return f"{format_tick(value / 1e6)}M"
    return f"{format_tick(value / 1e3)}k" if value else "0"


def _each_seed(
    facts: Facts, decision: Mapping[str, Any], results: Results
) -> dict[str, list[Mapping[str, float]]]:
    """Return where each arm's seeds that got there reached the loss of the baseline's run of that seed."""
    arms, baseline = decision["arms"], decision["roles"]["baseline"]
    flat: dict[str, Any] = {
        arms[name]["runs"][seed]: result
        for name, by_seed in results.items()
        for seed, result in by_seed.items()
    }
    found: dict[str, Any] = {}
    for name, arm in arms.items():
        pairs = [seed for seed in arm["runs"] if seed in arms[baseline]["runs"]]
        alone: Any = ({n: {"runs": {s: arms[n]["runs"][s]}} for n in (baseline, name)} for s in pairs)
        seen = (compare_arms.efficiency(one, baseline, flat, facts.tokens_per_step)[name] for one in alone)
        found[name] = [at for at in seen if at]
    return found


def _first_there(decision: Mapping[str, Any]) -> str:
    arms, reached, baseline = decision["arms"], decision["efficiency"], decision["roles"]["baseline"]
    there = {name: at for name, at in reached.items() if at and name != baseline}
    if not there:
        return "No other arm gets to the baseline's final loss"
    first, last = min(there, key=lambda name: there[name]["steps"]), reached[baseline]
    finding = f"First: {arm_label(first, arms[first])}, at step {there[first]['steps']:.0f}"
    finding += f", {there[first]['steps'] / last['steps']:.0%} of the baseline's" if last else ""
    return f"{finding}; {len(there)} of {len(arms) - 1} other arms get there"


def _draw_row(
    axes: Axes,
    row: int,
    look: Look,
    runs: int,
    reached: Mapping[str, float] | None,
    seeds: Sequence[Mapping[str, float]],
    characters: int,
) -> None:
    """Draw an arm's seeds faintly, its median with figures above it, or say that it never got there, in
    lines of so many `characters`."""
    axes.plot([at["steps"] for at in seeds], [row + 0.28] * len(seeds), color=look.colour, **SEED)
    words, colour = f"×  not reached by {runs - len(seeds)} of {runs} seeds", ALERT
    if reached:
        at, colour = reached["steps"], INK
        axes.plot((0, at), (row + 0.15, row + 0.15), color=look.colour, lw=1.0, alpha=0.5)
        axes.plot(at, row + 0.15, look.marker, color=look.colour, ms=6.5, zorder=3)
        words = f"{at:,.0f} steps, {format_tokens(reached['tokens'])} tokens, {reached['train_s']:.3g} s"
        words += f" ({reached['seeds']} of {runs} seeds)" if reached["seeds"] < runs else ""
    look_of_words: dict[str, Any] = {"va": "bottom", "size": SMALL, "color": colour}
    axes.text(
        0.01, row - 0.04, fill(words, characters), transform=axes.get_yaxis_transform(), **look_of_words
    )

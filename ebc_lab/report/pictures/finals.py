"""The final arms side by side: what holding updates back costs, how soon the baseline's loss is reached, EBC's time.

Their paired differences in test loss are `forest`'s.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ebc_lab.study.stages import compare_arms, verdict

from ..text.words import optimizer, short
from .arm import colour_of, mark_of
from .curves import read_results
from .sheet import ALERT, EBC, GOAL, PLAIN, RIGHT, Facts, Sheet, another, fit, key, name_rows, page, spread

MARKS = "osDv^P*X"  # of the tracks
Arms = Mapping[str, Mapping[str, Any]]
Results = Mapping[str, Mapping[str, Mapping[str, Any]]]  # arm -> seed -> result


def results_of(root: Path, arms: Arms) -> Results:
    """Every arm's results by seed."""
    return {name: read_results(root, arm) for name, arm in arms.items()}


def seeds_in(arms: Arms) -> int:
    return max((len(arm["runs"]) for arm in arms.values()), default=0)


# -- loss against mean c ----------------------------------------------------------------------------------------------


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The arms that no other one dominates, by (mean c, loss): at a c at least as high, with a loss at least as low."""

    def beaten(c: float, loss: float) -> bool:
        return any(c2 >= c and loss2 <= loss and (c2, loss2) != (c, loss) for c2, loss2 in points.values())

    return sorted((name for name, at in points.items() if not beaten(*at)), key=lambda name: points[name])


def draw_pareto(facts: Facts, arms: Arms, results: Results) -> Sheet:
    """Test loss against mean c of the final arms: means over the seeds, the seeds faint, the arms that none dominates.

    Labels stand in a column beside the axes, in the order of the points, because plain arms share c = 1.
    """
    tracks = sorted({arm["track"] for arm in arms.values()})

    def label(name: str) -> str:
        whose = f"{optimizer(arms[name]['track']).removesuffix(' projection')}, " if len(tracks) > 1 else ""
        return whose + short(name, arms[name])

    done = {
        name: [r for r in own.values() if r.get("outcome") == "completed" and r.get("test_loss") is not None]
        for name, own in results.items()
    }
    points = {
        n: tuple(statistics.fmean(r[k] for r in own) for k in ("c_mean", "test_loss"))
        for n, own in done.items()
        if own
    }
    best = min(points, key=lambda n: points[n][1], default=None)
    finding = f"Lowest test loss: {points[best][1]:.3f}, {label(best)}. " if best else "No run completed."
    ahead = front(points)  # type: ignore[arg-type]
    if best:
        others = "; ".join(label(name) for name in ahead if name != best)
        many = f"{len(ahead)} arms lie on the front, up to {label(ahead[-1])}."
        finding += (
            many
            if len(ahead) > 3
            else f"On the front too: {others}."
            if others
            else "It is the front by itself."
        )
    gone = "; ".join(f"{label(n)}: no run completed" for n in arms if n not in points)
    what = "What does it cost to hold the updates back?"
    whom = f"{optimizer(tracks[0])}: e" if len(tracks) == 1 else "E"
    whom += "very final arm's test loss against its mean clip coefficient"
    figure, axes = page(facts, what, whom, finding, seeds_in(arms), alert=gone)
    axes.set_xlabel("mean clip coefficient c over all steps (1 = every update applied whole)")
    axes.set_ylabel("test loss, whole split (nats per token)")
    handles = [
        Line2D([], [], color=PLAIN, marker="o", mfc="white", mew=1.5, ls="", label="without EBC"),
        Line2D([], [], color=EBC, marker="o", ls="", label="with EBC"),
        Line2D([], [], color="#333333", marker="o", ms=3.2, mew=0, alpha=0.45, ls="", label="each seed"),
        Line2D(
            [],
            [],
            color=GOAL,
            ls=":",
            lw=1.4,
            label="front (bold): no other arm has so low a loss at so high a c",
        ),
    ]
    for name in points:
        colour, mark = colour_of(arms[name]), MARKS[tracks.index(arms[name]["track"]) % len(MARKS)]
        own = done[name]
        axes.plot(
            [r["c_mean"] for r in own],
            [r["test_loss"] for r in own],
            mark,
            color=colour,
            ms=3.2,
            mew=0,
            alpha=0.45,
        )
        face = colour if arms[name]["ebc"] else "white"
        axes.plot(*points[name], mark, ms=7, color=colour, mfc=face, mew=1.5, zorder=3)
    axes.plot(
        *zip(*(points[name] for name in ahead), strict=True) if ahead else ((), ()),
        color=GOAL,
        ls=":",
        lw=1.4,
        zorder=1,
    )
    axes.margins(0.08)
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # fixed, so that the leader lines do not move them
    key(axes, handles)
    box, column = axes.get_position(), 0.6 if len(tracks) == 1 else 0.52
    axes.set_position((box.x0, box.y0, column - box.x0, box.height))
    ordered = sorted(points, key=lambda n: points[n][1])
    places = spread(
        [float(axes.transLimits.transform(points[n])[1]) for n in ordered], 1 / max(len(ordered), 14)
    )
    for name, place in zip(ordered, places, strict=True):
        arm, end = arms[name], axes.transLimits.inverted().transform((1.02, place))
        val = f" (val {arm['val_loss']:.3f})" if arm.get("val_loss") is not None else ""
        text = f"{points[name][1]:.3f}{val}  {label(name)}"
        text += (
            f" [{len(done[name])} of {len(arm['runs'])} runs]" if len(done[name]) < len(arm["runs"]) else ""
        )
        axes.plot(*zip(points[name], end, strict=True), color="#AAAAAA", lw=0.6, clip_on=False, zorder=1)
        weight = "bold" if name in ahead else "normal"
        beside = axes.text(
            1.03,
            place,
            text,
            transform=axes.transAxes,
            va="center",
            size=8,
            color=colour_of(arm),
            weight=weight,
        )
        fit(beside, figure.bbox.width - beside.get_window_extent().x0 - 4)
    return figure


# -- how soon the baseline's loss is reached --------------------------------------------------------------------------


def draw_efficiency(facts: Facts, track: str, found: Mapping[str, Any], results: Results) -> Sheet:
    """Steps, tokens and training seconds until an arm's validation loss is at the baseline's final one; arms that never got
    there say so. The seeds' own are faint."""
    arms, reached, baseline = found["arms"], found["efficiency"], found["roles"]["baseline"]
    flat = {arms[name]["runs"][seed]: result for name, own in results.items() for seed, result in own.items()}
    own: dict[str, list[Mapping[str, float]]] = {}
    for name, arm in arms.items():
        pairs = [s for s in arm["runs"] if s in arms[baseline]["runs"]]
        alone = ({n: {"runs": {s: arms[n]["runs"][s]}} for n in (baseline, name)} for s in pairs)
        seen = [compare_arms.efficiency(one, baseline, flat, facts.tokens_per_step)[name] for one in alone]
        own[name] = [at for at in seen if at]
    there = {name: at for name, at in reached.items() if at and name != baseline}
    finding = "No other arm gets to the baseline's final loss."
    if there:
        first, last = min(there, key=lambda n: there[n]["steps"]), reached[baseline]
        finding = f"First: {short(first, arms[first])}, at step {there[first]['steps']:.0f}"
        finding += f", {there[first]['steps'] / last['steps']:.0%} of the baseline's" if last else ""
        finding += f"; {len(there)} of {len(arms) - 1} other arms get there."
    what, whom = (
        "How soon does each arm reach the baseline's final loss?",
        f"{optimizer(track)}: validation loss on the fixed windows",
    )
    small = (
        "medians over the seeds, paired with the baseline's; an arm is there when half of its seeds are",
    )
    figure, left = page(facts, what, whom, finding, seeds_in(arms), small, size=(8.6, 3.0 + 0.34 * len(arms)))
    left.set_xlabel("training steps  (tokens on top)")
    key(left, efficiency_key(arms))
    name_rows(left, [short(name, arm) for name, arm in arms.items()])
    box, head = left.get_position(), 30 / 72 / figure.get_figheight()
    middle = (box.x0 + RIGHT) / 2
    left.set_position((box.x0, box.y0, middle - box.x0 - 0.015, box.height - head))
    right = another(left)
    right.set_position((middle + 0.015, box.y0, RIGHT - middle - 0.015, box.height - head))
    right.set(
        yticks=range(len(arms)),
        yticklabels=[],
        ylim=left.get_ylim(),
        xlabel="training seconds on this machine",
    )
    right.spines["left"].set_visible(False)
    right.tick_params(axis="y", length=0)
    for axes, unit in ((left, "steps"), (right, "train_s")):
        furthest = max(
            (x[unit] for all_of_them in (reached.values(), *own.values()) for x in all_of_them if x),
            default=1.0,
        )
        axes.set_xlim(0, 1.18 * furthest)
        for y, (name, arm) in enumerate(arms.items()):
            draw_reached(axes, y, arm, reached.get(name), own[name], unit)
    a_step = facts.tokens_per_step
    tokens = left.secondary_xaxis(
        "top", functions=(lambda x: np.multiply(x, a_step), lambda x: np.divide(x, a_step))
    )
    tokens.xaxis.set_major_formatter(
        lambda value, _: f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k" if value else "0"
    )
    tokens.spines["top"].set_visible(False)
    return figure


def draw_reached(
    axes: Axes,
    y: int,
    arm: Mapping[str, Any],
    reached: Mapping[str, float] | None,
    seeds: Sequence[Mapping[str, float]],
    unit: str,
) -> None:
    """An arm's row in one unit: its seeds faint, its median with the figure beside it, or that it never got there."""
    colour = colour_of(arm)
    axes.plot([x[unit] for x in seeds], [y + 0.25] * len(seeds), "o", color=colour, ms=3.2, mew=0, alpha=0.45)
    if reached:
        axes.plot((0, reached[unit]), (y, y), color=colour, lw=1.0, alpha=0.5)
        axes.plot(reached[unit], y, mark_of(arm), color=colour, ms=6.5, zorder=3)
        told, at = (f"{reached[unit]:,.0f}" if unit == "steps" else f"{reached[unit]:.3g} s"), reached[unit]
        some = (
            f"  ({reached['seeds']} of {len(arm['runs'])} seeds)"
            if reached["seeds"] < len(arm["runs"])
            else ""
        )
        axes.annotate(told + some, (at, y), xytext=(6, 4), textcoords="offset points", size=8, color=colour)
    else:
        axes.plot(0.035, y, "x", color=ALERT, ms=7, mew=2, transform=axes.get_yaxis_transform())
        words = f"not reached by {len(arm['runs']) - len(seeds)} of {len(arm['runs'])} seeds"
        axes.text(0.065, y, words, transform=axes.get_yaxis_transform(), va="center", size=8, color=ALERT)


def efficiency_key(arms: Arms) -> list[Line2D]:
    kinds = {bool(arm["ebc"]): arm for arm in arms.values()}
    handles = [
        Line2D(
            [],
            [],
            color=colour_of(arm),
            marker=mark_of(arm),
            lw=1.0,
            label=f"{'with' if ebc else 'without'} EBC",
        )
        for ebc, arm in sorted(kinds.items())
    ]
    return [
        *handles,
        Line2D([], [], color="#333333", marker="o", ms=3.2, mew=0, alpha=0.45, ls="", label="each seed"),
    ]


# -- what EBC costs in time -------------------------------------------------------------------------------------------


def draw_overhead(
    facts: Facts, found: Mapping[str, Mapping[str, Any]], measured: Arms, results: Results
) -> Sheet | None:
    """EBC's overhead with its quartiles against the limit, and the share of each EBC arm's time that went into its probes.

    `found`: the finals' tracks; `measured`: track -> its overhead's result. None where nothing was measured.
    """
    limit = verdict.overhead_limit(facts.scale)
    rows: list[
        tuple[str, float, Sequence[float], bool]
    ] = []  # what, %, quartiles or seeds, whether it is the overhead
    for track, decided in found.items():
        whose = f"{optimizer(track)}, " if len(found) > 1 else ""
        result = measured.get(track, {})
        if result.get("overhead_pct") is not None:
            rows.append(
                (f"{whose}overhead", result["overhead_pct"], result.get("overhead_iqr_pct") or (), True)
            )
        for name, arm in decided["arms"].items():
            shares = (
                [r["probe_pct"] for r in results[name].values() if r.get("probe_pct") is not None]
                if arm["ebc"]
                else []
            )
            if shares:
                rows.append(
                    (f"{whose}probes of {short(name, arm)}", statistics.median(shares), shares, False)
                )
    if not rows:
        return None
    overheads = [row for row in rows if row[3]]
    finding = "The overhead was not measured."
    if overheads:
        name, value, quartiles, _ = max(overheads, key=lambda row: row[1])
        finding = f"{f'{name[:-10]}: ' if len(found) > 1 else ''}{value:.1f}% of a step's time"
        finding += f" (quartiles {quartiles[0]:.1f} to {quartiles[1]:.1f})" if quartiles else ""
        finding += f", {'within' if value <= limit else 'above'} the limit of {limit:g}%."
    pairs = [str(result["pairs"]) for result in measured.values() if result.get("pairs")]
    small = (f"overhead: {' and '.join(pairs)} pairs of timed runs, with and without EBC",) if pairs else ()
    whom = (
        " and ".join(optimizer(track) for track in found)
        + ": a step's time with EBC over one without, and the time in its probes"
    )
    what = "What does EBC cost in time?"
    seeds = seeds_in({n: arm for decided in found.values() for n, arm in decided["arms"].items()})
    figure, axes = page(facts, what, whom, finding, seeds, small, size=(8.6, 2.4 + 0.36 * len(rows)))
    axes.set_xlabel("share of a step's time without EBC (overhead), of the run's time (probes), %")
    line = axes.axvline(
        limit, color=ALERT, ls="--", lw=1.4, zorder=3, label=f"limit for the overhead: {limit:g}%"
    )
    handles: list[Any] = [line, Patch(fc=EBC, label="overhead, with its quartiles")]
    handles.append(Patch(fc="white", ec=EBC, hatch="///", label="time in probes, with each seed"))
    for y, (_, value, others, whole) in enumerate(rows):
        look: dict[str, Any] = {"color": EBC} if whole else {"fc": "white", "ec": EBC, "hatch": "///"}
        axes.barh(y, value, 0.5, **look)
        if whole and others:
            axes.plot(others, (y, y), color="black", lw=1.4, marker="|", ms=9, mew=1.4)
        elif not whole:
            axes.plot(others, [y] * len(others), "o", color="#333333", ms=3.2, mew=0, alpha=0.6)
        end = max((value, *others))
        told = axes.annotate(
            f"{value:.1f}%", (end, y), xytext=(8, 0), textcoords="offset points", va="center", size=8.5
        )
        told.set(bbox={"fc": "white", "ec": "none", "pad": 1.5}, zorder=4)
    low = min(0.0, *(min((row[1], *row[2])) for row in rows))
    axes.set_xlim(1.1 * low, 1.15 * max(limit, *(max((row[1], *row[2])) for row in rows)))
    key(axes, handles)
    name_rows(axes, [row[0] for row in rows])
    return figure

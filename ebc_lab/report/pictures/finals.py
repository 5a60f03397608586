"""The final arms side by side: what holding updates back costs, how soon the baseline's loss is reached,
EBC's time.

Their paired differences in test loss are `forest`'s.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ebc_lab.study.stages import compare_arms, verdict

from ..text.words import optimizer, short
from .arm import Rival, colour_of, draw_clip, draw_kl, draw_loss, mark_of
from .curves import Run, known, read_results, read_runs
from .ebm import draw_states, states_of
from .forest import draw_finals
from .mechanism import Tightness, draw_groups, draw_tightness, tightness_of
from .overlaid import course_of, draw_overlaid
from .sheet.figure import (
    ALERT,
    EBC,
    GOAL,
    INK,
    PLAIN,
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
    sheet_of,
    tick,
    wrapped,
)
from .sheet.picture import Picture, picture
from .sheet.place import key, name_rows, narrowed, spread
from .suite.windows import strong_looks

MARKS = "osDv^P*X"  # of the tracks
ENDS_WITH_LETTERS = 0.93  # of a phone's width, where axes end whose points have letters beside them
COLUMN, NARROW = (
    0.6,
    0.52,
)  # of the width, where the labels of arms begin; with several tracks they are longer


def final_pictures(root: Path, facts: Facts, section: str, decisions: Decisions) -> Iterator[Picture]:
    """All final arms together, and each alone. `section`: the stage that compares them."""
    decision = decisions[section]
    tracks = decision["tracks"]
    several = len(tracks) > 1
    arms = {name: arm for track_decision in tracks.values() for name, arm in track_decision["arms"].items()}
    results = {name: read_results(root, arm) for name, arm in arms.items()}
    for track, track_decision in tracks.items():
        tail = f"_{track}" * several
        own_results = {name: results[name] for name in track_decision["arms"]}
        yield from _overlaid(root, facts, track, track_decision, f"curves{tail}")
        of_track = (track, track_decision, own_results)
        yield from picture(f"finals{tail}", "verdict", facts, draw_finals, *of_track, decision["rule"])
        yield from picture(f"efficiency{tail}", section, facts, draw_efficiency, *of_track)
    yield from picture("pareto", section, facts, draw_pareto, arms, results)
    measured = overheads_of(root, decision)
    yield from picture("overhead", section, facts, draw_overhead, tracks, measured, results)
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
            names = {name: short(name, track_decision["arms"][name]) for name in tight}
            of = (track, names, track_decision["arms"], tight)
            yield from picture("tightness" + f"_{track}" * several, section, facts, draw_tightness, *of)


def _overlaid(
    root: Path, facts: Facts, track: str, decision: Mapping[str, Any], name: str
) -> Iterator[Picture]:
    """The final arms' loss curves over each other, those with EBC in strong colours; none where no run
    completed."""
    named = {short(name, arm): course_of(root, arm) for name, arm in decision["arms"].items()}
    courses = {label: course for label, course in named.items() if course}
    if not courses:
        return
    ebc = [label for label, course in courses.items() if course.arm["ebc"]]
    baseline = decision["roles"]["baseline"]
    whom = f"{optimizer(track)}: the final arms over each other, those with EBC in colour"
    looks = strong_looks(list(courses), ebc)
    named_too = short(baseline, decision["arms"][baseline])
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


def overheads_of(root: Path, decision: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Track -> the result of its measured overhead."""
    runs = [m["run_id"] for m in decision.get("measurements", ()) if m.get("role") == "overhead"]
    tracks = decision["tracks"]
    return {t: known(root, run) for run in runs for t in tracks if run.startswith(f"overhead_{t}_")}


def seeds_in(arms: Arms) -> int:
    return max((len(arm["runs"]) for arm in arms.values()), default=0)


# -- loss against mean c -------------------------------------------------------------------------------------


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The arms that no other one dominates, by (mean c, loss): with a c at least as high and a loss at least
    as low."""

    def beaten(c: float, loss: float) -> bool:
        return any(c2 >= c and loss2 <= loss and (c2, loss2) != (c, loss) for c2, loss2 in points.values())

    return sorted((name for name, at in points.items() if not beaten(*at)), key=lambda name: points[name])


def draw_pareto(facts: Facts, arms: Arms, results: Results) -> Sheet:
    """Test loss against mean c of the final arms: means over the seeds, the seeds faint, the front of
    undominated arms.

    Labels stand in a column beside the axes, in the order of the points, because plain arms share c = 1.
    """
    tracks = sorted({arm["track"] for arm in arms.values()})
    done = {name: [r for r in by_seed.values() if _has_test_loss(r)] for name, by_seed in results.items()}
    points = {
        n: (_mean(by_seed, "c_mean"), _mean(by_seed, "test_loss")) for n, by_seed in done.items() if by_seed
    }

    def label(name: str) -> str:
        whose = f"{optimizer(arms[name]['track']).removesuffix(' projection')}, " if len(tracks) > 1 else ""
        return whose + short(name, arms[name])

    labels = {name: label(name) for name in arms}
    ahead = front(points)
    gone = "; ".join(f"{labels[n]}: no run completed" for n in arms if n not in points)
    what = "What does it cost to hold the updates back?"
    whom = f"{optimizer(tracks[0])}: e" if len(tracks) == 1 else "E"
    whom += "very final arm's test loss against its mean clip coefficient"
    figure, axes = page(facts, what, whom, _front_finding(points, ahead, labels), seeds_in(arms), alert=gone)
    axes.set_xlabel("mean clip coefficient c over all steps (1 = every update applied whole)")
    axes.set_ylabel("test loss, whole split (nats per token)")
    for name in points:
        colour, mark = colour_of(arms[name]), MARKS[tracks.index(arms[name]["track"]) % len(MARKS)]
        x, y = [r["c_mean"] for r in done[name]], [r["test_loss"] for r in done[name]]
        axes.plot(x, y, color=colour, **{**SEED, "marker": mark})
        face = colour if arms[name]["ebc"] else "white"
        axes.plot(*points[name], mark, ms=7, color=colour, mfc=face, mew=1.5, zorder=3)
    line = zip(*(points[name] for name in ahead), strict=True) if ahead else ((), ())
    axes.plot(*line, color=GOAL, ls=":", lw=1.4, zorder=1)
    axes.margins(0.08)
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # fixed, so that the leader lines do not move them
    best_at = f"front{' (bold)' * (not facts.phone)}: no other arm has so low a loss at so high a c"
    handles = [
        entry("without EBC", PLAIN, marker="o", mfc="white", mew=1.5, ls=""),
        entry("with EBC", EBC, marker="o", ls=""),
        entry("each seed", **SEED),
        entry(best_at, GOAL, ls=":", lw=1.4),
    ]
    key(axes, handles)
    narrowed(axes, COLUMN if len(tracks) == 1 else NARROW)
    for name in points:
        if len(done[name]) < len(arms[name]["runs"]):
            labels[name] += f" [{len(done[name])} of {len(arms[name]['runs'])} runs]"
    _label_points(axes, arms, points, labels, ahead)
    return figure


def _has_test_loss(result: Mapping[str, Any]) -> bool:
    return result.get("outcome") == "completed" and result.get("test_loss") is not None


def _mean(results: Sequence[Mapping[str, Any]], name: str) -> float:
    return statistics.fmean(r[name] for r in results)


def _front_finding(
    points: Mapping[str, tuple[float, float]], ahead: Sequence[str], labels: Mapping[str, str]
) -> str:
    if not points:
        return "No run completed."
    best = min(points, key=lambda n: points[n][1])
    finding = f"Lowest test loss: {points[best][1]:.3f}, {labels[best]}. "
    if len(ahead) > 3:
        return f"{finding}{len(ahead)} arms lie on the front, up to {labels[ahead[-1]]}."
    others = "; ".join(labels[name] for name in ahead if name != best)
    return finding + (f"On the front too: {others}." if others else "It is the front by itself.")


def _label_points(
    axes: Axes,
    arms: Arms,
    points: Mapping[str, tuple[float, float]],
    labels: Mapping[str, str],
    ahead: Sequence[str],
) -> None:
    """A label for each point, in a column right of the axes, with a line that leads to it; on a phone a
    letter, which the key explains."""
    figure = sheet_of(axes)
    ordered = sorted(points, key=lambda n: points[n][1])
    wanted = [float(axes.transLimits.transform(points[n])[1]) for n in ordered]
    explained = []
    for i, (name, place) in enumerate(zip(ordered, spread(wanted, 1 / max(len(ordered), 14)), strict=True)):
        arm, end = arms[name], axes.transLimits.inverted().transform((1.02, place))
        val = f" (val {arm['val_loss']:.3f})" if arm.get("val_loss") is not None else ""
        text = f"{points[name][1]:.3f}{val}  {labels[name]}"
        axes.plot(*zip(points[name], end, strict=True), color="#AAAAAA", lw=0.6, clip_on=False, zorder=1)
        look: dict[str, Any] = {"va": "center", "size": SMALL, "color": colour_of(arm)}
        look["weight"] = "bold" if name in ahead else "normal"
        if figure.phone:
            letter = ascii_lowercase[i % len(ascii_lowercase)]
            axes.text(1.03, place, letter, transform=axes.transAxes, **look)
            ahead_too = ", on the front" * (name in ahead)
            face = colour_of(arm) if arm["ebc"] else "white"
            mark: dict[str, Any] = {"marker": "o", "mfc": face, "mew": 1.5, "ls": ""}
            explained.append(entry(f"{letter}  {text}{ahead_too}", colour_of(arm), **mark))
        else:
            beside = axes.text(1.03, place, text, transform=axes.transAxes, **look)
            wrapped(beside, figure.bbox.width - beside.get_window_extent().x0 - 4)
    if figure.phone:
        panel = figure.panels[axes]
        panel.right = ENDS_WITH_LETTERS
        panel.handles = [*explained, *panel.handles]


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
    figure, left = page(facts, what, whom, _first_there(decision), seeds_in(arms), small, size=size)
    left.set_xlabel("training steps  (tokens on top)")
    names = [short(name, arm) for name, arm in arms.items()]
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
    finding = f"First: {short(first, arms[first])}, at step {there[first]['steps']:.0f}"
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


# -- what EBC costs in time ----------------------------------------------------------------------------------


OF_OVERHEAD, OF_PROBES = "a step’s time without EBC", "the run’s training time"  # the two denominators
Share = tuple[str, float, Sequence[float], bool]  # what, %, quartiles or seeds, whether it is the overhead


def draw_overhead(facts: Facts, decisions: Decisions, measured: Arms, results: Results) -> Sheet | None:
    """EBC's overhead with its quartiles against the limit, and the share of each EBC arm's time spent in its
    probes.

    `found`: the finals' tracks; `measured`: track -> its overhead's result. None where nothing was measured.
    """
    limit = verdict.overhead_limit(facts.scale)
    rows = _shares(decisions, measured, results)
    if not rows:
        return None
    pairs = [str(result["pairs"]) for result in measured.values() if result.get("pairs")]
    small = (f"overhead: {' and '.join(pairs)} pairs of timed runs, with and without EBC",) if pairs else ()
    whom = " and ".join(optimizer(track) for track in decisions)
    whom += ": a step's time with EBC over one without, and the time in its probes"
    seeds = max(seeds_in(decided["arms"]) for decided in decisions.values())
    finding = _overhead_finding(rows, limit, len(decisions) > 1)
    size = (8.6, 2.4 + 0.45 * len(rows))
    figure, axes = page(facts, "What does EBC cost in time?", whom, finding, seeds, small, size=size)
    axes.set_xlabel("%, of what stands under each name")
    label = f"limit for the overhead: {limit:g}%"
    handles: list[Any] = [axes.axvline(limit, color=ALERT, ls="--", lw=1.4, zorder=3, label=label)]
    handles.append(Patch(fc=EBC, label="overhead, with its quartiles"))
    handles.append(Patch(fc="white", ec=EBC, hatch="///", label="time in probes, with each seed"))
    for y, (_, value, others, overhead) in enumerate(rows):
        look: dict[str, Any] = {"color": EBC} if overhead else {"fc": "white", "ec": EBC, "hatch": "///"}
        axes.barh(y, value, 0.5, **look)
        if overhead and others:
            axes.plot(others, (y, y), color="black", lw=1.4, marker="|", ms=9, mew=1.4)
        elif not overhead:
            axes.plot(others, [y] * len(others), color=INK, **{**SEED, "alpha": 0.6})
        place = {"xytext": (8, 0), "textcoords": "offset points", "va": "center", "size": SMALL}
        note = axes.annotate(f"{value:.1f}%", (max((value, *others)), y), **place)  # type: ignore[arg-type]
        note.set(bbox={"fc": "white", "ec": "none", "pad": 1.5}, zorder=4)
    low = min(0.0, *(min((row[1], *row[2])) for row in rows))
    axes.set_xlim(1.1 * low, 1.15 * max(limit, *(max((row[1], *row[2])) for row in rows)))
    key(axes, handles)
    name_rows(axes, [f"{name}\n% of {OF_OVERHEAD if it else OF_PROBES}" for name, _, _, it in rows])
    return figure


def _shares(verdict: Decisions, measured: Arms, results: Results) -> list[Share]:
    rows: list[Share] = []
    for track, decided in verdict.items():
        whose = f"{optimizer(track)}, " if len(verdict) > 1 else ""
        result = measured.get(track, {})
        if result.get("overhead_pct") is not None:
            quartiles = result.get("overhead_iqr_pct") or ()
            rows.append((f"{whose}overhead", result["overhead_pct"], quartiles, True))
        for name, arm in decided["arms"].items():
            of_arm = results[name].values() if arm["ebc"] else ()
            shares = [r["probe_pct"] for r in of_arm if r.get("probe_pct") is not None]
            if shares:
                probes = f"{whose}probes of {short(name, arm)}"
                rows.append((probes, statistics.median(shares), shares, False))
    return rows


def _overhead_finding(rows: Sequence[Share], limit: float, several: bool) -> str:
    overheads = [row for row in rows if row[3]]
    if not overheads:
        return "The overhead was not measured."
    name, value, quartiles, _ = max(overheads, key=lambda row: row[1])
    finding = f"{name.removesuffix(', overhead')}: " if several else ""
    finding += f"{value:.1f}% of a step's time without EBC"
    finding += f" (quartiles {quartiles[0]:.1f} to {quartiles[1]:.1f})" if quartiles else ""
    return f"{finding}, {'within' if value <= limit else 'above'} the limit of {limit:g}%."

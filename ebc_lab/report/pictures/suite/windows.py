"""What a suite's sweeps show: the loss against the learning rate and against δ*, with each arm's window, and
the regrets of settings that were chosen at another size; and of arms that were tuned over a learning rate of
their own, these curves over each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from ebc_lab.study.stages.statistics import WINDOW_NATS, in_octaves, level
from ebc_lab.study.stages.suite import SAME_NATS

from ...text.words import largest_regrets, optimizer, regrets_of, rules_among
from ..decisions import COLOURS, RING, TRACKS
from ..forest import missing, signed
from ..sheet.figure import (
    ALERT,
    EBC,
    GREY,
    INK,
    MOST_LINES,
    REST,
    SEED,
    SMALL,
    STRONG,
    Facts,
    Sheet,
    another,
    entry,
    log_axis,
    page,
    sheet_of,
)
from ..sheet.picture import Picture, picture
from ..sheet.place import beside, key, lowered, name_rows, stack

WITHIN = f"within {WINDOW_NATS:g} nats of the arm's own best"
RATE = f"learning rate at its peak (log scale); bars: the LR windows, {WITHIN}"
Sweep = Mapping[str, Any]  # of one arm over one setting
Look = tuple[str, str, str]  # colour, marker, line
MOST_NATS = 1.0  # above the lowest loss: the axis ends there, and what lies higher leaves the frame
LABELS_FROM = 0.68  # of the width: the lines' labels stand beyond it
CHARACTER = 0.0066  # of the width: one of a label
LEAST_FROM, MOST_FROM = 0.6, 0.8  # where labels of any length begin
ROW = 0.26  # inches that one row of windows takes
LOST: dict[str, Any] = {"ls": "", "marker": "x", "ms": 7, "mew": 1.8}  # a seed that diverged
STOPPED: dict[str, Any] = {"ls": "", "marker": "D", "ms": 5, "mew": 1.4, "mfc": "none"}  # that was raced
PALE = (  # the looks of arms beside those that are asked about
    ("#4D4D4D", "s", "--"),
    ("#A98600", "D", "-."),
    ("#8A6FA8", "v", ":"),
    ("#7A7A7A", "^", "--"),
    ("#5E8C8C", "P", "-."),
    ("#9C6B53", "*", ":"),
    ("#8F8F8F", "X", "--"),
)


def window_pictures(
    facts: Facts, track: str, decision: Mapping[str, Any], tail: str = ""
) -> Iterator[Picture]:
    """Draw what a track's sweeps and transfers show, where it has any. `tail`: of the pictures' names."""
    sweeps = decision.get("windows", {})
    of_rate = {name: sweep["lr_scale"] for name, sweep in sweeps.items() if "lr_scale" in sweep}
    of_delta = {name: sweep["delta"] for name, sweep in sweeps.items() if "delta" in sweep}
    if of_rate:
        of = (track, decision, of_rate)
        yield from picture(f"lr_windows{tail}", "verdict", facts, draw_rates, *of)
    if of_delta:
        of = (track, decision, of_delta)
        yield from picture(f"delta_windows{tail}", "verdict", facts, draw_deltas, *of)
    if decision.get("transfer"):
        yield from picture(f"transfer{tail}", "verdict", facts, draw_transfer, track, decision)


# -- sweeps --------------------------------------------------------------------------------------------------


def draw_rates(facts: Facts, track: str, decision: Mapping[str, Any], sweeps: Mapping[str, Sweep]) -> Sheet:
    """Test loss against the learning rate, a line for each arm, and under it each arm's window as a bar."""
    what = "Over how many octaves of the learning rate does the loss stay near its best?"
    widest = max(sweeps, key=lambda name: _octaves(sweeps[name]))
    finding = f"Widest window: {widest}, {in_octaves(sweeps[widest]['window'])}"
    size = (10.0, 5.6 + ROW * len(sweeps))
    figure, bottom = _page(facts, track, decision, sweeps, (what, finding), size)
    top = another(bottom)
    looks = _looks(list(sweeps), [name for name, sweep in sweeps.items() if sweep["points"][0]["delta_star"]])
    for axes in (top, bottom):
        log_axis(axes, "x")
    _draw_losses(top, sweeps, looks, "lr", "test loss")
    bottom.set_xlim(top.get_xlim())
    top.tick_params(labelbottom=False)
    bottom.set_xlabel(RATE)
    _key(bottom, sweeps, bars=False)
    rows = ROW * len(sweeps)
    stack((top, bottom), (max(1.0, figure.get_figheight() - 3.2 - rows), rows), 12, LABELS_FROM)
    _draw_windows(bottom, sweeps, looks)
    beside(top, _labels(sweeps, looks, "lr"))
    return figure


def draw_deltas(facts: Facts, track: str, decision: Mapping[str, Any], sweeps: Mapping[str, Sweep]) -> Sheet:
    """Test loss against the δ* that runs start from, a line for each arm, a panel for each size of run."""
    shapes = list(dict.fromkeys(own["shape"] for own in sweeps.values()))
    what = "How much does the δ* that a run starts from matter?"
    judged = rules_among(sweeps)
    good = [name for name, own in judged.items() if own["every_start"]]
    finding = (
        f"Every start ends within {SAME_NATS:g} nats of the best fixed δ*: {', '.join(good) or 'no rule'}"
    )
    if not judged:
        name, own = next(iter(sweeps.items()))
        finding = f"{name}: {in_octaves(own['window'])} of δ*"
    size = (10.0, 2.6 + 2.6 * len(shapes))
    figure, last = _page(facts, track, decision, sweeps, (what, finding), size)
    panels = [*(another(last) for _ in shapes[1:]), last]
    last.set_xlabel("δ* at the start, nats per token (log scale)")
    _key(last, sweeps)
    if len(shapes) > 1:  # room for the first panel's title
        lowered(last, 16.0)
    stack(panels, [1.0] * len(panels), 34, LABELS_FROM)
    for shape, axes in zip(shapes, panels, strict=True):
        own = {name: sweep for name, sweep in sweeps.items() if sweep["shape"] == shape}
        if len(shapes) > 1:
            axes.set_title(shape or "the usual length", loc="left", size=SMALL, color=INK)
        log_axis(axes, "x")
        looks = _looks(list(own), list(own)[:1])
        _draw_losses(axes, own, looks, "delta_star", "test loss")
        beside(axes, _labels(own, looks, "delta_star"))
    return figure


def draw_tuned(
    facts: Facts, curves: Mapping[str, Mapping[str, Any]], looks: Mapping[str, Look], mine: Sequence[str]
) -> Sheet:
    """Validation loss against the learning rate of every arm that was tuned over one of its own, with the
    windows under it and the chosen points marked.

    `curves`: what `tune` decided of each arm that has a `curve`; `looks`: how each one's line is drawn;
    `mine`: the arms that the study asks about.
    """
    sweeps = {label: _as_sweep(label, curve) for label, curve in curves.items()}
    order = sorted(sweeps, key=lambda name: (name not in mine, _loss(curves[name]), name))
    named = order[:MOST_LINES]
    looks = {**looks, **dict.fromkeys(order[MOST_LINES:], (REST, ".", "-"))}
    shown = {name: sweeps[name] for name in order}
    what = "Which learning rate suits each arm, and how much of it?"
    seeds = max((len(p["seeds"]) for curve in sweeps.values() for p in curve["points"]), default=1)
    whom = "Validation loss of every arm over learning rates of its own, its other settings as chosen"
    size = (10.0, 5.6 + ROW * len(named))
    # The arms asked about beside the best of the others; without any, the lowest
    named_first = [name for name in order if name in mine]
    named_first += sorted((n for n in order if n not in mine), key=lambda n: _loss(curves[n]))[
        : 1 if mine else 2
    ]
    done = {name: curves[name] for name in named_first if curves[name]["val_loss"] is not None}
    ends = [f"{_best_in_words(name, curve)}, {in_octaves(curve['window'])}" for name, curve in done.items()]
    finding = f"Loss at the chosen rate, and LR window: {'; '.join(ends)}." if ends else "Every run diverged."
    figure, bottom = page(facts, what, whom, finding, seeds, ("stage tune",), size=size)
    top = another(bottom)
    for axes in (top, bottom):
        log_axis(axes, "x")
    _draw_losses(top, shown, looks, "lr", "validation loss", mine)
    bottom.set_xlim(top.get_xlim())
    top.tick_params(labelbottom=False)
    bottom.set_xlabel(RATE)
    for name in named:
        if (chosen := _chosen_rate(curves[name])) is not None:
            top.plot(chosen, curves[name]["val_loss"], **RING)
    handles = [entry("chosen", **RING)]
    if others := len(order) - len(named):
        handles.append(entry(f"{others} other arms", REST, lw=1.4))
    _key(bottom, sweeps, handles, bars=False)
    rows = ROW * len(named)
    labels = [_tuned_end(name, curves[name], looks[name][0]) for name in named if shown[name]["window"]]
    # Where labels beside a picture begin, of its width, so that they fill what is left of it
    most = max(map(len, ([label for *_, label, _ in labels])), default=0)
    start = min(max(0.97 - CHARACTER * most, LEAST_FROM), MOST_FROM)
    stack((top, bottom), (max(1.0, figure.get_figheight() - 3.2 - rows), rows), 12, start)
    _draw_windows(bottom, {name: sweeps[name] for name in named}, looks)
    beside(top, labels)
    return figure


def _as_sweep(label: str, curve: Mapping[str, Any]) -> dict[str, Any]:
    """A tuned arm's curve as the drawing of sweeps takes it."""
    points = [{**p, "value": p["lr"], "arm": label, "loss": p["val_loss"]} for p in curve["curve"]]
    return {"points": points, "window": curve["window"], "regret_x4": None, "chosen": _chosen_rate(curve)}


def _chosen_rate(curve: Mapping[str, Any]) -> float | None:
    """The learning rate that a tuned arm has, the best by its worst seed: not always the lowest mean."""
    return next((p["lr"] for p in curve["curve"] if p["val_loss"] == curve["val_loss"] is not None), None)


def _loss(curve: Mapping[str, Any]) -> float:
    return math.inf if curve["val_loss"] is None else curve["val_loss"]


def strong_looks(names: Sequence[str], mine: Sequence[str]) -> dict[str, Look]:
    """How each arm's line is drawn: strong colours for those asked about, paler ones for the others; all of
    them strong where none is asked about."""
    others = itertools.cycle(TRACKS if not mine else PALE)
    strong = itertools.cycle(STRONG)
    return {name: (next(strong), "o", "-") if name in mine else next(others) for name in names}


def _best_in_words(name: str, curve: Mapping[str, Any]) -> str:
    rate = _chosen_rate(curve)
    return f"{name} {_loss(curve):.3f}" + (f" at {rate:g}" if rate is not None else "")


def _tuned_end(name: str, curve: Mapping[str, Any], colour: str) -> tuple[float, float, str, str]:
    """The end of an arm's line, with its label."""
    last = [p for p in curve["curve"] if p["val_loss"] is not None][-1]
    return last["lr"], last["val_loss"], _best_in_words(f"{name} best", curve), colour


def _page(
    facts: Facts,
    track: str,
    decision: Mapping[str, Any],
    sweeps: Mapping[str, Sweep],
    question: tuple[str, str],
    size: tuple[float, float],
) -> tuple[Sheet, Axes]:
    """The header of a picture of sweeps. `said`: what it shows, and what was found."""
    seeds = max(len(p["seeds"]) for sweep in sweeps.values() for p in sweep["points"])
    whom = f"{optimizer(track)}: test loss, mean of the seeds"
    arms = {p["arm"]: decision["arms"][p["arm"]] for sweep in sweeps.values() for p in sweep["points"]}
    return page(facts, question[0], whom, f"{question[1]}.", seeds, (), missing(arms), size)


def _looks(names: Sequence[str], first: Sequence[str]) -> dict[str, Look]:
    """How each arm's line is drawn; those of `first` as EBC is."""
    others = itertools.cycle(look for look in TRACKS if look[0] != EBC)
    looks = {name: (EBC, "o", "-") if name in first else next(others) for name in names}
    return looks


def _octaves(sweep: Sweep) -> float:
    return sweep["window"]["octaves"] if sweep["window"] else -1.0


def _key(axes: Axes, sweeps: Mapping[str, Sweep], more: Sequence[Any] = (), bars: bool = True) -> None:
    """`bars`: whether the windows lie among the losses, and not in a panel of their own, which says it."""
    handles = [*more, entry("each seed", GREY, **SEED)]
    if bars:
        handles.append(entry(f"window: {WITHIN}", GREY, lw=5, alpha=0.35))
    points = [p for sweep in sweeps.values() for p in sweep["points"]]
    highest = max((loss for p in points for loss in p["seeds"].values() if loss is not None), default=0.0)
    if highest > _limits(points)[1]:
        handles.append(entry("a seed above the axis", GREY, ls="", marker="^", ms=5))
    if any(p["loss"] is None and not p.get("raced") for p in points):
        handles.append(entry("a seed diverged", GREY, **LOST))
    if any(p.get("raced") for p in points):
        handles.append(entry("stopped: too far behind to win", GREY, **STOPPED))
    key(axes, handles)


def _draw_losses(
    axes: Axes,
    sweeps: Mapping[str, Sweep],
    looks: Mapping[str, Look],
    x: str,
    of: str,
    strong: Container[str] = (),
) -> None:
    """A line for each arm; where a seed diverged or was stopped it is broken, and a cross or an open diamond
    stands at the top, as does a triangle for a seed above it. `of`: which loss; `strong`: the arms whose
    lines are thick."""
    bottom_edge, top_edge = _limits([p for sweep in sweeps.values() for p in sweep["points"]])
    for i, (name, sweep) in enumerate(sweeps.items()):
        colour, marker, line = looks[name]
        at = [p[x] for p in sweep["points"]]
        losses = [math.nan if p["loss"] is None else p["loss"] for p in sweep["points"]]
        width, above = (2.6, 2.8) if name in strong else (1.4, 2.5)
        axes.plot(at, losses, color=colour, ls=line, lw=width, marker=marker, ms=4, zorder=above)
        for p in sweep["points"]:
            seeds = [loss for loss in p["seeds"].values() if loss is not None]
            inside = [loss for loss in seeds if loss <= top_edge]
            axes.plot([p[x]] * len(inside), inside, color=colour, zorder=1.5, **SEED)
            if len(inside) < len(seeds):
                axes.plot(p[x], 0.985, "^", color=colour, ms=5, transform=axes.get_xaxis_transform())
            if p["loss"] is None:
                top = axes.get_xaxis_transform()
                look = STOPPED if p.get("raced") else LOST
                axes.plot(p[x], 0.97 - 0.03 * (i % 8), color=colour, transform=top, **look)
        if sweep["window"] and x == "delta_star":
            ends = [_at(sweep, x, sweep["window"][end]) for end in ("low", "high")]
            limit = sweep["window"]["loss"] + WINDOW_NATS
            axes.plot(ends, [limit] * 2, color=colour, lw=5, alpha=0.35, solid_capstyle="butt")
    axes.set_ylim(bottom_edge, top_edge)
    axes.set_ylabel(f"{of} (nats per token)")


def _limits(points: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Where the axis of the losses ends: around the means, those far above the lowest aside."""
    finite = [p["loss"] for p in points if p["loss"] is not None]
    low = min(finite, default=0.0)
    high = min(max(finite, default=1.0), low + MOST_NATS)
    room = max(high - low, 0.02)
    return low - 0.06 * room, high + 0.12 * room


def _at(sweep: Sweep, x: str, value: float) -> float:
    """Where a value of the swept setting stands on the axis: both are proportional."""
    first = sweep["points"][0]
    return float(first[x] * value / first["value"])


def _draw_windows(axes: Axes, sweeps: Mapping[str, Sweep], looks: Mapping[str, Look]) -> None:
    """A bar for each arm from one end of its window to the other, an arrow where it goes on."""
    axes.grid(axis="y", visible=False)
    axes.set(yticks=[], ylim=(len(sweeps) - 0.5, -0.5), ylabel="LR windows")
    ends = []
    for row, (name, sweep) in enumerate(sweeps.items()):
        colour = looks[name][0]
        span = sweep["window"]
        last = sweep["points"][-1]["lr"]
        if span:
            low, high = (_at(sweep, "lr", span[end]) for end in ("low", "high"))
            axes.plot([low, high], [row] * 2, color=colour, lw=5, alpha=0.35, solid_capstyle="butt")
            best = sweep.get("chosen") or _at(sweep, "lr", span["best"])
            axes.plot(best, row, "|", color=colour, ms=8, mew=2)
            for there, edge, marker in ((span["open_low"], low, "<"), (span["open_high"], high, ">")):
                if there:
                    axes.plot(edge, row, marker, color=colour, ms=6)
            last = high
        ends.append((last, float(row), f"{name}  {in_octaves(span)}", colour))
    if sheet_of(axes).phone:
        name_rows(axes, [label for *_, label, _ in ends])
    else:
        beside(axes, ends)


def _labels(
    sweeps: Mapping[str, Sweep], looks: Mapping[str, Look], x: str
) -> list[tuple[float, float, str, str]]:
    """Return a label for each line, beside its last finite point: its arm, and what was found of it."""
    ends = []
    for name, sweep in sweeps.items():
        points = [p for p in sweep["points"] if p["loss"] is not None]
        if points:
            finding = _found_of_rate(sweep) if x == "lr" else _found_of_delta(name, sweep)
            ends.append((points[-1][x], points[-1]["loss"], f"{name}  {finding}", looks[name][0]))
    return ends


def _found_of_rate(sweep: Sweep) -> str:
    regret = sweep["regret_x4"]
    further = f", {signed(regret)} at ×4 of it" if regret is not None else ""
    return f"best {sweep['window']['loss']:.3f}{further}"


def _found_of_delta(name: str, sweep: Sweep) -> str:
    octaves = in_octaves(sweep["window"])
    if sweep.get("yardstick") in (None, name):
        return octaves
    return f"worst start {signed(sweep['worst'])}" if sweep["worst"] is not None else "a start diverged"


# -- transfer ------------------------------------------------------------------------------------------------


def draw_transfer(facts: Facts, track: str, decision: Mapping[str, Any]) -> Sheet:
    """The regret of each arm that kept its settings, at each size, beside the plain optimizer tuned there."""
    arms = decision["arms"]
    rows = [(size, label) for size in decision["transfer"] for label in size["kept"]]
    seeds = max(len(arms[label]["runs"]) for _, label in rows)
    whom = f"{optimizer(track)}: test loss minus that of the plain optimizer tuned again at that size"
    height = 2.6 + 0.42 * len(rows)
    shown = {label: arms[label] for _, label in rows}
    what = "Do settings that were chosen at one size serve at another?"
    regrets = _worst_regrets(decision)
    figure, axes = page(facts, what, whom, regrets, seeds, (), missing(shown), (10.0, height))
    axes.set_xlabel("regret, nats per token (left is better)")
    axes.grid(axis="y", visible=False)
    axes.axvline(0, color=INK, lw=1.0)
    key(axes, _transfer_key(rows, arms))
    name_rows(axes, [arms[label]["about"] for _, label in rows])
    for row, (_, label) in enumerate(rows):
        _draw_regret(axes, row, arms[label])
    return figure


def _worst_regrets(decision: Any) -> str:
    """The largest mean regret with EBC and of the plain optimizer."""
    sentences = []
    worst = largest_regrets(regrets_of(decision), decision["arms"])
    for words, ebc in (("EBC", True), ("the plain optimizer", False)):
        if ebc in worst:
            label, regret = worst[ebc]
            sentences.append(f"of {words} {signed(regret)} ({label})")
    return f"Largest regret {', '.join(sentences)}." if sentences else "No regret is known."


def _transfer_key(rows: Sequence[tuple[Any, str]], arms: Mapping[str, Any]) -> list[Any]:
    kinds = {bool(arms[label]["ebc"]) for _, label in rows}
    sure = level(arms[label]["difference"] for _, label in rows)
    handles = [
        entry(words if True in kinds else "mean", colour, marker=marker, ls="-", lw=1.6)
        for words, ebc, colour, marker in (("EBC", True, EBC, "o"), ("plain", False, COLOURS[0], "s"))
        if ebc in kinds
    ]
    return [*handles, entry(f"its own {sure} interval", GREY, lw=1.6)]


def _draw_regret(axes: Axes, row: int, arm: Mapping[str, Any]) -> None:
    difference = arm["difference"] or {}
    colour, marker = (EBC, "o") if arm["ebc"] else (COLOURS[0], "s")
    if difference.get("mean") is None:
        cause = "diverged" if difference.get("diverged") else "no pair of seeds"
        axes.text(0.5, row, cause, transform=axes.get_yaxis_transform(), color=ALERT, size=SMALL, va="center")
        return
    if difference["low"] is not None:
        axes.plot([difference["low"], difference["high"]], [row] * 2, color=colour, lw=1.6)
    axes.plot(difference["mean"], row, marker, color=colour, ms=6)

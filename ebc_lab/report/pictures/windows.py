"""The loss against the learning rate and against δ*, of the arms that a suite sweeps, with each arm's window;
and of arms that were tuned over a learning rate of their own, these curves over each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes

from ebc_lab.study.stages.statistics import WINDOW_NATS, in_octaves
from ebc_lab.study.stages.suite import SAME_NATS

from ..text.words import optimizer, plural, rules_among, signed
from .drawing.curves import missing
from .drawing.looks import GREY, REST, RING, SEED, Look
from .drawing.losses import WINDOW_ROW, WITHIN, ceiling_of, draw_windows, where_it_ends, widest_in_words
from .drawing.sheet import MOST_LINES, End, Facts, Picture, Sheet, entry, log_axis

RATE = "learning rate at its peak (log scale)"
Sweep = Mapping[str, Any]  # of one arm over one setting
LOST: dict[str, Any] = {"ls": "", "marker": "x", "ms": 7, "mew": 1.8}  # a seed that diverged
STOPPED: dict[str, Any] = {"ls": "", "marker": "D", "ms": 5, "mew": 1.4, "mfc": "none"}  # that was raced


def window_pictures(facts: Facts, track: str, decision: Mapping[str, Any], tail: str) -> Iterator[Picture]:
    """Return the pictures of a track's sweeps, where it has any. `tail`: of their names."""
    sweeps = decision.get("windows", {})
    over_rates = {name: sweep["lr_scale"] for name, sweep in sweeps.items() if "lr_scale" in sweep}
    over_targets = {name: sweep["delta"] for name, sweep in sweeps.items() if "delta" in sweep}
    if over_rates:
        draw = partial(draw_rates, track=track, decision=decision, sweeps=over_rates)
        yield Picture(f"lr_windows{tail}", "verdict", draw, facts)
    if over_targets:
        draw = partial(draw_deltas, track=track, decision=decision, sweeps=over_targets)
        yield Picture(f"delta_windows{tail}", "verdict", draw, facts)


# -- sweeps --------------------------------------------------------------------------------------------------


def draw_rates(facts: Facts, track: str, decision: Mapping[str, Any], sweeps: Mapping[str, Sweep]) -> Sheet:
    """Draw test loss against the learning rate, a line for each arm, and under it its window as a bar."""
    windows = {name: _window_at(sweep, "lr") for name, sweep in sweeps.items()}
    what = "Over how many octaves of the learning rate does the loss stay near its best?"
    grid, heights = ("a", "b"), (3.7, 0.9 + WINDOW_ROW * len(sweeps))
    words = (_whom(track), widest_in_words(windows))
    sheet = Sheet(facts, what, words, *_notes(decision, sweeps), grid=grid, heights=heights)
    top = sheet.panels[0]
    looks = {name: facts.look(name) for name in sweeps}
    for axes in sheet.panels:
        log_axis(axes, "x")
    ceiling = _draw_losses(top, sweeps, looks, "lr", "test loss")
    sheet.label(top, _ends(sweeps, looks, "lr", ceiling))
    _draw_window_rows(sheet, windows, looks)
    _explain(sheet, sweeps)
    return sheet


def draw_deltas(facts: Facts, track: str, decision: Mapping[str, Any], sweeps: Mapping[str, Sweep]) -> Sheet:
    """Draw test loss against the δ* that runs start from, a line for each arm, a panel for each size."""
    shapes = list(dict.fromkeys(own["shape"] for own in sweeps.values()))
    judged = rules_among(sweeps)
    good = [name for name, own in judged.items() if own["every_start"]]
    finding = (
        f"Every start ends within {SAME_NATS:g} nats of the best fixed δ*: {', '.join(good) or 'no rule'}"
    )
    if not judged:
        name, own = next(iter(sweeps.items()))
        finding = f"{name}: {in_octaves(own['window'])} of δ*"
    sheet = Sheet(
        facts,
        "How much does the δ* that a run starts from matter?",
        (_whom(track), finding),
        *_notes(decision, sweeps),
        grid=[chr(ord("a") + i) for i in range(len(shapes))],
        heights=[3.6 if len(shapes) == 1 else 2.7] * len(shapes),
    )
    for shape, axes in zip(shapes, sheet.panels, strict=True):
        own = {name: sweep for name, sweep in sweeps.items() if sweep["shape"] == shape}
        if len(shapes) > 1:
            axes.set_title(shape or "the usual length", loc="left")
        log_axis(axes, "x")
        looks = {name: facts.look(name) for name in own}
        ceiling = _draw_losses(axes, own, looks, "delta_star", "test loss")
        sheet.label(axes, _ends(own, looks, "delta_star", ceiling))
    last = sheet.panels[-1]
    last.set_xlabel("δ* at the start, nats per token (log scale)")
    _explain(sheet, sweeps)
    sheet.key(entry(f"window: {WITHIN}", GREY, lw=5, alpha=0.35))
    return sheet


def draw_tuned(facts: Facts, curves: Mapping[str, Mapping[str, Any]], mine: Sequence[str]) -> Sheet:
    """Draw validation loss against the learning rate of every arm that was tuned over one of its own, with
    the windows under it and the chosen points marked.

    `curves`: what `tune` decided of each arm that has a `curve`; `mine`: the arms that the study asks about.
    """
    order = sorted(curves, key=lambda name: (name not in mine, _loss(curves[name]), name))
    named = order[:MOST_LINES]
    sweeps = {name: _as_sweep(name, curves[name]) for name in order}
    shown = [name for name in order if name in mine]
    shown += [name for name in order if name not in mine][: 1 if mine else 2]
    done = [_chosen_in_words(name, curves[name]) for name in shown if curves[name]["val_loss"] is not None]
    finding = f"Loss at the chosen rate: {'; '.join(done)}" if done else "Every run diverged"
    seeds = max((len(p["seeds"]) for sweep in sweeps.values() for p in sweep["points"]), default=1)
    windows = {name: _window_at(sweeps[name], "lr") for name in named if len(sweeps[name]["points"]) > 1}
    sheet = Sheet(
        facts,
        "Which learning rate suits each arm, and how much of it?",
        (
            "Validation loss of every arm over learning rates of its own, its other settings as chosen",
            finding,
        ),
        (plural(seeds, "seed"), "stage tune"),
        grid=("a", "b") if windows else ("a",),
        heights=(3.7, 0.9 + WINDOW_ROW * len(windows)) if windows else (4.4,),
    )
    top = sheet.panels[0]
    looks = {name: facts.look(name) for name in named}
    for axes in sheet.panels:
        log_axis(axes, "x")
    needed = [_loss(curves[name]) for name in shown if math.isfinite(_loss(curves[name]))]
    ceiling = _draw_losses(top, sweeps, looks, "lr", "validation loss", mine, needed)
    for name in named:
        points = {p["lr"]: p["loss"] for p in sweeps[name]["points"] if p["loss"] is not None}
        if (rate := curves[name]["point"]["lr"]) in points:
            top.plot(rate, points[rate], **RING)
        if points:
            label = f"{name}  {_chosen_in_words('best', curves[name])}"
            sheet.label(top, [(*where_it_ends([*points.items()], ceiling), label, looks[name].colour)])
    if windows:
        _draw_window_rows(sheet, windows, looks, {name: curves[name]["point"]["lr"] for name in named})
    else:
        top.set_xlabel(RATE)
    sheet.key(entry("chosen", **RING))
    if others := len(order) - len(named):
        sheet.key(entry(f"{others} other arms", REST, lw=1.4))
    _explain(sheet, sweeps)
    return sheet


def _as_sweep(label: str, curve: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tuned arm's curve as the drawing of sweeps takes it."""
    points = [{**p, "value": p["lr"], "arm": label, "loss": p["val_loss"]} for p in curve["curve"]]
    return {"points": points, "window": curve["window"]}


def _loss(curve: Mapping[str, Any]) -> float:
    return math.inf if curve["val_loss"] is None else curve["val_loss"]


def _chosen_in_words(name: str, curve: Mapping[str, Any]) -> str:
    """Write `best 2.355 at 0.005657`: the rate that a tuned arm has, and its loss over all tuning seeds."""
    return f"{name} {_loss(curve):.3f} at {curve['point']['lr']:g}"


def _whom(track: str) -> str:
    return f"{optimizer(track)}: test loss, mean of the seeds"


def _notes(decision: Mapping[str, Any], sweeps: Mapping[str, Sweep]) -> tuple[list[str], str]:
    """Return what to know of a picture of sweeps, and what is missing of its arms."""
    points = [p for sweep in sweeps.values() for p in sweep["points"]]
    arms = {p["arm"]: decision["arms"][p["arm"]] for p in points}
    return [plural(max(len(p["seeds"]) for p in points), "seed")], missing(arms)


def _window_at(sweep: Sweep, x: str) -> Mapping[str, Any] | None:
    """Return a sweep's window in the unit of the x axis, which is proportional to the swept setting."""
    window, first = sweep["window"], sweep["points"][0]
    if window is None or first[x] is None:
        return None
    scale = first[x] / first["value"]
    return {**window, **{name: scale * window[name] for name in ("low", "high", "best")}}


def _draw_window_rows(
    sheet: Sheet,
    windows: Mapping[str, Mapping[str, Any] | None],
    looks: Mapping[str, Look],
    chosen: Mapping[str, float] = {},
) -> None:
    top, bottom = sheet.panels
    bottom.set_xlim(top.get_xlim())
    top.tick_params(labelbottom=False)
    bottom.set_xlabel(f"{RATE}; bars: the LR windows, {WITHIN}")
    draw_windows(sheet, bottom, windows, looks, chosen)


def _explain(sheet: Sheet, sweeps: Mapping[str, Sweep]) -> None:
    """Explain the marks of a picture of sweeps in the key."""
    points = [p for sweep in sweeps.values() for p in sweep["points"]]
    seeds = [loss for p in points for loss in p["seeds"].values() if loss is not None]
    marks = {
        "a seed above the axis": (
            {"ls": "", "marker": "^", "ms": 5},
            max(seeds, default=0.0) > sheet.panels[0].get_ylim()[1],
        ),
        "a seed diverged": (LOST, any(p["loss"] is None and not p.get("raced") for p in points)),
        "stopped: too far behind to win": (STOPPED, any(p.get("raced") for p in points)),
    }
    sheet.key(entry("each seed", GREY, **SEED))
    sheet.key(*[entry(label, GREY, **look) for label, (look, there) in marks.items() if there])


def _draw_losses(
    axes: Axes,
    sweeps: Mapping[str, Sweep],
    looks: Mapping[str, Look],
    x: str,
    kind: str,
    strong: Sequence[str] = (),
    needed: Sequence[float] = (),
) -> float:
    """Draw a line for each arm; where a seed diverged or was stopped it is broken, and a cross or an open
    diamond stands at the top, as does a triangle for a seed above it. `kind`: which loss; `strong`: the arms
    whose lines are thick; `needed`: losses that the axis shows. An arm without a look is one of the rest.
    -> the highest loss that the axis shows."""
    known = [p["loss"] for sweep in sweeps.values() for p in sweep["points"] if p["loss"] is not None]
    best = [sweep["window"]["loss"] for name, sweep in sweeps.items() if sweep["window"] and name in looks]
    low = min(known, default=0.0)
    high = ceiling_of(known, [*best, *needed]) if known else 1.0
    if x == "delta_star":  # the windows are drawn among the losses
        high = max([high, *(loss + WINDOW_NATS for loss in best)])
    span = max(high - low, 0.02)
    axes.set_ylim(low - 0.06 * span, high + 0.12 * span)
    above = axes.get_ylim()[1]
    top = axes.get_xaxis_transform()
    for i, (name, sweep) in enumerate(sweeps.items()):
        look = looks.get(name)
        colour = look.colour if look else REST
        losses = [math.nan if p["loss"] is None else p["loss"] for p in sweep["points"]]
        style: dict[str, Any] = {"ls": look.line, "marker": look.marker} if look else {"marker": "."}
        width, order = (2.6, 2.8) if name in strong else (1.4, 2.5 if look else 1.4)
        at = [p[x] for p in sweep["points"]]
        axes.plot(at, losses, color=colour, lw=width, ms=4, zorder=order, **style)
        for p in sweep["points"]:
            seeds = [loss for loss in p["seeds"].values() if loss is not None]
            inside = [loss for loss in seeds if loss <= above]
            axes.plot([p[x]] * len(inside), inside, color=colour, zorder=1.5, **SEED)
            if len(inside) < len(seeds):
                axes.plot(p[x], 0.985, "^", color=colour, ms=5, transform=top)
            if p["loss"] is None:
                mark = STOPPED if p.get("raced") else LOST
                axes.plot(p[x], 0.97 - 0.03 * (i % 8), color=colour, transform=top, **mark)
        window = _window_at(sweep, x)
        if window and x == "delta_star":
            limit = sweep["window"]["loss"] + WINDOW_NATS
            ends = (window["low"], window["high"])
            axes.plot(ends, (limit, limit), color=colour, lw=5, alpha=0.35, solid_capstyle="butt")
    axes.set_ylabel(f"{kind} (nats per token)")
    return above


def _ends(sweeps: Mapping[str, Sweep], looks: Mapping[str, Look], x: str, ceiling: float) -> list[End]:
    """Return where each arm's line ends, with its name and what was found of it."""
    ends = []
    for name, sweep in sweeps.items():
        points = [p for p in sweep["points"] if p["loss"] is not None]
        if points:
            finding = _found(name, sweep, x)
            end = where_it_ends([(p[x], p["loss"]) for p in points], ceiling)
            ends.append((*end, f"{name}  {finding}", looks[name].colour))
    return ends


def _found(name: str, sweep: Sweep, x: str) -> str:
    if x == "lr":
        regret = sweep["regret_x4"]
        further = f", {signed(regret, 3)} at ×4 of it" if regret is not None else ""
        return f"best {sweep['window']['loss']:.3f}{further}"
    if sweep.get("yardstick") in (None, name):
        return in_octaves(sweep["window"])
    return f"worst start {signed(sweep['worst'], 3)}" if sweep["worst"] is not None else "a start diverged"

"""Why a fixed KL budget fixes no step: the KL of steps against their length, and the curvature between them.

The columns `applied_kl`, `applied_norm`, `sharpness` and `preconditioned_sharpness` of steps.csv, which
`ebc-lab columns` explains. Drawn where a run recorded its sharpness.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from ebc_lab.records.figures import WARM_STEPS

from ...text.words import optimizer
from ..drawing.curves import Run, by_step, last_point, running_mean, thinned
from ..drawing.looks import GOAL, GREY, INK, RULE, SMALL
from ..drawing.sheet import Arms, Facts, Sheet, entry, log_axis, name_band

EARLY = 1 / 3  # of a run: what is compared between arms comes after it
ALIKE = 1.1  # KLs whose ratio is at most this are one number
COMPARED = 40  # steps of an arm
ROOM = 1.2  # around what is framed, as a factor
DASHES = {"kl": "-", "radius": "--", "pi": "-.", "plain": ":"}
LIMITS = {
    "kl": "fixed δ*",
    "radius": "fixed radius of ‖ΔW‖",
    "pi": "δ moved by a controller",
    "plain": "no limit",
}
SQUARE, LINEAR = 2.0, 1.5  # exponents of KL in ‖ΔW‖: of a fixed curvature, and what is no square any more


@dataclass(frozen=True)
class Steps:
    """An arm's audited steps from `WARM_STEPS` on: running geometric means, the seeds' median."""

    kind: str  # one of DASHES: what limits it
    limit: float  # δ*, the radius or the learning rate: what orders the arms of a kind
    steps: np.ndarray
    kl: np.ma.MaskedArray
    norm: np.ma.MaskedArray  # ‖c·ΔW‖
    measured_at: np.ndarray  # of the sharpness; empty where there is none
    sharpness: np.ma.MaskedArray
    on_edge: np.ma.MaskedArray  # c·lr times the preconditioned sharpness; empty without
    bound: float  # on that, of full-batch Adam

    @property
    def curvature(self) -> np.ma.MaskedArray:
        curvature: np.ma.MaskedArray = self.kl / self.norm**2
        return curvature

    def middle(self, values: np.ma.MaskedArray) -> float:
        """Return the median over all but the first third of the run."""
        later = values[self.steps >= EARLY * self.steps[-1]].compressed()
        return float(np.median(later)) if len(later) else math.nan


def steps_of(runs: Sequence[Run], specs: Mapping[str, Mapping[str, Any]]) -> Steps | None:
    """Return the steps of an arm; None where no run recorded how far an audited step moved the weights."""
    streams = [audits(run.steps) for run in runs if "applied_norm" in run.steps]
    config = next((spec["config"] for spec in specs.values() if "stabilizer" in spec.get("config", {})), None)
    if not any(len(stream["step"]) for stream in streams) or config is None:
        return None
    at, kl = _smooth(streams, "applied_kl")
    norm = _smooth(streams, "applied_norm")[1]
    measured = [_measured(run.steps) for run in runs if "sharpness" in run.steps]
    then, sharpness = _smooth(measured, "sharpness")
    whole = config["stabilizer"]["name"] != "ebc" or config["budget"]["grouping"] != "matrices"
    edge = [s for s in measured if "on_edge" in s and whole]  # else c·lr is not the rate of all weights
    on_edge = _smooth(edge, "on_edge")[1] if edge else np.ma.masked_all(0)
    return Steps(*_kind(config), at, kl, norm, then, sharpness, on_edge, _bound(config))


def audits(steps: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    seen = np.isfinite(steps["applied_norm"]) & (steps["applied_kl"] > 0) & (steps["applied_norm"] > 0)
    rows = seen & (steps["step"] >= WARM_STEPS)
    return {name: steps[name][rows] for name in ("step", "applied_kl", "applied_norm")}


def _measured(steps: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the steps whose sharpness is known and positive, and what the rate makes of it there."""
    rows = (steps["sharpness"] > 0) & (steps["step"] >= WARM_STEPS)
    found = {name: steps[name][rows] for name in ("step", "sharpness")}
    if "preconditioned_sharpness" in steps:
        rate = np.ma.log(np.ma.masked_less_equal(steps["eta_eff"], 0.0))[None]
        typical = np.ma.exp(running_mean(rate)[0]).filled(np.nan)  # c flickers from step to step
        found["on_edge"] = (typical * steps["preconditioned_sharpness"])[rows]
    return found


def _smooth(streams: Sequence[Mapping[str, np.ndarray]], column: str) -> tuple[np.ndarray, np.ma.MaskedArray]:
    steps, table = by_step(streams, column)
    if not len(steps):
        return steps, np.ma.masked_all(0)
    middle = np.ma.median(np.ma.log(np.ma.masked_less_equal(table, 0.0)), axis=0)
    at = thinned(len(steps))
    return steps[at], np.ma.exp(running_mean(running_mean(np.ma.masked_array(middle)[None])))[0][at]


def _kind(config: Mapping[str, Any]) -> tuple[str, float]:
    """Return what limits the steps of a run, and how much."""
    stabilizer = config["stabilizer"]["name"]
    if stabilizer == "ebc":
        fixed = config["controller"]["name"] in ("fixed", "auto")
        return "kl" if fixed else "pi", float(config["budget"]["target_kl"])
    strength = config["stabilizer"].get("strength")
    if stabilizer == "trust_region" and strength is not None:
        return "radius", float(strength)
    return "plain", float(config["optimizer"]["lr"])


def _bound(config: Mapping[str, Any]) -> float:
    """Return Adam's bound on rate × sharpness on a quadratic (Cohen et al., arXiv:2207.14484)."""
    beta = float(config["optimizer"].get("beta1", 0.9))
    return (2 + 2 * beta) / (1 - beta)


def draw_curvature(facts: Facts, track: str, arms: Arms, paths: Mapping[str, Steps]) -> Sheet | None:
    """Draw left the KL of the steps against their length, a path for each arm; right the curvature
    between the two over the run, and under it what the sharpness is, in units of the rate where Adam's was
    measured; None where no run measured the sharpness."""
    if not any(len(path.measured_at) for path in paths.values()):
        return None
    finding = " ".join(f"{text}." for text in (_budgets(paths), _alike(paths), _edge(paths)) if text)
    sheet = Sheet(
        facts,
        _title(paths),
        (f"{optimizer(track)}: audited steps from step {WARM_STEPS} on, medians over the seeds", finding),
        ("running geometric means", "dot: the end of the run"),
        arms=arms,
        grid=("ab", "ac"),
        heights=(3.0, 3.0),
    )
    left, top, bottom = sheet.panels
    left.set_xlabel("‖c·ΔW‖, how far the step moves the weights (log scale)")
    left.set_ylabel("applied KL, nats per token (log scale)")
    bottom.set_xlabel(f"training step  (one step = {facts.tokens_per_step:,} tokens)")
    for axes in sheet.panels:
        log_axis(axes, "y", (1.0, 3.0))
    log_axis(left, "x", (1.0, 2.0, 5.0))
    for label, path in paths.items():
        colour = facts.look(label).colour
        look: dict[str, Any] = {"color": colour, "ls": DASHES[path.kind], "lw": 1.5, "zorder": 2.5}
        left.plot(path.norm, path.kl, **look)
        left.plot(path.norm[-1:], path.kl[-1:], "o", color=colour, ms=5.5, mec="white", mew=0.6, zorder=3)
        top.plot(path.steps, path.curvature, **look)
        bottom.plot(path.measured_at, _lower(path, paths), **look)
        if end := last_point(path.steps, path.curvature):
            sheet.label(top, [(*end, f"{label}  {path.middle(path.curvature):.2g}", colour)])
    framed = _held(paths)
    _frame(left, "x", [path.norm for path in framed])
    _frame(left, "y", [path.kl for path in framed])
    _draw_slopes(left, paths)
    if _on_edge(paths):
        bound = next(path.bound for path in paths.values() if len(path.on_edge))
        bottom.axhline(bound, color=GOAL, lw=1.2, ls="--", zorder=1)
        _frame(bottom, "y", [path.on_edge for path in framed] + [np.ma.masked_array([bound])])
        name_band(bottom, bound, f"{bound:.3g}: the edge of stability of full-batch Adam")
    top.set_ylabel("KL / ‖c·ΔW‖²")
    bottom.set_ylabel("c·lr × preconditioned sharpness" if _on_edge(paths) else "sharpness")
    top.tick_params(labelbottom=False)
    bottom.set_xlim(top.get_xlim())
    there = {path.kind for path in paths.values()}
    sheet.key(*[entry(words, INK, ls=DASHES[k], lw=1.5) for k, words in LIMITS.items() if k in there])
    sheet.key(entry("lines of one curvature, KL / ‖c·ΔW‖²", RULE, ls=":", lw=1.0))
    return sheet


def _frame(axes: Axes, name: str, values: Sequence[np.ma.MaskedArray]) -> None:
    """Show these positive values with some room around them; what lies further off leaves the frame."""
    known = np.concatenate([of_one.compressed() for of_one in values])
    if len(known):
        axes.set(**{f"{name}lim": (known.min() / ROOM, known.max() * ROOM)})


def _held(paths: Mapping[str, Steps]) -> list[Steps]:
    """Return those whose limit stays where it is, or that have none; all where every arm has a controller."""
    return [path for path in paths.values() if path.kind != "pi"] or list(paths.values())


def _on_edge(paths: Mapping[str, Steps]) -> bool:
    return any(len(path.on_edge) for path in paths.values())


def _lower(path: Steps, paths: Mapping[str, Steps]) -> np.ma.MaskedArray:
    if not _on_edge(paths):
        return path.sharpness
    return path.on_edge if len(path.on_edge) else np.ma.masked_all(len(path.measured_at))


def _draw_slopes(axes: Axes, paths: Mapping[str, Steps]) -> None:
    """Draw lines of one curvature, a factor 10 apart, through what is there."""
    every = np.concatenate([path.curvature.compressed() for path in paths.values()])
    xlim, ylim = axes.get_xlim(), axes.get_ylim()
    at = np.array(xlim)
    for power in range(math.floor(math.log10(every.min())), math.ceil(math.log10(every.max())) + 1):
        curvature = 10.0**power
        axes.plot(at, curvature * at**2, color=RULE, lw=1.0, ls=":", zorder=1)
        x = min(xlim[1], math.sqrt(ylim[1] / curvature))
        y = curvature * x**2
        if xlim[0] < x and ylim[0] < y:
            where: dict[str, Any] = {"xytext": (-4, -3), "textcoords": "offset points", "ha": "right"}
            axes.annotate(f"{curvature:g}", (x, y), va="top", color=GREY, size=SMALL, **where)
    axes.set(xlim=xlim, ylim=ylim)


# -- in words ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trend:
    """How KL and length go together from one limit of a kind to the next, between its first and last."""

    longer: float  # ‖c·ΔW‖ of the longest steps over that of the shortest
    exponent: float  # of KL in ‖c·ΔW‖, by least squares of the logarithms: 2 if the curvature were one number

    @property
    def kl(self) -> float:
        """Return the KL of the longest over that of the shortest."""
        return float(self.longer**self.exponent)


def trend_of(paths: Mapping[str, Steps], kind: str) -> Trend | None:
    """Return the trend of the arms of a kind; None for fewer than two, or where steps are of one length."""
    own = [path for path in paths.values() if path.kind == kind]
    points = np.log([(path.middle(path.norm), path.middle(path.kl)) for path in own]).reshape(-1, 2)
    points = points[np.isfinite(points).all(axis=1)]
    if len(points) < 2 or np.ptp(points[:, 0]) < math.log(ALIKE):
        return None
    exponent = np.polyfit(points[:, 0], points[:, 1], 1)[0]
    return Trend(math.exp(np.ptp(points[:, 0])), float(exponent))


def _title(paths: Mapping[str, Steps]) -> str:
    trend = trend_of(paths, "radius") or trend_of(paths, "kl")
    if trend is None:
        return "How does the KL of a step follow its length?"
    grows = f"steps {trend.longer:.2g} times as long have {trend.kl:.2g} times the KL"
    if trend.exponent < LINEAR:
        return f"The curvature follows the step: {grows}, not {trend.longer**SQUARE:.2g} times"
    return f"The curvature hardly depends on the step: {grows}"


def _budgets(paths: Mapping[str, Steps]) -> str:
    trend = trend_of(paths, "kl")
    if trend is None or trend.exponent <= 0:
        return ""
    text = (
        f"From the least δ* to the largest the KL grows {trend.kl:.2g}-fold, the step {trend.longer:.2g}-fold"
    )
    return f"{text}; at one curvature it would grow {math.sqrt(trend.kl):.2g}-fold"


def _alike(paths: Mapping[str, Steps]) -> str:
    """Return the two steps of two arms that are of one KL, and whose lengths are farthest apart."""
    points = [
        (float(n), float(kl), label, int(t))
        for label, path in paths.items()
        for n, kl, t in zip(
            *(x[thinned(len(path.steps), COMPARED)] for x in (path.norm, path.kl, path.steps)), strict=True
        )
        if n is not np.ma.masked and kl is not np.ma.masked
    ]
    two = itertools.permutations(points, 2)
    pairs = [(max(a, b), min(a, b)) for a, b in two if a[2] != b[2] and 1 <= b[1] / a[1] <= ALIKE]
    if not pairs:
        return ""
    far, near = max(pairs, key=lambda pair: pair[0][0] / pair[1][0])
    text = f"The same {math.sqrt(far[1] * near[1]):.2g} nats: ‖c·ΔW‖ = {near[0]:.2g} in {near[2]} "
    return f"{text}(step {near[3]}), {far[0]:.2g} in {far[2]} (step {far[3]})"


def _edge(paths: Mapping[str, Steps]) -> str:
    """Return how far apart the curvatures of the arms are, and what the rate makes of the sharpness."""
    held = _held(paths)
    curvature = [path.middle(path.curvature) for path in held]
    text = "Without a controller the curvature is" if len(held) < len(paths) else "The curvature is"
    text += f" {min(curvature):.2g} to {max(curvature):.2g}"
    edges = [float(np.ma.median(path.on_edge)) for path in held if path.on_edge.count()]
    if edges:
        text += f", and c·lr × the preconditioned sharpness {min(edges):.2g} to {max(edges):.2g}"
    return text

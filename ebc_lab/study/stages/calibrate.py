"""calibrate: which target KL, at a multiple of the best learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

from ebc_lab.config.checks import least_target_kl
from ebc_lab.config.identity import round3
from ebc_lab.config.schema import Config
from ebc_lab.records.figures import RunResult

from .rules import (
    Decision,
    Results,
    band_distance,
    c_median,
    losses_of,
    make_decision,
    margin_sigma,
    nearest_to_band,
    refuse_without_tracks,
    val_loss,
)
from .runs import plain_run, spec_of, tracks_of, waiting, with_ebc
from .spec import RunSpec
from .stage import Figure, Scenario, Stage, Track, runner_up

PUBLISHED_TARGETS = (0.03, 0.05, 0.07)  # nats per token


def runs(config: Config, decisions: Mapping[str, Decision], results: Results) -> list[RunSpec]:
    """The target KL grid of each track and budget, and up to `max_extra` more to bring the median c into the
    band."""
    specs: list[RunSpec] = []
    for name in tracks_of(decisions, "calibrate"):
        track = decisions["lr_sweep"]["tracks"][name]
        for budget in config.calibrate.budgets:
            specs += _runs_of(config, track, budget, results)
    return specs


def _runs_of(config: Config, track: Track, budget: str, results: Results) -> list[RunSpec]:
    """The runs of one track under one budget."""
    settings = config.calibrate
    plain = plain_run(config, track, settings.steps, config.study.stage_seed, settings.lr_scale)
    least = least_target_kl(replace(plain, budget=replace(plain.budget, name=budget)))

    def spec(target_kl: float) -> RunSpec:
        run = with_ebc(plain, track, budget, target_kl)
        return spec_of("calibrate", "ebc", run, settings.lr_scale)

    if settings.delta_grid == "published":
        targets = list(PUBLISHED_TARGETS)
    else:
        targets = [round3(m * track["natural_kl"]) for m in settings.multiples]
    points = [spec(target_kl) for target_kl in sorted({max(t, round3(least)) for t in targets})]
    for _ in range(settings.max_extra):
        if waiting(points, results):
            break
        more = _next_target(points, results, config.study.band)
        if more is None or more < least or any(p.run.budget.target_kl == more for p in points):
            break
        points.append(spec(more))
    return points


def _next_target(points: Sequence[RunSpec], results: Results, band: Sequence[float]) -> float | None:
    """One more target KL to try; None: in the band already, or nothing to go by. c rises with the target."""
    medians = {p.run.budget.target_kl: c_median(results.get(p.run_id)) for p in points}
    known = sorted((target, c) for target, c in medians.items() if c is not None)
    if not known or any(band_distance(c, band) == 0 for _, c in known):
        return None
    # bisect (geometrically) where the band lies between two points, else go beyond the end that is nearer to
    # it
    for (low, c_low), (high, c_high) in pairwise(known):
        if c_low < band[0] and c_high > band[1]:
            return round3(math.sqrt(low * high))
    return round3(known[-1][0] * 2) if known[-1][1] < band[0] else round3(known[0][0] / 2)


def _bound(spec: RunSpec) -> str:
    """What is said of the aggregate behind a surrogate; `l2` bounds nothing, and is labelled so wherever it
    is shown."""
    aggregate = spec.run.budget.aggregate
    if spec.run.budget.name != "surrogate":
        return ""
    return f" ({aggregate}, not a bound)" if aggregate == "l2" else f" ({aggregate})"


def decide(
    config: Config, specs: Sequence[RunSpec], results: Results, earlier: Mapping[str, Decision]
) -> Decision:
    """The target KL (and the budget) of each track: best validation loss with the median c in the band, else
    nearest to the band."""
    low, high = config.study.band
    tracks: dict[str, Any] = {}
    notes: list[str] = []
    for track, swept in earlier["lr_sweep"]["tracks"].items():
        own = [s for s in specs if s.track == track]
        usable = [s for s in own if c_median(results.get(s.run_id)) is not None]
        if not usable:
            continue
        tracks[track] = _decided(config, usable, results, swept)
        if not tracks[track]["in_band"]:
            notes.append(f"{track}: no median c fell into {low:g}–{high:g}; the nearest was taken")
    refuse_without_tracks(tracks, "calibrate", specs, results)
    rule = (
        f"at LR ×{config.calibrate.lr_scale:g}: lowest validation loss among those with median c in "
        f"{low:g}–{high:g}; none inside: bisect or extend by 2, {config.calibrate.max_extra} runs at most, "
        "then the nearest"
    )
    return make_decision("calibrate", rule, config, specs, results, earlier, tracks=tracks, notes=notes)


def _decided(config: Config, usable: Sequence[RunSpec], results: Results, swept: Track) -> dict[str, Any]:
    """What is decided for one track, from its completed runs."""
    band = config.study.band
    inside = [s for s in usable if band_distance(c_median(results[s.run_id]), band) == 0]
    winner = nearest_to_band(usable, results, band)
    by_budget: dict[str, list[RunSpec]] = {}
    for spec in usable:
        by_budget.setdefault(spec.run.budget.name, []).append(spec)
    nearest = {budget: nearest_to_band(own, results, band) for budget, own in by_budget.items()}
    return {
        "budget": winner.run.budget.name,
        "bound": _bound(winner),
        "delta_star": winner.run.budget.target_kl,
        "times_natural": winner.run.budget.target_kl / swept["natural_kl"],
        "lr_scale": winner.lr_scale,
        "run_id": winner.run_id,
        "val_loss": val_loss(results[winner.run_id]),
        "c_median": c_median(results[winner.run_id]),
        "in_band": bool(inside),
        "by_budget": {budget: spec.run.budget.target_kl for budget, spec in nearest.items()},
        "ranked": [s.run_id for s in inside],
        "margin_sigma": margin_sigma(losses_of(inside, results), swept["sigma"]),
        "sigma": swept["sigma"],
    }


def headline(track: Track) -> str:
    outside = "" if track["in_band"] else " (outside the band)"
    return (
        f"δ* {track['delta_star']:g} nats ({track['times_natural']:.2f} × natural) by {track['budget']}"
        f"{track['bound']}, median c {track['c_median']:.2f}{outside}, val {track['val_loss']:.4f}"
    )


def invented(config: Config, scenario: Scenario, spec: RunSpec, nth: int) -> RunResult:
    """The median c falls into the band after the grid and `scenario.extra` more runs."""
    natural = config.calibrate.delta_grid == "natural"
    points = len(config.calibrate.multiples if natural else PUBLISHED_TARGETS)
    return {"c_median": 0.6 if nth >= points - 1 + scenario.extra else 0.1}


def _band(track: Track) -> str:
    return "in the band" if track["in_band"] else "outside the band: the nearest was taken"


STAGE = Stage(
    name="calibrate",
    runs=runs,
    decide=decide,
    headline=headline,
    figures=(
        Figure("budget", "measured by", "{}", lambda track: str(track["bound"]).strip(" ()")),
        Figure(
            "delta_star",
            "KL budget δ*",
            "{:.3g}",
            lambda track: f"nats per step, {track['times_natural']:.2f} × the natural KL",
        ),
        Figure("times_natural"),
        Figure("c_median", "median c", "{:.2f}", _band),
        Figure("val_loss", "validation loss", "{:.4f}", "nats per token"),
    ),
    flips=partial(runner_up, setting="δ* {delta_star:g}"),
    invented=invented,
    title="How large a KL budget",
    about="With EBC, at a raised learning rate: which budget δ* limits the typical step without throttling "
    "it.",
    pictures=("calibrate",),
)

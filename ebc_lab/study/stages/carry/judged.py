"""Which unit's constant serves settings that it was not chosen on: the statistics of the stage carry.

Pure functions of what was measured, arm -> setting -> curve. A constant is chosen by validation losses of
other settings and judged by test losses of the one that was left out.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ebc_lab.config.schema import CarryConfig, UnitConfig
from ebc_lab.records.decisions import (
    BrokenRuns,
    Carried,
    Difference,
    UnitCurve,
    UnitFound,
    UnitPoint,
    UnitSetting,
    UnitsTrack,
)

from ..statistics import paired

Curves = Mapping[str, Mapping[str, UnitCurve]]  # arm -> setting
EARNS, LOSES, NO_GAIN, UNDECIDED = "earns", "loses", "no gain", "undecided"


def track_of(settings: CarryConfig, curves: Curves, divided: int = 1) -> UnitsTrack:
    """Return how every arm fares at the constants that it carries. `divided`: by what the error is."""
    tuned = {arm: by_setting for arm, by_setting in curves.items() if not settings.arms[arm].starts}
    best = {name: best_of(tuned, name) for name in settings.settings}
    carried = {arm: carried_of(settings, curves, arm, best) for arm in settings.arms}
    medians: dict[str, float | None] = {}  # of a setting, over the runs of all arms at what they carry to it
    places: dict[str, UnitSetting] = {}
    for name, asked in settings.settings.items():
        judged = [each[name] for each in carried.values() if name in each]
        losses = [loss for one in judged for loss in one["test"].values()]
        medians[name] = statistics.median(losses) if losses else None
        arm, point = best[name] or (None, None)
        places[name] = {
            "about": asked.about,
            "kept": asked.kept,
            "arm": arm,
            "value": point["value"] if point else None,
            "val_loss": point["mean"] if point else None,
            "test_loss": _mean_test(point) if point else None,
            "median": medians[name],
        }
    found = {
        arm: _found(unit, curves[arm], carried[arm], medians, settings.broken)
        for arm, unit in settings.arms.items()
    }
    track: UnitsTrack = {
        "reference": settings.reference,
        "challengers": list(settings.challengers),
        "settings": places,
        "arms": found,
        "against": {},
        "by_setting": {},
        "over_settings": {},
        "verdicts": {},
        "margin": settings.margin,
        "broken": settings.broken,
    }
    for label in settings.arms:
        if label != settings.reference:
            against = _paired(settings, carried, label, divided)
            track["against"][label], track["by_setting"][label], track["over_settings"][label] = against
    for label in settings.challengers:
        track["verdicts"][label] = verdict(track["against"][label], settings.margin)
    return track


def best_of(curves: Curves, setting: str) -> tuple[str, UnitPoint] | None:
    """Return the arm and the point with the lowest mean validation loss that these have in a setting."""
    points = [(arm, point) for arm, by_setting in curves.items() for point in by_setting[setting]["points"]]
    known = [(arm, point) for arm, point in points if point["mean"] is not None]
    return min(known, key=lambda pair: pair[1]["mean"] or 0.0, default=None)


def point_at(curve: UnitCurve, value: float) -> UnitPoint | None:
    """Return a curve's point at a constant; None where a run of it has no result."""
    usable = (p for p in curve["points"] if p["mean"] is not None)
    return next((p for p in usable if math.isclose(p["value"], value, rel_tol=1e-9)), None)


def regrets(
    unit: UnitConfig, curves: Mapping[str, UnitCurve], best: Mapping[str, float]
) -> dict[float, float]:
    """Return the mean regret at each constant of the arm's grid: its mean validation loss less the best of
    all arms, averaged over the settings in `best`. A constant that lacks a run in one of them is left out."""
    means: dict[float, float] = {}
    for value in unit.grid:
        points = {name: point_at(curves[name], value) for name in best}
        behind = [p["mean"] - best[name] for name, p in points.items() if p and p["mean"] is not None]
        if behind and len(behind) == len(best):
            means[value] = statistics.fmean(behind)
    return means


def carried_of(
    settings: CarryConfig, curves: Curves, arm: str, best: Mapping[str, tuple[str, UnitPoint] | None]
) -> dict[str, Carried]:
    """Return by setting how an arm does at the constant with the least mean regret in the other settings, as
    far as these are not kept for the judgement; of equal constants at the smaller. Of starts the worst in the
    setting itself counts."""
    losses = {name: b[1]["mean"] for name, b in best.items() if b is not None and b[1]["mean"] is not None}
    carried: dict[str, Carried] = {}
    unit = settings.arms[arm]
    worst = -1 if unit.starts else 1
    for name, found in best.items():
        chosen_on = {n: x for n, x in losses.items() if n != name and not settings.settings[n].kept}
        if unit.starts:
            chosen_on = {n: x for n, x in losses.items() if n == name}
        means = regrets(unit, curves[arm], chosen_on)
        if not means or found is None:
            continue
        constant = min(means, key=lambda value: (worst * means[value], value))
        point = point_at(curves[arm][name], constant)
        own = curves[arm][name]["best"]
        tuned = point_at(curves[arm][name], own) if own is not None else None
        if point is None or tuned is None:
            continue
        floor = _mean_test(found[1])
        carried[name] = {
            "constant": constant,
            "regret": means[constant],
            "test": _known(point["test"]),
            "diverged": point["diverged"],
            "excess": _mean_test(point) - floor,
            "tuned": _mean_test(tuned) - floor,
        }
    return carried


def _known(losses: Mapping[str, float | None]) -> dict[str, float]:
    return {seed: loss for seed, loss in losses.items() if loss is not None}


def _mean_test(point: UnitPoint) -> float:
    return statistics.fmean(_known(point["test"]).values())


def _found(
    unit: UnitConfig,
    curves: Mapping[str, UnitCurve],
    carried: Mapping[str, Carried],
    medians: Mapping[str, float | None],
    limit: float,
) -> UnitFound:
    optima = [curve["best"] for curve in curves.values() if curve["best"] is not None]
    excess = {name: one["excess"] for name, one in carried.items()}
    on_grid = [
        (name, point)
        for name, curve in curves.items()
        for value in unit.grid
        if (point := point_at(curve, value)) is not None
    ]
    found: UnitFound = {
        "about": unit.about,
        "unit": unit.unit,
        "over": unit.over,
        "curves": dict(curves),
        "carried": dict(carried),
        "octaves": math.log2(max(optima) / min(optima)) if optima else None,
        "open": any(curve["edge"] for curve in curves.values()),
        "excess": statistics.fmean(excess.values()) if excess else None,
        "worst": max(excess, key=lambda name: excess[name], default=None),
        "broken": broken_runs(list(carried.items()), medians, limit),
        "broken_anywhere": broken_runs(on_grid, medians, limit),
    }
    return {**found, "starts": True} if unit.starts else found


def broken_runs(
    ran: Sequence[tuple[str, Any]], medians: Mapping[str, float | None], limit: float
) -> BrokenRuns:
    """Return how many runs there are, and how many are broken: they diverged, or ended more than `limit` nats
    above their setting's median.

    `medians`: of a setting, the median test loss over the runs of all arms at the constants that they carry
    to it. `ran`: (setting, the losses there by seed, and which seeds diverged).
    """
    runs = broken = 0
    for name, point in ran:
        median = medians[name]
        for seed, loss in _known(point["test"]).items():
            runs += 1
            broken += seed in point["diverged"] or (median is not None and loss > median + limit)
    return {"runs": runs, "broken": broken}


def _paired(
    settings: CarryConfig, carried: Mapping[str, Mapping[str, Carried]], arm: str, divided: int
) -> tuple[Difference, dict[str, Difference], Difference]:
    """Return an arm's differences from the reference over the settings that both were judged in: the mean
    over these, paired by seed; each setting by itself; and the mean over the seeds, paired by setting."""
    mine, rival = carried[arm], carried[settings.reference]
    both = [name for name in settings.settings if name in mine and name in rival]
    challenges = arm in settings.challengers
    together = len(settings.challengers) if challenges else len(settings.arms) - 1
    by_itself = functools.partial(paired, looks=divided)
    compared = functools.partial(by_itself, margin=settings.margin, comparisons=together)
    by_seed = compared(_mean_by_seed(mine, both), _mean_by_seed(rival, both))
    each = {name: by_itself(mine[name]["test"], rival[name]["test"]) for name in both}
    return by_seed, each, compared(_mean_by_setting(mine, both), _mean_by_setting(rival, both))


def _mean_by_seed(carried: Mapping[str, Carried], names: Sequence[str]) -> dict[str, float]:
    """Return each seed's mean test loss over these settings."""
    seeds = carried[names[0]]["test"] if names else {}
    return {seed: statistics.fmean(carried[name]["test"][seed] for name in names) for seed in seeds}


def verdict(difference: Difference, margin: float) -> str:
    """Return whether a challenger earns its cost, by the interval that holds for all challengers at once.

    `earns`: it is `margin` better on average, and the interval lies below 0. `loses`: the interval lies above
    0. `no gain`: it excludes a gain of `margin`. Else `undecided`.
    """
    mean, low, high = difference["mean"], difference["joint_low"], difference["joint_high"]
    if mean is None or low is None or high is None:
        return UNDECIDED
    if mean <= -margin and high < 0:
        return EARNS
    if low > 0:
        return LOSES
    return NO_GAIN if low > -margin else UNDECIDED


def _mean_by_setting(carried: Mapping[str, Carried], names: Sequence[str]) -> dict[str, float]:
    return {name: statistics.fmean(carried[name]["test"].values()) for name in names}

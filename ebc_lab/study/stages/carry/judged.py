"""The statistics of the stage carry: which unit's constant serves settings on which it was not chosen?

A constant is chosen by validation losses in other settings, and judged by test losses in the setting that was
left out.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Collection, Iterable, Mapping

from ebc_lab.config.schema import CarryConfig
from ebc_lab.records import decisions
from ebc_lab.records.decisions import Carried, Difference, UnitCurve, UnitPoint

from ..statistics import paired

Curves = Mapping[str, Mapping[str, UnitCurve]]  # arm -> setting -> its measured points
Tests = Collection[Mapping[str, float]]  # for each setting, the test losses by seed


class Judgement:
    """The judgement of every arm at its carried constants. `divided`: the number that divides the error."""

    def __init__(self, carry: CarryConfig, curves: Curves, divided: int):
        self.carry, self.curves, self.divided = carry, curves, divided
        self.best: dict[str, tuple[str, UnitPoint]] = {}  # setting -> arm and point, no `starts`
        self.lowest: dict[str, float] = {}  # setting -> validation loss of `best`
        for name in carry.settings:
            for arm, unit in carry.arms.items():
                for point in curves[arm][name]["points"] if not unit.starts else ():
                    if point["mean"] is not None and point["mean"] < self.lowest.get(name, math.inf):
                        self.best[name], self.lowest[name] = (arm, point), point["mean"]
        self.carried = {arm: self._carried(arm) for arm in carry.arms}
        self.medians: dict[str, float] = {}  # setting -> median test loss of all runs judged in it
        for name in carry.settings:
            judged = [carried[name]["test"] for carried in self.carried.values() if name in carried]
            if judged:
                self.medians[name] = statistics.median(loss for test in judged for loss in test.values())

    def track(self) -> decisions.UnitsTrack:
        """Return the decision's track: all settings and arms, the arms' differences, and the verdicts."""
        carry = self.carry
        track: decisions.UnitsTrack = {
            "reference": carry.reference,
            "challengers": list(carry.challengers),
            "settings": {name: self._setting(name) for name in carry.settings},
            "arms": {arm: self._found(arm) for arm in carry.arms},
            "against": {},
            "by_setting": {},
            "over_settings": {},
            "verdicts": {},
            "margin": carry.margin,
            "broken": carry.broken,
        }
        for arm in carry.arms:
            if arm != carry.reference:
                self._compare(arm, track)
        for arm in carry.challengers:
            track["verdicts"][arm] = verdict(track["against"][arm], carry.margin)
        return track

    def _carried(self, arm: str) -> dict[str, Carried]:
        """Return, by setting, how an arm does at the constant with the least mean regret in the other
        settings. Settings that are kept for the judgement choose nothing. Ties go to the smaller constant. An
        arm whose constants are starts of a rule is judged at its worst start in the setting."""
        unit, settings = self.carry.arms[arm], self.carry.settings
        worst = -1 if unit.starts else 1
        carried: dict[str, Carried] = {}
        for name, (_, best) in self.best.items():
            others = [other for other in self.best if other != name and not settings[other].kept]
            regrets = self._regrets(arm, [name] if unit.starts else others)
            curve = self.curves[arm][name]
            if not regrets or curve["best"] is None:
                continue
            constant = min(regrets, key=lambda value: (worst * regrets[value], value))
            point, tuned = point_at(curve, constant), point_at(curve, curve["best"])
            if point and tuned:
                carried[name] = {
                    "constant": constant,
                    "regret": regrets[constant],
                    "test": _known(point["test"]),
                    "diverged": point["diverged"],
                    "excess": _mean_test(point) - _mean_test(best),
                    "tuned": _mean_test(tuned) - _mean_test(best),
                }
        return carried

    def _regrets(self, arm: str, settings: Collection[str]) -> dict[float, float]:
        """Return, for each constant of the arm's grid, its mean regret over these settings. The regret in a
        setting is the mean validation loss less that of the best arm. A constant that lacks a run in any of
        the settings is left out."""
        regrets: dict[float, float] = {}
        for value in self.carry.arms[arm].grid:
            points = {name: point_at(self.curves[arm][name], value) for name in settings}
            behind = [p["mean"] - self.lowest[n] for n, p in points.items() if p and p["mean"] is not None]
            if behind and len(behind) == len(settings):
                regrets[value] = statistics.fmean(behind)
        return regrets

    def _setting(self, name: str) -> decisions.UnitSetting:
        arm, point = self.best.get(name, (None, None))
        return {
            "about": self.carry.settings[name].about,
            "kept": self.carry.settings[name].kept,
            "arm": arm,
            "value": point["value"] if point else None,
            "val_loss": point["mean"] if point else None,
            "test_loss": _mean_test(point) if point else None,
            "median": self.medians.get(name),
        }

    def _found(self, arm: str) -> decisions.UnitFound:
        unit, curves, carried = self.carry.arms[arm], self.curves[arm], self.carried[arm]
        optima = [curve["best"] for curve in curves.values() if curve["best"] is not None]
        excess = {name: one["excess"] for name, one in carried.items()}
        on_grid = [(name, point_at(curve, value)) for name, curve in curves.items() for value in unit.grid]
        found: decisions.UnitFound = {
            "about": unit.about,
            "unit": unit.unit,
            "over": unit.over,
            "curves": dict(curves),
            "carried": carried,
            "octaves": math.log2(max(optima) / min(optima)) if optima else None,
            "open": any(curve["edge"] for curve in curves.values()),
            "excess": statistics.fmean(excess.values()) if excess else None,
            "worst": max(excess, key=lambda name: excess[name], default=None),
            "broken": self._broken(carried.items()),
            "broken_anywhere": self._broken((name, point) for name, point in on_grid if point),
        }
        return {**found, "starts": True} if unit.starts else found

    def _broken(self, ran: Iterable[tuple[str, Carried | UnitPoint]]) -> decisions.BrokenRuns:
        """Return how many runs these (setting, point) pairs have, and how many are broken. A run is broken if
        it diverged, or if its test loss is further above the setting's median than the stage allows."""
        runs = broken = 0
        for name, point in ran:
            limit = self.medians.get(name, math.inf) + self.carry.broken
            losses = _known(point["test"])
            runs += len(losses)
            broken += sum(seed in point["diverged"] or loss > limit for seed, loss in losses.items())
        return {"runs": runs, "broken": broken}

    def _compare(self, arm: str, track: decisions.UnitsTrack) -> None:
        """Write into the track how an arm differs from the reference where both were judged: averaged over
        settings and paired by seed; in each setting; averaged over seeds and paired by setting."""
        carry, mine, rival = self.carry, self.carried[arm], self.carried[self.carry.reference]
        both = [name for name in carry.settings if name in mine and name in rival]
        own = {name: mine[name]["test"] for name in both}
        reference = {name: rival[name]["test"] for name in both}
        together = len(carry.challengers) if arm in carry.challengers else len(carry.arms) - 1
        by_itself = functools.partial(paired, looks=self.divided)
        compared = functools.partial(by_itself, margin=carry.margin, comparisons=together)
        track["against"][arm] = compared(_mean_by_seed(own.values()), _mean_by_seed(reference.values()))
        track["by_setting"][arm] = {name: by_itself(own[name], reference[name]) for name in both}
        track["over_settings"][arm] = compared(_mean_by_setting(own), _mean_by_setting(reference))


def point_at(curve: UnitCurve, value: float) -> UnitPoint | None:
    """Return a curve's point at a constant; None if there is none, or a run of the point has no loss."""
    usable = (p for p in curve["points"] if p["mean"] is not None)
    return next((p for p in usable if math.isclose(p["value"], value, rel_tol=1e-9)), None)


def verdict(difference: Difference, margin: float) -> str:
    """Return whether a challenger earns its cost, by the interval that holds for all challengers at once.

    `earns`: it is better by at least `margin` on average, and the interval lies below 0. `loses`: the
    interval lies above 0. `no gain`: the interval excludes a gain of `margin`. `undecided`: none of these.
    """
    mean, low, high = difference["mean"], difference["joint_low"], difference["joint_high"]
    if mean is None or low is None or high is None:
        return "undecided"
    if mean <= -margin and high < 0:
        return "earns"
    if low > 0:
        return "loses"
    return "no gain" if low > -margin else "undecided"


def _known(losses: Mapping[str, float | None]) -> dict[str, float]:
    return {seed: loss for seed, loss in losses.items() if loss is not None}


def _mean_test(point: UnitPoint) -> float:
    return statistics.fmean(_known(point["test"]).values())


def _mean_by_seed(tests: Tests) -> dict[str, float]:
    seeds = next(iter(tests), {})
    return {seed: statistics.fmean(test[seed] for test in tests) for seed in seeds}


def _mean_by_setting(tests: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(test.values()) for name, test in tests.items()}

"""The runs of the stage carry: every arm in every setting, and the search of each setting's best constant."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ebc_lab.config.checks import least_target_kl
from ebc_lab.config.choices import changed, with_size
from ebc_lab.config.dicts import run_part
from ebc_lab.config.identity import number, round3
from ebc_lab.config.schema import CarrySettingConfig, Config, RunConfig, UnitConfig
from ebc_lab.records.decisions import UnitCurve, UnitPoint
from ebc_lab.records.figures import RunResult
from ebc_lab.records.spec import RunSpec, track_of

from ..rules import Results
from ..runs import specs_made, with_text
from ..search import Point, Search

NAME = "carry"
CONSTANT = "constant"


def run_at(config: Config, unit: UnitConfig, setting: CarrySettingConfig, constant: float) -> RunConfig:
    """Return an arm's run in a setting, at a constant."""
    base = run_part(config)
    plain = replace(
        base,
        steps=config.carry.steps,
        evaluate=["val", "test"],
        stabilizer=replace(base.stabilizer, name="none"),
    )
    run = with_size(changed(plain, with_text(base, setting.settings)), setting)
    run = changed(run, unit.settings)
    run = changed(run, {"optimizer": {"lr": float(f"{setting.lr * unit.lr_scale:.6g}")}})
    group, _, key = unit.over.partition(".")
    return changed(run, {group: {key: round3(constant * setting.width_scale**unit.width_power)}})


def searched(config: Config, results: Results) -> dict[str, dict[str, Search]]:
    """Return, by arm and setting, the search for the best constant, as far as the results tell."""
    made = specs_made(config, NAME)
    return {
        arm: {name: _search(config, arm, name, made, results) for name in config.carry.settings}
        for arm in config.carry.arms
    }


def _search(config: Config, arm: str, name: str, made: dict[Any, list[RunSpec]], results: Results) -> Search:
    unit, setting = config.carry.arms[arm], config.carry.settings[name]

    def runs_of(point: Point) -> list[RunSpec]:
        constant = point[CONSTANT]
        key = arm, name, constant, *config.seeds
        if key not in made:
            run = run_at(config, unit, setting, constant)
            label, scale = f"{arm}_{name}_{number(constant)}", float(f"{run.optimizer.lr / setting.lr:.6g}")
            track = track_of(config)
            seeded = [replace(run, seed=seed) for seed in config.seeds]
            made[key] = [RunSpec(NAME, arm, label, scale, run, of_track=track) for run in seeded]
        return made[key]

    def fitted(_: str, constant: float) -> float | None:
        run = run_at(config, unit, setting, rounded := round3(constant))
        if unit.over == "budget.target_kl" and run.budget.target_kl < least_target_kl(run):
            return None  # no precision shows so small a KL
        return rounded

    def mean(runs: Sequence[RunSpec], _: Results) -> float:
        found = _point(search, runs)["mean"]
        return math.inf if found is None else found

    grid: list[Point] = [{CONSTANT: float(constant)} for constant in unit.grid]
    # the mean ratio of neighbours, which rounded values show better than two of them
    ratio = float((unit.grid[-1] / unit.grid[0]) ** (1 / (len(unit.grid) - 1)))
    search = Search(grid, runs_of, results, {CONSTANT: ratio}, mean, prefer_low=CONSTANT, fitted=fitted)
    search.grow(0 if unit.starts else config.carry.max_extensions)
    return search


def curve_of(search: Search) -> UnitCurve:
    """Return what was measured of an arm in a setting, by rising constant."""
    points = [_point(search, runs, dict(point)[CONSTANT]) for point, runs in search.tried.items()]
    best = search.best()
    return {
        "points": sorted(points, key=lambda point: point["value"]),
        "best": best[CONSTANT] if best else None,
        "loss": search.score_of(best) if best else None,
        "edge": search.edge(best, CONSTANT) if best else None,
    }


def _point(search: Search, specs: Sequence[RunSpec], constant: float = 0.0) -> UnitPoint:
    """Return what a point's runs came to: one that diverged counts with the loss of its first step, which no
    constant changes, so that another run of its seed may tell it."""
    starts: dict[str, float] = {}
    for spec in search.specs:
        first = search.results.get(spec.run_id, RunResult()).get("initial_loss")
        if first is not None and math.isfinite(first):
            starts.setdefault(str(spec.run.seed), first)
    point: UnitPoint = {"value": constant, "val": {}, "test": {}, "mean": None, "diverged": []}
    for spec in specs:
        seed, result = str(spec.run.seed), search.results.get(spec.run_id, RunResult())
        losses: tuple[float | None, float | None] = (None, None)
        if result.get("outcome") == "diverged":
            point["diverged"].append(seed)
            losses = starts.get(seed), starts.get(seed)
        if result.get("outcome") == "completed":
            losses = result.get("val_loss"), result.get("test_loss")
        point["val"][seed], point["test"][seed] = losses
    known = [loss for loss in point["val"].values() if loss is not None]
    whole = len(known) == len(specs) and None not in point["test"].values()
    point["mean"] = statistics.fmean(known) if whole else None
    return point

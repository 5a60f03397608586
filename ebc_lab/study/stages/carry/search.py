"""The runs of the stage carry: every arm in every setting, and the search of each setting's best constant."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ebc_lab.config.checks import least_target_kl
from ebc_lab.config.choices import changed, with_size
from ebc_lab.config.dicts import run_part
from ebc_lab.config.identity import number, round3
from ebc_lab.config.schema import CarryConfig, CarrySettingConfig, Config, RunConfig, UnitConfig
from ebc_lab.records.decisions import UnitCurve, UnitPoint
from ebc_lab.records.figures import RunResult
from ebc_lab.records.spec import RunSpec, track_of

from ..rules import Results, edge_of
from ..runs import specs_made, waiting, with_text

NAME = "carry"
TARGET = "budget.target_kl"
Made = dict[tuple[str, str, float, int], RunSpec]  # by arm, setting, constant and seed


def run_of(config: Config, unit: UnitConfig, setting: CarrySettingConfig, value: float) -> RunConfig:
    """Build an arm's run in a setting, at a constant."""
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
    return changed(run, {group: {key: round3(value * setting.width_scale**unit.width_power)}})


def _specs_of(config: Config) -> Callable[[str, str, float], list[RunSpec]]:
    """Return what makes an arm's runs in a setting at a constant, one for each seed."""
    carry = config.carry
    made: Made = specs_made(config, NAME)

    def specs(arm: str, name: str, value: float) -> list[RunSpec]:
        unit, setting = carry.arms[arm], carry.settings[name]
        lacking = [seed for seed in config.seeds if (arm, name, value, seed) not in made]
        run = run_of(config, unit, setting, value) if lacking else None
        for seed in lacking:
            assert run is not None
            label = f"{arm}_{name}_{number(value)}"
            scale = float(f"{run.optimizer.lr / setting.lr:.6g}")
            made[arm, name, value, seed] = RunSpec(
                NAME, arm, label, scale, replace(run, seed=seed), of_track=track_of(config)
            )
        return [made[arm, name, value, seed] for seed in config.seeds]

    return specs


# -- the search of each setting's best -----------------------------------------------------------------------


@dataclass
class Tried:
    """The runs of an arm in a setting, by constant, and what they came to."""

    runs: dict[float, list[RunSpec]]
    results: Results

    @property
    def specs(self) -> list[RunSpec]:
        return [s for value in self.runs for s in self.runs[value]]

    def curve(self) -> UnitCurve:
        """Return what was measured, by rising constant; of equal ones the smaller constant is best."""
        starts = self._starts()
        points = [_point(v, self.runs[v], self.results, starts) for v in sorted(self.runs)]
        usable = [(p["mean"], p["value"]) for p in points if p["mean"] is not None]
        loss, best = min(usable, default=(None, None))
        edge = None if best is None else edge_of([p["value"] for p in points], best)
        return {"points": points, "best": best, "loss": loss, "edge": edge}

    def _starts(self) -> dict[str, float]:
        """Return each seed's loss at the first step, which no constant changes."""
        starts: dict[str, float] = {}
        for spec in self.specs:
            first = self.results.get(spec.run_id, RunResult()).get("initial_loss")
            if first is not None and math.isfinite(first):
                starts.setdefault(str(spec.run.seed), first)
        return starts


def _point(
    value: float, specs: Sequence[RunSpec], results: Results, starts: Mapping[str, float]
) -> UnitPoint:
    point: UnitPoint = {"value": value, "val": {}, "test": {}, "mean": None, "diverged": []}
    for spec in specs:
        seed = str(spec.run.seed)
        result = results.get(spec.run_id, RunResult())
        diverged = result.get("outcome") == "diverged"
        if diverged:
            point["diverged"].append(seed)
        completed = result.get("outcome") == "completed"
        start = starts.get(seed) if diverged else None
        point["val"][seed] = result.get("val_loss") if completed else start
        point["test"][seed] = result.get("test_loss") if completed else start
    known = [loss for loss in point["val"].values() if loss is not None]
    whole = len(known) == len(specs) and None not in point["test"].values()
    point["mean"] = statistics.fmean(known) if whole else None
    return point


def searched(config: Config, results: Results) -> dict[str, dict[str, Tried]]:
    """Search each arm's best constant in each setting, as far as the results tell."""
    make = _specs_of(config)
    carry = config.carry
    return {
        arm: {
            name: _tried(carry, unit, functools.partial(make, arm, name), results) for name in carry.settings
        }
        for arm, unit in carry.arms.items()
    }


def _tried(
    carry: CarryConfig, unit: UnitConfig, make: Callable[[float], list[RunSpec]], results: Results
) -> Tried:
    tried = Tried({float(value): make(float(value)) for value in unit.grid}, results)
    ratio = ratio_of(unit.grid)
    for _ in range(0 if unit.starts else carry.max_extensions):
        if waiting(tried.specs, results):
            break
        edge = tried.curve()["edge"]
        if edge is None:
            break
        value = round3(max(tried.runs) * ratio if edge == "high" else min(tried.runs) / ratio)
        made = make(value)
        run = made[0].run
        if unit.over == TARGET and run.budget.target_kl < least_target_kl(run):
            break  # no precision shows so small a KL
        tried.runs[value] = made
    return tried


def ratio_of(grid: Sequence[float]) -> float:
    """Return the mean ratio of a grid's neighbours, which rounded values show better than two of them."""
    return float((grid[-1] / grid[0]) ** (1 / (len(grid) - 1)))

"""The runs of the stage profiles: a method at a point of its grid, on a workload.

A workload's settings come first and a method's after them, so that a method means the same on every workload.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ebc_lab.config.choices import changed, shaped
from ebc_lab.config.dicts import run_part
from ebc_lab.config.identity import number
from ebc_lab.config.schema import HORIZON, Config, MethodConfig, ProfiledWorkloadConfig, RunConfig
from ebc_lab.records.spec import RunSpec, track_of

from ..runs import specs_made, texts_pinned, with_text

NAME = "profiles"
Point = dict[str, Any]  # of a method's grid, setting -> value
Key = tuple[str, str, str, float, int]  # method, point, workload, length over that of the targets, seed


def points_of(method: MethodConfig) -> list[Point]:
    """List every combination of a method's grid, one without settings where it has none."""
    keys = list(method.grid)
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*method.grid.values())]


def steps_of(config: Config, workload: ProfiledWorkloadConfig, times: float = 1.0) -> int:
    """Return the length of a workload's runs, `times` that of those that set its target."""
    return max(1, round(config.profiles.steps * workload.steps * times))


def run_of(
    config: Config, method: MethodConfig, workload: ProfiledWorkloadConfig, point: Point, times: float
) -> RunConfig:
    """Build a method's run on a workload, `times` as long as those that set the target."""
    base = run_part(config)
    plain = replace(base, evaluate=["val"], stabilizer=replace(base.stabilizer, name="none"))
    run = shaped(changed(plain, with_text(base, workload.settings)), workload)
    run = changed(run, method.settings_at(point))
    every = steps_of(config, workload, 1 / config.profiles.evaluations)
    return replace(run, steps=steps_of(config, workload, times), eval_every=every)


def resolved(config: Config, say: Callable[[str], None]) -> Config:
    """Fill in the checksums of those workloads that have data or tokens of their own."""
    workloads = texts_pinned(config, NAME, config.profiles.workloads, say)
    return replace(config, profiles=replace(config.profiles, workloads=workloads))


@dataclass(frozen=True)
class Maker:
    """Makes the runs of one configuration."""

    config: Config
    made: dict[Key, RunSpec]

    @classmethod
    def of(cls, config: Config) -> Maker:
        return cls(config, specs_made(config, NAME))

    def runs(
        self, name: str, point: Point, workload: str, seeds: Sequence[int], *, targets: bool = False
    ) -> list[RunSpec]:
        """Return a method's runs on a workload at a point, one for each seed. `targets`: as long as
        those that set the targets, whatever the point's horizon."""
        profiles = self.config.profiles
        times = 1.0 if targets else profiles.longest * point.get(HORIZON, 1.0)
        keys = [(name, _in_short(point), workload, times, seed) for seed in seeds]
        if lacking := [key for key in keys if key not in self.made]:
            method, of = profiles.methods[name], profiles.workloads[workload]
            run = run_of(self.config, method, of, point, times)
            label = f"{name}_{workload}{_in_short(point)}" + "_target" * targets
            for key in lacking:
                seeded = replace(run, seed=key[-1])
                self.made[key] = RunSpec(NAME, name, label, 1.0, seeded, of_track=track_of(self.config))
        return [self.made[key] for key in keys]


def _in_short(point: Point) -> str:
    """Write a point as names of runs have it: `_lr0p001_horizon0p5`."""
    values = {key.rpartition(".")[2]: value for key, value in point.items()}
    return "".join(f"_{k}{v if isinstance(v, str) else number(v)}" for k, v in values.items())

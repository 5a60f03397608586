"""How the stage profiles names its points and builds a run: a method at a point of its grid, on a workload.

A workload's settings come first and a method's after them, so that a method means the same on every workload.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

from ebc_lab.config.choices import changed, with_size
from ebc_lab.config.dicts import run_part
from ebc_lab.config.identity import number
from ebc_lab.config.schema import Config, MethodConfig, ProfiledWorkloadConfig, RunConfig

from ..runs import with_text
from ..search import Point

NAME = "profiles"


def points_of(method: MethodConfig) -> list[Point]:
    """Return every combination of a method's grid; the one point without settings where it has none."""
    values = itertools.product(*method.grid.values())
    return [dict(zip(method.grid, combination, strict=True)) for combination in values]


def point_in_short(point: Point) -> str:
    """Return a point as the names of runs have it: `_lr0p001_horizon0p5`."""
    values = {key.rpartition(".")[2]: value for key, value in point.items()}
    return "".join(f"_{k}{v if isinstance(v, str) else number(v)}" for k, v in values.items())


def steps_of(config: Config, workload: ProfiledWorkloadConfig, times: float = 1.0) -> int:
    """Return the length of a workload's runs, `times` that of those that set its target."""
    return max(1, round(config.profiles.steps * workload.steps * times))


def run_at(
    config: Config, method: MethodConfig, workload: ProfiledWorkloadConfig, point: Point, times: float
) -> RunConfig:
    """Return a method's run on a workload, `times` as long as those that set the target."""
    base = run_part(config)
    plain = replace(base, evaluate=["val"], stabilizer=replace(base.stabilizer, name="none"))
    run = with_size(changed(plain, with_text(base, workload.settings)), workload)
    run = changed(run, method.settings_at(point))
    every = steps_of(config, workload, 1 / config.profiles.evaluations)
    return replace(run, steps=steps_of(config, workload, times), eval_every=every)

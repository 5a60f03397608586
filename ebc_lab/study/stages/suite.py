"""What `tune` and `ablation` share: a suite's named arms, each the best baseline with some settings
changed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

from ebc_lab.config.choices import changed
from ebc_lab.config.schema import ArmConfig, Config, RunConfig

from .rules import Decision
from .runs import completed, plain_run, searched, tracks_of, with_target

Point = dict[str, float]


def points(arm: ArmConfig) -> list[Point]:
    """Every combination of the arm's grid."""
    return [
        dict(zip(arm.tune, map(float, values), strict=True))
        for values in itertools.product(*arm.tune.values())
    ]


def run_of(
    config: Config,
    decisions: Mapping[str, Decision],
    track: str,
    arm: ArmConfig,
    steps: int,
    seed: int,
    point: Point,
) -> tuple[RunConfig, float]:
    """An arm's run at a point of its grid, and its LR scale.

    Its target KL is a multiple of the calibrated one, or of the natural KL where nothing was calibrated.
    """
    swept = decisions["lr_sweep"]["tracks"][track]
    scale = point.get("lr_scale", arm.lr_scale)
    run = changed(plain_run(config, swept, steps, seed, scale), searched(decisions, track) | arm.settings)
    if run.stabilizer.name == "ebc" and "target_kl" not in arm.settings.get("budget", {}):
        unit = swept["natural_kl"]
        if "calibrate" in decisions:
            found = decisions["calibrate"]["tracks"][track]
            unit = found["by_budget"].get(run.budget.name, found["delta_star"])
        run = with_target(run, unit * point.get("delta", arm.delta or 1.0))
    if "strength" in point:
        run = replace(run, stabilizer=replace(run.stabilizer, strength=point["strength"]))
    return completed(run, swept), scale


def ready(config: Config, decisions: Mapping[str, Decision], stage: str) -> list[str]:
    """The tracks of a suite's stage, once every earlier stage that it builds on has decided."""
    before = [s for s in config.study.stages if s in ("lr_sweep", "calibrate", "controller_search")]
    return tracks_of(decisions, stage) if all(s in decisions for s in before) else []

"""How many runs a study will make, before any of them: invented results are played to the stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..config import Config
from .arms import distinct
from .decide import Decision
from .plan import PUBLISHED_DELTAS
from .signature import RunSpec
from .stages import STAGES_OF


@dataclass(frozen=True)
class Scenario:
    """How the results might fall: at which end the winners lie, and how many runs it takes to hit the band."""

    name: str
    edge: bool  # the best learning rate lies on the edge until the extensions are used up
    extra: int  # calibration runs beyond the grid
    merged: bool  # the chosen scale is the calibrated one, so that arms coincide


SCENARIOS = (
    Scenario("min", edge=False, extra=0, merged=True),
    Scenario("expected", edge=True, extra=1, merged=True),
    Scenario("max", edge=True, extra=99, merged=False),
)


def forecast(config: Config, names: Sequence[str] = ("min", "expected", "max")) -> dict[str, dict[str, list[RunSpec]]]:
    """Scenario -> stage -> the distinct runs it would make, found by playing invented results to the stages above."""
    return {s.name: _play(config, s) for s in SCENARIOS if s.name in names}


def _play(config: Config, scenario: Scenario) -> dict[str, list[RunSpec]]:
    decisions: dict[str, Decision] = {}
    results: dict[str, dict[str, Any]] = {}
    played: dict[str, list[RunSpec]] = {}
    for stage in config.study.stages:
        before = set(results)
        while True:
            specs = STAGES_OF[stage].runs(config, decisions, results)
            new = [s for s in specs if s.run_id not in results]
            if not new:
                break
            for spec in new:
                results[spec.run_id] = _invent(config, scenario, spec, len(results) - len(before))
        if stage not in ("finals", "ablation"):  # the last: nothing is built on them
            decisions[stage] = STAGES_OF[stage].decide(config, specs, results, decisions)
        played[stage] = [s for s in distinct(specs) if s.run_id not in before]
    return played


def _invent(config: Config, scenario: Scenario, spec: RunSpec, nth: int) -> dict[str, Any]:
    lr, grid = spec.run.optimizer.lr, config.lr_sweep.grids[spec.run.optimizer.name]
    middle = grid[len(grid) // 2] if len(grid) > 2 and not scenario.edge else math.inf
    loss = 2.0 + (abs(math.log(lr / middle)) if math.isfinite(middle) else 1 / (1 + 1e4 * lr)) + 1e-6 * spec.run.seed
    base_points = len(config.calibrate.multiples if config.calibrate.delta_grid == "natural" else PUBLISHED_DELTAS)
    hit = nth >= base_points - 1 + scenario.extra if spec.stage == "calibrate" else scenario.merged == (spec.lr_scale == 2)
    c = 0.6 if hit else 0.1 if spec.stage == "calibrate" else 0.3
    if spec.stage == "lr_scale" and spec.role == "ebc" and not scenario.merged:
        c = 0.6 if spec.lr_scale == max(config.lr_scale.scales) else 0.3
    return {
        "outcome": "completed",
        "val_loss": loss,
        "c_median": c,
        "kl_median": 0.01,
        "kl_ratio_median": 1.0,
        "clip_rate": 0.5,
        "surrogate_median": 1.0,
        "descent_median": 0.1,
        "grad_norm_quantiles": [1.0] * 41,
    }

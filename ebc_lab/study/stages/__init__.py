"""The stages in their order, and what each asks for, given what is known so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ebc_lab.config.schema import Config

from . import calibrate, controller_search, finals, lr_scale, lr_sweep, suite
from .rules import Decision, Results
from .spec import RunSpec


@dataclass(frozen=True)
class Stage:
    runs: Callable[[Config, Mapping[str, Decision], Results], list[RunSpec]]
    decide: Callable[[Config, Sequence[RunSpec], Results, Mapping[str, Decision]], Decision]
    grows: bool = True  # with its own results; where it does not, asking once is enough


STAGES_OF = {
    "lr_sweep": Stage(lr_sweep.plan, lr_sweep.decide),
    "calibrate": Stage(calibrate.plan, calibrate.decide),
    "controller_search": Stage(controller_search.plan, controller_search.decide, grows=False),
    "lr_scale": Stage(lr_scale.plan, lr_scale.decide),
    "finals": Stage(finals.plan, finals.decide),
    "tune": Stage(suite.tune, suite.decide_tune, grows=False),
    "ablation": Stage(suite.ablation, suite.decide_ablation),
}


def specs_of(
    stage: str,
    config: Config,
    decisions: Mapping[str, Decision],
    results_of: Callable[[list[RunSpec]], dict[str, dict[str, Any]]],
) -> tuple[list[RunSpec], dict[str, dict[str, Any]]]:
    """The runs that a stage asks for, and their results: its list grows with the results that are there."""
    specs: list[RunSpec] = []
    results: dict[str, dict[str, Any]] = {}
    while True:
        grown = STAGES_OF[stage].runs(config, decisions, results)
        if len(grown) == len(specs):
            return specs, results
        specs, results = grown, results_of(grown)
        if not STAGES_OF[stage].grows:
            return specs, results


def foreseen(
    config: Config, decisions: Mapping[str, Decision], waiting: Sequence[RunSpec], stages: Sequence[str]
) -> list[RunSpec]:
    """What an idle worker may start on: runs of later `stages` that the decisions so far already determine, and, while a grid
    is being extended, its next extension (the only one of these that may turn out not to be needed).
    """
    certain = [
        s for stage in stages for s in STAGES_OF[stage].runs(config, decisions, {}) if s.kind == "train"
    ]
    return certain + [further for s in waiting if (further := _next_extension(config, s))]


def _next_extension(config: Config, spec: RunSpec) -> RunSpec | None:
    """The grid point that would follow if this extension wins, unless it is the last one allowed."""
    if spec.role != "grid":
        return None
    grid, lr = config.lr_sweep.grids[spec.run.optimizer.name], spec.run.optimizer.lr
    reach = 2.0**config.lr_sweep.max_extensions * (1 + 1e-6)
    further = 2 * lr if lr > max(grid) else lr / 2 if lr < min(grid) else None
    if further is None or not min(grid) / reach <= further <= max(grid) * reach:
        return None
    return replace(
        spec, run=replace(spec.run, optimizer=replace(spec.run.optimizer, lr=float(f"{further:.6g}")))
    )

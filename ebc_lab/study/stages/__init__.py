"""The registry of stages, and the runs that a stage asks for, given what is known so far."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence

from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import STAGES, Config
from ebc_lab.records.decisions import Decision
from ebc_lab.records.figures import RunResult

from .spec import RunSpec
from .stage import Stage


@functools.cache
def stage_of(name: str) -> Stage:
    """Return the stage of this name: the `STAGE` of the module named like it. Raises UserError for an unknown
    one."""
    if name not in STAGES:
        raise UserError(f"{name} is not a stage; the stages are {', '.join(STAGES)}.")
    stage: Stage = importlib.import_module(f".{name}", __package__).STAGE
    return stage


def decision_that_shows(what: str, decisions: Mapping[str, Decision]) -> Decision | None:
    """Return the decision whose stage shows a `verdict`, or its `arms`; None where there is none."""
    return next((d for name, d in decisions.items() if stage_of(name).shows == what), None)


def planned_runs(
    stage: str,
    config: Config,
    decisions: Mapping[str, Decision],
    results_of: Callable[[list[RunSpec]], dict[str, RunResult]],
) -> tuple[list[RunSpec], dict[str, RunResult]]:
    """Return the runs that a stage asks for, and the results that they have; its list grows with the
    results."""
    specs: list[RunSpec] = []
    results: dict[str, RunResult] = {}
    while True:
        grown = stage_of(stage).runs(config, decisions, results)
        if len(grown) == len(specs):
            return specs, results
        specs = grown
        results = results_of(grown)
        if not stage_of(stage).grows:
            return specs, results


def speculative_runs(
    config: Config, decisions: Mapping[str, Decision], running: Sequence[RunSpec], later: Sequence[str]
) -> list[RunSpec]:
    """Return runs that an idle worker may start on: those of `later` stages that the decisions so far already
    determine, and those that will follow `running` ones if they win (the only runs that may turn out not to
    be needed).
    """
    determined = [s for stage in later for s in stage_of(stage).runs(config, decisions, {})]
    following = [stage_of(s.stage).follow_up(config, s) for s in running]
    return [s for s in determined if s.kind == "train"] + [s for s in following if s is not None]

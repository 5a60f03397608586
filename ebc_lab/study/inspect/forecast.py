"""How many runs a study will make, and how long they will take, before any of them: invented results are played to the stages.

Where the study has begun, what it has found so far is played instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ebc_lab.bench.speeds import (
    Choice,
    NotMeasured,
    choose_for_study,
    chosen_by_rule,
    is_open,
    job_cores,
)
from ebc_lab.config.dicts import run_part
from ebc_lab.config.errors import UserError
from ebc_lab.config.machine import chosen_device, cores
from ebc_lab.config.schema import Config

from ..launch.pool import at_a_time, slots
from ..stages import stage_of
from ..stages.rules import Decision, Undecidable, val_loss
from ..stages.runs import distinct
from ..stages.spec import RunSpec
from ..stages.stage import Scenario
from ..store.reuse import ResultsOf, kept
from ..store.study import Study
from .pace import Pace, learned, of_siblings

SCENARIOS = (
    Scenario("min", edge=False, extra=0, merged=True, open=False),
    Scenario("expected", edge=True, extra=1, merged=True, open=True),
    Scenario("max", edge=True, extra=99, merged=False, open=True),
)


def forecast(
    config: Config, names: Sequence[str] = ("min", "expected", "max"), known: ResultsOf = lambda specs: {}
) -> dict[str, dict[str, list[RunSpec]]]:
    """Scenario -> stage -> the distinct runs it would make, found by playing results to the stages: known or invented ones."""
    return {s.name: _play(config, s, known) for s in SCENARIOS if s.name in names}


def _play(config: Config, scenario: Scenario, known: ResultsOf) -> dict[str, list[RunSpec]]:
    decisions: dict[str, Decision] = {}
    results: dict[str, dict[str, Any]] = {}
    played: dict[str, list[RunSpec]] = {}
    for stage in config.study.stages:
        before = set(results)
        lowest = math.inf  # of the known losses
        while True:
            specs = stage_of(stage).runs(config, decisions, results)
            new = [s for s in specs if s.run_id not in results]
            if not new:
                break
            there = known(new)
            results |= there
            lowest = min([lowest, *map(val_loss, there.values())])
            best = 0.99 * lowest if math.isfinite(lowest) else 2.0
            for spec in new:
                if spec.run_id not in results:
                    results[spec.run_id] = _invent(config, scenario, spec, len(results) - len(before), best)
            if not stage_of(stage).grows:
                break
        if not stage_of(stage).concludes:
            try:
                decisions[stage] = stage_of(stage).decide(config, specs, results, decisions)
            except (
                Undecidable
            ):  # what is known will stop the study here; what it would be otherwise is the better answer
                return _play(config, scenario, lambda specs: {})
        played[stage] = [s for s in distinct(specs) if s.run_id not in before]
    return played


def _invent(config: Config, scenario: Scenario, spec: RunSpec, nth: int, best: float) -> dict[str, Any]:
    """A result as the scenario has it; its losses start from `best`, so that they fit in with those that are known."""
    lr, grid = spec.run.optimizer.lr, config.lr_sweep.grids[spec.run.optimizer.name]
    middle = grid[len(grid) // 2] if len(grid) > 2 and not scenario.edge else math.inf
    loss = (
        best
        + (abs(math.log(lr / middle)) if math.isfinite(middle) else 1 / (1 + 1e4 * lr))
        + 1e-6 * spec.run.seed
    )
    luck = 1.0 - 2.0 * (spec.run.seed % 2) if scenario.open and spec.run.stabilizer.name == "ebc" else 0.0
    return {
        "outcome": "completed",
        "val_loss": loss,
        "test_loss": 2.0 + luck,
        "kl_median": 0.01,
        "kl_ratio_median": 1.0,
        "clip_rate": 0.5,
        "surrogate_median": 1.0,
        "descent_median": 0.1,
        "grad_norm_quantiles": [1.0] * 41,
        **stage_of(spec.stage).invented(config, scenario, spec, nth),
    }


def planned(config: Config) -> dict[str, Any]:
    """Runs, steps, tokens and time per stage: min, expected and max, for sweeps may extend.

    Of a study that has begun, `done` runs are counted and left out of the time. Raises UserError when a result was edited.
    """
    from ..resolve import changes, take_up  # needs the corpora's numpy, which `status` does without

    study = Study(Path(config.output_dir).expanduser() / config.study.name)
    header = study.header() if study.exists() else None
    changed = changes(config, header) if header else []
    config = take_up(config, header) if header else config
    records = study.records()
    for problem in (r.problem for r in records if r.problem):
        raise UserError(problem)
    device = chosen_device(config.device)
    begun_with = (
        header["config"]["launcher"].get("runs_per_worker", 1) if header else 1
    )  # as it was measured then
    launcher = replace(config.launcher, runs_per_worker=config.launcher.runs_per_worker or begun_with)
    data = replace(config.data, sha256=config.data.sha256 or "0" * 64)
    placed = replace(config, device=device, data=data, launcher=launcher)
    speed: Choice | None = None
    with suppress(NotMeasured):
        speed = choose_for_study(placed, measure=False)
    named = (speed or _plainest(placed)).apply_to(placed)
    finished = header is not None and not changed and config.study.stages[-1] in study.decisions()
    known = kept(records, finished=finished)
    rate = learned(records) or of_siblings(named, study)
    stages: dict[str, Any] = {stage: {} for stage in (*config.study.stages, "total")}
    for scenario, played in forecast(named, known=known).items():
        for stage, figures in stages.items():
            specs = [
                s for st, ss in played.items() for s in ss if stage in (st, "total") and s.kind == "train"
            ]
            done = known(specs)
            steps = sum(s.run.steps for s in specs)
            left = [s for s in specs if s.run_id not in done]
            figures[scenario] = {
                "runs": len(specs),
                "done": len(done),
                "steps": steps,
                "tokens": steps * config.batch_size * config.model.context,
                "eta_s": _seconds(left, named, rate, speed),
            }
    for figures in stages.values():  # what is known may turn the scenarios' order around
        for key in ("runs", "steps", "tokens", "eta_s"):
            found = [f[key] for f in figures.values() if f[key] is not None]
            figures["min"][key], figures["max"][key] = min(found, default=None), max(found, default=None)
    measured = (
        "steps/s measured on this machine, evaluations and start-up not counted"
        if speed and speed.rate
        else None
    )
    return {
        "study": config.study.name,
        "scale": config.scale,
        "device": device,
        "dtype": named.dtype if speed else config.dtype,
        "threads_per_run": named.threads_per_run if speed else config.threads_per_run,
        "slots": at_a_time(named),
        "begun": header is not None,
        "changed": [f"{k}: {a!r} → {b!r}" for k, a, b in changed],
        "stages": stages,
        "eta_from": rate.source if rate else measured,
    }


def _seconds(
    left: Sequence[RunSpec], config: Config, rate: Pace | None, speed: Choice | None
) -> float | None:
    if rate is not None:
        return sum(map(rate.seconds, left)) / at_a_time(config)
    if speed is not None and speed.rate is not None:
        steps_per_s = speed.rate[-1]  # on a CPU here, of all slots together
        alone = config.device == "cuda" or config.launcher.name == "slurm"
        return sum(s.run.steps for s in left) / (steps_per_s * (slots(config) if alone else 1))
    return None


def _plainest(config: Config) -> Choice:
    """What an estimate takes for settings that are still to be measured: float32, one thread, not compiled."""
    run, why = chosen_by_rule(run_part(config), cores(), job_cores(config.launcher))
    dtype = "float32" if is_open(run, "dtype") else run.dtype
    return Choice(dtype, run.threads_per_run or 1, "off" if is_open(run, "compile") else run.compile, why)

"""The runs of the stage profiles, in three phases: targets, configurations and scores.

1. The yardstick's grid on every workload. The best point on a workload is trained again with other seeds,
   which set the target. So no target rests on a point that was merely lucky.
2. Every method's grid on the calibration workloads, to choose one point for all workloads. AlgoPerf
   calibrates methods in the same way, but on all scored workloads (Kasimbeg et al., arXiv:2505.24005).
3. Every method at its chosen point on every workload, with seeds that played no part in any choice.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from ebc_lab.config.choices import changed, with_size
from ebc_lab.config.dicts import run_part
from ebc_lab.config.fields import number
from ebc_lab.config.parts.target import first_at_or_below
from ebc_lab.config.schema import HORIZON, Config
from ebc_lab.records.decisions import Target
from ebc_lab.records.figures import RunResult
from ebc_lab.records.spec import RunSpec, track_of

from ..rules import Results, Specs, edge_of, is_conclusive, val_loss
from ..runs import specs_made, waiting, with_text
from ..search import Point, Search
from ..suite import points
from .scores import lowest, mean_time, median

NAME = "profiles"
RATE = "optimizer.lr"


class Phases:
    """The runs of each phase that can be planned so far, and what their results decide."""

    def __init__(self, config: Config, results: Results):
        self.config = config
        self.profiles = config.profiles
        self.results = results
        self._made = specs_made(config, NAME)
        first, each = config.study.stage_seed, self.profiles.calibration_seeds
        self.calibration_seeds = range(first, first + each)
        self.target_seeds = range(first + each, first + each + self.profiles.target_seeds)

    def runs(
        self, method: str, point: Point, workload: str, seeds: Sequence[int], *, targets: bool = False
    ) -> list[RunSpec]:
        """Return a method's runs on a workload at a point, one per seed. With `targets`, they are as long as
        the runs that set the targets, whatever the point's horizon. The method's settings override the
        workload's, so that a method is the same on every workload."""
        times = 1.0 if targets else self.profiles.longest * point.get(HORIZON, 1.0)
        values = {key.rpartition(".")[2]: value for key, value in point.items()}
        # the point as part of an arm's name: `_lr0p001_horizon0p5`
        short = "".join(f"_{k}{v if isinstance(v, str) else number(v)}" for k, v in values.items())
        key = (method, short, workload, times, *seeds)
        if key not in self._made:
            label = f"{method}_{workload}{short}" + "_target" * targets
            base, place = run_part(self.config), self.profiles.workloads[workload]
            run = replace(base, evaluate=["val"], stabilizer=replace(base.stabilizer, name="none"))
            run = with_size(changed(run, with_text(base, place.settings)), place)
            run = changed(run, self.profiles.methods[method].settings_at(point))
            every = self.steps(workload, 1 / self.profiles.evaluations)
            run = replace(run, steps=self.steps(workload, times), eval_every=every)
            runs = [replace(run, seed=seed) for seed in seeds]
            track = track_of(self.config)
            self._made[key] = [RunSpec(NAME, method, label, 1.0, run, of_track=track) for run in runs]
        return self._made[key]

    def steps(self, workload: str, times: float = 1.0) -> int:
        """Return the length, in steps, of the runs that set a workload's target, multiplied by `times`."""
        return max(1, round(self.profiles.steps * self.profiles.workloads[workload].steps * times))

    def reached(self, specs: Specs, workload: str) -> dict[str, tuple[int | None, float | None]]:
        """Return, by seed, the steps and the seconds until a run reached the workload's target; both None for
        a miss. A run that diverged later still counts. Runs that failed or were lost are left out."""
        ran = {str(s.run.seed): self.results.get(s.run_id, RunResult()) for s in specs}
        target = self.targets[workload]
        return {
            seed: first_at_or_below(result.get("curve") or [], target) or (None, None)
            for seed, result in ran.items()
            if is_conclusive(result)
        }

    def lowest_completed(self, spec: RunSpec) -> float:
        """Return the lowest loss of a run on the fixed windows; infinite if the run did not complete."""
        result = self.results.get(spec.run_id)
        return lowest(result) if math.isfinite(val_loss(result)) else math.inf

    def _mean_lowest(self, specs: Specs) -> float:
        return statistics.fmean(map(self.lowest_completed, specs))

    # -- targets

    def yardstick(self, workload: str) -> Search:
        """Return the search over the yardstick's grid on a workload, with runs as long as the target's."""
        name = self.profiles.yardstick
        return Search(
            points(self.profiles.methods[name].grid),
            lambda point: self.runs(name, point, workload, self.calibration_seeds, targets=True),
            self.results,
            ratios={},
            score=lambda runs, _: self._mean_lowest(runs),
            canonical=lambda point: {key: value for key, value in point.items() if key != HORIZON},
        )

    def best(self, workload: str) -> Point | None:
        """Return the yardstick's best point on a workload; None if a run is missing or none completed."""
        search = self.yardstick(workload)
        return None if search.open else search.best()

    def again(self, workload: str) -> list[RunSpec]:
        """Return the runs that set a workload's target; empty until the yardstick's best point is known."""
        point = self.best(workload)
        if point is None:
            return []
        return self.runs(self.profiles.yardstick, point, workload, self.target_seeds, targets=True)

    @cached_property
    def workloads(self) -> dict[str, Target]:
        """The decision's record of each workload. The best times to the target are filled in later."""
        profiles = self.profiles
        grid = profiles.methods[profiles.yardstick].grid
        workloads: dict[str, Target] = {}
        for name, workload in profiles.workloads.items():
            point, again = self.best(name), self.again(name)
            ended = {str(s.run.seed): self.lowest_completed(s) for s in again}
            losses = {seed: loss for seed, loss in ended.items() if math.isfinite(loss)}
            known = losses and not waiting(again, self.results)
            workloads[name] = {
                "about": workload.about,
                "calibrates": name in profiles.calibrate_on,
                "steps": self.steps(name),
                "longest": self.steps(name, profiles.longest),
                "point": point,
                "edges": edges_of(grid, point or {}),
                "lowest": losses,
                "loss": statistics.median(losses.values()) + profiles.target_slack if known else None,
                "best_steps": None,
                "best_seconds": None,
            }
        return workloads

    @cached_property
    def targets(self) -> dict[str, float]:
        """The loss to reach on each workload, for workloads whose target is known so far."""
        losses = {name: workload["loss"] for name, workload in self.workloads.items()}
        return {name: loss for name, loss in losses.items() if loss is not None}

    # -- configurations

    def grid(self, method: str) -> Search:
        """Return the search over a method's grid. A point's runs are those on calibration workloads."""

        def runs_of(point: Point) -> list[RunSpec]:
            return list(itertools.chain(*self._calibration(method, point).values()))

        return Search(points(self.profiles.methods[method].grid), runs_of, self.results, ratios={})

    def _calibration(self, method: str, point: Point) -> dict[str, list[RunSpec]]:
        """Return, by calibration workload that the method can train, the method's runs at a point."""
        cannot, seeds = self.profiles.methods[method].cannot, self.calibration_seeds
        names = [name for name in self.profiles.calibrate_on if name not in cannot]
        return {name: self.runs(method, point, name, seeds) for name in names}

    @cached_property
    def chosen(self) -> dict[str, Point]:
        """Each method's configuration, once the targets of the calibration workloads and the results of the
        method's whole grid are known. A method whose runs all failed or were lost has none."""
        if not set(self.profiles.calibrate_on) <= set(self.targets):
            return {}
        chosen: dict[str, Point] = {}
        for method in self.profiles.methods:
            grid = self.grid(method)
            ran = [
                dict(point)
                for point, runs in grid.tried.items()
                if any(is_conclusive(self.results.get(s.run_id)) for s in runs)
            ]
            if ran and not grid.open:
                chosen[method] = min(ran, key=lambda point: self._rank(method, point))
        return chosen

    def times(self, method: str, point: Point) -> dict[str, float]:
        """Return, by calibration workload, the median number of steps in which a point reaches the target,
        divided by the length of the runs that set the target; infinite for a miss."""
        runs, times = self._calibration(method, point), {}
        for name in self.profiles.calibrate_on:
            reached = self.reached(runs.get(name, ()), name)
            time = median(steps for steps, _ in reached.values())
            times[name] = math.inf if time is None else time / self.steps(name)
        return times

    def _rank(self, method: str, point: Point) -> tuple[float, float]:
        """Return the key by which points are ranked, lowest first. It holds the mean time, and then by how
        many nats, averaged over workloads, the lowest losses lie above the targets."""
        runs = self._calibration(method, point)
        above = [self._mean_lowest(specs) - self.targets[name] for name, specs in runs.items()]
        return mean_time(self.times(method, point)), statistics.fmean(above)

    def rates(self, method: str, point: Point, workload: str) -> dict[float, list[RunSpec]]:
        """Return, by learning rate, the calibration runs that differ from a point in no other setting."""
        rates = self.grid(method).along(point, RATE) if RATE in point else ()
        return {float(lr): self._calibration(method, {**point, RATE: lr})[workload] for lr in rates}

    # -- scores

    @cached_property
    def scored(self) -> dict[str, dict[str, list[RunSpec]]]:
        """The runs to be scored, by method and workload, of all methods whose configuration is known.
        Workloads that a method cannot train are left out."""
        scored = {}
        for method, point in self.chosen.items():
            names = [name for name in self.targets if name not in self.profiles.methods[method].cannot]
            if names:
                scored[method] = {name: self.runs(method, point, name, self.config.seeds) for name in names}
        return scored

    def specs(self) -> list[RunSpec]:
        """Return every run that can be planned so far. The runs to be scored are added once all runs that set
        targets have results."""
        specs: list[RunSpec] = []
        whole = True
        for name in self.profiles.workloads:
            first, again = self.yardstick(name).specs, self.again(name)
            specs += [*first, *again]
            whole = whole and not waiting(again or first, self.results)
        for method in self.profiles.methods:
            specs += self.grid(method).specs
        for by_workload in self.scored.values() if whole else ():
            specs += itertools.chain(*by_workload.values())
        return specs


def tokens_per_step(config: Config) -> dict[str, int]:
    """Return the tokens of a step on each workload, which all methods share; of images, how many."""
    phases, method = Phases(config, {}), config.profiles.yardstick
    point = points(config.profiles.methods[method].grid)[0]
    runs = {name: phases.runs(method, point, name, [0]) for name in config.profiles.workloads}
    return {name: spec.run.tokens_per_step for name, [spec] in runs.items()}


def edges_of(grid: Mapping[str, Sequence[Any]], point: Mapping[str, Any]) -> dict[str, str]:
    """Return, by setting, the grid's end on which a point's number lies, if any; horizons are left out."""
    edges = {}
    for key, values in grid.items():
        numbers = all(isinstance(value, int | float) for value in values)
        if key in point and key != HORIZON and numbers and len(set(values)) > 1:
            edge = edge_of(values, point[key])
            if edge:
                edges[key] = edge
    return edges

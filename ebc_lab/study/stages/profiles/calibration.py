"""Three phases of the stage profiles, each as far as the results tell: targets, configurations, scores.

1. The yardstick's grid on every workload; its best point there, trained again with other seeds, sets the
   target: a point that was only lucky does not.
2. Every method's grid on the workloads of the calibration: one point for all of them. So AlgoPerf-calibrated
   methods are chosen (Kasimbeg et al., arXiv:2505.24005), there on all workloads that are scored.
3. Every method at that point on every workload, with seeds of which none has chosen anything.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ebc_lab.config.schema import HORIZON, Config
from ebc_lab.records.decisions import Target
from ebc_lab.records.spec import RunSpec

from ..rules import Results, edge_of, is_conclusive, val_loss
from ..runs import waiting
from .plan import Maker, Point, points_of, steps_of
from .scores import lowest, median, over_hints, times_of

RATE = "optimizer.lr"


@dataclass(frozen=True)
class Tried:
    """A point of a grid with its runs: those on one workload, or on each."""

    point: Point
    runs: Mapping[str, list[RunSpec]]  # by workload

    @property
    def specs(self) -> list[RunSpec]:
        return [s for of in self.runs.values() for s in of]


@dataclass(frozen=True)
class Chosen:
    """The one configuration of a method, and what chose it."""

    point: Point
    value: float  # geometric mean of steps over those of the runs that set the target, a miss as 4
    missed: list[str]  # workloads


class Phases:
    """What was tried so far, and what it came to."""

    def __init__(self, config: Config, results: Results):
        self.config = config
        self.profiles = config.profiles
        self.results = results
        self.maker = Maker.of(config)
        first, each = config.study.stage_seed, self.profiles.calibration_seeds
        self.calibration_seeds = range(first, first + each)
        self.target_seeds = range(first + each, first + each + self.profiles.target_seeds)

    # -- targets

    def searched(self, workload: str) -> list[Tried]:
        """Return the yardstick's points on a workload, whose horizon is that of the target."""
        name = self.profiles.yardstick
        points: list[Point] = []
        for point in points_of(self.profiles.methods[name]):
            whole = {key: value for key, value in point.items() if key != HORIZON}
            points += [whole] if whole not in points else []
        seeds = self.calibration_seeds
        return [Tried(p, {workload: self.maker.runs(name, p, workload, seeds, targets=True)}) for p in points]

    def best(self, workload: str) -> Point | None:
        """Return the yardstick's point with the lowest mean of its runs' lowest losses; None while one is
        missing, or where none completed."""
        tried = self.searched(workload)
        if any(waiting(t.specs, self.results) for t in tried):
            return None
        loss, nth = min((self._lowest(t.specs), i) for i, t in enumerate(tried))
        return tried[nth].point if math.isfinite(loss) else None

    def _lowest(self, specs: Sequence[RunSpec]) -> float:
        return statistics.fmean(self.lowest_completed(s) for s in specs)

    def lowest_completed(self, spec: RunSpec) -> float:
        """Return the lowest loss of a run on the fixed windows; infinite where it did not complete."""
        result = self.results.get(spec.run_id)
        return lowest(result) if math.isfinite(val_loss(result)) else math.inf

    def again(self, workload: str) -> list[RunSpec]:
        """Return the runs that set a workload's target; none while the best point is not known."""
        point = self.best(workload)
        if point is None:
            return []
        return self.maker.runs(self.profiles.yardstick, point, workload, self.target_seeds, targets=True)

    def target(self, workload: str) -> float | None:
        """Return the loss to reach; None while it is not known, or where it cannot be."""
        specs = self.again(workload)
        if not specs or waiting(specs, self.results):
            return None
        losses = [loss for s in specs if math.isfinite(loss := self.lowest_completed(s))]
        return statistics.median(losses) + self.profiles.target_slack if losses else None

    def targets(self) -> dict[str, float]:
        """Return the targets that are known."""
        found = {name: self.target(name) for name in self.profiles.workloads}
        return {name: loss for name, loss in found.items() if loss is not None}

    # -- configurations

    def grid(self, method: str) -> list[Tried]:
        """Return a method's points, each on the workloads of the calibration."""
        settings, seeds = self.profiles.methods[method], self.calibration_seeds
        of = [name for name in self.profiles.calibrate_on if name not in settings.cannot]
        return [
            Tried(point, {name: self.maker.runs(method, point, name, seeds) for name in of})
            for point in points_of(settings)
        ]

    def chosen(self, method: str, targets: Mapping[str, float]) -> Chosen | None:
        """Return a method's configuration; None while a run or a target is missing, or where no run ended."""
        of = self.profiles.calibrate_on
        grid = self.grid(method)
        if not set(of) <= set(targets) or any(waiting(t.specs, self.results) for t in grid):
            return None
        grid = [t for t in grid if any(is_conclusive(self.results.get(s.run_id)) for s in t.specs)]
        if not grid:
            return None
        ranked = [self._rank(t, targets) for t in grid]
        best = min(range(len(grid)), key=lambda i: (*ranked[i], i))
        times = self._times(grid[best], targets)
        missed = [name for name, time in times.items() if math.isinf(time)]
        return Chosen(grid[best].point, ranked[best][0], missed)

    def _times(self, tried: Tried, targets: Mapping[str, float]) -> dict[str, float]:
        return {
            name: median(
                [steps for steps, _ in times_of(tried.runs.get(name, ()), self.results, targets[name])]
            )
            for name in self.profiles.calibrate_on
        }

    def _rank(self, tried: Tried, targets: Mapping[str, float]) -> tuple[float, float]:
        """Return what a point is chosen by, the less the better: its mean time, then how far its lowest
        losses are above the targets on average."""
        times = self._times(tried, targets)
        hints = [self.steps(name) for name in times]
        above = [self._lowest(runs) - targets[name] for name, runs in tried.runs.items()]
        return over_hints(list(times.values()), hints), statistics.fmean(above)

    def steps(self, workload: str, times: float = 1.0) -> int:
        """Return the length of the runs that set a workload's target."""
        return steps_of(self.config, self.profiles.workloads[workload], times)

    # -- scores

    def scored(self, method: str, targets: Mapping[str, float]) -> dict[str, list[RunSpec]]:
        """Return by workload the runs that are scored; none while the configuration is not known."""
        chosen = self.chosen(method, targets)
        if chosen is None:
            return {}
        seeds = self.config.seeds
        of = [name for name in targets if name not in self.profiles.methods[method].cannot]
        return {name: self.maker.runs(method, chosen.point, name, seeds) for name in of}

    def whole(self) -> bool:
        """Tell whether every target is known that can be."""
        return not any(waiting(self.again(name) or [*self._first(name)], self.results)
                       for name in self.profiles.workloads)  # fmt: skip

    def _first(self, workload: str) -> Iterator[RunSpec]:
        for tried in self.searched(workload):
            yield from tried.specs

    def specs(self) -> list[RunSpec]:
        """Return every run that is asked for by now."""
        specs = [s for name in self.profiles.workloads for s in (*self._first(name), *self.again(name))]
        specs += [s for method in self.profiles.methods for t in self.grid(method) for s in t.specs]
        if self.whole():
            targets = self.targets()
            for method in self.profiles.methods:
                specs += [s for of in self.scored(method, targets).values() for s in of]
        return specs

    def rates(self, method: str, point: Point, workload: str) -> dict[float, list[RunSpec]]:
        """Return by learning rate the runs of the calibration that differ from a point in it alone."""
        rest = {key: value for key, value in point.items() if key != RATE}
        alike = [t for t in self.grid(method) if RATE in t.point and rest.items() <= t.point.items()]
        return {float(t.point[RATE]): t.runs[workload] for t in alike}


def edges_of(grid: Mapping[str, Sequence[Any]], point: Mapping[str, Any]) -> dict[str, str]:
    """Return by setting the end of its grid that a point lies on; a horizon has no further values."""
    edges = {}
    for key, values in grid.items():
        numbers = all(isinstance(value, int | float) for value in values)
        if key in point and numbers and len(set(values)) > 1:
            edge = edge_of(values, point[key])
            if edge and key != HORIZON:
                edges[key] = edge
    return edges


def target_of(phases: Phases, workload: str, loss: float | None) -> Target:
    """Describe a workload's target; the best times to it come with the scores."""
    profiles = phases.profiles
    point = phases.best(workload)
    again = {s.run.seed: phases.lowest_completed(s) for s in phases.again(workload)}
    return {
        "about": profiles.workloads[workload].about,
        "calibrates": workload in profiles.calibrate_on,
        "steps": phases.steps(workload),
        "longest": phases.steps(workload, profiles.longest),
        "point": point,
        "edges": edges_of(profiles.methods[profiles.yardstick].grid, point or {}),
        "lowest": {str(seed): x for seed, x in again.items() if math.isfinite(x)},
        "loss": loss,
        "best_steps": None,
        "best_seconds": None,
    }

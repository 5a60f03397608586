"""The search for a best point: how lr_sweep, calibrate, tune and carry find the settings that they choose."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

from ebc_lab.records.spec import RunSpec

from .rules import Results, Specs, band_distance, edge_of, is_conclusive, losses_of
from .runs import Rivals, waiting

Point = dict[str, Any]  # setting -> its value
Key = tuple[tuple[str, Any], ...]  # the items of a point
Race = Callable[[list[RunSpec], Rivals], list[RunSpec]]  # a point's runs, with what ends them early


def worst_loss(runs: Specs, results: Results) -> float:
    """Return the validation loss of the worst of a point's seeds, infinite where one did not complete."""
    return max(losses_of(runs, results))


def mean_loss(runs: Specs, results: Results) -> float:
    """Return the mean validation loss over a point's seeds, infinite where one did not complete."""
    return statistics.fmean(losses_of(runs, results))


def conclusive(runs: Iterable[RunSpec], results: Results) -> bool:
    """Return whether each of these runs says something about its settings: none failed, or was lost."""
    return all(is_conclusive(results.get(s.run_id)) for s in runs)


@dataclass
class Search:
    """The points that were tried, each with its runs, the best of them, and steps that try further points.

    A point gives some settings a value; what they mean is the caller's affair. A stage makes its search anew
    whenever it is asked for its runs, and takes all of its steps one after the other: a step does nothing
    while a run that an earlier one asked for has no result. So the search gets as far as the results tell,
    and asks for the same runs whenever the same results are known.
    """

    points: InitVar[Iterable[Point]]  # tried first
    runs_of: Callable[[Point], list[RunSpec]]  # one for each seed
    results: Results
    ratios: Mapping[str, float]  # the settings whose grids may grow, and how far apart their values are
    score: Callable[[Specs, Results], float] = worst_loss  # of a point; infinite: it cannot win
    prefer_low: str = ""  # of points with equal scores the one with the lower value of this setting is better
    # a value of a setting as a run can have it, None where it cannot
    fitted: Callable[[str, float], float | None] = lambda key, value: value
    canonical: Callable[[Point], Point] = dict  # a point without what means nothing in it
    race: Race | None = None  # None: every run is trained to its end
    tried: dict[Key, list[RunSpec]] = field(default_factory=dict, init=False)
    extended: list[Point] = field(default_factory=list, init=False)  # the points by which grids grew
    extensions: int = field(default=0, init=False)  # how often they did
    lowered_setting: str = field(default="", init=False)  # what had to go down before any point completed

    def __post_init__(self, points: Iterable[Point]) -> None:
        self.add(points)

    # -- what is known ---------------------------------------------------------------------------------------

    @property
    def specs(self) -> list[RunSpec]:
        """The runs of all points, in the order in which these are listed."""
        return list(itertools.chain(*self.tried.values()))

    @property
    def open(self) -> bool:
        """True while a run has no result."""
        return waiting(self.specs, self.results)

    @property
    def lost(self) -> bool:
        """True where no point completed though none failed: each diverged with one of its seeds."""
        return self.best() is None and conclusive(self.specs, self.results)

    def runs(self, point: Mapping[str, Any]) -> list[RunSpec]:
        """Return the runs of a point that was tried."""
        return self.tried[tuple(point.items())]

    def score_of(self, point: Mapping[str, Any]) -> float:
        return self.score(self.runs(point), self.results)

    def best(self) -> Point | None:
        """Return the point with the lowest score, the first of equal ones; None where no score is finite."""
        points = map(dict, self.tried)
        found = min(points, key=lambda p: (self.score_of(p), p.get(self.prefer_low, 0)), default=None)
        return found if found is not None and math.isfinite(self.score_of(found)) else None

    def alike(self, point: Mapping[str, Any]) -> list[Point]:
        """Return the points that differ from this one only in settings whose grids may grow."""
        fixed = {k: v for k, v in point.items() if k not in self.ratios}
        return [p for p in map(dict, self.tried) if fixed.items() <= p.items()]

    def along(self, point: Mapping[str, Any], key: str) -> dict[float, list[RunSpec]]:
        """Return the runs of the points that differ from this one in a single setting, by its value."""
        rest = {k: v for k, v in point.items() if k != key}
        return {p[key]: self.runs(p) for p in map(dict, self.tried) if rest.items() <= p.items()}

    def mean_losses(self, point: Mapping[str, Any], key: str) -> dict[float, float]:
        """Return the mean losses of those points, by the value of the setting."""
        return {value: mean_loss(runs, self.results) for value, runs in self.along(point, key).items()}

    def edge(self, point: Mapping[str, Any], key: str) -> str | None:
        """Return the end of its grid that a point lies on; None within it, and where one value was tried."""
        values = {p[key] for p in self.alike(point)}
        return edge_of([*values], point[key]) if len(values) > 1 else None

    # -- steps -----------------------------------------------------------------------------------------------

    def add(self, points: Iterable[Point], *, grown: bool = False) -> bool:
        """Try those points that were not tried before, and return whether there were any.

        Their runs race against the points that are there now, all of which have their results, and never
        against what happens to be finished when a run is planned.
        """
        rivals = list(self.tried.values())
        wanted = {tuple(p.items()): p for p in map(self.canonical, points)}
        new = {key: p for key, p in wanted.items() if key not in self.tried}
        for key, point in new.items():
            runs = self.runs_of(point)
            self.tried[key] = self.race(runs, rivals) if self.race else runs
        self.extended += new.values() if grown else ()
        return bool(new)

    def list_first(self, points: Iterable[Point]) -> None:
        """List these points, which were tried, before all others, in this order."""
        first = {key: self.tried[key] for key in (tuple(self.canonical(p).items()) for p in points)}
        self.tried = first | self.tried

    def step(self, near: Callable[[Point], Iterable[Point]], *, grown: bool = False) -> bool:
        """Try the points that `near` makes of the best one, and return whether there were any new ones."""
        best = None if self.open else self.best()
        return best is not None and self.add(near(best), grown=grown)

    def others(self, key: str, values: Sequence[Any]) -> None:
        """Try the other values of a setting at the best point, if that has it."""
        self.step(lambda best: [{**best, key: value} for value in values] if key in best else [])

    def neighbours(self, keys: Iterable[str]) -> None:
        """Try the values next to the best one of each of these settings, where the best point differs from
        the first in a setting whose grid does not grow."""

        def near(best: Point) -> Iterator[Point]:
            if best not in self.alike(dict(next(iter(self.tried)))):
                for key in keys:
                    yield from self.moved(best, key, best[key] / self.ratios[key])
                    yield from self.moved(best, key, best[key] * self.ratios[key])

        self.step(near)

    def grow(self, most: int, *, by_spacing: bool = False, lowering: str = "") -> None:
        """Extend each grid on whose edge the best point lies until that lies inside, `most` times in all, by
        its ratio or by that of its two last values there (`by_spacing`). While every point diverges,
        `lowering` goes down, two ratios at a time."""
        while self.extensions < most and not self.open:
            further: Iterable[Point] = self._beyond(by_spacing)
            if lowering and self.lost:
                self.lowered_setting = lowering
                lowest = min(map(dict, self.tried), key=lambda p: p.get(self.prefer_low, 0))
                further = self.moved(lowest, lowering, lowest[lowering] / self.ratios[lowering] ** 2)
            if not self.add(further, grown=True):
                return
            self.extensions += 1

    def _beyond(self, by_spacing: bool) -> Iterator[Point]:
        best = self.best() or {}
        for key in (k for k in best if k in self.ratios):
            values, value, ratio = {p[key] for p in self.alike(best)}, best[key], self.ratios[key]
            below = max((x for x in values if x < value), default=None)
            above = min((x for x in values if x > value), default=None)
            if key == self.lowered_setting:  # the values next to it may have been leapt over
                if below is None or value / below > ratio**1.5:
                    yield from self.moved(best, key, value / ratio)
                if above is None or above / value > ratio**1.5:
                    yield from self.moved(best, key, value * ratio)
                continue
            if above is None and (below or not by_spacing):
                yield from self.moved(best, key, value * value / below if by_spacing else value * ratio)
            if below is None and (above or not by_spacing):
                yield from self.moved(best, key, value * value / above if by_spacing else value / ratio)

    def seek(
        self, key: str, figure: Callable[[list[RunSpec]], float | None], band: Sequence[float], most: int
    ) -> None:
        """Look for a value of the only setting at which a figure that rises with it lies in a band: halfway,
        in ratio, between two values whose figures lie on both sides of it, else one ratio beyond the end that
        is nearer to it; `most` values at the most."""
        for _ in range(most):
            found = {dict(point)[key]: figure(runs) for point, runs in self.tried.items()}
            known = sorted((value, x) for value, x in found.items() if x is not None)
            if self.open or not known or any(band_distance(x, band) == 0 for _, x in known):
                return
            (least, _), (most_tried, highest) = known[0], known[-1]
            value = most_tried * self.ratios[key] if highest < band[0] else least / self.ratios[key]
            for (low, x), (high, y) in itertools.pairwise(known):
                if x < band[0] and y > band[1]:
                    value = math.sqrt(low * high)
                    break
            if not self.add(self.moved({}, key, value)):
                return

    def moved(self, point: Point, key: str, value: float) -> list[Point]:
        """Return the point with another value of a setting; nothing where no run can have it."""
        fitted = self.fitted(key, value)
        return [] if fitted is None else [{**point, key: fitted}]

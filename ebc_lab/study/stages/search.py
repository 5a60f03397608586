"""The search for a best point. Several stages use it to find the settings that they choose."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from functools import partial
from typing import Any

from ebc_lab.records.spec import RunSpec

from .rules import Results, Specs, band_distance, edge_of, is_conclusive, losses_of
from .runs import Rivals, waiting

Point = dict[str, Any]  # setting -> its value
Key = tuple[tuple[str, Any], ...]  # the items of a point
Race = Callable[[list[RunSpec], Rivals], list[RunSpec]]  # gives a point's runs the bounds that stop them


def worst_loss(runs: Specs, results: Results) -> float:
    """Return the highest validation loss over a point's seeds; infinite if any run did not complete."""
    return max(losses_of(runs, results))


def mean_loss(runs: Specs, results: Results) -> float:
    """Return the mean validation loss over a point's seeds; infinite if any run did not complete."""
    return statistics.fmean(losses_of(runs, results))


def conclusive(runs: Iterable[RunSpec], results: Results) -> bool:
    """Return whether every run has a conclusive result: none failed, was lost or is still unfinished."""
    return all(is_conclusive(results.get(s.run_id)) for s in runs)


@dataclass
class Search:
    """A search for the best point: the points tried so far with their runs, and steps that try others.

    A point gives values to some settings, and only the caller knows what the settings mean. Whenever a stage
    is asked for its runs, it makes its search anew and takes every step in turn. A step does nothing while a
    run from an earlier step has no result. So the search gets as far as the results allow, and the same
    results always lead to the same runs.
    """

    points: InitVar[Iterable[Point]]  # tried first
    runs_of: Callable[[Point], list[RunSpec]]  # one run per seed
    results: Results
    ratios: Mapping[str, float]  # setting whose grid may grow -> ratio of neighbouring values
    score: Callable[[Specs, Results], float] = worst_loss  # of a point's runs; infinite: it cannot win
    prefer_low: str = ""  # among points of equal score, the one with the lower value of this setting wins
    # rounds the value of a setting to one that a run can have; None where there is no such value
    fitted: Callable[[str, float], float | None] = lambda key, value: value
    canonical: Callable[[Point], Point] = dict  # drops settings without effect
    race: Race | None = None  # None: every run is trained to its end
    most: int = 0  # points that may be tried until `settle`; 0: any number
    tried: dict[Key, list[RunSpec]] = field(default_factory=dict, init=False)
    extended: list[Point] = field(default_factory=list, init=False)  # points added to growing grids
    extensions: int = field(default=0, init=False)  # how often grids grew
    lowered_setting: str = field(default="", init=False)  # lowered because no point completed
    settled: int | None = field(default=None, init=False)  # the best is chosen among the first so many points
    finals: dict[Key, list[RunSpec]] = field(default_factory=dict, init=False)  # further runs of finalists

    def __post_init__(self, points: Iterable[Point]) -> None:
        self.add(points)

    # -- what is known ---------------------------------------------------------------------------------------

    @property
    def specs(self) -> list[RunSpec]:
        """The runs of all points, in the order of the points, and then further ones of the finalists."""
        return list(itertools.chain(*self.tried.values(), *self.finals.values()))

    @property
    def open(self) -> bool:
        """Whether any run still lacks a result."""
        return waiting(self.specs, self.results)

    @property
    def lost(self) -> bool:
        """Whether no point completed although no run failed or is missing: each has a diverged seed."""
        return self.best() is None and conclusive(self.specs, self.results)

    def runs(self, point: Mapping[str, Any], *, final: bool = False) -> list[RunSpec]:
        """Return a point's runs; with `final`, those that it has as a finalist as well."""
        key = tuple(point.items())
        return [*self.tried[key], *(self.finals.get(key, ()) if final else ())]

    def score_of(self, point: Mapping[str, Any]) -> float:
        return self.score(self.runs(point), self.results)

    @property
    def eligible(self) -> dict[Key, list[RunSpec]]:
        """The points, with their runs, among which the best is chosen."""
        return dict(itertools.islice(self.tried.items(), self.settled))

    @property
    def deciding(self) -> dict[Key, float]:
        """The figures of the points that may be the best, the lowest of which is: their scores or, once all
        finalists have their results, the finalists' mean losses. If a run of every finalist diverged, the
        scores of the other points decide."""
        scores = {key: self.score_of(dict(key)) for key in self.eligible}
        if not self.finals or waiting([*itertools.chain(*self.finals.values())], self.results):
            return scores
        means = {key: mean_loss(self.runs(dict(key), final=True), self.results) for key in self.finals}
        others = {key: score for key, score in scores.items() if key not in means}
        return means if any(map(math.isfinite, means.values())) else others

    def ranked(self) -> list[Point]:
        """Return the points whose figure is finite, the best first. `prefer_low` breaks ties."""
        figures = self.deciding
        finite = [dict(key) for key, figure in figures.items() if math.isfinite(figure)]
        return sorted(finite, key=lambda p: (figures[tuple(p.items())], p.get(self.prefer_low, 0)))

    def best(self) -> Point | None:
        """Return the first of the ranked points, or None if there is none."""
        return next(iter(self.ranked()), None)

    def alike(self, point: Mapping[str, Any]) -> list[Point]:
        """Return the tried points that differ from this one at most in settings whose grids may grow."""
        fixed = {k: v for k, v in point.items() if k not in self.ratios}
        return [p for p in map(dict, self.tried) if fixed.items() <= p.items()]

    def along(self, point: Mapping[str, Any], key: str) -> dict[float, list[RunSpec]]:
        """Return, by value of `key`, the runs of tried points with the same other settings as this one."""
        rest = {k: v for k, v in point.items() if k != key}
        return {p[key]: self.runs(p) for p in map(dict, self.tried) if rest.items() <= p.items()}

    def mean_losses(self, point: Mapping[str, Any], key: str) -> dict[float, float]:
        """Return the mean losses of the points that `along` finds, by the value of `key`."""
        return {value: mean_loss(runs, self.results) for value, runs in self.along(point, key).items()}

    def edge(self, point: Mapping[str, Any], key: str) -> str | None:
        """Return the end of `key`'s grid on which a point lies; None inside, or if only one value was
        tried."""
        values = {p[key] for p in self.alike(point)}
        return edge_of([*values], point[key]) if len(values) > 1 else None

    def values(self, key: str) -> list[float]:
        """Return the numbers tried of a setting, at whatever other settings, in rising order."""
        values = {p[key] for p in map(dict, self.tried) if key in p}
        return sorted(x for x in values if isinstance(x, int | float) and not isinstance(x, bool))

    def edge_of_all(self, point: Mapping[str, Any], key: str) -> str | None:
        """Return the end on which a point lies among all numbers tried of `key`; None inside, if only one was
        tried, or if the setting is no number."""
        values = self.values(key)
        return edge_of(values, point[key]) if len(values) > 1 and key in point else None

    # -- steps -----------------------------------------------------------------------------------------------

    def add(self, points: Iterable[Point], *, grown: bool = False) -> bool:
        """Try the points that have not been tried yet, and return whether there were any.

        The new runs race only against the points tried earlier, which all have their results, and never
        against whatever other runs happen to have finished by then.
        """
        rivals = list(self.tried.values())
        wanted = {tuple(p.items()): p for p in map(self.canonical, points)}
        new = {key: p for key, p in wanted.items() if key not in self.tried}
        if self.most and self.settled is None:
            new = dict(itertools.islice(new.items(), self.most - len(self.tried)))
        for key, point in new.items():
            runs = self.runs_of(point)
            self.tried[key] = self.race(runs, rivals) if self.race else runs
        self.extended += new.values() if grown else ()
        return bool(new)

    def list_first(self, points: Iterable[Point]) -> None:
        """Move these points, which have all been tried, to the front of the list in this order."""
        first = {key: self.tried[key] for key in (tuple(self.canonical(p).items()) for p in points)}
        self.tried = first | self.tried

    def step(self, near: Callable[[Point], Iterable[Point]], *, grown: bool = False) -> bool:
        """Try the points that `near` derives from the best point, and return whether any of them was new."""
        best = None if self.open else self.best()
        return best is not None and self.add(near(best), grown=grown)

    def others(self, key: str, values: Sequence[Any]) -> None:
        """Try these values of setting `key` at the best point, if the best point has that setting."""
        self.step(lambda best: [{**best, key: value} for value in values] if key in best else [])

    def neighbours(self, keys: Iterable[str]) -> None:
        """Try, for each of these settings, the values next to that of the best point. Do so only if the best
        point differs from the first point in a setting whose grid does not grow."""

        def near(best: Point) -> Iterator[Point]:
            if best not in self.alike(dict(next(iter(self.tried)))):
                for key in keys:
                    yield from self.moved(best, key, best[key] / self.ratios[key])
                    yield from self.moved(best, key, best[key] * self.ratios[key])

        self.step(near)

    def beyond(self, key: str, rule: str, most: int) -> None:
        """Try further values of setting `key` while the best lies on an edge of those tried with the same
        other settings, at most `most` times. `rule`: `log`, by the ratio to the next value, or `linear`."""

        def further(best: Point) -> Iterator[Point]:
            values = sorted(self.along(best, key))
            if len(values) > 1 and best[key] in (values[0], values[-1]):
                inside = values[1] if best[key] == values[0] else values[-2]
                step = best[key] - inside
                yield from self.moved(
                    best, key, best[key] + step if rule == "linear" else best[key] ** 2 / inside
                )

        for _ in range(most):
            self.step(further, grown=True)

    def refine(self, rules: Mapping[str, str]) -> None:
        """Use up the points that are left: try the values half-way from the best to its neighbours, of one
        setting of `rules` (setting -> `log` or `linear`) after the other."""

        def between(key: str, best: Point) -> Iterator[Point]:
            values, value = self.values(key), best[key]
            at = values.index(value)
            for other in (*values[:at][-1:], *values[at + 1 :][:1]):
                mean = (value + other) / 2 if rules[key] == "linear" else math.sqrt(value * other)
                yield from self.moved(best, key, mean)

        missed = 0  # settings in a row of which nothing new was found
        for key in itertools.cycle(rules):
            best = self.best()
            if self.open or best is None or missed > len(rules) or len(self.tried) >= self.most:
                return
            tried = key in best and self.step(partial(between, key))
            missed = 0 if tried else missed + 1

    def settle(self) -> None:
        """Choose the best among the points tried so far, whatever is tried later."""
        if not self.open:
            self.settled = len(self.tried)

    def final(self, most: int, runs_of: Callable[[Point], list[RunSpec]]) -> None:
        """Train the best points further, at most `most` of them, on seeds that chose none of them. A lucky
        point among many has low losses on the seeds that picked it, and not on others."""
        if not self.open:
            self.finals = {tuple(p.items()): runs_of(p) for p in self.ranked()[:most]}

    def grow(self, most: int, *, by_spacing: bool = False, lowering: str = "") -> None:
        """Extend each grid until the best point no longer lies on its edge, at most `most` times in all. A
        grid grows by its ratio or, with `by_spacing`, by the ratio of its last two values. While every point
        diverges, the setting `lowering` is lowered instead, two ratios at a time."""
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
            if key == self.lowered_setting:  # the values next to the best may have been skipped
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
        """Search for a value of the search's only setting at which `figure`, which must rise with the
        setting, lies within `band`. Add at most `most` values to the grid. Each new value is the geometric
        mean of two neighbours whose figures lie on either side of the band or, without such neighbours, one
        ratio beyond the lowest or highest value."""
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
        """Return a list of the point with `key` set to `value`; empty if no run can have that value."""
        fitted = self.fitted(key, value)
        return [] if fitted is None else [{**point, key: fitted}]

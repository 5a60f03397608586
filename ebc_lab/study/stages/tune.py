"""tune: each arm of a suite that has a grid at its own best point, every such arm with as many runs.

The search goes over every combination of an arm's grids, or through one setting after the other. It is the
same for every arm, so that none is tuned more carefully than another: as many points to begin with, the same
seeds, and grids that grow by their own ratio for all of them as often. A point counts as its worst seed: a
setting that trains well with one seed and badly with another is not an arm's best.

That a comparison of optimizers is one of their tuning: Choi et al., arXiv:1910.05446; Sivaprasad et al.,
arXiv:1910.11758.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ebc_lab.config.identity import number
from ebc_lab.config.schema import GROWING, TUNABLE, ArmConfig, Config, TuneConfig
from ebc_lab.records.decisions import Candidate, CurvePoint, Decision, TunedArm, TunedTrack, Window
from ebc_lab.records.figures import RunResult
from ebc_lab.records.spec import DIGITS, RunSpec, track_prefix

from .rules import Results, Undecidable, edge_of, ended, losses_of, make_decision, margin_sigma, val_loss
from .runs import RACED_FROM, Rivals, raced, waiting
from .stage import Said, Scenario, Stage, held_back_by_its_seeds, seeds_of_arm
from .statistics import luck_of_choice, window
from .suite import Point, point_in_words, points, ready, run_of, source_of, started

SHORT = {"lr_scale": "x", "warmup_share": "w"}  # how a setting is called in a point's name
Settled = tuple[tuple[str, Any], ...]  # a point that can be a key
Race = Callable[[list[RunSpec], Rivals], list[RunSpec]]  # a point's runs, with what ends them early
RATES = ("lr", "lr_scale")
HELD = "constant"  # the shape without a warm-up
FEW = 4  # arms whose best points a headline has room for


def runs(config: Config, decisions: Mapping[str, Decision], results: Results) -> list[RunSpec]:
    """Plan every point of every arm's grid, at the stage's seeds; the grids grow as their runs end."""
    specs: list[RunSpec] = []
    for track in ready(config, decisions, "tune"):
        arms = tuned_arms(config)
        for source in dict.fromkeys(arm.init for arm in arms.values() if arm.init):
            specs += _sources(config, decisions, track, source)
        for label, arm in arms.items():
            if _can_start(config, decisions, results, track, arm):
                searched = _tried(config, decisions, results, track, label, arm)
                specs += itertools.chain(*searched.tried.values())
    return specs


def _sources(config: Config, decisions: Mapping[str, Decision], track: str, label: str) -> list[RunSpec]:
    """Plan the runs of an arm from whose weights those of another start, one for each seed."""
    return [source_of(config, decisions, track, "tune", label, seed) for seed in _seeds(config)]


def _seeds(config: Config) -> range:
    return range(config.study.stage_seed, config.study.stage_seed + config.tune.seeds)


def _can_start(
    config: Config, decisions: Mapping[str, Decision], results: Results, track: str, arm: ArmConfig
) -> bool:
    """Tell whether the weights that an arm starts from are there."""
    sources = _sources(config, decisions, track, arm.init) if arm.init else []
    return all(math.isfinite(loss) for loss in losses_of(sources, results))


def tuned_arms(config: Config) -> dict[str, ArmConfig]:
    """Return the arms that have a grid, before any sweep."""
    return {label: arm for label, arm in config.ablation.arms.items() if arm.tune}


def _name(label: str, point: Point) -> str:
    """Name an arm at a point of its grid: `muon_lr0p016_w0p167_cosine`."""
    return label + "".join(f"_{_value(key, value)}" for key, value in point.items())


def _value(key: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    return SHORT.get(key, key) + (number(value, DIGITS) if key == "lr" else number(value))


def _tried(
    config: Config,
    decisions: Mapping[str, Decision],
    results: Results,
    track: str,
    label: str,
    arm: ArmConfig,
) -> Search:
    """Search the points of an arm's grid, and those by which it grew."""
    runs_of = runs_maker(config, decisions, track, label, arm, results)
    margin = config.tune.race_sigmas * decisions["lr_sweep"]["tracks"][track]["sigma"]

    def race(runs: list[RunSpec], rivals: Rivals) -> list[RunSpec]:
        return [replace(s, run=raced(s.run, rivals, results, margin)) for s in runs]

    return search(config.tune, arm, runs_of, results, race if margin else None)


def runs_maker(
    config: Config,
    decisions: Mapping[str, Decision],
    track: str,
    label: str,
    arm: ArmConfig,
    results: Results,
) -> Callable[[Point], list[RunSpec]]:
    """Return what makes the runs of an arm's point, one for each seed. The weights that it starts from, if
    any, must be there."""

    def runs_of(point: Point) -> list[RunSpec]:
        runs = []
        for seed in _seeds(config):
            run, scale = run_of(config, decisions, track, arm, config.tune.steps, seed, point)
            run = replace(run, evaluate=["val"])
            if arm.init:
                source = source_of(config, decisions, track, "tune", arm.init, seed)
                run = started(run, source, results) or run
            runs.append(RunSpec("tune", label, _name(label, point), scale, run, of_track=track))
        return runs

    return runs_of


# -- the search of an arm's best point ---------------------------------------------------------------------


@dataclass
class Search:
    """Holds what was tried of one arm so far, and by which points its grids grew."""

    arm: ArmConfig
    runs_of: Callable[[Point], list[RunSpec]]
    results: Results
    race: Race | None = None  # None: every run is trained to its end
    tried: dict[Settled, list[RunSpec]] = field(default_factory=dict)
    rivals: list[list[RunSpec]] = field(default_factory=list)  # the points of all steps before this one
    extended: list[Point] = field(default_factory=list)
    extensions: int = 0
    sunk: str = ""  # the setting that had to go down before any point completed

    @property
    def open(self) -> bool:
        """Tell whether a run has no result yet: nothing further is known before."""
        return any(waiting(runs, self.results) for runs in self.tried.values())

    @property
    def lost(self) -> bool:
        """Tell whether no point completed though every run came to an end: each diverged with one of its
        seeds."""
        specs = itertools.chain(*self.tried.values())
        return self.best() is None and all(ended(self.results.get(s.run_id)) for s in specs)

    def goes_on(self) -> bool:
        """Tell whether every run has a result. Then the search takes its next step, and what it adds races
        against all that is there now: never against what happens to be finished when a run is planned."""
        if self.open:
            return False
        self.rivals = list(self.tried.values())
        return True

    def add(self, wanted: Sequence[Point], *, grown: bool = False) -> bool:
        """Try the points that were not tried before. -> whether there were any."""
        plain = (without_idle(p) for p in wanted)
        new = [p for p in plain if tuple(p.items()) not in self.tried]
        self.tried |= {tuple(p.items()): self._raced(self.runs_of(p)) for p in new}
        self.extended += new if grown else []
        return bool(new)

    def put_first(self, wanted: Sequence[Point]) -> None:
        """Put these points, which were tried, before all others, in this order."""
        first = {key: self.tried[key] for key in (tuple(without_idle(p).items()) for p in wanted)}
        self.tried = first | self.tried

    def _raced(self, runs: list[RunSpec]) -> list[RunSpec]:
        return self.race(runs, self.rivals) if self.race else runs

    def mean(self, point: Mapping[str, Any]) -> float:
        """Return the mean validation loss over the seeds, infinite where one of them did not complete."""
        return statistics.fmean(losses_of(self.tried[tuple(point.items())], self.results))

    def worst(self, point: Mapping[str, Any]) -> float:
        """Return the validation loss of the point's worst seed, infinite where that did not complete."""
        return max(losses_of(self.tried[tuple(point.items())], self.results))

    def best(self) -> Point | None:
        """Return the point whose worst seed has the lowest loss; of equal ones that with the lower learning
        rate, then the first; None if none is finite."""
        ranked = sorted(map(dict, self.tried), key=lambda p: (self.worst(p), self._rate(p)))
        return ranked[0] if ranked and math.isfinite(self.worst(ranked[0])) else None

    def _rate(self, point: Point) -> float:
        return self.tried[tuple(point.items())][0].run.optimizer.lr

    def alike(self, point: Mapping[str, Any]) -> list[Point]:
        """Return the points tried with this one's warm-up and shape, itself among them."""
        fixed = {k: v for k, v in point.items() if k not in GROWING}
        return [p for p in map(dict, self.tried) if fixed.items() <= p.items()]

    # -- the parts of the search -----------------------------------------------------------------------------

    def grow(self, most: int) -> None:
        """Extend the grids on whose edge the best point lies, until it lies inside; `most` times in all.
        While every point diverges the rate goes down, two steps of its grid at a time."""
        while self.extensions < most and self.goes_on():
            if not self.add(list(self._below() if self.lost else self._beyond()), grown=True):
                return
            self.extensions += 1

    def _below(self) -> Iterator[Point]:
        lowest = min(map(dict, self.tried), key=self._rate)
        self.sunk = next((k for k in (*RATES, *GROWING) if k in lowest), "")
        if self.sunk:
            yield from self._moved(lowest, self.sunk, ratio_of(self.arm.tune[self.sunk]) ** -2)

    def _beyond(self) -> Iterator[Point]:
        best = self.best() or {}
        for key in (k for k in best if k in GROWING):
            values = sorted({p[key] for p in self.alike(best)})
            if key == self.sunk:
                yield from self._beside(best, key, values)
            elif len(values) > 1 and best[key] in (values[0], values[-1]):
                inner = values[1] if best[key] == values[0] else values[-2]
                yield from self._moved(best, key, best[key] / inner)

    def _beside(self, best: Point, key: str, values: Sequence[float]) -> Iterator[Point]:
        """Try the values next to the best, a step of the grid away, where two steps were leapt at a time."""
        ratio = ratio_of(self.arm.tune[key])
        at = values.index(best[key])
        below = [best[key] / x for x in values[:at][-1:]]
        above = [x / best[key] for x in values[at + 1 :][:1]]
        for gap, r in ((below, 1 / ratio), (above, ratio)):
            if not gap or gap[0] > ratio**1.5:
                yield from self._moved(best, key, r)

    def _moved(self, point: Point, key: str, ratio: float) -> Iterator[Point]:
        """Multiply one setting of a point, where that is still a number that it takes."""
        value = float(f"{point[key] * ratio:.4g}")
        if TUNABLE[key].holds(value):
            yield {**point, key: value}

    def others(self, key: str) -> None:
        """Try the other values of a setting that does not grow, at the best point so far."""
        best = self.best() if self.goes_on() else None
        if best is None or key not in best:
            return
        values = self.arm.tune[key]
        self.add([{**best, key: value} for value in values])
        if key == "schedule" and HELD in values:  # never falling, it is at its best at a lower rate
            for rate in (k for k in RATES if k in best):
                self.add(list(self._moved({**best, key: HELD}, rate, 1 / ratio_of(self.arm.tune[rate]))))

    def rates_once_more(self) -> None:
        """Try the rates next to the best, where its warm-up or shape is not that of the first points."""
        best = self.best() if self.goes_on() else None
        if best is None or best in self.alike(dict(next(iter(self.tried)))):
            return
        for key in (k for k in RATES if k in best):
            ratio = ratio_of(self.arm.tune[key])
            self.add([p for r in (1 / ratio, ratio) for p in self._moved(best, key, r)])

    def widen(self, most: int) -> None:
        """Extend the grid of lr at the best point's other settings, both ways, until the LR window closes;
        `most` times in all."""
        ratio = ratio_of(self.arm.tune["lr"])
        for _ in range(most):
            best = self.best() if self.goes_on() else None
            span = window(self.curve(best)) if best is not None else None
            if best is None or span is None:
                return
            rates = sorted(self.curve(best))
            ends = [(rates[0], 1 / ratio)] * span["open_low"] + [(rates[-1], ratio)] * span["open_high"]
            further = [p for lr, r in ends for p in self._moved({**best, "lr": lr}, "lr", r)]
            if not self.add(further, grown=True):
                return

    def curve(self, point: Point) -> dict[float, float]:
        """Return by lr the mean loss of the points that differ from this one in lr alone."""
        rest = {k: v for k, v in point.items() if k != "lr"}
        return {p["lr"]: self.mean(p) for p in map(dict, self.tried) if rest.items() <= p.items()}


def ratio_of(grid: Sequence[float]) -> float:
    """Return how far apart the values of a grid are; 2 where it has one."""
    return float(grid[-1] / grid[-2]) if len(grid) > 1 else 2.0


def without_idle(point: Mapping[str, Any]) -> Point:
    """Leave out a point's warm-up where its shape has none."""
    return {k: v for k, v in point.items() if k != "warmup_share" or point.get("schedule") != HELD}


def begun_with(tune: TuneConfig, arm: ArmConfig) -> list[Point]:
    """List the points that a search starts from: every combination, or, one setting after the other, those of
    the settings that grow, at the first warm-up and shape."""
    if tune.search == "grid":
        return points(arm.tune)
    return points({k: values if k in GROWING else values[:1] for k, values in arm.tune.items()})


def middles(points: Sequence[Point]) -> list[Point]:
    """Return of each warm-up and shape the point in the middle of the grids that grow."""
    fixed = [{k: v for k, v in point.items() if k not in GROWING} for point in points]
    found = []
    for first in (p for i, p in enumerate(points) if fixed[i] not in fixed[:i]):
        values = {k: sorted({p[k] for p in points}) for k in first if k in GROWING}
        found.append({**first, **{k: of[len(of) // 2] for k, of in values.items()}})
    return found


def search(
    tune: TuneConfig,
    arm: ArmConfig,
    runs_of: Callable[[Point], list[RunSpec]],
    results: Results,
    race: Race | None = None,
) -> Search:
    """Search an arm as far as the results tell. Where its runs race, the middles of the grids come first."""
    tried = Search(arm, runs_of, results, race)
    begun = begun_with(tune, arm)
    if race:
        tried.add(middles(begun))
    if not race or tried.goes_on():
        tried.add(begun)
        tried.put_first(begun)  # of equal points the same one wins, whichever were trained first
    tried.grow(tune.max_extensions)
    if tune.search == "coordinate":
        for key in itertools.filterfalse(GROWING.__contains__, arm.tune):
            tried.others(key)
        tried.rates_once_more()
        tried.grow(tune.max_extensions)
    if tune.window and "lr" in arm.tune:
        tried.widen(tune.max_extensions)
    return tried


# -- the decision -------------------------------------------------------------------------------------------


def decide(
    config: Config, specs: Sequence[RunSpec], results: Results, earlier: Mapping[str, Decision]
) -> Decision:
    """Choose each tuned arm's best point, by the validation loss of its worst seed; one on an edge of its
    grid is noted."""
    tracks: dict[str, TunedTrack] = {}
    notes: list[str] = []
    every = ready(config, earlier, "tune")
    for track in every:
        of = track_prefix(track, every)
        sigma = earlier["lr_sweep"]["tracks"][track]["sigma"]
        arms: dict[str, TunedArm] = {}
        for label, arm in tuned_arms(config).items():
            if not _can_start(config, earlier, results, track, arm):
                raise Undecidable(
                    f"tune could not be decided: {arm.init}, where {label} starts, has no weights."
                )
            arms[label] = _decided(_tried(config, earlier, results, track, label, arm), results, sigma)
            notes += [of + note for note in _notes(label, arms[label], arm.tune)]
        tracks[track] = {"arms": arms, "sigma": sigma}
    if stopped := sum(results.get(s.run_id, {}).get("outcome") == "raced" for s in specs):
        notes.append(
            f"{stopped} of {len(specs)} runs were raced: the luck of the tuning is estimated without their "
            "points"
        )
    seeds = "one seed" if config.tune.seeds == 1 else f"the worst of {config.tune.seeds} seeds"
    how = "every combination"
    if config.tune.search == "coordinate":
        how = "one setting after the other, and the rates next to the best again where another changed"
    rule = (
        f"each arm's lowest validation loss over its own grid ({how}), {config.tune.steps} steps, {seeds}, "
        "as many points for every arm; a grid whose best point lies on an edge grows there by its own ratio, "
        f"{config.tune.max_extensions} times at most, and while every point diverges its rate goes down"
    )
    rule += "; then that of lr, as often, until its window closes" if config.tune.window else ""
    if config.tune.race_sigmas:
        rule += (
            "; the middle of a grid is trained first, and another run of its shape is stopped where its loss "
            f"on the fixed windows, from {RACED_FROM:.0%} of its steps on, is {config.tune.race_sigmas:g} "
            "sigma above that of the best finished point at the same step: it has no loss and does not win"
        )
    return make_decision("tune", rule, config, specs, results, earlier, tracks=tracks, notes=notes)


def _decided(search: Search, results: Results, sigma: float) -> TunedArm:
    """Choose the best point of one arm, and measure the learning rates around it."""
    winner = search.best()
    chosen = winner or dict(next(iter(search.tried)))
    growing = [key for key in chosen if key in GROWING]
    grids = {key: [p[key] for p in search.alike(chosen)] for key in growing}
    edges = {k: edge_of(grids[k], chosen[k]) for k in growing if len(set(grids[k])) > 1}
    if "warmup_share" in chosen:
        shares = {p["warmup_share"] for p in map(dict, search.tried) if "warmup_share" in p}
        edges["warmup_share"] = edge_of([*shares], chosen["warmup_share"]) if len(shares) > 1 else None
    best = search.tried[tuple(chosen.items())]
    luck = luck_of_choice([losses_of(runs, results) for runs in search.tried.values()], sigma)
    decided: TunedArm = {
        "point": chosen,
        "run_id": best[0].run_id if winner else None,
        "val_loss": search.mean(chosen) if winner else None,
        "worst_loss": search.worst(chosen) if winner else None,
        "runs": sum(map(len, search.tried.values())),
        "extended": search.extended,
        "edges": {k: edge for k, edge in edges.items() if edge},
        "margin_sigma": margin_sigma([search.worst(dict(p)) for p in search.tried], sigma),
        "luck": {"sd": luck.sd, "freedom": luck.freedom},
    }
    if not winner:
        decided["untuned"] = _untuned(search)
    if "lr" in chosen:
        decided["curve"], decided["window"] = _curve(search, chosen, results)
    return decided


def _untuned(search: Search) -> str:
    """Say why an arm has no best point."""
    rates = [runs[0].run.optimizer.lr for runs in search.tried.values()]
    if search.lost:
        return f"no rate between {min(rates):.4g} and {max(rates):.4g} completes"
    return "no point of its grid completed, and a run failed"


def _notes(label: str, arm: TunedArm, grids: Mapping[str, Sequence[Any]]) -> list[str]:
    """Note what is to be known of an arm's search: that it found nothing, how far it went, on what edge."""
    if "untuned" in arm:
        return [f"{label} could not be tuned: {arm['untuned']}"]
    notes: list[str] = []
    for key in (k for k in grids if k in GROWING):
        reached = [p[key] for p in arm["extended"]]
        ends = [f"down to {min(reached):.4g}"] if reached and min(reached) < grids[key][0] else []
        ends += [f"up to {max(reached):.4g}"] if reached and max(reached) > grids[key][-1] else []
        notes += [f"{label}: {key} grid grown {' and '.join(ends)}"] if ends else []
    for key, edge in arm["edges"].items():
        at = f"{label}'s best {key}, {arm['point'][key]:g}"
        where = f"lies on its grid's {edge} edge" if key in GROWING else f"is the {edge}est tried"
        notes.append(f"{at}, {where}")
    return notes


def _curve(search: Search, chosen: Point, results: Results) -> tuple[list[CurvePoint], Window | None]:
    """Return the validation loss over the learning rate at the chosen warm-up and shape, by rising rate, None
    where a run diverged or was stopped; and the LR window, None where a run was stopped: how far it reaches
    is then not known."""
    curve: list[CurvePoint] = []
    for lr in sorted(search.curve(chosen)):
        runs = search.tried[tuple({**chosen, "lr": lr}.items())]
        losses = {str(s.run.seed): val_loss(results.get(s.run_id)) for s in runs}
        mean = statistics.fmean(losses.values())
        point: CurvePoint = {
            "lr": runs[0].run.optimizer.lr,
            "val_loss": mean if math.isfinite(mean) else None,
            "seeds": {seed: x if math.isfinite(x) else None for seed, x in losses.items()},
        }
        if stopped := sum(results.get(s.run_id, {}).get("outcome") == "raced" for s in runs):
            point["raced"] = stopped
        curve.append(point)
    if any("raced" in p for p in curve):
        return curve, None
    return curve, window({p["lr"]: math.inf if p["val_loss"] is None else p["val_loss"] for p in curve})


def invented(config: Config, scenario: Scenario, spec: RunSpec, nth: int) -> RunResult:
    """Invent a result for the forecast: the middle of a grid is best, or its upper end; of a search for one
    setting after the other, the usual landscape of `_landscape`."""
    arm = config.ablation.arms[spec.role]
    if config.tune.search == "coordinate":
        return {"val_loss": 2.0 + _landscape(arm, scenario, spec)}
    grid = points(arm.tune)
    if not scenario.edge:
        middle = grid[len(grid) // 2]
        return {"val_loss": 2.0 - (spec.arm == _name(spec.role, middle))}
    strength = spec.run.stabilizer.strength or 1.0
    return {"val_loss": 2.0 + 1 / (1 + spec.run.optimizer.lr * strength * spec.run.budget.target_kl)}


def _landscape(arm: ArmConfig, scenario: Scenario, spec: RunSpec) -> float:
    """Return how far an invented run lies above the best: by an octave of the rate the sixth part of a
    window, more where few runs are expected; the last warm-up and shape are best where more are, and at the
    most every higher rate is better."""
    rates: list[float] = next((arm.tune[k] for k in RATES if k in arm.tune), [1.0])
    first = arm.tune.get("schedule", [spec.run.lr_schedule.name])[0]
    usual: bool = spec.run.lr_schedule.name == first
    rate = spec.lr_scale if "lr_scale" in arm.tune else spec.run.optimizer.lr / arm.lr_scale
    octaves = math.log2(rate / float(rates[-1]))
    if not scenario.merged:
        return 1 / (100 + octaves) + 0.001 * usual
    middle = octaves + math.log2(float(rates[-1]) / float(rates[len(rates) // 2]))
    if not scenario.edge:
        return abs(middle) + 0.001 * (not usual)
    return 0.03 * abs(octaves) + 0.001 * usual


def headline(track: TunedTrack) -> str:
    """Write a decided track in one line."""
    arms = track["arms"]
    if len(arms) <= FEW:
        return " · ".join(f"{label} {_best_in_words(arm)}" for label, arm in arms.items())
    losses = {label: loss for label, arm in arms.items() if (loss := arm["val_loss"]) is not None}
    best = min(losses, key=lambda label: losses[label], default="none")
    return f"{len(arms)} arms tuned; {best} has the lowest validation loss"


def _best_in_words(arm: TunedArm) -> str:
    """Write `lr 0.008 → 2.6880`, the settings that grow and the validation loss there."""
    if arm["val_loss"] is None:
        return f"could not be tuned: {arm['untuned']}"
    grown = {k: v for k, v in arm["point"].items() if k in GROWING}
    return f"{point_in_words(grown or arm['point'])} → {arm['val_loss']:.4f}"


def so_far(
    stage: Stage, config: Config, specs: Sequence[RunSpec], results: Results, earlier: Mapping[str, Decision]
) -> list[Said]:
    """Say which arm has the lowest point by now, and how many have one."""
    said = []
    every = ready(config, earlier, "tune")
    for track in every:
        found: dict[str, tuple[float, Point, str]] = {}
        arms = tuned_arms(config)
        for label, arm in arms.items():
            if not _can_start(config, earlier, results, track, arm):
                continue
            searched = _tried(config, earlier, results, track, label, arm)
            if point := searched.best():
                run_id = searched.tried[tuple(point.items())][0].run_id
                found[label] = searched.mean(point), point, run_id
        if found:
            first = min(found, key=lambda label: found[label][0])
            loss, point, run_id = found[first]
            words = f"{first} is lowest, validation loss {loss:.4f} at {point_in_words(point)}"
            words += f"; {len(found)} of {len(arms)} arms have a result"
            holds = run_id if len(found) > 1 else ""
            said.append(Said(track_prefix(track, every) + words, f"{track} lowest", holds))
    return said


def _flips(stage: Stage, name: str, decision: Decision) -> str | None:
    """Name the points of which a single run lies lower than the mean of the chosen one."""
    over = stage.passed_over(name, decision)
    return f"one run alone would have chosen {over}" if over else None


def _overlooked(chosen: Mapping[str, Any], candidate: Candidate, candidates: Sequence[Candidate]) -> str:
    """Say why a point of which this seed is lower was not chosen: another seed diverged, or is worse."""
    losses = [c["val_loss"] for c in seeds_of_arm(candidate, candidates)]
    known = [loss for loss in losses if loss is not None]
    if len(known) < len(losses):
        return held_back_by_its_seeds(candidate, candidates, chosen)
    return f"its worst seed has {max(known):.4f}" if max(known) > chosen["worst_loss"] else ""


STAGE = Stage(
    name="tune",
    runs=runs,
    decide=decide,
    headline=headline,
    flips=_flips,
    so_far=so_far,
    invented=invented,
    title="Each arm at its own best",
    about="Every arm that has a grid gets the same number of tuning runs, and more only where its best point "
    "lies on the grid's edge.",
    shows="points",
    setting="{arm}",
    overlooked=_overlooked,
)

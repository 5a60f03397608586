"""carry: in which unit should a step be measured, so that one constant in this unit serves in every setting?

Every arm has a unit, and is trained in every setting over a grid of constants and the seeds. If a setting's
best constant lies on the edge of the grid, the grid grows by its own ratio. But only constants of the
original grid, which all settings share, are carried to other settings. A diverged run is given the loss of
its first step, as in Wortsman et al., arXiv:2309.14322. A point with a failed run is not used.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ebc_lab.config.checks import least_target_kl
from ebc_lab.config.choices import changed, with_size
from ebc_lab.config.dicts import run_part
from ebc_lab.config.fields import number
from ebc_lab.config.identity import round3
from ebc_lab.config.schema import CarryConfig, CarrySettingConfig, Config, RunConfig, UnitConfig
from ebc_lab.records.decisions import Decision, Difference, UnitCurve, UnitPoint, UnitsTrack
from ebc_lab.records.figures import RunResult
from ebc_lab.records.spec import RunSpec, track_of

from ..rules import Decisions, Results, Specs, divided_in_words, error_divided, make_decision
from ..runs import distinct, specs_made, texts_pinned, with_text
from ..search import Point, Search
from ..stage import Scenario, Stage
from ..statistics import centre_of, level_of
from .judged import Judgement

NAME = "carry"
CONSTANT = "constant"
VERDICTS = {
    "earns": "earns its cost",
    "loses": "is worse",
    "no gain": "does not earn its cost",
    "undecided": "is undecided",
}


# -- runs, and the search for each setting's best constant ---------------------------------------------------


def run_at(config: Config, unit: UnitConfig, setting: CarrySettingConfig, constant: float) -> RunConfig:
    """Return the settings of a run that trains with arm `unit` in `setting`. `constant`, scaled for the
    setting's width, is the value of the hyperparameter `unit.over`."""
    base = run_part(config)
    plain = replace(base, steps=config.carry.steps, evaluate=["val", "test"])
    plain = replace(plain, stabilizer=replace(base.stabilizer, name="none"))
    run = with_size(changed(plain, with_text(base, setting.settings)), setting)
    run = changed(run, unit.settings)
    run = changed(run, {"optimizer": {"lr": float(f"{setting.lr * unit.lr_scale:.6g}")}})
    group, _, key = unit.over.partition(".")
    return changed(run, {group: {key: round3(constant * setting.width_scale**unit.width_power)}})


def _searches(config: Config, results: Results) -> dict[tuple[str, str], Search]:
    """Return, by (arm, setting), the search for the best constant, as far as the results allow."""
    made = specs_made(config, NAME)
    pairs = itertools.product(config.carry.arms, config.carry.settings)
    return {(arm, name): _search(config, arm, name, made, results) for arm, name in pairs}


def _search(config: Config, arm: str, name: str, made: dict[Any, list[RunSpec]], results: Results) -> Search:
    unit, setting = config.carry.arms[arm], config.carry.settings[name]

    def runs_of(point: Point) -> list[RunSpec]:
        constant = point[CONSTANT]
        key = arm, name, constant, *config.seeds
        if key not in made:
            run = run_at(config, unit, setting, constant)
            label, scale = f"{arm}_{name}_{number(constant)}", float(f"{run.optimizer.lr / setting.lr:.6g}")
            track = track_of(config)
            seeded = [replace(run, seed=seed) for seed in config.seeds]
            made[key] = [RunSpec(NAME, arm, label, scale, run, of_track=track) for run in seeded]
        return made[key]

    def fitted(_: str, constant: float) -> float | None:
        run = run_at(config, unit, setting, rounded := round3(constant))
        if unit.over == "budget.target_kl" and run.budget.target_kl < least_target_kl(run):
            return None  # the run's precision cannot resolve so small a KL
        return rounded

    def mean(runs: Specs, _: Results) -> float:
        found = _point(search, runs)["mean"]
        return math.inf if found is None else found

    grid: list[Point] = [{CONSTANT: float(constant)} for constant in unit.grid]
    # the mean ratio of neighbours: that of a single pair is less exact, since values are rounded
    ratio = float((unit.grid[-1] / unit.grid[0]) ** (1 / (len(unit.grid) - 1)))
    search = Search(grid, runs_of, results, {CONSTANT: ratio}, mean, prefer_low=CONSTANT, fitted=fitted)
    search.grow(0 if unit.starts else config.carry.max_extensions)
    return search


def _curve(search: Search) -> UnitCurve:
    """Return an arm's measured points in a setting, by rising constant, and the best constant."""
    points = [_point(search, runs, dict(point)[CONSTANT]) for point, runs in search.tried.items()]
    best = search.best()
    return {
        "points": sorted(points, key=lambda point: point["value"]),
        "best": best[CONSTANT] if best else None,
        "loss": search.score_of(best) if best else None,
        "edge": search.edge(best, CONSTANT) if best else None,
    }


def _point(search: Search, specs: Specs, constant: float = 0.0) -> UnitPoint:
    """Return the losses, by seed, of the runs at one point. A diverged run is given its first-step loss. That
    loss does not depend on the constant, so it can be taken from any run with the same seed."""
    starts: dict[str, float] = {}
    for spec in search.specs:
        first = search.results.get(spec.run_id, RunResult()).get("initial_loss")
        if first is not None and math.isfinite(first):
            starts.setdefault(str(spec.run.seed), first)
    point: UnitPoint = {"value": constant, "val": {}, "test": {}, "mean": None, "diverged": []}
    for spec in specs:
        seed, result = str(spec.run.seed), search.results.get(spec.run_id, RunResult())
        losses: tuple[float | None, float | None] = (None, None)
        if result.get("outcome") == "diverged":
            point["diverged"].append(seed)
            losses = starts.get(seed), starts.get(seed)
        if result.get("outcome") == "completed":
            losses = result.get("val_loss"), result.get("test_loss")
        point["val"][seed], point["test"][seed] = losses
    known = [loss for loss in point["val"].values() if loss is not None]
    whole = len(known) == len(specs) and None not in point["test"].values()
    point["mean"] = statistics.fmean(known) if whole else None
    return point


# -- the decision --------------------------------------------------------------------------------------------


def _notes(carry: CarryConfig, track: UnitsTrack) -> Iterator[str]:
    """Yield notes on ends of grids, on missing runs, and on settings in which an arm was not judged."""
    for arm, found in track["arms"].items():
        grid = carry.arms[arm].grid
        on_edge = [f"{name} ({c['edge']})" for name, c in found["curves"].items() if c["edge"]]
        ends = {c["constant"] for c in found["carried"].values()} & {grid[0], grid[-1]}
        if carry.arms[arm].starts:
            yield f"{arm}: the worst of {len(grid)} starts counts in each setting"
        elif on_edge:
            yield f"{arm}: the best constant lies on the edge of what was tried in {', '.join(on_edge)}"
        if ends and not carry.arms[arm].starts:
            values = " and ".join(f"{value:g}" for value in sorted(ends))
            yield f"{arm}: a constant that is carried, {values}, is the end of its grid"
        points = [(name, point) for name, curve in found["curves"].items() for point in curve["points"]]
        lacking = [f"{name} at {point['value']:g}" for name, point in points if point["mean"] is None]
        if lacking:
            more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
            yield f"{arm}: runs are missing, so not used: {', '.join(lacking[:5])}{more}"
        unjudged = [name for name in track["settings"] if name not in found["carried"]]
        if unjudged:
            yield f"{arm} could not be judged in {', '.join(unjudged)}"


def against(difference: Difference) -> str:
    """Return a difference as `-0.0123 nats [-0.0200, -0.0046]`, with its joint interval."""
    mean, low, high = centre_of(difference), difference["joint_low"], difference["joint_high"]
    if mean is None:
        return "nothing to compare"
    ends = "" if low is None or high is None else f" [{low:+.4f}, {high:+.4f}]"
    return f"{mean:+.4f} nats{ends}"


def _rule(config: Config) -> str:
    carry = config.carry
    starts = "of an arm of starts the worst in the setting counts, and it is no best of a setting; "
    of_starts = starts if any(unit.starts for unit in carry.arms.values()) else ""
    return (
        "each setting in turn is left out; each arm takes the constant of its grid with the least mean "
        "regret in the other settings (mean validation loss less the best of all arms there; settings that "
        "are kept for the judgement choose nothing) and is judged by its test loss in the one left out, "
        f"{len(config.seeds)} seeds; {of_starts}"
        f"a challenger earns its cost if its mean test loss over the settings is at least {carry.margin:g} "
        f"nats below that of {carry.reference} and the upper end of the {level_of(error_divided(config))} "
        f"interval that holds for all {len(carry.challengers)} challengers at once is below 0; a run is "
        "broken if it "
        f"diverged or its test loss is more than {carry.broken:g} nats above the median of all "
        "runs at carried constants in its setting; a diverged run counts with the loss of its first step"
        f"{divided_in_words(config)}"
    )


class Carry(Stage):
    """The stage that asks in which unit one constant serves settings on which it was not chosen."""

    name = NAME
    title = "One constant in every setting"
    about = (
        "Each arm limits or sets a step in a unit of its own. Which one constant, chosen in other "
        "settings, serves a setting that it was not chosen on?"
    )
    concludes = True
    leads_with_optimizer = False
    shows = "units"
    pictures = ("carried_excess", "carried_optima")

    def runs(self, config: Config, earlier: Decisions, results: Results) -> list[RunSpec]:
        """Return each arm's runs in every setting, over grid and seeds. Grids grow as runs end."""
        return distinct([s for search in _searches(config, results).values() for s in search.specs])

    def decide(self, config: Config, specs: Specs, results: Results, earlier: Decisions) -> Decision:
        curves: dict[str, dict[str, UnitCurve]] = {arm: {} for arm in config.carry.arms}
        for (arm, name), search in _searches(config, results).items():
            curves[arm][name] = _curve(search)
        judgement = Judgement(config.carry, curves, error_divided(config))
        tracks = {specs[0].track: judgement.track()} if any(judgement.carried.values()) else {}
        notes = [note for track in tracks.values() for note in _notes(config.carry, track)]
        return make_decision(NAME, _rule(config), config, specs, results, earlier, tracks=tracks, notes=notes)

    def headline(self, track: UnitsTrack) -> str:
        judged = {arm: found["excess"] for arm, found in track["arms"].items() if found["excess"] is not None}
        least = min(judged, key=lambda arm: judged[arm])
        parts = [f"{least} has the lowest mean, {judged[least]:.4f} nats above the best of all arms"]
        for arm in track["challengers"]:
            verdict = VERDICTS[track["verdicts"][arm]]
            parts.append(f"{arm} {verdict}: {against(track['against'][arm])} from {track['reference']}")
        return "; ".join(parts)

    def so_far(self, config: Config, specs: Specs, results: Results, earlier: Decisions) -> list[str]:
        """Return for how many pairs of an arm and a setting the search has ended so far."""
        searches = _searches(config, results)
        known = sum(not search.open for search in searches.values())
        return [f"{known} of {len(searches)} pairs of an arm and a setting are searched"]

    def resolve(self, config: Config, say: Callable[[str], None]) -> Config:
        """Return the configuration with the checksums of the settings' own data and tokens filled in."""
        return texts_pinned(config, NAME, "settings", say)

    def invent(self, config: Config, scenario: Scenario, spec: RunSpec, nth: int) -> RunResult:
        """Return losses that make the middle of a grid best, or its upper end in the scenario `max`."""
        unit = config.carry.arms[spec.role]
        group, _, key = unit.over.partition(".")
        constant = float(getattr(getattr(spec.run, group), key))
        loss = 2.0 + 1 / (1 + constant)
        if scenario.merged:
            loss = 2.0 + abs(math.log(constant / unit.grid[len(unit.grid) // 2]))
        return {"val_loss": loss, "test_loss": loss, "initial_loss": 5.0}


STAGE = Carry()

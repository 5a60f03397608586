"""tune: each arm of a suite that has a grid at its own best point, every such arm with as many runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ebc_lab.config.identity import number
from ebc_lab.config.schema import ArmConfig, Config
from ebc_lab.records.figures import RunResult

from .rules import Candidate, Decision, Results, edge_of, losses_of, make_decision, margin_sigma
from .runs import waiting
from .spec import RunSpec
from .stage import Scenario, Stage, Track, held_back_by_its_seeds
from .suite import Point, points, ready, run_of


def runs(config: Config, decisions: Mapping[str, Decision], results: Results) -> list[RunSpec]:
    """Every point of every arm's grid, at the stage's seeds; the grids grow as their runs end."""
    specs: list[RunSpec] = []
    for track in ready(config, decisions, "tune"):
        for label, arm in tuned_arms(config).items():
            for own in _tried(config, decisions, results, track, label, arm).values():
                specs += own
    return specs


def tuned_arms(config: Config) -> dict[str, ArmConfig]:
    """The arms that have a grid, before any sweep."""
    return {label: arm for label, arm in config.ablation.arms.items() if arm.tune}


def _name(label: str, point: Point) -> str:
    """An arm at a point of its grid."""
    return label + "".join(f"_{k.replace('lr_scale', 'x')}{number(v)}" for k, v in point.items())


Tried = dict[tuple[tuple[str, float], ...], list[RunSpec]]  # a point's settings -> its runs, one a seed


def _tried(
    config: Config,
    decisions: Mapping[str, Decision],
    results: Results,
    track: str,
    label: str,
    arm: ArmConfig,
) -> Tried:
    """The points of an arm's grid, and those by which it grew while its best one lay on an edge."""

    def runs_of(point: Point) -> list[RunSpec]:
        first = config.study.stage_seed
        made = []
        for seed in range(first, first + config.tune.seeds):
            run, scale = run_of(config, decisions, track, arm, config.tune.steps, seed, point)
            run = replace(run, evaluate=["val"])
            made.append(RunSpec("tune", label, _name(label, point), scale, run, of_track=track))
        return made

    tried = {tuple(point.items()): runs_of(point) for point in points(arm)}
    for _ in range(config.tune.max_extensions):
        if any(waiting(own, results) for own in tried.values()):
            break
        further = [p for p in _beyond(arm, tried, results) if tuple(p.items()) not in tried]
        if not further:
            break
        tried |= {tuple(point.items()): runs_of(point) for point in further}
    return tried


def _beyond(arm: ArmConfig, tried: Tried, results: Results) -> Iterator[Point]:
    """The next point of each grid on whose edge the best one lies, by the grid's own ratio there."""
    best = _best(tried, results)
    for key, value in dict(best or ()).items():
        values = sorted({dict(point)[key] for point in tried})
        if len(values) > 1 and value in (values[0], values[-1]):
            inner = values[1] if value == values[0] else values[-2]
            yield {**dict(best or ()), key: float(f"{value * value / inner:.4g}")}


def _mean(own: Sequence[RunSpec], results: Results) -> float:
    """The validation loss over the seeds, infinite where one of them did not complete."""
    return statistics.fmean(losses_of(own, results))


def _best(tried: Tried, results: Results) -> tuple[tuple[str, float], ...] | None:
    """The point with the lowest loss, of equal ones that with the lower learning rate; None if none is
    finite."""
    ranked = sorted(tried, key=lambda p: (_mean(tried[p], results), tried[p][0].run.optimizer.lr))
    return ranked[0] if ranked and math.isfinite(_mean(tried[ranked[0]], results)) else None


def decide(
    config: Config, specs: Sequence[RunSpec], results: Results, earlier: Mapping[str, Decision]
) -> Decision:
    """Each tuned arm's best point, by validation loss; a point on an edge of its grid is noted."""
    tracks: dict[str, Any] = {}
    notes: list[str] = []
    for track in ready(config, earlier, "tune"):
        sigma = earlier["lr_sweep"]["tracks"][track]["sigma"]
        arms: dict[str, Any] = {}
        for label, arm in tuned_arms(config).items():
            found = _decided(arm, _tried(config, earlier, results, track, label, arm), results, sigma)
            if found["run_id"] is None:
                notes.append(f"{track}: no point of {label} completed; its first one is taken")
            for point in found["extended"]:
                said = ", ".join(f"{k} {v:g}" for k, v in point.items())
                notes.append(f"{track}: {label}'s grid grew by {said}")
            for key, edge in found["edges"].items():
                at = f"{label}'s best {key}, {found['point'][key]:g}"
                notes.append(f"{track}: {at}, lies on its grid's {edge} edge")
            arms[label] = found
        tracks[track] = {"arms": arms, "sigma": sigma}
    seeds = "one seed" if config.tune.seeds == 1 else f"mean of {config.tune.seeds} seeds"
    rule = (
        f"each arm's lowest validation loss over its own grid, {config.tune.steps} steps, {seeds}, as many "
        "points for every arm; a grid whose best point lies on an edge grows there by its own ratio, "
        f"{config.tune.max_extensions} times at most"
    )
    return make_decision("tune", rule, config, specs, results, earlier, tracks=tracks, notes=notes)


def _decided(arm: ArmConfig, tried: Tried, results: Results, sigma: float) -> dict[str, Any]:
    """The best point of one arm."""
    winner = _best(tried, results)
    chosen = dict(winner or next(iter(tried)))
    grids = {key: [dict(point)[key] for point in tried] for key in chosen}
    edges = {k: edge_of(grids[k], v) for k, v in chosen.items() if len(set(grids[k])) > 1}
    losses = [_mean(own, results) for own in tried.values()]
    extended = list(tried)[len(points(arm)) :]
    return {
        "point": chosen,
        "run_id": tried[winner][0].run_id if winner else None,
        "val_loss": _mean(tried[winner], results) if winner else None,
        "runs": sum(map(len, tried.values())),
        "extended": list(map(dict, extended)),
        "edges": {k: edge for k, edge in edges.items() if edge},
        "margin_sigma": margin_sigma(losses, sigma),
    }


def invented(config: Config, scenario: Scenario, spec: RunSpec, nth: int) -> RunResult:
    """What the forecast assumes: the middle of a grid is best, or its upper end."""
    grid = points(config.ablation.arms[spec.role])
    if not scenario.edge:
        middle = grid[len(grid) // 2].items()
        return {"val_loss": 2.0 - (spec.arm == _name(spec.role, dict(middle)))}
    strength = spec.run.stabilizer.strength or 1.0
    return {"val_loss": 2.0 + 1 / (1 + spec.run.optimizer.lr * strength * spec.run.budget.target_kl)}


def headline(track: Track) -> str:
    losses = {a: f["val_loss"] for a, f in track["arms"].items() if f["val_loss"] is not None}
    best = min(losses, key=lambda a: losses[a], default="none")
    margins = [f["margin_sigma"] for f in track["arms"].values() if f["margin_sigma"] is not None]
    told = f"; margins of {min(margins):.1f} to {max(margins):.1f} σ" if margins else ""
    many = len(track["arms"])
    return f"{many} arm{'s' if many != 1 else ''} tuned; the best is {best}{told}"


def _overlooked(chosen: Track, candidate: Candidate, own: Sequence[Candidate]) -> str:
    return held_back_by_its_seeds(candidate, own, chosen)


STAGE = Stage(
    name="tune",
    runs=runs,
    decide=decide,
    headline=headline,
    invented=invented,
    title="Each arm at its own best",
    about="Every arm that has a grid gets the same number of tuning runs, and more only where its best point "
    "lies on the grid's edge.",
    shows="points",
    setting="{arm}",
    overlooked=_overlooked,
)

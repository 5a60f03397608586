"""Which runs a stage needs, given what is known so far. Pure functions: nothing is read, run or written here.

A stage's list grows as its results come in (an edge extends a grid, a bracket is bisected) and as earlier stages decide, so
the same functions serve the first call, a resumed study, idle workers, and the forecast of how many runs there will be.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from ..config import Config, OptimizerConfig, RunConfig, run_part
from ..overrides import LEAST_KL, optimizer_defaults
from . import decide
from .decide import Decision, Results, band_distance, c_median, val_loss
from .signature import RunSpec, arm_name, round3

PUBLISHED_DELTAS = (0.03, 0.05, 0.07)
OVERHEAD_STEPS = 80  # steps a side of the overhead measurement


def _run(config: Config, track: Mapping[str, Any], steps: int, seed: int, scale: float, **changes: Any) -> RunConfig:
    """A track's plain run at a multiple of its best learning rate."""
    base = run_part(config)
    return replace(
        base,
        seed=seed,
        steps=steps,
        evaluate=["val"],
        optimizer=track_optimizer(config, track["optimizer"], track["lr"] * scale),
        projection=replace(base.projection, name=track["projection"]),
        stabilizer=replace(base.stabilizer, name="none"),
        lr_schedule=replace(base.lr_schedule, name="constant"),
        **changes,
    )


def track_optimizer(config: Config, name: str, lr: float) -> OptimizerConfig:
    """The optimizer's settings from its own group file, or the study's where it names the same one; at `lr`."""
    own = config.optimizer if config.optimizer.name == name else optimizer_defaults(name)
    return replace(own, lr=float(f"{lr:.6g}"))


def _with_ebc(run: RunConfig, budget: str, delta: float, schedule: str = "constant") -> RunConfig:
    return replace(
        run,
        stabilizer=replace(run.stabilizer, name="ebc"),
        budget=replace(run.budget, name=budget, target_kl=delta, schedule=schedule),
    )


def _with_decay(config: Config, run: RunConfig) -> RunConfig:
    return replace(run, lr_schedule=replace(run.lr_schedule, name="warmup_linear", warmup_steps=config.lr_sweep.control_warmup))


def _spec(stage: str, role: str, run: RunConfig, scale: float, note: str = "") -> RunSpec:
    return RunSpec(stage, role, arm_name(run, scale, note), scale, run)


def lr_sweep(config: Config, decisions: Mapping[str, Decision], results: Results) -> list[RunSpec]:
    """The grid of every (optimizer, projection), its extensions, then the kept tracks' replicates and controls."""
    sweep, seed = config.lr_sweep, config.study.stage_seed

    def at(optimizer: str, projection: str, lr: float, scale: float = 1.0, role: str = "grid", s: int = seed) -> RunSpec:
        run = _run(config, {"optimizer": optimizer, "projection": projection, "lr": lr}, sweep.steps, s, scale)
        return _spec("lr_sweep", role, run if role != "control" else _with_decay(config, run), scale)

    pairs = [(o, p) for o in sweep.optimizers for p in sweep.projections]
    grids = {pair: [at(*pair, lr) for lr in sweep.grids[pair[0]]] for pair in pairs}
    specs = [s for grid in grids.values() for s in grid]
    if _waiting(specs, results):
        return specs
    winners = decide.sweep_winners(config, specs, results)
    losses = {t: val_loss(results[w.run_id]) for t, w in winners.items()}
    for pair, grid in grids.items():
        track = "_".join(pair)
        if track not in winners or decide.triaged(config, losses, track):
            continue
        for _ in range(sweep.max_extensions):
            lrs = [s.run.optimizer.lr for s in grid]
            winner = decide.best(grid, results)
            assert winner is not None
            edge = decide.edge_of(lrs, winner.run.optimizer.lr)
            if edge is None:
                break
            more = [2 * max(lrs)] if edge in ("high", "both") else []
            more += [min(lrs) / 2] if edge in ("low", "both") else []
            grid += [at(*pair, lr) for lr in more]
            if _waiting(grid, results):
                break
    specs = [s for grid in grids.values() for s in grid]
    if _waiting(specs, results):
        return specs
    winners = decide.sweep_winners(config, specs, results)
    for track in decide.kept_tracks(config, winners, results) if winners else []:
        won = winners[track].run
        names = (won.optimizer.name, won.projection.name, won.optimizer.lr)
        specs += [at(*names, scale, "control") for scale in sweep.control_scales]
        specs += [at(*names, 1.0, "replicate", seed + i) for i in range(1, sweep.replicates + 1)]
    return specs


def calibrate(config: Config, decisions: Mapping[str, Decision], results: Results) -> list[RunSpec]:
    """The delta* grid of each track and budget, and up to `max_extra` more to bring the median c into the band."""
    specs: list[RunSpec] = []
    for name in tracks_of(decisions, "calibrate"):
        track = decisions["lr_sweep"]["tracks"][name]
        plain = _run(config, track, config.calibrate.steps, config.study.stage_seed, config.calibrate.lr_scale)
        for budget in config.calibrate.budgets:
            floor = LEAST_KL.get(plain.dtype, 0.0) if budget == "shadow" else 0.0
            if config.calibrate.delta_grid == "published":
                deltas = list(PUBLISHED_DELTAS)
            else:
                deltas = [round3(m * track["natural_kl"]) for m in config.calibrate.multiples]
            deltas = sorted({max(d, round3(floor)) for d in deltas})

            def at(delta: float, budget: str = budget, plain: RunConfig = plain) -> RunSpec:
                return _spec("calibrate", "ebc", _with_ebc(plain, budget, delta), config.calibrate.lr_scale)

            points = [at(d) for d in deltas]
            for _ in range(config.calibrate.max_extra):
                if _waiting(points, results):
                    break
                more = _next_delta(points, results, config.study.band)
                if more is None or more < floor or any(p.run.budget.target_kl == more for p in points):
                    break
                points.append(at(more))
            specs += points
    return specs


def _next_delta(points: Sequence[RunSpec], results: Results, band: Sequence[float]) -> float | None:
    """One more delta* to try, or None: in the band already, or nothing to go by. c rises with delta*."""
    known = sorted((p.run.budget.target_kl, c) for p in points if (c := c_median(results.get(p.run_id))) is not None)
    if not known or any(band_distance(c, band) == 0 for _, c in known):
        return None
    for (low, c_low), (high, c_high) in pairwise(known):
        if c_low < band[0] and c_high > band[1]:
            return round3(math.sqrt(low * high))
    return round3(known[-1][0] * 2) if known[-1][1] < band[0] else round3(known[0][0] / 2)


def lr_scale(config: Config, decisions: Mapping[str, Decision], results: Results) -> list[RunSpec]:
    """Every LR scale with and without EBC; with the surrogate also with its trust radius fixed at the median S of ×1."""
    specs: list[RunSpec] = []
    for name in tracks_of(decisions, "lr_scale"):
        track = decisions["lr_sweep"]["tracks"][name]
        plain = {s: _run(config, track, config.lr_scale.steps, config.study.stage_seed, s) for s in config.lr_scale.scales}
        specs += [_spec("lr_scale", "none", run, s) for s, run in plain.items()]
        if "calibrate" not in decisions:
            continue
        found = decisions["calibrate"]["tracks"][name]
        budget, delta = found["budget"], found["delta_star"]
        specs += [_spec("lr_scale", "ebc", _with_ebc(run, budget, delta), s) for s, run in plain.items()]
        bound = found["by_budget"].get("surrogate")
        if bound is None:
            continue
        measured = _spec("lr_scale", "surrogate_x1", _with_ebc(plain[1.0], "surrogate", bound), 1.0)
        specs.append(measured)
        surrogate = (results.get(measured.run_id) or {}).get("surrogate_median")
        if surrogate:
            fixed = round3((0.6 * surrogate / 2) ** 2)
            for s, run in plain.items():
                run = replace(
                    _with_ebc(run, "surrogate", fixed), controller=replace(run.controller, name="fixed", kp=None, ki=None)
                )
                specs.append(_spec("lr_scale", "fixed_tau", run, s, "_fixedtau"))
    return specs


def finals(config: Config, decisions: Mapping[str, Decision], results: Results) -> list[RunSpec]:
    """Every arm at full length over `seeds`, and one paired measurement of EBC's overhead at this shape."""
    specs: list[RunSpec] = []
    for name in tracks_of(decisions, "finals"):
        for seed in config.seeds:
            specs += [_spec("finals", role, run, s) for role, run, s in final_arms(config, decisions, name, seed)]
        twice = [s.run for s in specs if s.role == "ebc_x2" and decide.track_of(s) == name]
        if "lr_scale" in decisions:
            shape = replace(twice[0], steps=OVERHEAD_STEPS)
            specs.append(RunSpec("finals", "overhead", arm_name(shape, 2.0), 2.0, shape, "overhead"))
    return specs


def final_arms(
    config: Config, decisions: Mapping[str, Decision], name: str, seed: int
) -> Iterator[tuple[str, RunConfig, float]]:
    """(role, run, LR scale) of each final arm of a track that the decisions determine; two roles may be the same run."""
    track = decisions["lr_sweep"]["tracks"][name]

    def plain(s: float) -> RunConfig:
        return replace(_run(config, track, config.finals.steps, seed, s), evaluate=["val", "test"])

    control = track["control"]["lr_scale"]
    yield "baseline", plain(1.0), 1.0
    yield "control", _with_decay(config, plain(control)), control
    if "calibrate" not in decisions:
        return
    budget, delta = (decisions["calibrate"]["tracks"][name][k] for k in ("budget", "delta_star"))
    yield "ebc_x2", _with_ebc(plain(2.0), budget, delta), 2.0
    if "lr_scale" not in decisions:
        return
    scale = decisions["lr_scale"]["tracks"][name]["lr_scale"]
    falling = _with_ebc(plain(2 * scale), budget, round3(2 * delta), "linear")
    yield "ebc_chosen", _with_ebc(plain(scale), budget, delta), scale
    yield "none_chosen", plain(scale), scale
    yield "ebc_lindelta", falling, 2 * scale
    yield "ebc_lindelta_lrdecay", _with_decay(config, falling), 2 * scale


def tracks_of(decisions: Mapping[str, Decision], stage: str) -> list[str]:
    """The tracks that the latest decision before `stage` left; none before the first."""
    made = [s for s in list(STAGE_RUNS)[: list(STAGE_RUNS).index(stage)] if s in decisions]
    return list(decisions[made[-1]]["tracks"]) if made else []


def foreseen(
    config: Config, decisions: Mapping[str, Decision], waiting: Sequence[RunSpec], stages: Sequence[str]
) -> list[RunSpec]:
    """What an idle worker may start on: runs of later `stages` that the decisions so far already determine, and, while a grid
    is being extended, its next extension (the only one of these that may turn out not to be needed).
    """
    certain = [s for stage in stages for s in STAGE_RUNS[stage](config, decisions, {}) if s.kind == "train"]
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
    return replace(spec, run=replace(spec.run, optimizer=replace(spec.run.optimizer, lr=float(f"{further:.6g}"))))


def _waiting(specs: Sequence[RunSpec], results: Results) -> bool:
    return any(s.run_id not in results for s in specs)


STAGE_RUNS: dict[str, Callable[[Config, Mapping[str, Decision], Results], list[RunSpec]]] = {
    "lr_sweep": lr_sweep,
    "calibrate": calibrate,
    "lr_scale": lr_scale,
    "finals": finals,
}


def distinct(specs: Sequence[RunSpec]) -> list[RunSpec]:
    """One spec a run, the first that asked for it."""
    return list({s.run_id: s for s in reversed(specs)}.values())[::-1]


# -- the forecast -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scenario:
    """How the results might fall: at which end the winners lie, and how many runs it takes to hit the band."""

    name: str
    edge: bool  # the best learning rate lies on the edge until the extensions are used up
    extra: int  # calibration runs beyond the grid
    merged: bool  # the chosen scale is the calibrated one, so that arms coincide


SCENARIOS = (
    Scenario("min", edge=False, extra=0, merged=True),
    Scenario("expected", edge=True, extra=1, merged=True),
    Scenario("max", edge=True, extra=99, merged=False),
)


def forecast(config: Config, names: Sequence[str] = ("min", "expected", "max")) -> dict[str, dict[str, list[RunSpec]]]:
    """Scenario -> stage -> the distinct runs it would make, found by playing invented results to the stages above."""
    return {s.name: _play(config, s) for s in SCENARIOS if s.name in names}


def _play(config: Config, scenario: Scenario) -> dict[str, list[RunSpec]]:
    decisions: dict[str, Decision] = {}
    results: dict[str, dict[str, Any]] = {}
    played: dict[str, list[RunSpec]] = {}
    for stage in ("lr_sweep", "calibrate", "lr_scale", "finals"):
        before = set(results)
        while True:
            specs = STAGE_RUNS[stage](config, decisions, results)
            new = [s for s in specs if s.run_id not in results]
            if not new:
                break
            for spec in new:
                results[spec.run_id] = _invent(config, scenario, spec, len(results) - len(before))
        if stage != "finals":
            decisions[stage] = DECIDE[stage](config, specs, results, decisions)
        played[stage] = [s for s in distinct(specs) if s.run_id not in before]
    return played


def _invent(config: Config, scenario: Scenario, spec: RunSpec, nth: int) -> dict[str, Any]:
    lr, grid = spec.run.optimizer.lr, config.lr_sweep.grids[spec.run.optimizer.name]
    middle = grid[len(grid) // 2] if len(grid) > 2 and not scenario.edge else math.inf
    loss = 2.0 + (abs(math.log(lr / middle)) if math.isfinite(middle) else 1 / (1 + 1e4 * lr)) + 1e-6 * spec.run.seed
    base_points = len(config.calibrate.multiples if config.calibrate.delta_grid == "natural" else PUBLISHED_DELTAS)
    hit = nth >= base_points - 1 + scenario.extra if spec.stage == "calibrate" else scenario.merged == (spec.lr_scale == 2)
    c = 0.6 if hit else 0.1 if spec.stage == "calibrate" else 0.3
    if spec.stage == "lr_scale" and spec.role == "ebc" and not scenario.merged:
        c = 0.6 if spec.lr_scale == max(config.lr_scale.scales) else 0.3
    return {
        "outcome": "completed",
        "val_loss": loss,
        "c_median": c,
        "kl_median": 0.01,
        "clip_rate": 0.5,
        "surrogate_median": 1.0,
    }


DECIDE = {"lr_sweep": decide.lr_sweep, "calibrate": decide.calibrate, "lr_scale": decide.lr_scale}

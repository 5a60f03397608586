"""Which runs a stage needs, given what is known so far. Pure functions: nothing is read, run or written here.

A stage's list grows as its results come in (an edge extends a grid, a bracket is bisected) and as earlier stages decide, so
the same functions serve the first call, a resumed study, idle workers, and the forecast of how many runs there will be.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from ebc_lab.config.checks import least_target_kl
from ebc_lab.config.schema import Config, RunConfig

from . import decide, verdict
from .arms import plain_run, searched, spec_of, tracks_of, waiting, with_decay, with_ebc
from .decide import Decision, Results, band_distance, c_median, val_loss
from .signature import RunSpec, arm_name, round3

PUBLISHED_DELTAS = (0.03, 0.05, 0.07)
OVERHEAD_STEPS = 80  # steps a side of the overhead measurement


def lr_sweep(config: Config, decisions: Mapping[str, Decision], results: Results) -> list[RunSpec]:
    """The grid of every (optimizer, projection), its extensions, then the kept tracks' replicates and controls."""
    sweep, seed = config.lr_sweep, config.study.stage_seed

    def at(optimizer: str, projection: str, lr: float, scale: float = 1.0, role: str = "grid", s: int = seed) -> RunSpec:
        run = plain_run(config, {"optimizer": optimizer, "projection": projection, "lr": lr}, sweep.steps, s, scale)
        return spec_of("lr_sweep", role, run if role != "control" else with_decay(config, run), scale)

    pairs = [(o, p) for o in sweep.optimizers for p in sweep.projections]
    grids = {pair: [at(*pair, lr) for lr in sweep.grids[pair[0]]] for pair in pairs}
    specs = [s for grid in grids.values() for s in grid]
    if waiting(specs, results):
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
            if waiting(grid, results):
                break
    specs = [s for grid in grids.values() for s in grid]
    if waiting(specs, results):
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
        plain = plain_run(config, track, config.calibrate.steps, config.study.stage_seed, config.calibrate.lr_scale)
        for budget in config.calibrate.budgets:
            floor = least_target_kl(replace(plain, budget=replace(plain.budget, name=budget)))
            if config.calibrate.delta_grid == "published":
                deltas = list(PUBLISHED_DELTAS)
            else:
                deltas = [round3(m * track["natural_kl"]) for m in config.calibrate.multiples]
            deltas = sorted({max(d, round3(floor)) for d in deltas})

            def at(delta: float, budget: str = budget, plain: RunConfig = plain, track: Decision = track) -> RunSpec:
                return spec_of("calibrate", "ebc", with_ebc(plain, track, budget, delta), config.calibrate.lr_scale)

            points = [at(d) for d in deltas]
            for _ in range(config.calibrate.max_extra):
                if waiting(points, results):
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


def controller_search(config: Config, decisions: Mapping[str, Decision], results: Results) -> list[RunSpec]:
    """Every candidate's controller (and cadence) at the calibrated budget, delta* and learning rate."""
    specs: list[RunSpec] = []
    for name in tracks_of(decisions, "controller_search") if "calibrate" in decisions else []:
        track, found = decisions["lr_sweep"]["tracks"][name], decisions["calibrate"]["tracks"][name]
        scale = config.calibrate.lr_scale
        plain = plain_run(config, track, config.controller_search.steps, config.study.stage_seed, scale)
        for candidate, settings in config.controller_search.candidates.items():
            run = with_ebc(plain, track, found["budget"], found["delta_star"], **settings)
            specs.append(spec_of("controller_search", candidate, run, scale, f"_{candidate}"))
    return specs


def lr_scale(config: Config, decisions: Mapping[str, Decision], results: Results) -> list[RunSpec]:
    """Every LR scale with and without EBC; with the surrogate also with its trust radius fixed at the median S of ×1."""
    specs: list[RunSpec] = []
    for name in tracks_of(decisions, "lr_scale"):
        track = decisions["lr_sweep"]["tracks"][name]
        scales = config.lr_scale.scales
        steps, seed = config.lr_scale.steps, config.study.stage_seed
        plain = {s: plain_run(config, track, steps, seed, s) for s in sorted({1.0, *scales})}
        specs += [spec_of("lr_scale", "none", run, s) for s, run in plain.items()]
        if "calibrate" not in decisions or (
            "controller_search" in config.study.stages and "controller_search" not in decisions
        ):
            continue
        chosen = searched(decisions, name)
        found = decisions["calibrate"]["tracks"][name]
        budget, delta = found["budget"], found["delta_star"]
        specs += [spec_of("lr_scale", "ebc", with_ebc(plain[s], track, budget, delta, **chosen), s) for s in scales]
        bound = found["by_budget"].get("surrogate")
        if bound is None:
            continue
        measured = spec_of("lr_scale", "surrogate_x1", with_ebc(plain[1.0], track, "surrogate", bound), 1.0)
        specs.append(measured)
        surrogate = (results.get(measured.run_id) or {}).get("surrogate_median")
        if surrogate:
            fixed = round3((0.6 * surrogate / 2) ** 2)
            for s in scales:
                run = with_ebc(plain[s], track, "surrogate", fixed)
                run = replace(run, controller=replace(run.controller, name="fixed", kp=None, ki=None, a=None))
                specs.append(spec_of("lr_scale", "fixed_tau", run, s, "_fixedtau"))
    return specs


def finals(config: Config, decisions: Mapping[str, Decision], results: Results) -> list[RunSpec]:
    """Every arm at full length over `seeds`, and over more while the verdict is undecided and more are allowed; one paired
    measurement of EBC's overhead at this shape.
    """
    seeds = list(config.seeds)
    while True:
        specs = _finals(config, decisions, seeds)
        if "lr_scale" not in decisions or len(verdict.looks(config)) == 1:
            return specs
        if waiting([s for s in specs if s.kind == "train"], results):
            return specs
        more = verdict.next_seeds(config, specs, results, decisions)
        if not more:
            return specs
        seeds += more


def _finals(config: Config, decisions: Mapping[str, Decision], seeds: Sequence[int]) -> list[RunSpec]:
    specs: list[RunSpec] = []
    for name in tracks_of(decisions, "finals"):
        for seed in seeds:
            specs += [spec_of("finals", role, run, s) for role, run, s in final_arms(config, decisions, name, seed)]
        twice = [s.run for s in specs if s.role == "ebc_x2" and s.track == name]
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
        return replace(plain_run(config, track, config.finals.steps, seed, s), evaluate=["val", "test"])

    chosen = searched(decisions, name)
    control = track["control"]["lr_scale"]
    yield "baseline", plain(1.0), 1.0
    yield "control", with_decay(config, plain(control)), control
    if "calibrate" not in decisions:
        return
    budget, delta = (decisions["calibrate"]["tracks"][name][k] for k in ("budget", "delta_star"))
    yield "ebc_x2", with_ebc(plain(2.0), track, budget, delta, **chosen), 2.0
    if "lr_scale" not in decisions:
        return
    scale = decisions["lr_scale"]["tracks"][name]["lr_scale"]
    falling = with_ebc(plain(2 * scale), track, budget, round3(2 * delta), "linear", **chosen)
    yield "ebc_chosen", with_ebc(plain(scale), track, budget, delta, **chosen), scale
    yield "none_chosen", plain(scale), scale
    yield "ebc_lindelta", falling, 2 * scale
    yield "ebc_lindelta_lrdecay", with_decay(config, falling), 2 * scale

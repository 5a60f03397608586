"""lr_sweep: the best baseline learning rate, the noise between seeds, the natural KL and the fair control."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ebc_lab.config.schema import Config

from .rules import (
    Decision,
    Results,
    Undecidable,
    best,
    edge_of,
    losses_of,
    make_decision,
    margin_sigma,
    refuse_without_tracks,
    val_loss,
)
from .runs import plain_run, spec_of, waiting, with_decay
from .spec import RunSpec
from .stage import Figure, Stage, Track
from .statistics import noise as noise_floor

Pair = tuple[str, str]  # optimizer, projection


def runs(config: Config, decisions: Mapping[str, Decision], results: Results) -> list[RunSpec]:
    """The grid of every (optimizer, projection), its extensions, then the kept tracks' replicates and
    controls."""
    sweep = config.lr_sweep
    pairs = list(itertools.product(sweep.optimizers, sweep.projections))
    grids = {pair: [_spec(config, "grid", pair, lr) for lr in sweep.grids[pair[0]]] for pair in pairs}
    specs = [s for grid in grids.values() for s in grid]
    if waiting(specs, results):
        return specs
    # every point of the grids is known: extend those whose winner lies on an edge, triaged tracks left out
    winners = sweep_winners(specs, results)
    losses = {t: val_loss(results[w.run_id]) for t, w in winners.items()}
    for pair, grid in grids.items():
        track = "_".join(pair)
        if track in winners and not triaged(config, losses, track):
            _extend(config, pair, grid, results)
    specs = [s for grid in grids.values() for s in grid]
    if waiting(specs, results):
        return specs
    # every extension is known too: the kept winners' controls and replicates
    winners = sweep_winners(specs, results)
    for track in kept_tracks(config, winners, results):
        won = winners[track].run
        pair = (won.optimizer.name, won.projection.name)
        seeds = range(config.study.stage_seed + 1, config.study.stage_seed + sweep.replicates + 1)
        specs += [
            _spec(config, "control", pair, won.optimizer.lr, scale=scale) for scale in sweep.control_scales
        ]
        specs += [_spec(config, "replicate", pair, won.optimizer.lr, seed=seed) for seed in seeds]
    return specs


def _spec(
    config: Config, role: str, pair: Pair, lr: float, scale: float = 1.0, seed: int | None = None
) -> RunSpec:
    track = {"optimizer": pair[0], "projection": pair[1], "lr": lr}
    seed = config.study.stage_seed if seed is None else seed
    run = plain_run(config, track, config.lr_sweep.steps, seed, scale)
    return spec_of("lr_sweep", role, with_decay(config, run) if role == "control" else run, scale)


def _extend(config: Config, pair: Pair, grid: list[RunSpec], results: Results) -> None:
    """Extend a grid by a factor 2 beyond the edge that its winner lies on, until it lies inside or a run is
    missing."""
    for _ in range(config.lr_sweep.max_extensions):
        lrs = [s.run.optimizer.lr for s in grid]
        winner = best(grid, results)
        assert winner is not None
        edge = edge_of(lrs, winner.run.optimizer.lr)
        if edge in ("high", "both"):
            grid.append(_spec(config, "grid", pair, 2 * max(lrs)))
        if edge in ("low", "both"):
            grid.append(_spec(config, "grid", pair, min(lrs) / 2))
        if edge is None or waiting(grid, results):
            return


def sweep_winners(grid: Sequence[RunSpec], results: Results) -> dict[str, RunSpec]:
    """Track -> its best grid run, best track first; a track without a completed run is absent."""
    tracks: dict[str, list[RunSpec]] = {}
    for spec in grid:
        tracks.setdefault(spec.track, []).append(spec)
    winners = {t: w for t, specs in tracks.items() if (w := best(specs, results))}
    return dict(sorted(winners.items(), key=lambda item: val_loss(results[item[1].run_id])))


def kept_tracks(config: Config, winners: Mapping[str, RunSpec], results: Results) -> list[str]:
    """The tracks that later stages continue with: the best, or every one that is not triaged."""
    losses = {t: val_loss(results[w.run_id]) for t, w in winners.items()}
    alive = [t for t in losses if not triaged(config, losses, t)]
    return alive if config.lr_sweep.keep == "all" else alive[:1]


def triaged(config: Config, losses: Mapping[str, float], track: str) -> bool:
    """Whether a track lies more than `skip_threshold` (relative) behind the best."""
    return losses[track] > min(losses.values()) * (1 + config.lr_sweep.skip_threshold)


def decide(
    config: Config, specs: Sequence[RunSpec], results: Results, earlier: Mapping[str, Decision]
) -> Decision:
    """The best baseline learning rate of each track, the noise, the natural KL and the fair control."""
    grid = [s for s in specs if s.role == "grid"]
    winners = sweep_winners(grid, results)
    refuse_without_tracks(winners, "lr_sweep", grid, results)
    kept = kept_tracks(config, winners, results)
    tracks = {t: _decided(config, winners[t], [s for s in specs if s.track == t], results) for t in kept}
    pairs = _pairs(config, grid, winners, results, kept)
    rule = (
        "lowest validation loss on the grid; a winner on the edge extends the grid by a factor 2, at most "
        f"{config.lr_sweep.max_extensions} times; sigma is the standard deviation of the winner's fresh "
        "replicate seeds"
    )
    notes = _notes(config, tracks, pairs)
    return make_decision(
        "lr_sweep", rule, config, specs, results, earlier, tracks=tracks, pairs=pairs, notes=notes
    )


def _decided(config: Config, winner: RunSpec, own: Sequence[RunSpec], results: Results) -> dict[str, Any]:
    """What is decided for one track, from its own runs. Raises Undecidable."""
    grid = [s for s in own if s.role == "grid"]
    lrs = [s.run.optimizer.lr for s in grid]
    controls = [s for s in own if s.role == "control"]
    control = best(controls, results)
    replicates = [s for s in own if s.role == "replicate"]
    completed = [results[s.run_id] for s in replicates if math.isfinite(val_loss(results.get(s.run_id)))]
    noise = [val_loss(result) for result in completed]
    natural = [kl for result in completed if (kl := result["kl_median"])]
    lr = winner.run.optimizer.lr
    if len(noise) < 2 or not natural:
        raise Undecidable(
            f"lr_sweep could not decide: fewer than two replicates of {winner.arm} at lr {lr:g} completed "
            "with an "
            "audited KL, so neither the noise nor the natural KL is known."
        )
    if control is None:
        raise Undecidable(
            f"lr_sweep could not decide: no run of {winner.track} with a decaying learning rate completed."
        )
    sigma = statistics.stdev(noise)
    scales = [s.lr_scale for s in controls]
    return {
        "optimizer": winner.run.optimizer.name,
        "projection": winner.run.projection.name,
        "lr": lr,
        "run_id": winner.run_id,
        "val_loss": val_loss(results[winner.run_id]),
        "edge": edge_of(lrs, lr),
        "extensions": len(lrs) - len(config.lr_sweep.grids[winner.run.optimizer.name]),
        "ranked": [s.run_id for s in grid],
        "margin_sigma": margin_sigma(losses_of(grid, results), sigma),
        "sigma": sigma,
        "replicate_losses": noise,
        "natural_kl": statistics.median(natural),
        "descent_median": _descent(replicates, results),
        "control": {
            "lr": control.run.optimizer.lr,
            "lr_scale": control.lr_scale,
            "run_id": control.run_id,
            "val_loss": val_loss(results[control.run_id]),
            "edge": edge_of(scales, control.lr_scale) if len(scales) > 1 else None,
        },
    }


def _descent(replicates: Sequence[RunSpec], results: Results) -> float | None:
    """The predicted decrease in loss of the baseline's steps, nats a step: the unit of the `energy`
    controller."""
    found = [results[s.run_id].get("descent_median") for s in replicates if s.run_id in results]
    known = [d for d in found if d]
    return statistics.median(known) if known else None


def _pairs(
    config: Config,
    grid: Sequence[RunSpec],
    winners: Mapping[str, RunSpec],
    results: Results,
    kept: Sequence[str],
) -> list[dict[str, Any]]:
    """Every (optimizer, projection), the best first, and whether it was kept."""
    losses = {t: val_loss(results[w.run_id]) for t, w in winners.items()}
    pairs: list[dict[str, Any]] = [
        {
            "track": t,
            "lr": w.run.optimizer.lr,
            "val_loss": losses[t],
            "triaged": triaged(config, losses, t),
            "kept": t in kept,
        }
        for t, w in winners.items()
    ]
    for track in dict.fromkeys(s.track for s in grid):
        if track not in winners:
            pairs.append({"track": track, "lr": None, "val_loss": None, "triaged": True, "kept": False})
    return pairs


def _notes(config: Config, tracks: Mapping[str, Track], pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = [
        f"{t}: the fair control's best scale, ×{d['control']['lr_scale']:g}, lies on its grid's "
        f"{d['control']['edge']} edge: it may be under-tuned"
        for t, d in tracks.items()
        if d["control"]["edge"]
    ]
    notes += [f"{p['track']}: no grid run completed" for p in pairs if p["val_loss"] is None]
    notes += [
        f"{t}: the winner lr {d['lr']:g} lies on the grid's {d['edge']} edge even after {d['extensions']} "
        "extensions"
        for t, d in tracks.items()
        if d["edge"]
    ]
    behind = f"triaged, more than {100 * config.lr_sweep.skip_threshold:g}% behind the best"
    return notes + [f"{p['track']}: {behind}" for p in pairs if p["triaged"] and p["val_loss"] is not None]


def follow_up(config: Config, spec: RunSpec) -> RunSpec | None:
    """The grid point that would follow if this extension wins, unless it is the last one allowed."""
    if spec.role != "grid":
        return None
    grid = config.lr_sweep.grids[spec.run.optimizer.name]
    lr = spec.run.optimizer.lr
    if lr > max(grid):
        further = 2 * lr
    elif lr < min(grid):
        further = lr / 2
    else:
        return None
    reach = 2.0**config.lr_sweep.max_extensions * (1 + 1e-6)
    if not min(grid) / reach <= further <= max(grid) * reach:
        return None
    optimizer = replace(spec.run.optimizer, lr=float(f"{further:.6g}"))
    return replace(spec, run=replace(spec.run, optimizer=optimizer))


def headline(track: Track) -> str:
    control = track["control"]
    return (
        f"lr {track['lr']:g}, val {track['val_loss']:.4f}, σ {track['sigma']:.4f}; natural KL "
        f"{track['natural_kl']:.4g} nats; fair control lr {control['lr']:g} (×{control['lr_scale']:g}), "
        f"val {control['val_loss']:.4f}"
    )


def _edge(track: Track) -> str:
    return f"on the grid’s {track['edge']} edge" if track["edge"] else "inside its grid"


def _noise(track: Track) -> str:
    floor = noise_floor(track["replicate_losses"])
    return f"nats, {floor['seeds']} replicate seeds; 95% interval {floor['low']:.4f} to {floor['high']:.4f}"


def _control(track: Track) -> str:
    control = track["control"]
    edge = f"; {control['edge']} edge of its grid" if control["edge"] else ""
    return f"×{control['lr_scale']:g}, loss {control['val_loss']:.4f}{edge}"


STAGE = Stage(
    name="lr_sweep",
    runs=runs,
    decide=decide,
    headline=headline,
    figures=(
        Figure("lr", "learning rate", "{:.3g}", _edge),
        Figure("val_loss", "validation loss", "{:.4f}", "nats per token"),
        Figure("sigma", "noise σ", "{:.4f}", _noise),
        Figure("natural_kl", "natural KL", "{:.3g}", "nats per step, without EBC"),
        Figure("control.lr", "fair control", "lr {:.3g}", _control),
        Figure("control.val_loss"),
    ),
    follow_up=follow_up,
    title="Learning rate, noise and a fair control",
    about="Without EBC: which optimizer and learning rate are best, how much luck there is in a loss (σ, the "
    "spread over replicate seeds), how far predictions move by themselves (the natural KL), and how good the "
    "same optimizer gets with warm-up and decay (the fair control).",
    pictures=("lr_sweep",),
)

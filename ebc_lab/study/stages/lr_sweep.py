"""lr_sweep: the best baseline learning rate, the noise between seeds, the natural KL and the fair control."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ebc_lab.config.schema import Config

from . import rules
from .rules import (
    Decision,
    Results,
    Undecidable,
    best,
    edge_of,
    margin_sigma,
    refuse_without_tracks,
    sealed,
    val_loss,
)
from .runs import plain_run, spec_of, waiting, with_decay
from .spec import RunSpec
from .stage import Figure, Stage, Track
from .statistics import noise as noise_floor


def runs(config: Config, decisions: Mapping[str, Decision], results: Results) -> list[RunSpec]:
    """The grid of every (optimizer, projection), its extensions, then the kept tracks' replicates and controls."""
    sweep, seed = config.lr_sweep, config.study.stage_seed

    def at(
        optimizer: str, projection: str, lr: float, scale: float = 1.0, role: str = "grid", s: int = seed
    ) -> RunSpec:
        run = plain_run(
            config, {"optimizer": optimizer, "projection": projection, "lr": lr}, sweep.steps, s, scale
        )
        return spec_of("lr_sweep", role, run if role != "control" else with_decay(config, run), scale)

    pairs = [(o, p) for o in sweep.optimizers for p in sweep.projections]
    grids = {pair: [at(*pair, lr) for lr in sweep.grids[pair[0]]] for pair in pairs}
    specs = [s for grid in grids.values() for s in grid]
    if waiting(specs, results):
        return specs
    winners = sweep_winners(config, specs, results)
    losses = {t: val_loss(results[w.run_id]) for t, w in winners.items()}
    for pair, grid in grids.items():
        track = "_".join(pair)
        if track not in winners or triaged(config, losses, track):
            continue
        for _ in range(sweep.max_extensions):
            lrs = [s.run.optimizer.lr for s in grid]
            winner = rules.best(grid, results)
            assert winner is not None
            edge = rules.edge_of(lrs, winner.run.optimizer.lr)
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
    winners = sweep_winners(config, specs, results)
    for track in kept_tracks(config, winners, results) if winners else []:
        won = winners[track].run
        names = (won.optimizer.name, won.projection.name, won.optimizer.lr)
        specs += [at(*names, scale, "control") for scale in sweep.control_scales]
        specs += [at(*names, 1.0, "replicate", seed + i) for i in range(1, sweep.replicates + 1)]
    return specs


def sweep_winners(config: Config, grid: Sequence[RunSpec], results: Results) -> dict[str, RunSpec]:
    """Track (optimizer_projection) -> its best grid run, best track first; pairs without a completed run are absent."""
    tracks: dict[str, list[RunSpec]] = {}
    for spec in grid:
        tracks.setdefault(spec.track, []).append(spec)
    winners = {t: w for t, specs in tracks.items() if (w := best(specs, results))}
    return dict(sorted(winners.items(), key=lambda item: val_loss(results[item[1].run_id])))


def kept_tracks(config: Config, winners: Mapping[str, RunSpec], results: Results) -> list[str]:
    """The tracks that go on: the best, or every one not triaged."""
    losses = {t: val_loss(results[w.run_id]) for t, w in winners.items()}
    alive = [t for t in losses if not triaged(config, losses, t)]
    return alive if config.lr_sweep.keep == "all" else alive[:1]


def triaged(config: Config, losses: Mapping[str, float], track: str) -> bool:
    """Whether a track lies more than `skip_threshold` (relative) behind the best."""
    return losses[track] > min(losses.values()) * (1 + config.lr_sweep.skip_threshold)


def decide(
    config: Config, specs: Sequence[RunSpec], results: Results, earlier: Mapping[str, Decision]
) -> Decision:
    """The best baseline learning rate of each pair, the noise, the natural KL and the fair control."""
    grid = [s for s in specs if s.role == "grid"]
    winners = sweep_winners(config, grid, results)
    refuse_without_tracks(
        winners, "lr_sweep", [str(results.get(s.run_id, {}).get("cause") or "") for s in grid]
    )
    losses = {t: val_loss(results[w.run_id]) for t, w in winners.items()}
    tracks: dict[str, Any] = {}
    for track in kept_tracks(config, winners, results):
        winner = winners[track]
        own = [s for s in specs if s.track == track]
        lrs = [s.run.optimizer.lr for s in own if s.role == "grid"]
        replicates = [s for s in own if s.role == "replicate"]
        noise = [val_loss(results.get(s.run_id)) for s in replicates]
        noise = [x for x in noise if math.isfinite(x)]
        natural = [
            results[s.run_id]["kl_median"]
            for s in replicates
            if math.isfinite(val_loss(results.get(s.run_id)))
        ]
        natural = [k for k in natural if k]
        controls = [s for s in own if s.role == "control"]
        control = best(controls, results)
        if len(noise) < 2 or not natural:
            raise Undecidable(
                f"lr_sweep could not decide: fewer than two replicates of {winner.arm} at lr {winner.run.optimizer.lr:g} "
                "completed with an audited KL, so neither the noise nor the natural KL is known."
            )
        if control is None:
            raise Undecidable(
                f"lr_sweep could not decide: no run of {track} with a decaying learning rate completed."
            )
        sigma = statistics.stdev(noise)
        scales = [s.lr_scale for s in controls]
        tracks[track] = {
            "optimizer": winner.run.optimizer.name,
            "projection": winner.run.projection.name,
            "lr": winner.run.optimizer.lr,
            "run_id": winner.run_id,
            "val_loss": losses[track],
            "edge": edge_of(lrs, winner.run.optimizer.lr),
            "extensions": len(lrs) - len(config.lr_sweep.grids[winner.run.optimizer.name]),
            "ranked": [s.run_id for s in own if s.role == "grid"],
            "margin_sigma": margin_sigma(
                [val_loss(results.get(s.run_id)) for s in own if s.role == "grid"], sigma
            ),
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
    pairs = [
        {
            "track": t,
            "lr": w.run.optimizer.lr,
            "val_loss": losses[t],
            "triaged": triaged(config, losses, t),
            "kept": t in tracks,
        }
        for t, w in winners.items()
    ]
    names = dict.fromkeys(s.track for s in grid)
    pairs += [
        {"track": t, "lr": None, "val_loss": None, "triaged": True, "kept": False}
        for t in names
        if t not in winners
    ]
    notes = [
        f"{t}: the fair control's best scale, ×{d['control']['lr_scale']:g}, lies on its grid's {d['control']['edge']} edge: "
        "it may be under-tuned"
        for t, d in tracks.items()
        if d["control"]["edge"]
    ]
    notes += [f"{t}: no grid run completed" for t in names if t not in winners]
    notes += [
        f"{t}: the winner lr {d['lr']:g} lies on the grid's {d['edge']} edge even after {d['extensions']} extensions"
        for t, d in tracks.items()
        if d["edge"]
    ]
    notes += [
        f"{p['track']}: triaged, more than {100 * config.lr_sweep.skip_threshold:g}% behind the best"
        for p in pairs
        if p["triaged"] and p["val_loss"] is not None
    ]
    rule = (
        "lowest validation loss on the grid; a winner on the edge extends the grid by a factor 2, at most "
        f"{config.lr_sweep.max_extensions} times; sigma is the standard deviation of the winner's fresh replicate seeds"
    )
    return sealed("lr_sweep", rule, config, specs, results, earlier, tracks=tracks, pairs=pairs, notes=notes)


def _descent(replicates: Sequence[RunSpec], results: Results) -> float | None:
    """What the baseline's proposals promise the loss to fall by, nats a step: the unit of the `energy` controller."""
    found = [d for s in replicates if (d := results.get(s.run_id, {}).get("descent_median"))]
    return statistics.median(found) if found else None


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
    about="Without EBC: which optimizer and learning rate are best, how much luck there is in a loss (σ, the spread "
    "over replicate seeds), how far predictions move by themselves (the natural KL), and how good the same optimizer "
    "gets with warm-up and decay (the fair control).",
    pictures=("lr_sweep",),
)

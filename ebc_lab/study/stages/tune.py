"""tune: each arm of a suite that has a grid at its own best point, every such arm with as many runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ebc_lab.config.identity import number
from ebc_lab.config.schema import ArmConfig, Config

from .rules import Decision, Results, best, edge_of, losses_of, make_decision, margin_sigma, val_loss
from .spec import RunSpec
from .stage import Stage, Track
from .suite import points, ready, run_of


def runs(config: Config, decisions: Mapping[str, Decision], results: Results) -> list[RunSpec]:
    """Every point of every arm's grid, at the stage's seed."""
    specs = []
    seed = config.study.stage_seed
    for track in ready(config, decisions, "tune"):
        for label, arm in config.ablation.all_arms().items():
            for point in points(arm) if arm.tune else []:
                run, scale = run_of(config, decisions, track, arm, config.tune.steps, seed, point)
                run = replace(run, evaluate=["val"])
                name = label + "".join(f"_{k.replace('lr_scale', 'x')}{number(v)}" for k, v in point.items())
                specs.append(RunSpec("tune", label, name, scale, run, of_track=track))
    return specs


def decide(
    config: Config, specs: Sequence[RunSpec], results: Results, earlier: Mapping[str, Decision]
) -> Decision:
    """Each tuned arm's best point, by validation loss; a point on an edge of its grid is noted."""
    tracks: dict[str, Any] = {}
    notes: list[str] = []
    for track in ready(config, earlier, "tune"):
        sigma = earlier["lr_sweep"]["tracks"][track]["sigma"]
        arms: dict[str, Any] = {}
        for label, arm in config.ablation.all_arms().items():
            own = [s for s in specs if s.role == label and s.track == track]
            if not own:
                continue
            found = _decided(arm, own, results, sigma)
            if found["run_id"] is None:
                notes.append(f"{track}: no run of {label} completed; its first point is taken")
            for key, edge in found["edges"].items():
                at = f"{label}'s best {key}, {found['point'][key]:g}"
                notes.append(f"{track}: {at}, lies on its grid's {edge} edge")
            arms[label] = found
        tracks[track] = {"arms": arms, "sigma": sigma}
    rule = (
        f"each arm's lowest validation loss over its own grid, {config.tune.steps} steps, one seed, as many "
        "runs for "
        "every arm"
    )
    return make_decision("tune", rule, config, specs, results, earlier, tracks=tracks, notes=notes)


def _decided(arm: ArmConfig, own: Sequence[RunSpec], results: Results, sigma: float) -> dict[str, Any]:
    """The best point of one arm, from its runs in the order of its points."""
    winner = best(own, results)
    chosen = points(arm)[own.index(winner) if winner else 0]
    edges = {k: edge_of(arm.tune[k], v) for k, v in chosen.items() if len(arm.tune[k]) > 1}
    return {
        "point": chosen,
        "run_id": winner.run_id if winner else None,
        "val_loss": val_loss(results.get(winner.run_id)) if winner else None,
        "runs": len(own),
        "edges": {k: edge for k, edge in edges.items() if edge},
        "margin_sigma": margin_sigma(losses_of(own, results), sigma),
    }


def headline(track: Track) -> str:
    losses = {a: f["val_loss"] for a, f in track["arms"].items() if f["val_loss"] is not None}
    best = min(losses, key=lambda a: losses[a], default="none")
    margins = [f["margin_sigma"] for f in track["arms"].values() if f["margin_sigma"] is not None]
    told = f"; margins of {min(margins):.1f} to {max(margins):.1f} σ" if margins else ""
    return f"{len(track['arms'])} arms tuned; the best is {best}{told}"


STAGE = Stage(
    name="tune",
    runs=runs,
    decide=decide,
    headline=headline,
    grows=False,
    title="Each arm at its own best",
    about="Every arm that has a grid gets the same number of tuning runs.",
    shows="points",
)

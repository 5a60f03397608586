"""controller_search: which controller holds the KL on its target (optional)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ebc_lab.config.schema import Config
from ebc_lab.records.figures import KL_BAND

from .rules import Decision, Results, best, margin_sigma, refuse_without_tracks, sealed, val_loss
from .runs import plain_run, spec_of, tracks_of, with_ebc
from .spec import RunSpec
from .stage import Figure, Stage, Track


def runs(config: Config, decisions: Mapping[str, Decision], results: Results) -> list[RunSpec]:
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


def decide(
    config: Config, specs: Sequence[RunSpec], results: Results, earlier: Mapping[str, Decision]
) -> Decision:
    """The controller of each track: best validation loss among those that hold the KL on its target, else the nearest to it."""
    tracks: dict[str, Any] = {}
    notes: list[str] = []
    for track, calibrated in earlier["calibrate"]["tracks"].items():
        own = [s for s in specs if s.track == track and math.isfinite(val_loss(results.get(s.run_id)))]
        ratios = {s.run_id: results[s.run_id].get("kl_ratio_median") for s in own}
        usable = [s for s in own if ratios[s.run_id]]
        if not usable:
            continue
        off = {s.run_id: abs(math.log(float(ratios[s.run_id] or 1))) for s in usable}
        inside = [s for s in usable if abs(float(ratios[s.run_id] or 0) - 1) <= KL_BAND]
        winner = best(inside, results) or min(usable, key=lambda s: off[s.run_id])
        if not inside:
            notes.append(
                f"{track}: no candidate held the KL within ±{100 * KL_BAND:g}% of δ*; the nearest was taken"
            )
        sigma = earlier["lr_sweep"]["tracks"][track]["sigma"]
        tracks[track] = {
            "candidate": winner.role,
            "settings": config.controller_search.candidates[winner.role],
            "delta_star": calibrated["delta_star"],
            "run_id": winner.run_id,
            "val_loss": val_loss(results[winner.run_id]),
            "kl_ratio": ratios[winner.run_id],
            "kl_ratios": {s.role: ratios[s.run_id] for s in own},
            "ranked": [s.run_id for s in inside],
            "margin_sigma": margin_sigma([val_loss(results[s.run_id]) for s in inside], sigma),
            "sigma": sigma,
        }
    refuse_without_tracks(
        tracks, "controller_search", [str(results.get(s.run_id, {}).get("cause") or "") for s in specs]
    )
    rule = (
        f"at the calibrated δ* and LR ×{config.calibrate.lr_scale:g}: lowest validation loss among the candidates whose median "
        f"applied KL, over audited clipped steps, is within ±{100 * KL_BAND:g}% of δ*; none: the nearest to it"
    )
    return sealed("controller_search", rule, config, specs, results, earlier, tracks=tracks, notes=notes)


def headline(track: Track) -> str:
    return (
        f"{track['candidate']} of {len(track['kl_ratios'])}, median KL/δ* {track['kl_ratio']:.2f}, "
        f"val {track['val_loss']:.4f}"
    )


STAGE = Stage(
    name="controller_search",
    runs=runs,
    decide=decide,
    headline=headline,
    figures=(
        Figure("candidate", "controller"),
        Figure("kl_ratio", "median KL/δ*", "{:.2f}"),
        Figure("val_loss", "validation loss", "{:.4f}", "nats per token"),
    ),
    grows=False,
    title="Which controller",
    about="Which controller holds the KL on its target, and with which gains.",
)

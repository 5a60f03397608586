"""controller_search: which controller holds the KL on its target (optional)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ebc_lab.config.schema import Config
from ebc_lab.records.decisions import Candidate, ControllerTrack, Decision
from ebc_lab.records.figures import KL_BAND
from ebc_lab.records.spec import RunSpec

from .rules import Results, best, losses_of, make_decision, margin_sigma, refuse_without_tracks, val_loss
from .runs import ebc_run, spec_of, tracks_of
from .stage import Choice, Decisions, Figure


def runs(config: Config, decisions: Mapping[str, Decision], results: Results) -> list[RunSpec]:
    """Plan every candidate's controller (and cadence) at the calibrated budget, target KL and learning
    rate."""
    if "calibrate" not in decisions:
        return []
    specs: list[RunSpec] = []
    scale = config.calibrate.lr_scale
    for name in tracks_of(decisions, "controller_search"):
        track = decisions["lr_sweep"]["tracks"][name]
        calibrated = decisions["calibrate"]["tracks"][name]
        budget = {"budget": calibrated["budget"], "target_kl": calibrated["delta_star"]}
        for candidate, settings in config.controller_search.candidates.items():
            steps = config.controller_search.steps
            run = ebc_run(config, track, steps, config.study.stage_seed, scale, **budget, **settings)
            note, usual = f"_{candidate}", config.finals.steps
            specs.append(spec_of("controller_search", candidate, run, scale, note, usual=usual))
    return specs


def decide(
    config: Config, specs: Sequence[RunSpec], results: Results, earlier: Mapping[str, Decision]
) -> Decision:
    """Choose the controller of each track: best validation loss among those that hold the KL on its target,
    else the nearest to it."""
    band = f"±{100 * KL_BAND:g}% of δ*"
    tracks: dict[str, ControllerTrack] = {}
    notes: list[str] = []
    for track, calibrated in earlier["calibrate"]["tracks"].items():
        done = [s for s in specs if s.track == track and math.isfinite(val_loss(results.get(s.run_id)))]
        if not any(results[s.run_id].get("kl_ratio_median") for s in done):
            continue
        sigma = earlier["lr_sweep"]["tracks"][track]["sigma"]
        tracks[track] = _decided(config, done, results, calibrated["delta_star"], sigma)
        if not tracks[track]["ranked"]:
            notes.append(f"{track}: no candidate held the KL within {band}; the nearest was taken")
    refuse_without_tracks(tracks, "controller_search", specs, results)
    rule = (
        f"at the calibrated δ* and LR ×{config.calibrate.lr_scale:g}: lowest validation loss among the "
        "candidates whose "
        f"median applied KL, over audited clipped steps, is within {band}; none: the nearest to it"
    )
    return make_decision(
        "controller_search", rule, config, specs, results, earlier, tracks=tracks, notes=notes
    )


def _decided(
    config: Config, done: Sequence[RunSpec], results: Results, target_kl: float, sigma: float
) -> ControllerTrack:
    """Decide for one track, from its completed runs."""
    ratios = {s.run_id: results[s.run_id].get("kl_ratio_median") for s in done}
    known = {run_id: float(ratio) for run_id, ratio in ratios.items() if ratio}
    usable = [s for s in done if s.run_id in known]
    inside = [s for s in usable if abs(known[s.run_id] - 1) <= KL_BAND]
    winner = best(inside, results) or min(usable, key=lambda s: abs(math.log(known[s.run_id])))
    return {
        "candidate": winner.role,
        "settings": config.controller_search.candidates[winner.role],
        "delta_star": target_kl,
        "run_id": winner.run_id,
        "val_loss": val_loss(results[winner.run_id]),
        "kl_ratio": ratios[winner.run_id],
        "kl_ratios": {s.role: ratios[s.run_id] for s in done},
        "ranked": [s.run_id for s in inside],
        "margin_sigma": margin_sigma(losses_of(inside, results), sigma),
        "sigma": sigma,
    }


def headline(track: ControllerTrack) -> str:
    """Write a decided track in one line."""
    return (
        f"{track['candidate']} of {len(track['kl_ratios'])}, median KL/δ* {track['kl_ratio']:.2f}, "
        f"validation loss {track['val_loss']:.4f}"
    )


def _overlooked(chosen: ControllerTrack, candidate: Candidate, candidates: Sequence[Candidate]) -> str:
    ratio = chosen["kl_ratios"].get(candidate["role"])
    if candidate["run_id"] in chosen["ranked"]:
        return ""
    if not ratio:
        return "its KL on clipped steps is not known"
    return f"its median KL is {ratio:.2f} × δ*, not within ±{100 * KL_BAND:g}%"


class ControllerSearch(Choice):
    """The controller that holds the KL on its target."""

    name = "controller_search"
    title = "Which controller"
    about = "Which controller holds the KL on its target, and with which gains."
    setting = "{role}"
    figures = (
        Figure("candidate", "controller"),
        Figure("kl_ratio", "median KL/δ*", "{:.2f}"),
        Figure("val_loss", "validation loss", "{:.4f}", "nats per token"),
    )

    def runs(self, config: Config, earlier: Decisions, results: Results) -> list[RunSpec]:
        return runs(config, earlier, results)

    def decide(
        self, config: Config, specs: Sequence[RunSpec], results: Results, earlier: Decisions
    ) -> Decision:
        return decide(config, specs, results, earlier)

    def headline(self, track: ControllerTrack) -> str:
        return headline(track)

    def why_not(self, chosen: ControllerTrack, candidate: Candidate, candidates: Sequence[Candidate]) -> str:
        return _overlooked(chosen, candidate, candidates)


STAGE = ControllerSearch()

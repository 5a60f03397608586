"""controller_search: an optional stage that finds which controller holds the KL on its target."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ebc_lab.config.schema import Config
from ebc_lab.records.decisions import Candidate, ControllerTrack, Decision
from ebc_lab.records.figures import KL_BAND
from ebc_lab.records.spec import RunSpec

from . import rules
from .rules import Decisions, Results, Specs, make_decision, val_loss
from .runs import ebc_run, spec_of, tracks_of
from .stage import Choice, Figure


class ControllerSearch(Choice):
    """The stage that chooses a controller that holds the KL on its target."""

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
        """Return one run per track and candidate, once calibrate has decided the budget and δ*."""
        if "calibrate" not in earlier:
            return []
        specs: list[RunSpec] = []
        scale, seed = config.calibrate.lr_scale, config.study.stage_seed
        search, usual = config.controller_search, config.finals.steps
        for name in tracks_of(earlier, self.name):
            track = earlier["lr_sweep"]["tracks"][name]
            calibrated = earlier["calibrate"]["tracks"][name]
            budget = {"budget": calibrated["budget"], "target_kl": calibrated["delta_star"]}
            for candidate, settings in search.candidates.items():
                run = ebc_run(config, track, search.steps, seed, scale, **budget, **settings)
                specs.append(spec_of(self.name, candidate, run, scale, f"_{candidate}", usual=usual))
        return specs

    def decide(self, config: Config, specs: Specs, results: Results, earlier: Decisions) -> Decision:
        band = f"±{100 * KL_BAND:g}% of δ*"
        tracks: dict[str, ControllerTrack] = {}
        notes: list[str] = []
        for track, calibrated in earlier["calibrate"]["tracks"].items():
            done = [s for s in specs if s.track == track and math.isfinite(val_loss(results.get(s.run_id)))]
            ratios = {s.run_id: results[s.run_id].get("kl_ratio_median") for s in done}
            known = {run_id: float(ratio) for run_id, ratio in ratios.items() if ratio}
            if not known:
                continue
            usable = [s for s in done if s.run_id in known]
            inside = [s for s in usable if abs(known[s.run_id] - 1) <= KL_BAND]
            winner = rules.best(inside, results) or min(usable, key=lambda s: abs(math.log(known[s.run_id])))
            sigma = earlier["lr_sweep"]["tracks"][track]["sigma"]
            tracks[track] = {
                "candidate": winner.role,
                "settings": config.controller_search.candidates[winner.role],
                "delta_star": calibrated["delta_star"],
                "run_id": winner.run_id,
                "val_loss": val_loss(results[winner.run_id]),
                "kl_ratio": ratios[winner.run_id],
                "kl_ratios": {s.role: ratios[s.run_id] for s in done},
                "ranked": [s.run_id for s in inside],
                "margin_sigma": rules.margin_sigma(rules.losses_of(inside, results), sigma),
                "sigma": sigma,
            }
            if not inside:
                notes.append(f"{track}: no candidate held the KL within {band}; the nearest was taken")
        rule = (
            f"at the calibrated δ* and LR ×{config.calibrate.lr_scale:g}: lowest validation loss among the "
            f"candidates whose median applied KL, over audited clipped steps, is within {band}; none: the "
            "nearest to it"
        )
        return make_decision(self.name, rule, config, specs, results, earlier, tracks=tracks, notes=notes)

    def headline(self, track: ControllerTrack) -> str:
        return (
            f"{track['candidate']} of {len(track['kl_ratios'])}, median KL/δ* {track['kl_ratio']:.2f}, "
            f"validation loss {track['val_loss']:.4f}"
        )

    def why_not(self, chosen: ControllerTrack, candidate: Candidate, candidates: Sequence[Candidate]) -> str:
        ratio = chosen["kl_ratios"].get(candidate["role"])
        if candidate["run_id"] in chosen["ranked"]:
            return ""
        if not ratio:
            return "its KL on clipped steps is not known"
        return f"its median KL is {ratio:.2f} × δ*, not within ±{100 * KL_BAND:g}%"


STAGE = ControllerSearch()

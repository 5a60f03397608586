"""lr_scale: how far the learning rate can rise, with EBC and without."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from ebc_lab.config.identity import round3
from ebc_lab.config.schema import Config
from ebc_lab.records.decisions import Candidate, Decision, ScaledRun, ScaleTrack, Window
from ebc_lab.records.figures import RunResult
from ebc_lab.records.spec import RunSpec

from . import rules
from .lr_sweep.fair_control import control_run
from .rules import Decisions, Results, Specs, band_distance, c_median, make_decision, val_loss
from .runs import ebc_run, plain_run, searched, spec_of, tracks_of
from .stage import Choice, Figure, Scenario, beside_the_band, outside_the_band
from .statistics import WINDOW_NATS, in_octaves, open_ends, window

INERT_CLIP_RATE = 0.99  # share of clipped steps at which the learning rate no longer matters
Arms = dict[str, list[ScaledRun]]  # role -> its runs, by rising scale
SURROGATE_SHARE = 0.6  # a fixed trust radius is set to this share of the median surrogate at ×1


def _rows(specs: Specs, results: Results) -> Arms:
    """Return each arm's runs in the form in which a decision records them, each marked as inert or not."""
    arms: Arms = {}
    for spec in sorted(specs, key=lambda s: s.lr_scale):
        row = rules.candidate(spec, results)
        clipped = spec.role != "none" and (row["clip_rate"] or 0) >= INERT_CLIP_RATE
        inert = clipped and not spec.run.budget.leaves_some_free()
        arms.setdefault(spec.role, []).append({**row, "inert": inert})
    return arms


def _usable(arms: Arms, results: Results) -> list[ScaledRun]:
    return [r for r in arms.get("ebc", []) if c_median(results.get(r["run_id"])) is not None]


def _decided(config: Config, arms: Arms, results: Results, sigma: float) -> ScaleTrack | None:
    """Return the decision on one track, or None if no EBC run or no plain reference run completed."""
    losses: dict[str, dict[float, float]] = {}  # arm -> scale -> nats
    for arm, rows in arms.items():
        losses[arm] = {r["lr_scale"]: val_loss(results.get(r["run_id"])) for r in rows}
    # the plain optimizer's loss: with a constant rate at ×1, on a schedule at its best scale
    plain = losses.get("none", {})
    constant = config.study.lr_schedule == "constant"
    reference = plain.get(1.0, math.inf) if constant else min(plain.values(), default=math.inf)
    usable = _usable(arms, results)
    if not usable or math.isinf(reference):
        return None
    # where nearly every step is clipped, the scale has no effect: the lowest such scale stands for all
    inert = [r for r in usable if r["inert"]]
    candidates = [r for r in usable if not r["inert"]] + inert[:1]
    outside = {r["lr_scale"]: band_distance(r["c_median"], config.study.band) for r in candidates}
    ranked = [r for r in candidates if outside[r["lr_scale"]] == 0 or config.calibrate.choose == "loss"]
    chosen = min(ranked, key=lambda r: (r["val_loss"], r["lr_scale"]), default=None)
    chosen = chosen or min(candidates, key=lambda r: (outside[r["lr_scale"]], r["val_loss"]))
    headroom: dict[str, float | None] = {}
    windows: dict[str, Window | None] = {}
    for arm, rows in arms.items():
        known = {r["lr_scale"]: losses[arm][r["lr_scale"]] for r in rows if rules.is_conclusive(r)}
        windows[arm] = window(known)
        within = (scale for scale, loss in losses[arm].items() if loss <= reference + sigma)
        headroom[arm] = max(within, default=None)
    return {
        "lr_scale": chosen["lr_scale"],
        "run_id": chosen["run_id"],
        "val_loss": chosen["val_loss"],
        "c_median": chosen["c_median"],
        "in_band": outside[chosen["lr_scale"]] == 0,
        "inert": chosen["inert"],
        "baseline_val_loss": reference,
        "headroom": headroom,
        "lr_window": windows,
        "headroom_is_tautology": bool(inert),
        "ranked": [r["run_id"] for r in ranked],
        "margin_sigma": rules.margin_sigma([losses["ebc"][r["lr_scale"]] for r in ranked], sigma),
        "sigma": sigma,
        "arms": arms,
    }


def _reach(arm: str, track: ScaleTrack) -> str:
    span = track["lr_window"][arm]
    assert span is not None
    ends = f"; open at the {open_ends(span)} end of what was tried" if open_ends(span) else ""
    return f"×{span['low']:.3g} to ×{span['high']:.3g}, within {WINDOW_NATS:g} nats of its best{ends}"


HEADROOM = {  # arm -> its name in sentences
    "ebc": "with EBC",
    "none": "without EBC",
    "fixed_tau": "fixed trust radius",
    "surrogate_x1": "surrogate at ×1",
}

HIGHEST = "the highest rate whose loss is within one σ of the best without EBC"


class LRScale(Choice):
    """The stage that finds how far the learning rate can rise, with EBC and without."""

    name = "lr_scale"
    title = "How far the learning rate can rise"
    about = "With and without EBC, at multiples of the best plain learning rate."
    setting = "×{lr_scale:g}"
    figures = (
        Figure("lr_scale", "chosen scale", "×{:g}", lambda track: "LR inert there" if track["inert"] else ""),
        Figure("c_median", "median c", "{:.2f}", beside_the_band),
        Figure("val_loss", "validation loss", "{:.4f}", "nats per token"),
        *(
            Figure(f"headroom.{arm}", f"headroom, {words}", "×{:g}", HIGHEST)
            for arm, words in HEADROOM.items()
        ),
        *(
            Figure(f"lr_window.{arm}.octaves", f"LR window, {words}", "{:.1f} octaves", partial(_reach, arm))
            for arm, words in HEADROOM.items()
        ),
    )
    pictures = ("lr_scale",)

    def runs(self, config: Config, earlier: Decisions, results: Results) -> list[RunSpec]:
        """Return a run with EBC and one without at every LR scale. If the surrogate budget was calibrated,
        there is also one under it at ×1. Once the median S of that run is known, a run with a fixed trust
        radius is added at every scale."""
        search_open = "controller_search" in config.study.stages and "controller_search" not in earlier
        specs: list[RunSpec] = []
        spec = partial(spec_of, self.name, usual=config.finals.steps)
        steps, seed, scales = config.lr_scale.steps, config.study.stage_seed, config.lr_scale.scales
        # without EBC: at a constant rate if the study's schedule is constant, else on the fair control's
        without_ebc = plain_run if config.study.lr_schedule == "constant" else control_run
        for name in tracks_of(earlier, self.name):
            track = earlier["lr_sweep"]["tracks"][name]
            for scale in sorted({1.0, *scales}):
                specs.append(spec("none", without_ebc(config, track, steps, seed, scale), scale))
            if "calibrate" not in earlier or search_open:
                continue
            calibrated = earlier["calibrate"]["tracks"][name]
            budget = {"budget": calibrated["budget"], "target_kl": calibrated["delta_star"]}
            ebc = partial(ebc_run, config, track, steps, seed)
            for scale in scales:
                specs.append(spec("ebc", ebc(scale, **budget, **searched(earlier, name)), scale))
            if "surrogate" not in calibrated["by_budget"]:
                continue
            surrogate = partial(ebc, budget="surrogate")
            at_one = surrogate(1.0, target_kl=calibrated["by_budget"]["surrogate"])
            specs.append(spec("surrogate_x1", at_one, 1.0))
            median = results.get(specs[-1].run_id, RunResult()).get("surrogate_median") or 0.0
            for scale in scales if median else ():
                run = surrogate(scale, target_kl=round3((SURROGATE_SHARE * median / 2) ** 2))
                fixed = replace(run.controller, name="fixed", kp=None, ki=None, a=None)
                run = replace(run, controller=fixed, budget=replace(run.budget, schedule="constant"))
                specs.append(spec("fixed_tau", run, scale, "_fixedtau"))
        return specs

    def decide(self, config: Config, specs: Specs, results: Results, earlier: Decisions) -> Decision:
        low, high = config.study.band
        by_band = config.calibrate.choose == "band"
        tracks: dict[str, ScaleTrack] = {}
        notes: list[str] = []
        for track in earlier["calibrate"]["tracks"]:
            arms = _rows([s for s in specs if s.track == track], results)
            decided = _decided(config, arms, results, earlier["lr_sweep"]["tracks"][track]["sigma"])
            if decided is None:
                continue
            tracks[track] = decided
            if by_band and not decided["in_band"]:
                note = f"no EBC scale has its median c in {low:g}–{high:g}; the nearest was taken"
                notes.append(f"{track}: {note}")
            inert = [f"×{r['lr_scale']:g}" for r in _usable(arms, results) if r["inert"]]
            if len(inert) > 1:
                note = f"LR inert: the same run up to rounding; {inert[0]} stands for them"
                notes.append(f"{track}: EBC at {', '.join(inert)} — {note}")
        among = "EBC scales with median c in the band, else the nearest" if by_band else "EBC scales"
        merged = ""
        if not config.budget.leaves_some_free():
            clipped = f"{100 * INERT_CLIP_RATE:g}% of the steps or more"
            merged = f"scales at which EBC clips {clipped} count as one candidate; "
        rule = (
            f"lowest validation loss among {among}; {merged}headroom: the largest scale within one sigma of "
            f"the plain optimizer's best; LR window: within {WINDOW_NATS:g} nats of the arm's own best"
        )
        return make_decision(self.name, rule, config, specs, results, earlier, tracks=tracks, notes=notes)

    def headline(self, track: ScaleTrack) -> str:
        scales = {arm: "nowhere" if x is None else f"×{x:g}" for arm, x in track["headroom"].items()}
        headroom = ", ".join(f"{HEADROOM[arm]} {scale}" for arm, scale in scales.items())
        inert = " (where EBC clips nearly every step, which cancels the learning rate)"
        windows = ", ".join(f"{HEADROOM[arm]} {in_octaves(w)}" for arm, w in track["lr_window"].items())
        return (
            f"×{track['lr_scale']:g}, median c {track['c_median']:.2f}, validation loss "
            f"{track['val_loss']:.4f}; LR window {windows}; headroom (highest rate within one σ of the best "
            f"without EBC): {headroom}{inert if track['headroom_is_tautology'] else ''}"
        )

    def why_not(self, chosen: ScaleTrack, candidate: Candidate, candidates: Sequence[Candidate]) -> str:
        if candidate["role"] != "ebc":
            return f"{HEADROOM[candidate['role']]}, and this stage chooses a scale for EBC"
        inert = [r for r in chosen["arms"]["ebc"] if r["inert"] and r["c_median"] is not None]
        if candidate["run_id"] in {r["run_id"] for r in inert[1:]}:
            return f"LR inert, ×{inert[0]['lr_scale']:g} stands for it"
        return outside_the_band(chosen, candidate)

    def invent(self, config: Config, scenario: Scenario, spec: RunSpec, nth: int) -> RunResult:
        """Return a median c that makes the largest scale win, unless arms coincide in the scenario."""
        if spec.role != "ebc" or scenario.merged:
            return super().invent(config, scenario, spec, nth)
        return {"c_median": 0.6 if spec.lr_scale == max(config.lr_scale.scales) else 0.3}


STAGE = LRScale()

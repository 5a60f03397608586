"""lr_scale: how far the learning rate can rise, with EBC and without."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ebc_lab.config.schema import Config

from .rules import (
    Decision,
    Results,
    band_distance,
    c_median,
    candidate,
    margin_sigma,
    refuse_without_tracks,
    sealed,
    val_loss,
)
from .runs import plain_run, searched, spec_of, tracks_of, with_ebc
from .spec import RunSpec, round3
from .stage import Figure, Scenario, Stage, Track
from .stage import invented as invented_by_default


def runs(config: Config, decisions: Mapping[str, Decision], results: Results) -> list[RunSpec]:
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
        specs += [
            spec_of("lr_scale", "ebc", with_ebc(plain[s], track, budget, delta, **chosen), s) for s in scales
        ]
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


INERT_CLIP_RATE = 0.99
INERT_NOTE = "LR inert: the same run up to rounding"


def decide(
    config: Config, specs: Sequence[RunSpec], results: Results, earlier: Mapping[str, Decision]
) -> Decision:
    """The LR scale of each track's EBC arm, and how far the LR can rise with and without EBC."""
    tracks: dict[str, Any] = {}
    notes: list[str] = []
    for track in earlier["calibrate"]["tracks"]:
        sigma = earlier["lr_sweep"]["tracks"][track]["sigma"]
        own = [s for s in specs if s.track == track]
        arms: dict[str, list[dict[str, Any]]] = {}
        for spec in sorted(own, key=lambda s: s.lr_scale):
            row = candidate(spec, results)
            row["inert"] = spec.role != "none" and (row["clip_rate"] or 0) >= INERT_CLIP_RATE
            arms.setdefault(spec.role, []).append(row)
        base = next((r for r in arms.get("none", []) if r["lr_scale"] == 1), None)
        reference = val_loss(results.get(base["run_id"])) if base else math.inf
        usable = [r for r in arms.get("ebc", []) if c_median(results.get(r["run_id"])) is not None]
        if not usable or math.isinf(reference):
            continue
        inert = [r for r in usable if r["inert"]]
        candidates = [r for r in usable if not r["inert"]] + inert[:1]
        band = config.study.band
        inside = [r for r in candidates if band_distance(r["c_median"], band) == 0]
        if inside:
            chosen = min(inside, key=lambda r: (r["val_loss"], r["lr_scale"]))
        else:
            chosen = min(candidates, key=lambda r: (band_distance(r["c_median"], band), r["val_loss"]))
            notes.append(
                f"{track}: no EBC scale has its median c in {band[0]:g}–{band[1]:g}; the nearest was taken"
            )
        if len(inert) > 1:
            scales = ", ".join(f"×{r['lr_scale']:g}" for r in inert)
            notes.append(
                f"{track}: EBC at {scales} — {INERT_NOTE}; ×{inert[0]['lr_scale']:g} stands for them"
            )
        headroom = {
            arm: max(
                (r["lr_scale"] for r in rows if val_loss(results.get(r["run_id"])) <= reference + sigma),
                default=None,
            )
            for arm, rows in arms.items()
        }
        tracks[track] = {
            "lr_scale": chosen["lr_scale"],
            "run_id": chosen["run_id"],
            "val_loss": chosen["val_loss"],
            "c_median": chosen["c_median"],
            "in_band": bool(inside),
            "inert": chosen["inert"],
            "baseline_val_loss": reference,
            "headroom": headroom,
            "headroom_is_tautology": bool(inert),
            "ranked": [r["run_id"] for r in inside],
            "margin_sigma": margin_sigma([r["val_loss"] for r in inside], sigma),
            "sigma": sigma,
            "arms": arms,
        }
    refuse_without_tracks(
        tracks, "lr_scale", [str(results.get(s.run_id, {}).get("cause") or "") for s in specs]
    )
    rule = (
        "lowest validation loss among EBC scales with median c in the band, else the nearest; scales clipped on "
        f"{100 * INERT_CLIP_RATE:g}% of steps or more count as one candidate; headroom: the largest scale within "
        "one sigma of the baseline at ×1"
    )
    return sealed("lr_scale", rule, config, specs, results, earlier, tracks=tracks, notes=notes)


def headline(track: Track) -> str:
    scales = {arm: "none" if x is None else f"×{x:g}" for arm, x in track["headroom"].items()}
    headroom = ", ".join(f"{arm} {scale}" for arm, scale in scales.items())
    inert = " (LR inert under EBC, so its headroom is a tautology)" if track["headroom_is_tautology"] else ""
    return (
        f"×{track['lr_scale']:g}, median c {track['c_median']:.2f}, val {track['val_loss']:.4f}; "
        f"headroom {headroom}{inert}"
    )


def invented(config: Config, scenario: Scenario, spec: RunSpec, nth: int) -> dict[str, Any]:
    """The largest scale is chosen unless the scenario has arms coincide."""
    if spec.role != "ebc" or scenario.merged:
        return invented_by_default(config, scenario, spec, nth)
    return {"c_median": 0.6 if spec.lr_scale == max(config.lr_scale.scales) else 0.3}


HEADROOM = {  # role of an arm -> in words
    "ebc": "with EBC",
    "none": "without EBC",
    "fixed_tau": "fixed trust radius",
    "surrogate_x1": "surrogate at ×1",
}

STAGE = Stage(
    name="lr_scale",
    runs=runs,
    decide=decide,
    headline=headline,
    figures=(
        Figure("lr_scale", "chosen scale", "×{:g}", lambda track: "LR inert there" if track["inert"] else ""),
        Figure(
            "c_median",
            "median c",
            "{:.2f}",
            lambda track: "in the band" if track["in_band"] else "outside the band",
        ),
        Figure("val_loss", "validation loss", "{:.4f}", "nats per token"),
        *(
            Figure(f"headroom.{role}", f"headroom, {words}", "×{:g}", "within one σ of the baseline")
            for role, words in HEADROOM.items()
        ),
    ),
    invented=invented,
    title="How far the learning rate can rise",
    about="With and without EBC, at multiples of the best plain learning rate.",
    pictures=("lr_scale", "eta_eff"),
)

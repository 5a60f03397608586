"""What the results decide. Pure functions: configuration, earlier decisions and results in, a decision out.

Every decision uses the validation loss; only the verdict looks at the test loss. A run that did not complete never wins.
A decision holds its candidates, its rule, its margin in units of the noise sigma, and the hash of what it was made from.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ebc_lab.config.dicts import to_dict
from ebc_lab.config.identity import digest
from ebc_lab.config.schema import Config
from ebc_lab.records.figures import KL_BAND
from ebc_lab.records.sealed import checksum_holds, with_checksum

from .signature import RunSpec

Results = Mapping[str, Mapping[str, Any]]
Decision = dict[str, Any]
FORM = 2  # of a recorded decision; raised by hand when what it holds changes
INERT_CLIP_RATE = 0.99
TIMING = ("wall_s", "train_s", "tokens_per_s", "probe_pct", "curve")  # of a run: no decision rests on them
INERT_NOTE = "LR inert: the same run up to rounding"


class Undecidable(Exception):
    """A stage's results do not allow its decision; says why, and what would."""


# -- the rules, each written once ---------------------------------------------------------------------------------------


def val_loss(result: Mapping[str, Any] | None) -> float:
    """The figure that decisions compare: infinite unless the run completed with a finite loss."""
    if not result or result.get("outcome") != "completed":
        return math.inf
    loss = result.get("val_loss")
    return float(loss) if loss is not None and math.isfinite(loss) else math.inf


def best(specs: Sequence[RunSpec], results: Results) -> RunSpec | None:
    """The spec with the lowest validation loss, the lower learning rate where equal; None when none completed."""
    ranked = sorted(specs, key=lambda s: (val_loss(results.get(s.run_id)), s.run.optimizer.lr))
    return ranked[0] if ranked and math.isfinite(val_loss(results.get(ranked[0].run_id))) else None


def c_median(result: Mapping[str, Any] | None) -> float | None:
    if math.isinf(val_loss(result)):
        return None
    assert result is not None
    value = result.get("c_median")
    return None if value is None else float(value)


def band_distance(c: float | None, band: Sequence[float]) -> float:
    """How far a median c lies outside the band; 0 inside."""
    return math.inf if c is None else max(band[0] - c, c - band[1], 0.0)


def edge_of(values: Sequence[float], value: float) -> str | None:
    """Which edge of a grid a value lies on."""
    low, high = value == min(values), value == max(values)
    return "both" if low and high else "low" if low else "high" if high else None


def margin_sigma(losses: Sequence[float], sigma: float | None) -> float | None:
    """How far the runner-up lies behind the winner, in units of sigma; None where there is no runner-up or no sigma."""
    finite = sorted(x for x in losses if math.isfinite(x))
    return (finite[1] - finite[0]) / sigma if len(finite) > 1 and sigma else None


def candidate(spec: RunSpec, results: Results) -> dict[str, Any]:
    """A run as a decision shows it."""
    result = results.get(spec.run_id, {})
    shown = ("outcome", "cause", "val_loss", "val_se", "c_median", "clip_rate", "kl_median", "kl_within_30pct")
    run = spec.run
    return {
        "run_id": spec.run_id,
        "role": spec.role,
        "arm": spec.arm,
        "lr": run.optimizer.lr,
        "lr_scale": spec.lr_scale,
        "delta_star": run.budget.target_kl if run.stabilizer.name == "ebc" else None,
        "seed": run.seed,
        **{k: result.get(k) for k in shown},
    }


def sealed(
    stage: str, rule: str, config: Config, specs: Sequence[RunSpec], results: Results, earlier: Any, **found: Any
) -> Decision:
    """A decision with its evidence, the hash of its inputs, and the hash of itself."""
    there = [s for s in specs if s.run_id in results]
    decision: Decision = {
        "stage": stage,
        "form": FORM,
        "rule": rule,
        **found,
        "candidates": [candidate(s, results) for s in there if s.kind == "train"],
        "measurements": [{"run_id": s.run_id, "role": s.role} for s in there if s.kind != "train"],
    }
    decision["inputs_sha256"] = inputs_digest(config, stage, inputs_of(decision), results, earlier)
    return with_checksum(decision, "decision_sha256")


def fault(decision: Mapping[str, Any]) -> str | None:
    """Why a recorded decision cannot be read as it stands; None when it can."""
    if not checksum_holds(decision, "decision_sha256"):
        return "its record in auto_decisions.json was edited"
    return None if decision.get("form") == FORM else "it was recorded by another version of ebc-lab"


def inputs_of(decision: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(role, run id) of every run that a decision was made from."""
    return [(c["role"], c["run_id"]) for c in (*decision["candidates"], *decision["measurements"])]


def inputs_digest(
    config: Config, stage: str, runs: Sequence[tuple[str, str]], results: Results, earlier: Mapping[str, Any]
) -> str:
    """The hash of all that a decision rests on: settings, earlier decisions, results; timing figures aside."""
    settings = {"stage": to_dict(getattr(config, stage)), "scale": config.scale, "study": to_dict(config.study)}
    inputs = {
        "settings": {**settings, "seeds": config.seeds},
        "earlier": {s: d["inputs_sha256"] for s, d in earlier.items()},
        "runs": [[role, run_id, {k: v for k, v in results[run_id].items() if k not in TIMING}] for role, run_id in runs],
    }
    return digest(inputs)


def _only_with(tracks: Mapping[str, Any], stage: str, causes: Sequence[str]) -> None:
    if not tracks:
        why = "; ".join(sorted({c for c in causes if c})[:3]) or "no run completed"
        raise Undecidable(f"{stage} could not decide: {why}.")


# -- 1. lr_sweep ----------------------------------------------------------------------------------------------------------


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


def lr_sweep(config: Config, specs: Sequence[RunSpec], results: Results, earlier: Mapping[str, Decision]) -> Decision:
    """The best baseline learning rate of each pair, the noise, the natural KL and the fair control."""
    grid = [s for s in specs if s.role == "grid"]
    winners = sweep_winners(config, grid, results)
    _only_with(winners, "lr_sweep", [str(results.get(s.run_id, {}).get("cause") or "") for s in grid])
    losses = {t: val_loss(results[w.run_id]) for t, w in winners.items()}
    tracks: dict[str, Any] = {}
    for track in kept_tracks(config, winners, results):
        winner = winners[track]
        own = [s for s in specs if s.track == track]
        lrs = [s.run.optimizer.lr for s in own if s.role == "grid"]
        replicates = [s for s in own if s.role == "replicate"]
        noise = [val_loss(results.get(s.run_id)) for s in replicates]
        noise = [x for x in noise if math.isfinite(x)]
        natural = [results[s.run_id]["kl_median"] for s in replicates if math.isfinite(val_loss(results.get(s.run_id)))]
        natural = [k for k in natural if k]
        controls = [s for s in own if s.role == "control"]
        control = best(controls, results)
        if len(noise) < 2 or not natural:
            raise Undecidable(
                f"lr_sweep could not decide: fewer than two replicates of {winner.arm} at lr {winner.run.optimizer.lr:g} "
                "completed with an audited KL, so neither the noise nor the natural KL is known."
            )
        if control is None:
            raise Undecidable(f"lr_sweep could not decide: no run of {track} with a decaying learning rate completed.")
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
            "margin_sigma": margin_sigma([val_loss(results.get(s.run_id)) for s in own if s.role == "grid"], sigma),
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
    pairs += [{"track": t, "lr": None, "val_loss": None, "triaged": True, "kept": False} for t in names if t not in winners]
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


# -- 2. calibrate -----------------------------------------------------------------------------------------------------------


def _nearest(specs: Sequence[RunSpec], results: Results, band: Sequence[float]) -> RunSpec:
    """The lowest loss among those in the band; where none is, the nearest to it."""
    return min(specs, key=lambda s: (band_distance(c_median(results[s.run_id]), band), val_loss(results[s.run_id])))


def _bound(spec: RunSpec) -> str:
    """What to say of the aggregate behind a surrogate; `l2` bounds nothing, and is labelled so wherever it is shown."""
    aggregate = spec.run.budget.aggregate
    if spec.run.budget.name != "surrogate":
        return ""
    return f" ({aggregate}, not a bound)" if aggregate == "l2" else f" ({aggregate})"


def _best_by_budget(specs: Sequence[RunSpec], results: Results, band: Sequence[float]) -> dict[str, RunSpec]:
    budgets = dict.fromkeys(s.run.budget.name for s in specs)
    return {b: _nearest([s for s in specs if s.run.budget.name == b], results, band) for b in budgets}


def calibrate(config: Config, specs: Sequence[RunSpec], results: Results, earlier: Mapping[str, Decision]) -> Decision:
    """delta* (and the budget) of each track: best validation loss with the median c in the band, else nearest to it."""
    tracks: dict[str, Any] = {}
    notes: list[str] = []
    for track, swept in earlier["lr_sweep"]["tracks"].items():
        own = [s for s in specs if s.track == track]
        usable = [s for s in own if c_median(results.get(s.run_id)) is not None]
        if not usable:
            continue
        band = config.study.band
        inside = [s for s in usable if band_distance(c_median(results[s.run_id]), band) == 0]
        winner = _nearest(usable, results, band)
        if not inside:
            notes.append(f"{track}: no median c fell into {band[0]:g}–{band[1]:g}; the nearest was taken")
        tracks[track] = {
            "budget": winner.run.budget.name,
            "bound": _bound(winner),
            "delta_star": winner.run.budget.target_kl,
            "times_natural": winner.run.budget.target_kl / swept["natural_kl"],
            "lr_scale": winner.lr_scale,
            "run_id": winner.run_id,
            "val_loss": val_loss(results[winner.run_id]),
            "c_median": c_median(results[winner.run_id]),
            "in_band": bool(inside),
            "by_budget": {b: s.run.budget.target_kl for b, s in _best_by_budget(usable, results, band).items()},
            "ranked": [s.run_id for s in inside],
            "margin_sigma": margin_sigma([val_loss(results[s.run_id]) for s in inside], swept["sigma"]),
            "sigma": swept["sigma"],
        }
    _only_with(tracks, "calibrate", [str(results.get(s.run_id, {}).get("cause") or "") for s in specs])
    rule = (
        f"at LR ×{config.calibrate.lr_scale:g}: lowest validation loss among those with median c in "
        f"{config.study.band[0]:g}–{config.study.band[1]:g}; none inside: bisect or extend by 2, "
        f"{config.calibrate.max_extra} runs at most, then the nearest"
    )
    return sealed("calibrate", rule, config, specs, results, earlier, tracks=tracks, notes=notes)


# -- 3. controller_search -----------------------------------------------------------------------------------------------------


def controller_search(config: Config, specs: Sequence[RunSpec], results: Results, earlier: Mapping[str, Decision]) -> Decision:
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
            notes.append(f"{track}: no candidate held the KL within ±{100 * KL_BAND:g}% of δ*; the nearest was taken")
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
    _only_with(tracks, "controller_search", [str(results.get(s.run_id, {}).get("cause") or "") for s in specs])
    rule = (
        f"at the calibrated δ* and LR ×{config.calibrate.lr_scale:g}: lowest validation loss among the candidates whose median "
        f"applied KL, over audited clipped steps, is within ±{100 * KL_BAND:g}% of δ*; none: the nearest to it"
    )
    return sealed("controller_search", rule, config, specs, results, earlier, tracks=tracks, notes=notes)


# -- 4. lr_scale ------------------------------------------------------------------------------------------------------------


def lr_scale(config: Config, specs: Sequence[RunSpec], results: Results, earlier: Mapping[str, Decision]) -> Decision:
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
            notes.append(f"{track}: no EBC scale has its median c in {band[0]:g}–{band[1]:g}; the nearest was taken")
        if len(inert) > 1:
            scales = ", ".join(f"×{r['lr_scale']:g}" for r in inert)
            notes.append(f"{track}: EBC at {scales} — {INERT_NOTE}; ×{inert[0]['lr_scale']:g} stands for them")
        headroom = {
            arm: max((r["lr_scale"] for r in rows if val_loss(results.get(r["run_id"])) <= reference + sigma), default=None)
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
    _only_with(tracks, "lr_scale", [str(results.get(s.run_id, {}).get("cause") or "") for s in specs])
    rule = (
        "lowest validation loss among EBC scales with median c in the band, else the nearest; scales clipped on "
        f"{100 * INERT_CLIP_RATE:g}% of steps or more count as one candidate; headroom: the largest scale within "
        "one sigma of the baseline at ×1"
    )
    return sealed("lr_scale", rule, config, specs, results, earlier, tracks=tracks, notes=notes)

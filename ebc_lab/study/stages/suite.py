"""The named arms of a suite, each the best baseline with some settings changed. This module makes the arms'
runs in the stages `tune` and `ablation`, and evaluates sweeps over arms."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ebc_lab.config.choices import changed, with_setting, with_size
from ebc_lab.config.parts.init import InitConfig
from ebc_lab.config.schema import TUNABLE, ArmConfig, Config, RunConfig, SizedConfig
from ebc_lab.ebc.options import MEASURED
from ebc_lab.records.decisions import (
    Arm,
    CalibratedTrack,
    Decision,
    Difference,
    SuiteTrack,
    Sweep,
    SweptPoint,
    Transfer,
    TunedArm,
)
from ebc_lab.records.paths import WEIGHTS
from ebc_lab.records.spec import RunSpec

from .compare_arms import losses
from .rules import Decisions, Results, error_divided
from .runs import fill_from_baseline, plain_run, searched, tracks_of, with_target
from .statistics import ROUNDING, luck_between, paired, window

ROUNDED = 0.02  # relative: how far rounding may move a target KL from its multiple
SAME_NATS = 0.02  # a rule that ends at most this far above the best fixed target needs no tuning
SCHEDULE_SETTINGS = {"schedule": "name", "warmup_share": "warmup_share"}  # a point's key -> lr_schedule's
SUITES_SIZE = "the suite's size"
Point = dict[str, Any]  # setting of TUNABLE -> its value


def points(grids: Mapping[str, Sequence[Any]]) -> list[Point]:
    """Return every combination of the values in an arm's grids, each as a point."""
    return [
        {
            k: float(v) if k in TUNABLE and not isinstance(v, str) else v
            for k, v in zip(grids, values, strict=True)
        }
        for values in itertools.product(*grids.values())
    ]


def point_in_words(point: Mapping[str, Any] | None) -> str:
    """Return a point as `lr 0.004, warmup share 0.167, schedule cosine`; empty if nothing was tuned."""
    values = {short_name(k): v if isinstance(v, str) else f"{v:.3g}" for k, v in (point or {}).items()}
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in values.items())


def short_name(key: str) -> str:
    """Return a tuned setting as names and sentences show it: `weight_decay` for `optimizer.weight_decay`."""
    return key.removeprefix("optimizer.").removeprefix("arguments.").replace(".", "_")


def arm_run(
    config: Config, decisions: Decisions, track: str, arm: ArmConfig, steps: int, seed: int, point: Point
) -> tuple[RunConfig, float]:
    """Return an arm's run at a point of the arm's grid, and the run's LR scale. `steps`: the suite's usual
    length, which the arm's size may multiply.

    An absolute lr in the point replaces the track's rate, and is multiplied by the arm's LR scale. The target
    KL is a multiple of the calibrated one or, if nothing was calibrated, of the natural KL.
    """
    swept = decisions["lr_sweep"]["tracks"][track]
    scale = point.get("lr_scale", arm.lr_scale)
    if arm.control:
        scale *= swept["control"]["lr"] / swept["lr"]
    if "lr" in point:
        scale *= point["lr"] / swept["lr"]
    run = with_size(plain_run(config, swept, steps, seed, scale), arm)
    run = changed(run, searched(decisions, track) | arm.settings)
    schedule = {SCHEDULE_SETTINGS[k]: v for k, v in point.items() if k in SCHEDULE_SETTINGS}
    run = replace(run, lr_schedule=replace(run.lr_schedule, **schedule))
    times = point.get("delta", arm.delta or 1.0)
    if run.stabilizer.name == "ebc" and "target_kl" not in arm.settings.get("budget", {}):
        unit = swept["natural_kl"]
        if "calibrate" in decisions:
            calibrated: CalibratedTrack = decisions["calibrate"]["tracks"][track]
            budget, targets = run.budget.name, calibrated["by_budget"]
            # the target of this budget, else of another that measures the KL, else of the winner
            alike = [budget, *(MEASURED if budget in MEASURED else ())]
            unit = next((targets[name] for name in alike if name in targets), calibrated["delta_star"])
        run = with_target(run, unit * times)
    if arm.control:
        run = replace(run, lr_schedule=replace(run.lr_schedule, **swept["control"]["lr_schedule"]))
    if "strength" in point:
        run = replace(run, stabilizer=replace(run.stabilizer, strength=point["strength"]))
    if "radius" in point:
        run = replace(run, budget=replace(run.budget, radius=point["radius"]))
    for key in (k for k in point if k not in TUNABLE):
        run = with_setting(run, key, point[key])
    return fill_from_baseline(run, swept, times), float(f"{scale:.6g}")


def point_of(config: Config, decisions: Decisions, track: str, label: str, arm: ArmConfig) -> Point | None:
    """Return the point that the stage tune chose for an arm. It is {} if the arm has no grid, and None if
    tune has not decided yet or no point of the arm completed.

    A setting that a sweep gives the arm is left out.
    """
    source, swept = _tuned_as(config, label, arm), config.ablation.swept().get(label)
    if source is None:
        return {}
    tuned = tuned_arms(decisions.get("tune"), track).get(source)
    if tuned is None or "untuned" in tuned:
        return None
    return {k: v for k, v in tuned["point"].items() if not swept or k != swept.key}


def tuned_arms(tune: Decision | None, track: str) -> Mapping[str, TunedArm]:
    """Return the tuned arms of a track, by label, from the decision of the stage tune; empty if nothing was
    tuned."""
    arms: Mapping[str, TunedArm] = tune["tracks"].get(track, {}).get("arms", {}) if tune else {}
    return arms


def _tuned_as(config: Config, label: str, arm: ArmConfig) -> str | None:
    """Return the label of the arm, this one or another, whose tuning gives this arm its point; None if it has
    no grid."""
    swept = config.ablation.swept().get(label)
    own = swept.arm if swept else label
    return arm.tuned_as or (own if arm.tune else None)


def differences(
    config: Config,
    tracks: Mapping[str, SuiteTrack],
    pairs: Sequence[tuple[str, str, str]],
    results: Results,
    earlier: Decisions,
) -> dict[tuple[str, str, str], Difference]:
    """Return, by (track, arm, other), how the arm's test loss differs from the other's. The intervals hold
    for all pairs at once. If the two arms were tuned apart, the luck of both tunings widens the interval."""
    found = {}
    asked = config.ablation.all_arms()
    for name, label, other in pairs:
        tuned = tuned_arms(earlier.get("tune"), name)
        sources = dict.fromkeys(_tuned_as(config, arm, asked[arm]) for arm in (label, other))
        points = [tuned[s] for s in sources if s and s in tuned] if len(sources) > 1 else []
        found[name, label, other] = paired(
            *(losses(tracks[name]["arms"][arm], results) for arm in (label, other)),
            margin=config.finals.margin,
            comparisons=len(pairs),
            looks=error_divided(config),
            replicates=earlier["lr_sweep"]["tracks"][name]["replicate_losses"],
            luck=luck_between(points),
        )
    return found


def ready(config: Config, decisions: Decisions, stage: str) -> list[str]:
    """Return the tracks of a suite's stage; empty until all earlier stages that it needs have decided."""
    before = [s for s in config.study.stages if s in ("lr_sweep", "calibrate", "controller_search")]
    return tracks_of(decisions, stage) if all(s in decisions for s in before) else []


def shape_of(arm: SizedConfig) -> str:
    """Return how an arm's runs differ in size from the suite's, such as `2× steps`; empty if they do not."""
    sizes = {"steps": arm.steps, "width": arm.width_scale, "batch": arm.batch_scale}
    return ", ".join(f"{value:g}× {what}" for what, value in sizes.items() if value != 1)


def contenders(track: SuiteTrack) -> dict[str, Arm]:
    """Return the arms of a suite that may be called its best: they have the reference's size, and were judged
    on the whole split of the reference's text."""
    size = size_of(track)
    return {n: arm for n, arm in track["arms"].items() if arm["comparable"] and arm.get("shape", "") == size}


def size_of(track: SuiteTrack) -> str:
    """Return how the reference's runs differ in size from the suite's (`shape_of`)."""
    reference = track["arms"].get(track["reference"])
    return reference.get("shape", "") if reference else ""


def other_size(label: str, track: SuiteTrack) -> str:
    """Return the size of an arm that has not the reference's; empty of one that has."""
    shape = track["arms"][label].get("shape", "")
    return "" if shape == size_of(track) else shape or SUITES_SIZE


# -- arms that start from another's weights ------------------------------------------------------------------


def source_of(config: Config, decisions: Decisions, track: str, stage: str, label: str, seed: int) -> RunSpec:
    """Return the run of arm `label` whose final weights other arms start from, with as many steps as `stage`
    gives that arm."""
    arm = config.ablation.all_arms()[label]
    steps: int = getattr(config, stage).steps
    run, scale = arm_run(config, decisions, track, arm, steps, seed, {})
    splits = ["val"] if stage == "tune" else ["val", "test"]
    run = replace(InitConfig(keep=True).put_into(run), evaluate=splits)
    return RunSpec(stage, label, label, scale, run, of_track=track)


def started(run: RunConfig, source: RunSpec, results: Results) -> RunConfig | None:
    """Return `run`, set to start from the final weights of `source`, and to measure how much it forgets of
    the text on which `source` was trained. Return None unless `source` has completed."""
    result = results.get(source.run_id)
    if result is None or result.get("outcome") != "completed":
        return None
    old = source.run.data
    init = InitConfig(name="run", run=source.run_id, sha256=result["streams"][WEIGHTS], text="none")
    if old.name != "bin":
        file = old.file if old.name == "path" else None
        init = replace(init, text=old.name, file=file, text_sha256=old.sha256)
    return init.put_into(run)


# -- the results of a sweep ----------------------------------------------------------------------------------


def windows_of(config: Config, arms: Mapping[str, Arm], results: Results) -> dict[str, dict[str, Sweep]]:
    """Return the sweeps of each swept arm, by the swept setting, `lr_scale` or `delta`: the measured points
    and the window. A sweep of `delta` is also compared with that of the arm's yardstick."""
    points: dict[str, dict[str, list[SweptPoint]]] = {}
    for label, point in config.ablation.swept().items():
        if label in arms:
            measured = _swept_point(point.value, label, arms[label], results)
            points.setdefault(point.arm, {}).setdefault(point.key, []).append(measured)
    windows: dict[str, dict[str, Sweep]] = {}
    for name, by_key in points.items():
        windows[name] = {}
        arm = config.ablation.arms[name]
        for key, measured_points in by_key.items():
            whole, left_out = _comparable(key, measured_points)
            if whole:
                sweep: Sweep = {"points": whole, "left_out": left_out, "about": arm.about or name}
                windows[name][key] = {**sweep, "shape": shape_of(arm), **_spans(whole)}
    for name, sweeps in windows.items():
        yardstick = config.ablation.arms[name].versus or name
        if "delta" in sweeps and "delta" in windows.get(yardstick, {}):
            rule, best = sweeps["delta"], windows[yardstick]["delta"]["window"]
            worst = math.inf  # how far the rule's worst start ends above the yardstick's best, nats
            if best is not None:
                worst = max(_losses(rule["points"]).values()) - best["loss"]
            rule["yardstick"] = yardstick
            rule["worst"] = worst if math.isfinite(worst) else None
            rule["every_start"] = worst <= SAME_NATS + ROUNDING  # near enough to need no tuning
    return windows


def _swept_point(value: float, label: str, arm: Arm, results: Results) -> SweptPoint:
    """Return an arm as a point of a sweep. `loss` is its mean test loss, or None if a seed diverged."""
    by_seed = {seed: x if math.isfinite(x) else None for seed, x in losses(arm, results).items()}
    finite = [x for x in by_seed.values() if x is not None]
    c = arm["figures"].get("c_median")
    return {
        "value": value,
        "arm": label,
        "lr": arm["lr"],
        "delta_star": arm["delta_star"],
        "loss": statistics.fmean(finite) if finite and len(finite) == len(by_seed) else None,
        "seeds": by_seed,
        "rate": c * arm["lr"] if c is not None else None,
    }


def _comparable(key: str, points: Sequence[SweptPoint]) -> tuple[list[SweptPoint], list[str]]:
    """Return the points by rising value, and the labels of arms left out because a run failed or was lost.

    Target KLs that were raised to the least possible one count as a single point, at its true multiple.
    """
    most = max(1, *(len(p["seeds"]) for p in points))
    whole = [p for p in points if len(p["seeds"]) == most]
    left_out = [p["arm"] for p in points if len(p["seeds"]) < most]
    if key == "delta" and whole:
        targets = {delta: p for p in whole if (delta := p["delta_star"]) is not None}
        unit = min((p["delta_star"] or 0.0) / p["value"] for p in whole)
        whole = list(targets.values())
        for delta, p in targets.items():
            if delta > unit * p["value"] * (1 + ROUNDED):
                p["value"] = delta / unit
    return sorted(whole, key=lambda p: p["value"]), left_out


def _losses(points: Sequence[SweptPoint]) -> dict[float, float]:
    return {p["value"]: math.inf if p["loss"] is None else p["loss"] for p in points}


def _spans(points: Sequence[SweptPoint]) -> Sweep:
    """Return three figures of a sweep, each None if unknown: its window, the regret at four times the best
    value, and the distance in octaves between the effective rates at the two ends of the window."""
    by_value = _losses(points)
    span = window(by_value)
    spans: Sweep = {"window": span, "regret_x4": None, "rate_octaves": None}
    if span is None:
        return spans
    further = next((x for x in by_value if math.isclose(x, 4 * span["best"], rel_tol=1e-3)), None)
    if further is not None and math.isfinite(by_value[further]):
        spans["regret_x4"] = by_value[further] - span["loss"]
    rates = {p["value"]: rate for p in points if (rate := p["rate"])}
    if len(rates) == len(points):
        spans["rate_octaves"] = math.log2(_between(rates, span["high"]) / _between(rates, span["low"]))
    return spans


def _between(values: Mapping[float, float], at: float) -> float:
    """Return the value at `at`, interpolated between `values` (setting -> positive figure) linearly in the
    logarithms of both. Outside their range, return the value at the nearest setting."""
    for (left, a), (right, b) in itertools.pairwise(sorted(values.items())):
        if left <= at <= right:
            share = math.log(at / left) / math.log(right / left)
            return float(a * (b / a) ** share)
    return values[min(values, key=lambda x: abs(math.log(x / at)))]


def transfer_of(config: Config, arms: Mapping[str, Arm], results: Results) -> list[Transfer]:
    """For a suite that tunes arms at one size and also runs them at others, return one entry per further
    size: the arm that was tuned again there, and the arms that kept their settings. Return an empty list for
    other suites.

    The regret of keeping the settings is each arm's own difference in test loss. `against_kept` adds how each
    arm with EBC differs from the plain arm, both with their settings kept.
    """
    asked = config.ablation.all_arms()
    copies = [n for n, a in asked.items() if a.tuned_as and shape_of(a) != shape_of(asked[a.tuned_as])]
    transfers: list[Transfer] = []
    for label, arm in asked.items():
        alike = [n for n in copies if asked[n].versus == label and shape_of(asked[n]) == shape_of(arm)]
        kept = [n for n in alike if n in arms]
        if kept and label in arms and not arm.tuned_as:
            plain = [losses(arms[n], results) for n in kept if not arms[n]["ebc"]]
            with_ebc = [n for n in kept if arms[n]["ebc"]] if plain else []
            looks = error_divided(config)
            against = {n: paired(losses(arms[n], results), plain[0], looks=looks) for n in with_ebc}
            transfers.append({"shape": shape_of(arm), "tuned": label, "kept": kept, "against_kept": against})
    return transfers

"""The arms of the finals, the paired differences between them, and whether more seeds are needed.

The differences are in test loss. With few seeds most comparisons are undecided, so each comes with the
smallest difference that this many seeds could have shown. The comparison of EBC at ×2 with the baseline is
named beforehand, and is judged by its own interval. The best EBC arm is picked from several, by the same runs
that then judge it. It is therefore judged by the joint interval, which holds for all of these arms at once.
The same holds for every claim that one arm beats another.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from ebc_lab.config.parts.target import TargetConfig, first_at_or_below
from ebc_lab.config.schema import Config, RunConfig
from ebc_lab.config.study_checks import stage_seeds
from ebc_lab.records.columns import BITS
from ebc_lab.records.decisions import (
    Arm,
    CalibratedTrack,
    Decision,
    Efficiency,
    FinalsTrack,
    RateWindow,
    SweepTrack,
)
from ebc_lab.records.figures import RunResult
from ebc_lab.records.spec import schedules_of

from .rules import Decisions, Results, Specs, Undecidable, curve_of, error_divided, is_conclusive
from .statistics import NO_LUCK, Luck, below, centre_of, luck_of_choice, noise_of_runs, paired

LEAST_LUCK = 1e-5  # nats; smaller luck counts as none
MEANS = ("val_loss", "test_loss", "heldout_loss", "c_mean", "c_median", "kl_median", "clip_rate")


def arms_of(specs: Specs, results: Results) -> dict[str, Arm]:
    """Return each arm by name, with its roles, settings, run ids by seed, and figures over completed seeds.
    Roles that have the same runs share one arm.

    `test_median` and `val_median`, by which arms are ranked, are taken over all finished seeds. A diverged
    run ranks behind every other run. A median that falls on a diverged run is None.
    """
    arms: dict[str, Arm] = {}
    for spec in (s for s in specs if s.kind == "train"):
        ebc = spec.run.stabilizer.name == "ebc"
        new: Arm = {
            "roles": [],
            "track": spec.track,
            "lr": spec.run.optimizer.lr,
            "lr_scale": spec.lr_scale,
            "ebc": ebc,
            "delta_star": spec.run.budget.target_kl if ebc else None,
            **schedules_of(spec.run),
            "runs": {},
        }
        arm = arms.setdefault(spec.arm, new)
        if spec.role not in arm["roles"]:
            arm["roles"].append(spec.role)
        arm["runs"][str(spec.run.seed)] = spec.run_id
    with_bits = {spec.arm for spec in specs if in_bits(spec.run)}
    for name, arm in arms.items():
        known = results_of_arm(arm, results).values()
        outcomes = Counter(str(r["outcome"]) for r in known if "outcome" in r)
        figures: dict[str, Any] = {"outcomes": dict(sorted(outcomes.items()))}
        for key in (*MEANS, BITS) if name in with_bits else MEANS:
            values = completed_values(arm, results, key)
            figures[key] = mean(values)
            if key == "test_loss":
                figures["test_sd"] = spread(values)
        for split in ("val", "test"):
            middle = statistics.median(losses(arm, results, f"{split}_loss").values() or [math.inf])
            figures[f"{split}_median"] = middle if math.isfinite(middle) else None
        arm |= cast(Arm, figures)
    return arms


def in_bits(run: RunConfig) -> bool:
    """Return whether losses are also shown in bits per character. If tokens are characters, bits would only
    be the nats times a constant. Images have no characters."""
    return run.workload.name == "ebm" or run.tokens.name != "characters"


def results_of_arm(arm: Arm, results: Results) -> dict[str, RunResult]:
    """Return the results of an arm's runs by seed. A run without a result yet gets an empty one."""
    return {seed: results.get(run_id, RunResult()) for seed, run_id in arm["runs"].items()}


def completed_runs(arm: Arm, results: Results) -> list[Mapping[str, Any]]:
    return [r for r in results_of_arm(arm, results).values() if r.get("outcome") == "completed"]


def completed_values(arm: Arm, results: Results, key: str) -> list[float]:
    """Return one figure of each completed run of an arm, leaving out runs that lack the figure."""
    return [float(r[key]) for r in completed_runs(arm, results) if r.get(key) is not None]


def mean(values: Sequence[float]) -> float | None:
    """Return the mean, or None if there are no values."""
    return statistics.fmean(values) if values else None


def spread(values: Sequence[float]) -> float | None:
    """Return the standard deviation, or None if there are fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def losses(arm: Arm, results: Mapping[str, Mapping[str, Any]], key: str = "test_loss") -> dict[str, float]:
    """Return an arm's losses in nats by seed. The loss of a diverged run is infinite. A seed is left out if
    its run did not complete for another reason, or lacks the loss."""
    by_seed: dict[str, float] = {}
    for seed, run_id in arm["runs"].items():
        result = results.get(run_id, {})
        if result.get("outcome") == "completed" and result.get(key) is not None:
            by_seed[seed] = float(result[key])
        elif result.get("outcome") == "diverged":
            by_seed[seed] = math.inf
    return by_seed


def efficiency(
    arms: Mapping[str, Arm], baseline: str, results: Results, tokens_per_step: int
) -> dict[str, Efficiency | None]:
    """Return, for each arm, the median steps, tokens and seconds of training until the arm's loss on the
    fixed windows is down to the final loss of the baseline, paired by seed.

    An arm's entry is None if fewer than half of its seeds reach that loss.
    """
    targets: dict[str, float] = {}  # seed -> the baseline's final loss
    for seed, result in results_of_arm(arms[baseline], results).items():
        last = (result.get("curve") or [(0, None, 0.0)])[-1][1]
        if result.get("outcome") == "completed" and last is not None:
            targets[seed] = last
    efficiencies: dict[str, Efficiency | None] = {}
    for name, arm in arms.items():
        paired_runs = {seed: r for seed, r in results_of_arm(arm, results).items() if seed in targets}
        found = [first_at_or_below(r.get("curve") or [], targets[seed]) for seed, r in paired_runs.items()]
        reached = [point for point in found if point]
        efficiencies[name] = None
        if reached and 2 * len(reached) >= len(found):
            steps, seconds = (statistics.median(values) for values in zip(*reached, strict=True))
            tokens = steps * tokens_per_step
            efficiencies[name] = {"steps": steps, "tokens": tokens, "train_s": seconds, "seeds": len(reached)}
    return efficiencies


class ToTarget(NamedTuple):
    """What a run took to reach a target loss; infinite if it diverged or missed the target."""

    steps: float
    seconds: float  # of training


def to_target(runs: Mapping[str, str], results: Results, target: float) -> dict[str, ToTarget]:
    """Return, by seed, what an arm's `runs` (seed -> run id) took to reach the target loss. Seeds whose run
    failed, was lost or is unfinished are left out. Tokens are steps times the run's `tokens_per_step`."""
    found: dict[str, ToTarget] = {}
    for seed, run_id in runs.items():
        result = results.get(run_id, RunResult())
        if is_conclusive(result):
            curve = result.get("curve") if result.get("outcome") == "completed" else None
            reached = first_at_or_below(curve or [], target)
            found[seed] = ToTarget(*(reached or (math.inf, math.inf)))
    return found


def target_figures(
    target: TargetConfig,
    arm: Arm,
    reference: Arm | None,
    results: Results,
    tokens_per_step: int,
    divided: int = 1,
) -> dict[str, float | None]:
    """Return an arm's figures with respect to a target loss (docs/workloads.md), as listed in
    `config/parts/target.py`; empty if there is no target. `tokens_per_step`: of this arm's runs.

    The means of what it took are None unless every run reached the target, and p if a run diverged. As in
    modded-nanogpt's optimization track, p tests whether the mean final loss is below the target: by a z-test
    if σ is known, else by a t-test. `divided`: the number that divides the error (`rules.error_divided`).
    """
    if target.name == "none":
        return {}
    completed = completed_runs(arm, results)
    diverged = any(r.get("outcome") == "diverged" for r in results_of_arm(arm, results).values())
    took = to_target(arm["runs"], results, target.loss)
    of_reference = to_target(reference["runs"], results, target.loss) if reference else {}
    reached = [x for x in took.values() if math.isfinite(x.steps)]
    final = completed_values(arm, results, "val_loss")
    steps, seconds = zip(*reached, strict=True) if reached and len(reached) == len(took) else ((), ())
    return {
        "target_loss": target.loss,
        "target_runs": float(len(completed)),
        "target_reached": float(len(reached)),
        "steps_to_target": mean(steps),
        "steps_to_target_sd": spread(steps),
        "seconds_to_target": mean(seconds),
        "tokens_to_target": mean([x * tokens_per_step for x in steps]),
        "target_final_loss": mean(final),
        "target_final_sd": spread(final),
        "target_p": None if diverged else below(final, target.loss, target.sigma, divided),
        "steps_surely_below": None if diverged else _surely_below(target, completed, divided),
        **_steps_difference(took, of_reference, divided),
        "seconds_ratio": _seconds_ratio(took, of_reference),
    }


def _surely_below(target: TargetConfig, runs: Sequence[Mapping[str, Any]], divided: int) -> float | None:
    """Return the first step at which every run was evaluated and p of the runs' losses is below the target's
    level; None if there is none. modded-nanogpt's rules, too, want the same step for all runs."""
    curves = [curve_of(r) for r in runs]
    common = sorted(set.intersection(*map(set, curves))) if curves else []
    for step in common:
        p = below([curve[step] for curve in curves], target.loss, target.sigma, divided)
        if p is not None and p < target.level:
            return float(step)
    return None


def _steps_difference(
    took: Mapping[str, ToTarget], of_reference: Mapping[str, ToTarget], divided: int
) -> dict[str, float | None]:
    """Return the difference in steps from the reference arm, paired by seed, and its interval. The difference
    is the mean, or the median if a run missed the target.

    Seeds under which neither arm reached the target are left out; if none is left, all figures are None. If
    all differences are the same, there is no interval: steps are only known to the nearest evaluation, and
    the interval would have no width.
    """
    keys = ("steps_difference", "steps_difference_low", "steps_difference_high")
    shared = set(took) & set(of_reference)
    reached = [seed for seed in shared if math.isfinite(min(took[seed].steps, of_reference[seed].steps))]
    if not reached:
        return dict.fromkeys(keys)
    steps, others = ({seed: of[seed].steps for seed in reached} for of in (took, of_reference))
    found = paired(steps, others, looks=divided)
    ends = (found["low"], found["high"]) if found["low"] != found["high"] else (None, None)
    return dict(zip(keys, (centre_of(found), *ends), strict=True))


def _seconds_ratio(took: Mapping[str, ToTarget], of_reference: Mapping[str, ToTarget]) -> float | None:
    """Return the geometric mean, over the seeds of both arms, of the seconds to the target over those of the
    reference. It is None if a run missed the target, or was there before its first step."""
    pairs = [(took[seed].seconds, of_reference[seed].seconds) for seed in took if seed in of_reference]
    known = all(0 < x < math.inf for pair in pairs for x in pair)
    return statistics.geometric_mean(a / b for a, b in pairs) if pairs and known else None


def compare(config: Config, specs: Specs, results: Results, earlier: Decisions) -> dict[str, FinalsTrack]:
    """Return, for each track, its arms and their roles, the best EBC arm by validation loss, the LR windows
    and the differences in test loss. Every arm is compared with the baseline. Every EBC arm is also compared
    with the control and, if there is one, with the plain arm at the same rate (`rate`). Raises Undecidable if
    no baseline run of a track completed."""
    arms = arms_of(specs, results)
    tracks: dict[str, FinalsTrack] = {}
    compared: list[tuple[str, str, str]] = []  # track, family, arm
    for track in earlier["lr_scale"]["tracks"]:
        of_track = {n: a for n, a in arms.items() if a["track"] == track}
        role = {r: n for n, a in of_track.items() for r in a["roles"]}
        baseline = role["baseline"]
        if not any(math.isfinite(x) for x in losses(arms[baseline], results).values()):
            causes = {str(r.get("cause")) for r in results_of_arm(arms[baseline], results).values()}
            why = "; ".join(sorted(causes))
            raise Undecidable(f"finals could not judge: no baseline run of {track} completed ({why}).")
        with_ebc = [n for n, a in of_track.items() if a["ebc"]]
        by_val = {n: losses(arms[n], results, "val_loss").values() or [math.inf] for n in with_ebc}
        families = {
            "baseline": [n for n in of_track if n != baseline],
            "control": with_ebc,
            "rate": [n for r, n in role.items() if r.startswith("ebc_x") and _plain_role(r) in role],
        }
        compared += [(track, family, n) for family, names in families.items() for n in names]
        tracks[track] = {
            "roles": role,
            "arms": of_track,
            "best_ebc_by_val": min(with_ebc, key=lambda n: (statistics.fmean(by_val[n]), n)),
            "differences": {family: {} for family, names in families.items() if names},
        }
    comparisons = Counter(family for _, family, _ in compared)
    lucks = {name: _lucks(track["arms"], name, earlier, results) for name, track in tracks.items()}
    looks = shares_of_error(config)
    for track, family, name in compared:
        pair = [arms[n] for n in (name, reference_of(tracks[track], family, name))]
        tracks[track]["differences"][family][name] = paired(
            *(losses(arm, results) for arm in pair),
            margin=config.finals.margin,
            comparisons=comparisons[family],
            looks=looks,
            replicates=earlier["lr_sweep"]["tracks"][track]["replicate_losses"],
            luck=sum((_luck_of(arm, family, lucks[track]) for arm in pair), NO_LUCK),
        )
    for name, found in tracks.items():
        replicates = earlier["lr_sweep"]["tracks"][name]["replicate_losses"]
        found["lr_windows"] = _lr_windows(config, found, results, replicates)
    return tracks


def _lucks(arms: Mapping[str, Arm], track: str, earlier: Decisions, results: Results) -> dict[str, Luck]:
    """Return the luck in choosing the constant rate (`baseline`), the fair control (`control`) and δ*
    (`ebc`). All were chosen by validation loss, so the noise comes from the finals' validation losses."""
    swept: SweepTrack = earlier["lr_sweep"]["tracks"][track]
    calibrated: CalibratedTrack = earlier["calibrate"]["tracks"][track]
    loss = {run["run_id"]: run["val_loss"] for run in earlier["lr_sweep"]["candidates"]}
    by_arm = [losses(arm, results, "val_loss") for arm in arms.values()]
    common = sorted(set.intersection(*map(set, by_arm)))
    noise = noise_of_runs([[of_arm[seed] for seed in common] for of_arm in by_arm])
    sd, freedom = noise or (swept["sigma"], 1)

    def luck(tried: Iterable[float | None], seeds: int = 1) -> Luck:
        points = [[x] for x in tried if x is not None]
        found = luck_of_choice(points, sd / math.sqrt(seeds), freedom)
        return found if found.sd > LEAST_LUCK else NO_LUCK

    return {
        "baseline": luck(loss[run_id] for run_id in swept["ranked"]),
        "control": luck(point["val_loss"] for point in swept["control"]["grid"]),
        "ebc": luck(calibrated["ranked_losses"].values(), calibrated["seeds"]),
    }


def _luck_of(arm: Arm, family: str, lucks: Mapping[str, Luck]) -> Luck:
    """Return the luck in the choice that sets an arm apart in a family of comparisons. For an EBC arm, this
    is the choice of δ*. For a plain arm, it is the choice of the constant rate or the control, but in the
    family `rate` a plain arm has no luck."""
    if arm["ebc"]:
        return lucks["ebc"]
    own = [lucks[role] for role in ("baseline", "control") if role in arm["roles"] and family != "rate"]
    return sum(own, NO_LUCK)


def _plain_role(role: str) -> str:
    """Return the plain arm's role at the same rate on the control's schedule: `control_x2` for `ebc_x2`."""
    return role.replace("ebc", "control")


def reference_of(track: FinalsTrack, family: str, name: str) -> str:
    """Return the arm with which the arm `name` is compared in one family of a track's `differences`."""
    role = track["roles"]
    if family != "rate":
        return role[family]
    plain = (_plain_role(r) for r in track["arms"][name]["roles"] if r.startswith("ebc_x"))
    return next(role[r] for r in plain if r in role)


def _lr_windows(
    config: Config, track: FinalsTrack, results: Results, replicates: Sequence[float]
) -> dict[str, RateWindow]:
    """Return how the test loss at EBC's highest rate in the finals differs from the loss at its lowest rate:
    for EBC (`ebc`), and for the control (`control`) if it has arms at both rates. A difference is judged
    `misses` if more than half of the runs at the highest rate diverged, whatever happened at the lowest.
    Empty if EBC has only one rate."""
    by_scale: dict[str, dict[float, str]] = {"ebc": {}, "control": {}}
    for role, name in track["roles"].items():
        kind, _, scale = role.partition("_x")
        if kind in by_scale and scale:
            by_scale[kind][float(scale)] = name
    if len(by_scale["ebc"]) < 2:
        return {}
    scales = [min(by_scale["ebc"]), max(by_scale["ebc"])]
    windows: dict[str, RateWindow] = {}
    for kind, arms in by_scale.items():
        if not set(scales) <= set(arms):
            continue
        low, high = (arms[scale] for scale in scales)
        difference = paired(
            *(losses(track["arms"][name], results) for name in (high, low)),
            margin=config.finals.window_margin,
            looks=shares_of_error(config),
            replicates=replicates,
        )
        if "diverged" in difference and 2 * difference["diverged"]["arm"] > difference["seeds"]:
            difference["alone"] = difference["judged"] = "misses"
        windows[kind] = {"scales": scales, "arm": high, "reference": low, "difference": difference}
    return windows


def looks(config: Config) -> list[int]:
    """Return the numbers of seeds after which the finals are judged. If seeds may be added, there are several
    numbers, up to `max_seeds`; otherwise there is one."""
    first = len(config.seeds)
    most = config.finals.max_seeds
    return [*range(first, most, config.finals.seeds_per_look), most] if most > first else [first]


def shares_of_error(config: Config) -> int:
    """Return the number that divides the error of the finals. It allows for all looks that may be taken, and
    for earlier answers on the same seeds."""
    return len(looks(config)) * error_divided(config)


def next_seeds(config: Config, specs: Specs, results: Results, earlier: Decisions) -> list[int]:
    """Return the seeds to add to the finals, whose runs so far are `specs`. The list is empty once the
    verdict's comparisons are decided, at the last look, and if the arms cannot be compared."""
    used = {s.run.seed for s in specs if s.kind == "train"}
    later = [n for n in looks(config) if n > len(used)]
    try:
        tracks = compare(config, specs, results, earlier) if later else {}
    except Undecidable:
        return []  # more seeds do not help an arm that does not train
    if any("undecided" in claims(track) for track in tracks.values()):
        return fresh_seeds(config, used, later[0] - len(used))
    return []


def fresh_seeds(config: Config, used: Collection[int], count: int) -> list[int]:
    """Return `count` seeds above the used ones, leaving out the seeds by which earlier stages decide."""
    deciding = stage_seeds(config)
    fresh = (s for s in itertools.count(max(used) + 1) if s not in deciding)
    return list(itertools.islice(fresh, count))


def judged_arms(track: FinalsTrack) -> dict[str, str]:
    """Return, by rival (`baseline` or `control`), the EBC arm that the verdict compares with the rival."""
    return {"baseline": track["roles"]["ebc_x2"], "control": track["best_ebc_by_val"]}


def claims(track: FinalsTrack) -> list[str]:
    """Return the judgement on each comparison of test losses in the verdict: `beats`, `undecided` …"""
    baseline, control = (track["differences"][rival][arm] for rival, arm in judged_arms(track).items())
    windows = [track["lr_windows"]["ebc"]["difference"]["alone"]] if "ebc" in track["lr_windows"] else []
    return [baseline["alone"], control["judged"], *windows]


def seeds_of(decision: Decision) -> list[int]:
    """Return all seeds under which the arms of the finals or of a suite were trained, including added
    seeds."""
    arms = [arm for track in decision["tracks"].values() for arm in track["arms"].values()]
    return sorted({int(seed) for arm in arms for seed in arm["runs"]})

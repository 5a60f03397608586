"""The finals: arms, paired differences between them, and the verdict. Pure functions; only here does the test loss decide.

Each line of the verdict is pass, fail or undecided, with its figure. With few seeds most comparisons are undecided, and the
smallest difference that so many seeds could have shown stands beside them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..config import Config
from ..telemetry import KL_BAND, PLATEAU_C
from . import decide
from .decide import Decision, Results, Undecidable, band_distance
from .signature import RunSpec

OVERHEAD_LIMIT_PCT = {"laptop": 8.0}
OVERHEAD_LIMIT_ELSEWHERE_PCT = 5.0
CONFIDENCE = 0.95
POWER = 0.80


def paired(arm: Mapping[str, float], reference: Mapping[str, float]) -> dict[str, Any]:
    """Arm minus reference over the seeds both have: mean, 95% t-interval, smallest detectable difference.

    Losses in nats by seed, infinite where a run diverged. With an infinite pair there is no mean: `worse` or `better` then
    says whose runs diverged more often.
    """
    from scipy import stats

    seeds = sorted(set(arm) & set(reference))
    both = [(arm[s], reference[s]) for s in seeds]
    out: dict[str, Any] = {"seeds": len(seeds), "mean": None, "low": None, "high": None, "detectable": None}
    lost, gained = (sum(math.isinf(x[i]) and not math.isinf(x[1 - i]) for x in both) for i in (0, 1))
    if lost or gained or any(math.isinf(a) for a, _ in both):
        out["diverged"] = {"arm": lost, "reference": gained}
        return out
    differences = [a - b for a, b in both]
    if not differences:
        return out
    out["mean"] = statistics.fmean(differences)
    if len(differences) > 1:
        n, spread = len(differences), statistics.stdev(differences)
        t = stats.t(n - 1)
        half = t.ppf((1 + CONFIDENCE) / 2) * spread / math.sqrt(n)
        out |= {"low": out["mean"] - half, "high": out["mean"] + half}
        out["detectable"] = (t.ppf((1 + CONFIDENCE) / 2) + t.ppf(POWER)) * spread / math.sqrt(n)
    return out


def not_worse(difference: Mapping[str, Any], margin: float) -> str:
    """pass: the upper limit is at most `margin`; fail: the lower limit is above it; else undecided.

    An arm that diverged where its reference did not has failed.
    """
    diverged = difference.get("diverged")
    if diverged:
        return "fail" if diverged["arm"] > diverged["reference"] else "undecided"
    if difference["high"] is None:
        return "undecided"
    return "pass" if difference["high"] <= margin else "fail" if difference["low"] > margin else "undecided"


def arms_of(specs: Sequence[RunSpec], results: Results) -> dict[str, dict[str, Any]]:
    """Arm -> roles, settings, run ids by seed, and mean and spread of its losses. Arms with the same runs are one."""
    arms: dict[str, dict[str, Any]] = {}
    for spec in (s for s in specs if s.kind == "train"):
        arm = arms.setdefault(
            spec.arm,
            {
                "roles": [],
                "track": spec.track,
                "lr": spec.run.optimizer.lr,
                "lr_scale": spec.lr_scale,
                "ebc": spec.run.stabilizer.name == "ebc",
                "delta_star": spec.run.budget.target_kl if spec.run.stabilizer.name == "ebc" else None,
                "runs": {},
            },
        )
        if spec.role not in arm["roles"]:
            arm["roles"].append(spec.role)
        arm["runs"][str(spec.run.seed)] = spec.run_id
    for arm in arms.values():
        own = [results.get(r, {}) for r in arm["runs"].values()]
        arm["outcomes"] = {
            o: n for o in sorted({str(r.get("outcome")) for r in own}) if (n := sum(r.get("outcome") == o for r in own))
        }
        completed = [r for r in own if r.get("outcome") == "completed"]
        for key in ("val_loss", "test_loss", "heldout_loss", "c_mean", "c_median", "kl_median", "clip_rate"):
            values = [float(r[key]) for r in completed if r.get(key) is not None]
            arm[key] = statistics.fmean(values) if values else None
            if key == "test_loss":
                arm["test_sd"] = statistics.stdev(values) if len(values) > 1 else None
    return arms


def losses(arm: Mapping[str, Any], results: Results, key: str = "test_loss") -> dict[str, float]:
    """Seed -> loss, infinite where the run diverged; seeds whose run failed or was lost are absent."""
    found: dict[str, float] = {}
    for seed, run_id in arm["runs"].items():
        result = results.get(run_id, {})
        if result.get("outcome") == "completed" and result.get(key) is not None:
            found[seed] = float(result[key])
        elif result.get("outcome") == "diverged":
            found[seed] = math.inf
    return found


def efficiency(arms: Mapping[str, Any], baseline: str, results: Results, tokens_per_step: int) -> dict[str, Any]:
    """Per arm: median steps, tokens and training seconds until the fixed windows' loss is at the baseline's final one.

    Seeds are paired; None where fewer than half of them got there.
    """
    out: dict[str, Any] = {}
    for name, arm in arms.items():
        reached: list[tuple[float, float]] = []
        seeds = 0
        for seed, run_id in arm["runs"].items():
            final = results.get(arms[baseline]["runs"].get(seed, ""), {})
            target = (final.get("curve") or [[0, None]])[-1][1] if final.get("outcome") == "completed" else None
            if target is None:
                continue
            seeds += 1
            curve = results.get(run_id, {}).get("curve") or []
            hit = next((p for p in curve if p[1] is not None and p[1] <= target), None)
            if hit:
                reached.append((hit[0], hit[2]))
        if reached and 2 * len(reached) >= seeds:
            steps = statistics.median(r[0] for r in reached)
            seconds = statistics.median(r[1] for r in reached)
            out[name] = {"steps": steps, "tokens": steps * tokens_per_step, "train_s": seconds, "seeds": len(reached)}
        else:
            out[name] = None
    return out


def finals(config: Config, specs: Sequence[RunSpec], results: Results, earlier: Mapping[str, Decision]) -> Decision:
    """The finals as a decision: arms, paired differences, efficiency, verdict lines; one track after the other."""
    arms = arms_of(specs, results)
    tracks: dict[str, Any] = {}
    notes: list[str] = []
    for track in earlier["lr_scale"]["tracks"]:
        own = {n: a for n, a in arms.items() if a["track"] == track}
        role = {r: n for n, a in own.items() for r in a["roles"]}
        baseline = role["baseline"]
        if not any(math.isfinite(x) for x in losses(own[baseline], results).values()):
            causes = {str(results.get(r, {}).get("cause")) for r in own[baseline]["runs"].values()}
            raise Undecidable(f"finals could not judge: no baseline run of {track} completed ({'; '.join(sorted(causes))}).")
        against = {
            "baseline": {
                n: paired(losses(a, results), losses(own[baseline], results)) for n, a in own.items() if n != baseline
            },
            "control": {
                n: paired(losses(a, results), losses(own[role["control"]], results))
                for n, a in own.items()
                if n != role["control"]
            },
        }
        overhead = next((results.get(s.run_id, {}) for s in specs if s.kind == "overhead" and s.track == track), {})
        best_ebc = min(
            (n for n, a in own.items() if a["ebc"]),
            key=lambda n: (_mean(losses(own[n], results, "val_loss")), n),
        )
        lines = _lines(config, own, role, results, against, best_ebc, overhead)
        tokens = config.batch_size * config.model.context
        tracks[track] = {
            "roles": role,
            "arms": own,
            "best_ebc_by_val": best_ebc,
            "differences": against,
            "overhead_pct": overhead.get("overhead_pct"),
            "efficiency": efficiency(own, baseline, results, tokens),
            "verdict": lines,
        }
        if not overhead.get("overhead_pct") and overhead.get("outcome") != "completed":
            notes.append(f"{track}: the overhead was not measured ({overhead.get('cause') or 'no result'})")
    rule = (
        f"test loss, paired by seed, {100 * CONFIDENCE:g}% t-intervals; no worse: upper limit ≤ "
        f"+{config.finals.margin:g} nats; KL, c, plateau and overhead on EBC ×2"
    )
    return decide.sealed("finals", rule, config, specs, results, earlier, tracks=tracks, notes=notes)


def _mean(values: Mapping[str, float]) -> float:
    return statistics.fmean(values.values()) if values else math.inf


def _lines(
    config: Config,
    arms: Mapping[str, Any],
    role: Mapping[str, str],
    results: Results,
    against: Mapping[str, Any],
    best_ebc: str,
    overhead: Mapping[str, Any],
) -> list[dict[str, Any]]:
    twice = arms[role["ebc_x2"]]
    runs = [results[r] for r in twice["runs"].values() if results.get(r, {}).get("outcome") in ("completed", "diverged")]

    def line(name: str, question: str, verdict: str, figure: str, **found: Any) -> dict[str, Any]:
        return {"name": name, "question": question, "verdict": verdict, "figure": figure, **found}

    lines = []
    clipped = sum(r.get("kl_clipped_audits") or 0 for r in runs)
    within = sum((r.get("kl_within_30pct") or 0) * (r.get("kl_clipped_audits") or 0) for r in runs)
    ratios = [r["kl_ratio_median"] for r in runs if r.get("kl_ratio_median") is not None]
    share = within / clipped if clipped else None
    lines.append(
        line(
            "kl_on_target",
            f"applied KL within ±{100 * KL_BAND:g}% of δ* on most audited, clipped steps",
            "undecided" if share is None else "pass" if share > 0.5 else "fail",
            "no step was clipped"
            if share is None
            else f"{100 * share:.0f}% of {clipped}; median KL/δ* {statistics.median(ratios):.2f}",
            share=share,
            median_ratio=statistics.median(ratios) if ratios else None,
        )
    )
    medians = [r["c_median"] for r in runs if r.get("c_median") is not None]
    c = statistics.median(medians) if medians else None
    band = config.study.band
    lines.append(
        line(
            "c_in_band",
            f"median c in {band[0]:g}–{band[1]:g}",
            "undecided" if c is None else "pass" if band_distance(c, band) == 0 else "fail",
            "–" if c is None else f"{c:.3f}",
            c_median=c,
        )
    )
    limit = max(100, math.ceil(0.05 * config.finals.steps))
    longest = max((r.get("plateau_steps") or 0 for r in runs), default=None)
    lines.append(
        line(
            "no_plateau",
            f"never {limit} steps in a row with c < {PLATEAU_C:g}",
            "undecided" if longest is None or config.finals.steps < limit else "pass" if longest < limit else "fail",
            "–" if longest is None else f"longest {longest} of {config.finals.steps} steps",
            longest=longest,
        )
    )
    versus = against["baseline"][role["ebc_x2"]]
    lines.append(
        line(
            "x2_no_worse_than_baseline",
            f"test loss of EBC at LR ×2 ≤ baseline + {config.finals.margin:g}",
            not_worse(versus, config.finals.margin),
            show_difference(versus),
            arm=role["ebc_x2"],
            reference=role["baseline"],
            difference=versus,
        )
    )
    fair = against["control"][best_ebc]
    beats = fair["high"] is not None and fair["high"] < 0
    lines.append(
        line(
            "best_ebc_no_worse_than_control",
            f"test loss of the best EBC arm by val ≤ fair control + {config.finals.margin:g}",
            not_worse(fair, config.finals.margin),
            show_difference(fair) + (" — beats it" if beats else ""),
            arm=best_ebc,
            reference=role["control"],
            difference=fair,
            beats=beats,
        )
    )
    limit_pct = OVERHEAD_LIMIT_PCT.get(config.scale, OVERHEAD_LIMIT_ELSEWHERE_PCT)
    measured, spread = overhead.get("overhead_pct"), overhead.get("overhead_iqr_pct")
    lines.append(
        line(
            "overhead",
            f"EBC's overhead ≤ {limit_pct:g}% of the step time",
            "undecided"
            if not spread
            else "pass"
            if spread[1] <= limit_pct
            else "fail"
            if spread[0] > limit_pct
            else "undecided",
            "not measured"
            if measured is None
            else f"{measured:.1f}%" + (f" (quartiles {spread[0]:.1f} to {spread[1]:.1f})" if spread else ""),
            overhead_pct=measured,
        )
    )
    return lines


def show_difference(d: Mapping[str, Any]) -> str:
    """A paired difference in one line: mean, interval, what could have been seen."""
    if d.get("diverged"):
        return f"diverged: {d['diverged']['arm']} of the arm's, {d['diverged']['reference']} of the reference's runs"
    if d["mean"] is None:
        return "no pair of completed runs"
    if d["high"] is None:
        return f"{d['mean']:+.4f} nats from one seed: no interval"
    return (
        f"{d['mean']:+.4f} nats [{d['low']:+.4f}, {d['high']:+.4f}], {d['seeds']} seeds; "
        f"smallest detectable {d['detectable']:.4f}"
    )


def acceptance(config: Config, decision: Decision) -> dict[str, Any]:
    """acceptance.json: every line, and how many passed, failed or stayed undecided."""
    lines = [{"track": t, **line} for t, found in decision["tracks"].items() for line in found["verdict"]]
    counts = {v: sum(line["verdict"] == v for line in lines) for v in ("pass", "fail", "undecided")}
    return {
        "counts": counts,
        "lines": lines,
        "confidence": CONFIDENCE,
        "power_of_detectable": POWER,
        "seeds": config.seeds,
    }

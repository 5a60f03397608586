"""The finals: arms, paired differences between them, and the verdict. Pure functions; only here does the test loss decide.

Each line of the verdict is pass, fail or undecided, with its figure. With few seeds most comparisons are undecided, and the
smallest difference that so many seeds could have shown stands beside them. EBC at ×2 against the baseline is named beforehand
and judged by its own interval; the best EBC arm is picked from several by the runs that it is then judged by, so its interval
is the one that holds for all of them at once, and so is every claim that an arm beats another.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ebc_lab.config.schema import Config
from ebc_lab.records.figures import KL_BAND, PLATEAU_C

from . import decide
from .decide import Decision, Results, Undecidable, band_distance
from .inference import CONFIDENCE, POWER, VERDICT_OF, paired, show_difference
from .signature import RunSpec


def overhead_limit(scale: str) -> float:
    """What EBC may add to a step's time, in percent; where a step is a few thousand tokens, a probe costs more of it."""
    return 8.0 if scale == "laptop" else 5.0


def arms_of(specs: Sequence[RunSpec], results: Results) -> dict[str, dict[str, Any]]:
    """Arm -> roles, settings, run ids by seed, and its figures over the seeds that completed. Arms with the same runs are one.

    `test_median` and `val_median` are over all finished seeds, one that diverged behind every other: None where it is the
    median itself. By them arms are ranked.
    """
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
        for key in ("val", "test"):
            middle = statistics.median(losses(arm, results, f"{key}_loss").values() or [math.inf])
            arm[f"{key}_median"] = middle if math.isfinite(middle) else None
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


def compare(
    config: Config, specs: Sequence[RunSpec], results: Results, earlier: Mapping[str, Decision]
) -> dict[str, dict[str, Any]]:
    """Track -> its arms, their roles, the best EBC arm by val, and what each arm's test loss differs by: every other arm's from
    the baseline's, every EBC arm's from the control's. Raises Undecidable where a baseline has no run to compare with.
    """
    arms = arms_of(specs, results)
    tracks: dict[str, Any] = {}
    pairs: list[tuple[str, str, str, str]] = []  # track, family, arm, its reference
    for track in earlier["lr_scale"]["tracks"]:
        own = {n: a for n, a in arms.items() if a["track"] == track}
        role = {r: n for n, a in own.items() for r in a["roles"]}
        baseline, control = role["baseline"], role["control"]
        if not any(math.isfinite(x) for x in losses(own[baseline], results).values()):
            causes = {str(results.get(r, {}).get("cause")) for r in own[baseline]["runs"].values()}
            raise Undecidable(f"finals could not judge: no baseline run of {track} completed ({'; '.join(sorted(causes))}).")
        pairs += [(track, "baseline", n, baseline) for n in own if n != baseline]
        pairs += [(track, "control", n, control) for n, a in own.items() if a["ebc"]]
        best = min((n for n, a in own.items() if a["ebc"]), key=lambda n: (_mean(losses(own[n], results, "val_loss")), n))
        differences: dict[str, dict[str, Any]] = {"baseline": {}, "control": {}}
        tracks[track] = {"roles": role, "arms": own, "best_ebc_by_val": best, "differences": differences}
    many = Counter(family for _, family, _, _ in pairs)
    for track, family, name, reference in pairs:
        tracks[track]["differences"][family][name] = paired(
            losses(arms[name], results),
            losses(arms[reference], results),
            margin=config.finals.margin,
            comparisons=many[family],
            looks=len(looks(config)),
            replicates=earlier["lr_sweep"]["tracks"][track]["replicate_losses"],
        )
    return tracks


def looks(config: Config) -> list[int]:
    """After how many seeds the finals are looked at: once, or again whenever seeds are added, up to `max_seeds`."""
    first, most = len(config.seeds), config.finals.max_seeds
    return [*range(first, most, config.finals.seeds_per_look), most] if most > first else [first]


def next_seeds(config: Config, specs: Sequence[RunSpec], results: Results, earlier: Mapping[str, Decision]) -> list[int]:
    """The seeds that the finals of `specs` go on with: none once the verdict's comparisons are decided, or at the last look."""
    used = list(dict.fromkeys(s.run.seed for s in specs if s.kind == "train"))
    at = looks(config)
    if len(used) >= at[-1] or _settled(config, specs, results, earlier):
        return []
    wanted = next(n for n in at if n > len(used)) - len(used)
    taken = {*used, *range(config.study.stage_seed, config.study.stage_seed + config.lr_sweep.replicates + 1)}
    return list(itertools.islice((s for s in itertools.count(max(used) + 1) if s not in taken), wanted))


def _settled(config: Config, specs: Sequence[RunSpec], results: Results, earlier: Mapping[str, Decision]) -> bool:
    try:
        found = compare(config, specs, results, earlier)
    except Undecidable:
        return True  # more seeds of what does not train would not help
    return all("undecided" not in _claims(track) for track in found.values())


def _claims(track: Mapping[str, Any]) -> tuple[str, str]:
    """What the verdict's two comparisons of the test loss are judged to be."""
    against = track["differences"]
    return against["baseline"][track["roles"]["ebc_x2"]]["alone"], against["control"][track["best_ebc_by_val"]]["judged"]


def finals(config: Config, specs: Sequence[RunSpec], results: Results, earlier: Mapping[str, Decision]) -> Decision:
    """The finals as a decision: arms, paired differences, efficiency, verdict lines; one track after the other."""
    tracks = compare(config, specs, results, earlier)
    notes: list[str] = []
    for name, track in tracks.items():
        overhead = next((results.get(s.run_id, {}) for s in specs if s.kind == "overhead" and s.track == name), {})
        tokens = config.batch_size * config.model.context
        track |= {
            "sigma": earlier["lr_sweep"]["tracks"][name]["sigma"],
            "margin_sigma": track["differences"]["control"][track["best_ebc_by_val"]]["sigmas"],
            "overhead_pct": overhead.get("overhead_pct"),
            "efficiency": efficiency(track["arms"], track["roles"]["baseline"], results, tokens),
            "verdict": _lines(config, track, results, overhead),
        }
        if not overhead.get("overhead_pct") and overhead.get("outcome") != "completed":
            notes.append(f"{name}: the overhead was not measured ({overhead.get('cause') or 'no result'})")
    at = looks(config)
    rule = (
        f"test loss, paired by seed, {100 * CONFIDENCE:g}% intervals, of all arms at once where one is picked from several; "
        f"no worse: upper limit ≤ +{config.finals.margin:g} nats; beats: below 0; KL, c, plateau and overhead on EBC ×2"
    )
    sequential = None
    if len(at) > 1:
        seeds = len({s.run.seed for s in specs if s.kind == "train"})
        undecided = any("undecided" in _claims(track) for track in tracks.values())
        stopped = f"still undecided at {seeds} seeds, the most allowed" if undecided else "both comparisons are decided"
        sequential = {"looks": at, "at": seeds, "confidence": 1 - (1 - CONFIDENCE) / len(at), "stopped": stopped}
        rule += f"; looked at after {', '.join(map(str, at))} seeds, the error shared out over the looks"
    return decide.sealed("finals", rule, config, specs, results, earlier, tracks=tracks, sequential=sequential, notes=notes)


def _mean(values: Mapping[str, float]) -> float:
    return statistics.fmean(values.values()) if values else math.inf


def _lines(config: Config, track: Mapping[str, Any], results: Results, overhead: Mapping[str, Any]) -> list[dict[str, Any]]:
    arms, role, against, best_ebc = (track[k] for k in ("arms", "roles", "differences", "best_ebc_by_val"))
    alone, joint = _claims(track)
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
            VERDICT_OF[alone],
            show_difference(versus) + (" — beats it" if versus["judged"] == "beats" else ""),
            arm=role["ebc_x2"],
            reference=role["baseline"],
            difference=versus,
            joint=False,
            beats=versus["judged"] == "beats",
        )
    )
    fair = against["control"][best_ebc]
    lines.append(
        line(
            "best_ebc_no_worse_than_control",
            f"test loss of the best EBC arm by val ≤ fair control + {config.finals.margin:g}",
            VERDICT_OF[joint],
            show_difference(fair, joint=True) + (" — beats it" if joint == "beats" else ""),
            arm=best_ebc,
            reference=role["control"],
            difference=fair,
            joint=True,
            beats=joint == "beats",
        )
    )
    limit_pct = overhead_limit(config.scale)
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


def seeds_of(decision: Mapping[str, Any]) -> list[int]:
    """The seeds that the arms of the finals, or of a suite, were trained with: those asked for, and those added."""
    return sorted({int(s) for found in decision["tracks"].values() for arm in found["arms"].values() for s in arm["runs"]})


def acceptance(config: Config, decision: Decision) -> dict[str, Any]:
    """acceptance.json: every line, and how many passed, failed or stayed undecided."""
    lines = [{"track": t, **line} for t, found in decision["tracks"].items() for line in found["verdict"]]
    counts = {v: sum(line["verdict"] == v for line in lines) for v in ("pass", "fail", "undecided")}
    return {
        "counts": counts,
        "lines": lines,
        "confidence": CONFIDENCE,
        "power_of_detectable": POWER,
        "seeds": seeds_of(decision),
        "sequential": decision["sequential"],
    }

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

from .rules import Decision, Results, Undecidable
from .spec import RunSpec
from .statistics import paired


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
            o: n
            for o in sorted({str(r.get("outcome")) for r in own})
            if (n := sum(r.get("outcome") == o for r in own))
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


def efficiency(
    arms: Mapping[str, Any], baseline: str, results: Results, tokens_per_step: int
) -> dict[str, Any]:
    """Per arm: median steps, tokens and training seconds until the fixed windows' loss is at the baseline's final one.

    Seeds are paired; None where fewer than half of them got there.
    """
    out: dict[str, Any] = {}
    for name, arm in arms.items():
        reached: list[tuple[float, float]] = []
        seeds = 0
        for seed, run_id in arm["runs"].items():
            final = results.get(arms[baseline]["runs"].get(seed, ""), {})
            target = (
                (final.get("curve") or [[0, None]])[-1][1] if final.get("outcome") == "completed" else None
            )
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
            out[name] = {
                "steps": steps,
                "tokens": steps * tokens_per_step,
                "train_s": seconds,
                "seeds": len(reached),
            }
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
            raise Undecidable(
                f"finals could not judge: no baseline run of {track} completed ({'; '.join(sorted(causes))})."
            )
        pairs += [(track, "baseline", n, baseline) for n in own if n != baseline]
        pairs += [(track, "control", n, control) for n, a in own.items() if a["ebc"]]
        best = min(
            (n for n, a in own.items() if a["ebc"]),
            key=lambda n: (_mean(losses(own[n], results, "val_loss")), n),
        )
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


def next_seeds(
    config: Config, specs: Sequence[RunSpec], results: Results, earlier: Mapping[str, Decision]
) -> list[int]:
    """The seeds that the finals of `specs` go on with: none once the verdict's comparisons are decided, or at the last look."""
    used = list(dict.fromkeys(s.run.seed for s in specs if s.kind == "train"))
    at = looks(config)
    if len(used) >= at[-1] or _settled(config, specs, results, earlier):
        return []
    wanted = next(n for n in at if n > len(used)) - len(used)
    taken = {*used, *range(config.study.stage_seed, config.study.stage_seed + config.lr_sweep.replicates + 1)}
    return list(itertools.islice((s for s in itertools.count(max(used) + 1) if s not in taken), wanted))


def _settled(
    config: Config, specs: Sequence[RunSpec], results: Results, earlier: Mapping[str, Decision]
) -> bool:
    try:
        found = compare(config, specs, results, earlier)
    except Undecidable:
        return True  # more seeds of what does not train would not help
    return all("undecided" not in claims(track) for track in found.values())


def claims(track: Mapping[str, Any]) -> tuple[str, str]:
    """What the verdict's two comparisons of the test loss are judged to be."""
    against = track["differences"]
    return against["baseline"][track["roles"]["ebc_x2"]]["alone"], against["control"][
        track["best_ebc_by_val"]
    ]["judged"]


def _mean(values: Mapping[str, float]) -> float:
    return statistics.fmean(values.values()) if values else math.inf


def seeds_of(decision: Mapping[str, Any]) -> list[int]:
    """The seeds that the arms of the finals, or of a suite, were trained with: those asked for, and those added."""
    return sorted(
        {
            int(s)
            for found in decision["tracks"].values()
            for arm in found["arms"].values()
            for s in arm["runs"]
        }
    )

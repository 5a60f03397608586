"""The lines of the verdict, each pass, fail or undecided, with its figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from ebc_lab.config.schema import Config
from ebc_lab.records.figures import KL_BAND, PLATEAU_C

from .compare_arms import claims, seeds_of
from .rules import Decision, Results, band_distance
from .statistics import CONFIDENCE, POWER, VERDICT_OF, show_difference


def overhead_limit(scale: str) -> float:
    """What EBC may add to a step's time, in percent; where a step is a few thousand tokens, a probe costs more of it."""
    return 8.0 if scale == "laptop" else 5.0


def verdict_lines(
    config: Config, track: Mapping[str, Any], results: Results, overhead: Mapping[str, Any]
) -> list[dict[str, Any]]:
    arms, role, against, best_ebc = (track[k] for k in ("arms", "roles", "differences", "best_ebc_by_val"))
    alone, joint = claims(track)
    twice = arms[role["ebc_x2"]]
    runs = [
        results[r]
        for r in twice["runs"].values()
        if results.get(r, {}).get("outcome") in ("completed", "diverged")
    ]

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
            "undecided"
            if longest is None or config.finals.steps < limit
            else "pass"
            if longest < limit
            else "fail",
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

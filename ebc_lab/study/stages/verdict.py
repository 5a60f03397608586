"""The lines of the verdict, each pass, fail or undecided, with its figure."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ebc_lab.config.schema import Config
from ebc_lab.records.figures import KL_BAND, PLATEAU_C, RunResult

from .compare_arms import seeds_of
from .rules import Decision, Results, band_distance
from .statistics import CONFIDENCE, POWER, VERDICT_OF, by_interval, show_difference, show_mean

Line = dict[str, Any]  # name, question, verdict, figure, and what the figure was made from


def overhead_limit(scale: str) -> float:
    """What EBC may add to a step's time, in percent. Where a step is a few thousand tokens, a probe costs
    more of it."""
    return 8.0 if scale == "laptop" else 5.0


def verdict_lines(
    config: Config, track: Mapping[str, Any], results: Results, overhead: RunResult
) -> list[Line]:
    """The lines of a track: three on EBC at ×2 itself, two comparisons of the test loss, the LR window where
    the finals have EBC at two rates, and the overhead."""
    twice = track["roles"]["ebc_x2"]
    runs = track["arms"][twice]["runs"].values()
    known = [results[run_id] for run_id in runs if run_id in results]
    finished = [r for r in known if r.get("outcome") in ("completed", "diverged")]
    return [
        _kl_on_target(finished),
        _c_in_band(finished, config.study.band),
        _no_plateau(finished, config.finals.steps),
        _comparison(
            track,
            "baseline",
            twice,
            "x2_no_worse_than_baseline",
            f"test loss of EBC at LR ×2 ≤ baseline + {config.finals.margin:g}",
            joint=False,
        ),
        _comparison(
            track,
            "control",
            track["best_ebc_by_val"],
            "best_ebc_no_worse_than_control",
            f"test loss of the best EBC arm by val ≤ fair control + {config.finals.margin:g}",
            joint=True,
        ),
        *_lr_window(config, track),
        _overhead(overhead, overhead_limit(config.scale)),
    ]


def _line(name: str, question: str, passed: bool | None, figure: str, **found: Any) -> Line:
    """`passed` None: undecided."""
    verdict = {True: "pass", False: "fail", None: "undecided"}[passed]
    return {"name": name, "question": question, "verdict": verdict, "figure": figure, **found}


def _kl_on_target(finished: Sequence[RunResult]) -> Line:
    clipped = sum(r.get("kl_clipped_audits") or 0 for r in finished)
    within = sum((r.get("kl_within_30pct") or 0) * (r.get("kl_clipped_audits") or 0) for r in finished)
    ratios = [ratio for r in finished if (ratio := r.get("kl_ratio_median")) is not None]
    share = within / clipped if clipped else None
    middle = statistics.median(ratios) if ratios else None
    figure = "no step was clipped"
    if share is not None:
        figure = f"{100 * share:.0f}% of {clipped}; median KL/δ* {middle:.2f}"
    return _line(
        "kl_on_target",
        f"applied KL within ±{100 * KL_BAND:g}% of δ* on most audited, clipped steps",
        None if share is None else share > 0.5,
        figure,
        share=share,
        median_ratio=middle,
    )


def _c_in_band(finished: Sequence[RunResult], band: Sequence[float]) -> Line:
    medians = [median for r in finished if (median := r.get("c_median")) is not None]
    c = statistics.median(medians) if medians else None
    return _line(
        "c_in_band",
        f"median c in {band[0]:g}–{band[1]:g}",
        None if c is None else band_distance(c, band) == 0,
        "–" if c is None else f"{c:.3f}",
        c_median=c,
    )


def _no_plateau(finished: Sequence[RunResult], steps: int) -> Line:
    limit = max(100, math.ceil(0.05 * steps))
    longest = max((r.get("plateau_steps") or 0 for r in finished), default=None)
    return _line(
        "no_plateau",
        f"never {limit} steps in a row with c < {PLATEAU_C:g}",
        None if longest is None or steps < limit else longest < limit,
        "–" if longest is None else f"longest {longest} of {steps} steps",
        longest=longest,
    )


def _comparison(
    track: Mapping[str, Any], reference: str, arm: str, name: str, question: str, *, joint: bool
) -> Line:
    """An arm's test loss against the baseline's or the control's, by the interval that is its own or
    joint."""
    difference = track["differences"][reference][arm]
    beats = difference["judged"] == "beats"
    return _line(
        name,
        question,
        {"pass": True, "fail": False}.get(VERDICT_OF[difference["judged" if joint else "alone"]]),
        show_difference(difference, joint=joint) + (" — beats it" if beats else ""),
        arm=arm,
        reference=track["roles"][reference],
        difference=difference,
        joint=joint,
        beats=beats,
    )


def _lr_window(config: Config, track: Mapping[str, Any]) -> list[Line]:
    """EBC at its highest rate against EBC at its lowest, with the plain arm's own difference beside it."""
    windows = track["lr_windows"]
    if "ebc" not in windows:
        return []
    own = windows["ebc"]
    low, high = own["scales"]
    difference = own["difference"]
    figure = show_difference(difference)
    if "control" in windows:
        plain = by_interval(windows["control"]["difference"], joint=False)
        figure += f"; without EBC {show_mean(plain)}"
    line = _line(
        "lr_window",
        f"test loss of EBC at LR ×{high:g} ≤ EBC at ×{low:g} + {config.finals.window_margin:g}",
        {"pass": True, "fail": False}.get(VERDICT_OF[difference["alone"]]),
        figure,
        arm=own["arm"],
        reference=own["reference"],
        difference=difference,
        joint=False,
        beats=False,
        plain=windows.get("control"),
    )
    return [line]


def _overhead(measured: RunResult, limit_pct: float) -> Line:
    """Judged by its quartiles: undecided while they enclose the limit."""
    overhead = measured.get("overhead_pct")
    quartiles = measured.get("overhead_iqr_pct")
    passed = None
    figure = "not measured" if overhead is None else f"{overhead:.1f}%"
    if quartiles:
        low, high = quartiles
        if high <= limit_pct:
            passed = True
        elif low > limit_pct:
            passed = False
        if overhead is not None:
            figure += f" (quartiles {low:.1f} to {high:.1f})"
    question = f"EBC's overhead ≤ {limit_pct:g}% of the step time"
    return _line("overhead", question, passed, figure, overhead_pct=overhead)


RECIPE = "another recipe (budget, schedules, calibrate.multiples=…)"
SEEDS = "more seeds (seeds=…, or finals.max_seeds=…)"
LONGER = "longer runs (finals.steps=…)"
CHEAPER = "a cheaper recipe (audit_every=…, budget.probe_sequences=…), or larger batches,"
QUIETER = "a measurement on a quieter machine"


def remedy(line: Line) -> str:
    """What could change a line that failed or is undecided."""
    failed = line["verdict"] == "fail"
    if line["name"] == "overhead":
        return (
            "a cheaper recipe (audit_every=…, budget.probe_sequences=…), or longer steps,"
            if failed
            else QUIETER
        )
    if failed:
        return RECIPE
    if "difference" in line:
        return SEEDS
    if line["name"] == "no_plateau":
        return LONGER
    return f"{RECIPE} under which EBC clips" if line["name"] == "kl_on_target" else "a run that ends"


def acceptance(config: Config, decision: Decision) -> dict[str, Any]:
    """acceptance.json: every line, and how many passed, failed or stayed undecided."""
    lines = [{"track": t, **line} for t, found in decision["tracks"].items() for line in found["verdict"]]
    counts = Counter(line["verdict"] for line in lines)
    return {
        "counts": {v: counts[v] for v in ("pass", "fail", "undecided")},
        "lines": lines,
        "confidence": CONFIDENCE,
        "power_of_detectable": POWER,
        "seeds": seeds_of(decision),
        "sequential": decision["sequential"],
    }

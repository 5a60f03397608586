"""What is concluded: the lines of the finals' verdict, each pass, fail or undecided, with its figure; and
what a suite answers about arms of one's own.

Of a suite: each such arm against every other that is none, with intervals that hold for all of these
comparisons at once. The rival that the answer names is picked by the validation loss it was tuned to; the
answer is judged by the test loss on the seeds of the ablation, which took no part in the tuning.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

from ebc_lab.config.schema import Config
from ebc_lab.records.decisions import (
    Acceptance,
    Answer,
    Decision,
    Difference,
    FinalsTrack,
    Line,
    SuiteTrack,
)
from ebc_lab.records.figures import FINISHED, KL_BAND, PLATEAU_C, RunResult

from .compare_arms import fresh_seeds, losses, seeds_of
from .rules import Decisions, Results, band_distance, is_conclusive
from .statistics import (
    CONFIDENCE,
    MOST_SEEDS,
    POWER,
    by_interval,
    mostly_luck,
    seeds_needed,
    show_difference,
    show_mean,
)
from .suite import contenders, differences, tuned_arms

MOST_GIVEN = 100  # seeds that the setting takes
MOST_NAMED = 5  # arms that differ from their reference; more are counted
MOST_TOLD = 3  # comparisons beside that with the rival; beyond they are counted
PASSED = {"beats": True, "meets": True, "misses": False, "undecided": None}  # a comparison -> its line
COUNTED = {
    "better": "better than",
    "worse": "worse than",
    "level": "level with",
    "undecided": "undecided against",
}


def verdict_lines(config: Config, track: FinalsTrack, results: Results, overhead: RunResult) -> list[Line]:
    """Return the verdict on a track: three lines on EBC at ×2 itself, two comparisons of the test loss, the
    LR window where the finals have EBC at two rates, and the overhead."""
    twice = track["roles"]["ebc_x2"]
    runs = track["arms"][twice]["runs"].values()
    finished = [results[run_id] for run_id in runs if is_conclusive(results.get(run_id))]
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
            f"test loss of the best EBC arm (by validation) ≤ fair control + {config.finals.margin:g}",
            joint=True,
        ),
        *_lr_window(config, track),
        _overhead(overhead, 8.0 if config.scale == "laptop" else 5.0),  # in a short step a probe weighs more
    ]


def _line(name: str, question: str, passed: bool | None, figure: str, **evidence: Any) -> Line:
    """Return a line of the verdict; `passed` None: undecided."""
    verdict = {True: "pass", False: "fail", None: "undecided"}[passed]
    return cast(Line, {"name": name, "question": question, "verdict": verdict, "figure": figure, **evidence})


def _kl_on_target(finished: Sequence[RunResult]) -> Line:
    clipped = sum(r.get("kl_clipped_audits") or 0 for r in finished)
    within = sum((r.get("kl_within_30pct") or 0) * (r.get("kl_clipped_audits") or 0) for r in finished)
    ratios = [ratio for r in finished if (ratio := r.get("kl_ratio_median")) is not None]
    share = within / clipped if clipped else None
    middle = statistics.median(ratios) if ratios else None
    figure = "no step was clipped"
    if share is not None:
        figure = f"{100 * share:.0f}% of {clipped} steps; median KL/δ* {middle:.2f}"
    return _line(
        "kl_on_target",
        f"applied KL within ±{100 * KL_BAND:g}% of δ* on most clipped steps that were audited",
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
    track: FinalsTrack, reference: str, arm: str, name: str, question: str, *, joint: bool
) -> Line:
    """Return the line on an arm's test loss beside the baseline's or the control's, by its own interval or
    the joint one."""
    difference = track["differences"][reference][arm]
    beats = difference["judged"] == "beats"
    figure = show_difference(difference, joint=joint) + (" — beats it" if beats else "")
    # a control that is itself worse than the plain constant rate is easily beaten
    rival = track["differences"]["baseline"].get(track["roles"][reference])
    if reference != "baseline" and rival is not None and (rival["mean"] or 0) > 0:
        figure += f"; but this {reference} is a weak rival, {show_mean(rival)} worse than the baseline"
    return _line(
        name,
        question,
        PASSED[difference["judged" if joint else "alone"]],
        figure,
        arm=arm,
        reference=track["roles"][reference],
        difference=difference,
        joint=joint,
        beats=beats,
    )


def _lr_window(config: Config, track: FinalsTrack) -> list[Line]:
    """Return the line on EBC at its highest rate beside its lowest, with the plain arm's own difference;
    empty where the finals have one rate."""
    windows = track["lr_windows"]
    if "ebc" not in windows:
        return []
    window = windows["ebc"]
    low, high = window["scales"]
    difference = window["difference"]
    figure = show_difference(difference)
    if "control" in windows:
        plain = by_interval(windows["control"]["difference"], joint=False)
        figure += f"; without EBC {show_mean(plain)}"
    line = _line(
        "lr_window",
        f"test loss of EBC at LR ×{high:g} ≤ EBC at ×{low:g} + {config.finals.window_margin:g}",
        PASSED[difference["alone"]],
        figure,
        arm=window["arm"],
        reference=window["reference"],
        difference=difference,
        joint=False,
        beats=False,
        plain=windows.get("control"),
    )
    return [line]


def _overhead(measured: RunResult, limit_pct: float) -> Line:
    """Return the line on the overhead, judged by its quartiles: undecided while they enclose the limit."""
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


def remedy(line: Line) -> str:
    """Return what could change a line that failed or is undecided."""
    failed = line["verdict"] == "fail"
    if line["name"] == "overhead" and failed:
        return "a cheaper recipe (audit_every=…, budget.probe_sequences=…), or longer steps,"
    if line["name"] == "overhead":
        return "a measurement on a quieter machine"
    if failed:
        return RECIPE
    if "difference" in line and mostly_luck(line["difference"]):
        return "a tuning on several seeds (calibrate.seeds=…; of schedules a suite’s, tune.seeds=…)"
    if "difference" in line:
        return "more seeds, fresh ones in another study (seeds=… study.name=…),"
    if line["name"] == "no_plateau":
        return "longer runs (finals.steps=…)"
    return f"{RECIPE} under which EBC clips" if line["name"] == "kl_on_target" else "a run that ends"


def acceptance(config: Config, decision: Decision) -> Acceptance:
    """Return acceptance.json: every line, and how many passed, failed or stayed undecided."""
    tracks: dict[str, FinalsTrack] = decision["tracks"]
    lines: list[Line] = [{"track": t, **line} for t, track in tracks.items() for line in track["verdict"]]
    counts = Counter(line["verdict"] for line in lines)
    return {
        "counts": {v: counts[v] for v in ("pass", "fail", "undecided")},
        "lines": lines,
        "confidence": CONFIDENCE,
        "power_of_detectable": POWER,
        "seeds": seeds_of(decision),
        "sequential": decision["sequential"],
    }


# -- is mine better? ----------------------------------------------------------------------------------------


def add_answers(
    config: Config, tracks: Mapping[str, SuiteTrack], results: Results, earlier: Decisions
) -> int:
    """Give every track its arms of one's own, `mine`, and the `answers` about them, also about those that
    have no best point. Return the number of comparisons, all of which hold at once."""
    asked: dict[str, tuple[list[str], list[str]]] = {}
    for name, track in tracks.items():
        arms = [label for label, arm in contenders(track).items() if losses(arm, results)]
        mine = [label for label in config.ablation.mine.arms if label in arms]
        asked[name] = mine, [label for label in arms if label not in config.ablation.mine.arms]
    pairs = [(name, *pair) for name, both in asked.items() for pair in itertools.product(*both)]
    found = differences(config, tracks, pairs, results, earlier)
    for name, (mine, others) in asked.items():
        tuned = tuned_arms(earlier.get("tune"), name)
        untuned = {n: tuned[n]["untuned"] for n in config.ablation.mine.arms if "untuned" in tuned.get(n, {})}
        tracks[name]["mine"] = [*mine, *untuned]
        answers: dict[str, Answer] = {}
        if mine and others:
            # by the tuning where all of them were tuned
            val_losses = {o: tracks[name]["arms"][o]["val_median"] for o in others}
            if all(o in tuned for o in others):
                val_losses = {o: tuned[o]["val_loss"] for o in others}
            rival = min(others, key=lambda o: math.inf if (x := val_losses[o]) is None else x)
            for label in mine:
                against = {other: found[name, label, other] for other in others}
                answers[label] = _answer(config, label, rival, against)
        for label, reason in untuned.items():  # not compared
            answers[label] = {
                "rival": None,
                "difference": None,
                "against": {},
                "seeds_needed": None,
                "seeds": None,
                "verdict": "untuned",
                "sentence": f"{label} could not be tuned: {reason}",
            }
        tracks[name]["answers"] = answers
    return len(pairs)


def _answer(config: Config, label: str, rival: str, against: dict[str, Difference]) -> Answer:
    for difference in against.values():
        difference["verdict"] = verdict_of(difference)
        undecided = difference["verdict"] == "undecided"
        difference["seeds_needed"] = seeds_needed(difference) if undecided else None
    needed = against[rival]["seeds_needed"]
    seeds = None  # of the study, and as many more as are needed, where `seeds` takes so many
    if needed is not None and needed <= MOST_GIVEN:
        seeds = [*config.seeds, *fresh_seeds(config, config.seeds, max(0, needed - len(config.seeds)))]
    return {
        "rival": rival,
        "difference": against[rival],
        "against": against,
        "verdict": against[rival]["verdict"],
        "seeds_needed": needed,
        "seeds": seeds,
        "sentence": sentence(label, rival, against),
    }


def verdict_of(difference: Difference) -> str:
    """Return the verdict on a difference: `better` or `worse` where the joint interval excludes 0, `level`
    where it lies within ± the margin (Schuirmann 1987), else `undecided`. An arm that diverged on every one
    of several seeds, the other on none, is worse, whatever their number allows to tell."""
    lost = difference.get("diverged", {"arm": 0, "reference": 0})
    for verdict, more, fewer in (
        ("worse", lost["arm"], lost["reference"]),
        ("better", lost["reference"], lost["arm"]),
    ):
        if more == difference["seeds"] > 1 and fewer == 0:
            return verdict
    low, high = difference["joint_low"], difference["joint_high"]
    margin = difference["margin"]
    if high is not None and high < 0:
        return "better"
    if low is not None and low > 0:
        return "worse"
    within = low is not None and high is not None and -margin <= low and high <= margin
    return "level" if within else "undecided"


def sentence(label: str, rival: str, against: Mapping[str, Difference]) -> str:
    """Return an answer in a sentence: `cautious against muon, the best of the others by validation: −0.0123
    nats of test loss [−0.0200, −0.0040], 5 seeds: better; against adam undecided: −0.0040 [−0.0100, 0.0020],
    about 9 seeds would decide it`."""
    d = against[rival]
    best = ", the best of the others by validation" if len(against) > 1 else ""
    first = f"{label} against {rival}{best}: {_measured(d)}: {d['verdict']}{_remark(d)}"
    others = {name: x for name, x in against.items() if name != rival}
    if len(others) < MOST_TOLD:
        for name, x in others.items():  # without what they have in common with the first
            words = _measured(x).replace(" nats of test loss", "").removesuffix(f", {_seeds_in_words(x)}")
            first += f"; against {name} {x['verdict']}: {words}{_remark(x)}"
        return first
    counts = Counter(x["verdict"] for x in others.values())
    counted = [f"{what} {counts[v]}" for v, what in COUNTED.items() if counts[v]]
    return f"{first}; of the other {len(others)}: {', '.join(counted)}"


def _measured(d: Difference) -> str:
    """Return the difference, its joint interval and the seeds, in words."""
    if d["method"] is None:
        return "no pair of finished runs"
    words = ""
    value = d["mean"]
    if d["method"] == "rank":
        value = d["median"]
        lost = d["diverged"]
        words = f"diverged on {lost['arm']} of {d['seeds']} seeds, the other on {lost['reference']}; median "
    words += f"{_signed(value)} nats of test loss" if value is not None else "difference unbounded"
    low, high = d["joint_low"], d["joint_high"]
    if low is not None or high is not None:
        words += f" [{'−∞' if low is None else _signed(low)}, {'∞' if high is None else _signed(high)}]"
    return f"{words}, {_seeds_in_words(d)}"


def _seeds_in_words(d: Difference) -> str:
    return f"{d['seeds']} seed{'s' * (d['seeds'] != 1)}"


def _remark(d: Difference) -> str:
    """Return what is to be known beside a verdict: how small the difference is, or what would decide it."""
    verdict, margin, needed = d["verdict"], d["margin"], d["seeds_needed"]
    if verdict == "level":
        return f", no more than {margin:g} nats apart"
    if verdict != "undecided":
        ends = [end for end in (d["joint_low"], d["joint_high"]) if end is not None]
        small = len(ends) == 2 and max(map(abs, ends)) <= margin
        return f", though by less than {margin:g} nats" if small else ""
    if d["seeds"] == 1:
        return ", one seed: no interval"
    if d["method"] != "t":
        return ""
    without: Difference = {**d, "luck": {"sd": 0.0, "freedom": 1.0}}
    if needed is None and mostly_luck(d) and seeds_needed(without) is not None:
        return (
            ", the luck of the tuning is larger than that of the seeds: a larger tune.seeds would be needed"
        )
    if needed is None:
        return f", more than {MOST_SEEDS} seeds would be needed"
    return f", about {needed} seeds would decide it"


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def unfinished(track: SuiteTrack) -> list[str]:
    """Return the arms of which no run ended, with why: these have no verdict and are not counted.

    `hot: no run ended (2 failed: ramps.py:3: TypeError)`."""
    lines = []
    for label, arm in track["arms"].items():
        if not set(FINISHED) & set(arm["outcomes"]):
            ends = ", ".join(f"{n} {outcome}" for outcome, n in arm["outcomes"].items())
            why = f": {cause.rstrip('.')}" if (cause := arm.get("cause")) else ""
            lines.append(f"{label}: no run ended ({ends or 'none has a result'}{why})")
    return lines


def told_apart(track: SuiteTrack) -> str:
    """Return which arms of a suite differ from their reference by the interval that holds for all of them at
    once, and which do not: the answer where a suite has no arms of one's own."""
    groups: dict[str, list[str]] = {"lower": [], "higher": [], "not told apart": []}
    for label, arm in track["arms"].items():
        d = arm["difference"]
        if d is not None and d["seeds"]:
            where = {"better": "lower", "worse": "higher"}.get(verdict_of(d), "not told apart")
            notes = [arm["shape"]] * bool(arm.get("shape"))
            notes += [f"about {n} seeds would decide it"] if (n := d.get("seeds_needed")) else []
            groups[where].append(f"{label} ({'; '.join(notes)})" if notes else label)
    parts = []
    for what, labels in groups.items():
        more = f" and {len(labels) - MOST_NAMED} more" if len(labels) > MOST_NAMED else ""
        parts += [f"{what}: {', '.join(labels[:MOST_NAMED])}{more}"] if labels else []
    if not parts:
        return "no arm was compared"
    return f"test loss beside the reference's, all intervals holding at once: {'; '.join(parts)}"

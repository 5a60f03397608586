"""The conclusions of a study. For the finals, these are the lines of the verdict, each pass, fail or
undecided, with a figure. For a suite, they are the answers about the user's own arms (`ablation.mine`).

Each of the user's own arms is compared with every arm that is not, and with the one that its `versus` names,
by intervals that hold for all of these comparisons at once. The rival named in an answer is picked by the
validation loss to which it was tuned; an arm of another size has its `versus` alone. The answer is judged by
the test loss on the seeds of the ablation, which took no part in the tuning.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from ebc_lab.config.errors import count
from ebc_lab.config.schema import Config
from ebc_lab.records.decisions import (
    C_IN_BAND,
    KL_ON_TARGET,
    NO_PLATEAU,
    NO_WORSE_THAN_BASELINE,
    NO_WORSE_THAN_CONTROL,
    OVERHEAD,
    Acceptance,
    Answer,
    Arm,
    Decision,
    Difference,
    FinalsTrack,
    Line,
    SuiteTrack,
    TunedArm,
)
from ebc_lab.records.figures import FINISHED, KL_BAND, PLATEAU_C, RunResult

from .compare_arms import fresh_seeds, judged_arms, losses, seeds_of
from .rules import Decisions, Results, band_distance, is_conclusive
from .statistics import (
    CONFIDENCE,
    MOST_SEEDS,
    MOST_TUNED,
    POWER,
    centre_of,
    mostly_luck,
    seeds_needed,
    show_difference,
    show_interval,
    show_mean,
    tuning_needed,
)
from .suite import SUITES_SIZE, contenders, differences, other_size, size_of, tuned_arms

MOST_GIVEN = 100  # the most seeds that the setting takes
MOST_NAMED = 5  # the most arms that a list names; the rest are counted
MOST_TOLD = 3  # comparisons with arms other than the rival are only counted from this number on
PASSED = {"beats": True, "meets": True, "misses": False, "undecided": None}  # judgement -> whether it passes
COMPARISONS = {  # rival -> the name of its line, and its question
    "baseline": (NO_WORSE_THAN_BASELINE, "EBC at LR ×2 ≤ baseline"),
    "control": (NO_WORSE_THAN_CONTROL, "the best EBC arm (by validation) ≤ fair control"),
}
COUNTED = {
    "better": "better than",
    "worse": "worse than",
    "level": "level with",
    "undecided": "undecided against",
}


def verdict_lines(config: Config, track: FinalsTrack, results: Results, overhead: RunResult) -> list[Line]:
    """Return the lines of the verdict on a track: three on the runs of EBC at ×2, two comparisons of test
    loss, the LR window if the finals have EBC at two rates, and the overhead."""
    runs = track["arms"][track["roles"]["ebc_x2"]]["runs"].values()
    lines = list(_ebc_lines(config, [results[r] for r in runs if is_conclusive(results.get(r))]))
    lines += [_comparison(config, track, rival, arm) for rival, arm in judged_arms(track).items()]
    if "ebc" in track["lr_windows"]:
        lines.append(_lr_window(config, track))
    most = 8.0 if config.scale == "laptop" else 5.0  # a probe weighs more where steps are short
    return [*lines, _overhead(overhead, most)]


def _line(name: str, question: str, passed: bool | None, figure: str, **evidence: Any) -> Line:
    """Return a line of the verdict, which is undecided if `passed` is None."""
    verdict = {True: "pass", False: "fail", None: "undecided"}[passed]
    return cast(Line, {"name": name, "question": question, "verdict": verdict, "figure": figure, **evidence})


def _ebc_lines(config: Config, finished: Sequence[Mapping[str, Any]]) -> Iterator[Line]:
    """Yield the verdict lines that judge the EBC runs themselves: KL on target, median c in the band, and no
    long plateau at low c."""

    def median(key: str) -> float | None:
        values = [r[key] for r in finished if r.get(key) is not None]
        return statistics.median(values) if values else None

    clipped = sum(r.get("kl_clipped_audits") or 0 for r in finished)
    within = sum((r.get("kl_within_30pct") or 0) * (r.get("kl_clipped_audits") or 0) for r in finished)
    share = within / clipped if clipped else None
    ratio = median("kl_ratio_median")
    question = f"applied KL within ±{100 * KL_BAND:g}% of δ* on most clipped steps that were audited"
    passed, figure = None, "no step was clipped"
    if share is not None:
        passed, figure = share > 0.5, f"{100 * share:.0f}% of {clipped} steps; median KL/δ* {ratio:.2f}"
    yield _line(KL_ON_TARGET, question, passed, figure, share=share, median_ratio=ratio)

    c, band = median("c_median"), config.study.band
    passed, figure = None, "–"
    if c is not None:
        passed, figure = band_distance(c, band) == 0, f"{c:.3f}"
    yield _line(C_IN_BAND, f"median c in {band[0]:g}–{band[1]:g}", passed, figure, c_median=c)

    steps = config.finals.steps
    limit = max(100, math.ceil(0.05 * steps))
    longest = max((r.get("plateau_steps") or 0 for r in finished), default=None)
    passed = None if longest is None or steps < limit else longest < limit
    figure = "–" if longest is None else f"longest {longest} of {steps} steps"
    question = f"never {limit} steps in a row with c < {PLATEAU_C:g}"
    yield _line(NO_PLATEAU, question, passed, figure, longest=longest)


def _comparison(config: Config, track: FinalsTrack, rival: str, arm: str) -> Line:
    """Return the line that compares the test loss of an EBC arm with the rival's. The comparison with the
    baseline is judged by its own interval, and the one with the control by the joint interval."""
    difference, reference = track["differences"][rival][arm], track["roles"][rival]
    joint, beats = rival == "control", difference["judged"] == "beats"
    figure = show_difference(difference, joint=joint) + (" — beats it" if beats else "")
    # a control that is itself worse than the plain constant rate is easily beaten
    weak = track["differences"]["baseline"].get(reference)
    if weak is not None and (weak["mean"] or 0) > 0:
        figure += f"; but this {rival} is a weak rival, {show_mean(weak)} worse than the baseline"
    name, asked = COMPARISONS[rival]
    question = f"test loss of {asked} + {config.finals.margin:g}"
    passed = PASSED[difference["judged" if joint else "alone"]]
    evidence = {"arm": arm, "reference": reference, "difference": difference, "joint": joint, "beats": beats}
    return _line(name, question, passed, figure, **evidence)


def _lr_window(config: Config, track: FinalsTrack) -> Line:
    """Return the line that compares EBC's highest and lowest rates. It also shows this without EBC."""
    window, plain = track["lr_windows"]["ebc"], track["lr_windows"].get("control")
    low, high = window["scales"]
    difference = window["difference"]
    figure = show_difference(difference)
    if plain:
        figure += f"; without EBC {show_mean(plain['difference'])}"
    question = f"test loss of EBC at LR ×{high:g} ≤ EBC at ×{low:g} + {config.finals.window_margin:g}"
    evidence: dict[str, Any] = {
        "arm": window["arm"],
        "reference": window["reference"],
        "difference": difference,
    }
    evidence |= {"joint": False, "beats": False, "plain": plain}
    return _line("lr_window", question, PASSED[difference["alone"]], figure, **evidence)


def _overhead(measured: RunResult, limit_pct: float) -> Line:
    """Return the line on the overhead. It is undecided if the limit lies between the measured quartiles."""
    overhead, quartiles = measured.get("overhead_pct"), measured.get("overhead_iqr_pct")
    passed = None
    figure = "not measured" if overhead is None else f"{overhead:.1f}%"
    if quartiles:
        low, high = quartiles
        if high <= limit_pct or low > limit_pct:
            passed = high <= limit_pct
        if overhead is not None:
            figure += f" (quartiles {low:.1f} to {high:.1f})"
    question = f"EBC's overhead ≤ {limit_pct:g}% of the step time"
    return _line(OVERHEAD, question, passed, figure, overhead_pct=overhead)


def remedy(line: Line) -> str:
    """Return a phrase for what could change a line that failed or is undecided."""
    name, failed = line["name"], line["verdict"] == "fail"
    recipe = "another recipe (budget, schedules, calibrate.multiples=…)"
    if name == OVERHEAD:
        cheaper = "a cheaper recipe (audit_every=…, budget.probe_sequences=…), or longer steps,"
        return cheaper if failed else "a measurement on a quieter machine"
    if failed:
        return recipe
    if "difference" in line:
        return _remedy_of_difference(line)
    undecided = {
        NO_PLATEAU: "longer runs (finals.steps=…)",
        KL_ON_TARGET: f"{recipe} under which EBC clips",
    }
    return undecided.get(name, "a run that ends")


def seeds_to_pass(line: Line, *, luck: bool = True) -> int | None:
    """Return how many fresh seeds would, by themselves, show on which side of its margin the difference of an
    undecided line lies: `seeds_needed` of what it exceeds the margin by. None if no number can be known.
    `luck`: whether that of the tuning counts."""
    d = line["difference"]
    if d["mean"] is None:
        return None
    alone = {} if line["joint"] else {"comparisons": 1}
    beyond = {**d, **alone, "mean": d["mean"] - d["margin"], "margin": 0.0}
    return seeds_needed(cast(Difference, {k: v for k, v in beyond.items() if luck or k != "luck"}))


def _remedy_of_difference(line: Line) -> str:
    d = line["difference"]
    if needed := seeds_to_pass(line):
        return f"about {needed} seeds, fresh ones in another study,"
    if d["mean"] is None or d["sd"] is None:
        why = "one seed shows no spread" if d["method"] == "t" else "runs that diverge have no mean"
        return f"more seeds, fresh ones in another study (how many is not known: {why}),"
    if mostly_luck(d) and seeds_to_pass(line, luck=False) is not None:
        return (
            "a tuning on more seeds (calibrate.seeds=… for δ*; for schedules a suite’s, tune.seeds=…; how "
            "many is not known: the record does not tell the luck of the one choice from that of the other)"
        )
    return f"more than {MOST_SEEDS} seeds"


def acceptance(config: Config, decision: Decision) -> Acceptance:
    """Return the contents of acceptance.json: all lines, and how many passed, failed or are undecided."""
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
    """Write into every track the user's own arms, as `mine`, and the `answers` about them, also about those
    that could not be compared. Return the number of comparisons. The intervals hold for all of them at
    once."""
    own = config.ablation.mine.arms
    rivals: dict[str, list[str]] = {}
    pairs: list[tuple[str, str, str]] = []
    for name, track in tracks.items():
        arms = [label for label, arm in contenders(track).items() if losses(arm, results)]
        track["mine"] = [label for label in own if label in arms]
        rivals[name] = [label for label in arms if label not in own]
        for label in own:
            others = [*(rivals[name] if label in arms else ()), *_versus(config, label, track, results)]
            pairs += itertools.product([name], [label], dict.fromkeys(others))
    found = differences(config, tracks, pairs, results, earlier)
    for name, track in tracks.items():
        tuned = tuned_arms(earlier.get("tune"), name)
        track["answers"] = {}
        for label in own:
            against = {pair[2]: d for pair, d in found.items() if pair[:2] == (name, label)}
            if against:
                rival = _rival(track, [o for o in against if o in rivals[name]] or [*against], tuned)
                versus = config.ablation.all_arms()[label].versus
                size = f" ({size})" if (size := other_size(label, track)) else ""
                track["answers"][label] = _answer(config, f"{label}{size}", rival, against, versus)
        for label in (label for label in own if label not in track["answers"]):
            track["answers"][label] = _not_compared(label, track, tuned.get(label))
        track["mine"] = list(dict.fromkeys([*track["mine"], *own]))
    return len(pairs)


def _versus(config: Config, label: str, track: SuiteTrack, results: Results) -> list[str]:
    """Return the arm that the suite pairs this one with by name, if both were judged on the same text."""
    arms, versus = track["arms"], config.ablation.arms[label].versus
    pair = [arms[arm] for arm in (label, versus) if arm in arms]
    known = len(pair) == 2 and all(arm["comparable"] and losses(arm, results) for arm in pair)
    return [versus] if versus and known else []


def _rival(track: SuiteTrack, others: Sequence[str], tuned: Mapping[str, TunedArm]) -> str:
    """Return the arm among `others` with the lowest validation loss. This is the loss found in the tuning if
    all of them were tuned, and otherwise the median over the runs of this stage."""
    val_losses = {other: track["arms"][other]["val_median"] for other in others}
    if all(other in tuned for other in others):
        val_losses = {other: tuned[other]["val_loss"] for other in others}
    return min(others, key=lambda other: math.inf if (x := val_losses[other]) is None else x)


def _not_compared(label: str, track: SuiteTrack, tuned: TunedArm | None) -> Answer:
    """Return the answer about one of the user's own arms that is compared with none, which says why."""
    untuned = tuned.get("untuned") if tuned else None
    reason = f"{label} could not be tuned: {untuned}" if untuned else _why_not_compared(label, track)
    return {
        "rival": None,
        "difference": None,
        "against": {},
        "seeds_needed": None,
        "seeds": None,
        "verdict": "untuned" if untuned else "undecided",
        "sentence": reason,
    }


def _why_not_compared(label: str, track: SuiteTrack) -> str:
    arm = track["arms"].get(label)
    if arm is None:
        return f"{label} was not trained: no run that it copies or starts from completed"
    if no_run := _no_run_ended(label, arm):
        return no_run
    if not arm["comparable"]:
        return f"{label} is not compared: it was judged on another text, or on a part of the split"
    if size := other_size(label, track):
        others = size_of(track) or SUITES_SIZE
        return f"{label} is not compared: it has {size}, and the others have {others}"
    return f"{label} is not compared: no other arm of its size and text has a finished run"


def _answer(
    config: Config, label: str, rival: str, against: dict[str, Difference], versus: str | None
) -> Answer:
    for difference in against.values():
        difference["verdict"] = verdict_of(difference)
        undecided = difference["verdict"] == "undecided"
        difference["seeds_needed"] = seeds_needed(difference) if undecided else None
        if undecided and difference["seeds_needed"] is None:
            more = tuning_needed(difference, config.tune.seeds, config.tune.further_seeds)
            difference |= {"tuning_needed": more} if more else {}
    needed = against[rival]["seeds_needed"]
    seeds = None  # the study's own and the further ones needed, unless `seeds` cannot hold so many
    if needed is not None and needed <= MOST_GIVEN:
        seeds = [*config.seeds, *fresh_seeds(config, config.seeds, max(0, needed - len(config.seeds)))]
    return {
        "rival": rival,
        "difference": against[rival],
        "against": against,
        "verdict": against[rival]["verdict"],
        "seeds_needed": needed,
        "seeds": seeds,
        "sentence": sentence(label, rival, against, versus),
    }


def verdict_of(difference: Difference) -> str:
    """Return `better` or `worse` if the joint interval of a difference excludes 0, `level` if it lies within
    ± the margin (Schuirmann 1987), and otherwise `undecided`. An arm that diverged on every one of at least
    two seeds is worse than an arm that diverged on none, however few seeds there are."""
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


def sentence(label: str, rival: str, against: Mapping[str, Difference], versus: str | None = None) -> str:
    """Return an answer, which tells of `versus` by name, as a sentence, such as `cautious against muon, the
    best of the others by validation: −0.0123 nats of test loss [−0.0200, −0.0040], 5 seeds: better; against
    adam undecided: −0.0040 [−0.0100, 0.0020], about 9 seeds would decide it`."""
    d = against[rival]
    best = ", the best of the others by validation" if len(against) > 1 else ""
    first = f"{label} against {rival}{best}: {measured(d)}: {d['verdict']}{_remark(d)}"
    others = {name: x for name, x in against.items() if name != rival}
    told = [name for name in others if name == versus or len(others) < MOST_TOLD]
    for name in told:
        x = others.pop(name)
        # without the words that would repeat the first
        words = measured(x).replace(" nats of test loss", "").removesuffix(f", {count(x['seeds'], 'seed')}")
        first += f"; against {name} {x['verdict']}: {words}{_remark(x)}"
    counts = Counter(x["verdict"] for x in others.values())
    counted = [f"{what} {counts[v]}" for v, what in COUNTED.items() if counts[v]]
    return f"{first}; of the other {len(others)}: {', '.join(counted)}" if counted else first


def measured(d: Difference) -> str:
    """Return a difference in words, with its joint interval and the number of seeds."""
    if d["method"] is None:
        return "no pair of finished runs"
    words, value = "", centre_of(d)
    if d["method"] == "rank":
        lost = d["diverged"]
        words = f"diverged on {lost['arm']} of {d['seeds']} seeds, the other on {lost['reference']}; median "
    words += "difference unbounded" if value is None else f"{value:+.4f} nats of test loss"
    if d["joint_low"] is not None or d["joint_high"] is not None:
        words += f" {show_interval(d['joint_low'], d['joint_high'])}"
    return f"{words}, {count(d['seeds'], 'seed')}".replace("-", "−")


def _remark(d: Difference) -> str:
    """Return a remark: how small the difference is, or what would decide it; empty if there is none."""
    verdict, margin = d["verdict"], d["margin"]
    if verdict == "level":
        return f", no more than {margin:g} nats apart"
    if verdict != "undecided":
        low, high = d["joint_low"], d["joint_high"]
        small = low is not None and high is not None and max(abs(low), abs(high)) <= margin
        return f", though by less than {margin:g} nats" if small else ""
    if d["seeds"] == 1:
        return ", one seed: no interval"
    if d["method"] != "t":
        return ""
    if d["seeds_needed"] is not None:
        return f", about {d['seeds_needed']} seeds would decide it"
    if more := d.get("tuning_needed"):
        needed = f"about {more['tune_seeds']} tuning seeds"
        needed += f" ({more['final_seeds']} more of finalists)" if more["final_seeds"] else ""
        needed += f" and {more['seeds']} seeds" if more["seeds"] > d["seeds"] else ""
        return f", too much luck of the tuning for seeds alone: {needed} would decide it"
    without: Difference = {**d, "luck": {"sd": 0.0, "freedom": 1.0}}
    if mostly_luck(d) and seeds_needed(without) is not None:
        return f", neither {MOST_SEEDS} seeds nor {MOST_TUNED} tuning seeds would decide it"
    return f", more than {MOST_SEEDS} seeds would be needed"


def unfinished(track: SuiteTrack) -> list[str]:
    """Return a clause for each arm without a finished run, such as `hot: no run ended (2 failed: ramps.py:3:
    TypeError)`. These arms have no verdict and are not counted."""
    return [line for label, arm in track["arms"].items() if (line := _no_run_ended(label, arm))]


def _no_run_ended(label: str, arm: Arm) -> str:
    """Return that no run of an arm finished, and why; empty if one did."""
    if set(FINISHED) & set(arm["outcomes"]):
        return ""
    ends = ", ".join(f"{n} {outcome}" for outcome, n in arm["outcomes"].items())
    why = f": {cause.rstrip('.')}" if (cause := arm.get("cause")) else ""
    return f"{label}: no run ended ({ends or 'none has a result'}{why})"


def told_apart(track: SuiteTrack) -> str:
    """Return which arms of a suite differ from their reference arm and which do not, by the interval that
    holds for all arms at once. This is the answer of a suite without arms of the user's own."""
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

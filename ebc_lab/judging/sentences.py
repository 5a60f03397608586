"""What a judgement says in sentences: the answer first, then what qualifies it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .asked import Asked
from .record import DifferenceRecord, Record
from .runs import Runs
from .words import count, listed

METHODS = {
    "t": "Runs with one seed are paired; intervals are Student's t of the differences",
    "rank": "where a run diverged, the median difference has the interval of order statistics",
    "welch": "Intervals are Welch's t of two groups of runs",
    "rank-sum": "where a run diverged, it ranks behind every other and the shift has the Mann-Whitney interval",
    "sigma": "where an arm has one run, the interval rests on the given σ",
}


def outcome_in_words(runs: Runs, asked: Asked) -> str:
    """Return what a run is judged by, such as `the last val_loss of each run`."""
    if not runs.step_name:
        return f"{runs.loss} of each run"
    if asked.outcome == "target":
        sign = "≤" if runs.better == "lower" else "≥"
        return f"{runs.step_name}s to the first {runs.loss} {sign} {asked.target:g}"
    if asked.outcome == "best":
        return f"the best {runs.loss} over the {runs.step_name}s of each run"
    if asked.at:
        where = [f"{arm or 'every arm'} at {step:g}" for arm, step in asked.at.items()]
        return f"the {runs.loss} of {runs.step_name} as asked ({', '.join(where)}), else the last of each run"
    return f"the last {runs.loss} of each run"


def method_in_words(compared: Sequence[Mapping[str, Any]]) -> str:
    """Return how the intervals were made."""
    used = {one["method"] for one in compared if one["method"]}
    text = "; ".join(sentence for method, sentence in METHODS.items() if method in used)
    if not text:
        return "No arm has the two finished runs that an interval needs."
    comparisons = max(one["comparisons"] for one in compared)
    if comparisons > 1:
        by = "Bonferroni's inequality" if used <= {"t", "rank"} else "simulation"
        text += f". Joint intervals hold for all {comparisons} comparisons at once, at 95%, by {by}"
    return f"{text[:1].upper()}{text[1:]}."


def rounded(value: float | None, half_width: float | None = None, *, sign: bool = False) -> str:
    """Return a figure with the digits that its uncertainty leaves: two of the half width, else four
    significant ones."""
    if value is None:
        return "–"
    if half_width and math.isfinite(half_width):
        digits = min(max(1 - math.floor(math.log10(half_width)), 0), 9)
        return f"{value:{'+' if sign else ''}.{digits}f}"
    return f"{value:{'+' if sign else ''}.4g}"


def span(low: float | None, high: float | None) -> str:
    """Return an interval, such as `[-0.0042, -0.0011]`; an infinite end as `∞`."""
    width = (high - low) / 2 if low is not None and high is not None else None
    width = width or next((abs(x) for x in (low, high) if x), None)
    ends = ("−∞" if low is None else rounded(low, width), "∞" if high is None else rounded(high, width))
    return f"[{ends[0]}, {ends[1]}]"


def difference_in_words(one: DifferenceRecord, record: Record) -> str:
    """Return a difference with its joint interval, such as `-0.0040 [-0.0061, -0.0019]`."""
    low, high = one["joint_low"], one["joint_high"]
    centre = one["mean"] if one["mean"] is not None else one["median"]
    if low is None and high is None:
        return f"{rounded(centre, sign=True)}, no interval"
    width = (high - low) / 2 if low is not None and high is not None else None
    joint = f", joint over {one['comparisons']} comparisons" if one["comparisons"] > 1 else ""
    ratio = f"{rounded(centre, width, sign=True)} " if centre is not None else ""
    return f"{ratio}{span(low, high)}{joint}"


def answer(record: Record) -> list[str]:
    """Return what was found, the answer first."""
    arms = record["arms"]
    best = arms[0]
    if len(arms) == 1:
        told = f"{best['arm']}: {record['outcome']} has mean {rounded(best['mean'])} over {count(best['runs'], 'run')}"
        return [f"{told}. It is the only arm, so there is nothing to compare."]
    compared = record["differences"]
    if not record["reference"]:
        return [*_about_best(record), *_of_rule(record)]
    by_verdict = {
        verdict: [one for one in compared if one["verdict"] == verdict]
        for verdict in ("better", "level", "worse", "undecided")
    }
    if len(compared) == 1:
        return [_alone(compared[0], record), *_of_rule(record)]
    lines = []
    reference = record["reference"]
    words = {
        "better": "Better than",
        "level": "Level with",
        "worse": "Worse than",
        "undecided": "Undecided against",
    }
    for verdict, ones in by_verdict.items():
        if ones:
            named = [
                f"{one['arm']} ({difference_in_words({**one, 'comparisons': 1}, record)})" for one in ones
            ]
            lines.append(f"{words[verdict]} {reference}: {listed(named)}.")
    if not by_verdict["better"]:
        lines.insert(0, f"No arm is shown to be better than {reference}.")
    lines.append(f"Intervals are joint over {len(compared)} comparisons.")
    return [*lines, *_needed(by_verdict["undecided"]), *_of_rule(record)]


def _alone(one: DifferenceRecord, record: Record) -> str:
    """Return the answer of a single comparison."""
    arm, reference = one["arm"], one["reference"]
    what = f"{record['outcome']} differs by {difference_in_words(one, record)}"
    runs = f"{one['n_arm']} and {one['n_reference']} runs, {'paired by seed' if record['paired'] else 'unpaired'}"
    if one["verdict"] in ("better", "worse"):
        return f"{arm} is {one['verdict']} than {reference}: {what} ({runs})."
    if one["verdict"] == "level":
        return f"{arm} is level with {reference}, within {one['margin']:g}: {what} ({runs})."
    more = " ".join(_needed([one])) or ""
    if one["joint_low"] is None and one["joint_high"] is None and one["n_arm"] * one["n_reference"] < 4:
        least = one["detectable"]
        of_less = f" of less than {rounded(least)}" if least else ""
        return f"Undecided whether {arm} is better than {reference}: {what}; one run says nothing about a difference{of_less}."
    return f"Undecided whether {arm} is better than {reference}: {what} ({runs}). {more}".rstrip()


def _needed(undecided: Iterable[DifferenceRecord]) -> list[str]:
    """Return about how many runs would decide what is open."""
    known = [one for one in undecided if one["seeds_needed"]]
    if not known:
        return []
    named = [f"{one['arm']} {one['seeds_needed']}" for one in known]
    if len(known) == 1:
        return [
            f"About {known[0]['seeds_needed']} runs an arm would decide it, if the difference is as it seems."
        ]
    return [
        f"About so many runs an arm would decide it, if the differences are as they seem: {listed(named)}."
    ]


def _about_best(record: Record) -> list[str]:
    """Return how the best arm stands to all others, where there is no reference."""
    best = record["arms"][0]["arm"]
    beaten: list[str] = []
    open_ones: list[str] = []
    for one in record["differences"]:
        if best not in (one["arm"], one["reference"]):
            continue
        other = one["reference"] if one["arm"] == best else one["arm"]
        wins = one["verdict"] == ("better" if one["arm"] == best else "worse")
        (beaten if wins else open_ones).append(other)
    extreme = "lowest" if record["better"] == "lower" else "highest"
    mean = record["arms"][0]["mean"]
    of_mean = f" ({rounded(mean, record['arms'][0]['sd'])})" if mean is not None else ""
    first = f"{best} has the {extreme} mean of {record['outcome']}{of_mean}."
    others = len(beaten) + len(open_ones)
    if not open_ones:
        return [f"{first} It is better than every one of the {others} others, jointly over all pairs."]
    if not beaten:
        return [f"{first} It cannot be told from any of the {others} others."]
    return [
        f"{first} It is better than {len(beaten)} of {others} others, and cannot be told from {listed(open_ones)}."
    ]


def _of_rule(record: Record) -> list[str]:
    """Return what another benchmark's rule says beside it."""
    return [str(record["rule"]["sentence"])] if record["rule"] else []

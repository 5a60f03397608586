"""What a judgement says in sentences: the answer first, then what qualifies it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from ebc_lab.config.errors import count, listed
from ebc_lab.study.stages.statistics import CONFIDENCE, centre_of

from .asked import Asked
from .record import DifferenceRecord, Record
from .runs import Runs
from .tuning import turned_figures

VERDICTS = ("better", "level", "worse", "undecided")
MOST_BEATEN = 3  # arms that are named with their differences
METHODS = {
    "t": "Runs with one seed are paired; intervals are Student's t of the differences",
    "rank": "where a run has no finite outcome, the median difference has the interval of order statistics",
    "welch": "Intervals are Welch's t of two groups of runs",
    "rank-sum": "where a run has no finite outcome, it ranks behind all others, and the interval is by ranks",
    "sigma": "where an arm has one run, the interval rests on a σ of {sigma:.3g}",
}


def outcome_in_words(runs: Runs, asked: Asked) -> str:
    """Return what a run is judged by, such as `the last val_loss of each run`."""
    if not runs.step_name:
        return f"the {runs.loss} of each run"
    if asked.outcome == "target":
        sign = "≤" if runs.better == "lower" else "≥"
        return f"{runs.step_name}s to the first {runs.loss} {sign} {asked.target:g}"
    if asked.outcome == "best":
        return f"the best {runs.loss} over the {runs.step_name}s of each run"
    if asked.at:
        if set(asked.at) == {""}:
            return f"the {runs.loss} at {runs.step_name} {asked.at['']:g}"
        return f"the {runs.loss} at the {runs.step_name} asked for, else the last of each run"
    return f"the last {runs.loss} of each run"


def method_in_words(compared: Sequence[Mapping[str, Any]], luck: bool, sigma: float | None) -> str:
    """Return how the intervals were made. `luck`: whether they allow for the luck of a tuning; `sigma`: the
    standard deviation of a run that was assumed."""
    if not compared:
        return "There is one arm, and so nothing is compared."
    used = {one["method"] for one in compared if one["method"]}
    text = "; ".join(sentence for method, sentence in METHODS.items() if method in used)
    text = text.format(sigma=sigma)
    if not text:
        notes = {one["note"] for one in compared if one["note"]}
        return f"Nothing is tested ({'; '.join(sorted(notes))})." if notes else "Nothing is compared."
    text += ", widened for what other seeds would have made of the tuning" if luck else ""
    comparisons = max(one["comparisons"] for one in compared)
    if comparisons > 1:
        by = "Bonferroni's inequality"
        if sum(one["method"] == "welch" for one in compared) > 1:
            by = "simulation where both arms have enough runs, else by Bonferroni's inequality"
        text += f". Joint intervals hold for all {comparisons} comparisons at once, at 95%, by {by}"
    return f"{text[:1].upper()}{text[1:]}."


def rounded(value: float | None, half_width: float | None = None, *, sign: bool = False) -> str:
    """Return a figure with two digits of its half width; without one, with four significant digits."""
    if value is None:
        return "–"
    if half_width and math.isfinite(half_width):
        digits = min(max(1 - math.floor(math.log10(half_width)), 0), 9)
        return f"{value:{'+' if sign else ''}.{digits}f}"
    return f"{value:{'+' if sign else ''}.4g}"


def span(low: float | None, high: float | None) -> str:
    """Return the interval of a difference, such as `[-0.0042, -0.0011]`; an infinite end as `∞`."""
    width = (high - low) / 2 if low is not None and high is not None else None
    width = width or next((abs(x) for x in (low, high) if x), None)
    ends = (
        "−∞" if low is None else rounded(low, width, sign=True),
        "∞" if high is None else rounded(high, width, sign=True),
    )
    return f"{'(' if low is None else '['}{', '.join(ends)}{')' if high is None else ']'}"


def size_in_words(one: DifferenceRecord) -> str:
    """Return a difference without its sign, with its joint interval: `0.0040 [0.0019, 0.0061]`."""
    if (centre_of(one) or 0.0) < 0:
        one = cast(DifferenceRecord, turned_figures(one))
    return difference_in_words(one).replace("+", "")


def difference_in_words(one: DifferenceRecord) -> str:
    """Return a difference with its joint interval, such as `-0.0040 [-0.0061, -0.0019]`."""
    low, high, centre = one["joint_low"], one["joint_high"], centre_of(one)
    if centre is None and low is None and high is None:
        return "no finite difference"
    if low is None and high is None:
        return f"{rounded(centre, sign=True)}, no interval"
    width = (high - low) / 2 if low is not None and high is not None else None
    return f"{rounded(centre, width, sign=True)} {span(low, high)}"


def answer(record: Record) -> list[str]:
    """Return what was found, the answer first."""
    best, *others = record["arms"]
    by = f"By {record['outcome']},"
    if not others and not best["completed"]:
        return [f"{by} no run of {best['arm']}, the only arm, has a finite outcome."]
    if not others:
        mean = rounded(best["mean"], best["sd"])
        runs = count(best["runs"], "run")
        return [
            f"{by} {best['arm']} has mean {mean} over {runs}: the only arm, so there is nothing to compare."
        ]
    compared = record["differences"]
    if not any(arm["completed"] for arm in record["arms"]):
        lacks = "reached the target" if "unit" in record else "has a finite outcome"
        lines = [f"{by} no run of any arm {lacks}, so no arm can be called better."]
    elif not any(one["method"] for one in compared):
        first = f"{best['arm']} is the best of {len(others) + 1} arms"
        level = [arm["arm"] for arm in record["arms"] if arm["mean"] == best["mean"] is not None]
        if len(level) > 1:
            first = f"{listed(level)} have the same mean, {rounded(best['mean'])}"
            first += f", the best of {len(others) + 1} arms" * (len(level) <= len(others))
        lines = [f"{by} {first}; nothing says if by more than luck."]
        if all(arm["runs"] == 1 for arm in record["arms"]):
            lines.append(
                "Each arm has one run, and one run does not show how far another one would lie from it."
            )
    elif "chain" in record:
        lines = _along_chain(record, by)
    elif not record["reference"]:
        first, *rest = _about_best(record)
        lines = [f"{by} {first}", *rest]
    elif len(compared) == 1:
        lines = [f"{by} {_alone(compared[0], record)}"]
    else:
        lines = _against_reference(record, by)
    rule = record["rule"]
    return [*lines, *([str(rule["sentence"])] if rule else [])]


def _alone(one: DifferenceRecord, record: Record) -> str:
    """Return the answer of a single comparison."""
    arm, reference = one["arm"], one["reference"]
    how = "paired by seed" if record["paired"] else "unpaired"
    evidence = f"{difference_in_words(one)} ({one['n_arm']} and {one['n_reference']} runs, {how})."
    if one["verdict"] in ("better", "worse"):
        return f"{arm} is {one['verdict']} than {reference}: {evidence}"
    if one["verdict"] == "level":
        return f"{arm} is level with {reference}, within {one['margin']:g}: {evidence}"
    undecided = f"it is undecided whether {arm} is better than {reference}: {evidence}"
    return " ".join([undecided, *_needed([one])])


def _against_reference(record: Record, by: str) -> list[str]:
    """Return the answer of several comparisons with one reference, a line for each verdict."""
    reference, compared = record["reference"], record["differences"]
    of = {verdict: [one for one in compared if one["verdict"] == verdict] for verdict in VERDICTS}
    lines = []
    if len(of["worse"]) == len(compared):
        beaten = listed(f"{x['arm']} (by {size_in_words(x)})" for x in compared)
        lines.append(f"{reference} is better than {beaten}.")
    else:
        lines.append("" if of["better"] else f"no arm is shown to be better than {reference}.")
        for verdict in ("better", "level", "worse"):
            if of[verdict]:
                named = listed(f"{x['arm']} ({difference_in_words(x)})" for x in of[verdict])
                relation = f"{verdict} {'with' if verdict == 'level' else 'than'}"
                lines.append(f"{named} {'is' if len(of[verdict]) == 1 else 'are'} {relation} {reference}.")
    lines = [line for line in lines if line]
    lines[0] = f"{by} {lines[0]}"
    if of["undecided"]:
        named = listed(f"{x['arm']} ({difference_in_words(x)})" for x in of["undecided"])
        lines.append(f"Undecided: {named}.")
    together = count(compared[0]["comparisons"], "comparison")
    return [*lines, *_needed(of["undecided"]), f"Intervals are joint over {together}."]


def _along_chain(record: Record, by: str) -> list[str]:
    """Return which arms of a chain are better than the one before, at equal steps if a step has a worth."""
    lengths = record["lengths"] or {"differences": []}
    compared, how = record["differences"], by.removeprefix("By ").rstrip(",")
    if lengths["differences"]:
        compared = lengths["differences"]
        how = f"each at its own steps, a step being worth {lengths['exchange']:.3g}"
    named: dict[str, list[str]] = {"better": []}
    for one in compared:
        named.setdefault(one["verdict"], []).append(one["arm"])
    better = len(named["better"])
    first = f"{better} of {len(compared)} arms {'is' if better == 1 else 'are'} better than the one before"
    groups = {verdict: arms for verdict, arms in named.items() if arms}
    lines = [f"{verdict.capitalize()}: {listed(arms, len(arms))}." for verdict, arms in groups.items()]
    return [f"{first}, jointly ({how}).", *lines]


def _about_best(record: Record) -> list[str]:
    """Return how the best arm stands to all others, where there is no reference."""
    first, *others = record["arms"]
    best = first["arm"]
    beaten, open_ones = [], []
    for one in record["differences"]:
        if best not in (one["arm"], one["reference"]):
            continue
        is_arm = one["arm"] == best
        other = one["reference" if is_arm else "arm"]
        if one["verdict"] == ("better" if is_arm else "worse"):
            beaten.append(f"{other} (by {size_in_words(one)})")
        else:
            open_ones.append(other)
    end = "lowest" if record["better"] == "lower" or "unit" in record else "highest"
    told = f"{best} ranks first"
    if first["mean"] is not None:
        told = f"{best} has the {end} mean, {rounded(first['mean'], first['sd'])}"
    if not beaten:
        return [f"{told}, and no other arm can be separated from it."]
    shown = listed(beaten) if len(beaten) <= MOST_BEATEN else f"{len(beaten)} of the {len(others)} other arms"
    lines = [f"{told}, and is better than {shown}, jointly over all pairs."]
    if open_ones:
        lines.append(f"{best} and {listed(open_ones)} cannot be separated.")
    return lines


def _needed(undecided: Sequence[DifferenceRecord]) -> list[str]:
    """Return about how many runs would decide what is open, and where too few for any answer by ranks are."""
    known = [one for one in undecided if one["seeds_needed"]]
    lines = []
    if known and len(undecided) == 1:
        runs = known[0]["seeds_needed"]
        lines.append(
            f"About {runs} fresh runs an arm would decide it four times in five, if the difference is what "
            "it seems."
        )
    elif known:
        named = listed(f"{one['arm']} {one['seeds_needed']}" for one in known)
        lines.append(
            "Fresh runs an arm that would decide four times in five, if the differences are what they seem: "
            f"{named}."
        )
    for one in undecided:
        fewest = _fewest_by_rank(one)
        if min(one["n_arm"], one["n_reference"]) < fewest:
            pair = f"{one['arm']} and {one['reference']}"
            lines.append(
                f"{pair} are compared by ranks, since a run diverged, and then fewer than {fewest} runs an "
                "arm decide nothing."
            )
    return lines


def _fewest_by_rank(one: DifferenceRecord) -> int:
    """Return the fewest runs an arm of which ranks can exclude no difference, jointly; 0 of other methods."""
    if one["method"] not in ("rank", "rank-sum"):
        return 0
    level = (1 - CONFIDENCE) / one["comparisons"]
    for runs in itertools.count(2):
        orders = 2**runs if one["method"] == "rank" else math.comb(2 * runs, runs)
        if 2 / orders <= level:
            return runs
    raise AssertionError

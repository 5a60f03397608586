"""Runs that somebody else made, judged: what only some of them say. How each arm was tuned, how soon it
reaches the target, what a step is worth, and what another benchmark's rule finds.

A table without rows is not shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ebc_lab.judging.record import Record
from ebc_lab.study.stages.statistics import centre_of, in_octaves

from ..text.table import PAGE, PAPER, TERMINAL, Cell, Column, Table, filled
from ..text.words import NOTHING, brackets, brief, fixed, setting
from .judged_figures import Shown, in_steps, p_value, settings_in_words, verdict_cell

# why an interval of ratios ends at 0 or at ∞
OPEN_AT_TARGET = "an end is open where runs never reached the target, or had no evaluation before they did"
OPEN_LENGTH = "an end is open where it lies beyond the lengths that were trained"
RATIOS = {"fewer": "pass", "more": "fail", "undecided": "undecided"}  # verdict -> badge


def tables(record: Record, shown: Shown) -> list[Table]:
    """Return the tables of what the record has."""
    unit, made = record["step"], []
    if tuned := record["tuning"]:
        made.append(tuning(tuned, shown))
    if steps := record["steps"]:
        title = f"Ratio of {unit}s to the target"
        made.append(steps_to_target(steps, unit, record))
        made.append(ratios("ratios", title, steps["ratios"], unit, OPEN_AT_TARGET))
    if lengths := record["lengths"]:
        made += [exchange(lengths, unit, shown), at_equal_steps(lengths, unit, shown)]
        title = f"Ratio of {unit}s to an equal loss"
        made.append(ratios("speedups", title, lengths["ratios"], unit, OPEN_LENGTH))
    if rule := record["rule"]:
        made += [standings(rule, shown), claims(rule, record, shown)]
    return made


# -- tuning --------------------------------------------------------------------------------------------------


def tuning(found: Mapping[str, Any], shown: Shown) -> Table:
    """Return how much was tried of each arm, what was chosen, and what that says at an equal budget."""
    budget = found["budget"]
    columns = (
        Column("Arm", "name", short="arm", head=True),
        Column("Configurations", "figure", brief, "tried"),
        Column("Runs", "figure", brief, "runs"),
        Column("Chosen", "prose", short="chosen", optional=True),
        Column("At the edge of", "prose", short="at the edge of", optional=True),
        Column("Learning-rate window", "figure", short="lr window", optional=True),
        Column(f"Expected best of {budget}", "figure", shown.value, f"best of {budget}", optional=True),
        Column("Its median", "figure", short="its median", on=(PAGE,), optional=True),
        Column("Luck of the tuning", "figure", shown.spread, "luck", optional=True),
        Column("Optimism", "figure", shown.spread, "optimism", on=(PAGE, PAPER), optional=True),
        Column("Ties", "figure", brief, "ties", on=(PAGE,), optional=True),
    )
    rows = [filled(columns, _tuned(arm, tuned, budget, shown)) for arm, tuned in found["arms"].items()]
    reported = "the same values are" if found["same"] else f"{found['reported']} is"
    note = f"chosen by {found['chosen_by']}; {reported} reported{', which flatters' * found['same']}; "
    note += f"expected best: of {budget} of the arm’s configurations, "
    note += "drawn at random, which a grid is not"
    if any(tuned["luck"] and tuned["luck"]["sd"] for tuned in found["arms"].values()):
        note += "; luck: standard deviation of the result, had other seeds chosen the configuration"
    if any(tuned["optimism"] for tuned in found["arms"].values()):
        note += "; optimism: how much too good the chosen mean is, on average, for having been chosen"
    return Table("tuning", "Tuning", columns, rows, note, "How each arm was tuned.")


def _tuned(arm: str, tuned: Mapping[str, Any], budget: int, shown: Shown) -> tuple[Any, ...]:
    at = next((e for e in tuned["expected"] if e["k"] == budget), None)
    span, luck = tuned["window"], tuned["luck"]
    edges = (f"{edge['setting']} {setting(edge['value'])}" for edge in tuned["edges"] if edge["end"])
    limits = brackets(at["low"], at["high"], shown.value) if at else NOTHING
    median = "" if at is None or at["median"] is None else f"{shown.value(at['median'])} {limits}"
    return (
        arm,
        tuned["configurations"],
        tuned["runs"],
        Cell(settings_in_words(tuned["chosen"]["settings"])),
        Cell(", ".join(edges)),
        Cell(in_octaves(span), span["octaves"]) if span else Cell(),
        at["expected"] if at else Cell(),
        Cell(median.removesuffix(f" {NOTHING}"), at["median"] if at else None),
        luck["sd"] if luck else Cell(),
        tuned["optimism"] or Cell(),
        tuned["ties"] or Cell(),
    )


# -- steps ---------------------------------------------------------------------------------------------------


def steps_to_target(found: Mapping[str, Any], unit: str, record: Record) -> Table:
    """Return how soon the runs of each arm reach the target."""
    columns = (
        Column("Arm", "name", short="arm", head=True),
        Column(f"Median {unit}", "figure", in_steps, "median"),
        Column("Interval of the median", "figure", short="interval"),
        Column("Reached it", "figure", short="reached"),
        Column("First", "figure", in_steps, "first"),
        Column("Last", "figure", in_steps, "last"),
        Column("Mean", "figure", in_steps, "mean", on=(PAGE,)),
        Column("Ended before others reached it", "figure", brief, "ended early", optional=True),
        Column("Above it again", "figure", brief, "above again", optional=True),
        Column("Evaluations apart", "figure", in_steps, "apart"),
    )
    rows = []
    for arm, reached in sorted(found["arms"].items(), key=lambda item: _soonest(item[1])):
        sure = reached["confidence"]
        limits = brackets(reached["low"], reached["high"], in_steps)
        values = (
            arm,
            reached["median"],
            Cell(limits + (f" {100 * sure:.3g}%" if sure and limits != NOTHING else ""), reached["low"]),
            Cell(f"{reached['reached']} of {reached['runs']}", reached["reached"]),
            reached["first"],
            reached["last"],
            reached["mean"],
            reached["ended_early"] or Cell(),
            reached["returned"] or Cell(),
            reached["between"],
        )
        rows.append(filled(columns, values))
    goal = f"{record['loss']} {'at least' if record['better'] == 'higher' else 'at most'} {found['target']:g}"
    note = f"{goal}; a run that never reached it ranks behind those that did"
    title = f"{unit.capitalize()}s to the target"
    return Table("steps", title, columns, rows, note, f"{title}.")


def _soonest(reached: Mapping[str, Any]) -> tuple[float, int]:
    """Return the key that puts the arm first that is first there, and arms whose median run is not last."""
    median = reached["median"]
    return math.inf if median is None else median, -reached["reached"]


def ratios(name: str, title: str, found: Sequence[Mapping[str, Any]], unit: str, open_end: str) -> Table:
    """Return the ratios of two arms’ steps. `open_end`: why an end of an interval may not be known."""
    columns = (
        Column("Arm", "name", short="arm", head=True),
        Column("Against", "name", short="against"),
        Column("Ratio", "figure", _times, "ratio"),
        Column("Joint interval", "figure", short="joint interval"),
        Column("Verdict", short="verdict"),
        Column("Remark", "prose", short="remark", optional=True),
    )
    rows = []
    for ratio in found:
        verdict = Cell(ratio["verdict"], tone=RATIOS[ratio["verdict"]])
        low, high = ratio["low"], ratio["high"]
        limits = Cell(brackets(low, high, partial(fixed, digits=3), least="0"), low)
        remark = "no finer than the evaluations are apart" if ratio["coarse"] else ""
        values = (ratio["arm"], ratio["reference"], ratio["ratio"], limits, verdict, Cell(remark))
        rows.append(filled(columns, values))
    note = f"{unit}s of the arm over those of the other: below 1 it needs fewer; 95%, joint over all"
    if any((ratio["low"] is None) != (ratio["high"] is None) for ratio in found):
        note += f"; {open_end}"
    return Table(name, title, columns, rows, note, f"{title}.")


def _times(x: float | None) -> str:
    return NOTHING if x is None else f"×{x:.3f}"


def exchange(found: Mapping[str, Any], unit: str, shown: Shown) -> Table:
    """Return what a step is worth to the arms that were trained for several lengths."""
    columns = (
        Column("Arm", "name", short="arm", head=True),
        Column("Lengths", "prose", short="lengths"),
        Column("Runs", "figure", brief, "runs"),
        Column(f"Worth of 100 {unit}s", "figure", shown.spread, f"of 100 {unit}s"),
        Column("95% interval", "figure", short="95% interval"),
    )
    rows = []
    for arm, rate in found["rates"].items():
        low, worth, high = (
            None if x is None else 100 * x for x in (rate["low"], rate["per_step"], rate["high"])
        )
        lengths = ", ".join(map(in_steps, rate["lengths"]))
        limits = Cell(brackets(low, high, shown.spread), low)
        rows.append(filled(columns, (arm, Cell(lengths), rate["runs"], worth, limits)))
    note = f"how much better, in {shown.unit}, longer runs end: the slope of a line through their last values"
    if found["exchange"] is None:
        note += f"; no arms are compared at equal steps by it, since {found['by']}"
    return Table("exchange", f"What {unit}s are worth", columns, rows, note, "The exchange rate.")


def at_equal_steps(found: Mapping[str, Any], unit: str, shown: Shown) -> Table:
    """Return the differences as if each arm had taken as many steps as the shortest, at an exchange rate."""
    columns = (
        Column("Arm", "name", short="arm", head=True),
        Column("Against", "name", short="against"),
        Column(f"{unit.capitalize()}s", "figure", short=f"{unit}s"),
        Column("Difference at equal steps", "figure", shown.change, "difference"),
        Column("Joint interval", "figure", short="joint interval"),
        Column("Verdict", short="verdict"),
    )
    rows = []
    for d in found["differences"]:
        taken = " / ".join(in_steps(found["lengths"][name]) for name in (d["arm"], d["reference"]))
        limits = Cell(brackets(d["joint_low"], d["joint_high"], shown.change), d["joint_low"])
        values = (d["arm"], d["reference"], Cell(taken), centre_of(d), limits, verdict_cell(d))
        rows.append(filled(columns, values))
    worth, note = found["exchange"], ""
    if worth:
        note = f"100 {unit}s more are charged {shown.spread(100 * worth)} of loss, {found['by']}"
        note += " and taken for exact" * (found["by"] == "as given")
    title = f"Differences at equal {unit}s"
    return Table("equal", title, columns, rows, note, f"{title}.")


# -- another benchmark's rule --------------------------------------------------------------------------------


def standings(rule: Mapping[str, Any], shown: Shown) -> Table:
    """Return each arm's result by track3's rule, and what its runs' own spread says of it."""
    columns = (
        Column("Arm", "name", short="arm", head=True),
        Column("Step", "figure", in_steps, "step"),
        Column("Mean there", "figure", shown.value, "mean"),
        Column("Runs", "figure", brief, "runs"),
        Column("Counts", short="counts"),
        Column("p, σ as assumed", "figure", p_value, "p, σ assumed"),
        Column("p, σ of the runs", "figure", p_value, "p, own σ"),
        Column("σ of the runs", "figure", shown.spread, "own σ"),
        Column("Its interval", "figure", short="interval of σ", on=(PAGE, TERMINAL)),
    )
    rows = []
    for x in rule["standings"]:
        holds = Cell("yes" if x["holds"] else "no", tone="pass" if x["holds"] else "fail")
        sigma = Cell(brackets(x["sd_low"], x["sd_high"], shown.spread), x["sd_low"])
        values = (x["arm"], x["step"], x["mean"], x["runs"], holds, x["p"], x["p_own"], x["sd"], sigma)
        rows.append(filled(columns, values))
    spread = rule["spread"]
    note = f"{rule['sentence']} Each at the first step at which the rule holds, else at the last; one-sided p"
    if spread["pooled"]:
        limits = brackets(spread["low"], spread["high"], shown.spread)
        note += f"; σ pooled over the arms {shown.spread(spread['pooled'])} {limits}"
        note += f", all equal: p = {p_value(spread['p_equal'])}" if spread["p_equal"] is not None else ""
    return Table("rule", "By track3’s rule", columns, rows, note, "Results by track3’s rule.")


def claims(rule: Mapping[str, Any], record: Record, shown: Shown) -> Table:
    """Return track3's comparisons of two results beside our verdict, where that pair was compared."""
    at_equal_steps = (record["lengths"] or {"differences": []})["differences"]
    compared = at_equal_steps or record["differences"]
    ours = {(d["arm"], d["reference"]): d["verdict"] for d in compared if d["method"]}
    turned = {"better": "worse", "worse": "better"}
    ours |= {(b, a): turned.get(verdict, verdict) for (a, b), verdict in ours.items()}
    columns = (
        Column("Arm", "name", short="arm", head=True),
        Column("Against", "name", short="against"),
        Column("Lower by", "figure", shown.change, "lower by"),
        Column("Worth of the steps", "figure", shown.change, "steps’ worth"),
        Column("p, σ as assumed", "figure", p_value, "p, σ assumed"),
        Column("By the rule", short="by the rule"),
        Column("By the joint interval", short="jointly", optional=True),
    )
    rows = []
    for c in rule["claims"]:
        holds = Cell("better" if c["holds"] else "not shown", tone="pass" if c["holds"] else "undecided")
        own = ours.get((c["arm"], c["other"]), "")
        values = (c["arm"], c["other"], c["lower_by"], c["worth"], c["p"], holds, Cell(own))
        rows.append(filled(columns, values))
    worth = "with" if at_equal_steps else "the losses alone, without"
    note = f"each result against the one before it; jointly: {worth} the worth of the steps"
    title = "One result against another, by track3’s rule"
    return Table("claims", title, columns, rows, note, f"{title}.")

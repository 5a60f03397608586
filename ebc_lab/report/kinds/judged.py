"""Runs that somebody else made, judged: the tables of the answer, for terminal, page and papers alike.

Everything here is a pure function of a judgement's record (`ebc_lab.judging.record`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ebc_lab.judging.record import ArmRecord, Caution, DifferenceRecord, Record
from ebc_lab.study.stages.statistics import centre_of

from ..text.table import PAGE, PAPER, TERMINAL, Cell, Column, Row, Table, filled
from ..text.words import NOTHING, brackets, brief, plural
from . import judged_further
from .judged_figures import Shown, in_steps, p_value, settings_in_words, verdict_cell
from .kind import Tile

FEW_RUNS = 5  # up to so many, an arm's median is shown with its interval
LONGEST_HEADLINE = 200  # characters
NAMED = 6  # runs that a caution names


def tables(record: Record) -> list[Table]:
    """Return every table that has something to say, in the order of the page."""
    shown = Shown.of(record)
    made = (
        _arms(record, shown),
        _differences(record, shown),
        *judged_further.tables(record, shown),
        _columns(record),
        _cautions(record),
    )
    return [table for table in made if table.rows]


# -- arms and differences ------------------------------------------------------------------------------------


def _arms(record: Record, shown: Shown) -> Table:
    lost = "diverged" if shown.unit == record["loss"] else "never there"  # of steps to a target
    columns = (  # on a phone the first three are on screen
        Column("Arm", "name", short="arm", head=True),
        Column("Mean", "figure", shown.value, "mean"),
        Column("Interval", "figure", short="interval", optional=True),
        Column("Deviation", "figure", shown.spread, "sd", optional=True),
        Column("Runs", "figure", brief, "runs"),
        Column(lost.capitalize(), "figure", short=lost, optional=True),
        Column("Median", "figure", shown.value, "median", on=(PAGE,)),
        Column("Interval of the median", "figure", short="of the median", on=(PAGE,), optional=True),
        Column("Lowest", "figure", shown.value, "lowest", on=(PAGE,)),
        Column("Highest", "figure", shown.value, "highest", on=(PAGE,)),
        Column("Length", "figure", in_steps, "length", on=(PAGE, TERMINAL), optional=True),
        Column("Judged at", "figure", in_steps, "at", optional=True),
        Column("Configuration", "prose", short="configuration", optional=True),
    )
    rows = [_arm(arm, columns, shown, arm["arm"] == record["reference"]) for arm in record["arms"]]
    note = f"{record['outcome']}; {'more' if shown.higher else 'less'} is better; 95% t-intervals of the mean"
    if any(arm["diverged"] for arm in record["arms"]):
        such = "diverged" if lost == "diverged" else "never got there"
        note += (
            f"; a run that {such} ranks behind every other, so its arm has no mean but a median, with the "
        )
        note += "interval of order statistics at the confidence beside it"
    return Table("arms", "Arms", columns, rows, note, f"Arms by {shown.unit}.")


def _arm(arm: ArmRecord, columns: Sequence[Column], shown: Shown, chosen: bool) -> Row:
    rank = _interval_of_median(arm, shown)
    mean, limits = Cell(shown.value(arm["mean"]), arm["mean"]), brackets(arm["low"], arm["high"], shown.value)
    interval = Cell(limits, arm["low"])
    if arm["mean"] is None and arm["median"] is not None:
        median = shown.value(arm["median"])
        mean, interval = Cell(f"median {median}", arm["median"], page=NOTHING), rank
    values = (
        Cell(arm["arm"], page=arm["arm"], note="reference" if chosen else ""),
        mean,
        interval,
        None if arm["mean"] is None else arm["sd"],
        arm["runs"],
        Cell(str(arm["diverged"]) if arm["diverged"] else "", arm["diverged"]),
        arm["median"],
        rank,
        arm["lowest"],
        arm["highest"],
        arm["length"],
        arm["at"],
        Cell(settings_in_words(arm["configuration"])),
    )
    return filled(columns, values, chosen=chosen)


def _interval_of_median(arm: ArmRecord, shown: Shown) -> Cell:
    """Return the distribution-free interval where the t-interval is not there or rests on few runs."""
    if not arm["diverged"] and arm["runs"] > FEW_RUNS:
        return Cell()
    limits = brackets(arm["median_low"], arm["median_high"], shown.value)
    sure = arm["median_confidence"]
    return Cell(f"{limits} {100 * sure:.3g}%" if sure and limits != NOTHING else limits, arm["median_low"])


def in_order(record: Record) -> list[DifferenceRecord]:
    """Return the differences, those of the best arm first."""
    place = {arm["arm"]: nth for nth, arm in enumerate(record["arms"])}
    if "chain" in record:
        return record["differences"]
    return sorted(record["differences"], key=lambda d: (place[d["arm"]], place[d["reference"]]))


def _differences(record: Record, shown: Shown) -> Table:
    found = in_order(record)
    references = {d["reference"] for d in found}
    several = len(references) > 1
    columns = (  # on a phone the first three are on screen
        Column("Arm", "name", short="arm", head=True),
        Column("Against", "name", short="against", optional=True),
        Column("Difference", "figure", short="difference"),
        Column("Verdict", short="verdict"),
        Column("Drawn", "drawing", on=(PAGE,)),
        Column("Joint interval", "figure", short="joint interval"),
        Column("Interval by itself", "figure", short="by itself", on=(PAGE,)),
        Column("p, jointly", "figure", p_value, "p joint"),
        Column("Runs", "figure", short="runs", on=(PAGE, PAPER)),
        Column("Detectable", "figure", shown.value, "detectable", on=(PAGE, PAPER), optional=True),
        Column("Runs to decide", "figure", brief, "to decide", optional=True),
        Column("By", short="by", on=(PAGE,), optional=True),
    )
    methods = {d["method"] for d in found}
    rows = [filled(columns, _difference(d, shown, several, len(methods) > 1)) for d in found]
    together = max((d["comparisons"] for d in found), default=0)
    minus = "the other" if several else "".join(references)
    note = f"in {shown.unit}, arm minus {minus}; {shown.best}; {100 * record['confidence']:g}% intervals"
    note += f", joint over {together} comparisons" if together > 1 else ""
    note += "; luck of the tuning included" if _has_luck(record) else ""
    if any(d["seeds_needed"] for d in found):
        note += "; to decide: about so many runs an arm"
    margin = record["margin"]
    note += f"; level: within {margin:g}" if margin else ""
    title = "Differences between arms" if several else f"Differences from {minus}"
    caption = f"{title}, in {shown.unit}."
    return Table(
        "differences", title, columns, rows, note, caption, target=margin or None, higher=shown.higher
    )


METHODS = {
    "t": "t, paired by seed",
    "rank": "ranks, paired by seed",
    "welch": "Welch’s t",
    "rank-sum": "rank sums",
    "sigma": "σ as given",
}


def _difference(d: DifferenceRecord, shown: Shown, several: bool, method: bool) -> tuple[Any, ...]:
    """Return a comparison's cells; whom it is with, and by what `method`, where there are `several`."""
    middle = centre_of(d)
    text = shown.change(middle)
    by_rank = d["mean"] is None and middle is not None
    return (
        d["arm"],
        d["reference"] if several else Cell(),
        Cell(f"median {text}" if by_rank else text, middle),
        verdict_cell(d),
        Cell(page="none", interval=d),
        Cell(brackets(d["joint_low"], d["joint_high"], shown.change), d["joint_low"]),
        Cell(brackets(d["low"], d["high"], shown.change), d["low"]),
        d["p_joint"],
        Cell(f"{d['n_arm']} / {d['n_reference']}", d["n_arm"]),
        d["joint_detectable"],
        d["seeds_needed"] or Cell(),
        Cell(METHODS.get(d["method"] or "", "too few runs") if method else ""),
    )


def _has_luck(record: Record) -> bool:
    """Return whether intervals allow for the luck of a tuning."""
    tuned = (record["tuning"] or {"arms": {}})["arms"].values()
    return any(one["luck"] and one["luck"]["sd"] for one in tuned)


# -- what else there is to know ------------------------------------------------------------------------------


def _columns(record: Record) -> Table:
    columns = (
        Column("Role", short="role", head=True),
        Column("Column", "name", short="column"),
        Column("What it was taken for", "prose", short="taken for"),
    )
    rows = [filled(columns, (t["role"], t["column"], t["sentence"])) for t in record["taken"]]
    return Table("columns", "What was taken for what", columns, rows, places=(PAGE, TERMINAL))


def _cautions(record: Record) -> Table:
    """Return the cautions for a paper; the page has them below its answer, the terminal one a line."""
    columns = (
        Column("Caution", "prose", short="caution"),
        Column("Runs", "prose", short="runs", optional=True),
    )
    rows = [filled(columns, (c["sentence"], Cell(runs_of_caution(c)))) for c in record["cautions"]]
    places = (PAPER,)
    return Table("cautions", "Cautions", columns, rows, "", "What to know of these runs.", places=places)


def runs_of_caution(caution: Caution) -> str:
    """Return the names of a caution's runs, as long as they are few and its sentence does not name them."""
    unnamed = [run for run in caution["runs"] if run not in caution["sentence"]]
    return ", ".join(caution["runs"]) if unnamed and len(caution["runs"]) <= NAMED else ""


# -- the answer ----------------------------------------------------------------------------------------------


def question(record: Record) -> str:
    """Return what is asked of the runs."""
    arms, reference = [arm["arm"] for arm in record["arms"]], record["reference"]
    others = [arm for arm in arms if arm != reference]
    if "chain" in record:
        return f"Is each arm better than the one before, in {record['loss']}?"
    if not reference:
        return f"Which arms differ in {record['loss']}?"
    if len(others) == 1:
        return f"Is {others[0]} better than {reference}?"
    return f"Is any arm better than {reference}?" if others else f"What do the runs of {reference} say?"


ALONE = {  # verdict of the only comparison -> the answer
    "better": "{arm} is better than {reference}.",
    "worse": "{arm} is worse than {reference}.",
    "level": "{arm} is level with {reference}.",
    "undecided": "Whether {arm} is better than {reference} is undecided.",
}


def headline(record: Record) -> str:
    """Return the answer in one sentence that a title has room for: the first of the answer, or, where that
    names many arms, how many are better."""
    first = record["answer"][0]
    if len(first) <= LONGEST_HEADLINE or not record["reference"]:
        return first
    if len(record["differences"]) == 1:
        return ALONE[record["differences"][0]["verdict"]].format(**record["differences"][0])
    counts = Counter(d["verdict"] for d in record["differences"])
    of = plural(counts.total(), "arm")
    better = counts.pop("better", 0)
    rest = ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common())
    text = f"{better or 'None'} of {of} {'are' if better > 1 else 'is'} better than {record['reference']}"
    return f"{text}: {rest}." if rest else f"{text}."


def judged(record: Record) -> str:
    """Return beats, meets, misses or undecided: the colour of the answer."""
    found = {d["verdict"] for d in record["differences"] if d["method"]}
    if not record["reference"] and "chain" not in record:
        best = record["arms"][0]["arm"]
        its = {d["verdict"] for d in record["differences"] if best in (d["arm"], d["reference"])}
        return "beats" if its and its <= {"better", "worse"} else "undecided"
    if "better" in found:
        return "beats"
    if not found or "undecided" in found:
        return "undecided"
    return "meets" if "level" in found else "misses"


def tiles(record: Record) -> list[Tile]:
    """Return the difference that the answer is about: the first one that is decided for the better, else the
    first; where all pairs are compared, of the best arm from another."""
    shown = Shown.of(record)
    at_equal_steps = (record["lengths"] or {"differences": []})["differences"]
    compared = at_equal_steps if "chain" in record and at_equal_steps else in_order(record)
    found = [d for d in compared if d["method"] and centre_of(d) is not None]
    claimed = "better"
    if not record["reference"] and "chain" not in record:
        best = record["arms"][0]["arm"]
        found = [d for d in found if d["reference"] == best]  # as in every pair that it is in
        claimed = "worse"
    if not found:
        return []
    d = next((d for d in found if d["verdict"] == claimed), found[0])
    limits = brackets(d["joint_low"], d["joint_high"], shown.change)
    over = f", joint over {d['comparisons']} comparisons" if d["comparisons"] > 1 else ""
    runs = f"{d['n_arm']} and {plural(d['n_reference'], 'run')}"
    remark = f"{limits} ({100 * record['confidence']:g}%{over}, {runs})"
    return [Tile(f"{d['arm']} minus {d['reference']}", shown.change(centre_of(d)), shown.unit, remark)]

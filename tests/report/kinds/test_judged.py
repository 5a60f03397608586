"""The tables of judged runs: what a reader sees of an arm, a difference, a tuning, steps and a rule."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from support.judged import record_of, runs_of

from ebc_lab.judging import rules, tuning
from ebc_lab.report.kinds import judged
from ebc_lab.report.kinds.judged_figures import Shown, decimals_of, in_steps, p_value
from ebc_lab.report.page.ruler import draw_intervals
from ebc_lab.report.text.table import PAGE, PAPER, TERMINAL, Table
from ebc_lab.report.text.words import brackets

ARMS = {
    "muon": [3.2705, 3.272, 3.2735, 3.272],
    "adamw": [3.2785, 3.2815, 3.2800, 3.2800],
    "lion": [3.279, 3.285, 3.280, 3.281],
    "sgd": [3.40, 3.41, math.inf, 3.42],
}


def named(tables: list[Table], name: str) -> Table:
    return next(table for table in tables if table.name == name)


def seen(table: Table, place: str) -> dict[str, dict[str, str]]:
    """First cell -> title as it stands there -> text."""
    shown = table.on(place)
    titles = [c.title if place == PAGE else c.short or c.title for c in shown.columns]
    return {row[0]: dict(zip(titles, row, strict=True)) for row in shown.texts()}


def test_an_arm_has_mean_and_interval_and_a_diverged_one_median_and_ranks():
    table = named(judged.tables(record_of(ARMS, "adamw")), "arms")
    arms = seen(table, TERMINAL)
    assert arms["muon"]["mean"] == "3.2720"
    assert arms["muon"]["interval"] == "[3.2705, 3.2735]"
    assert arms["sgd"]["mean"] == "median 3.4150"
    assert arms["sgd"]["interval"] == "[3.4000, ∞) 87.5%"
    assert (arms["sgd"]["diverged"], arms["muon"]["diverged"]) == ("1", "")
    assert [row.chosen for row in table.rows] == [False, True, False, False], "the reference stands out"
    assert "ranks behind" in table.note


EMPTY = {  # that the page shows nevertheless
    "differences": {"Difference", "Verdict", "Joint interval", "p, jointly", "Interval by itself"}
}


def empty(table: Table) -> set[str]:
    """The columns of the page in which nothing stands."""
    shown = table.on(PAGE)
    cells = zip(*(row.cells for row in shown.rows), strict=True)
    return {c.title for c, own in zip(shown.columns, cells, strict=True) if all(cell.empty for cell in own)}


def test_columns_that_say_nothing_are_left_out():
    alone = record_of({"a": [1.0], "b": [2.0]}, "a")
    arms = seen(named(judged.tables(alone), "arms"), TERMINAL)
    assert set(arms["a"]) == {"arm", "mean", "runs", "length", "configuration"}
    for table in judged.tables(alone):
        assert empty(table) == EMPTY.get(table.name, set()), table.name
    assert not {"tuning", "steps", "rule", "exchange"} & {table.name for table in judged.tables(alone)}


def test_a_difference_says_who_is_better_and_by_how_much():
    table = named(judged.tables(record_of(ARMS, "adamw")), "differences")
    found = seen(table, TERMINAL)
    assert found["muon"]["difference"] == "−0.0080"
    assert found["muon"]["verdict"] == "better"
    assert found["lion"]["verdict"] == "undecided"
    assert found["sgd"]["joint interval"] == "–"
    assert found["sgd"]["verdict"] == "–"
    assert "minus adamw; below zero is better; 95% intervals, joint over 3 comparisons" in table.note
    assert set(found["muon"]) < set(seen(table, PAPER)["muon"]), "a terminal is narrower than a paper"


@pytest.mark.parametrize("better", ["lower", "higher"])
def test_an_interval_is_drawn_on_the_side_that_its_direction_makes_better(better: str):
    record = record_of({"a": [8.0, 8.1, 8.2], "b": [7.0, 7.1, 7.2], "c": [6.0, 6.1, 6.2]}, "b", better=better)
    record["margin"] = 0.1
    table = named(judged.tables(record), "differences")
    drawn = [next(c.drawing for c in row.cells if c.drawing) for row in draw_intervals(table).rows]
    above, below = ("better", "worse") if better == "higher" else ("worse", "better")
    assert [d["side"] for d in drawn] == [above, below]
    ruler = drawn[0]["ruler"]
    start, width = ruler.worse
    shaded = (start + width <= ruler.zero) if better == "higher" else (start >= ruler.zero)
    assert shaded, "the worse side beyond the margin"
    assert width > 0
    assert ("above" if better == "higher" else "below") + " zero is better" in table.note


def test_steps_to_a_target_are_judged_in_steps_and_the_target_is_one_of_the_loss():
    arms = {"muon": [900.0, 1000.0, 1100.0], "adamw": [1200.0, 1300.0, math.inf]}
    steps = {"target": 0.78, "arms": {}, "ratios": []}
    record = record_of(arms, "adamw", unit="steps", loss="val_acc", better="higher", steps=steps)
    table = named(judged.tables(record), "arms")
    assert seen(table, TERMINAL)["adamw"]["never there"] == "1"
    assert "less is better" in table.note
    assert "never got there ranks behind" in table.note


def test_all_pairs_name_both_arms():
    record = record_of(ARMS, "adamw")
    record["differences"][0]["reference"], record["reference"] = "lion", ""
    table = named(judged.tables(record), "differences")
    assert seen(table, TERMINAL)["muon"]["against"] == "lion"
    assert judged.question(record) == "Which arms differ in val_loss?"


def test_where_all_pairs_are_compared_the_single_figure_is_one_of_the_best_arm():
    arms = {"best": [2.0, 2.6], "second": [2.31, 2.32], "third": [2.9, 2.91]}
    record = record_of(arms, "best")
    others = record_of({arm: arms[arm] for arm in ("second", "third")}, "second")
    record["differences"] += others["differences"]
    record["reference"] = ""
    assert [d["verdict"] for d in record["differences"]] == ["undecided", "undecided", "worse"]
    assert [tile.what for tile in judged.tiles(record)] == ["second minus best"]


@pytest.mark.parametrize(
    ("spread", "decimals"), [(0.0012, 4), (0.012, 3), (3.0, 1), (25.0, 0), (4e5, 0), (1e-7, 8)]
)
def test_figures_have_two_digits_of_their_spread(spread: float, decimals: int):
    half = spread / math.sqrt(2)
    record = record_of({"a": [5 - half, 5 + half], "b": [6 - half, 6 + half]}, "a")
    assert decimals_of(record) == decimals


def test_steps_to_a_target_have_their_own_unit_and_fewer_are_better():
    shown = Shown.of(record_of(ARMS, "adamw", better="higher", unit="steps"))
    assert (shown.unit, shown.higher, shown.best) == ("steps", False, "below zero is better")


def test_brackets_and_p_values():
    assert brackets(None, 0.5, "{:.1f}".format) == "(−∞, 0.5]"
    assert brackets(0.25, None, "{:.2f}".format) == "[0.25, ∞)"
    assert brackets(None, None, str) == "–"
    assert [p_value(p) for p in (None, 0.0, 0.00123, 0.04, 0.0951, 1.0)] == [
        "–",
        "< 0.0001",
        "0.0012",
        "0.04",
        "0.10",
        "1.00",
    ]


# -- what only some runs say ---------------------------------------------------------------------------------


def test_the_tuning_shows_budgets_edges_and_what_was_chosen():
    rows = [
        {"arm": arm, "run": f"{arm}{lr}{seed}", "seed": str(seed), "lr": lr, "outcome": loss + 0.001 * seed}
        for arm, losses in {"muon": {0.1: 3.0, 0.2: 2.0, 0.4: 2.5}, "adamw": {0.1: 3.2, 0.2: 3.1}}.items()
        for lr, loss in losses.items()
        for seed in range(2)
    ]
    table = pd.DataFrame(rows).assign(chosen_by=lambda t: t["outcome"])
    found = tuning.tuning_of(
        tuning.configurations_of(table, ["lr"]), chosen_by="val_loss", reported="val_loss"
    )
    record = record_of(ARMS, "adamw", tuning=found)
    tuned = seen(named(judged.tables(record), "tuning"), PAGE)
    assert (tuned["muon"]["Configurations"], tuned["adamw"]["Configurations"]) == ("3", "2")
    assert (tuned["muon"]["Chosen"], tuned["adamw"]["Chosen"]) == ("lr 0.2", "lr 0.2")
    assert (tuned["muon"]["At the edge of"], tuned["adamw"]["At the edge of"]) == ("", "lr 0.2")
    assert tuned["muon"]["Expected best of 2"] == "2.1672"  # of 3, 2.5 and 2, two at a time
    assert not empty(named(judged.tables(record), "tuning"))
    assert "flatters" in named(judged.tables(record), "tuning").note


def test_steps_show_how_many_reached_the_target_and_the_ratio():
    reached = {"runs": 4, "reached": 3, "censored": 1, "ended_early": 0, "returned": 0, "first": 2900.0}
    reached |= {"last": None, "mean": None, "median": 3000.0, "low": 2900.0, "high": None}
    reached |= {"confidence": 0.875, "between": 125.0}
    ratio = {"arm": "muon", "reference": "adamw", "ratio": 0.9, "low": 0.85, "high": 0.95}
    ratio |= {"verdict": "fewer", "coarse": True}
    steps = {"target": 3.28, "arms": {"muon": reached}, "ratios": [ratio]}
    tables = judged.tables(record_of(ARMS, "adamw", steps=steps))
    fine = record_of(ARMS, "adamw", steps=steps | {"ratios": [ratio | {"coarse": False}]})
    of_muon = seen(named(tables, "steps"), TERMINAL)["muon"]
    assert (of_muon["median"], of_muon["interval"], of_muon["reached"]) == (
        "3,000",
        "[2,900, ∞) 87.5%",
        "3 of 4",
    )
    assert empty(named(tables, "steps")) == {"Last", "Mean"}
    assert not empty(named(judged.tables(fine), "ratios"))
    assert "val_loss at most 3.28" in named(tables, "steps").note
    turned = judged.tables(record_of(ARMS, "adamw", steps=steps, better="higher", unit="steps"))
    assert "val_loss at least 3.28" in named(turned, "steps").note
    against = seen(named(tables, "ratios"), TERMINAL)["muon"]
    assert (against["ratio"], against["joint interval"]) == ("×0.900", "[0.850, 0.950]")
    assert "evaluations" in against["remark"]
    assert "an end is open" not in named(tables, "ratios").note
    lost = {"arms": {"muon": reached | {"ended_early": 1}}, "ratios": [ratio | {"low": None}]}
    tables = judged.tables(record_of(ARMS, "adamw", steps=steps | lost))
    assert seen(named(tables, "ratios"), TERMINAL)["muon"]["joint interval"] == "(0, 0.950]"
    assert "an end is open where runs never reached the target" in named(tables, "ratios").note
    assert seen(named(tables, "steps"), TERMINAL)["muon"]["ended early"] == "1"


def test_another_benchmarks_rule_stands_beside_ours():
    record = record_of(ARMS, "adamw")
    runs = runs_of(record)
    standings = rules.standings(runs.curves, runs.table)
    rule = {
        "standings": standings,
        "claims": rules.claims([standings[1], standings[0], standings[1]]),
        "spread": rules.spread(standings),
        "sentence": "By the rule.",
    }
    tables = judged.tables({**record, "rule": rule})
    counted = seen(named(tables, "rule"), TERMINAL)
    assert {arm: row["counts"] for arm, row in counted.items()} == {
        "muon": "yes",
        "adamw": "no",
        "lion": "no",
        "sgd": "no",
    }
    assert seen(named(tables, "claims"), PAGE)["adamw"]["By the joint interval"] == "worse"
    claim = seen(named(tables, "claims"), PAGE)["muon"]
    assert (claim["Against"], claim["By the rule"], claim["By the joint interval"]) == (
        "adamw",
        "better",
        "better",
    )


@pytest.mark.parametrize(
    ("verdicts", "colour"),
    [
        (("better", "worse"), "beats"),
        (("worse", "worse"), "misses"),
        (("level", "worse"), "meets"),
        (("undecided", "worse"), "undecided"),
    ],
)
def test_the_colour_of_the_answer(verdicts: tuple[str, str], colour: str):
    record = record_of({name: ARMS[name] for name in ("muon", "adamw", "lion")}, "adamw")
    for difference, verdict in zip(record["differences"], verdicts, strict=True):
        difference["verdict"] = verdict
    assert judged.judged(record) == colour


@pytest.mark.parametrize(
    ("arms", "answer", "headline"),
    [
        (("muon", "adamw"), "muon is better.", "muon is better."),
        (("muon", "adamw"), "long " * 50, "muon is better than adamw."),
        (("lion", "adamw"), "long " * 50, "Whether lion is better than adamw is undecided."),
        (("muon", "adamw", "lion"), "long " * 50, "1 of 2 arms is better than adamw: 1 undecided."),
    ],
)
def test_a_headline_is_short_whatever_the_answer_names(arms: tuple[str, ...], answer: str, headline: str):
    record = record_of({name: ARMS[name] for name in arms}, "adamw", answer=[answer])
    assert judged.headline(record) == headline


def test_differences_stand_in_the_order_of_the_arms():
    record = record_of(ARMS, "adamw")
    record["differences"].reverse()
    table = named(judged.tables(record), "differences")
    assert list(seen(table, TERMINAL)) == ["muon", "lion", "sgd"]


def test_a_small_difference_keeps_its_side_and_steps_are_whole():
    shown = Shown.of(record_of(ARMS, "adamw"))
    assert [shown.change(x) for x in (-0.00002, 0.0, 0.1)] == ["−0.00002", "+0.0000", "+0.1000"]
    assert [in_steps(x) for x in (None, 3137.5, 61.4375, 0.25)] == ["–", "3,138", "61.4", "0.25"]

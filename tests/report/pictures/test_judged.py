"""The pictures of judged runs: every run in its row, the curves up to their ends, and small files."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
import pytest
from support.judged import record_of, runs_of
from support.seen import assert_as_recorded, sheets_text

from ebc_lab.report.pictures.drawing.sheet import STYLE
from ebc_lab.report.pictures.judged import (
    MOST_DOTS,
    MOST_ROWS,
    MOST_STEPS,
    Source,
    chosen_steps,
    courses_of,
    draw_curves,
    draw_outcomes,
    frame_of,
    rows_of,
    thinned,
)
from ebc_lab.report.pictures.render import svg

ARMS = {
    "muon": [3.2705, 3.272, 3.2735, 3.272],
    "adamw": [3.2785, 3.2815, 3.28, 3.28],
    "lion": [3.279, 3.285, 3.28, 3.281],
    "sgd": [3.284, 3.285, math.inf, 3.286],
}
RECORD = record_of(ARMS, "adamw", steps={"target": 3.277, "arms": {}, "ratios": []})


@pytest.fixture(autouse=True)
def style():
    with matplotlib.rc_context(fname=STYLE):
        yield


def test_outcomes_and_curves_are_drawn_as_they_were():
    sheets = {}
    for end, narrow in (("", False), ("_phone", True)):
        sheets[f"outcomes{end}"] = draw_outcomes(RECORD, Source("runs.csv", narrow))
        sheets[f"curves{end}"] = draw_curves(RECORD, runs_of(RECORD, 41), Source("runs.csv", narrow))
    for sheet in sheets.values():
        sheet.settle()
    assert_as_recorded("pictures_judged", sheets_text(sheets))


def test_a_long_name_breaks_after_an_underscore():
    record = record_of({"aurora_proj_pruned_extended": [1.0, 1.1], "adam": [1.2, 1.3]}, "adam")
    [axes] = draw_outcomes(record, Source("runs.csv", narrow=True)).panels
    assert axes.get_yticklabels()[0].get_text().split("\n") == ["aurora_proj_", "pruned_extended"]


def test_one_bad_arm_does_not_squash_the_others_and_shows_that_it_is_beyond():
    arms = {**{f"arm_{i}": [1 + 0.1 * i, 1.05 + 0.1 * i] for i in range(6)}, "bad": [50.0, 60.0]}
    record = record_of(arms, "arm_0")
    low, high = frame_of(rows_of(record), higher=False)
    assert low < 1
    assert 1.6 < high < 5
    upside = record_of({k: [-x for x in v] for k, v in arms.items()}, "arm_0", better="higher")
    assert frame_of(rows_of(upside), higher=True) == pytest.approx((-high, -low))
    sheet = draw_outcomes(record, Source("runs.csv"))
    assert "runs beyond the axis" in {str(mark.get_label()) for mark in sheet.marks}


def test_of_many_arms_the_best_and_the_reference_are_drawn():
    record = record_of({f"arm_{i}": [1 + i / 10, 1.01 + i / 10] for i in range(80)}, "arm_79")
    names = [row.arm["arm"] for row in rows_of(record)]
    assert len(names) == MOST_ROWS + 1
    assert names[0] == "arm_0"
    assert names[-1] == "arm_79"
    assert "of 80 arms" in draw_outcomes(record, Source("runs.csv")).note


@pytest.mark.parametrize("arms", [{"a": [1.0]}, {"a": [1.0], "b": [2.0]}, {"a": [math.inf], "b": [math.inf]}])
@pytest.mark.parametrize("narrow", [False, True])
def test_little_is_drawn_too(arms: dict[str, list[float]], narrow: bool):
    record = record_of(arms, "a")
    sheet = draw_outcomes(record, Source("runs.csv", narrow))
    sheet.settle()
    assert svg(sheet, "outcomes")
    if curves := draw_curves(record, runs_of(record), Source("runs.csv", narrow)):
        curves.settle()
        assert svg(curves, "curves")


def test_dots_are_thinned_by_rank():
    values = [float(x) for x in range(1000)]
    kept = thinned(values)
    assert len(kept) == MOST_DOTS
    assert kept[0] == 0
    assert kept[-1] == 999
    assert max(np.diff(kept)) <= 18


# -- curves --------------------------------------------------------------------------------------------------


def test_a_course_is_median_and_range_of_the_judged_runs():
    record = record_of(ARMS, "adamw")
    runs = runs_of(record, steps=11)
    record["runs"] = [run for run in record["runs"] if run["run"] != "muon-0"]  # another configuration's
    course = courses_of(record, runs)["muon"]
    assert course.steps.tolist() == np.linspace(0, 1000, 11).tolist()
    curves = runs.curves[runs.curves["run"].isin([1, 2, 3])].pivot(index="step", columns="run", values="loss")
    assert course.middle == pytest.approx(curves.median(axis=1).to_numpy())
    assert course.low == pytest.approx(curves.min(axis=1).to_numpy())
    assert course.high == pytest.approx(curves.max(axis=1).to_numpy())


def test_a_diverged_run_stays_in_the_median_and_one_that_ended_does_not():
    record = record_of(ARMS, "adamw")
    runs = runs_of(record, steps=11)
    course = courses_of(record, runs)["sgd"]
    assert np.isinf(course.high).all()
    assert np.isfinite(course.middle).all()
    short = runs.curves[(runs.curves["run"] != 0) | (runs.curves["step"] <= 500)]
    ended = courses_of(record, type(runs)(runs.table, short, (), "val_loss", "lower", "step"))["muon"]
    assert ended.low[-1] == pytest.approx(3.272 + math.exp(-10)), "the run of 3.2705 is over"
    assert ended.high[-1] == pytest.approx(3.2735 + math.exp(-10)), "nor is its last value carried on"
    assert ended.low[5] == pytest.approx(3.2705 + math.exp(-5))


def test_steps_are_thinned_but_not_the_last_ones():
    assert chosen_steps(np.arange(50.0)).tolist() == list(range(50))
    kept = chosen_steps(np.arange(5000.0))
    assert len(kept) <= MOST_STEPS
    assert kept[0] == 0
    assert kept[-1] == 4999
    assert (kept >= 3750).sum() >= MOST_STEPS // 2 - 1


def test_the_end_of_every_named_curve_is_seen_and_grey_ones_are_one_artist():
    arms = {f"arm_{i}": [1 + i / 100, 1.002 + i / 100] for i in range(30)}
    record = record_of(arms, "arm_29")
    sheet = draw_curves(record, runs_of(record), Source("runs.csv"))
    assert sheet is not None
    right = sheet.panels[1]
    low, high = right.get_ylim()
    ends = [line.get_ydata()[-1] for line in right.get_lines()]  # type: ignore[index]
    assert len(ends) == 8
    assert all(low < end < high for end in ends)
    assert [len(c.get_segments()) for c in right.collections if hasattr(c, "get_segments")] == [22]
    keys = [str(mark.get_label()) for mark in sheet.marks]
    assert keys[0] == "arm_29"
    assert "22 other arms" in keys
    sheet.settle()
    assert len(svg(sheet, "curves")) < 60_000


def test_curves_that_are_level_have_a_scale_whatever_their_size():
    record = record_of({"a": [1e20, 1e20], "b": [1e20, 1e20]}, "a")
    runs = runs_of(record)
    level = type(runs)(runs.table, runs.curves.assign(loss=1e20), (), "val_loss", "lower", "")
    sheet = draw_curves(record, level, Source("runs.csv"))
    assert sheet is not None
    assert all(low < 1e20 < high for low, high in (axes.get_ylim() for axes in sheet.panels[:2]))


def test_runs_without_curves_have_no_picture_of_them():
    runs = runs_of(RECORD)
    empty = type(runs)(runs.table, runs.curves.iloc[:0], (), "val_loss", "lower", "")
    assert draw_curves(RECORD, empty, Source("runs.csv")) is None

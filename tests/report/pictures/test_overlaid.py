"""Loss curves over each other, and the learning-rate curves of tuned arms: whose line is where, and named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from support.drawn import (
    BASELINE,
    CONTROL,
    FALLING,
    GOOD,
    PLAIN,
    TRAP,
    check_sheet,
    drawn,
    settled,
    words_of,
    write_study,
    write_suite,
)
from support.seen import assert_as_recorded, sheets_text

from ebc_lab.report.pictures.arms.overlaid import Losses, draw_overlaid
from ebc_lab.report.pictures.drawing.looks import REST, assign_looks
from ebc_lab.report.pictures.drawing.sheet import MOST_LINES, Facts
from ebc_lab.report.pictures.windows import draw_tuned
from ebc_lab.study.stages.statistics import window

FACTS = Facts("tuned", "tiny Shakespeare", None, "smoke", 32, 64, (0.5, 0.7))


def tuned(losses):
    """What `tune` decides of an arm: its loss by learning rate, None where a seed diverged."""
    known = {lr: np.inf if loss is None else loss for lr, loss in losses.items()}
    curve = [
        {"lr": lr, "val_loss": x, "seeds": {"100": x, "101": x and x + 0.01}} for lr, x in losses.items()
    ]
    span = window(known)
    return {"curve": curve, "window": span, "point": {"lr": span["best"]}, "val_loss": span["loss"]}


def rates(curves, mine):
    return settled(draw_tuned, replace(FACTS, looks=assign_looks(curves, mine, "adam")), curves, mine)


def test_a_seed_above_the_axis_is_a_triangle_at_its_top():
    curves = {"adam": tuned({0.002: 2.1, 0.004: 2.0, 0.008: 2.3})}
    curves["adam"]["curve"][0]["seeds"]["101"] = 5.0
    sheet = rates(curves, [])
    above = [line for line in sheet.axes[0].get_lines() if line.get_marker() == "^"]
    assert (0.002, True) in [(mark.get_xdata()[0], mark.get_ydata()[0] > 0.95) for mark in above]
    assert "a seed above the axis" in words_of(sheet)


def test_tuned_arms_lie_over_each_other_by_absolute_rate_with_windows_and_chosen_points():
    curves = {
        "adam": tuned({0.002: 2.1, 0.004: 2.0, 0.008: 2.3}),
        "mine": tuned({0.0005: 2.2, 0.001: 1.98, 0.002: None}),
    }
    sheet = rates(curves, ["mine"])
    check_sheet(sheet, "tuned")
    assert_as_recorded("pictures_tuned", sheets_text({"tuned": sheet}))


def test_the_rate_that_is_marked_and_named_is_the_one_that_was_chosen():
    """By its worst seed: the lowest mean may be another's."""
    own = tuned({0.002: 2.1, 0.004: 2.0, 0.008: 1.99, 0.016: 2.2})
    own |= {"point": {"lr": 0.004}, "val_loss": 2.0}
    sheet = rates({"adam": own}, ["adam"])
    top, bottom = sheet.axes[:2]
    [ring] = [line for line in top.get_lines() if line.get_markersize() == 13]
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (0.004, 2.0)
    [tick] = [line for line in bottom.get_lines() if line.get_marker() == "|"]
    assert tick.get_xdata()[0] == 0.004
    assert "adam  best 2.000 at 0.004" in words_of(sheet)


def test_a_loss_over_further_seeds_stands_in_words_and_one_rate_has_no_window():
    own = tuned({0.002: 2.1, 0.004: 2.0, 0.008: 2.2}) | {"val_loss": 1.95}  # that of a finalist
    sheet = rates({"adam": own, "mine": tuned({0.004: 2.05})}, ["mine"])
    top, bottom = sheet.axes[:2]
    rings = [line for line in top.get_lines() if line.get_markersize() == 13]
    assert {(ring.get_xdata()[0], ring.get_ydata()[0]) for ring in rings} == {(0.004, 2.0), (0.004, 2.05)}
    assert "adam  best 1.950 at 0.004" in words_of(sheet)
    assert len([line for line in bottom.get_lines() if line.get_lw() == 5]) == 1
    assert not any("octaves" in text and "mine" in text for text in words_of(sheet))


def test_of_many_arms_those_asked_about_and_the_best_are_named():
    curves = {f"arm{i:02}": tuned({0.001: 2.2 + i / 50, 0.002: 2.0 + i / 50, 0.004: 2.3}) for i in range(12)}
    sheet = rates(curves, ["arm11"])
    named = {text.split()[0] for text in words_of(sheet) if " at " in text and text.startswith("arm")}
    assert named == {"arm11", *(f"arm{i:02}" for i in range(MOST_LINES - 1))}
    assert "4 other arms" in words_of(sheet)


def curve_lines(axes):
    """The means: the lines that are not a single seed's."""
    return [line for line in axes.get_lines() if line.get_linewidth() > 0.8 and len(line.get_xdata()) > 1]


def test_a_suites_loss_curves_leave_out_arms_of_which_no_run_completed(tmp_path):
    lost = {(TRAP, seed): "diverged" for seed in range(3)}
    gains = {PLAIN: (0.0, 0.0, 0.0), GOOD: (-0.05, -0.04, -0.03), TRAP: (0.1, 0.1, 0.1)}
    sheet = drawn(write_suite(tmp_path, gains=gains, outcomes=lost), "ablation_curves")["ablation_curves"]
    assert len(curve_lines(sheet.axes[0])) == 2
    assert REST not in {line.get_color() for line in curve_lines(sheet.axes[0])}


def test_where_no_run_completed_there_is_no_picture_of_the_curves(tmp_path):
    lost = {(arm, seed): "missing" for arm in (BASELINE, CONTROL, FALLING) for seed in (0, 1)}
    assert "curves" not in drawn(write_study(tmp_path, outcomes=lost))


def test_of_many_evaluations_the_last_quarter_is_enlarged():
    steps = np.arange(10.0, 201, 10)
    losses = np.ma.masked_array(3 - steps / 100)[None]
    course = Losses(steps, losses, losses[0], {"runs": {"0": "run"}, "outcomes": {"completed": 1}})
    right = settled(draw_overlaid, FACTS, "one arm", {"only": course}).panels[1]
    assert list(right.get_xlim()) == [149, 201]

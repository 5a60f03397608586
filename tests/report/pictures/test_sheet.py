"""A tick is labelled with what it is."""

from __future__ import annotations

import matplotlib
import pytest
from matplotlib.figure import Figure

from ebc_lab.report.pictures.decisions import draw_calibration
from ebc_lab.report.pictures.finals import tokens_in_words
from ebc_lab.report.pictures.sheet import figure as sheet
from ebc_lab.report.pictures.sheet.figure import Facts


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (1.25, "1.25"),
        (0.3125, "0.3125"),
        (2.0, "2"),
        (0.00556, "0.00556"),
        (-0.15, "−0.15"),
        (0, "0"),
        (98304, "98304"),
        (0.1 + 0.2, "0.3"),
    ],
)
def test_the_label_of_a_tick_is_its_value(value, label):
    assert sheet.tick(value) == label


def test_of_a_ratio_of_rounded_figures_a_thousandth_is_enough():
    assert [sheet.tick(x, sheet.ROUNDED) for x in (1.60007, 1.2506, 0.3124, 2.5516)] == [
        "1.6",
        "1.25",
        "0.3124",
        "2.55",
    ]


@pytest.mark.parametrize("value", [1.2345, 0.98765, 123.456, 0.0012344, 7.7, 3e-5, 1.0049])
def test_no_label_of_a_tick_is_another_value(value):
    assert float(sheet.tick(value).replace("−", "-")) == pytest.approx(value, rel=1e-6)


def test_tokens_are_labelled_with_what_they_are():
    assert [tokens_in_words(x) for x in (0, 1250, 61440, 1.25e6)] == ["0", "1.25k", "61.44k", "1.25M"]


def test_the_calibration_says_the_same_multiple_on_the_axis_and_in_words():
    row = {"arm": "adam_none_ebc_d0p0125_tracked_x8", "role": "ebc", "run_id": "a", "delta_star": 0.0125}
    row |= {"outcome": "completed", "val_loss": 2.0, "val_se": 0.01, "c_median": 0.6, "seed": 100}
    window = {"low": 0.01, "high": 0.02, "octaves": 1.0, "open_low": False, "open_high": True}
    found = {**row, "lr_scale": 8.0, "delta_window": window}
    facts = Facts("x", "tiny Shakespeare", None, "smoke", 32, 64, (0.5, 0.7))
    with matplotlib.rc_context(fname=sheet.STYLE):
        figure = draw_calibration(facts, "adam_none", found, [row], 0.01)
        figure.draw_without_rendering()
    labels = [label.get_text() for axes in figure.axes for label in axes.get_xticklabels()]
    assert "0.0125\n1.25×" in labels
    assert "1.25 × the natural KL" in figure.alt


def test_a_log_axis_has_ticks_however_many_decades_it_spans():
    """The published guard shrinks c by forty orders of magnitude."""
    axes = Figure().subplots()
    axes.plot([1, 2], [1e-40, 1e-3])
    sheet.log_axis(axes, "y")
    low, high = axes.get_ylim()
    assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 3

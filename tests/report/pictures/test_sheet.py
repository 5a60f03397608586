"""A tick is labelled with what it is."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure
from support.drawn import settled

from ebc_lab.report.pictures.decisions import ROUNDED, draw_calibration
from ebc_lab.report.pictures.drawing.losses import ceiling_of, where_it_ends, widest_in_words
from ebc_lab.report.pictures.drawing.sheet import Facts, format_tick, log_axis, spread


def test_the_label_of_a_tick_is_its_value():
    labels = {1.25: "1.25", 0.3125: "0.3125", 2.0: "2", 0.00556: "0.00556", -0.15: "−0.15", 98304: "98304"}
    assert {value: format_tick(value) for value in labels} == labels
    assert format_tick(0.1 + 0.2) == "0.3"
    assert [format_tick(x) for x in (123.456, 3.0049e-5)] == ["123.456", "3.0049e−05"]
    # of a ratio of rounded figures a thousandth is enough
    assert [format_tick(x, ROUNDED) for x in (1.60007, 0.3124, 2.5516)] == ["1.6", "0.3124", "2.55"]


def test_the_calibration_says_the_same_multiple_on_the_axis_and_in_words():
    row = {"arm": "adam_none_ebc_d0p0125_tracked_x8", "role": "ebc", "run_id": "a", "delta_star": 0.0125}
    row |= {"outcome": "completed", "val_loss": 2.0, "val_se": 0.01, "c_median": 0.6, "seed": 100}
    window = {"low": 0.01, "high": 0.02, "octaves": 1.0, "open_low": False, "open_high": True}
    found = {**row, "lr_scale": 8.0, "delta_window": window}
    facts = Facts("x", "tiny Shakespeare", None, "smoke", 32, 64, (0.5, 0.7))
    figure = settled(draw_calibration, facts, "adam_none", found, [row], 0.01)
    labels = [label.get_text() for axes in figure.axes for label in axes.get_xticklabels()]
    assert "0.0125\n1.25×" in labels
    assert "1.25 × the natural KL" in figure.alt


def test_a_log_axis_has_ticks_however_many_decades_it_spans():
    """The published guard shrinks c by forty orders of magnitude."""
    axes = Figure().subplots()
    axes.plot([1, 2], [1e-40, 1e-3])
    log_axis(axes, "y")
    low, high = axes.get_ylim()
    assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 3


def test_labels_are_spread_in_order_and_stay_on_the_page():
    places = spread([0.1, 0.11, 0.12, 0.98, 0.99], [0.05] * 4)
    assert places == pytest.approx([0.1, 0.15, 0.2, 0.95, 1.0])


def test_an_axis_of_losses_ends_below_an_outlier_and_above_what_the_finding_needs():
    losses = [1.40, 1.41, 1.44, 1.45, 1.46, 1.48, 1.52, 2.66, 2.94]
    assert 1.52 < ceiling_of(losses, [1.49]) < 2
    assert ceiling_of(losses, [2.66]) == 2.94
    assert ceiling_of(losses[:7], []) == 1.52


def test_a_line_that_leaves_the_axis_ends_where_it_leaves():
    assert where_it_ends([(1, 2.0), (2, 2.1), (4, 2.3)], 2.2) == (pytest.approx(2 * 2**0.5), 2.2)
    assert where_it_ends([(1, 9.0), (2, 2.1), (4, 2.0)], 2.2) == (4, 2.0)
    assert where_it_ends([(1, 9.0), (2, 8.0)], 2.2) == (2, 8.0)


def test_of_windows_that_go_on_beyond_what_was_tried_none_is_called_the_widest():
    closed, ended = ({"octaves": x, "open_low": False, "open_high": x > 6} for x in (5.1, 7.2))
    wider = ended | {"octaves": 7.3}
    said = widest_in_words({"third": closed, "ebc": ended, "radius": wider, "lost": None})
    assert said == "Beyond what was tried: ebc, radius; widest of the others: third, 5.1 octaves"
    assert widest_in_words({"third": closed}) == "Widest window: third, 5.1 octaves"

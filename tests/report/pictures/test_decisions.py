"""The pictures of the decisions: what was tried stands where its figures put it, and the winner is marked."""

from __future__ import annotations

import json

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from support.drawn import drawn, words_of, write_study


@pytest.fixture(scope="module")
def figures(tmp_path_factory) -> dict[str, Figure]:
    return drawn(write_study(tmp_path_factory.mktemp("study")))


def points(axes: Axes, marker: str) -> list[tuple[float, float]]:
    """Where a marker stands in the data."""
    found = [
        line
        for line in axes.get_lines()
        if line.get_marker() == marker and line.get_transform() == axes.transData
    ]
    return [
        (float(x), float(y))
        for line in found
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    ]


def ring(axes: Axes) -> list[tuple[float, float]]:
    found = [line for line in axes.get_lines() if line.get_markersize() > 12]
    return [
        (float(np.atleast_1d(line.get_xdata())[0]), float(np.atleast_1d(line.get_ydata())[0]))
        for line in found
    ]


def lines_of(axes: Axes) -> list[list[tuple[float, float]]]:
    """The points of each line between what was tried."""
    found = [
        line for line in axes.get_lines() if line.get_linestyle() != "None" and len(line.get_xdata()) > 1
    ]
    return [[*map(tuple, np.round(line.get_xydata(), 6).tolist())] for line in found]


@pytest.mark.thorough
def test_the_sweep_shows_its_grid_its_extension_and_what_diverged(figures):
    axes = figures["lr_sweep"].axes[0]
    assert [(0.002, 2.05), (0.004, 2.1), (0.008, 2.2)] in lines_of(axes)
    assert ring(axes) == []
    hollow = [line for line in axes.get_lines() if line.get_markerfacecolor() == "white"]
    assert [list(line.get_xdata()) for line in hollow] == [[0.008]]  # not of the grid that was asked for
    assert [line.get_xdata()[0] for line in axes.get_lines() if line.get_marker() == "x"] == [0.016]
    assert " ".join(axes.get_xlabel().split()).endswith("the grid, 20 steps")
    words = words_of(figures["lr_sweep"])
    assert "diverged" in words
    assert "3 seeds" in figures["lr_sweep"].note  # the grid's, and two replicates


def test_at_full_length_the_sweep_shows_constant_rates_replicates_and_the_controls_search(figures):
    axes = figures["lr_sweep"].axes[1]
    assert axes.get_xlabel().endswith("40 steps")
    assert [(0.002, 2.15), (0.004, 2.1), (0.008, 9.0)] in lines_of(axes)
    assert [(0.004, 2.0), (0.008, 2.05)] in lines_of(axes)
    named = {"constant rate", "trapezoid, 10 steps of warm-up", "warmup linear, 20 steps of warm-up"}
    assert named <= set(words_of(figures["lr_sweep"]))
    assert ring(axes) == [(0.004, 2.1)]
    assert [(x, y) for x, y in points(axes, "s") if (x, y) == (0.004, 2.0)]
    words = words_of(figures["lr_sweep"])
    assert "9.000" in words  # above the axis, which it would have squashed
    assert axes.get_ylim()[1] < 2.5
    said = figures["lr_sweep"].alt
    assert "σ over fresh seeds 0.030); trapezoid, 10 steps of warm-up, at 0.004" in said
    assert "constant rate is the highest" in said


def test_headroom_tells_its_arms_apart_by_marker_and_line_too(figures):
    axes = figures["lr_scale"].axes[0]
    looks = {
        (line.get_marker(), line.get_linestyle(), line.get_color())
        for line in axes.get_lines()
        if str(line.get_marker()) in "svo" and line.get_linestyle() != "None"
    }
    assert len(looks) == 3
    assert all(len({look[i] for look in looks}) == 3 for i in range(3))


def test_headroom_draws_each_lr_window_with_its_octaves(figures):
    _, below = figures["lr_scale"].axes
    words = words_of(figures["lr_scale"])
    assert "with EBC  ≥ 0.5 octaves" in words
    assert not any(text.startswith("without EBC  ≥") for text in words)  # a point is no window
    bar = next(line for line in below.get_lines() if line.get_linewidth() == 5.0)
    assert list(bar.get_xdata()) == pytest.approx([1.0, 2**0.5])


def test_of_two_windows_that_go_on_beyond_what_was_tried_neither_is_called_wider(figures):
    assert "Both LR windows, with EBC and without, go on beyond what was tried" in figures["lr_scale"].alt


def test_a_rate_at_which_training_fails_does_not_squash_the_others(tmp_path):
    root = write_study(tmp_path)
    decisions = json.loads((root / "auto_decisions.json").read_text())
    arms = decisions["lr_scale"]["tracks"]["adam_none"]["arms"]
    arms["none"][1] |= {"outcome": "completed", "val_loss": 7.5}
    (root / "auto_decisions.json").write_text(json.dumps(decisions))
    sheet = drawn(root, until="lr_scale")["lr_scale"]
    assert sheet.axes[0].get_ylim()[1] < 3
    assert "7.500" in words_of(sheet)


def test_the_calibration_shows_loss_and_c_by_target_with_the_window_and_the_winner(figures):
    top, bottom = figures["calibrate"].axes
    assert points(bottom, "o")[:2] == [(0.009, 0.3), (0.018, 0.6)]
    assert [x for x, _ in points(top, "o")][:2] == [0.009, 0.018]
    assert ring(bottom) == [(0.018, 0.6)]
    assert len(ring(top)) == 1
    assert bottom.get_xlim() == top.get_xlim()
    assert "oom" in words_of(figures["calibrate"])
    assert "2 × the natural KL: median c 0.60" in figures["calibrate"].alt
    assert "target band for c, 0.5 to 0.7" not in words_of(figures["calibrate"])
    assert "validation loss 2.200; δ* window ≥ 0.5 octaves" in figures["calibrate"].alt
    assert bottom.get_xlabel().startswith("KL target δ* (nats per token)")
    assert "mean over the seeds" not in " ".join(words_of(figures["calibrate"]))  # one seed


def test_a_calibration_that_aims_at_the_band_shows_it(tmp_path):
    sheet = drawn(write_study(tmp_path, choose="band"), until="calibrate")["calibrate"]
    assert "target band for c, 0.5 to 0.7" in words_of(sheet)
    assert "1 of 3 runs inside the band" in sheet.alt


def test_of_several_seeds_the_calibration_shows_the_means_and_each(tmp_path):
    root = write_study(tmp_path)
    decisions = json.loads((root / "auto_decisions.json").read_text())
    rows = decisions["calibrate"]["candidates"]
    rows += [{**row, "run_id": "more", "seed": 101, "val_loss": row["val_loss"] + 0.1} for row in rows[:2]]
    (root / "auto_decisions.json").write_text(json.dumps(decisions))
    top, bottom = drawn(root, until="calibrate")["calibrate"].axes
    assert [(0.009, 2.15), (0.018, 2.25)] in lines_of(top)
    assert ring(top) == [(0.018, pytest.approx(2.25))]
    assert bottom.get_ylim()[1] > 1

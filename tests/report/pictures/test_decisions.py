"""The pictures of the decisions: what was tried stands where its figures put it, and the winner is marked."""

from __future__ import annotations

import json

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from support.drawn import drawn, words_of, write_study
from support.seen import assert_as_recorded, sheets_text


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


def test_the_pictures_of_finals_are_as_they_were(figures):
    assert_as_recorded("pictures_finals", sheets_text(figures))


def test_a_rate_at_which_training_fails_does_not_squash_the_others(tmp_path):
    root = write_study(tmp_path)
    decisions = json.loads((root / "auto_decisions.json").read_text())
    arms = decisions["lr_scale"]["tracks"]["adam_none"]["arms"]
    arms["none"][1] |= {"outcome": "completed", "val_loss": 7.5}
    (root / "auto_decisions.json").write_text(json.dumps(decisions))
    sheet = drawn(root, "lr_scale")["lr_scale"]
    assert sheet.axes[0].get_ylim()[1] < 3
    assert "7.500" in words_of(sheet)


def test_a_calibration_that_aims_at_the_band_shows_it(tmp_path):
    sheet = drawn(write_study(tmp_path, choose="band"), "calibrate")["calibrate"]
    assert "target band for c, 0.5 to 0.7" in words_of(sheet)
    assert "1 of 3 runs inside the band" in sheet.alt


def test_of_several_seeds_the_calibration_shows_the_means_and_each(tmp_path):
    root = write_study(tmp_path)
    decisions = json.loads((root / "auto_decisions.json").read_text())
    rows = decisions["calibrate"]["candidates"]
    rows += [{**row, "run_id": "more", "seed": 101, "val_loss": row["val_loss"] + 0.1} for row in rows[:2]]
    (root / "auto_decisions.json").write_text(json.dumps(decisions))
    top, bottom = drawn(root, "calibrate")["calibrate"].axes
    assert [(0.009, 2.15), (0.018, 2.25)] in lines_of(top)
    assert ring(top) == [(0.018, pytest.approx(2.25))]
    assert bottom.get_ylim()[1] > 1

"""Seeds side by side: what stands where, and what is left out."""

from __future__ import annotations

import numpy as np
import pytest

from ebc_lab.report.pictures.drawing.curves import (
    MOST_POINTS,
    audited,
    by_step,
    running_mean,
    thinned,
    window,
)


def test_runs_of_different_lengths_stand_side_by_side_by_step():
    long = {"step": np.array([0.0, 1, 2]), "loss": np.array([3.0, 2.0, 1.0])}
    short = {"step": np.array([0.0, 1]), "loss": np.array([5.0, np.inf])}
    steps, table = by_step([long, {}, short], "loss")
    assert steps.tolist() == [0, 1, 2]
    assert table.mean(axis=0).tolist() == [4.0, 2.0, 1.0]
    assert table.mask.tolist() == [[False, False, False], [False, True, True]]


def test_the_running_mean_keeps_a_line_the_first_value_and_the_holes():
    n = 200
    line = np.arange(n, dtype=float)
    line[50] = np.nan
    smooth = running_mean(np.ma.masked_invalid(line[None]))[0]
    half = window(n) // 2
    assert half == 5
    assert smooth[0] == 0
    assert smooth[50] is np.ma.masked
    assert smooth[100:190].tolist() == pytest.approx(np.arange(100.0, 190).tolist())
    assert smooth[-1] == pytest.approx(np.mean(line[-half - 1 :]))


def test_audited_keeps_the_rows_that_a_log_axis_can_show():
    steps = {"step": np.arange(4.0), "applied_kl": np.array([0.01, np.nan, 0.0, 0.02])}
    assert audited(steps)["step"].tolist() == [0, 3]
    assert audited({"step": np.arange(2.0), "applied_kl": np.full(2, np.nan)}) == {}
    assert audited({}) == {}


def test_a_short_curve_keeps_every_step_and_a_long_one_its_ends():
    assert thinned(0).tolist() == []
    assert thinned(5).tolist() == [0, 1, 2, 3, 4]
    long = thinned(10_000)
    assert len(long) == MOST_POINTS
    assert (long[0], long[-1]) == (0, 9999)

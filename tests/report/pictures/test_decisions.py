"""The pictures of the decisions before the finals: what was tried stands where its figures put it, and the
winner is marked."""

from __future__ import annotations

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


def test_the_sweep_shows_its_grid_its_extension_its_winner_and_what_diverged(figures):
    axes = figures["lr_sweep"].axes[0]
    line = next(line for line in axes.get_lines() if list(line.get_xdata()) == [0.002, 0.004, 0.008])
    assert line.get_ydata().tolist() == pytest.approx([2.05, 2.1, 2.2])
    assert ring(axes) == [(0.004, 2.1)]
    hollow = [line for line in axes.get_lines() if line.get_markerfacecolor() == "white"]
    assert [list(line.get_xdata()) for line in hollow] == [[0.008]]  # not of the grid that was asked for
    assert [line.get_xdata()[0] for line in axes.get_lines() if line.get_marker() == "x"] == [0.016]
    words = words_of(figures["lr_sweep"])
    assert "diverged" in words
    assert "with warm-up and decay (control)" in words
    assert any("edge" in text and "σ over fresh seeds 0.030" in text for text in words)
    assert "3 seeds" in figures["lr_sweep"].texts[3].get_text()  # the grid's, and two replicates


def test_headroom_tells_its_arms_apart_by_marker_and_line_too(figures):
    axes = figures["lr_scale"].axes[0]
    looks = {
        (line.get_marker(), line.get_linestyle(), line.get_color())
        for line in axes.get_lines()
        if line.get_label()[0] != "_"
    }
    arms = [look for look in looks if look[0] in "sDo" and look[1] != "None"]
    assert len(arms) == 3
    assert all(len({look[i] for look in arms}) == 3 for i in range(3))


def test_the_effective_step_is_drawn_against_the_rate_asked_for(figures):
    axes = figures["eta_eff"].axes[0]
    assert axes.get_xscale() == axes.get_yscale() == "log"
    ebc = next(line for line in axes.get_lines() if line.get_label() == "with EBC")
    assert np.allclose(ebc.get_xdata(), [0.004, 0.008], rtol=0.05)
    assert list(ebc.get_ydata()) == [0.003, 0.003]
    diagonal = next(line for line in axes.get_lines() if line.get_label() == "c = 1: c·lr = lr")
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata())
    assert any(
        "rises 2×, the median step that is applied 1×" in text for text in words_of(figures["eta_eff"])
    )


def test_the_calibration_shows_loss_and_c_by_target_with_the_band_and_the_winner(figures):
    bottom, top = figures["calibrate"].axes
    assert points(bottom, "o")[:2] == [(0.009, 0.3), (0.018, 0.6)]
    assert [x for x, _ in points(top, "o")][:2] == [0.009, 0.018]
    assert ring(bottom) == [(0.018, 0.6)]
    assert len(ring(top)) == 1
    assert bottom.get_xlim() == top.get_xlim()
    assert "oom" in words_of(figures["calibrate"])
    assert any("2 × the natural KL: median c 0.60" in text for text in words_of(figures["calibrate"]))
    assert "target band for c, 0.5 to 0.7" in words_of(figures["calibrate"])

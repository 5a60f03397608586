"""Training of an energy-based model, drawn: the parts of its loss, R² of its score beside matched values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support.drawn import PLAIN, check_sheet, drawn, write_study, write_suite

from ebc_lab.report.pictures.arms import ebm
from ebc_lab.report.pictures.drawing.curves import Run

R2 = {"0p05": (-0.001, 0.013), "0p5": (0.3, 0.45)}  # first and last evaluations
MATCHED = {"0p05": 0.02, "0p5": 0.5}
PARTS = {"loss_mle": -0.8, "loss_dsm": 0.9, "balance": 1.1}


def energy_based(root: Path, arm: str) -> Path:
    """A study whose runs of one arm are of an energy-based model."""
    for path in root.glob(f"runs/*{arm}*/steps.csv"):
        pd.read_csv(path).assign(**PARTS).to_csv(path, index=False)
        evals = pd.read_csv(path.with_name("evals.csv"))
        for level, (first, last) in R2.items():
            evals[f"r2_{level}"] = np.linspace(first, last, len(evals))
            evals[f"r2_se_{level}"] = 0.001
            evals[f"matched_{level}"] = MATCHED[level]
        evals.to_csv(path.with_name("evals.csv"), index=False)
    return root


@pytest.fixture(scope="module")
def figure(tmp_path_factory):
    root = write_suite(tmp_path_factory.mktemp("ebm"))
    figures = drawn(energy_based(root, PLAIN), phone=("ebm",))
    for name in ("ebm", "ebm_phone"):
        check_sheet(figures[name], name)
    return figures["ebm"]


@pytest.mark.thorough
def test_parts_of_the_loss_and_scores_are_labelled_with_where_they_end(figure):
    top, bottom = figure.axes
    said = {text.get_text() for text in top.texts}
    assert {"likelihood of the states  −0.8", "score matching  0.9", "balance of the experts  1.1"} < said
    assert any(text.startswith("cross-entropy") for text in said)
    assert not any("noised" in text for text in said)  # a part that the run has not
    assert [text.get_text() for text in bottom.texts] == ["0.05 radians  0.013", "0.5 radians  0.45"]
    assert bottom.get_yscale() == "log"


@pytest.mark.thorough
def test_matched_values_are_dashed_in_the_colour_of_their_level(figure):
    lines = [line for line in figure.axes[1].get_lines() if line.get_lw() in (1.2, 1.6)]
    dashed = {line.get_color(): line for line in lines if line.get_ls() == "--"}
    solid = {line.get_color(): line for line in lines if line.get_ls() == "-"}
    assert set(dashed) == set(solid)
    ends = sorted((float(solid[c].get_ydata()[-1]), float(dashed[c].get_ydata()[-1])) for c in solid)
    assert ends == [pytest.approx((0.013, 0.02)), pytest.approx((0.45, 0.5))]


def test_a_score_that_is_not_above_zero_leaves_the_frame(figure):
    lines = [line for line in figure.axes[1].get_lines() if line.get_lw() == 1.6]
    low = min(lines, key=lambda line: float(line.get_ydata()[-1]))
    assert np.ma.getmaskarray(low.get_ydata())[0]
    assert not np.ma.getmaskarray(low.get_ydata())[-1]
    assert "R² at the end over its matched value: 0.65 at 0.05, 0.90 at 0.5 radians" in figure.alt


def test_finals_draw_their_baseline(tmp_path):
    root = energy_based(write_study(tmp_path), "")
    assert "Adam, the baseline" in drawn(root, until="ebm")["ebm"].alt


def test_a_seed_that_ended_early_drops_out_of_the_median():
    def run(seed: int, last: int, value: float) -> Run:
        at = np.arange(10.0, last + 1, 10)
        evals = {"step": at, "r2_0p5": np.full(len(at), value), "matched_0p5": np.full(len(at), 0.5)}
        return Run(str(seed), {}, {"step": np.arange(float(last)), "loss": np.full(last, value)}, evals)

    found = ebm.states_of([run(0, 20, 0.2), run(1, 40, 0.4)])
    assert list(found.scores[0.5].middle) == pytest.approx([0.3, 0.3, 0.4, 0.4])
    assert found.scores[0.5].last == (40, pytest.approx(0.4))
    assert set(found.parts) == {"loss"}
    assert ebm.states_of([Run("0", {}, {}, {})]) is None

"""Training of an energy-based model, drawn: the parts of its loss, R² of its score beside matched values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support.drawn import PLAIN, check_sheet, drawn, write_study, write_suite
from support.seen import assert_as_recorded, sheets_text

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


def test_parts_of_the_loss_and_scores_lie_over_the_steps_beside_the_matched_values(tmp_path):
    root = write_suite(tmp_path)
    figures = drawn(energy_based(root, PLAIN), "ebm", phone=("ebm",))
    for name, figure in figures.items():
        check_sheet(figure, name)
    assert_as_recorded("pictures_ebm", sheets_text(figures))


def test_finals_draw_their_baseline(tmp_path):
    root = energy_based(write_study(tmp_path), "")
    assert "Adam, the baseline" in drawn(root, "ebm")["ebm"].alt


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

"""KL against the length of steps, drawn; its title says what the data say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support.drawn import check_sheet, drawn, write_suite
from support.seen import assert_as_recorded, sheets_text

LENGTHS = {"short": 0.1, "middle": 0.2, "long": 0.4}  # of the arms' steps


def suite(root: Path, exponent: float) -> Path:
    """Three arms in radii, whose KL is 0.01·(‖ΔW‖/0.1)^exponent and whose rate just bears the sharpness."""
    adam = {"optimizer": {"lr": 0.004, "beta1": 0.9}, "budget": {"grouping": "block"}}
    of_run = {k: adam | {"stabilizer": {"name": "trust_region", "strength": x}} for k, x in LENGTHS.items()}
    gains = dict.fromkeys(LENGTHS, (0.0, 0.01))
    more = {label: ({}, config) for label, config in of_run.items()}
    write_suite(root, gains=gains, versus={}, outcomes={}, ebc=(), more=more)
    paths = [(x, path) for k, x in LENGTHS.items() for path in root.glob(f"runs/adam_none_{k}_s*/steps.csv")]
    for length, path in paths:
        steps = pd.read_csv(path).assign(eta_eff=length)
        audited = steps.step % 10 == 0
        measured = {
            "applied_norm": length,
            "applied_kl": 0.01 * (length / 0.1) ** exponent,
            "sharpness": 30 / length,
            "preconditioned_sharpness": 8 / length,
        }
        for column, value in measured.items():
            steps[column] = np.where(audited, value, np.nan)
        steps.to_csv(path, index=False)
    return root


@pytest.mark.parametrize(
    ("exponent", "title"),
    [
        (0.5, "The curvature follows the step: steps 4 times as long have 2 times the KL, not 16 times"),
        (2.0, "The curvature hardly depends on the step: steps 4 times as long have 16 times the KL"),
    ],
)
def test_a_suite_that_measured_the_sharpness_shows_whether_the_curvature_follows_the_step(
    tmp_path, exponent, title
):
    figures = drawn(suite(tmp_path, exponent), "curvature", phone=("curvature",))
    assert figures["curvature"].title == title
    for name, figure in figures.items():
        check_sheet(figure, name)
    assert_as_recorded(f"pictures_curvature_{exponent:g}", sheets_text(figures))

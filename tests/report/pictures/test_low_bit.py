"""What few levels change, drawn: KL against c with its law, and a policy's factors over the run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support.drawn import GOOD, PLAIN, TRAP, check_sheet, drawn, write_suite
from support.seen import assert_as_recorded, sheets_text

from ebc_lab.ebc.options import CURVE_SCALES
from ebc_lab.report.pictures.arms import low_bit
from ebc_lab.report.pictures.drawing.curves import Run

LAWS = {PLAIN: (0.02, 0.0), GOOD: (0.02, 0.001)}  # A and B; plain: a float model


def curve(a: float, b: float, times: float = 1.0) -> list[list[float]]:
    return [[c, times * (a * c * c + b * c)] for c in CURVE_SCALES]


def run_of(seed: int, **result) -> Run:
    return Run(str(seed), {"outcome": "completed", **result}, {}, {})


def low_bit_suite(root: Path) -> Path:
    """Two arms with a curve, a third with a policy that halves the learning rate and doubles the radius."""
    gains = {PLAIN: (0.0, 0.0), GOOD: (-0.05, -0.04), TRAP: (0.1, 0.1)}
    root = write_suite(root, gains=gains, outcomes={}, ebc=())
    for path in root.glob("runs/adam_none_*arm*/result.json"):
        label, _, seed = path.parent.name.removeprefix("adam_none_").rpartition("_s")
        result = json.loads(path.read_text())
        if label in LAWS:
            result["kl_curve"] = curve(*LAWS[label], times=1.1 ** int(seed))
        else:
            steps = path.with_name("steps.csv")
            pd.read_csv(steps).assign(lr_factor=0.5, radius_factor=2.0).to_csv(steps, index=False)
        path.write_text(json.dumps(result))
    decisions = json.loads((root / "auto_decisions.json").read_text())
    arms = decisions["ablation"]["tracks"]["adam_none"]["arms"]
    arms[TRAP]["figures"] = {"lr_factor": 0.5, "radius_factor": 2.0}
    (root / "auto_decisions.json").write_text(json.dumps(decisions))
    return root


# -- KL against c --------------------------------------------------------------------------------------------


def test_an_arms_curve_is_the_median_of_its_seeds_and_its_law_goes_through_it():
    runs = [run_of(seed, kl_curve=curve(0.02, 0.001, times)) for seed, times in enumerate((0.5, 1.0, 3.0))]
    found = low_bit.curve_of([*runs, Run("3", {"outcome": "diverged", "kl_curve": [[1.0, 9.0]]}, {}, {})])
    assert found.points[:, 0] == pytest.approx(CURVE_SCALES)
    middle, least, most = found.points[:, 1:].T
    assert middle == pytest.approx([kl for _, kl in curve(0.02, 0.001)])
    assert least == pytest.approx(0.5 * middle)
    assert most == pytest.approx(3 * middle)
    assert found.law == pytest.approx((0.02, 0.001))


def test_a_run_without_a_curve_has_none_and_a_missing_point_is_left_out():
    assert low_bit.curve_of([run_of(0), run_of(1, kl_curve=[])]) is None
    found = low_bit.curve_of([run_of(0, kl_curve=curve(1.0, 0.0)[2:]), run_of(1, kl_curve=curve(1.0, 0.0))])
    assert found.points[:, 0] == pytest.approx(CURVE_SCALES)
    alone = low_bit.curve_of([run_of(0, kl_curve=[[0.3, 0.01]])])
    assert alone.law is None
    assert low_bit.law_in_words(alone) == "one point, no law"


def test_a_part_of_the_law_that_is_nowhere_of_weight_is_left_out_of_its_words():
    told = {
        (0.02, 0.0): "A 0.02, ∝ c² throughout",
        (0.02, 5e-6): "A 0.02, ∝ c² throughout",
        (0.02, 1e-4): "A 0.02, B 0.0001, B/A 0.005",
        (0.001, 0.02): "B 0.02, ∝ c throughout",
        (0.0, 0.02): "B 0.02, ∝ c throughout",
    }
    for law, words in told.items():
        assert low_bit.law_in_words(low_bit.curve_of([run_of(0, kl_curve=curve(*law))])) == words


def test_curves_with_their_law_and_factors_of_a_policy_are_drawn_of_the_arms_that_have_them(tmp_path):
    figures = drawn(low_bit_suite(tmp_path), "kl_curve", "policy", phone=("kl_curve", "policy"))
    for name, figure in figures.items():
        check_sheet(figure, name)
    assert_as_recorded("pictures_low_bit", sheets_text(figures))


def test_factors_are_geometric_means():
    steps = {"step": np.arange(3.0), "lr_factor": np.array([0.25, 1.0, 4.0]), "radius_factor": np.ones(3)}
    found = low_bit.factors_of([Run("0", {}, steps, {})])
    assert found.lines["lr_factor"].middle[1] == pytest.approx(1.0)
    assert found.medians == {"lr_factor": 1.0, "radius_factor": 1.0}
    assert low_bit.factors_of([Run("0", {}, {"step": np.arange(3.0)}, {})]) is None

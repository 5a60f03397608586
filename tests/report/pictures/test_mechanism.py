"""What stands behind c: drawn where a run measured it, and left out where none did."""

from __future__ import annotations

import numpy as np
import pytest
from support.drawn import settled, words_of
from support.runs import short_run

from ebc_lab.records.streams import read_columns
from ebc_lab.report.pictures.arms import mechanism
from ebc_lab.report.pictures.drawing.curves import Run
from ebc_lab.report.pictures.drawing.sheet import Facts
from ebc_lab.training.outcome import run_and_record

FACTS = Facts("tiny", "words", None, "smoke", 160, 8, (0.5, 0.7), narrow=True)
ARM = {"roles": ["ebc"], "track": "adam_none", "lr": 0.01, "lr_scale": 1.0, "ebc": True}


def test_many_groups_share_a_layer_but_for_the_largest():
    steps = {"step": np.arange(4.0), "surrogate": np.full(4, 78.0), "radius": np.full(4, np.nan)}
    steps |= {f"s_g{i}": np.full(4, float(i)) for i in range(1, 13)}
    figure = settled(mechanism.draw_groups, FACTS, "arm", ARM, [Run("0", {}, steps, {})])
    named = [text.split("  ")[0] for text in words_of(figure) if text.endswith("%")]
    assert sorted(named) == sorted([f"g{i}" for i in range(7, 13)] + ["6 other groups"])
    assert not any("trust radius" in text for text in words_of(figure))


@pytest.mark.thorough
def test_a_real_run_that_measures_its_groups_has_both_pictures(tiny, tmp_path):
    run = short_run(tiny, "steps=12", "stabilizer=ebc", "budget=surrogate", "budget.target_kl=0.02")
    result = run_and_record(run, tmp_path, "x")
    runs = [Run("0", result, read_columns(tmp_path / "steps.csv"), read_columns(tmp_path / "evals.csv"))]
    assert mechanism.groups_of(runs) == ["embeddings", "block0", "head"]
    figure = settled(mechanism.draw_groups, FACTS, "arm", ARM, runs)
    named = {text.split("  ")[0] for text in words_of(figure) if text.endswith("%")}
    assert named == {"embeddings", "block0", "head"}
    found = mechanism.tightness_of(runs)
    assert np.median(found.values) == pytest.approx(result["tightness_median"])


def test_runs_that_measured_nothing_have_no_tightness():
    steps = {"step": np.arange(3.0), "tightness": np.full(3, np.nan), "surrogate": np.full(3, np.nan)}
    runs = [Run("0", {}, steps, {}), Run("1", {}, {}, {})]
    assert mechanism.tightness_of(runs) is None
    assert mechanism.draw_groups(FACTS, "arm", ARM, runs) is None

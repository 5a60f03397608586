"""The pictures of a suite's sweeps: each arm's line and window where its figures put them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.drawn import check_sheet, settled, sweep, words_of
from support.recorded import read_decisions

from ebc_lab.report.pictures.compared import highlighted_arms
from ebc_lab.report.pictures.drawing.looks import assign_looks
from ebc_lab.report.pictures.drawing.sheet import Facts
from ebc_lab.report.pictures.windows import window_pictures

FACTS = Facts("sweeps", "tiny Shakespeare", None, "smoke", 32, 64, (0.5, 0.7))
ROBUSTNESS = read_decisions("robustness")["ablation"]["tracks"]["adam_none"]


def suite_of(windows):
    points = [p["arm"] for sweeps in windows.values() for own in sweeps.values() for p in own["points"]]
    arm = {"ebc": False, "runs": {}, "outcomes": {}}
    return {"arms": dict.fromkeys(points, arm), "windows": windows}


def draw(found):
    facts = replace(FACTS, looks=assign_looks(found["windows"]))
    sheets = {one.name: settled(one.draw, facts) for one in window_pictures(facts, "adam_none", found, "")}
    for name, sheet in sheets.items():
        check_sheet(sheet, name)
    for one in window_pictures(facts, "adam_none", found, ""):
        check_sheet(settled(one.draw, replace(facts, narrow=True)), one.name)
    return sheets


def test_the_windows_of_the_learning_rate_are_bars_under_the_losses():
    sheet = draw(ROBUSTNESS)["lr_windows"]
    top, bottom = sheet.axes
    swept = {label: own["lr_scale"] for label, own in ROBUSTNESS["windows"].items()}
    lines = [line for line in top.get_lines() if len(line.get_xdata()) > 2]
    assert [point["loss"] for point in swept["ebc"]["points"]] in [list(line.get_ydata()) for line in lines]
    bars = [list(line.get_xdata()) for line in bottom.get_lines() if line.get_lw() == 5]
    spans = [own["window"] for own in swept.values()]
    assert bars == [pytest.approx([0.002 * span["low"], 0.002 * span["high"]]) for span in spans]
    ends = [line.get_ydata()[0] for line in bottom.get_lines() if line.get_marker() == ">"]
    assert ends == [row for row, span in enumerate(spans) if span["open_high"]]
    assert "ebc  ≥ 7.2 octaves" in words_of(sheet)
    beyond = "Beyond what was tried: ebc, trust_region; widest of the others: trapezoid_third, 5.1 octaves."
    assert sheet.alt.endswith(beyond)


def test_rules_are_drawn_by_size_and_judged_by_the_fixed_target():
    narrow, wide = {1: 2.3, 2: 2.0, 4: 2.4, 8: None}, {1: 2.0, 2: 2.01, 4: 2.0, 8: 2.02}
    windows = {
        "fixed": {"delta": sweep(narrow, "fixed", yardstick="fixed", worst=None, every_start=False)},
        "rule": {"delta": sweep(wide, "rule", yardstick="fixed", worst=0.02, every_start=True)},
        "fixed_long": {"delta": sweep(wide, "long", shape="3× steps", yardstick="fixed_long", worst=0.02)},
    }
    sheet = draw(suite_of(windows))["delta_windows"]
    assert [axes.get_title(loc="left") for axes in sheet.axes] == ["the usual length", "3× steps"]
    assert np.isnan(
        [line.get_ydata() for line in sheet.axes[0].get_lines() if len(line.get_ydata()) == 4]
    ).any()
    assert any(line.get_marker() == "x" for line in sheet.axes[0].get_lines())  # where a seed diverged
    assert "rule  worst start +0.020" in words_of(sheet)
    assert sheet.alt.endswith("Every start ends within 0.02 nats of the best fixed δ*: rule.")


def test_a_sweep_in_which_every_run_diverged_is_drawn():
    lost = {"plain": {"lr_scale": sweep({1: None, 2: None}, "plain", delta_star=None)}}
    assert "plain  none" in words_of(draw(suite_of(lost))["lr_windows"])


def test_of_a_sweep_only_the_best_point_and_the_reference_have_pictures_of_their_own():
    best = {"constant_x1", "trapezoid_x4", "trapezoid_third_x2", "ebc_x32", "ebc_d1", "trust_region_x64"}
    best |= {"norm_clip_x1", "schedule_free_x2"}
    found = ROBUSTNESS | {"arms": {**ROBUSTNESS["arms"], "unswept": {}}}
    assert highlighted_arms(found).keys() == best | {ROBUSTNESS["reference"], "unswept"}

"""The pictures of a suite's sweeps: each arm's line and window where its figures put them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.drawn import check_sheet, settled, sweep, words_of

from ebc_lab.report.pictures.compared import highlighted_arms
from ebc_lab.report.pictures.drawing.looks import assign_looks
from ebc_lab.report.pictures.drawing.sheet import Facts
from ebc_lab.report.pictures.windows import window_pictures

FACTS = Facts("sweeps", "tiny Shakespeare", None, "smoke", 32, 64, (0.5, 0.7))
WIDE = {1: 2.0, 2: 2.01, 4: 2.0, 8: 2.02}
NARROW = {1: 2.3, 2: 2.0, 4: 2.4, 8: None}


def arm(label, *, ebc=False, mean=0.1):
    runs = {"0": f"{label}_s0", "1": f"{label}_s1"}
    difference = {"mean": mean, "low": mean - 0.05, "high": mean + 0.05, "seeds": 2, "method": "t"}
    figures = {"comparable": True, "test_median": 2.0, "difference": difference}
    return {"ebc": ebc, "runs": runs, "outcomes": {"completed": 2}, "about": label, **figures}


def found_of(windows, **more):
    points = [p["arm"] for sweeps in windows.values() for own in sweeps.values() for p in own["points"]]
    return {
        "reference": points[0] if points else "",
        "arms": {p: arm(p) for p in points},
        "windows": windows,
    } | more


def drawn(found):
    facts = replace(FACTS, looks=assign_looks(found["windows"]))
    sheets = {one.name: settled(one.draw, facts) for one in window_pictures(facts, "adam_none", found, "")}
    for name, sheet in sheets.items():
        check_sheet(sheet, name)
    for one in window_pictures(facts, "adam_none", found, ""):
        check_sheet(settled(one.draw, replace(facts, narrow=True)), one.name)
    return sheets


RATES = {
    "plain": {"lr_scale": sweep(NARROW, "plain", delta_star=None)},
    "ebc": {"lr_scale": sweep(WIDE, "ebc", delta_star=0.01)},
}


def test_the_windows_of_the_learning_rate_are_bars_under_the_losses():
    sheet = drawn(found_of(RATES))["lr_windows"]
    top, bottom = sheet.axes
    lines = [line for line in top.get_lines() if len(line.get_xdata()) == 4]
    assert [list(line.get_ydata()) for line in lines][1] == list(WIDE.values())
    assert np.isnan(lines[0].get_ydata()[3])  # broken where a seed diverged
    assert any(line.get_marker() == "x" for line in top.get_lines())
    bars = {line.get_ydata()[0]: list(line.get_xdata()) for line in bottom.get_lines() if line.get_lw() == 5}
    assert bars[1] == pytest.approx([0.001, 0.008])
    span = RATES["plain"]["lr_scale"]["window"]
    assert bars[0] == pytest.approx([0.001 * span["low"], 0.001 * span["high"]])
    assert [line.get_marker() for line in bottom.get_lines() if line.get_ydata()[0] == 1][-2:] == ["<", ">"]
    said = words_of(sheet)
    assert "ebc  ≥ 3.0 octaves" in said
    assert sheet.alt.endswith("Beyond what was tried: ebc; widest of the others: plain, 0.3 octaves.")


def test_rules_are_drawn_by_size_and_judged_by_the_fixed_target():
    windows = {
        "fixed": {"delta": sweep(NARROW, "fixed", yardstick="fixed", worst=None, every_start=False)},
        "rule": {"delta": sweep(WIDE, "rule", yardstick="fixed", worst=0.02, every_start=True)},
        "fixed_long": {"delta": sweep(WIDE, "long", shape="3× steps", yardstick="fixed_long", worst=0.02)},
    }
    sheet = drawn(found_of(windows))["delta_windows"]
    assert [axes.get_title(loc="left") for axes in sheet.axes] == ["the usual length", "3× steps"]
    assert "rule  worst start +0.020" in words_of(sheet)
    assert sheet.alt.endswith("Every start ends within 0.02 nats of the best fixed δ*: rule.")


def test_a_sweep_in_which_every_run_diverged_is_drawn():
    lost = {"plain": {"lr_scale": sweep({1: None, 2: None}, "plain", delta_star=None)}}
    sheet = drawn(found_of(lost))["lr_windows"]
    assert "plain  none" in words_of(sheet)


def test_of_a_sweep_only_the_best_point_and_the_reference_have_pictures_of_their_own():
    found = found_of(RATES)
    found["arms"]["unswept"] = arm("unswept")
    assert set(highlighted_arms(found)) == {"plain1", "plain2", "ebc1", "unswept"}


def test_a_suite_without_sweeps_has_no_such_pictures():
    assert drawn(found_of({})) == {}

"""The pictures of a suite's sweeps: each arm's line and window where its figures put them."""

from __future__ import annotations

from dataclasses import replace

from support.drawn import check_sheet, settled, sweep, words_of
from support.recorded import read_decisions
from support.seen import assert_as_recorded, sheets_text

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


def test_rules_are_drawn_by_size_and_judged_by_the_fixed_target():
    narrow, wide = {1: 2.3, 2: 2.0, 4: 2.4, 8: None}, {1: 2.0, 2: 2.01, 4: 2.0, 8: 2.02}
    windows = {
        "fixed": {"delta": sweep(narrow, "fixed", yardstick="fixed", worst=None, every_start=False)},
        "rule": {"delta": sweep(wide, "rule", yardstick="fixed", worst=0.02, every_start=True)},
        "fixed_long": {"delta": sweep(wide, "long", shape="3× steps", yardstick="fixed_long", worst=0.02)},
    }
    assert_as_recorded("pictures_rules", sheets_text(draw(suite_of(windows))))


def test_a_sweep_in_which_every_run_diverged_is_drawn():
    lost = {"plain": {"lr_scale": sweep({1: None, 2: None}, "plain", delta_star=None)}}
    assert "plain  none" in words_of(draw(suite_of(lost))["lr_windows"])


def test_of_a_sweep_only_the_best_point_and_the_reference_have_pictures_of_their_own():
    best = {"constant_x1", "trapezoid_x4", "trapezoid_third_x2", "ebc_x32", "ebc_d1", "trust_region_x64"}
    best |= {"norm_clip_x1", "schedule_free_x2"}
    found = ROBUSTNESS | {"arms": {**ROBUSTNESS["arms"], "unswept": {}}}
    assert highlighted_arms(found).keys() == best | {ROBUSTNESS["reference"], "unswept"}

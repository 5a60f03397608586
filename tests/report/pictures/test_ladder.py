"""The picture of a ladder: losses over compute, and the compared arms' differences with their trend."""

from __future__ import annotations

import math

import pytest
from support.drawn import settled, words_of
from support.laddered import ladder_of

from ebc_lab.report.pictures.drawing.looks import assign_looks
from ebc_lab.report.pictures.drawing.sheet import Facts
from ebc_lab.report.pictures.ladder import draw_ladder

PLAIN = {"base": 3.0, "wide": 2.9, "long": 2.95, "corner": 2.7}
FAST = {"base": 2.98, "wide": 2.8, "long": 2.9, "corner": 2.5}
LOOKS = assign_looks(["plain", "fast"], ["fast"], "plain")


def facts(narrow):
    return Facts("tiny", "tiny Shakespeare", None, "smoke", 128, 64, (0.5, 0.7), looks=LOOKS, narrow=narrow)


def drawn(fast, narrow=False):
    return settled(draw_ladder, facts(narrow), ladder_of({"plain": PLAIN, "fast": fast}, [("fast", "plain")]))


@pytest.mark.parametrize("narrow", [False, True])
def test_every_rung_is_named_and_the_title_says_the_finding(narrow):
    sheet = drawn(FAST, narrow)
    words = words_of(sheet)
    assert sheet.title == "fast is better than plain over 4 rungs, and that grows with more compute"
    for rung in ("base\n×1", "long\n×2", "wide\n×4", "corner\n×16"):
        assert rung in words
    assert any("fast minus plain: −0.04" in text for text in words)
    assert "4 rungs, base, long, wide, corner" in sheet.alt


def test_the_line_is_the_trend_and_each_loss_stands_over_its_compute():
    losses, differences = drawn(FAST).panels
    of_fast = [line for line in losses.get_lines() if line.get_color() == LOOKS["fast"].colour]
    assert any(list(line.get_ydata()) == [2.98, 2.9, 2.8, 2.5] for line in of_fast)
    assert any(list(line.get_xdata()) == pytest.approx([1, 2, 4, 16]) for line in of_fast)
    [trend] = [line for line in differences.get_lines() if list(line.get_xdata()) == pytest.approx([1, 16])]
    low, high = trend.get_ydata()
    assert high < low < 0


def test_rungs_of_the_same_compute_stand_side_by_side_under_one_label():
    track = ladder_of({"plain": PLAIN, "fast": FAST}, [("fast", "plain")])
    track["rungs"]["wide"]["compute"] = track["rungs"]["long"]["compute"]
    assert "wide\nlong\n×2" in words_of(settled(draw_ladder, facts(False), track))


@pytest.mark.parametrize("lost", [math.inf, None])
def test_an_arm_without_a_loss_on_a_rung_is_drawn_on_the_others_and_said_to_lack_one(lost):
    sheet = drawn(FAST | {"wide": lost})
    assert sheet.alert == "no test loss: fast on wide"
    of_fast = [line for line in sheet.panels[0].get_lines() if line.get_color() == LOOKS["fast"].colour]
    assert any(len(line.get_xdata()) == 3 for line in of_fast)
    assert not any("per doubling" in text for text in words_of(sheet))

"""The picture of a ladder: losses over compute, and the compared arms' differences with their trend."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from support.drawn import settled, words_of
from support.laddered import ladder_of
from support.seen import assert_as_recorded, sheets_text

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


def test_losses_over_compute_and_differences_with_their_trend():
    assert_as_recorded(
        "pictures_ladder", sheets_text({"ladder": drawn(FAST), "ladder_phone": drawn(FAST, True)})
    )


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


@pytest.mark.parametrize("count", [2, 3])
def test_differences_on_a_rung_stand_beside_each_other_around_its_compute(count):
    others = [f"fast{nth}" for nth in range(count)]
    losses = {"plain": PLAIN, **dict.fromkeys(others, FAST)}
    looks = assign_looks([*losses], others, "plain")
    track = ladder_of(losses, [(other, "plain") for other in others])
    sheet = draw_ladder(replace(facts(False), looks=looks), track)
    bars = [container.lines[0].get_xdata()[0] for container in sheet.panels[1].containers]
    for name, rung in track["rungs"].items():
        own = bars[[*track["climbs"][0]["rungs"]].index(name) :: len(track["rungs"])]
        assert len(own) == count
        assert own == sorted(set(own))
        middle = rung["compute"] / track["rungs"]["base"]["compute"]
        assert math.sqrt(own[0] * own[-1]) == pytest.approx(middle)

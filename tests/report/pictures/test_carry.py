"""The pictures of constants that were carried, of the recorded study of larger models."""

from __future__ import annotations

import pytest
from support.drawn import settled
from support.recorded import read_decisions
from support.seen import assert_as_recorded, sheets_text

from ebc_lab.report.pictures.carry import draw_excess, draw_optima
from ebc_lab.report.pictures.drawing.sheet import Facts

FACTS = Facts("units_laptop", "tiny Shakespeare", None, "laptop", 1024, 64, (0.5, 0.7))


@pytest.fixture(scope="module")
def track():
    [only] = read_decisions("units_laptop")["carry"]["tracks"].values()
    return only


def test_excess_and_best_constants_stand_in_the_rows_of_their_settings_and_arms(track):
    draw = {"carried_excess": draw_excess, "carried_optima": draw_optima}
    sheets = {name: settled(draw[name], FACTS, track) for name in draw}
    assert_as_recorded("pictures_carry", sheets_text(sheets))


@pytest.mark.parametrize("draw", [draw_excess, draw_optima])
def test_nothing_is_drawn_of_a_study_that_judged_nothing(track, draw):
    unjudged = {name: found | {"excess": None, "octaves": None} for name, found in track["arms"].items()}
    assert draw(FACTS, track | {"arms": unjudged}) is None

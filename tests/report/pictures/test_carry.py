"""The pictures of constants that were carried, of the recorded study of larger models."""

from __future__ import annotations

import math

import pytest
from matplotlib.text import Annotation
from support.drawn import settled, words_of
from support.recorded import read_decisions

from ebc_lab.report.pictures.carry import draw_excess, draw_optima
from ebc_lab.report.pictures.drawing.sheet import Facts

FACTS = Facts("units_laptop", "tiny Shakespeare", None, "laptop", 1024, 64, (0.5, 0.7))


@pytest.fixture(scope="module")
def track():
    [only] = read_decisions("units_laptop")["carry"]["tracks"].values()
    return only


def sheet_of(draw, track):
    return settled(draw, FACTS, track)


def marks(sheet):
    """Every mark that stands alone: (x, y, its kind)."""
    lines = [line for line in sheet.axes[0].get_lines() if len(line.get_xdata()) == 1]
    return [(float(line.get_xdata()[0]), float(line.get_ydata()[0]), line.get_marker()) for line in lines]


def test_every_loss_stands_in_its_settings_row_and_a_broken_run_at_the_axis_end(track):
    sheet = sheet_of(draw_excess, track)
    drawn = marks(sheet)
    excess = {
        (round(one["excess"], 9), row)
        for row, name in enumerate(track["settings"])
        for found in track["arms"].values()
        for one in [found["carried"][name]]
    }
    assert len(drawn) == len(excess) == 24
    [(end, place, _)] = [mark for mark in drawn if mark[2] == ">"]
    assert {(round(x, 9), round(y)) for x, y, kind in drawn if kind != ">"} == {
        (x, row) for x, row in excess if x <= end
    }
    assert [(x > end, row) for x, row in excess if x > end] == [(True, round(place))]
    said = words_of(sheet)
    assert sheet.note == "3 seeds"
    assert "beyond the axis" in said
    assert "KL, rate ×8: +0.021 on average, the least" in sheet.alt


def test_best_constants_stand_where_they_are_and_the_outermost_settings_are_named(track):
    sheet = sheet_of(draw_optima, track)
    arms = sorted(track["arms"].values(), key=lambda found: found["octaves"])
    wanted = {
        (round(math.log2(curve["best"] / found["curves"]["base"]["best"]), 9), row)
        for row, found in enumerate(arms)
        for curve in found["curves"].values()
    }
    assert {(round(x, 9), round(y)) for x, y, _ in marks(sheet)} == wanted
    named = [text for text in sheet.axes[0].texts if isinstance(text, Annotation)]
    assert named
    for text in named:
        x, row = text.xy
        found = arms[round(row)]
        origin = found["curves"]["base"]["best"]
        there = [s for s, c in found["curves"].items() if math.log2(c["best"] / origin) == x]
        assert text.get_text().startswith(", ".join(track["settings"][s]["about"] for s in there[:2]))
        assert text.xyann == (0, 5 if x < 0 else -5)
        assert text.get_ha() == "center"


@pytest.mark.parametrize("draw", [draw_excess, draw_optima])
def test_nothing_is_drawn_of_a_study_that_judged_nothing(track, draw):
    unjudged = {name: found | {"excess": None, "octaves": None} for name, found in track["arms"].items()}
    assert draw(FACTS, track | {"arms": unjudged}) is None

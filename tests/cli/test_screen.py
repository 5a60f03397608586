"""What the terminal shows of a study while it runs and at its end, at the widths that terminals have."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console
from support.recorded import EVIDENCE

import ebc_lab
from ebc_lab.cli import options, screen
from ebc_lab.config.dicts import from_dict
from ebc_lab.config.schema import Config
from ebc_lab.report.kinds import Evidence
from ebc_lab.study.autopilot import Progress, _Wave

LONG = "adam_ebc_fixed_tracked_x2_delta1p5_trapezoid"
RUNNING = [
    {"arm": LONG, "lr": 0.004, "seed": 101, "step": 1200, "steps": 2000, "steps_per_s": 51.23},
    {"arm": "adam_none_baseline_x1", "lr": 0.004, "seed": 3, "step": 40, "steps": 2000, "steps_per_s": 0.0},
]
HEAD = "lab · finals  12 of about 27 runs, 2 at a time, 40 s left"


def draw(progress, width):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(screen.View(console)._draw(progress))
    return [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_narrow_terminal_loses_the_bar_and_never_seed_step_and_speed(width):
    shown = draw(Progress("lab", "finals", 2, done=12, total=27, left_s=40.2, running=RUNNING), width)
    head, titles, *rows = shown
    assert head == HEAD
    assert titles.split() == ["arm", "lr", "seed", "step", "steps/s"]
    assert max(map(len, shown)) <= width
    assert "".join(row[: titles.index("lr") - 3].strip() for row in rows[:-1]) == LONG
    assert rows[0].replace("━", "").split()[1:] == ["0.004", "101", "1200/2000", "51.2"]
    assert rows[-1].replace("━", "").split()[1:] == ["0.004", "3", "40/2000", "–"]
    assert rows[0].count("━") == (14 if width == 120 else 0)  # of 24; the rest has no colour here


def test_what_is_not_known_is_left_out():
    assert screen.how_far(Progress("lab", "tune", 3, done=1)) == "1 run, 3 at a time"
    known = Progress("lab", "tune", 3, done=0, total=1)
    assert screen.how_far(known) == "0 of about 1 run, 3 at a time"
    timing = Progress("lab", "ablation", 3, done=94, total=94, left_s=1.0, measuring=True)
    assert screen.how_far(timing) == "94 runs done, measuring time, one after another"


def test_off_a_terminal_a_line_in_a_minute_says_how_far_the_study_is(monkeypatch):
    console = Console(file=io.StringIO(), width=100, highlight=False)
    view = screen.View(console)
    progress = Progress("lab", "tune", 2, done=3, total=9, left_s=100.0)
    view.watch(progress)
    assert console.file.getvalue() == ""
    monkeypatch.setattr(screen, "LINE_EVERY_S", 0.0)
    view.watch(progress)
    assert "tune: 3 of about 9 runs, 2 at a time, 1 min 40 s left" in console.file.getvalue()


@pytest.mark.parametrize(
    ("columns", "width"),
    [
        (None, 100),
        ("73", 73),
        ("wide", 100),
        ("²", 100),  # a digit, and no number
        ("9" * 5000, 100),
        ("1", 40),
    ],
)
def test_off_a_terminal_lines_have_a_hundred_characters_unless_columns_says_otherwise(
    columns, width, monkeypatch
):
    for name in ("COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
        if columns is not None:
            monkeypatch.setenv(name, columns)
    console = options.console()
    assert console.width == width
    assert console.height > 0


def test_the_time_left_is_counted_down_between_two_runs_and_never_ends_before_them(monkeypatch):
    wave = SimpleNamespace(expected={"seconds": 40.0}, expected_at=100.0, progress=Progress("lab", "tune", 2))
    for now, left in ((100.0, 40.0), (130.0, 10.0), (200.0, 1.0)):
        monkeypatch.setattr("ebc_lab.study.autopilot.time.monotonic", lambda now=now: now)
        assert _Wave._left_s(wave) == left


@pytest.mark.parametrize("width", [60, 80, 100])
def test_no_figure_of_a_table_is_cut_where_room_is_short(width, capsys):
    table = screen.plain_table("arm", "part", ">validation loss", ">±")
    table.add_row(LONG, "control’s search, of many words", "2.6210", "0.0059")
    Console(width=width).print(table)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    assert any("2.6210" in line for line in lines)
    assert any("0.0059" in line for line in lines)
    assert LONG in "".join(line.partition(" ")[0] for line in lines)


@pytest.mark.thorough
def test_a_suite_about_ones_own_arm_answers_in_one_table_that_fits(capsys):
    study = ebc_lab.load(EVIDENCE / "cautious.zip")
    decisions, config = study.decisions, from_dict(Config, study.config)
    Console(width=100).print(screen.evidence(Evidence(decisions["ablation"], config, decisions)))
    shown = capsys.readouterr().out
    title, head, first, *others = shown.splitlines()[:5]
    assert "cautious" in title
    columns = [column.strip() for column in head.split("  ") if column]
    assert columns[0] == "arm"
    assert {"best lr", "test loss", "difference", "cautious is", "step"} <= set(columns)
    assert first.split()[0] == "cautious"
    assert {line.split()[0] for line in others} == {"adam", "muon"}
    assert "steps/s" not in shown  # beside the paired time of a step it misleads

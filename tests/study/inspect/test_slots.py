"""How busy the slots were, from the attempts of runs: invented ones, whose idle share can be counted."""

from datetime import UTC, datetime

import pytest
from support.drawn import check_sheet, settled, words_of

from ebc_lab.report.pictures.drawing.sheet import Facts
from ebc_lab.report.pictures.slots import draw_slots
from ebc_lab.study.inspect.slots import in_words, timeline
from ebc_lab.study.store import attempts
from ebc_lab.study.store.study import Brief, Record, Study


def moment(second):
    return datetime.fromtimestamp(1_700_000_000 + second, UTC).isoformat(timespec="milliseconds")


class Attempts:
    """The planned runs of a study, each with its log of attempts."""

    def __init__(self, root):
        self.study, self.runs = Study(root), []

    def add(self, run_id, stage, *events, kind="train"):
        """`events`: (second, event) or (second, event, process)."""
        files = self.study.run_files(run_id)
        files.directory.mkdir(parents=True)
        for second, event, *process in events:
            pid = process[0] if process else 0
            attempts.note(files.directory, event, at=moment(second), host="h", pid=pid)
        self.runs.append(Record(self.study, Brief(run_id, kind, stage)))

    def timeline(self):
        return timeline(self.runs)


@pytest.fixture
def study(tmp_path):
    """Two workers: 10 s each in lr_sweep, then the second idles for 6 s beside the last run; in finals a
    measurement of 4 s runs alone."""
    study = Attempts(tmp_path)
    study.add("a", "lr_sweep", (0, "begin", 1), (10, "end"))
    study.add("b", "lr_sweep", (0, "begin", 2), (10, "end"))
    study.add("c", "lr_sweep", (10, "begin", 1), (16, "end"))
    study.add("d", "finals", (16, "begin", 1), (20, "end"), kind="overhead")
    return study


def test_the_idle_share_is_what_no_run_filled(study):
    busy = study.timeline()
    assert [(bar.run_id, bar.slot) for bar in busy.bars] == [("a", 0), ("b", 1), ("c", 0), ("d", 0)]
    assert busy.use["idle"]["lr_sweep"] == pytest.approx(6 / 32)
    assert in_words(busy.use) == "2 worker slots for 20 s, idle 25% of that time (lr_sweep 19%, finals 50%)"
    study.runs.reverse()
    assert study.timeline() == busy


def test_an_interruption_and_a_crash_are_not_idle_time(study):
    """`e` is stopped, and continued an hour later by a new worker; of `f` nobody knows when it died."""
    study.add("e", "finals", (20, "begin", 1), (22, "stopped"), (3620, "begin", 3), (3624, "end"))
    study.add("f", "finals", (20, "begin", 2), (3620, "begin", 4), (3624, "end"))
    busy = study.timeline()
    assert busy.use["seconds"] == pytest.approx(26)
    [(begin, end)] = [(bar.begin, bar.end) for bar in busy.bars if bar.run_id == "f"]
    assert (begin, end) == (pytest.approx(22), pytest.approx(26))


def test_a_run_of_another_study_took_no_slot_here(study):
    study.add("e", "finals", (-900, "begin", 9), (-800, "end"), (20, "taken"))
    assert "e" not in {bar.run_id for bar in study.timeline().bars}


def test_a_stages_runs_that_began_early_fill_the_time_of_the_stage_before(study):
    study.add("e", "calibrate", (10, "begin", 2), (16, "end"))
    assert study.timeline().use["idle"]["lr_sweep"] == 0


def test_nothing_is_said_before_a_run_has_ended(tmp_path):
    study = Attempts(tmp_path)
    study.add("a", "lr_sweep", (0, "begin", 1))
    assert study.timeline() is None


def test_the_picture_has_a_row_for_each_slot_and_cuts_no_word(study):
    study.add("e", "calibrate", (10, "begin", 2), (16, "end"))  # all of it beside lr_sweep
    facts = Facts("s", "words", None, "smoke", 640, 8, (0.5, 0.7))
    figure = settled(draw_slots, facts, study.timeline())
    check_sheet(figure, "slots")
    words = words_of(figure)
    [legend] = figure.legends
    bars = sorted((bar.get_x(), bar.get_width()) for bar in figure.axes[0].patches)
    assert [x for bar in bars for x in bar] == pytest.approx([0, 10, 0, 10, 10, 6, 10, 6, 16, 4])
    assert {"slot 1", "slot 2"} <= {text.get_text() for text in figure.axes[0].get_yticklabels()}
    named = [text.get_text() for text in legend.get_texts()]
    assert named == ["lr_sweep", "calibrate", "finals", "a measurement of time, alone"]
    assert not any("…" in text for text in [*words, *named])
    assert "Idle 10% of 20 s" in figure.alt

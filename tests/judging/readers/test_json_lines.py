"""JSON records: nested, with lists, with what JSON has no word for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from support.runs_of_others import written

from ebc_lab.config.errors import UserError
from ebc_lab.judging.asked import Asked
from ebc_lab.judging.readers import json_lines
from ebc_lab.judging.readers.reader import Source


def source_of(folder: Path, text: str, **asked: Any) -> Source:
    """Return what is read of a file with this text."""
    return json_lines.read(written(folder / "runs.jsonl", text), Asked(**asked))


def test_nested_objects_and_nan(tmp_path: Path) -> None:
    rows = [
        {"run": "a", "eval": {"loss": 2.5}},
        {"run": "b", "eval": {"loss": math.nan}},
        {"run": "c", "eval": {}},
    ]
    frame = source_of(tmp_path, "\n".join(map(json.dumps, rows))).frame
    assert list(frame) == ["run", "eval/loss"]
    assert list(frame["eval/loss"])[:2] == [2.5, math.inf]
    assert math.isnan(frame["eval/loss"][2])


def test_an_array_and_lines_say_the_same(tmp_path: Path) -> None:
    rows = [{"arm": "adam", "loss": 1.5}, {"arm": "muon", "loss": None}]
    lines = source_of(tmp_path, "\n".join(map(json.dumps, rows)) + "\n").frame
    array = json_lines.read(written(tmp_path / "runs.json", json.dumps(rows)), Asked()).frame
    assert lines.equals(array)
    assert math.isnan(array.loss[1])


def test_lists_of_steps_and_losses_are_a_curve(tmp_path: Path) -> None:
    row = {"arm": "adam", "step": [10, 20], "val_loss": [3.0, 2.0], "betas": ["x"]}
    frame = source_of(tmp_path, json.dumps(row)).frame
    assert frame.to_dict("list") == {
        "arm": ["adam"] * 2,
        "step": [10, 20],
        "val_loss": [3.0, 2.0],
        "betas": ['["x"]'] * 2,
    }


def test_one_list_of_losses_counts_its_steps(tmp_path: Path) -> None:
    frame = json_lines.read(
        written(tmp_path / "runs.jsonl", '{"arm": "adam", "losses": [3, 2, 1], "betas": [0.9, 0.95]}'),
        Asked(),
    ).frame
    assert list(frame.step) == [1, 2, 3]
    assert list(frame.losses) == [3, 2, 1]
    assert list(frame.betas) == ["[0.9, 0.95]"] * 3


def test_a_last_line_that_was_cut_off_is_left_out_with_a_note(tmp_path: Path) -> None:
    source = source_of(tmp_path, '{"step": 1, "loss": 2}\n{"step": 2, "lo')
    assert len(source.frame) == 1
    assert "cut off" in source.notes[0]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty"),
        ('{"a": 1}\nstep 2\n{"a": 2}\n', "line 2 is no JSON object"),
        ("3\n", "line 1: 3 is no JSON object"),
        ('{"step": [1, 2], "loss": [1]}\n', "different lengths"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        source_of(tmp_path, text)


def test_a_configuration_is_not_claimed(tmp_path: Path) -> None:
    assert not json_lines.claims(written(tmp_path / "config.json", '{"lr": 0.1}'))
    assert json_lines.claims(written(tmp_path / "runs.json", '\n[\n {"lr": 0.1}]'))


def test_a_list_of_objects_is_a_row_each(tmp_path: Path) -> None:
    text = '{"arm": "adam", "history": [{"step": 1, "val": {"loss": 3}}, {"step": 2, "val": {"loss": 2}}]}'
    frame = source_of(tmp_path, text).frame
    assert frame.to_dict("list") == {"arm": ["adam"] * 2, "step": [1, 2], "val/loss": [3, 2]}

"""Text logs, as modded-nanogpt's and others' look."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from ebc_lab.config.errors import UserError
from ebc_lab.judging.asked import Asked
from ebc_lab.judging.readers import logs

LOG = """\
        print0(f"step:{step}/{train_steps} val_loss:{val_loss:.6f} train_time:{ms:.0f}ms", console=True)
step:0/250 val_loss:10.82584 train_time:0ms step_avg:0.13ms
step:1/250 train_time:149ms step_avg:149.00ms

step:125/250 val_loss:5.30619 train_time:28222ms step_avg:225.77ms
step:250/250 val_loss:nan train_time:56483ms step_avg:225.93ms
"""


def test_lines_that_match_are_rows_and_the_others_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(LOG)
    pattern = r"step:(?P<step>\d+)/(?P<planned>\d+) val_loss:(?P<loss>[\d.]+|nan)"
    source = logs.read(tmp_path / "a.txt", Asked(pattern=pattern))
    assert source.frame.to_dict("list") == {
        "step": [0, 125, 250],
        "planned": [250, 250, 250],
        "loss": [10.82584, 5.30619, math.inf],
    }
    assert source.roles == {"step": "step", "planned": "planned", "loss": "loss"}
    assert source.notes == ["3 matches of --pattern; 2 lines do not match."]


def test_groups_that_are_words_stay_text_and_an_absent_group_is_missing(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("epoch 1 phase warm loss 2.5, acc 0.1\nepoch 2 phase main loss 2.25,\n")
    pattern = r"epoch (?P<epoch>\d+) phase (?P<phase>\w+) loss (?P<loss>\S+)(?: acc (?P<acc>\S+))?"
    frame = logs.read(tmp_path / "a.log", Asked(pattern=pattern)).frame
    assert list(frame.loss) == [2.5, 2.25]
    assert list(frame.phase) == ["warm", "main"]
    assert frame.acc[0] == 0.1
    assert math.isnan(frame.acc[1])


def test_the_loss_may_have_any_name_and_the_error_proposes_a_pattern_that_works(tmp_path: Path) -> None:
    lines = [f"[iter {i:4}/600] train loss {3 / i:.3f} | val loss {4 / i:.3f}" for i in (50, 100)]
    (tmp_path / "a.log").write_text("\n".join(["Training adam", *lines, "Done."]))
    with pytest.raises(UserError) as error:
        logs.read(tmp_path / "a.log", Asked(pattern="(?P<step>never)"))
    pattern = re.search("--pattern '(.*)'", str(error.value))[1]
    frame = logs.read(tmp_path / "a.log", Asked(pattern=pattern)).frame
    assert frame.to_dict("list") == {"step": [50, 100], "train_loss": [0.06, 0.03], "val_loss": [0.08, 0.04]}


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("epoch:(?P<loss>.*)", "no line of .* matches"),
        ("step:(", "no regular expression"),
        ("val_loss", "has no named group"),
    ],
)
def test_a_pattern_that_cannot_serve_is_said_in_a_sentence(
    tmp_path: Path, pattern: str, sentence: str
) -> None:
    (tmp_path / "a.txt").write_text(LOG)
    with pytest.raises(UserError, match=sentence):
        logs.read(tmp_path / "a.txt", Asked(pattern=pattern))

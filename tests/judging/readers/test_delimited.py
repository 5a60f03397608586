"""Tables in text files: what a cell means, and how a table with a column a run is told from others."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any

import pytest
from support.runs_of_others import written

from ebc_lab.config.errors import UserError
from ebc_lab.judging.asked import Asked
from ebc_lab.judging.readers import delimited
from ebc_lab.judging.readers.reader import Source


def source_of(folder: Path, text: str, **asked: Any) -> Source:
    """Return what is read of a file with this text."""
    return delimited.read(written(folder / "runs.csv", text), Asked(**asked))


@pytest.mark.parametrize("word", ["nan", "NaN", "inf", "-inf", "Infinity", '"nan"', "-nan", " nan"])
def test_what_was_logged_and_is_not_finite_is_inf_and_an_empty_cell_is_missing(
    tmp_path: Path, word: str
) -> None:
    text = f"arm,val_loss,step\nadam,2.5,1\nadam,{word},2\nadam,,3\nnancy,1,4\n"
    frame = source_of(tmp_path, text).frame
    assert list(frame.val_loss)[:2] == [2.5, math.inf]
    assert math.isnan(frame.val_loss[2])
    assert frame.arm[3] == "nancy"


def test_nan_in_the_last_cell_of_a_file_without_a_last_line_end(tmp_path: Path) -> None:
    frame = source_of(tmp_path, "step,val_loss\n1,2\n2,nan").frame
    assert list(frame.val_loss) == [2.0, math.inf]


def test_nan_is_found_wherever_a_large_file_is_cut_into_blocks(tmp_path: Path) -> None:
    rows = [f"{n},{'' if n % 1000 == 500 else 0.5 if n % 1000 == 7 else 'nan'}" for n in range(200_000)]
    frame = source_of(tmp_path, "step,val_loss\n" + "\n".join(rows) + "\n").frame
    assert (frame.val_loss == math.inf).sum() == 200_000 - 400
    assert frame.val_loss.isna().sum() == 200
    assert frame.val_loss.dtype == float


@pytest.mark.parametrize(
    "text",
    [
        "arm;step;val_loss\nadam;1;328,0E-2\nadam;2;2,5e+0\n",
        "arm;step;val_loss\nadam;1;3,28\nadam;2;2,5\n",
        "arm\tstep\tval_loss\nadam\t1\t3.28\nadam\t2\t2.5\n",
        "\ufeffarm,step,val_loss\r\nadam,1,3.28\r\nadam,2,2.5\r\n",
        '"arm","step","val_loss"\n"adam",1,3.28\n"adam",2,2.5\n',
        "arm, step, val_loss\nadam, 1, 3.28\nadam, 2, 2.5\n",
    ],
)
def test_separators_decimal_commas_and_byte_order_marks(tmp_path: Path, text: str) -> None:
    frame = source_of(tmp_path, text).frame
    assert frame.to_dict("list") == {"arm": ["adam", "adam"], "step": [1, 2], "val_loss": [3.28, 2.5]}


def test_gzip_quoted_line_ends_and_percentages(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv.gz"
    path.write_bytes(gzip.compress(b'arm,note,acc\nadam,"two\nlines",84.2%\nmuon,,85%\n'))
    frame = delimited.read(path, Asked()).frame
    assert frame.note[0] == "two\nlines"
    assert list(frame.acc) == ["84.2%", "85%"]


def test_a_column_a_run_is_made_long(tmp_path: Path) -> None:
    source = source_of(tmp_path, "step,adam_seed0,adam_seed1,muon_seed0\n1,4,5,6\n2,3,,nan\n")
    assert source.frame.to_dict("list") == {
        "run": ["adam_seed0", "adam_seed0", "adam_seed1", "muon_seed0", "muon_seed0"],
        "arm": ["adam", "adam", "adam", "muon", "muon"],
        "seed": ["0", "0", "1", "0", "0"],
        "step": [1, 2, 1, 1, 2],
        "loss": [4, 3, 5, 6, math.inf],
    }
    assert source.notes


@pytest.mark.parametrize(
    "header",
    ["step,train_loss,val_loss", "step,val_loss,lr", "step,seed,adam", "step,loss1,loss2", "epoch,acc,adam"],
)
def test_metrics_are_not_taken_for_runs(tmp_path: Path, header: str) -> None:
    frame = source_of(tmp_path, f"{header}\n1,2,3\n2,2,3\n").frame
    assert list(frame) == header.split(",")


def test_a_metric_that_all_columns_share_is_the_loss(tmp_path: Path) -> None:
    frame = source_of(tmp_path, "step,adam/val_loss,muon/val_loss\n1,2,3\n2,2,3\n").frame
    assert list(frame) == ["run", "arm", "step", "val_loss"]
    assert list(frame.arm) == ["adam", "adam", "muon", "muon"]


def test_a_metric_may_stand_before_the_run(tmp_path: Path) -> None:
    path = written(tmp_path / "runs.csv", "step,val_loss/adam,val_loss/muon,lossy\n1,2,3,4\n")
    frame = delimited.read(path, Asked(loss="val_loss")).frame
    assert list(frame.arm) == ["adam", "muon"]
    assert list(frame.val_loss) == [2, 3]


def test_loss_chooses_among_the_metrics_of_a_wide_table(tmp_path: Path) -> None:
    path = written(
        tmp_path / "runs.csv", "step,adam_train_loss,adam_val_loss,muon_train_loss,muon_val_loss\n1,2,3,4,5\n"
    )
    frame = delimited.read(path, Asked(loss="val_loss")).frame
    assert frame.to_dict("list") == {
        "run": ["adam", "muon"],
        "arm": ["adam", "muon"],
        "step": [1, 1],
        "val_loss": [3, 5],
    }


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty"),
        ("arm,val_loss\n", "no rows"),
        ("1,2,3\n4,5,6\n", "write the columns' names above it"),
        ("arm,loss,loss\nadam,1,2\n", "two columns called loss"),
        ("adam,muon\n1,2\n3,4\n", "--step"),
        ("arm;a;b\nx;1,5;2.5\n", "decimal comma"),
        ("# by me\narm,step,val_loss\nadam,1,2\n", "remove what stands above"),
        ("arm,step,val_loss\nadam,1,2\nadam,2,3,4\n", "row 3 has 4 cells"),
        ('arm,val_loss\nadam,"1,234.5"\nmuon,2\n', "separators of thousands"),
        ("arm val_loss\nadam 1\n", "has one column"),
        ('arm,step,val_loss\n"adam,1,2\nmuon,1,2\n', "damaged"),
        ("a\0,b\n1,2\n", "UTF-8"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        source_of(tmp_path, text)


def test_text_of_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_bytes("arm,val_loss\nadám,1\n".encode("utf-16"))
    with pytest.raises(UserError, match="UTF-8"):
        delimited.read(path, Asked())


def test_a_frame_of_runs_that_pandas_wrote_with_its_index_is_wide(tmp_path: Path) -> None:
    source = source_of(tmp_path, ",adam_0,adam_1,muon_0,muon_1\n0,1,2,3,4\n1,1,2,3,4\n")
    assert source.roles["step"] == "index"
    assert list(source.frame.arm) == ["adam"] * 4 + ["muon"] * 4
    long = source_of(tmp_path, ",arm,step,val_loss\n0,adam,1,2\n1,adam,2,2\n")
    assert list(long.frame) == ["arm", "step", "val_loss"]


def test_a_first_row_that_is_longer_than_the_first_look(tmp_path: Path) -> None:
    names = [f"metric{n}" for n in range(5000)]
    text = f"step,{','.join(names)},val_loss\n1,{','.join('0' * 5000)},2.5"
    frame = source_of(tmp_path, text).frame
    assert frame.shape == (1, 5002)
    assert frame.val_loss[0] == 2.5

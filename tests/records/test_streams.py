"""steps.csv and evals.csv as they are read."""

import math

import numpy as np
import pytest

from ebc_lab.config.errors import UserError
from ebc_lab.records.streams import read_columns


def test_a_stream_is_read_by_column_and_an_incomplete_last_line_is_left_out(tmp_path):
    path = tmp_path / "steps.csv"
    path.write_text("step,loss\n0,2.5\n1,\n2")
    found = read_columns(path, ["loss"])
    assert found["step"].tolist() == [0, 1]
    assert found["loss"][0] == 2.5
    assert math.isnan(found["loss"][1])
    path.write_text("step,loss\n")
    assert {name: len(column) for name, column in read_columns(path).items()} == {"step": 0, "loss": 0}
    assert read_columns(path)["step"].dtype == np.float64


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "list index out of range"),
        (b"step,loss\n0,x\n", "could not convert"),
        (b"step,loss\n0,\0\n", "is damaged"),
        (b"step,loss\n0,\xff\n", "is damaged"),
        (b"step,lost\n0,1\n", "it has no column loss"),
        (b'"' + b"x" * 200_000, "is damaged"),
    ],
)
def test_a_damaged_stream_is_named_with_the_remedy(tmp_path, content, words):
    path = tmp_path / "steps.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        read_columns(path, ["loss"])
    assert "steps.csv is damaged" in str(error.value)
    assert "delete its run folder" in str(error.value)

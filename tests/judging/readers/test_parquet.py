"""Parquet files."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from ebc_lab.config.errors import UserError
from ebc_lab.judging.asked import Asked
from ebc_lab.judging.judgement import judge
from ebc_lab.judging.readers import parquet


def test_columns_and_what_is_not_finite(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "runs.parquet"
    frame = pd.DataFrame({"arm": ["adam", "muon"], "val_loss": [2.5, -math.inf]}).set_index("arm")
    frame.to_parquet(path)
    assert parquet.claims(path)
    assert parquet.read(path, Asked()).frame.to_dict("list") == {
        "arm": ["adam", "muon"],
        "val_loss": [2.5, math.inf],
    }


@pytest.mark.parametrize("kind", ["float32", "float16", "Float32"])
def test_floats_of_fewer_bits_name_the_arms_that_those_of_64_name(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    for name, seeds in ((kind, range(3)), ("float64", range(3, 6))):
        rows = [(arm, seed, arm + seed / 100) for arm in (0.1, 2.0) for seed in seeds]
        frame = pd.DataFrame(rows, columns=["arm", "seed", "val_loss"])
        frame.astype({"arm": name, "val_loss": name}).to_parquet(tmp_path / f"{name}.parquet")
    judgement = judge(tmp_path)
    assert [(arm["arm"], arm["runs"]) for arm in judgement.record["arms"]] == [("0.1", 6), ("2", 6)]
    frame = pd.read_parquet(tmp_path / f"{kind}.parquet")
    for arms in (
        frame.arm,
        pd.Series([*frame.arm.to_numpy()], dtype=object),
    ):  # the latter's cells are numpy's own
        assert judge(frame.assign(arm=arms)).arms().arm.tolist() == ["0.1", "2"]
    assert judgement.data.table.outcome.tolist()[:3] == [0.1, 0.11, 0.12]


def test_lists_in_cells_are_text_and_names_of_several_levels_one(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    rows = [("adam", 2.5, [0.9, 0.99]), ("muon", 2.4, [0.95])]
    names = pd.MultiIndex.from_tuples([("arm", ""), ("val_loss", "last"), ("betas", "")])
    pd.DataFrame(rows, columns=names).to_parquet(tmp_path / "runs.parquet")
    table = judge(tmp_path / "runs.parquet", settings="betas").data.table
    assert table.outcome.tolist() == [2.5, 2.4]
    assert table.betas.tolist() == ["[0.9 0.99]", "[0.95]"]


def test_without_the_library_or_damaged_the_error_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "runs.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"damaged|ebc-lab\[judge\]"):
        parquet.read(path, Asked())


def test_bytes_that_are_no_text_are_damage(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    names = pa.array([b"adam", b"\xff"], pa.binary()).view(pa.string())
    pytest.importorskip("pyarrow.parquet").write_table(pa.table({"arm": names}), tmp_path / "runs.parquet")
    with pytest.raises(UserError, match=r"runs\.parquet is a damaged Parquet file"):
        parquet.read(tmp_path / "runs.parquet", Asked())

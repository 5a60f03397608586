"""Parquet files."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from ebc_lab.config.errors import UserError
from ebc_lab.judging.asked import Asked
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


def test_without_the_library_or_damaged_the_error_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "runs.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"damaged|ebc-lab\[judge\]"):
        parquet.read(path, Asked())

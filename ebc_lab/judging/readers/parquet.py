"""Parquet files, by pandas and pyarrow."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ebc_lab.config.errors import UserError

from ..asked import Asked
from .delimited import table_source
from .reader import Source, plain_frame

TITLE = "Parquet files"


def claims(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def read(path: Path, asked: Asked) -> Source:
    try:
        frame = pd.read_parquet(path)
        frame.select_dtypes("string").to_numpy()  # text that is none shows only where it is looked at
    except ImportError as error:
        raise UserError(f"{path} is a Parquet file: pip install 'ebc-lab[judge]' to read it") from error
    except Exception as error:  # pyarrow and fastparquet have errors of their own
        raise UserError(f"{path} is a damaged Parquet file: {error}") from error
    return table_source(plain_frame(frame), asked, path, "Parquet file")

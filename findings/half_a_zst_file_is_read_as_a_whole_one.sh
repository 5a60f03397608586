#!/usr/bin/env bash
# pandas and DuckDB read the half of a .csv.zst that was copied as if it were all there is; half of a .csv.gz is refused.
#
# Guess: a compressed file that ends before its end is an error of its reader, whatever the compression.
# Seen, pandas 3.1.1 with zstandard 0.25.0, duckdb 2.0.1, fsspec 2026.9.0: of 200,000 steps of a loss curve, compressed
# and cut in the middle of the file, the .zst is read as a hundred thousand, without a word, and the last loss as the
# digits that were there. zstandard's stream_reader, below pandas and fsspec, takes the end of the file for the end of
# the frame, as DuckDB does. polars and pyarrow refuse it; all of them refuse the .gz, pandas the .bz2 and .xz, too.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check pandas==3.1.1 zstandard==0.25.0 \
    duckdb==2.0.1 fsspec==2026.9.0 polars==2.1.0 pyarrow==26.0.1 numpy==2.4.6
cd "$place"
"$place/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version
from pathlib import Path

import duckdb
import fsspec
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.csv

print(*(f"{name} {version(name)}" for name in ("pandas", "zstandard", "duckdb", "fsspec", "polars", "pyarrow")))
steps = 200_000
curve = pd.DataFrame({"step": np.arange(steps), "loss": np.random.default_rng(0).random(steps)})


def lines(path):
    with fsspec.open(path, "rb", compression="infer") as file:
        return file.read().count(b"\n") - 1


readers = {
    "pandas": lambda path: len(pd.read_csv(path)),
    "duckdb": lambda path: duckdb.sql(f"select count(*) from read_csv('{path}')").fetchall()[0][0],
    "fsspec": lines,
    "polars": lambda path: pl.read_csv(path).height,
    "pyarrow": lambda path: pyarrow.csv.read_csv(path).num_rows,
}


def read_half(ending):
    """Return the number of rows that each reader finds in half of the file, None where it refuses."""
    path = Path("curve.csv." + ending)
    curve.to_csv(path, index=False)
    assert all(read(str(path)) == steps for read in readers.values())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    rows = {}
    for name, read in readers.items():
        try:
            rows[name] = read(str(path))
        except Exception as error:  # each has its own
            rows[name] = None
            print("." + ending, name, "refuses:", type(error).__name__, error)
    print("." + ending, "rows", rows)
    return rows


assert set(read_half("gz").values()) == {None}
rows = read_half("zst")
assert rows.pop("polars") is rows.pop("pyarrow") is None
assert all(steps / 3 < number < steps * 2 / 3 for number in rows.values())
last = pd.read_csv("curve.csv.zst").iloc[-1]
print("the last row by pandas", dict(last), "was", curve["loss"][int(last["step"])])
PYTHON

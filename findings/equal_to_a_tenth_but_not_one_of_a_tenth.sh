#!/usr/bin/env bash
# In a float32 column `== 0.1` finds the rows and isin([0.1]) finds none, in pandas and polars; DuckDB parts elsewhere.
#
# Guess: 0.1 is not a float32, so either all of these widen the column and find nothing, or round 0.1 and find all.
# Seen, pandas 3.1.1, polars 2.1.0, duckdb 2.0.1, pyarrow 26.0.1: `lr == 0.1` and query("lr == 0.1") round the number
# to the column's type and find both runs; isin and is_in widen the column and find none, and so does a merge. DuckDB
# finds both with 0.1 written into the query, none with 1e-1 or with 0.1 bound to a `?`. pyarrow's filters find none.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    pandas==3.1.1 polars==2.1.0 duckdb==2.0.1 pyarrow==26.0.1 numpy==2.4.6
cd "$place"
"$place/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.parquet as pq

print(*(f"{name} {version(name)}" for name in ("pandas", "polars", "duckdb", "pyarrow")))
runs = pd.DataFrame({"lr": np.array([0.1, 0.1, 0.2], np.float32)})
runs.to_parquet("runs.parquet")
frame = pl.read_parquet("runs.parquet")
asked = "select * from 'runs.parquet' where lr = "
found = {
    "pandas ==": runs[runs["lr"] == 0.1],
    "pandas query": runs.query("lr == 0.1"),
    "pandas isin": runs[runs["lr"].isin([0.1])],
    "pandas merge": runs.merge(pd.DataFrame({"lr": [0.1]})),
    "polars ==": frame.filter(pl.col("lr") == 0.1),
    "polars is_in": frame.filter(pl.col("lr").is_in([0.1])),
    "duckdb 0.1": duckdb.sql(asked + "0.1").fetchall(),
    "duckdb 1e-1": duckdb.sql(asked + "1e-1").fetchall(),
    "duckdb ?": duckdb.execute(asked + "?", [0.1]).fetchall(),
    "pyarrow filters": pq.read_table("runs.parquet", filters=[("lr", "==", 0.1)]),
}
counts = {name: len(rows) for name, rows in found.items()}
print(counts)
both = {"pandas ==", "pandas query", "polars ==", "duckdb 0.1"}
assert counts == {name: 2 if name in both else 0 for name in found}
PYTHON

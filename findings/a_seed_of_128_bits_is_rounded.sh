#!/usr/bin/env bash
# The seed that numpy makes for itself comes back from a JSON file rounded, by orjson, pyarrow and DuckDB alike.
#
# Guess: a reader that has no integers of 128 bits refuses them; orjson.dumps does, so orjson.loads will.
# Seen, orjson 3.13.0, pyarrow 26.0.1, duckdb 2.0.1: SeedSequence().entropy, which default_rng() draws and whose page
# says to record it, is written by json.dump in all its digits, and is a float of 53 bits behind orjson.loads,
# pyarrow.json.read_json, pyarrow.csv.read_csv and DuckDB's read_json, without a word. As a whole number again it is
# another seed with other draws. json, msgspec, ujson and polars read it exactly; pandas' read_json refuses it.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check numpy==2.4.6 orjson==3.13.0 \
    pyarrow==26.0.1 duckdb==2.0.1 msgspec==0.23.0 ujson==6.1.0 polars==2.1.0 pandas==3.1.1
cd "$place"
"$place/venv/bin/python" - <<'PYTHON'
import json
from importlib.metadata import version
from pathlib import Path

import duckdb
import msgspec
import numpy as np
import orjson
import pandas as pd
import polars as pl
import pyarrow.csv
import pyarrow.json
import ujson

print(*(f"{name} {version(name)}" for name in ("numpy", "orjson", "pyarrow", "duckdb", "msgspec", "ujson", "polars")))
seed = 339408520384798750984571092384753287  # one SeedSequence().entropy
assert np.random.SeedSequence(seed).entropy == seed
text = json.dumps({"seed": seed})
Path("run.json").write_text(text + "\n")
Path("run.csv").write_text(f"seed\n{seed}\n")

read = {
    "json": json.loads(text)["seed"],
    "msgspec": msgspec.json.decode(text)["seed"],
    "ujson": ujson.loads(text)["seed"],
    "polars": pl.read_ndjson("run.json")["seed"][0],
    "orjson": orjson.loads(text)["seed"],
    "pyarrow json": pyarrow.json.read_json("run.json")["seed"][0].as_py(),
    "pyarrow csv": pyarrow.csv.read_csv("run.csv")["seed"][0].as_py(),
    "duckdb": duckdb.sql("select seed from 'run.json'").fetchall()[0][0],
}
for name, value in read.items():
    print(name, repr(value), "draws", np.random.default_rng(int(value)).integers(1000, size=3))
exact = {name for name, value in read.items() if type(value) is int and value == seed}
assert exact == {"json", "msgspec", "ujson", "polars"}
assert all(type(value) is float and int(value) != seed for name, value in read.items() if name not in exact)
for name, refused in (("orjson.dumps", lambda: orjson.dumps(seed)), ("pandas", lambda: pd.read_json("run.json"))):
    try:
        refused()
    except (TypeError, ValueError) as error:
        print(name, "refuses:", error)
    else:
        raise SystemExit(f"{name} takes it now")
PYTHON

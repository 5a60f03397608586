#!/usr/bin/env bash
# The median of 1, 2, 3, inf, inf is 3, and quantile(0.5) of the same numbers is NaN, although none of them is.
#
# Guess: at a rank that falls on a value the quantile is that value; 3 stands in the middle.
# Seen, numpy 2.4.6 and pandas 3.1.1: np.median and Series.median say 3.0; np.quantile, np.nanquantile,
# Series.quantile and describe() say NaN; groupby().quantile(0.5) says 3.0 again. The linear rule adds 0 times the
# distance to the next value, which is infinite.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check pandas==3.1.1 numpy==2.4.6
"$place/venv/bin/python" -W ignore - <<'PYTHON'
import math

import numpy as np
import pandas as pd

print("numpy", np.__version__, "pandas", pd.__version__)
losses = pd.Series([1.0, 2.0, 3.0, math.inf, math.inf])
three = {
    "np.median": np.median(losses.to_numpy()),
    "Series.median": losses.median(),
    "groupby quantile": losses.groupby([0] * 5).quantile(0.5)[0],
}
missing = {
    "np.quantile": np.quantile(losses.to_numpy(), 0.5),
    "np.nanquantile": np.nanquantile(losses.to_numpy(), 0.5),
    "Series.quantile": losses.quantile(0.5),
    "describe": losses.describe()["50%"],
}
print(three, missing)
assert all(value == 3 for value in three.values())
assert all(math.isnan(value) for value in missing.values())
PYTHON

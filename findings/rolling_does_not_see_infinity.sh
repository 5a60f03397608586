#!/usr/bin/env bash
# pandas' moving and expanding windows take infinity for a missing value: their maximum is never infinite.
#
# Guess: only NaN is missing; [1, inf].max() is inf, in a window as everywhere else in pandas.
# Seen, pandas 3.1.1: with min_periods=1 a loss curve 4, 3, inf, inf, inf smooths to 4, 3.5, 3, NaN, NaN: the last
# number that is left is the best. rolling().max() and expanding().max() pass over the infinity, cummax() does not;
# rolling().count() counts it, rolling().sum() leaves it out; ewm().mean() repeats its last value there and goes on.
# The pages of these methods speak of NaN alone.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check pandas==3.1.1 numpy==2.4.6
"$place/venv/bin/python" -W ignore - <<'PYTHON'
import math

import numpy as np
import pandas as pd

print("pandas", pd.__version__, "numpy", np.__version__)
spike, diverged = pd.Series([1.0, 2.0, math.inf, 3.0]), pd.Series([4.0, 3.0] + [math.inf] * 3)
window = spike.rolling(2, min_periods=1)
seen = {
    "rolling max": window.max(),
    "rolling sum": window.sum(),
    "rolling count": window.count(),
    "expanding max": spike.expanding().max(),
    "cummax": spike.cummax(),
    "ewm mean": spike.ewm(alpha=0.5).mean(),
    "a diverged curve smoothed": diverged.rolling(2, min_periods=1).mean(),
}
for name, values in seen.items():
    print(name, values.tolist())
assert seen["rolling max"].tolist() == [1, 2, 2, 3]
assert seen["rolling sum"].tolist() == [1, 3, 2, 3]
assert seen["expanding max"].tolist() == [1, 2, 2, 3]
assert seen["cummax"].tolist() == [1, 2, math.inf, math.inf]
assert np.isfinite(seen["ewm mean"]).all()
assert seen["a diverged curve smoothed"].tolist()[:3] == [4, 3.5, 3]
assert seen["a diverged curve smoothed"].isna().tolist() == [False] * 3 + [True] * 2
PYTHON

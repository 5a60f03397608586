#!/usr/bin/env bash
# After one spike bottleneck's moving mean of a float32 loss stays wrong to the end, and so can scipy's uniform filter.
#
# Guess: both sum a window anew or in double precision; three steps behind the spike the mean is right again.
# Seen, bottleneck 1.6.0: a loss of 3 with one step at 1e8 has a moving mean of 2.6667 from there on, in float32; a
# running sum loses what the spike did not leave room for, and never gets it back. (The page warns of infinity alone.)
# scipy 1.17.1's uniform_filter1d sums in double: it says 5.33 for ever behind 1e17, and NaN for ever behind an infinite
# loss, of which its page says nothing. pandas and polars say 3.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    bottleneck==1.6.0 scipy==1.17.1 pandas==3.1.1 polars==2.1.0 numpy==2.4.6
"$place/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import bottleneck
import numpy as np
import pandas as pd
import polars as pl
from scipy.ndimage import uniform_filter1d

print(*(f"{name} {version(name)}" for name in ("bottleneck", "scipy", "pandas", "polars")))
means = {
    "bottleneck": lambda x: bottleneck.move_mean(x, 3),
    "scipy": lambda x: uniform_filter1d(x, 3),
    "pandas": lambda x: pd.Series(x).rolling(3).mean().to_numpy(),
    "polars": lambda x: pl.Series(x).rolling_mean(3).to_numpy(),
}


def last(spike, dtype):
    curve = np.full(1000, 3.0, dtype)
    curve[10] = spike
    lasts = {name: float(mean(curve)[-2]) for name, mean in means.items()}
    print(f"3.0 with one step at {spike:g}, {np.dtype(dtype)}, 988 steps later:", lasts)
    assert lasts["pandas"] == lasts["polars"] == 3
    return lasts


spiked = last(1e8, np.float32)
assert abs(spiked["bottleneck"] - 8 / 3) < 1e-6
assert spiked["scipy"] == 3
assert abs(last(1e17, np.float64)["scipy"] - 16 / 3) < 1e-9
assert np.isnan(last(np.inf, np.float64)["scipy"])
PYTHON

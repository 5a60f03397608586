#!/usr/bin/env bash
# seaborn takes the mean of the finite values alone: the bar of an arm one of whose runs diverged is the lowest.
#
# Guess: NaN is missing data, infinity is not; the mean of (1.2, inf) is inf, and nothing is drawn there.
# Seen, seaborn 0.13.2 with pandas 3.1.1: barplot, pointplot and lineplot draw 1.2, as if that run did not exist,
# without a warning: below the mean 1.5 of an arm that never diverged. The same groupby().mean() in pandas is inf.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    seaborn==0.13.2 pandas==3.1.1 numpy==2.4.6 matplotlib==3.11.2
"$place/venv/bin/python" -W error::UserWarning -W error::RuntimeWarning - <<'PYTHON'
import math

import matplotlib
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

matplotlib.use("agg")
print("seaborn", sns.__version__, "pandas", pd.__version__)
runs = pd.DataFrame({"arm": ["sound", "sound", "frail", "frail"], "loss": [1.0, 2.0, 1.2, math.inf]})
curves = pd.DataFrame({"step": [0, 0, 1, 1, 2, 2], "loss": [4.0, 4.0, 3.0, 5.0, 2.0, math.inf]})
print("pandas' means", runs.groupby("arm")["loss"].mean().to_dict(), curves.groupby("step")["loss"].mean().tolist())
bars, points, line = (Figure().subplots() for _ in range(3))
sns.barplot(runs, x="arm", y="loss", errorbar=None, ax=bars)
sns.pointplot(runs, x="arm", y="loss", errorbar=None, ax=points)
sns.lineplot(curves, x="step", y="loss", errorbar=None, ax=line)
heights = [float(bar.get_height()) for bar in bars.patches]
print("bars", heights, "points", points.lines[0].get_ydata(), "line", line.lines[0].get_ydata())
assert heights == [1.5, 1.2]
assert list(points.lines[0].get_ydata()) == [1.5, 1.2]
assert list(line.lines[0].get_ydata()) == [4, 4, 2]
PYTHON

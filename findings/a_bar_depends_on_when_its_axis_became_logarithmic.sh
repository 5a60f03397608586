#!/usr/bin/env bash
# seaborn's mean of 1 and 100 is 50.5 if the axis is made logarithmic after the plot and 10 if it was so before.
#
# Guess: the estimator is the mean of the data; an axis' scale is a matter of drawing.
# Seen, seaborn 0.13.2 with matplotlib 3.11.2: barplot, pointplot and lineplot on an axis with set_yscale("log") take
# the mean of the logarithms, a geometric mean, and so does barplot(log_scale=True); the same call before set_yscale
# takes the arithmetic mean. The two figures have the same axes and labels and other heights: two arms can change
# places, as a rare large value counts in the one and hardly in the other.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    seaborn==0.13.2 pandas==3.1.1 numpy==2.4.6 matplotlib==3.11.2
MPLBACKEND=Agg "$place/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import numpy as np
import pandas as pd
import seaborn
from matplotlib import pyplot

print(*(f"{name} {version(name)}" for name in ("seaborn", "matplotlib", "pandas")))
runs = pd.DataFrame({"arm": ["steady"] * 2 + ["wild"] * 2, "loss": [20.0, 20.0, 1.0, 100.0]})


def heights(plot, when):
    figure, axis = pyplot.subplots()
    if when == "before":
        axis.set_yscale("log")
    plot(runs, x="arm", y="loss", ax=axis, errorbar=None)
    if when == "after":
        axis.set_yscale("log")
    assert axis.get_yscale() == "log"
    drawn = [bar.get_height() for bar in axis.patches] or axis.lines[0].get_ydata()
    pyplot.close(figure)
    drawn = [round(float(height), 6) for height in drawn]
    print(plot.__name__, "axis logarithmic", when, "the plot: steady and wild", drawn)
    return drawn


for plot in (seaborn.barplot, seaborn.pointplot, seaborn.lineplot):
    assert heights(plot, "after") == [20, 50.5]
    assert np.allclose(heights(plot, "before"), [20, 10])
axis = seaborn.barplot(runs, x="arm", y="loss", errorbar=None, log_scale=True)
assert np.allclose([bar.get_height() for bar in axis.patches], [20, 10])
PYTHON

#!/usr/bin/env bash
# A figure whose layout engine was removed by name is still drawn twice when it is saved.
#
# Guess: after set_layout_engine("none") a figure is saved as one that never had an engine.
# Seen, matplotlib 3.11.2: where an engine was there before, "none" leaves a placeholder in its place (so that a
# colour bar made meanwhile stays valid), and savefig draws the whole figure once for nothing whenever there is any
# engine. set_layout_engine(None) leaves none, and the figure is drawn once.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check matplotlib==3.11.2 numpy==2.3.5
"$place/venv/bin/python" - <<'PYTHON'
import io

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.use("agg")
print("matplotlib", matplotlib.__version__)
draw, drawn = Axes.draw, []
Axes.draw = lambda axes, renderer: (drawn.append(axes), draw(axes, renderer))[1]


def times_drawn(*engines):
    figure = Figure()
    figure.add_subplot().plot([0, 1])
    for engine in engines:
        figure.set_layout_engine(engine)
    drawn.clear()
    figure.savefig(io.BytesIO(), format="png")
    print(engines, type(figure.get_layout_engine()).__name__, len(drawn))
    return len(drawn)


assert times_drawn() == 1
assert times_drawn("constrained") == 2
assert times_drawn("constrained", "none") == 2
assert times_drawn("constrained", None) == 1
PYTHON

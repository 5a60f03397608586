#!/usr/bin/env bash
# One infinite value in any arm makes every p-value of Dunnett's test 1.000, also those of arms without it.
#
# Guess: an error, as of tukey_hsd beside it, or NaN.
# Seen, scipy 1.17.1: the shared variance is NaN, so each statistic and each interval are NaN, and still each p-value
# is the number 1.0: "no difference" between a control at 1 and an arm at 100.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check scipy==1.17.1 numpy==2.4.6
"$place/venv/bin/python" -W ignore - <<'PYTHON'
import math

import numpy as np
import scipy
from scipy.stats import dunnett, tukey_hsd

print("scipy", scipy.__version__, "numpy", np.__version__)
control, far, near = [1.0, 1.1, 1.2], [100.0, 100.1, 100.2], [1.1, 1.2, 1.0]
finite = dunnett(far, near, control=control, rng=0)
print("all finite: statistic", finite.statistic, "p", finite.pvalue)
assert finite.pvalue[0] < 1e-6 < 0.5 < finite.pvalue[1]

diverged = [1.1, 1.2, math.inf]
judged = dunnett(far, diverged, control=control, rng=0)
interval = judged.confidence_interval()
print("one infinite: statistic", judged.statistic, "p", judged.pvalue, "interval", interval.low, interval.high)
assert np.isnan(judged.statistic).all()
assert np.isnan(interval.low).all()
assert (judged.pvalue == 1).all()
try:
    tukey_hsd(far, diverged, control)
except ValueError as error:
    print("tukey_hsd ValueError:", error)
else:
    raise SystemExit("tukey_hsd takes it now")
PYTHON

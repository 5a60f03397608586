#!/usr/bin/env bash
# Of a paired t-test pingouin says a power of 9% beside p = 0.002: it is the power for pairs that are not paired.
#
# Guess: "achieved power of the test" is that of the test in the same row, the paired one.
# Seen, pingouin 0.7.0: four seeds, each 0.4 to 0.6 better in the second arm: t = -11, p = 0.0016, power 0.088. Cohen's
# d is that of two independent groups (0.39, as documented for compute_effsize), and power_ttest(contrast="paired"),
# which expects the d of the differences (5.5), gets it. With that d power_ttest says 0.999996, and so does ttest of
# the differences themselves, the very same test. The better the pairs agree, the further it is off: whoever asks how
# many seeds are missing hears "many more".
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    pingouin==0.7.0 scipy==1.17.1 numpy==2.4.6 pandas==3.1.1
"$place/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import numpy as np
import pingouin

print("pingouin", version("pingouin"), "scipy", version("scipy"))
first = np.array([1.0, 2.0, 3.0, 4.1])
second = first + [0.5, 0.6, 0.4, 0.6]
row = pingouin.ttest(first, second, paired=True).iloc[0]
difference = first - second
d = abs(difference.mean()) / difference.std(ddof=1)
paired = pingouin.power_ttest(d=d, n=4, contrast="paired")
print("p", row["p_val"], "cohen_d", row["cohen_d"], "power", row["power"])
print("d of the differences", d, "power_ttest", paired)
assert row["p_val"] < 0.002
assert row["power"] < 0.1
assert paired > 0.999
one = pingouin.ttest(difference, 0).iloc[0]  # the very same test, of the differences
print("the same test of the differences: p", one["p_val"], "power", one["power"])
assert np.isclose(one["p_val"], row["p_val"])
assert one["power"] > 0.999
PYTHON

#!/usr/bin/env bash
# The Brunner-Munzel test answers NaN where one arm is better in every pair, and far too little one pair before that.
#
# Guess: with every loss of one arm below every loss of the other, p is the least of all: about 0.01 for five and five.
# Seen, scipy 1.17.1 and statsmodels 0.15.0: NaN from brunnermunzel and from rank_compare_2indep, for three runs an arm
# as for twenty: no rank differs within the arms, so the variance is zero and the degrees of freedom are 0 / 0. If one
# pair of five and five is the other way around, p is 3.9e-05, where the least that any test of ranks can say is
# 2 / 252 = 0.008; mannwhitneyu says 0.016. So p goes 3.9e-05, NaN as an arm gets better.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    scipy==1.17.1 statsmodels==0.15.0 numpy==2.4.6
"$place/venv/bin/python" -W ignore - <<'PYTHON'
import math
from importlib.metadata import version

from scipy.stats import brunnermunzel, mannwhitneyu
from statsmodels.stats.nonparametric import rank_compare_2indep

print("scipy", version("scipy"), "statsmodels", version("statsmodels"))


def tested(first, second):
    ps = [float(test(first, second).pvalue) for test in (brunnermunzel, rank_compare_2indep)]
    ps.append(float(mannwhitneyu(first, second, method="exact").pvalue))
    print(first, second, "brunnermunzel {} rank_compare_2indep {} mannwhitneyu {}".format(*ps))
    return ps


for size in (3, 5, 20):
    *nans, exact = tested(list(range(size)), list(range(size, 2 * size)))
    assert all(map(math.isnan, nans))
    assert math.isclose(exact, 2 / math.comb(2 * size, size))
*near, exact = tested([1, 2, 3, 4, 5], [4.5, 6, 7, 8, 9])
assert all(0 < p < 1e-4 for p in near)
assert math.isclose(exact, 4 / 252)
PYTHON

#!/usr/bin/env bash
# A permutation test whose statistic is NaN or infinite has p = 0, the surest answer there is.
#
# Guess: p is NaN, or 1, since no permutation says anything; certainly no less than 1 / the number of permutations.
# Seen, scipy 1.17.1: with one infinite loss (a run that diverged) in one of two arms of four, permutation_test of the
# difference of means takes all 70 permutations and returns exactly 0.0, where the least possible two-sided p is 2/70;
# so it does for an arm against itself. ttest_ind and pearsonr with PermutationMethod() do the same, pearsonr for
# finite data, too: x is constant, r is NaN, p is 0.0. Without a method all of them return NaN. p counts the
# permutations that reach the observed value, and none compares as reached: inf minus the tolerance is NaN, as the
# tolerance is inf itself.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check scipy==1.17.1 numpy==2.4.6
"$place/venv/bin/python" -W ignore - <<'PYTHON'
import math

import numpy as np
import scipy
from scipy.stats import PermutationMethod, pearsonr, permutation_test, ttest_ind

print("scipy", scipy.__version__, "numpy", np.__version__)


def difference(first, second, axis=-1):
    return np.mean(first, axis=axis) - np.mean(second, axis=axis)


def p_of_means(first, second):
    result = permutation_test((np.array(first), np.array(second)), difference)
    print(first, second, "of", len(result.null_distribution), "statistic", result.statistic, "p", result.pvalue)
    return result.pvalue


worse, diverged = [5.0, 6.0, 7.0, 8.0], [1.0, 2.0, 3.0, math.inf]
assert math.isclose(p_of_means([1.0, 2.0, 3.0, 4.0], worse), 2 / 70)
assert p_of_means(diverged, [1.5, 2.5, 3.5, 2.0]) == 0
assert p_of_means(diverged, diverged) == 0

plain, permuted = ttest_ind(diverged, worse), ttest_ind(diverged, worse, method=PermutationMethod())
print("ttest_ind", plain.pvalue, "permuted", permuted.pvalue)
assert math.isnan(plain.pvalue)
assert permuted.pvalue == 0
plain, permuted = (pearsonr([3.0] * 4, [1.0, 2.0, 2.0, 3.5], **k) for k in ({}, {"method": PermutationMethod()}))
print("pearsonr of a constant", plain.pvalue, "permuted", permuted.pvalue)
assert math.isnan(plain.pvalue)
assert permuted.pvalue == 0
PYTHON

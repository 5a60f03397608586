#!/usr/bin/env bash
# From 67 dimensions on scipy's fit of a von Mises-Fisher law says kappa = 1e-08, whatever the directions are.
#
# Guess: the fit holds until a Bessel function underflows, at some 300 dimensions, and then says so with NaN.
# Seen, scipy 1.17.1: 2,000 draws with kappa of half the dimension: 33.2 for 33 in 66 dimensions, 1e-08 in 67 and in
# 640, for draws of kappa 10,000 as well. The search for the root begins at 1e-08, where both Bessel functions of the
# ratio are 0; their ratio is NaN (numpy's RuntimeWarning is all there is to see), and the fit takes that end for the
# answer. In 640 dimensions the density at kappa = 10 is infinite, too. The length of the mean alone gives kappa
# within 5% in each of these, by r (d - r^2) / (1 - r^2).
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check scipy==1.17.1 numpy==2.4.6
"$place/venv/bin/python" -W ignore - <<'PYTHON'
import math

import numpy as np
import scipy
from scipy.stats import vonmises_fisher

print("scipy", scipy.__version__, "numpy", np.__version__)


def fitted(dimension, kappa):
    mean = np.eye(dimension)[0]
    draws = vonmises_fisher(mean, kappa).rvs(2000, random_state=0)
    _, of_scipy = vonmises_fisher.fit(draws)
    r = float(np.linalg.norm(draws.mean(axis=0)))
    by_hand = r * (dimension - r**2) / (1 - r**2)
    print("dimension", dimension, "kappa", kappa, "fit", of_scipy, "by hand", by_hand)
    assert abs(by_hand / kappa - 1) < 0.05
    return of_scipy


assert abs(fitted(66, 33) - 33) < 2
for dimension, kappa in ((67, 33), (640, 320), (640, 10_000)):
    assert fitted(dimension, kappa) == 1e-8
with np.errstate(all="ignore"):
    density = vonmises_fisher(np.eye(640)[0], 10).logpdf(np.eye(640)[0])
print("640 dimensions, kappa 10: logpdf", density)
assert density == math.inf
PYTHON

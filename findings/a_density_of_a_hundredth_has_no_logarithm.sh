#!/usr/bin/env bash
# scipy's noncentral chi-squared law: where the density is 0.011, the greatest there is, its logarithm is minus infinity.
#
# Guess: logpdf is at least as good as log(pdf), which is what it is for: finite wherever the density is.
# Seen, scipy 1.17.1: with 640 degrees of freedom and a noncentrality of 1 (a squared distance in 640 dimensions) pdf is
# 0.0111 at its middle, right to eleven digits, and logpdf -inf; with 300 degrees and 1e-4 likewise. So a sum of log
# likelihoods is -inf and a fit goes elsewhere. pdf comes from Boost; logpdf goes by a Bessel function that underflows.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check scipy==1.17.1 numpy==2.4.6
"$place/venv/bin/python" -W ignore - <<'PYTHON'
import math

import numpy as np
import scipy
from scipy.stats import chi2, ncx2, poisson

print("scipy", scipy.__version__, "numpy", np.__version__)


def densities(freedom, noncentrality):
    x = freedom + noncentrality
    pdf, logpdf = float(ncx2.pdf(x, freedom, noncentrality)), float(ncx2.logpdf(x, freedom, noncentrality))
    terms = np.arange(2000)  # the law is a mixture of central ones
    mixed = float(np.sum(poisson.pmf(terms, noncentrality / 2) * chi2.pdf(x, freedom + 2 * terms)))
    print(freedom, "degrees, noncentrality", noncentrality, "pdf", pdf, "as a mixture", mixed, "logpdf", logpdf)
    assert math.isclose(pdf, mixed, rel_tol=1e-11)
    return math.log(pdf), logpdf


for freedom, noncentrality in ((640, 1), (640, 1e-3), (300, 1e-4)):
    assert densities(freedom, noncentrality)[1] == -math.inf
for freedom, noncentrality in ((400, 1), (640, 10)):
    assert math.isclose(*densities(freedom, noncentrality), rel_tol=1e-11)
PYTHON

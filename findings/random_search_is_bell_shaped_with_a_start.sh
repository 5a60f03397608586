#!/usr/bin/env bash
# nevergrad's random search is uniform between two bounds, until the parameter is given a start or is an array.
#
# Guess: where a search starts does not matter to a random search; bounds make it uniform ("activated by default if
# both bounds are provided"), for a number as for an array.
# Seen, nevergrad 1.0.12: RandomSearch on Log(lower=1e-5, upper=1) draws each of the five decades in 400 of 2,000
# trials; with init=1e-3 a bell around it, and the decade below 1 in about 13. Scalar(lower=0, upper=1) is uniform,
# with init=0.1 two thirds of its trials are below 0.2; Array(shape=(1,), lower=0, upper=1) is a bell without a start.
# ScrHammersleySearch is uniform in all of them.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check nevergrad==1.0.12 numpy==2.4.6
"$place/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import nevergrad as ng
import numpy as np

print("nevergrad", version("nevergrad"), "numpy", np.__version__)


def drawn(name, parameter, search="RandomSearch"):
    """Count the draws in five equal parts of the range."""
    parameter.random_state.seed(0)
    optimizer = ng.optimizers.registry[search](parameter, budget=2000)
    values = np.ravel([optimizer.ask().value for _ in range(2000)])
    logarithmic = name.startswith("Log")
    counts, _ = np.histogram(np.log10(values) if logarithmic else values, 5, (-5, 0) if logarithmic else (0, 1))
    print(search, name, counts)
    return counts


def even(counts):
    return counts.min() > 340


bounds = {"lower": 0, "upper": 1}
assert even(drawn("Log", ng.p.Log(lower=1e-5, upper=1)))
assert drawn("Log, init=1e-3", ng.p.Log(init=1e-3, lower=1e-5, upper=1))[-1] < 40
assert even(drawn("Scalar", ng.p.Scalar(**bounds)))
assert drawn("Scalar, init=0.1", ng.p.Scalar(init=0.1, **bounds))[0] > 1000
counts = drawn("Array", ng.p.Array(shape=(1,), **bounds))
assert counts[2] > 4 * counts[0]
assert even(drawn("Array", ng.p.Array(shape=(1,), **bounds), "ScrHammersleySearch"))
PYTHON

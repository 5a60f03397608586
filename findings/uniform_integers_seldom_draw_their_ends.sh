#!/usr/bin/env bash
# hyperopt's uniformint and scikit-optimize's Integer draw the first and the last number half as often as the others.
#
# Guess: an integer "sampled uniformly between the lower and upper bounds (inclusive)", as scikit-optimize's page says,
# is each number as often as any other. (hyperopt's quniform is known to round; uniformint is a function of its own.)
# Seen, hyperopt 0.3.0, scikit-optimize 0.10.2: of 8,000 draws from 0 to 4 about 1,000 are 0, 1,000 are 4 and 2,000
# each of the rest: both draw a real number between the bounds and round it. Of 1 to 3 layers half the trials have 2.
# scikit-optimize does so for the first, random points of its Gaussian process; before a forest it draws each number
# 1,600 times, as Optuna and ConfigSpace do.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check hyperopt==0.3.0 scikit-optimize==0.10.2 \
    optuna==5.0.0 ConfigSpace==1.2.2 numpy==2.4.6
"$place/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import numpy as np
import optuna
from ConfigSpace import ConfigurationSpace
from hyperopt import hp
from hyperopt.pyll.stochastic import sample
from skopt import Optimizer
from skopt.space import Integer

print(*(f"{name} {version(name)}" for name in ("hyperopt", "scikit-optimize", "optuna", "ConfigSpace")))
optuna.logging.set_verbosity(optuna.logging.ERROR)
number = 8000
rng = np.random.default_rng(0)
space = hp.uniformint("n", 0, 4)
study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
configurations = ConfigurationSpace({"n": (0, 4)}, seed=0).sample_configuration(number)
whole = optuna.distributions.IntDistribution(0, 4)


def random_points(model):
    optimizer = Optimizer([Integer(0, 4)], base_estimator=model, random_state=0)
    return [int(optimizer.ask()[0]) for _ in range(number)]


drawn = {
    "hyperopt": [int(sample(space, rng=rng)) for _ in range(number)],
    "scikit-optimize, GP": random_points("GP"),
    "scikit-optimize, RF": random_points("RF"),
    "optuna": [study.sampler.sample_independent(study, None, "n", whole) for _ in range(number)],
    "ConfigSpace": [each["n"] for each in configurations],
}
for name, numbers in drawn.items():
    counts = np.bincount(numbers)
    print(name, counts)
    expected = [1000, 2000, 2000, 2000, 1000] if name in ("hyperopt", "scikit-optimize, GP") else [1600] * 5
    assert (abs(counts - expected) < 160).all()
PYTHON

#!/usr/bin/env bash
# Optuna's PercentilePruner stops pruning once an earlier trial has reported infinity near its percentile, and then
# does not prune infinity either.
#
# Guess: infinity is the worst loss; whoever is worse than the percentile is pruned as before.
# Seen, optuna 5.0.0: five trials at 1, 2, 3, 4 and 5, PercentilePruner(75): a sixth at 100 or at inf is pruned. With
# inf in place of the 5, none is, whatever it reports: numpy's percentile between 4 and inf is NaN at a weight of 0,
# and nothing is larger than NaN. MedianPruner does the same with 1, 2, 3, inf, inf. Where the diverged trials report
# NaN instead, they are left out, and 100 is pruned.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check optuna==5.0.0 numpy==2.4.6
"$place/venv/bin/python" -W ignore - <<'PYTHON'
from math import inf, nan

import numpy as np
import optuna
from optuna.pruners import MedianPruner, PercentilePruner

optuna.logging.set_verbosity(optuna.logging.ERROR)
print("optuna", optuna.__version__, "numpy", np.__version__)


def pruned(pruner, earlier, value):
    study = optuna.create_study(direction="minimize", pruner=pruner)
    for loss in earlier:
        trial = study.ask()
        trial.report(loss, step=0)
        study.tell(trial, 1.0)
    trial = study.ask()
    trial.report(value, step=0)
    answer = bool(trial.should_prune())
    print(type(pruner).__name__, "after", earlier, "at", value, "pruned" if answer else "goes on")
    return answer


for pruner, finite, infinite, missing in (
    (PercentilePruner(75.0, n_startup_trials=1), [1, 2, 3, 4, 5], [1, 2, 3, 4, inf], [1, 2, 3, 4, nan]),
    (MedianPruner(n_startup_trials=1), [1, 2, 3, 4, 5], [1, 2, 3, inf, inf], [1, 2, 3, nan, nan]),
):
    for value in (100, inf):
        assert pruned(pruner, finite, value)
        assert not pruned(pruner, infinite, value)
        assert pruned(pruner, missing, value)
PYTHON

"""At what level the Welch intervals of a family of comparisons have to stand to hold all at once.

The comparisons of a family share arms, so that they are correlated, and their freedom differs with the arms'
variances and numbers of runs. Dunnett's (1955) and Tukey's tables know equal variances only, Games & Howell's
(1976) all pairs only, and at Bonferroni's level Welch's intervals from few runs are too narrow, because their
tails are heavier than those of the t that stands for them. So the family is drawn anew many times without any
true difference, under the estimated variances and with their own chi-square noise, and the smallest of its
p-values is noted each time (a parametric bootstrap of Westfall & Young's 1993 min-p, in one step). Every
comparison then gets the same level, which balances comparisons of different freedom (Beran 1988).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Places = NDArray[np.int64]

DRAWS = 20_000  # of a family, where it has few comparisons
FEWEST_DRAWS = 5_000
MOST_VALUES = 4_000_000  # t statistics that are drawn for a family, at more than FEWEST_DRAWS
AT_ONCE = 100_000  # t statistics in one block, which stays in a processor's cache
SEED = 81
NEAR = 0.9  # share of a draw's most extreme normal score from which on exact p-values are computed


def welch(errors: Floats, freedom: Floats, first: Places, second: Places) -> tuple[Floats, Floats]:
    """Return the standard errors of the differences of two means and their degrees of freedom (Welch 1947;
    Satterthwaite 1946).

    `errors`: standard errors of the arms' means, arms along the last axis; `freedom`: of each arm; `first`,
    `second`: the places of the compared arms.
    """
    square = errors**2
    one, other = square[..., first], square[..., second]
    whole = one + other
    shares = one**2 / freedom[first] + other**2 / freedom[second]
    return np.sqrt(whole), whole**2 / shares


def two_sided(statistics: Floats, freedom: Floats) -> Floats:
    """Return the two-sided p-values of t statistics."""
    from scipy import special

    values: Floats = 2 * special.stdtr(freedom, -abs(statistics))
    return values


def _smallest(statistics: Floats, freedom: Floats) -> Floats:
    """Return the smallest two-sided p-value of each row. The exact p-value is slow; it is computed only where
    Wallace's (1959) approximate normal score comes near the row's largest."""
    about = 8 * freedom
    scores = (about + 1) / (about + 3) * np.sqrt(freedom * np.log1p(statistics**2 / freedom))
    near = scores >= NEAR * scores.max(axis=1, keepdims=True)
    values = np.ones(statistics.shape)
    values[near] = two_sided(statistics[near], freedom[near])
    smallest: Floats = values.min(axis=1)
    return smallest


def joint(
    errors: Floats,
    freedom: Floats,
    first: Places,
    second: Places,
    p: Floats,
    level: float,
    draws: int | None = None,
    seed: int = SEED,
) -> tuple[float, Floats]:
    """Return the level at which the Welch interval of each comparison has to stand so that all of them hold
    at once but for an error of `level`, and the joint p-values that belong to the comparisons' own, `p`.

    The other parameters are those of `welch`. A joint p-value is below `level` exactly where the interval of
    its comparison excludes 0; the smallest that there is is 1 / (draws + 1). Neither is ever more favourable
    than one comparison alone. The same call returns the same figures.
    """
    if len(p) == 1:
        return level, p
    draws = draws or max(FEWEST_DRAWS, min(DRAWS, MOST_VALUES // len(p)))
    random = np.random.default_rng(seed)
    lowest = np.empty(draws)
    block = max(1, AT_ONCE // len(p))
    for start in range(0, draws, block):
        shape = (min(block, draws - start), len(errors))
        means = random.standard_normal(shape) * errors
        drawn = errors * np.sqrt(random.chisquare(freedom, shape) / freedom)
        error, free = welch(drawn, freedom, first, second)
        t = abs(means[:, first] - means[:, second]) / error
        lowest[start : start + block] = _smallest(t, free)
    lowest.sort()
    beyond = math.ceil(level * (draws + 1) - 1)
    together = (1 + np.searchsorted(lowest, p, side="right")) / (draws + 1)
    return min(level, float(lowest[max(0, beyond - 1)])), np.maximum(p, together)

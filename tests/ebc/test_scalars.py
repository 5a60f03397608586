"""A rule gives the same for floats and for 0-dim tensors, and raises nothing for what is not finite."""

import itertools
import math

import pytest
import torch

from ebc_lab.ebc import scalars

VALUES = (0.0, 1e-300, 0.3, 1.0, 2.5, 800.0, 1e300, -0.7, -1e300, math.inf, -math.inf, math.nan)
OF_ONE = (scalars.root, scalars.log, scalars.exp, scalars.is_finite)
OF_TWO = (scalars.least, scalars.most, scalars.over)


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def same(a, b):
    return float(a) == pytest.approx(float(b), rel=1e-15, nan_ok=True)


@pytest.mark.parametrize("rule", OF_ONE, ids=lambda rule: rule.__name__)
def test_of_one_number(rule):
    assert all(same(rule(x), rule(number(x))) for x in VALUES)


@pytest.mark.parametrize("rule", OF_TWO, ids=lambda rule: rule.__name__)
def test_of_two(rule):
    for x, y in itertools.product(VALUES, VALUES):
        assert same(rule(x, y), rule(number(x), number(y))), (x, y)
        assert same(rule(x, y), rule(number(x), y)), (x, y)


def test_of_a_condition():
    for x, y in itertools.product(VALUES, VALUES):
        assert same(scalars.where(x < y, x, 0.5), scalars.where(number(x) < number(y), number(x), 0.5))
        assert scalars.negated(x < y) == bool(scalars.negated(number(x) < number(y)))

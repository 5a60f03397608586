"""Exponents, powers of two, and sums as trees."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.exact_gpt import GOLDEN

from ebc_lab.verity.bits import bits_for, divided, exponent, left_for, lg, pow2, pow2f, tree_sum


@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_an_exponent_is_that_of_frexp(x):
    assert int(exponent(torch.tensor(x))) == (math.frexp(x)[1] if x else 0)


def test_what_is_not_finite_has_an_exponent_of_its_own():
    assert exponent(torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0])).tolist() == [1025] * 3 + [0, 0]


def test_a_power_of_two_is_made_of_its_bits():
    s = torch.arange(-1022, 1024)
    assert pow2(s).tolist() == [math.ldexp(1.0, i) for i in s.tolist()]
    assert pow2f(-40) == 2.0**-40


@pytest.mark.parametrize("K", GOLDEN["bits_for"])
def test_the_bits_of_a_factor_are_the_golden_ones(K):
    assert bits_for(int(K)) == GOLDEN["bits_for"][K]


@given(st.integers(1, 2**20))
def test_products_of_so_many_bits_add_up_below_2_to_the_53(K):
    for bits in (bits_for(K), left_for(K, bits_for(K))):
        assert bits + bits_for(K) + math.log2(K) <= 53
    assert 2 ** lg(K) >= K > 2 ** (lg(K) - 1) or K == 1


def plain_tree(a: list[float]) -> float:
    n = len(a)
    while n > 1:
        h = math.ceil(n / 2)
        for i in range(n - h):
            a[i] += a[i + h]
        n = h
    return a[0]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 8, 64, 65, 127])
def test_a_tree_sum_is_the_written_one(n):
    x = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    assert tree_sum(x).tolist() == [plain_tree(row.tolist()) for row in x]


def test_a_tree_sum_of_nothing_is_0_and_leaves_its_input_alone():
    assert tree_sum(torch.zeros(2, 0)).tolist() == [0, 0]
    x = torch.arange(5.0)
    tree_sum(x)
    assert x.tolist() == [0, 1, 2, 3, 4]


def test_a_quotient_is_no_product_with_a_reciprocal():
    """49/49 by the reciprocal of 49 is not 1."""
    a = torch.full((9,), 49.0, dtype=torch.float64)
    assert 49.0 * (1 / 49.0) != 1
    assert divided(a, 49.0).tolist() == [1.0] * 9

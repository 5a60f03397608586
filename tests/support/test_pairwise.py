"""The generator of pairwise tables."""

import itertools

import pytest
from support.pairwise import pairwise


@pytest.mark.parametrize(
    "columns", [("ab", "xyz"), ("abcdefghi", "ABCDEFGHIJK", "xyz"), ("ab", "ab", "ab", "abcd")]
)
def test_each_pair_occurs_and_most_combinations_do_not(columns):
    rows = pairwise(*columns)
    assert rows == pairwise(*columns)
    assert set(rows) <= set(itertools.product(*columns))
    for (i, one), (j, other) in itertools.combinations(enumerate(columns), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product(one, other))
    largest, second = sorted((len(column) for column in columns), reverse=True)[:2]
    assert largest * second <= len(rows) <= 1.2 * largest * second

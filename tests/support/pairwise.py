"""A short table of combinations in which each pair of values of two parameters occurs at least once."""

from itertools import combinations, cycle, islice

import pytest


def pairwise(*columns):
    """Rows, one value from each column, chosen greedily and always the same.

    Each row starts with a pair that is still missing and takes, column by column, the value that completes
    most of the other missing pairs.
    """
    spots = [(i, value) for i, column in enumerate(columns) for value in column]
    missing = {(a, b): None for a, b in combinations(spots, 2) if a[0] != b[0]}
    rows = []
    while missing:
        chosen = dict(next(iter(missing)))
        for i, column in enumerate(columns):
            if i not in chosen:
                chosen[i] = max(
                    column, key=lambda value: sum(p in missing for p in pairs({**chosen, i: value}))
                )
        for pair in pairs(chosen):
            missing.pop(pair, None)
        rows.append(tuple(chosen[i] for i in range(len(columns))))
    return rows


def pairs(chosen):
    """All pairs of (column, value) in a row, given as {column: value}."""
    return combinations(sorted(chosen.items(), key=lambda spot: spot[0]), 2)


def contract(names, *columns, rare=(), pairs=True):
    """Parametrises a test with a pairwise table, part of which is marked slow.

    Quick are the pairs of all but the `rare` values of the first column, each of which stands in one quick
    row, and not beside every other value; without `pairs`, the fewest rows that hold each value.
    """
    usual, *others = columns
    if pairs:
        quick = pairwise([value for value in usual if value not in rare], *others)
        quick += zip(rare, *map(cycle, others), strict=False)
    else:
        quick = list(islice(zip(*map(cycle, columns), strict=False), max(map(len, columns))))
    slow = [row for row in pairwise(*columns) if row not in quick]
    rows = [
        *(pytest.param(*row) for row in quick),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in slow),
    ]
    return pytest.mark.parametrize(names, rows)

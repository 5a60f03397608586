"""The n-gram models that a loss is held against, counted slowly."""

import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ebc_lab.ebm.evaluate import ngram_baselines

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())["baselines"]


def plain_baselines(train, test, vocabulary):
    """Add-one, and Witten-Bell over it, one token at a time."""
    single = Counter(train)
    pairs = Counter(pairwise(train))
    unigram = []
    bigram = []
    for before, after in pairwise(test):
        p = (single[after] + 1) / (len(train) + vocabulary)
        followers = {w for v, w in pairs if v == before}
        seen = sum(count for (v, _), count in pairs.items() if v == before)
        mixed = (pairs[before, after] + len(followers) * p) / (seen + len(followers)) if seen else p
        unigram.append(-math.log(p))
        bigram.append(-math.log(mixed))
    return sum(unigram) / len(unigram), sum(bigram) / len(bigram)


def test_baselines_are_those_of_the_golden_file():
    found = ngram_baselines(GOLDEN["train"], GOLDEN["test"], GOLDEN["V"])
    assert found == (
        pytest.approx(GOLDEN["unigram"], rel=1e-12),
        pytest.approx(GOLDEN["bigram"], rel=1e-12),
    )


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=60), st.lists(st.integers(0, 6), min_size=2, max_size=30)
)
def test_baselines_are_those_of_counting_one_token_at_a_time(train, test):
    expected = plain_baselines(train, test, 9)
    assert ngram_baselines(np.array(train), torch.tensor(test), 9) == pytest.approx(expected, rel=1e-12)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40))
def test_after_every_token_the_probabilities_add_up_to_one(train):
    for before in range(6):
        losses = [ngram_baselines(train, [before, after], 6) for after in range(6)]
        for nats in zip(*losses, strict=True):
            assert sum(math.exp(-loss) for loss in nats) == pytest.approx(1, rel=1e-12)


def test_a_bigram_knows_a_text_that_repeats():
    unigram, bigram = ngram_baselines([0, 1, 2] * 400, [0, 1, 2] * 20, 3)
    assert unigram == pytest.approx(math.log(3), abs=1e-3)
    assert bigram < 0.01


def test_a_vocabulary_of_50000_needs_no_square_of_it():
    train = np.arange(60_000) % 50_257
    unigram, bigram = ngram_baselines(train, [7, 8, 50_000], 50_257)
    assert bigram < unigram


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([], [0, 1], "train must be at least 1 token ids"),
        ([0, 1], [1], "test must be at least 2 token ids"),
        ([0, 1], [[0, 1], [1, 0]], r"not int64 of shape \(2, 2\)"),
        ([0.0, 1.0], [0, 1], "not float64"),
        ([0, 3], [0, 1], r"train holds ids from 0 to 3, outside \[0, 3\)"),
        ([0, 2], [-1, 1], r"test holds ids from -1 to 1, outside \[0, 3\)"),
    ],
)
def test_what_is_no_text_is_refused(train, test, message):
    with pytest.raises(ValueError, match=message):
        ngram_baselines(train, test, 3)

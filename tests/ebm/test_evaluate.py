"""What is measured of a model on held-out text, and the n-gram models that its loss is held against, counted
slowly."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.ebm_models import energy_model, some_tokens
from support.ebm_states import GOLDEN, generator

from ebc_lab.ebm.denoising import add_noise, score_target
from ebc_lab.ebm.evaluate import (
    energy_trend,
    held_out,
    held_out_names,
    ngram_baselines,
    sampled_loss,
    score_quality,
)
from ebc_lab.ebm.generate import Sampling


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
    golden = GOLDEN["baselines"]
    found = ngram_baselines(golden["train"], golden["test"], golden["V"])
    assert found == (pytest.approx(golden["unigram"], rel=1e-12), pytest.approx(golden["bigram"], rel=1e-12))


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=60), st.lists(st.integers(0, 6), min_size=2, max_size=30)
)
def test_baselines_are_those_of_counting_one_token_at_a_time(train, test):
    expected = plain_baselines(train, test, 9)
    assert ngram_baselines(np.array(train), torch.tensor(test), 9) == pytest.approx(expected, rel=1e-12)


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
        ([0, 3], [0, 1], r"train holds ids from 0 to 3, outside \[0, 3\)"),
        ([0, 2], [-1, 1], r"test holds ids from -1 to 1, outside \[0, 3\)"),
    ],
)
def test_what_is_no_text_is_refused(train, test, message):
    with pytest.raises(ValueError, match=message):
        ngram_baselines(train, test, 3)


# -- held-out states -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["vmf", "geodesic"])
def test_the_share_of_the_score_that_is_explained_and_its_standard_error(noise):
    """The error of a ratio of means, by leaving out each state in turn."""
    model = energy_model(levels=(0.1, 0.5))
    states = model.encode(some_tokens(20))[0].detach()
    found = score_quality(model, states, generator(), noise)
    noise_generator = generator()
    kappas, peaks = model.widened()
    own = model.store.width()[model.store.nearest(states, 1)[:, 0]]
    for level, judged in enumerate(found):
        x = add_noise(states, judged.sigma, noise, generator=noise_generator)
        target = score_target(x, states, judged.sigma, noise)
        wrong = (model.score_at(x, level, kappas[level], peaks[level]) - target).square().sum(-1)
        size = target.square().sum(-1)
        assert judged.r2 == pytest.approx((1 - wrong.sum() / size.sum()).item(), abs=1e-9)
        left = 1 - (wrong.sum() - wrong) / (size.sum() - size)
        jackknife = math.sqrt((len(left) - 1) * left.var(correction=0).item())
        assert judged.se == pytest.approx(jackknife, rel=0.02)
        spread = own * judged.sigma**2
        assert judged.matched == pytest.approx((spread / (1 + spread)).mean().item(), rel=1e-6)


def test_figures_of_held_out_states_by_their_names():
    model = energy_model()
    tokens = some_tokens(6)
    found = held_out(model, tokens, generator())
    assert tuple(found) == held_out_names(model.settings)
    assert held_out(model, tokens, generator()) == found
    states = model.encode(tokens)[0].detach()
    mu = torch.nn.functional.normalize(model.store.mu.detach()[:16], dim=-1)
    cosine, winner = (states @ mu.T).max(1)
    kappa = model.store.concentration[:16]
    assert found["winners"] == pytest.approx(len(winner.unique()) / 16)
    assert found["state_spread"] == pytest.approx(1 - states.mean(0).norm().item())
    width = torch.arccos(2 * kappa / (1 + (1 + 4 * kappa**2).sqrt()))[winner]
    known = torch.arccos(cosine) / width - 1 - 2 / math.sqrt(10) <= 0
    assert found["state_coverage"] == pytest.approx(known.double().mean().item())
    assert found["kappa_median"] == pytest.approx(kappa.median().item())
    assert found["kappa_at_limit"] == 0
    assert found["splat_coverage"] == 1  # no splat has had its chance yet
    model.store.observe(states.repeat(20, 1))
    assert held_out(model, tokens, generator())["splat_coverage"] == pytest.approx(found["winners"])


def test_the_energy_is_counted_from_the_uniform_laws():
    """Splats without width in all directions say nothing: 0 nats."""
    model = energy_model(n=3, splats=200, neighbours=200, kappa_min=1e-3, in_use=1)
    model.store.place(torch.arange(200), torch.randn(200, 3, generator=generator()), None, 1e-3)
    assert held_out(model, some_tokens(), generator())["energy"] == pytest.approx(0, abs=1e-3)


def test_a_model_without_splats_has_a_spread_alone():
    model = energy_model(splats=0)
    found = held_out(model, some_tokens(), generator())
    assert tuple(found) == held_out_names(model.settings) == ("state_spread",)
    with pytest.raises(ValueError, match="without splats has no score"):
        score_quality(model, torch.ones(2, 6), generator())


@pytest.mark.parametrize("decoder", ["moe", "transformer"])
def test_without_heat_the_sampled_loss_is_the_settled_one(decoder):
    model = energy_model(decoder=decoder)
    inputs, targets = some_tokens(), some_tokens(seed=2)
    found = sampled_loss(model, inputs, targets, Sampling(temperature=0), generator(), samples=3)
    logits = model(inputs).detach()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    assert found["settled"] == pytest.approx(expected)
    assert found["sampled"] == pytest.approx(expected)


@pytest.mark.thorough
def test_the_sampled_loss_is_an_upper_bound_that_more_samples_lower():
    """ln of a mean of M samples: what one, four and sixteen give on the average, at a high temperature."""
    model = energy_model()
    inputs, targets = some_tokens(8), some_tokens(8, seed=2)
    hot = Sampling(steps=5, temperature=30.0)
    found = {}
    for samples in (1, 4, 16):
        runs = [sampled_loss(model, inputs, targets, hot, generator(s), samples) for s in range(4)]
        found[samples] = sum(run["sampled"] for run in runs) / 4
        assert len({run["settled"] for run in runs}) == 1
        assert len({run["sampled"] for run in runs}) == 4
    assert found[1] > found[4] + 0.01
    assert found[4] > found[16]


# -- the course of the energy --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("energies", "trend"),
    [
        ([], "unknown"),
        ([1.0, 2.0], "unknown"),
        ([1.0, math.nan, 2.0], "unknown"),
        ([-3.1] * 10, "stable"),
        ([-3.0, -3.01, -2.99, -3.0, -3.01, -3.0], "stable"),
        ([-3.0, -1.0, -3.5, -1.2, -2.9, -1.1, -3.1, -1.0], "fluctuating"),
        ([-1.0, -1.5, -2.1, -2.4, -3.0], "decreasing"),
        ([-4.0, -3.1, -2.0, -1.2, 0.1], "increasing"),
        ([-9.0, -8.0, *[-3.0, -3.3, -3.6, -3.9, -4.2, -4.5, -4.8, -5.1, -5.4, -5.7]], "decreasing"),
        ([100.0, 50.0, 25.0, *[-3.0] * 10], "stable"),  # of the last ten alone
    ],
)
def test_the_trend_of_an_energy(energies, trend):
    assert energy_trend(energies) == trend

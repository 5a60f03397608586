"""Latents drawn from the energy, and text written with them: the same for the same seed."""

import pytest
import torch
from support.ebm_models import VOCABULARY, energy_model, some_tokens

from ebc_lab.ebm.generate import Sampling, _chosen, draw, written

SETTLED = Sampling(temperature=0.0)


def text(model, prompt=(3, 1, 4), count=12, **given):
    return list(written(model, list(prompt), count, context=8, **given))


def loose(**settings):
    """A model whose settled states lie far from the contexts', and whose logits differ."""
    model = energy_model(torch.float32, **settings)
    with torch.no_grad():
        model.log_tether -= 5
        if not model.pointwise:
            model.decoder.out.weight *= 8
    return model


@pytest.fixture(scope="module")
def model():
    return loose()


@pytest.fixture(scope="module")
def blocks():
    return loose(encoder="transformer", decoder="transformer")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"sampler": "baobab"}, "sampler='baobab' is unknown; it takes baoab, adjusted, original"),
        ({"step": 2.0}, "a chain of step 2.0 is unstable: take one between 0 and 2"),
        ({"step": float("nan")}, "unstable"),
        ({"steps": -1}, "0 steps or more and a friction over 0, not -1 and 1.0"),
        ({"friction": 0.0}, "not 20 and 0.0"),
        ({"temperature": float("nan")}, "a temperature must be at least 0, not nan"),
    ],
)
def test_what_no_chain_can_be_is_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**wrong)


@pytest.mark.parametrize("sampling", [SETTLED, Sampling(steps=0)])
def test_without_heat_or_steps_a_latent_is_the_settled_state(model, sampling):
    states, contexts = model.encode(some_tokens())
    drawn = draw(model, states, contexts, sampling, torch.Generator())
    assert torch.equal(drawn, model.settle(states, contexts))


@pytest.mark.thorough
@pytest.mark.parametrize("sampler", ["baoab", "adjusted", "original"])
def test_a_latent_lies_on_the_sphere_and_is_the_generators(model, sampler):
    states, contexts = model.encode(some_tokens(1))

    def latent(seed, **given):
        generator = torch.Generator().manual_seed(seed)
        return draw(model, states, contexts, Sampling(sampler, **given), generator)

    first = latent(0)
    torch.testing.assert_close(first.norm(dim=-1), torch.ones(12))
    assert torch.equal(first, latent(0))
    assert not torch.equal(first, latent(1))
    assert (first - model.settle(states, contexts)).abs().max() > 1e-3
    if sampler == "original":  # its own settings, whatever is asked
        assert torch.equal(first, latent(0, steps=3, step=0.1, friction=9.0))


def test_a_model_without_splats_is_sampled_too():
    model = energy_model(torch.float32, splats=0)
    states, contexts = model.encode(some_tokens(1))
    for sampler in ("baoab", "adjusted"):
        drawn = draw(model, states, contexts, Sampling(sampler), torch.Generator().manual_seed(0))
        assert drawn.isfinite().all()


# -- text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["model", "blocks"])
def test_settled_and_without_chance_it_is_the_likeliest_of_the_models_own_logits(kind, request):
    model = request.getfixturevalue(kind)
    tokens = [3, 1, 4]
    for token in text(model, temperature=0, count=10):
        with torch.no_grad():
            logits = model(torch.tensor([tokens[-8:]]))[0, -1]
        assert token == int(logits.argmax())
        tokens.append(token)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["model", "blocks"])
@pytest.mark.parametrize("sampling", [None, Sampling(steps=4)])
def test_the_same_seed_writes_the_same_text(kind, sampling, request):
    model = request.getfixturevalue(kind)
    before = torch.get_rng_state()
    first = text(model, seed=7, temperature=1.5, sampling=sampling)
    torch.manual_seed(5)
    assert text(model, seed=7, temperature=1.5, sampling=sampling) == first
    assert len({tuple(text(model, seed=s, temperature=1.5, sampling=sampling)) for s in range(5)}) > 1
    assert len(first) == 12
    assert set(first) <= set(range(VOCABULARY))
    torch.set_rng_state(before)
    text(model, seed=7, sampling=sampling)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's generator is left alone


def test_of_logits_only_the_k_largest_are_drawn_and_the_cooler_the_likelier():
    logits, chance = torch.tensor([0.0, 3.0, 1.0, 2.0, 2.9]), torch.Generator().manual_seed(0)

    def share(temperature, top_k):
        drawn = [_chosen(logits, temperature, top_k, chance) for _ in range(400)]
        return torch.bincount(torch.tensor(drawn), minlength=5) / 400

    assert share(0, 0).tolist() == share(9.0, 1).tolist() == [0, 1, 0, 0, 0]
    expected = torch.tensor([-torch.inf, 3.0, -torch.inf, 2.0, 2.9]).softmax(-1)
    torch.testing.assert_close(share(1.0, 3), expected, atol=0.08, rtol=0)
    for top_k in (0, 5, 6):
        torch.testing.assert_close(share(2.0, top_k), (logits / 2).softmax(-1), atol=0.08, rtol=0)


@pytest.mark.thorough
def test_only_the_k_likeliest_are_chosen_from(model):
    greedy = text(model, temperature=0)
    assert text(model, top_k=1, temperature=5.0) == greedy
    with torch.no_grad():
        order = model(torch.tensor([[3, 1, 4]]))[0, -1].argsort(descending=True).tolist()
    firsts = {text(model, count=1, top_k=3, temperature=50.0, seed=s)[0] for s in range(60)}
    assert firsts == set(order[:3])


@pytest.mark.thorough
def test_tokens_are_chosen_by_their_probabilities(model):
    with torch.no_grad():
        expected = (model(torch.tensor([[3, 1, 4]]))[0, -1] / 2.0).softmax(-1)
    drawn = torch.tensor([text(model, count=1, temperature=2.0, seed=s)[0] for s in range(600)])
    share = torch.bincount(drawn, minlength=VOCABULARY) / 600
    assert (share - expected).abs().max() < 4 * 0.5 / 600**0.5


def test_it_looks_back_as_far_as_its_context_and_no_further(model):
    tail = [6, 7, 8, 9, 10, 3, 1, 4]
    found = [text(model, prompt=[*before, *tail], temperature=0) for before in ([], [0] * 9, [5] * 9)]
    assert found[0] == found[1] == found[2]
    assert list(written(model, [1, 2], 0, context=8)) == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prompt": []}, "a prompt needs one token at least"),
        ({"prompt": [0, 11]}, "outside the vocabulary of 11"),
        ({"prompt": [-1]}, "outside the vocabulary of 11"),
        ({"count": -1}, "must be at least 0, not -1 and 0"),
        ({"top_k": -1}, "must be at least 0, not 12 and -1"),
        ({"temperature": -1.0}, "a temperature must be at least 0, not -1.0"),
        ({"temperature": float("nan")}, "a temperature must be at least 0, not nan"),
    ],
)
def test_what_cannot_be_written_is_refused(model, given, words):
    with pytest.raises(ValueError, match=words):
        text(model, **given)

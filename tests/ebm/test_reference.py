"""The fast path is the slow plain transcription: a trained model's logits, energies, losses and gradients."""

import copy

import pytest
import torch
from support.ebm_reference import Reference
from support.ebm_runs import ebm_run
from support.runs import made

from ebc_lab.ebm import model as model_module
from ebc_lab.ebm.model import Draws, LossWeights, objective
from ebc_lab.training.run import Training

EXACT = {"rtol": 1e-9, "atol": 1e-9}
SINGLE = {"rtol": 1e-6, "atol": 1e-6}  # the fast path's cross-entropy is computed in float32
WEIGHTS = LossWeights(mle=0.7, score=0.2, noised=0.3, balance=0.05, z=0.02)
ROWS, LENGTH = 3, 8
ARMS = {
    "moe": [],
    "gradient": ["ebm.adapt=gradient", "ebm.noise=geodesic", "ebm.temperature=[2,2,2]"],
    "dense": ["decoder.experts=1", "decoder.active=1", "ebm.window=1"],
    "transformer": ["encoder=transformer", "decoder=transformer"],
    "no splats": ["ebm.splats=0"],
}
with_splats = pytest.mark.parametrize("trained", [a for a in ARMS if a != "no splats"], indirect=True)


@pytest.fixture(scope="module", params=ARMS)
def trained(request, text_file, tmp_path_factory):
    """A model of the smoke scale after a revival and a phase of its curriculum, in float64, with its run."""
    run = ebm_run(text_file, "steps=33", *ARMS[request.param])
    training = Training(run, made(tmp_path_factory.mktemp("run")))
    training.advance(13)
    training.recording.close()
    model = copy.deepcopy(training.model).double()
    with torch.no_grad():  # of what stands for a direction the length changes nothing
        model.embeddings *= torch.linspace(0.5, 2, len(model.embeddings))[:, None]
        model.pair_a *= 0.1
        if model.store is not None:
            assert len(model.store) == 96
            # of two splats in one place, drawn from repeated words, either may act
            noise = torch.Generator().manual_seed(0)
            model.store.mu += 1e-3 * torch.randn(model.store.mu.shape, generator=noise)
            model.store.mu *= 3
    return model, run


def tokens_of(model, seed=0):
    made = torch.randint(
        model.settings.vocabulary, (2, ROWS, LENGTH), generator=torch.Generator().manual_seed(seed)
    )
    return made[0], made[1]


def reference_of(model):
    divisor = model.store.kappa_divisor if model.store is not None else 1.0
    return Reference(model, model.settings, divisor)


def test_logits_states_and_dropped_mass(trained):
    model, _ = trained
    tokens, _ = tokens_of(model)
    slow = reference_of(model)
    logits, kept = model.detailed(tokens)
    states, contexts = slow.encode(tokens)
    torch.testing.assert_close(kept.states, torch.stack(states), **EXACT)
    torch.testing.assert_close(kept.contexts, torch.stack(contexts), **EXACT)
    torch.testing.assert_close(logits, slow.forward(tokens), **EXACT)
    assert logits.std() > 0.3  # of a model that has learned something
    if model.store is not None:
        dropped = [slow.dropped_mass(s) for s in states]
        torch.testing.assert_close(kept.dropped_mass, torch.stack(dropped).mean(), rtol=1e-6, atol=1e-12)


def test_energy_score_and_settling_anywhere_on_the_sphere(trained):
    model, _ = trained
    slow = reference_of(model)
    states, contexts = model.encode(tokens_of(model)[0][:1])
    noise = torch.randn(states.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = torch.nn.functional.normalize(states + 0.3 * noise, dim=-1).detach()
    expected = [slow.energy(*point) for point in zip(x, contexts, strict=True)]
    torch.testing.assert_close(model.energy(x, contexts), torch.stack(expected), **EXACT)
    expected = [slow.score(*point) for point in zip(x, contexts, strict=True)]
    torch.testing.assert_close(model.under(contexts).score(x), torch.stack(expected), **EXACT)
    expected = [slow.settle(*point, steps=3) for point in zip(x, contexts, strict=True)]
    torch.testing.assert_close(model.settle(x, contexts, steps=3), torch.stack(expected), **EXACT)


@with_splats
def test_the_score_through_noise(trained):
    model, _ = trained
    slow = reference_of(model)
    states, _ = model.encode(tokens_of(model)[0][:1])
    kappas, peaks = model.widened()
    for level in range(len(model.settings.levels)):
        expected = torch.stack([slow.score_at(x, level) for x in states])
        found = model.score_at(states, level, kappas[level], peaks[level])
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def both_objectives(model, run, monkeypatch, seed=0):
    """(total, parts) of the fast path and of the transcription on the same tokens and noise."""
    tokens, targets = tokens_of(model, seed)
    drawn = []
    add_noise = model_module.add_noise
    with monkeypatch.context() as patch:
        patch.setattr(
            model_module,
            "add_noise",
            lambda *given, **named: drawn.append(add_noise(*given, **named)) or drawn[-1],
        )
        logits, kept = model.detailed(tokens)
        scored = torch.tensor([0, 5, 6, 17, 20])
        noised = torch.arange(8, 24) if run.decoder.name == "transformer" else torch.tensor([3, 4, 5, 9, 23])
        draws = Draws(scored, noised, torch.Generator().manual_seed(3), run.ebm.noise)
        fast = objective(model, logits, targets, kept, WEIGHTS, draws)
    return fast, reference_of(model).objective(tokens, targets, WEIGHTS, draws, drawn)


def test_every_part_of_the_loss(trained, monkeypatch):
    model, run = trained
    fast, (total, slow) = both_objectives(model, run, monkeypatch)
    torch.testing.assert_close(fast.total.double(), total, **SINGLE)
    explained = {}
    for level, sigma in enumerate(model.settings.levels):
        if model.store is not None:
            explained[model_module.r2_column(sigma)] = 1 - slow.pop(f"dsm_{level}")
    slow |= explained
    for name, part in fast.parts.items():
        assert not part.requires_grad
        if name == "dropped_mass" and model.store is None:
            continue
        torch.testing.assert_close(
            part.double(), slow[name].detach(), **SINGLE, msg=lambda said, name=name: f"{name}: {said}"
        )
    assert set(slow) <= set(fast.parts)


def test_gradients_of_the_total(trained, monkeypatch):
    model, run = trained
    fast, (total, _) = both_objectives(model, run, monkeypatch)
    named = dict(model.named_parameters())
    found = torch.autograd.grad(fast.total, list(named.values()), allow_unused=True)
    expected = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    unused = {name for name, g in zip(named, expected, strict=True) if g is None}
    assert unused == ({"gains"} if model.store is None else set())
    for name, ours, theirs in zip(named, found, expected, strict=True):
        if theirs is not None:
            assert (ours - theirs).norm() <= 1e-6 * theirs.norm() + 1e-9, name


def test_a_float32_model_is_the_same_up_to_rounding(trained):
    model, _ = trained
    single = copy.deepcopy(model).float()
    tokens, _ = tokens_of(model)
    error = single(tokens).double() - reference_of(model).forward(tokens)
    assert error.abs().max() < 1e-4

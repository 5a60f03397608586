"""The model: deterministic, causal, differentiable in both modes; its losses move what they should move."""

import copy

import pytest
import torch
from support.ebm_models import VOCABULARY, energy_model, some_tokens
from torch.func import functional_call

from ebc_lab.ebm.model import (
    Draws,
    EnergyModel,
    LossWeights,
    ModelSettings,
    objective,
    r2_column,
    score_shift,
)

SHAPES = {
    "moe": {},
    "gradient": {"adapt": "gradient"},
    "dense": {"experts": 1, "active": 1},
    "no splats": {"splats": 0},
    "transformer": {"encoder": "transformer", "decoder": "transformer"},
    "one token": {"window": 1},
}
every = pytest.mark.parametrize("settings", SHAPES.values(), ids=SHAPES)


@pytest.mark.thorough
@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_call_and_the_detailed_forward_are_the_same_bits_each_time(settings, dtype):
    model = energy_model(torch.float32, **settings)
    tokens = some_tokens()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        called = model(tokens)
        assert called.shape == (3, 12, VOCABULARY)
        detailed, kept = model.detailed(tokens)
        assert torch.equal(called, detailed)
        assert torch.equal(called, model.eval()(tokens))
        with torch.no_grad():
            assert torch.equal(called, model(tokens))
    for tensor in (kept.states, kept.contexts, kept.settled):
        assert tensor.dtype == torch.float32  # also under autocast
        torch.testing.assert_close(tensor.norm(dim=-1), torch.ones(tensor.shape[:-1]))


def test_at_first_the_encoder_is_the_last_token_and_fading_rotations():
    model = energy_model(window=4)
    for j, matrix in enumerate(model.encoder.mix):
        expected = 0.7 ** (2 * j) * torch.eye(6, dtype=torch.float64)
        torch.testing.assert_close(matrix.detach() @ matrix.detach().T, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.encoder.mix[0].detach(), torch.eye(6, dtype=torch.float64))


def test_given_embeddings_are_the_first_ones():
    given = torch.randn(VOCABULARY, 8)
    model = EnergyModel(ModelSettings(vocabulary=VOCABULARY, n=8, splats=0), given)
    assert torch.equal(model.embeddings.detach(), given)
    assert model.embeddings.data_ptr() != given.data_ptr()


def test_unknown_parts_are_refused():
    with pytest.raises(ValueError, match="encoder='windows' is unknown; it takes window or transformer"):
        energy_model(encoder="windows")
    with pytest.raises(ValueError, match="decoder='mixture' is unknown; it takes moe or transformer"):
        energy_model(decoder="mixture")
    with pytest.raises(ValueError, match="decoder='transformer' needs `blocks`"):
        EnergyModel(ModelSettings(vocabulary=5, decoder="transformer"))
    with pytest.raises(ValueError, match="a model without splats has no energy of them"):
        energy_model(splats=0).splat_energy(torch.ones(1, 6, dtype=torch.float64))


# -- derivatives ---------------------------------------------------------------------------------------------


@every
def test_forward_derivatives_are_central_differences(settings):
    """What `surrogate` measures: logits along a direction of all weights."""
    model = energy_model(**settings)
    tokens = some_tokens()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    step = {
        name: 0.3 * torch.randn(w.shape, dtype=w.dtype, generator=generator) for name, w in weights.items()
    }

    def logits_after(t):
        return functional_call(model, {name: w + t * step[name] for name, w in weights.items()}, (tokens,))

    logits_after(0)  # what a store keeps of this has no tangent
    _, found = torch.func.jvp(lambda w: functional_call(model, w, (tokens,)), (weights,), (step,))
    h = 1e-6
    expected = (logits_after(h) - logits_after(-h)) / (2 * h)
    assert (found - expected).norm() < 1e-6 * expected.norm()


# -- the losses ----------------------------------------------------------------------------------------------


def test_columns_are_named_by_their_level():
    assert [r2_column(sigma) for sigma in (1e-5, 0.01, 0.05, 0.1000000001, 0.5, 1.25)] == [
        "r2_0p00001",
        "r2_0p01",
        "r2_0p05",
        "r2_0p1000000001",
        "r2_0p5",
        "r2_1p25",
    ]


def test_the_score_shift_is_the_share_that_changed():
    model = energy_model()
    logits, kept = model.detailed(some_tokens())
    draws = Draws(torch.arange(0, 36, 3), torch.arange(0, 36, 4), torch.Generator().manual_seed(0))
    scored = objective(model, logits, some_tokens(seed=2), kept, LossWeights(), draws).scored
    assert score_shift(model, scored) == 0
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.gains *= 1.25
    assert float(score_shift(moved, scored)) == pytest.approx(0.25)

"""How far predictions moved: golden values, and the facts that the method rests on."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ebc_lab.ebc import centre, half_fisher, mean_kl, rms_norm
from ebc_lab.ebc.logits import overconfidence

seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(st.integers(1, 6), st.integers(2, 12))
scales = st.floats(0.01, 30.0)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_golden(golden):
    values = golden["logits"]
    z, dz = (torch.tensor(values[k], dtype=torch.float64) for k in ("z", "dz"))
    assert rms_norm(centre(dz)).item() == pytest.approx(values["centred_rms"], rel=1e-6)
    assert mean_kl(z, z + dz).item() == pytest.approx(values["kl"], rel=1e-6)
    assert half_fisher(z, dz).item() == pytest.approx(values["half_fisher"], rel=1e-6)
    assert rms_norm(centre(dz)).square().item() / 4 == pytest.approx(values["kl_bound_quarter"], rel=1e-6)


@given(seeds, shapes, scales, scales)
def test_kl_is_at_most_a_quarter_of_the_centred_square(seed, shape, size, move):
    z = size * normal(seed, *shape)
    d = move * normal(seed + 1, *shape)
    assert mean_kl(z, z + d) <= rms_norm(centre(d)).square() / 4 * (1 + 1e-12)


@given(seeds, shapes, scales, scales)
def test_a_constant_on_a_token_changes_nothing(seed, shape, size, move):
    z = size * normal(seed, *shape)
    d = move * normal(seed + 1, *shape)
    shift = 10 * normal(seed + 2, shape[0], 1)
    close = {"rel": 1e-9, "abs": 1e-12}
    assert mean_kl(z + shift, z + d).item() == pytest.approx(mean_kl(z, z + d).item(), **close)
    assert half_fisher(z, d + shift).item() == pytest.approx(half_fisher(z, d).item(), **close)
    assert rms_norm(centre(d + shift)).item() == pytest.approx(rms_norm(centre(d)).item(), **close)
    assert mean_kl(z, z + shift).item() == pytest.approx(0, abs=1e-12)


@given(seeds, shapes, st.floats(0.01, 5.0))
def test_kl_is_half_the_variance_for_a_small_move(seed, shape, size):
    z = size * normal(seed, *shape)
    d = normal(seed + 1, *shape)
    for eps in (1e-3, 1e-4):  # the third order is what is left
        assert mean_kl(z, z + eps * d).item() == pytest.approx(
            half_fisher(z, eps * d).item(), rel=20 * eps, abs=1e-15
        )


@given(seeds, shapes, st.integers(2, 4))
def test_the_number_of_tokens_cancels(seed, shape, copies):
    z = normal(seed, *shape)
    d = normal(seed + 1, *shape)
    many = z.repeat(copies, 1)
    moves = d.repeat(copies, 1)
    assert mean_kl(many, many + moves).item() == pytest.approx(mean_kl(z, z + d).item(), rel=1e-12)
    assert half_fisher(many, moves).item() == pytest.approx(half_fisher(z, d).item(), rel=1e-12)
    assert rms_norm(moves).item() == pytest.approx(rms_norm(d).item(), rel=1e-12)


@pytest.mark.parametrize("measure", [mean_kl, half_fisher, lambda z, d, mask=None: rms_norm(centre(d), mask)])
def test_a_mask_keeps_only_its_tokens(measure):
    z = normal(0, 2, 3, 5)
    d = normal(1, 2, 3, 5)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    d[0, 1] = math.nan
    d[1, 0] = math.inf  # padding may hold anything
    assert measure(z, d, mask).item() == pytest.approx(measure(z[mask], d[mask]).item(), rel=1e-12)


def test_low_precision_is_reduced_in_float32():
    z = torch.randn(400, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    d = (0.1 * torch.randn(400, 300, generator=torch.Generator().manual_seed(1))).bfloat16()
    for got, want in (
        (mean_kl(z, z + d), mean_kl(z.double(), (z + d).double())),
        (half_fisher(z, d), half_fisher(z.double(), d.double())),
        (rms_norm(centre(d)), rms_norm(centre(d.double()))),
    ):
        assert got.dtype == torch.float32
        assert got.item() == pytest.approx(want.item(), rel=1e-3)


def test_a_move_that_is_not_finite_shows():
    z = normal(0, 4, 5)
    broken = z.clone()
    broken[2, 3] = math.nan
    assert not mean_kl(z, broken).isfinite()


def drawn(seed: int, z: Tensor) -> Tensor:
    """One label for each token, drawn from what the logits predict."""
    return torch.multinomial(z.softmax(-1), 1, generator=torch.Generator().manual_seed(seed))[:, 0]


@given(seeds, st.integers(3, 30), st.floats(0.1, 5.0), st.floats(-100, 100))
def test_overconfidence_is_the_slope_along_the_scale_of_the_logits(seed, tokens, size, shift):
    z = size * normal(seed, tokens, 5)
    y = drawn(seed, z)
    s = torch.ones(tokens, 1, dtype=torch.float64, requires_grad=True)
    losses = torch.nn.functional.cross_entropy(s * z, y, reduction="none")
    (slopes,) = torch.autograd.grad(losses.sum(), s)
    expected = slopes.mean() / (slopes.std() / math.sqrt(tokens))
    assert overconfidence(z, y).item() == pytest.approx(expected.item(), rel=1e-6)
    assert overconfidence(z + shift, y).item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-9)


def test_overconfidence_tells_bold_from_timid_and_is_within_noise_for_predictions_that_hold():
    z = 2 * normal(3, 4000, 7)
    y = drawn(4, z)
    assert abs(overconfidence(z, y).item()) < 3
    assert overconfidence(1.5 * z, y) > 5
    assert overconfidence(z / 1.5, y) < -5


@given(seeds, st.integers(3, 10), st.integers(1, 10))
def test_overconfidence_leaves_out_what_does_not_count(seed, kept, dropped):
    z = normal(seed, kept + dropped, 4)
    y = drawn(seed, z)
    expected = overconfidence(z[:kept], y[:kept])
    ignored = y.clone()
    ignored[kept:] = -100
    z[kept:] = torch.nan
    mask = torch.arange(kept + dropped) < kept
    torch.testing.assert_close(overconfidence(z, ignored), expected)
    torch.testing.assert_close(overconfidence(z, y, mask), expected)


def test_overconfidence_of_a_masked_vocabulary_is_finite():
    z = normal(1, 20, 6)
    z[:, 5] = -torch.inf
    assert overconfidence(z, torch.arange(20) % 5).isfinite()


def textbook_kl(z, z_new):
    log_p = z.log_softmax(-1)
    return (log_p.exp() * (log_p - z_new.log_softmax(-1))).sum(-1).mean()


def test_a_small_kl_in_float32_has_digits_that_the_textbooks_sum_loses():
    ratios = []
    for seed in range(8):
        z, d = 2 * normal(seed, 192, 512), 9e-3 * normal(seed + 100, 192, 512)
        true = mean_kl(z, z + d).item()
        assert true == pytest.approx(4e-5, rel=0.1)
        short, short_new = z.float(), (z + d).float()
        true = mean_kl(short.double(), short_new.double()).item()
        errors = [abs(kl(short, short_new).item() - true) for kl in (textbook_kl, mean_kl)]
        ratios.append(errors[0] / errors[1])
    assert sorted(ratios)[4] > 3


@pytest.mark.parametrize("move", [1e-2, 1.0, 300.0])
def test_masked_classes_and_the_hosts_look_change_nothing(move):
    z = 3 * normal(0, 20, 9).float()
    d = move * normal(1, 20, 9).float()
    z[:, 4] = -math.inf
    seen = [mean_kl(z, z + d, look=look) for look in (True, False)]
    assert torch.equal(*seen)
    rest = [i for i in range(9) if i != 4]
    assert seen[0].item() == pytest.approx(mean_kl(z[:, rest], (z + d)[:, rest]).item(), rel=1e-2)
    assert mean_kl(z, torch.full_like(z, math.nan)).isnan()
    assert mean_kl(torch.full_like(z, math.nan), z).isnan()

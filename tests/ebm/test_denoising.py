"""Noise and score targets: golden values, gradients of the kernels' densities, Stein's identity, ceilings."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.ebm_states import GOLDEN, generator, tensor, unit

from ebc_lab.ebm.denoising import LEVELS, add_noise, ceiling_r2, matched_r2, r_squared, score_target, widen
from ebc_lab.ebm.sphere import distance, exp, log, normalise, project
from ebc_lab.ebm.vmf import concentration_of, mean_cosine

kinds = pytest.mark.parametrize("kind", ["vmf", "geodesic"])
sigmas = st.floats(0.01, 1.5)


# -- golden values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", GOLDEN["noise"]["rows"], ids=lambda row: str(row["sigma"]))
def test_golden_targets(row):
    x, y, sigma = tensor(row["x"]), tensor(row["y"]), row["sigma"]
    torch.testing.assert_close(exp(y, sigma / math.sqrt(7) * project(y, tensor(row["eps"]))), x)
    for kind in ("vmf", "geodesic"):
        expected = tensor(row[f"{kind}_target"])
        scale = float(expected.abs().max())
        torch.testing.assert_close(score_target(x, y, sigma, kind), expected, rtol=1e-8, atol=1e-8 * scale)
    leading = tensor(row["leading_term"])
    torch.testing.assert_close(
        7 / sigma**2 * log(x, y), leading, rtol=1e-8, atol=1e-8 * float(leading.abs().max())
    )


@pytest.mark.parametrize("row", GOLDEN["widen"]["rows"], ids=lambda row: f"{row['kappa']}-{row['sigma']}")
def test_golden_widening(row):
    assert widen(row["kappa"], row["sigma"]) == pytest.approx(row["value"], rel=1e-8)
    as_tensor = widen(tensor([row["kappa"]]), row["sigma"])
    assert float(as_tensor) == pytest.approx(row["value"], rel=1e-8)


@pytest.mark.parametrize("row", GOLDEN["ceilings"]["rows"], ids=lambda row: f"{row['kappa']}-{row['sigma']}")
def test_golden_ceilings(row):
    assert ceiling_r2(row["kappa"], row["sigma"]) == pytest.approx(row["atoms"], rel=1e-8)
    assert matched_r2(row["kappa"], row["sigma"]) == pytest.approx(row["matched"], rel=1e-8)


# -- the targets are the kernels' scores ---------------------------------------------------------------------


def log_kernel(x: torch.Tensor, y: torch.Tensor, sigma: float, kind: str) -> torch.Tensor:
    """ln p(x | y) up to a constant, with respect to the sphere's surface."""
    n, angle = x.shape[-1], distance(x, y)
    if kind == "vmf":
        return (n - 1) / sigma**2 * (x * y).sum(-1)
    return -(n - 1) * angle**2 / (2 * sigma**2) - (n - 2) * torch.log(torch.sin(angle) / angle)


@kinds
@pytest.mark.parametrize("n", [2, 3, 16, 640])
def test_targets_are_gradients_of_the_log_density(kind, n):
    y = unit(40, n)
    u = normalise(project(y, unit(40, n, seed=1)))
    angle = torch.linspace(0.001, 2.9, 40, dtype=torch.float64).unsqueeze(-1)
    x = exp(y, angle * u).requires_grad_(True)
    for sigma in (0.05, 0.5):
        (gradient,) = torch.autograd.grad(log_kernel(x, y, sigma, kind).sum(), x)
        expected = project(x.detach(), gradient)
        found = score_target(x.detach(), y, sigma, kind)
        assert float((found - expected).norm(dim=-1).max()) < 1e-9 * float(gradient.norm(dim=-1).max())


@kinds
@pytest.mark.parametrize("n", [16, 640])
def test_a_level_is_an_rms_angle_in_every_dimension_and_each_row_has_its_own(kind, n):
    sigma = tensor(LEVELS)
    y = unit(1500, len(LEVELS), n)
    x = add_noise(y, sigma, kind, generator=generator(5))
    rms = (distance(x, y) ** 2).mean(0).sqrt()
    torch.testing.assert_close(rms, sigma, rtol=0.05, atol=0)
    target = score_target(x, y, sigma, kind)
    alone = score_target(x[:, 1], y[:, 1], LEVELS[1], kind)
    torch.testing.assert_close(target[:, 1], alone, rtol=1e-6, atol=1e-6)


@kinds
def test_noise_repeats_with_the_seed_and_keeps_float32(kind):
    y = unit(10, 8).float()
    first = add_noise(y, 0.1, kind, generator=generator(9))
    assert torch.equal(first, add_noise(y, 0.1, kind, generator=generator(9)))
    assert first.dtype == score_target(first, y, 0.1, kind).dtype == torch.float32
    assert float((first.norm(dim=-1) - 1).abs().max()) < 1e-6


@kinds
def test_float32_targets_have_five_digits_at_every_level(kind):
    y = unit(100, 640).float()
    for sigma in LEVELS:
        x = add_noise(y, sigma, kind, generator=generator(1))
        exact = score_target(normalise(x.double()), normalise(y.double()), sigma, kind)
        error = (score_target(x, y, sigma, kind) - exact).norm() / exact.norm()
        assert float(error) < 2e-5


@kinds
def test_derivatives_pass_in_both_modes_and_are_finite_where_nothing_was_moved(kind):
    y = unit(3, 5)
    x = exp(y, 0.4 * normalise(project(y, unit(3, 5, seed=1)))).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: score_target(x, y, 0.3, kind), (x,), check_forward_ad=True)
    _, slope = torch.func.jvp(
        lambda x: score_target(x, y, 0.3, kind), (y,), (project(y, unit(3, 5, seed=2)),)
    )
    assert bool(torch.isfinite(slope).all())
    noisy, moved = torch.func.jvp(lambda y: add_noise(y, 0.3, kind, generator=generator()), (y,), (0 * y,))
    assert torch.equal(moved, torch.zeros_like(noisy))


# -- R^2, widening and what can be reached -------------------------------------------------------------------


def test_r_squared_is_0_for_the_zero_predictor_1_for_the_target_and_the_plain_formula_between():
    target, score = unit(50, 9), unit(50, 9, seed=1)
    assert float(r_squared(torch.zeros_like(target), target)) == 0
    assert float(r_squared(target, target)) == pytest.approx(1)
    plain = 1 - ((score - target) ** 2).sum() / (target**2).sum()
    torch.testing.assert_close(r_squared(score, target), plain)
    assert r_squared(score, target).shape == ()


def test_r_squared_of_1e_4_keeps_its_digits_in_float32():
    target = unit(4000, 64)
    score = 5e-5 * target
    exact = float(r_squared(score, target))
    assert float(r_squared(score.float(), target.float())) == pytest.approx(exact, rel=1e-5)


@given(st.floats(0.5, 60), sigmas)
def test_widening_multiplies_mean_cosines(kappa, sigma):
    product = mean_cosine(kappa) * mean_cosine(1 / sigma**2)
    assert widen(kappa, sigma) == pytest.approx(concentration_of(product), rel=1e-8)
    assert widen(kappa, sigma) < min(kappa, 1 / sigma**2)
    in_float32 = widen(torch.tensor([kappa], dtype=torch.float32), sigma)
    assert in_float32.dtype == torch.float32
    assert float(in_float32) == pytest.approx(widen(kappa, sigma), rel=1e-6)


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.0, math.pi / 2, math.nan])
def test_levels_beyond_a_quarter_turn_are_refused(sigma):
    y = unit(2, 4)
    for function in (widen, matched_r2, ceiling_r2):
        with pytest.raises(ValueError, match="pi/2"):
            function(10.0, sigma)
    with pytest.raises(ValueError, match="pi/2"):
        add_noise(y, sigma, generator=generator())
    with pytest.raises(ValueError, match="pi/2"):
        score_target(y, y, sigma)


def test_unknown_kernels_and_a_line_are_refused():
    y = unit(2, 4)
    with pytest.raises(ValueError, match="vmf, geodesic"):
        add_noise(y, 0.1, "gaussian", generator=generator())
    with pytest.raises(ValueError, match="vmf, geodesic"):
        score_target(y, y, 0.1, "gaussian")
    with pytest.raises(ValueError, match="n >= 2"):
        add_noise(torch.ones(3, 1), 0.1, "geodesic", generator=generator())

"""The von Mises-Fisher law: golden values, quadrature, scipy's Bessel functions, samples, refusals."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats
from support.ebm_states import GOLDEN, cosine_variance, generator, unit

from ebc_lab.ebm.vmf import bessel_ratio, concentration, concentration_of, log_peak, mean_cosine, sample

dimensions = st.integers(2, 1200)
concentrations = st.floats(-3, 5).map(lambda exponent: 10.0**exponent)


@pytest.mark.parametrize("row", GOLDEN["vmf"]["rows"], ids=lambda row: f"n{row['n']}-K{row['raw']:g}")
def test_golden_values(row):
    n, raw = row["n"], row["raw"]
    assert float(bessel_ratio(n, raw)) == pytest.approx(row["bessel_ratio"], rel=1e-8)
    assert cosine_variance(n, raw) == pytest.approx(row["slope"], rel=1e-8)
    assert float(log_peak(n, raw)) == pytest.approx(row["log_peak"], abs=1e-6)
    assert mean_cosine(row["kappa"]) == pytest.approx(row["mean_cosine"], rel=1e-12)


# -- the Bessel functions ------------------------------------------------------------------------------------


@given(dimensions, concentrations)
def test_the_ratio_lies_between_amos_bounds_and_satisfies_the_recurrence(n, raw):
    order = n / 2 - 1
    ratio = float(bessel_ratio(n, raw))
    assert ratio > raw / (order + 1 + math.hypot(order + 1, raw)) * (1 - 1e-9)
    assert ratio < raw / (order + 0.5 + math.hypot(order + 0.5, raw)) * (1 + 1e-9)
    above = float(bessel_ratio(n + 2, raw))
    assert ratio == pytest.approx(1 / (n / raw + above), rel=1e-9)


@given(st.integers(2, 120), st.floats(0.5, 2000))
def test_ratio_and_peak_are_those_of_scipys_bessel_functions(n, raw):
    order = n / 2 - 1
    below, above = special.ive(order, raw), special.ive(order + 1, raw)
    if min(below, above) < 1e-290:
        return  # scipy underflows there; the recurrence test covers it
    assert float(bessel_ratio(n, raw)) == pytest.approx(above / below, rel=1e-9)
    peak = order * math.log(raw) - n / 2 * math.log(2 * math.pi) - math.log(below)
    assert float(log_peak(n, raw)) == pytest.approx(peak, abs=1e-8)


@given(dimensions, st.floats(0.001, 0.9999))
def test_the_concentration_inverts_the_ratio(n, a):
    assert float(bessel_ratio(n, concentration(n, a))) == pytest.approx(a, rel=1e-10)


def test_the_concentration_is_found_where_the_slope_has_no_digits_left():
    a = 1 - torch.tensor([1e-6, 1e-9, 1e-12], dtype=torch.float64)
    for n in (2, 3, 640):
        torch.testing.assert_close(1 - bessel_ratio(n, concentration(n, a)), 1 - a, rtol=1e-3, atol=0)


def test_derivative_of_the_peak_is_one_less_the_ratio_in_both_modes():
    for n in (3, 20, 61, 62, 640):
        raw = torch.tensor([0.5, 20.0, 900.0], dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(log_peak(n, raw).sum(), raw)
        torch.testing.assert_close(gradient, 1 - bessel_ratio(n, raw.detach()))
        assert torch.autograd.gradcheck(lambda K, n=n: log_peak(n, K), (raw,), check_forward_ad=True)
        _, slope = torch.func.jvp(lambda K, n=n: log_peak(n, K), (raw.detach(),), (torch.ones(3).double(),))
        torch.testing.assert_close(slope, gradient)


# -- per degree of freedom -----------------------------------------------------------------------------------


@given(st.floats(1e-3, 1e3))
def test_mean_cosine_and_concentration_are_inverses(kappa):
    assert concentration_of(mean_cosine(kappa)) == pytest.approx(kappa, rel=1e-8)
    as_tensor = torch.tensor(kappa, dtype=torch.float64)
    assert float(mean_cosine(as_tensor)) == pytest.approx(mean_cosine(kappa), rel=1e-14)
    assert isinstance(mean_cosine(kappa), float)


def test_the_mean_cosine_is_the_ratio_of_a_high_dimension():
    for n, kappa, tolerance in ((64, 1.0, 4e-3), (64, 50.0, 3e-6), (640, 1.0, 4e-4), (10**6, 7.0, 1e-6)):
        assert mean_cosine(kappa) == pytest.approx(float(bessel_ratio(n, kappa * (n - 1))), rel=tolerance)


# -- samples -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "raw"), [(2, 3.0), (3, 0.1), (3, 200.0), (8, 20.0), (64, 630.0), (640, 50.0)])
def test_the_cosine_of_samples_has_the_laws_distribution(n, raw):
    mu = unit(n, seed=1)
    x = sample(mu.expand(4000, n), raw, generator(2))
    cosine = (x @ mu).numpy()
    grid = np.linspace(-1, 1, 200_001)[1:-1]
    density = raw * (grid - 1) + (n - 3) / 2 * np.log1p(-grid * grid)
    if n == 2:  # the density diverges at the ends: in the angle it does not
        grid = np.linspace(0, np.pi, 200_001)
        density, cosine = raw * np.cos(grid), np.arccos(cosine)
    weights = np.exp(density - density.max())
    law = np.cumsum(weights) / weights.sum()
    assert stats.kstest(cosine, lambda t: np.interp(t, grid, law)).pvalue > 0.01
    standard_error = math.sqrt(cosine_variance(n, raw) / 4000)
    if n > 2:
        assert abs(cosine.mean() - float(bessel_ratio(n, raw))) < 4 * standard_error
    assert float((x.norm(dim=-1) - 1).abs().max()) < 1e-12


def test_directions_around_the_mean_are_uniform():
    mu = torch.eye(3, dtype=torch.float64)[0].expand(8000, 3)
    x = sample(mu, 5.0, generator(3))
    turn = torch.atan2(x[:, 2], x[:, 1]).numpy() / (2 * np.pi) % 1
    assert stats.kstest(turn, "uniform").pvalue > 0.01


def test_each_row_has_its_own_concentration_and_small_angles_keep_their_digits():
    raw = torch.tensor([10.0, 1e4, 1e10]).repeat(3000)
    mu = unit(9000, 16, seed=4)
    x = sample(mu, raw, generator(5))
    square = ((x - mu) ** 2).sum(-1).reshape(3000, 3).mean(0)  # 2 (1 - mu.x)
    expected = 2 * (1 - bessel_ratio(16, torch.tensor([10.0, 1e4, 1e10])))
    torch.testing.assert_close(square, expected, rtol=0.03, atol=0)


def test_samples_repeat_with_the_seed_and_keep_float32():
    mu = unit(50, 12, dtype=torch.float32)
    first, second = sample(mu, 40.0, generator(7)), sample(mu, 40.0, generator(7))
    assert torch.equal(first, second)
    assert first.dtype == torch.float32
    assert not torch.equal(first, sample(mu, 40.0, generator(8)))
    assert sample(mu[:0], 40.0, generator()).shape == (0, 12)
    assert sample(mu, 40.0).shape == (50, 12)


# -- refusals ------------------------------------------------------------------------------------------------


def test_impossible_laws_are_refused():
    for function in (bessel_ratio, log_peak, lambda n, raw: sample(torch.ones(4, n), raw, generator())):
        with pytest.raises(ValueError, match="n >= 2"):
            function(1, 3.0)
        for raw in (0.0, -1.0, torch.tensor([1.0, 0.0, 1.0, 1.0])):
            with pytest.raises(ValueError, match="over 0"):
                function(5, raw)
    for a in (0.0, 1.0, -0.3, 1.2):
        with pytest.raises(ValueError, match="between 0 and 1"):
            concentration(5, a)

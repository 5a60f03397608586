"""The spectral projection: exact, untouched inside, and a cheap bound that never clears a matrix wrongly.

The Stiefel retraction: on the manifold, where an SVD would put it, and as good as the straight line to first
order.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.named import name_of
from support.tensors import normal

from ebc_lab.components.projection import Spectral, Sphere, Stiefel, build, norm_bound
from ebc_lab.config.parts.model import ModelConfig
from ebc_lab.config.parts.projection import ProjectionConfig
from ebc_lab.workloads.gpt import build as build_model
from ebc_lab.workloads.gpt import hidden_matrices


def norms(matrices):
    return torch.stack([torch.linalg.matrix_norm(m.detach().double(), ord=2) for m in matrices])


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32 - 1), st.floats(1e-4, 1e4))
def test_norm_bound_is_above_by_a_few_per_cent(rows, columns, seed, size):
    stack = size * normal(3, rows, columns, seed=seed)
    exact = norms(stack)
    bound = norm_bound(stack)
    assert (bound >= exact * (1 - 1e-5)).all()
    assert (bound <= exact * 1.05).all()


def test_norm_bound_at_its_loosest_and_at_zero():
    orthogonal = torch.linalg.qr(normal(512, 512)).Q[None]
    assert 1 - 1e-5 <= norm_bound(orthogonal).item() <= 1.06  # all singular values equal: 512^(1/128)
    assert norm_bound(torch.zeros(1, 4, 4)).item() < 1e-10


@pytest.mark.parametrize("shape", [(8, 8), (32, 8), (8, 32)])
def test_it_is_the_nearest_matrix_within_the_bound(shape):
    start = normal(*shape, dtype=torch.float64)
    limit = 1.5 * norms([start])[0]
    matrix = start.clone()
    project = Spectral([matrix], bound=1.5)
    far = 2 * start + normal(*shape, seed=1, dtype=torch.float64)
    matrix.copy_(far)
    project()
    u, s, vh = torch.linalg.svd(far, full_matrices=False)
    assert (s > limit).any()
    assert (s < limit).any()
    torch.testing.assert_close(matrix, (u * s.clamp(max=limit)) @ vh)
    torch.testing.assert_close(torch.linalg.svdvals(matrix), s.clamp(max=limit))
    generator = torch.Generator().manual_seed(2)
    for _ in range(50):  # no other point of the set is nearer to where we came from
        other = matrix + 0.1 * torch.randn(*shape, dtype=torch.float64, generator=generator)
        other = other * min(1.0, (limit / norms([other])[0]).item())
        assert (other - far).norm() >= (matrix - far).norm()


def test_inside_it_touches_nothing():
    matrices = [normal(8, 8, seed=i) for i in range(3)]
    project = Spectral(matrices, bound=1.00005)  # so near the edge that each has to be looked at closely
    inside = [m.clone() for m in matrices]
    project()
    assert all(torch.equal(m, w) for m, w in zip(matrices, inside, strict=True))
    for outside in (2.0, 1.001):
        matrices[1].mul_(outside)
        project()
        assert torch.equal(matrices[0], inside[0])
        assert torch.equal(matrices[2], inside[2])
        torch.testing.assert_close(norms([matrices[1]]), 1.00005 * norms([inside[1]]), rtol=1e-5, atol=0)


def test_rows_of_any_size_become_unit_vectors_and_zeros_stay():
    rows = normal(5, 7, seed=0) * torch.tensor([1e-12, 1e-3, 1.0, 1e6, 0.0])[:, None]
    start = rows.clone()
    Sphere([rows])
    lengths = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    torch.testing.assert_close(torch.linalg.vector_norm(rows, dim=1), lengths)
    torch.testing.assert_close((rows * start).sum(1), torch.linalg.vector_norm(start, dim=1))


# -- the Stiefel retraction ----------------------------------------------------------------------------------

shapes = st.tuples(st.integers(1, 24), st.integers(1, 24))  # tall, wide and square
seeds = st.integers(0, 2**31)


def svd(matrix):
    return torch.linalg.svd(matrix.double(), full_matrices=False)


def with_values(shape, low, high, seed, dtype=torch.float32):
    """A matrix whose singular values are spread evenly over [low, high]."""
    u, _, vh = svd(normal(*shape, seed=seed, dtype=torch.float64))
    return ((u * torch.linspace(low, high, min(shape), dtype=torch.float64)) @ vh).to(dtype)


def radius(matrix):
    """s: what all singular values are, given the Frobenius norm."""
    return (matrix.double().norm() / math.sqrt(min(matrix.shape))).item()


@given(shapes, seeds, st.floats(1e-3, 1e3))
def test_stiefel_puts_the_initial_weights_there_with_their_norm(shape, seed, size):
    start = size * normal(*shape, seed=seed)
    matrix = start.clone()
    Stiefel([matrix])
    values = torch.linalg.svdvals(matrix.double())
    torch.testing.assert_close(values, torch.full_like(values, radius(start)), rtol=1e-5, atol=0)
    torch.testing.assert_close(matrix.norm(), start.norm())
    inner = (matrix.double() * start.double()).sum()  # the nearest such matrix has the largest inner product
    torch.testing.assert_close(inner, radius(start) * svd(start)[1].sum(), rtol=1e-5, atol=0)


@given(shapes, seeds, st.floats(0.3, 1.0), st.floats(1.0, 2.0), st.floats(1e-3, 1e3))
def test_a_retracted_matrix_is_the_polar_factor(shape, seed, low, high, size):
    matrix = size * with_values(shape, 1, 1, seed)
    retract = Stiefel([matrix])
    s = radius(matrix)
    far = with_values(shape, low * s, high * s, seed + 1)
    matrix.copy_(far)
    retract()
    assert ((torch.linalg.svdvals(matrix.double()) / s - 1).abs() <= 1e-5).all()
    u, _, vh = svd(far)
    torch.testing.assert_close(matrix.double(), s * u @ vh, rtol=0, atol=1e-5 * s)
    again = matrix.clone()
    retract()
    torch.testing.assert_close(matrix, again, rtol=0, atol=3e-6 * s)  # there already: rounding only


@pytest.mark.parametrize("shape", [(8, 8), (32, 8), (8, 32)])
def test_a_nearly_singular_matrix_is_left_to_an_svd(shape):
    good = normal(*shape)
    bad = normal(*shape, seed=1)
    retract = Stiefel([good, bad])
    s = radius(good), radius(bad)
    good.copy_(with_values(shape, 0.3 * s[0], 2 * s[0], 2))
    bad.copy_(with_values(shape, 1e-3 * s[1], 2 * s[1], 3))
    target = svd(bad)
    retract()
    torch.testing.assert_close(bad.double(), s[1] * target[0] @ target[2], rtol=0, atol=1e-3 * s[1])
    for m, size in zip((good, bad), s, strict=True):
        values = torch.linalg.svdvals(m.double())
        torch.testing.assert_close(values, torch.full_like(values, size), rtol=1e-5, atol=0)
    bad.zero_()
    retract()
    assert bad.isfinite().all()


def test_non_finite_weights_stay_non_finite_and_spoil_no_other():
    """Refusing them is the optimizer's part; here they must neither raise nor spread."""
    good = normal(8, 8)
    bad = normal(8, 8, seed=1)
    retract = Stiefel([good, bad])
    there = good.clone()
    bad[0, 0] = math.nan
    retract()
    assert not bad.isfinite().all()
    torch.testing.assert_close(good, there)


def test_bfloat16_weights_are_computed_in_float32():
    matrix = normal(48, 16).bfloat16()
    retract = Stiefel([matrix])
    s = radius(matrix)
    far = (matrix + 0.3 * s * normal(48, 16, seed=1) / 4).bfloat16()
    matrix.copy_(far)
    retract()
    u, _, vh = svd(far)
    assert matrix.dtype == torch.bfloat16
    exact = s * u @ vh
    assert (
        (matrix.double() - exact).abs() <= 2**-7 * exact.abs() + 1e-6 * s
    ).all()  # one rounding of the exact result


@pytest.mark.parametrize(("name", "retracts"), [("spectral", False), ("stiefel", True)])
def test_each_says_when_it_acts(name, retracts):
    model = build_model(ModelConfig(blocks=2, width=16, heads=2, context=8), 11, seed=0)
    others = {n: p.detach().clone() for n, p in model.named_parameters()}
    projection = build(hidden_matrices(model), ProjectionConfig(name))
    assert projection.retracts is retracts
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1e-2 * torch.ones_like(p))
        moved = {n: p.detach().clone() for n, p in model.named_parameters()}
    projection()
    hidden = {id(p) for p in hidden_matrices(model)}
    for n, p in model.named_parameters():
        assert id(p) in hidden or torch.equal(p, moved[n]), n
        if id(p) in hidden and retracts:
            assert radius(p.detach()) == pytest.approx(radius(others[n]), rel=1e-5)
            values = torch.linalg.svdvals(p.detach())
            assert values.max() <= values.min() * (1 + 1e-5)


def test_only_spectral_is_named_by_its_bound():
    choices = [{"name": name, "bound": bound} for name in ("spectral", "stiefel") for bound in (2.0, 3.0)]
    names = [name_of({"projection": choice}) for choice in choices]
    assert names[0] != names[1] != names[2] == names[3]

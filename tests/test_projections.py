"""The spectral projection: exact, untouched inside, and a cheap bound that never clears a matrix wrongly."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ebc_lab.config import ModelConfig, ProjectionConfig
from ebc_lab.ebc import EllipsotopeClip
from ebc_lab.model import build as build_model
from ebc_lab.model import hidden_matrices
from ebc_lab.projections import Spectral, build, norm_bound

fixed = settings(derandomize=True, deadline=None, max_examples=40)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def norms(matrices):
    return torch.stack([torch.linalg.matrix_norm(m.detach().double(), ord=2) for m in matrices])


@fixed
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


def test_each_matrix_has_a_limit_of_its_own():
    small, large = normal(8, 8), 10 * normal(8, 8, seed=1)
    wide = normal(8, 16, seed=2)
    initial = norms([small, large, wide])
    project = Spectral([small, large, wide], bound=2.0)
    for m in (small, large, wide):
        m.mul_(5)
    project()
    torch.testing.assert_close(norms([small, large, wide]), 2 * initial, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("target_kl", "budget"), [(0.01, "shadow"), (0.01, "surrogate"), (math.inf, "shadow")])
def test_a_run_stays_inside(target_kl, budget):
    model = build_model(ModelConfig(blocks=2, width=16, heads=2, context=8), 11, seed=0)
    limits = 1.2 * norms(hidden_matrices(model))
    project = build(model, ProjectionConfig("spectral", bound=1.2))
    optimizer = EllipsotopeClip(
        model, torch.optim.Adam(model.parameters(), lr=0.05), target_kl=target_kl, budget=budget, project=project
    )
    others = [p.detach().clone() for p in model.head.parameters()]
    scales = []
    for step in range(12):
        tokens = torch.randint(11, (6, 8), generator=torch.Generator().manual_seed(step))
        model.zero_grad()
        logits = model(tokens)
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        scales.append(optimizer.step(tokens, logits).clip_coefficient.item())
        assert (norms(hidden_matrices(model)) <= limits * (1 + 1e-5)).all()
    assert (norms(hidden_matrices(model)) > 0.9 * limits).any()  # the bound was met, not merely never reached
    assert not torch.equal(next(model.head.parameters()), others[0])
    assert (min(scales) < 1) == math.isfinite(target_kl)


def test_none_is_no_projection():
    model = build_model(ModelConfig(blocks=1, width=8, heads=2, context=8), 11, seed=0)
    assert build(model, ProjectionConfig("none")) is None

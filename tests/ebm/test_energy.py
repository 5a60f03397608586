"""The energy: golden values, a plain transcription, autograd's gradients, mixtures, settling, refusals."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.ebm_models import energy_model, some_tokens
from support.ebm_states import GOLDEN, tensor, unit

from ebc_lab.ebm import energy as energy_module
from ebc_lab.ebm.energy import Terms, compositional_energy, geometric_energy, stiffness
from ebc_lab.ebm.sphere import geodesic, normalise, project

NAMES = ("mu", "alpha", "kappa", "contexts", "tether", "a", "b", "omega")
METHODS = (Terms.total, Terms.score, Terms.settle)


def example(n: int = 12, splats: int = 20, rows: int = 7, seed: int = 0) -> tuple[torch.Tensor, Terms]:
    """Points (rows, n) and an energy with every part, float64."""
    generator = torch.Generator().manual_seed(seed)
    alpha, spread = torch.rand(2, splats, generator=generator, dtype=torch.float64) + 0.1
    terms = Terms(
        mu=unit(splats, n, seed=seed + 1),
        alpha=alpha,
        kappa=1 + 40 * spread,
        contexts=unit(rows, 3, n, seed=seed + 2),
        tether=tensor([10.0, 1.0, 0.5]),
        a=unit(8, n, seed=seed + 3),
        b=unit(8, n, seed=seed + 4),
        omega=0.2 * torch.randn(8, generator=generator, dtype=torch.float64),
    )
    return unit(rows, n, seed=seed + 5), terms


def gathered(x: torch.Tensor, terms: Terms, k: int) -> Terms:
    """The k best splats of each point, as a store would gather them."""
    ready = terms.prepared()
    best = terms.logits(x).topk(k).indices
    shares = {"log_pi": ready.log_pi[best], "log_peak": ready.log_peak[best]}
    return replace(terms, mu=terms.mu[best], alpha=None, kappa=terms.kappa[best], **shares)


def splats_of(terms: Terms) -> Terms:
    """The splats' part alone."""
    return Terms(terms.mu, terms.alpha, terms.kappa, log_pi=terms.log_pi, log_peak=terms.log_peak)


def cast(terms: Terms, dtype: torch.dtype) -> Terms:
    named = {name: value.to(dtype) for name, value in vars(terms).items() if value is not None}
    return Terms(**{"alpha": None, **named})


# -- golden values and the transcription ---------------------------------------------------------------------


def test_golden_values():
    terms = Terms(**{name: tensor(GOLDEN["energy"][name]) for name in NAMES})
    x = tensor([point["x"] for point in GOLDEN["energy"]["points"]])
    values = {
        "splats": splats_of(terms).total(x),
        "geometric": geometric_energy(x, terms.contexts, terms.tether),
        "compositional": compositional_energy(x, terms.a, terms.b, terms.omega),
        "responsibilities": terms.logits(x).softmax(-1),
        "pull": terms.pull(x),
        "score": terms.score(x),
        "settled": terms.settle(x),
    }
    for name, value in values.items():
        expected = tensor([point[name] for point in GOLDEN["energy"]["points"]])
        torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-6)
    parts = values["splats"] + values["geometric"] + values["compositional"]
    torch.testing.assert_close(terms.total(x), parts)


def test_gathered_splats_give_what_shared_ones_give():
    x, terms = example()
    terms = replace(terms, kappa=terms.kappa / 20)
    everything = gathered(x, terms, 20)
    for method in (*METHODS, Terms.pull):
        torch.testing.assert_close(method(everything, x), method(terms, x))
    three = splats_of(gathered(x, terms, 3))
    left_out = three.total(x) - splats_of(terms).total(x)
    assert float(left_out.min()) > -1e-10
    assert float(left_out.max()) > 1e-6


def test_leading_shapes_of_points_are_kept():
    x, terms = example(rows=6)
    grid = replace(terms, contexts=terms.contexts.reshape(2, 3, 3, 12))
    torch.testing.assert_close(grid.total(x.reshape(2, 3, 12)).reshape(6), terms.total(x))
    torch.testing.assert_close(grid.settle(x.reshape(2, 3, 12)).reshape(6, 12), terms.settle(x))
    shared = replace(terms, contexts=terms.contexts[0])
    torch.testing.assert_close(shared.score(x)[0], terms.score(x)[0])


# -- closed forms against autograd ---------------------------------------------------------------------------


def test_the_closed_forms_build_no_graph_where_none_is_asked_for():
    x, terms = example()
    with torch.inference_mode():
        assert not replace(terms, mu=terms.mu.clone().requires_grad_(True)).score(x).requires_grad


# -- settling ------------------------------------------------------------------------------------------------


@pytest.mark.thorough
@given(st.integers(0, 2**31), st.sampled_from([2, 3, 8, 40]), st.floats(0, 3))
def test_no_step_of_settling_raises_the_energy(seed, n, pairs):
    x, terms = example(n, rows=50, seed=seed)
    terms = replace(terms, omega=pairs * terms.omega)
    energies = terms.total(x)
    for _ in range(6):
        x = terms.settle(x)
        after = terms.total(x)
        assert float((after - energies).max()) < 1e-10 * (n * 100)
        energies = after
    assert float((x.norm(dim=-1) - 1).abs().max()) < 1e-12


def test_settling_ends_where_the_score_vanishes_and_steps_add_up():
    x, terms = example()
    torch.testing.assert_close(terms.settle(terms.settle(x, 2)), terms.settle(x, 3))
    assert torch.equal(terms.settle(x, 0), x)
    assert float(terms.score(terms.settle(x, 300)).norm(dim=-1).max()) < 1e-6


def test_a_point_without_any_pull_stays_and_a_nan_is_not_hidden():
    mu = torch.eye(4, dtype=torch.float64)[:1].repeat(2, 1)
    mu[1] = -mu[1]
    x = torch.eye(4, dtype=torch.float64)[1:2]
    same = tensor([1.0, 1.0])
    assert torch.equal(Terms(mu, same, same).settle(x), x)
    assert bool(torch.isnan(Terms(mu * math.nan, same, same).settle(x)).any())


# -- precision -----------------------------------------------------------------------------------------------


def test_float32_is_within_hundredths_of_a_nat_at_n_640_and_kappa_50():
    x, terms = example(640, splats=30, rows=50)
    terms = replace(terms, kappa=torch.full_like(terms.kappa, 50.0))
    x = normalise(terms.mu.repeat(2, 1)[:50] + 0.15 * unit(50, 640, seed=9)).float()
    narrow = cast(terms, torch.float32)
    energies = narrow.total(x)
    assert energies.dtype == torch.float32
    exact = cast(narrow, torch.float64).total(x.double())
    assert float((energies - exact).abs().max()) < 0.02


@pytest.mark.parametrize("k", [None, 4])
def test_autocast_changes_no_bit_and_half_precision_is_computed_in_float32(k):
    x, terms = example(64)
    terms = terms if k is None else gathered(x, terms, k)
    narrow = cast(terms, torch.float32)
    outside = [method(narrow, x.float()) for method in METHODS]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = [method(narrow, x.float()) for method in METHODS]
        half = cast(terms, torch.bfloat16).total(x.bfloat16())
    for first, second in zip(outside, inside, strict=True):
        assert torch.equal(first, second)
    assert half.dtype == torch.float32


def test_splats_without_a_share_do_not_count():
    x, terms = example()
    fewer = replace(terms, mu=terms.mu[:15], alpha=terms.alpha[:15], kappa=terms.kappa[:15])
    padded = torch.cat((fewer.shares(), torch.full((5,), -math.inf, dtype=torch.float64)))
    mu = terms.mu.clone().requires_grad_(True)
    energies = replace(terms, mu=mu, log_pi=padded).total(x)
    torch.testing.assert_close(energies, fewer.total(x))
    energies.sum().backward()
    assert float(mu.grad[15:].abs().max()) == 0
    assert bool(torch.isfinite(mu.grad).all())


# -- the sampler's scale, a store's energy -------------------------------------------------------------------


@given(st.integers(0, 2**31), st.sampled_from([3, 12, 64]))
def test_the_stiffness_bounds_the_curvature_of_a_tethered_mixture(seed, n):
    x, terms = example(n, rows=20, seed=seed)
    terms = replace(terms, a=None, b=None, omega=None)
    v = normalise(project(x, unit(20, n, seed=seed + 9)))
    energies = [terms.total(geodesic(x, v, h)[0]) for h in (-1e-3, 0.0, 1e-3)]
    curvature = (energies[0] - 2 * energies[1] + energies[2]) / 1e-6
    assert float(curvature.max()) < stiffness(terms.kappa, terms.tether, None, n) * 1.001 + 0.1


def test_the_stiffness_adds_its_parts():
    kappa, tether, omega = tensor([3.0, 7.0]), tensor([1.0, 2.0, 0.5]), tensor([0.1, -0.3])
    assert stiffness(kappa, tether, omega, 11) == pytest.approx(10 * (7 + 3.5 + 0.4))
    assert stiffness(kappa, None, None, 11) == pytest.approx(70)


def test_chunks_change_neither_values_nor_gradients(monkeypatch):
    model = energy_model()
    states, contexts = (found.detach() for found in model.encode(some_tokens()))
    runs = []
    for chunk in (2**26, 100):
        monkeypatch.setattr(energy_module, "CHUNK", chunk)
        energy = model.under(contexts)
        settled = energy.settle(states)
        gradients = torch.autograd.grad(
            settled.square().sum() + (settled * states).sum(), [model.store.mu, model.pair_a]
        )
        slope = torch.func.jvp(energy.settle, (states,), (torch.ones_like(states),))[1]
        runs.append((settled, *gradients, slope, energy.near(states)[1]))
    for whole, chunked in zip(*runs, strict=True):
        torch.testing.assert_close(whole, chunked)
    assert 0 < float(runs[0][-1]) < 1


# -- refusals ------------------------------------------------------------------------------------------------


def test_missing_parts_and_foreign_dimensions_are_refused():
    x, terms = example()
    for missing, message in (("tether", "contexts and tether"), ("b", "a, b")):
        with pytest.raises(ValueError, match=message):
            replace(terms, **{missing: None})
    with pytest.raises(ValueError, match="alpha or log_pi"):
        replace(terms, alpha=None).total(x)
    with pytest.raises(ValueError, match="12 dimensions"):
        splats_of(terms).total(x[:, :5])
    with pytest.raises(ValueError, match="over 0"):
        replace(terms, kappa=0 * terms.kappa).total(x)

"""Langevin dynamics on the sphere: golden step, conservation, stationary laws against exact means, refusals.

The oracles: E[mu.x] of a von Mises-Fisher law is A_n(K); the mean of a mixture is the mixture of the means;
with pair terms, importance sampling from the mixture.
"""

import itertools
import math

import pytest
import torch
from support.ebm_states import GOLDEN, cosine_variance, generator, tensor, unit

from ebc_lab.ebm.energy import Terms, stiffness
from ebc_lab.ebm.langevin import Result, baoab_step, langevin, original_chain
from ebc_lab.ebm.sphere import geodesic, project
from ebc_lab.ebm.vmf import bessel_ratio, sample


class Bump:
    """E = -K mu.x: the law at temperature T is vMF(mu, K / T)."""

    def __init__(self, n: int, raw: float, dtype: torch.dtype = torch.float64):
        self.raw = raw
        self.mu = torch.eye(n, dtype=dtype)[0]

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        return -self.raw * (x @ self.mu)

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return project(x, self.raw * self.mu)


def chains(target: Bump | Terms, x: torch.Tensor, **settings) -> Result:
    energy = target.energy if isinstance(target, Bump) else target.total
    return langevin(energy, target.score, x, **settings)


# -- one step ------------------------------------------------------------------------------------------------


def test_golden_step():
    m = tensor(GOLDEN["baoab"]["m"])
    x, v, noise = (tensor(GOLDEN["baoab"][name]) for name in ("x", "v", "noise"))
    settings = (GOLDEN["baoab"][name] for name in ("dt", "friction", "temperature"))

    def score(x):
        return GOLDEN["baoab"]["raw"] * project(x, m)

    x, v, force = baoab_step(x, v, score(x), score, *settings, noise)
    assert torch.equal(force, score(x))
    torch.testing.assert_close(x, tensor(GOLDEN["baoab"]["x_new"]), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(v, tensor(GOLDEN["baoab"]["v_new"]), rtol=1e-8, atol=1e-10)


def test_without_friction_a_step_conserves_energy_to_second_order_and_runs_backwards():
    bump = Bump(8, 30.0)
    x0 = unit(50, 8)
    v0 = project(x0, torch.randn(50, 8, generator=generator(1), dtype=torch.float64))

    def after(dt: float, v: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for _ in range(round(1 / dt)):
            x, v, _ = baoab_step(x, v, bump.score(x), bump.score, dt, 0.0, 1.0, torch.zeros_like(x))
        return x, v

    def drift(dt: float) -> float:
        x, v = after(dt, v0, x0)
        change = bump.energy(x) + (v * v).sum(-1) / 2 - bump.energy(x0) - (v0 * v0).sum(-1) / 2
        return float(change.abs().mean())

    assert drift(0.01) / drift(0.005) == pytest.approx(4, rel=0.1)
    x, v = after(0.05, v0, x0)
    back, reversed_velocity = after(0.05, -v, x)
    torch.testing.assert_close(back, x0, rtol=0, atol=1e-10)
    torch.testing.assert_close(reversed_velocity, -v0, rtol=0, atol=1e-9)


# -- stationary laws -----------------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("adjusted", [False, True])
@pytest.mark.parametrize(
    ("n", "raw", "rows", "temperature"),
    [(3, 10.0, 20_000, 1.0), (16, 150.0, 4000, 1.0), (640, 6390.0, 100, 1.0), (8, 60.0, 10_000, 2.5)],
)
def test_the_mean_cosine_is_the_laws_at_every_temperature(n, raw, rows, temperature, adjusted):
    """Chains from the uniform law; adjusted ones, exact at twice the step, are brought near by plain ones."""
    bump = Bump(n, raw)
    settings = {"stiffness": raw, "temperature": temperature, "generator": generator(n + int(raw))}
    start = chains(bump, unit(rows, n), steps=80, **settings)
    settings |= {"steps": 40, "step": 0.5 if adjusted else 0.25, "adjusted": adjusted}
    result = chains(bump, start.x, velocity=start.velocity, **settings)
    bias = 0.0 if adjusted else 0.005
    expected = float(bessel_ratio(n, raw / temperature))
    error = 4 * math.sqrt(cosine_variance(n, raw / temperature) / rows)
    assert abs(float(result.x[:, 0].mean()) - expected) < max(bias * expected, error)
    assert 0.6 < result.acceptance < 1 if adjusted else result.acceptance == 1
    kinetic = (result.velocity**2).sum(-1) / (n - 1) / temperature
    assert abs(float(kinetic.mean()) - 1) < 4 * float(kinetic.std()) / math.sqrt(rows) + 4 * bias


def mixture(n: int = 8, *, pairs: bool = False) -> Terms:
    """Three splats, and two pairs where asked for."""
    mu, kappa = unit(3, n, seed=3), tensor([0.8, 2.0, 5.0])
    if not pairs:
        return Terms(mu, tensor([1.0, 2.0, 0.7]), kappa).prepared()
    a, b = unit(2, n, seed=4), unit(2, n, seed=5)
    return Terms(mu, tensor([1.0, 2.0, 0.7]), kappa, a=a, b=b, omega=tensor([0.35, -0.3])).prepared()


@pytest.mark.thorough
@pytest.mark.parametrize("pairs", [False, True])
def test_adjusted_chains_have_a_mixtures_mean_on_s7(pairs):
    """From the law of an oracle, resampled by its weights: the slow walk between splats is not tested."""
    terms = mixture(pairs=pairs)
    splats = Terms(terms.mu, terms.alpha, terms.kappa)
    component = torch.multinomial(terms.alpha, 100_000, replacement=True, generator=generator(20))
    oracle = sample(terms.mu[component], 7 * terms.kappa[component], generator(21))
    weights = torch.softmax(splats.total(oracle) - terms.total(oracle), 0)
    statistic = oracle @ terms.mu.T
    expected = weights @ statistic
    variance = (weights.square().unsqueeze(-1) * (statistic - expected) ** 2).sum(0)
    start = oracle[torch.multinomial(weights, 3000, replacement=True, generator=generator(30))]
    settings = {"steps": 50, "step": 0.5, "adjusted": True, "generator": generator(7)}
    result = chains(terms, start, stiffness=stiffness(terms.kappa, None, terms.omega, 8), **settings)
    cosines = result.x @ terms.mu.T
    standard_error = torch.sqrt(cosines.var(0) / 3000 + variance)
    assert float(((cosines.mean(0) - expected) / standard_error).abs().max()) < 4
    assert result.acceptance > 0.6


# -- the original's chain ------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_the_originals_settings_are_far_from_stationary():
    """At K = 50 its mean cosine is ten times the law's, at 6390 its temperature is twelve."""
    found = [
        original_chain(Bump(640, raw).score, unit(100, 640), generator=generator()) for raw in (50.0, 6390.0)
    ]
    assert float(found[0].x[:, 0].mean()) == pytest.approx(0.78, abs=0.02)
    assert float(bessel_ratio(640, 50.0)) == pytest.approx(0.078, abs=0.001)
    assert float((found[1].velocity ** 2).sum(-1).mean() / 639) == pytest.approx(12, abs=1.5)


# -- the contract --------------------------------------------------------------------------------------------


def run(steps: int = 10, **settings) -> Result:
    arguments = {"steps": steps, "stiffness": 20.0, "generator": generator(3), **settings}
    return chains(Bump(6, 20.0), arguments.pop("x", unit(9, 6)), **arguments)


@pytest.mark.parametrize("adjusted", [False, True])
def test_chains_repeat_with_the_seed_and_differ_without(adjusted):
    assert torch.equal(run(adjusted=adjusted).x, run(adjusted=adjusted).x)
    assert not torch.equal(run(adjusted=adjusted).x, run(adjusted=adjusted, generator=generator(4)).x)
    assert run(adjusted=adjusted, generator=None).x.shape == (9, 6)


@pytest.mark.parametrize("adjusted", [False, True])
def test_a_chain_goes_on_from_its_state_and_velocity(adjusted):
    whole = run(20, adjusted=adjusted, velocity=torch.zeros(9, 6, dtype=torch.float64))
    noise = generator(3)
    half = run(12, adjusted=adjusted, velocity=torch.zeros(9, 6, dtype=torch.float64), generator=noise)
    rest = run(8, adjusted=adjusted, x=half.x, velocity=half.velocity, generator=noise)
    torch.testing.assert_close((rest.x, rest.velocity), (whole.x, whole.velocity), rtol=0, atol=1e-10)
    assert (12 * half.acceptance + 8 * rest.acceptance) / 20 == pytest.approx(whole.acceptance)


def test_a_refused_proposal_leaves_the_state_and_turns_the_velocity_round():
    wall = unit(5, 6)

    def energy(x):
        return torch.where((x - wall).norm(dim=-1) < 1e-9, 0.0, 1e9)

    v = project(wall, torch.ones_like(wall))
    settings = {"steps": 1, "stiffness": 1.0, "friction": 0.0, "velocity": v, "generator": generator()}
    result = langevin(energy, torch.zeros_like, wall, adjusted=True, **settings)
    assert result.acceptance == 0
    torch.testing.assert_close(result.x, wall, rtol=0, atol=1e-15)
    torch.testing.assert_close(result.velocity, -v)


def test_the_step_is_measured_in_the_energys_own_time():
    bump, x = Bump(6, 20.0), unit(9, 6)
    v = project(x, torch.ones_like(x))
    result = run(1, x=x, velocity=v, friction=0.0, step=0.4, temperature=3.0)
    dt = 0.4 / math.sqrt(20.0 + 3.0 * 5)
    there, carried = geodesic(x, v + dt / 2 * bump.score(x), dt)
    torch.testing.assert_close(result.x, there)
    torch.testing.assert_close(result.velocity, carried + dt / 2 * bump.score(there))


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("adjusted", [False, True])
def test_states_stay_on_the_sphere_in_their_own_precision_without_a_graph(dtype, adjusted):
    terms = mixture(pairs=True)
    splats = (getattr(terms, name).to(dtype).requires_grad_(True) for name in ("mu", "alpha", "kappa"))
    pairs = {name: getattr(terms, name).to(dtype) for name in ("a", "b", "omega")}
    narrow = Terms(*splats, **pairs)
    settings = {"steps": 200, "adjusted": adjusted, "generator": generator()}
    settings["stiffness"] = stiffness(narrow.kappa, None, narrow.omega, 8)
    result = chains(narrow, unit(20, 8, dtype=dtype), **settings)
    assert result.x.dtype == result.velocity.dtype == dtype
    assert not result.x.requires_grad
    assert float((result.x.norm(dim=-1) - 1).abs().max()) < 1e-6
    assert float((result.x * result.velocity).sum(-1).abs().max()) < 1e-4


def test_temperature_0_means_no_dynamics():
    x = unit(9, 6)
    result = run(x=x, temperature=0.0)
    assert torch.equal(result.x, x)
    assert torch.equal(result.velocity, torch.zeros_like(x))


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(({"step": step}, "between 0 and 2") for step in (0.0, -0.1, 2.0, math.nan)),
        ({"temperature": -1.0}, "temperature is 0"),
        ({"temperature": math.nan}, "temperature is 0"),
        ({"friction": -1.0}, "0 or more"),
        ({"stiffness": -1.0}, "0 or more"),
        ({"steps": -1}, "0 or more"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        run(**settings)


@pytest.mark.parametrize(
    ("part", "adjusted", "evaluation", "step"),
    [
        *(("score", False, 0, 0), ("score", False, 4, 4), ("score", True, 4, 4)),
        *(("energy", True, 0, 0), ("energy", True, 7, 7)),
        *(("energy", False, 0, 0), ("energy", False, 1, 10)),  # plain chains look at it at both ends
    ],
)
def test_an_energy_or_score_that_is_not_finite_names_the_step(part, adjusted, evaluation, step):
    bump, evaluations = Bump(6, 20.0), itertools.count()

    def failing(x):
        values = getattr(bump, part)(x)
        if next(evaluations) >= evaluation:
            values[1] = math.nan
        return values

    functions = {"energy": bump.energy, "score": bump.score, part: failing}
    with pytest.raises(ValueError, match=f"the {part} is not finite at step {step} "):
        langevin(**functions, x=unit(4, 6), steps=10, stiffness=20.0, adjusted=adjusted)
    if part == "score" and not adjusted:
        evaluations = itertools.count()
        with pytest.raises(ValueError, match=f"the score is not finite at step {step} "):
            original_chain(failing, unit(4, 6), generator=generator())

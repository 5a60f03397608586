"""beta_g: measured by both probes, smoothed, and when; and S, which it makes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call

from ebc_lab.ebc import SensitivityFilter, aggregate, centre, group_parameters, rms_norm
from ebc_lab.ebc.options import AGGREGATES, CADENCES
from ebc_lab.ebc.sensitivity import due_groups, probe_fd, probe_jvp

PROBES = {"jvp": probe_jvp, "fd": probe_fd}


def linear(x: Tensor):
    """Logits of the linear model sum_l X_l W_l as a function of its named weights."""
    return lambda weights: sum(x[i] @ weights[f"w{i}"] for i in range(len(x)))


@pytest.mark.parametrize("probe", PROBES)
@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3))
def test_scale_of_a_direction_and_number_of_tokens(probe, seed, factor):
    draw = {"dtype": torch.float64, "generator": torch.Generator().manual_seed(seed)}
    x = torch.randn(1, 5, 4, **draw)
    w = torch.randn(4, 6, **draw)
    u = torch.randn(4, 6, **draw)
    measure = PROBES[probe]
    once = measure(linear(x), {"w0": w}, {"w0": u}, None).item()
    assert measure(linear(x), {"w0": w}, {"w0": factor * u}, None).item() == pytest.approx(
        factor * once, rel=1e-6
    )
    twice = x.repeat(1, 2, 1)
    assert measure(linear(twice), {"w0": w}, {"w0": u}, None).item() == pytest.approx(once, rel=1e-6)


@pytest.mark.parametrize("probe", PROBES)
def test_a_mask_keeps_only_its_tokens(golden, probe):
    values = golden["linear_model"]
    x, w, dw = (torch.tensor(values[k], dtype=torch.float64) for k in ("X", "W", "dW"))
    mask = torch.tensor([True, True, False, True, False, False])
    weights = {f"w{i}": m for i, m in enumerate(w)}
    direction = {"w1": dw[1]}
    masked = PROBES[probe](linear(x), weights, direction, mask).item()
    assert masked == pytest.approx(
        PROBES[probe](linear(x[:, mask]), weights, direction, None).item(), rel=1e-6
    )


@pytest.mark.thorough
@pytest.mark.parametrize("guess", [1.0, 1e-2, 1e2])
@torch.no_grad()
def test_fd_agrees_with_jvp_to_a_thousandth_in_float32(make_gpt, batches, backward, weights_of, guess):
    """In the 30th step of Adam, group by group."""
    model = make_gpt(width=32)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for batch in batches(30):
        with torch.enable_grad():
            backward(model, batch)
        weights = dict(zip(dict(model.named_parameters()), weights_of(model), strict=True))
        optimizer.step()
    moved = {name: p - weights[name] for name, p in model.named_parameters()}

    def forward(weights):
        return functional_call(model, weights, (batch[:2, :-1],))

    for members in group_parameters(moved).values():
        norm = torch.nn.utils.get_total_norm([moved[name] for name in members])
        direction = {name: moved[name] / norm for name in members}
        exact = probe_jvp(forward, weights, direction, None).item()
        assert probe_fd(forward, weights, direction, None, guess).item() == pytest.approx(exact, rel=1e-3)


def test_golden_filter(golden):
    values = golden["beta_filter"]
    tracked = SensitivityFilter()
    betas = [tracked.update(torch.tensor(o, dtype=torch.float64)).item() for o in values["observed"]]
    assert betas == pytest.approx(values["warm"], rel=1e-6)


@given(st.floats(1e-3, 1e3), st.floats(1, 10), st.sampled_from([torch.float32, torch.float64]))
def test_inflation_multiplies_beta_and_nothing_else(observed, factor, dtype):
    tracked = SensitivityFilter()
    tracked.inflate(factor)
    assert tracked.beta is None
    tracked.update(torch.tensor(observed, dtype=dtype))
    tracked.inflate(torch.tensor(factor, dtype=torch.float64))
    assert tracked.beta.dtype == dtype
    assert tracked.beta.item() == pytest.approx(
        factor * observed, rel=1e-6 if dtype == torch.float32 else 1e-14
    )
    assert tracked.count == 1


@pytest.mark.parametrize("when", [0, 1, 5])
def test_an_observation_that_is_not_finite_changes_nothing(when):
    observed = [2.0, 2.2, 3.0, 2.1, 1.0, 2.0]
    plain = SensitivityFilter()
    disturbed = SensitivityFilter()
    for i, value in enumerate(observed):
        if i == when:
            disturbed.update(math.nan)
            disturbed.update(math.inf)
        assert torch.equal(plain.update(value), disturbed.update(value))


GROUPS = ["embeddings", "block0", "block1", "block2", "head"]


@pytest.mark.parametrize("cadence", ["warm", "dense"])
def test_warm_and_dense_cadences_sweep_early_then_ever_more_rarely(cadence):
    sweeps = [t for t in range(2000) if due_groups(t, GROUPS, cadence) == GROUPS]
    assert sweeps == [0, 10, 20, 50, 100, 200, 400, 800, 1600]


def test_sweep_cadence_measures_all_every_20_steps_and_nothing_between():
    due = [due_groups(t, GROUPS, "sweep") for t in range(1000)]
    assert due == [[] if t % 20 else GROUPS for t in range(1000)]


@given(st.integers(1, 30), st.sampled_from(CADENCES))
def test_no_group_is_forgotten(n, cadence):
    groups = [f"block{i}" for i in range(n)]
    every = 5 if cadence == "dense" else 20
    longest = every * (math.ceil(n / 2) + 1)  # steps: a whole round, and a turn that falls on a sweep
    seen = dict.fromkeys(groups, 0)
    for t in range(1000):
        due = due_groups(t, groups, cadence)
        assert len(set(due)) == len(due)
        seen.update(dict.fromkeys(due, t))
        assert t - min(seen.values()) <= longest


# -- S, and which aggregates bound the movement --------------------------------------------------------------

contributions = st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e3)), min_size=1, max_size=20)


@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_bounds_hold_on_a_linear_model(seed, layers):
    generator = torch.Generator().manual_seed(seed)
    draw = {"dtype": torch.float64, "generator": generator}
    x = torch.randn(layers, 7, 4, **draw)
    dw = torch.randn(layers, 4, 5, **draw)
    moves = x @ dw  # each layer's share of the logits' movement
    s = torch.stack([rms_norm(centre(move)) for move in moves])
    movement = rms_norm(centre(moves.sum(0)))
    assert aggregate(s, "l1") >= movement * (1 - 1e-12)
    assert aggregate(s, "sqrtl_l2") >= movement * (1 - 1e-12)


@given(contributions)
def test_order_of_the_aggregates(values):
    s = torch.tensor(values, dtype=torch.float64)
    l1, sqrtl_l2, l2 = (aggregate(s, kind) for kind in ("l1", "sqrtl_l2", "l2"))
    assert l2 <= l1 * (1 + 1e-12)
    assert l1 <= sqrtl_l2 * (1 + 1e-12)


@given(contributions, st.integers(1, 5), st.floats(1e-3, 1e3))
def test_groups_at_rest_do_not_count_and_all_scale(values, resting, factor):
    s = torch.tensor(values, dtype=torch.float64)
    for kind in AGGREGATES:
        assert aggregate(torch.cat([s, torch.zeros(resting)]), kind).item() == pytest.approx(
            aggregate(s, kind).item()
        )
        assert aggregate(factor * s, kind).item() == pytest.approx(factor * aggregate(s, kind).item())

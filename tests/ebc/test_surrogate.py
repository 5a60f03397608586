"""S: golden values, and which aggregates bound the movement. The guard: when it gives way and how it recovers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ebc_lab.ebc import aggregate, centre, rms_norm
from ebc_lab.ebc.options import AGGREGATES, GUARDS
from ebc_lab.ebc.surrogate import Guard

fixed = settings(derandomize=True, deadline=None, max_examples=80)
contributions = st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e3)), min_size=1, max_size=20)


@pytest.mark.parametrize("kind", ["l1", "sqrtl_l2", "l2"])
def test_golden(golden, kind):
    values = golden["linear_model"]
    s = torch.tensor(values["contribution"], dtype=torch.float64)
    assert aggregate(s, kind).item() == pytest.approx(values["S"][kind], rel=1e-6)


def test_l2_is_no_bound(golden):
    values = golden["linear_model"]
    for kind, bound in {"l1": True, "sqrtl_l2": True, "l2": False}.items():
        assert (values["S"][kind] >= values["T"]) == bound


@fixed
@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_bounds_hold_on_a_linear_model(seed, layers):
    generator = torch.Generator().manual_seed(seed)
    draw = {"dtype": torch.float64, "generator": generator}
    x, dw = torch.randn(layers, 7, 4, **draw), torch.randn(layers, 4, 5, **draw)
    moves = x @ dw  # each layer's share of the logits' movement
    s = torch.stack([rms_norm(centre(move)) for move in moves])
    movement = rms_norm(centre(moves.sum(0)))
    assert aggregate(s, "l1") >= movement * (1 - 1e-12)
    assert aggregate(s, "sqrtl_l2") >= movement * (1 - 1e-12)


@fixed
@given(contributions)
def test_order_of_the_aggregates(values):
    s = torch.tensor(values, dtype=torch.float64)
    l1, sqrtl_l2, l2 = (aggregate(s, kind) for kind in ("l1", "sqrtl_l2", "l2"))
    assert l2 <= l1 * (1 + 1e-12)
    assert l1 <= sqrtl_l2 * (1 + 1e-12)


@fixed
@given(contributions, st.integers(1, 5), st.floats(1e-3, 1e3))
def test_groups_at_rest_do_not_count_and_all_scale(values, resting, factor):
    s = torch.tensor(values, dtype=torch.float64)
    for kind in AGGREGATES:
        assert aggregate(torch.cat([s, torch.zeros(resting)]), kind).item() == pytest.approx(
            aggregate(s, kind).item()
        )
        assert aggregate(factor * s, kind).item() == pytest.approx(factor * aggregate(s, kind).item())


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="aggregate='max' is unknown; it takes l1, sqrtl_l2, l2"):
        aggregate(torch.ones(2), "max")


rhos = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20)
moving = pytest.mark.parametrize("kind", ["shrink", "shrink_inflate"])


@moving
def test_golden_guard(golden, kind):
    values = golden["guard_shrink"]
    guard, factors = Guard(kind), []
    for i, rho in enumerate(values["rho"]):
        guard.audit(rho, i * values["audit_every"])
        factors.append(guard.factor.item())
    assert factors == pytest.approx(values["factor"], rel=1e-6)
    assert guard.count == 2


@fixed
@given(rhos)
def test_no_guard_never_moves(values):
    guard = Guard("none")
    assert all(guard.audit(rho, 10 * i) == 1 for i, rho in enumerate(values))
    assert (guard.factor, guard.count) == (1, 0)


@fixed
@given(rhos)
def test_a_guard_never_widens_the_radius_and_counts_what_shrank_it(values):
    guard = Guard("shrink")
    for i, rho in enumerate(values):
        before = guard.factor.item()
        guard.audit(rho, 10 * i)
        assert guard.factor <= 1
        assert (guard.factor >= before * (1 - 1e-12)) if rho <= 1 else (guard.factor <= 1 / rho * (1 + 1e-12))
    assert guard.count == sum(rho > 1 for rho in values)


@moving
@fixed
@given(rho=st.floats(1.01, 1e3), start=st.integers(0, 500), cuts=st.lists(st.integers(1, 199), max_size=5))
def test_half_of_ln_g_is_recovered_in_200_steps_however_many_audits(kind, rho, start, cuts):
    guard = Guard(kind)
    guard.audit(rho, start)
    assert guard.log_factor.item() == pytest.approx(-math.log(rho))  # no recovery before the first
    for cut in sorted(set(cuts)):
        guard.audit(0.5, start + cut)
    guard.audit(0.5, start + 200)
    assert guard.log_factor.item() == pytest.approx(-0.5 * math.log(rho))


@fixed
@given(rhos)
def test_only_shrink_inflate_asks_for_larger_betas(values):
    shrink, inflate = Guard("shrink"), Guard("shrink_inflate")
    for i, rho in enumerate(values):
        assert shrink.audit(rho, i) == 1
        assert inflate.audit(torch.tensor(rho), i).item() == pytest.approx(max(rho, 1.0), rel=1e-6)
    assert inflate.factor.item() == pytest.approx(shrink.factor.item(), rel=1e-5)


@moving
@pytest.mark.parametrize("rho", [math.nan, math.inf, -math.inf])
def test_after_a_rho_that_is_not_finite_only_time_has_passed(kind, rho):
    told, untold = Guard(kind), Guard(kind)
    for guard in (told, untold):
        guard.audit(2.0, 0)
    assert told.audit(rho, 100) == 1
    assert told.count == 1
    for guard in (told, untold):
        guard.audit(0.5, 200)
    assert told.factor.item() == pytest.approx(untold.factor.item()) == pytest.approx(2**-0.5)


@pytest.mark.parametrize("kind", GUARDS)
def test_guard_state_round_trip_is_exact(kind):
    first, second = Guard(kind), Guard(kind)
    for i, rho in enumerate((1.3, 0.8, 1.7)):
        first.audit(rho, 10 * i)
    second.load_state_dict(first.state_dict())
    for guard in (first, second):
        guard.audit(1.1, 70)
    assert torch.equal(first.log_factor, second.log_factor)
    assert first.count == second.count == (0 if kind == "none" else 3)


def test_a_saved_guard_state_does_not_move_with_the_guard():
    guard = Guard("shrink").to("cpu")
    saved = guard.state_dict()
    guard.audit(2.0, 0)
    guard.load_state_dict(saved)
    assert (guard.factor, guard.count, guard.last) == (1, 0, None)


def test_an_unknown_guard_is_refused():
    with pytest.raises(ValueError, match="guard='grow' is unknown; it takes none, shrink, shrink_inflate"):
        Guard("grow")

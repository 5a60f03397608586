"""How delta evolves, and how its target is scheduled."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ebc_lab.ebc import make_controller, schedule_multiplier

fixed = settings(derandomize=True, deadline=None, max_examples=60)
kls = st.lists(st.tuples(st.floats(0, 10.0), st.booleans()), min_size=1, max_size=30)
KINDS = ("fixed", "pi", "log_pi")


@pytest.mark.parametrize(("kind", "series"), [("pi", "pi"), ("log_pi", "log_pi"), ("log_pi", "log_pi_always_clipped")])
def test_golden(golden, kind, series):
    values = golden["controllers"]
    controller = make_controller(kind, values[series]["target"])
    clipped = [True] * len(values["kl"]) if series.endswith("always_clipped") else values["clip_active"]
    deltas = [controller.update(kl, c).item() for kl, c in zip(values["kl"], clipped, strict=True)]
    assert deltas == pytest.approx(values[series]["delta"], rel=1e-6)


def test_golden_schedule(golden):
    values = golden["schedules"]
    got = [schedule_multiplier("linear", t, values["total_steps"]) for t in values["step"]]
    assert got == pytest.approx(values["linear"], rel=1e-6)
    assert [schedule_multiplier("constant", t, None) for t in values["step"]] == [1.0] * 4


@fixed
@given(kls)
def test_fixed_never_moves(audits):
    controller = make_controller("fixed", 0.02)
    assert all(controller.update(kl, clipped) == 0.02 for kl, clipped in audits)


@fixed
@given(kls)
def test_ranges(audits):
    published, log_pi = make_controller("pi", 0.05), make_controller("log_pi", 0.05)
    for kl, clipped in audits:
        assert 0.01 <= published.update(kl, clipped) <= 0.30
        assert abs(math.log(log_pi.update(kl, clipped) / 0.05)) <= 12 + 1e-9


@fixed
@given(kls, st.floats(1e-3, 1e3))
def test_log_pi_has_no_unit(audits, unit):
    small, large = make_controller("log_pi", 0.05), make_controller("log_pi", 0.05 * unit)
    for kl, clipped in audits:
        kl = max(kl, 1e-3)  # away from the smallest KL it takes, which has a unit
        delta = small.update(kl, clipped).item()
        assert large.update(kl * unit, clipped).item() == pytest.approx(delta * unit, rel=1e-6)


def test_log_pi_brings_a_loose_bound_to_its_target():
    controller = make_controller("log_pi", 0.01)
    for _ in range(40):
        controller.update(controller.delta / 30, True)  # what the l1 bound does: 1/30 of what was asked
    assert controller.delta.item() / 30 == pytest.approx(0.01, rel=1e-3)


def test_log_pi_waits_while_nothing_is_clipped():
    controller = make_controller("log_pi", 0.05)
    assert controller.update(0.001, False).item() == pytest.approx(0.05)
    assert controller.update(0.5, False) < 0.05  # too far is too far, clipped or not


@pytest.mark.parametrize("kind", KINDS)
def test_a_schedule_moves_delta_and_its_target_together(kind):
    controller = make_controller(kind, 0.05)
    for kl in (0.02, 0.09):
        controller.update(kl, True)
    before = controller.delta.item()
    controller.rescale(0.05 * 0.5)
    assert controller.delta.item() == pytest.approx(0.5 * before)
    assert controller.target.item() == pytest.approx(0.025)


@pytest.mark.parametrize("kind", KINDS)
def test_state_round_trip_is_exact(kind):
    first, second = make_controller(kind, 0.05), make_controller(kind, 0.05)
    for kl in (0.02, 0.09, 0.03):
        first.update(kl, True)
    second.load_state_dict(first.state_dict())
    for kl in (0.01, 0.2):
        assert torch.equal(first.update(kl, True), second.update(kl, True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_kl_that_is_not_finite_says_nothing(kind):
    told, untold = make_controller(kind, 0.05), make_controller(kind, 0.05)
    for kl in (0.02, math.nan, math.inf, 0.08):
        told.update(kl, True)
    for kl in (0.02, 0.08):
        untold.update(kl, True)
    assert torch.equal(told.delta, untold.delta)


def test_gains_and_start_can_be_chosen():
    controller = make_controller("log_pi", 0.05, 0.1, kp=0.0, ki=1.0)
    assert controller.update(0.025, True).item() == pytest.approx(0.2)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="controller='pid' is unknown; it takes fixed, pi, log_pi"):
        make_controller("pid", 0.05)
    with pytest.raises(ValueError, match="no gain kd"):
        make_controller("log_pi", 0.05, kd=1.0)
    with pytest.raises(ValueError, match="schedule='step' is unknown"):
        schedule_multiplier("step", 0, 10)
    with pytest.raises(ValueError, match="needs total_steps"):
        schedule_multiplier("linear", 0, None)

"""How delta evolves, and how its target is scheduled."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tokenwise import Tokenwise, attached_adam, integers, learn

from ebc_lab.components.forensics import PI
from ebc_lab.ebc import make_controller, schedule_multiplier
from ebc_lab.ebc.controller import CONTROLLERS
from ebc_lab.ebc.options import LEAST_MULTIPLIER, SCHEDULES

kls = st.lists(st.tuples(st.floats(0, 10.0), st.booleans()), min_size=1, max_size=30)
KINDS = CONTROLLERS | {"pi": PI}
numbers = st.floats(-1e300, 1e300)
SIGNALS = {"loss_drop": 0.08, "slope": -0.1, "q": 0.01}  # r = 8/9
GAINS = {"energy": {"a": 0.3}}


def make(kind, target=0.05):
    return KINDS[kind](target, **GAINS.get(kind, {}))


@pytest.mark.parametrize(
    ("kind", "series"),
    [("pi", "pi"), ("log_pi", "log_pi"), ("log_pi", "log_pi_always_clipped"), ("rsl", "rsl")],
)
def test_golden(golden, kind, series):
    values = golden["controllers"]
    controller = make(kind, values[series]["target"])
    clipped = [True] * len(values["kl"]) if series.endswith("always_clipped") else values["clip_active"]
    deltas = [controller.update(kl, c).item() for kl, c in zip(values["kl"], clipped, strict=True)]
    assert deltas == pytest.approx(values[series]["delta"], rel=1e-6)


@pytest.mark.parametrize("kind", ["linear", "cosine", "hold_decay"])
def test_golden_schedule(golden, own_golden, kind):
    values = (own_golden if kind == "hold_decay" else golden)["schedules"]
    got = [schedule_multiplier(kind, t, values["total_steps"]) for t in values["step"]]
    assert got == pytest.approx(values[kind], rel=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_steps_target_and_radius_move_along_the_schedule(schedule):
    model = Tokenwise()
    optimizer, ebc = attached_adam(model, schedule=schedule, total_steps=6)
    for t in range(6):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - t / 10)
        learn(model, optimizer, integers(24, 12, seed=t))
        multiplier = schedule_multiplier(schedule, t, 6, 1 - t / 10)
        assert float(ebc.last.target_kl) == pytest.approx(0.002 * multiplier, rel=1e-6)
        assert float(ebc.last.radius) == pytest.approx(2 * float(ebc.last.delta) ** 0.5, rel=1e-6)
    assert (multiplier < 1) == (schedule != "constant")


@given(st.integers(1, 1000), st.sampled_from(tuple(LEAST_MULTIPLIER)))
def test_a_schedule_over_a_run_only_falls_from_1_to_5_per_cent(total, kind):
    values = [schedule_multiplier(kind, t, total) for t in range(total + 20)]
    assert values[0] == pytest.approx(1)
    assert all(a >= b for a, b in itertools.pairwise(values))
    assert values[total:] == pytest.approx([0.05] * 20)


@given(st.floats(0, 1), st.floats(0, 1))
def test_lr_squared_follows_the_learning_rate_alone(ratio, factor):
    m = schedule_multiplier("lr_squared", 0, None, ratio)
    assert m == pytest.approx(ratio**2)
    assert schedule_multiplier("lr_squared", 70, 100, factor * ratio) == pytest.approx(factor**2 * m)


@given(kls)
def test_ranges(audits):
    published = make("pi")
    log_pi = make("log_pi")
    for kl, clipped in audits:
        assert 0.01 <= published.update(kl, clipped) <= 0.30
        assert abs(math.log(log_pi.update(kl, clipped) / 0.05)) <= 12 + 1e-9


@given(kls, st.floats(1e-3, 1e3))
def test_log_pi_has_no_unit(audits, unit):
    small = make_controller("log_pi", 0.05)
    large = make_controller("log_pi", 0.05 * unit)
    for kl, clipped in audits:
        kl = max(kl, 1e-3)  # away from the smallest KL it takes, which has a unit
        delta = small.update(kl, clipped).item()
        assert large.update(kl * unit, clipped).item() == pytest.approx(delta * unit, rel=1e-6)


def test_log_pi_brings_a_loose_bound_to_its_target():
    controller = make_controller("log_pi", 0.01)
    for _ in range(40):
        controller.update(controller.delta / 30, True)  # what the l1 bound does: 1/30 of what was asked
    assert controller.delta.item() / 30 == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("kind", ["rsl", "agreement"])
@pytest.mark.parametrize(("good", "end"), [(True, 12), (False, -12)])
def test_rsl_and_agreement_stop_at_the_end_of_their_reach(kind, good, end):
    controller = make(kind)
    for _ in range(40):  # 1.5^40 > e^12
        controller.update(0.0 if good else 9.0, True, **{**SIGNALS, "loss_drop": 0.1 if good else -0.1})
    assert math.log(controller.delta / controller.target) == pytest.approx(end)


@pytest.mark.parametrize(
    ("r", "clipped", "moved"),
    [(0.24, False, 1 / 1.5), (0.26, True, 1), (0.74, True, 1), (0.76, True, 1.5), (0.76, False, 1)],
)
def test_agreement_moves_by_the_fall_over_what_was_promised(r, clipped, moved):
    promised = 0.5 * 0.1 - 0.5**2 * 0.01  # of the step c·dW: -c·slope - c²·q
    controller = make("agreement")
    delta = controller.update(0.05, clipped, loss_drop=r * promised, slope=-0.1, q=0.01, c=0.5)
    assert controller.ratio.item() == pytest.approx(r)
    assert delta.item() / 0.05 == pytest.approx(moved)


@pytest.mark.parametrize(("slope", "q"), [(0.1, 0.0), (0.0, 0.0), (-0.1, 0.2)])
@pytest.mark.parametrize("drop", [-0.5, 0.5])
def test_agreement_shrinks_where_no_fall_was_predicted(slope, q, drop):
    controller = make("agreement")
    assert controller.update(0.05, True, loss_drop=drop, slope=slope, q=q).item() == pytest.approx(0.05 / 1.5)
    assert controller.ratio.isnan()


@given(st.floats(1e-6, 10), st.floats(1e-3, 1e3), st.floats(1e-6, 1), st.floats(1e-3, 1))
def test_energy_is_proportional_to_the_slope_and_to_the_schedule(fall, factor, gain, m):
    controller = make_controller("energy", 0.05, a=gain)
    delta = controller.update(0.01, True, slope=-fall).item()
    assert delta == pytest.approx(gain * fall)
    assert controller.update(0.01, False, slope=-factor * fall).item() == pytest.approx(factor * delta)
    controller.rescale(0.05 * m)
    assert controller.delta.item() == pytest.approx(m * factor * delta)  # at once
    assert controller.update(0.01, True, slope=-fall).item() == pytest.approx(m * delta)  # and from then on


@pytest.mark.parametrize("slope", [0.0, 0.3])
def test_energy_gives_nothing_to_a_proposal_that_climbs(slope):
    controller = make("energy")
    assert controller.update(0.01, True, slope=slope) == 0
    controller.rescale(0.025)
    assert controller.delta == 0
    assert controller.update(0.01, True, slope=-0.1).item() == pytest.approx(0.5 * 0.3 * 0.1)


def watched(controller, values, kl=0.05, clipped=True):
    """One audit after these values of each step. -> delta"""
    for value in values:
        controller.observe(value)
    return controller.update(kl, clipped).item()


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=30), st.booleans())
def test_confidence_moves_against_the_mean_of_what_it_saw(values, clipped):
    controller = make("confidence")
    before = watched(controller, [0.0] * 21)
    assert before == pytest.approx(0.05)
    mean = sum(values) / len(values)
    rate = max(-math.log(2) / 10, min(math.log(1.25) / 10, -mean / 20))
    moved = len(values) * (rate if clipped else min(rate, 0))
    assert math.log(watched(controller, values, clipped=clipped) / before) == pytest.approx(moved, abs=1e-9)
    assert watched(controller, [0.0]) == pytest.approx(before * math.exp(moved))  # nothing is counted twice


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_confidence_takes_no_notice_of_a_step_without_a_number(value):
    told = make("confidence")
    untold = make("confidence")
    for controller in (told, untold):
        watched(controller, [0.0] * 30)
    assert watched(told, [value, 1.0, value]) == watched(untold, [1.0])


@pytest.mark.parametrize("times", [1 / 4, 1 / 2, 1, 2, 4])
@pytest.mark.parametrize("unit", [1e-3, 1.0])
def test_confidence_forgets_its_start_where_boldness_follows_delta(times, unit):
    """Predictions that get bolder with delta, by one standard error for each factor e, among noise."""
    natural = 0.01 * unit
    controller = make("confidence", times * natural)
    noise = torch.Generator().manual_seed(7)
    for _ in range(30):
        excess = math.log(controller.delta.item() / natural)
        watched(controller, excess + torch.randn(10, generator=noise, dtype=torch.float64))
    ends = []
    for _ in range(30):
        excess = math.log(controller.delta.item() / natural)
        ends.append(watched(controller, excess + torch.randn(10, generator=noise, dtype=torch.float64)))
    assert sum(map(math.log, ends)) / 30 == pytest.approx(math.log(natural), abs=0.15)


@pytest.mark.parametrize("kind", KINDS)
def test_a_schedule_may_touch_zero(kind):
    controller = make(kind)
    never = make(kind)
    for c in (controller, never):
        c.update(0.02, True, **SIGNALS)
    controller.rescale(0.0)
    assert controller.delta < 1e-20
    controller.rescale(0.05)
    assert controller.delta.item() == pytest.approx(never.delta.item())
    after = [c.update(0.02, True, **SIGNALS).item() for c in (controller, never)]
    assert after[0] == pytest.approx(after[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_schedule_moves_delta_and_its_target_together(kind):
    controller = make(kind)
    for kl in (0.02, 0.09):
        controller.update(kl, True, **SIGNALS)
    before = controller.delta.item()
    controller.rescale(0.05 * 0.5)
    assert controller.delta.item() == pytest.approx(0.5 * before)
    assert controller.target.item() == pytest.approx(0.025)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kl_that_is_not_finite_says_nothing(kind):
    told = make(kind)
    untold = make(kind)
    for kl in (0.02, math.nan, math.inf, 0.08):
        told.update(kl, True, **SIGNALS)
    for kl in (0.02, 0.08):
        untold.update(kl, True, **SIGNALS)
    assert torch.equal(told.delta, untold.delta)


@pytest.mark.parametrize("kind", ["agreement", "energy"])
@pytest.mark.parametrize("signal", [*SIGNALS, "c"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_signal_that_is_not_finite_says_nothing(kind, signal, value):
    controller = make(kind)
    controller.update(0.02, True, **SIGNALS)
    before = controller.state_dict()
    controller.update(0.02, True, **{**SIGNALS, "loss_drop": -1.0, "slope": -0.4, signal: value})
    used = signal in (*controller.needs, "c")
    assert all(torch.equal(v, controller.state_dict()[k]) for k, v in before.items()) == used


@pytest.mark.parametrize(("kind", "signal"), [(kind, name) for kind in KINDS for name in KINDS[kind].needs])
def test_a_missing_signal_is_named(kind, signal):
    given = {**SIGNALS, "c": 0.5}
    for lacking in ({k: v for k, v in given.items() if k != signal}, {**given, signal: None}):
        with pytest.raises(ValueError, match=f"needs the signal {signal}"):
            make(kind).update(0.05, True, **lacking)


def test_gains_and_start_can_be_chosen():
    controller = make_controller("log_pi", 0.05, 0.1, kp=0.0, ki=1.0)
    assert controller.update(0.025, True).item() == pytest.approx(0.2)


def test_an_unknown_kind_or_gain_is_refused():
    with pytest.raises(ValueError, match="no gain kd"):
        make_controller("log_pi", 0.05, kd=1.0)
    with pytest.raises(ValueError, match=r"controller.*log_pid.*log_pi"):
        make_controller("log_pid", 0.05)


def test_what_a_kind_cannot_do_without_is_asked_for():
    for kind in LEAST_MULTIPLIER:
        with pytest.raises(ValueError, match=f"schedule='{kind}' needs total_steps"):
            schedule_multiplier(kind, 0, None)
    with pytest.raises(ValueError, match="needs lr_ratio"):
        schedule_multiplier("lr_squared", 0, 10)
    for gains in ({}, {"a": 0.0}, {"a": math.nan}):
        with pytest.raises(ValueError, match="controller='energy' needs the gain a"):
            make_controller("energy", 0.05, **gains)
    for target in (0.0, math.nan):
        with pytest.raises(ValueError, match="target must be > 0"):
            make_controller("fixed", target)

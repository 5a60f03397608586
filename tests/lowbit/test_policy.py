"""Policies: the network's maths, the direction of its feedback, its signals, and what a resume restores."""

from __future__ import annotations

import math

import numpy as np
import pytest
from support import low_bit
from support.low_bit import saved_and_loaded

from ebc_lab.lowbit.policy import AuxiliaryNetwork, Observed, Policy, Signals, make_policy

GOLDEN = low_bit.GOLDEN["auxiliary"]
STEADY = Observed(loss=2.0, grad_norm=1.0, update_norm=0.1, progress=0.5, clipped=False)


def golden_network() -> AuxiliaryNetwork:
    network = AuxiliaryNetwork(seed=0)
    network.w1 = np.round(np.sin(1 + np.arange(96.0).reshape(16, 6)), 6)
    network.w2 = np.round(0.1 * np.cos(1 + np.arange(32.0).reshape(2, 16)), 6)
    network.b1 = np.full(16, GOLDEN["b1"])
    network.b2 = np.full(2, GOLDEN["b2"])
    return network


def test_golden_factors_and_weights_after_one_feedback() -> None:
    network = golden_network()
    assert network.rate == GOLDEN["rate"]
    assert network.predict(GOLDEN["z"]) == pytest.approx(GOLDEN["factors"], rel=1e-9)
    network.feedback(GOLDEN["feedback"])
    after = GOLDEN["after"]
    assert network.w2[0, :3] == pytest.approx(after["W2_row0_first3"], rel=1e-9)
    assert network.b2 == pytest.approx(after["b2"], rel=1e-9)
    assert network.w1[0] == pytest.approx(after["W1_row0"], rel=1e-9)
    assert network.b1[:3] == pytest.approx(after["b1_first3"], rel=1e-9)


def test_an_untrained_network_is_the_constant_policy() -> None:
    assert AuxiliaryNetwork(seed=3).predict([3, -3, 1, 0.5, -1, 0]) == (1.0, 1.0)
    assert AuxiliaryNetwork(seed=3).w1.std() == pytest.approx(math.sqrt(1 / 6), rel=0.2)


@pytest.mark.parametrize("clipped", [False, True])
def test_feedback_judges_the_factor_that_bound_the_step(clipped: bool) -> None:
    policy = make_policy("auxnn", seed=1)
    for step in range(5):
        policy.factors(step, STEADY)
        policy.feedback(0.8, clipped)
    f, rho = policy.factors(5, STEADY)
    judged, other = (rho, f) if clipped else (f, rho)
    assert judged < 0.95
    assert other == 1.0


def test_feedback_that_says_nothing_changes_nothing() -> None:
    network = AuxiliaryNetwork(seed=0)
    before = network.state_dict()
    network.feedback(0.5)  # nothing was predicted
    assert network.state_dict() == before
    network.predict(np.ones(6))
    network.feedback((math.nan, 0.0))
    network.feedback((0.0, math.inf))
    assert network.predict(np.ones(6)) == (1.0, 1.0)


def test_signals_are_standardised_deviations() -> None:
    signals = Signals()
    assert not signals.update(STEADY).any()  # nothing to compare with
    assert not Signals().update(Observed(-1.0, 1.0, 0.0, 0.0, False)).any()
    moved = Observed(loss=4.0, grad_norm=0.5, update_norm=0.1, progress=0.6, clipped=True)
    z = signals.update(moved)
    assert z.tolist() == pytest.approx([1, -1, 0, 1, 0, 1])  # of two, each is one deviation off
    rng = np.random.default_rng(0)
    losses = np.exp(rng.normal(1.0, 0.3, 2000))
    seen = [signals.update(Observed(x, 1.0, 0.1, 0.5, False)) for x in losses.tolist()]
    tail = np.array(seen)[500:, 0]
    assert abs(tail.mean()) < 0.1
    assert tail.std() == pytest.approx(1.0, abs=0.1)
    assert signals.update(Observed(1e30, 1.0, 0.1, 0.5, False))[0] == 3.0  # clipped


def test_the_variance_of_the_loss_forgets_with_decay_nine_tenths() -> None:
    signals = Signals()
    for loss in [2.0] * 30 + [3.0]:
        signals.update(Observed(loss, 1.0, 0.1, 0.5, False))
    assert (signals.loss.mean, signals.loss.variance) == pytest.approx((2.1, 0.09))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_leaves_the_moments_alone(bad: float) -> None:
    signals = Signals()
    for loss in (2.0, 3.0, 2.5):
        signals.update(Observed(loss, loss, 0.1, 0.5, False))
    before = signals.state_dict()
    z = signals.update(Observed(bad, bad, bad, bad, False))
    after = signals.state_dict()
    assert np.isfinite(z).all()
    assert after["loss"] == before["loss"]
    assert after["moments"][:5] == before["moments"][:5]


def played(policy: Policy, steps: range) -> list[tuple[float, float]]:
    factors = []
    for t in steps:
        seen = Observed(2 + math.sin(t), 1 + 0.5 * math.cos(t), 0.1 + 0.01 * t, t / 40, t % 3 == 0)
        factors.append(policy.factors(t, seen))
        policy.feedback(math.sin(3 * t), t % 4 == 0)
    return factors


@pytest.mark.parametrize("name", ["constant", "random", "auxnn"])
def test_a_policy_is_a_function_of_its_seed_and_resumes_exactly(name: str) -> None:
    whole = played(make_policy(name, seed=5), range(40))
    assert played(make_policy(name, seed=5), range(40)) == whole
    first = make_policy(name, seed=5)
    played(first, range(17))
    second = make_policy(name, seed=5 if name == "random" else 99)
    second.load_state_dict(saved_and_loaded(first.state_dict()))
    assert played(second, range(17, 40)) == whole[17:]
    assert all(0.25 <= factor <= 4 for pair in whole for factor in pair)
    assert make_policy(name, 0).name == name


def test_random_is_log_uniform_and_differs_by_seed_and_step() -> None:
    policy = make_policy("random", seed=2)
    drawn = np.log([policy.factors(t, STEADY) for t in range(500)]) / math.log(4)
    assert drawn.min() < -0.9
    assert drawn.max() > 0.9
    assert abs(drawn.mean()) < 0.06
    assert drawn.std() == pytest.approx(1 / math.sqrt(3), rel=0.06)
    assert policy.factors(7, STEADY) == make_policy("random", seed=2).factors(7, STEADY)
    assert policy.factors(7, STEADY) != make_policy("random", seed=3).factors(7, STEADY)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="constant, random, auxnn"):
        make_policy("meta", 0)
    with pytest.raises(ValueError, match="6 finite signals"):
        AuxiliaryNetwork(0).predict([1.0, 2.0])
    with pytest.raises(ValueError, match="6 finite signals"):
        AuxiliaryNetwork(0).predict([math.nan] * 6)
    state = AuxiliaryNetwork(0).state_dict() | {"b2": [0.0, 0.0, 0.0]}
    with pytest.raises(ValueError, match="b2 of the saved policy"):
        AuxiliaryNetwork(0).load_state_dict(state)
    for other in ({"b2": {}}, {"b2": "much"}, {"last": [1.0]}):
        with pytest.raises(ValueError, match=r"no state of an AuxiliaryNetwork|last signals of"):
            AuxiliaryNetwork(0).load_state_dict(state | {"b2": [0.0, 0.0]} | other)

"""EBC in loops shaped like public ones (`support.loops`), judged by a measurement that is not its own."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from support.loops import language, others, transformers_models
from support.loops.loop import Training, played

LOOPS = [*language.LOOPS, *transformers_models.LOOPS, *others.LOOPS]
SETTLED = 8  # steps until c is found
STEPS = 38


def each(loops):
    marked = [
        pytest.param(loop, id=loop.name, marks=() if loop.quick else pytest.mark.slow) for loop in loops
    ]
    return pytest.mark.parametrize("loop", marked)


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.thorough
@each(LOOPS)
def test_without_a_limit_the_weights_are_those_of_the_loop_alone(loop):
    alone = Training(loop).steps(5)
    attached = Training(loop, math.inf).steps(5)
    assert_same(alone.weights(), attached.weights())


@pytest.mark.thorough
@each(LOOPS)
def test_a_loop_goes_on_from_its_checkpoint_with_the_same_bits(loop):
    training = Training(loop, loop.target_kl).steps(4)
    state = training.state()
    training.steps(4)
    resumed = Training(loop, loop.target_kl).resume(state).steps(4)
    assert_same(training.weights(), resumed.weights())


@pytest.mark.thorough
@each(LOOPS)
def test_the_budget_is_held_on_other_rows(loop):
    result = played(loop, STEPS)
    limited = result.limited(SETTLED)
    assert len(limited) > (STEPS - SETTLED) / 2
    assert 0.8 <= statistics.median(limited) <= 1.25
    assert max(limited) <= 3


@each([loop for loop in LOOPS if loop.refused])
def test_what_it_would_get_wrong_is_refused_before_a_weight_moves(loop):
    training = Training(loop, loop.target_kl, {})
    before = training.weights()
    with pytest.raises((TypeError, ValueError), match=loop.refused):
        training.step()
    assert_same(before, training.weights())

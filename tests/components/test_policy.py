"""A policy in a run: what it multiplies, and what it learns from."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ebc_lab.components.hook import Built
from ebc_lab.components.policy import Steering
from ebc_lab.config.parts.policy import PolicyConfig
from ebc_lab.config.schema import RunConfig
from ebc_lab.ebc import StabilizedOptimizer, StepInputs


class Told:
    """A policy that answers the same and keeps what it was told."""

    def __init__(self, on_rate: float = 1.0, on_radius: float = 1.0):
        self.answer = (on_rate, on_radius)
        self.seen = []
        self.fed = []

    def factors(self, step, seen):
        self.seen.append(seen)
        return self.answer

    def feedback(self, cosine, clipped):
        self.fed.append((cosine, clipped))


def made(optimizer: StabilizedOptimizer) -> Steering:
    run = RunConfig(steps=10, policy=PolicyConfig("auxnn"))
    return Steering(run, Built(optimizer.model, [], optimizer, 0))


def steered(policy: Told, lr: float = 0.1) -> tuple[Steering, StabilizedOptimizer]:
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
    optimizer = StabilizedOptimizer(model, torch.optim.SGD(model.parameters(), lr=lr), audit_every=0)
    steering = made(optimizer)
    steering.policy = policy
    return steering, optimizer


def take(steering: Steering, optimizer: StabilizedOptimizer, gradient: list[float], lr: float = 0.1):
    w = optimizer.weights[0]
    w.grad = torch.tensor(gradient)
    t = optimizer.begin_step()
    values = steering.gradients(t, torch.tensor(2.0), lr)
    steering.after(t, optimizer.take_step(StepInputs(t)))
    return values


def test_the_first_factor_multiplies_the_learning_rate():
    policy = Told(0.5, 2.0)
    steering, optimizer = steered(policy)
    before = optimizer.weights[0].detach().clone()
    values = take(steering, optimizer, [1.0, 1.0])
    assert torch.allclose(before - optimizer.weights[0].detach(), torch.full((2,), 0.05))
    assert optimizer.radius_factor == 2.0
    assert {k: float(v) for k, v in values.items()} == {"lr_factor": 0.5, "radius_factor": 2.0}


def test_the_next_gradient_judges_the_update_that_was_applied():
    policy = Told()
    steering, optimizer = steered(policy)
    take(steering, optimizer, [1.0, 0.0])
    assert policy.fed == []
    take(steering, optimizer, [0.6, 0.8])  # the update was along (-1, 0)
    assert policy.fed == [(pytest.approx(-0.6), False)]
    assert policy.seen[1].update_norm == pytest.approx(0.1)
    assert policy.seen[1].grad_norm == pytest.approx(1.0)
    assert policy.seen[1].progress == pytest.approx(0.1)


def test_a_skipped_step_feeds_nothing_back():
    policy = Told()
    steering, optimizer = steered(policy)
    take(steering, optimizer, [math.nan, 0.0])
    take(steering, optimizer, [1.0, 0.0])
    assert policy.fed == []
    take(steering, optimizer, [1.0, 0.0])
    assert len(policy.fed) == 1


def test_its_state_is_restored_exactly():
    gradients = np.random.default_rng(0).normal(size=(8, 2)).tolist()
    whole, stopped = (steered(Told()) for _ in range(2))
    for steering, optimizer in (whole, stopped):
        steering.policy = made(optimizer).policy
        for gradient in gradients[:4]:
            take(steering, optimizer, gradient)
    fresh, optimizer = steered(Told())
    fresh.policy = made(optimizer).policy
    fresh.load_state_dict(stopped[0].state_dict())
    optimizer.load_state_dict(stopped[1].state_dict())
    with torch.no_grad():
        optimizer.weights[0].copy_(stopped[1].weights[0])
    for gradient in gradients[4:]:
        expected = take(*whole, gradient)
        assert take(fresh, optimizer, gradient) == expected

"""A radius beside the KL, or alone: how far it lets the weights go, and what a checkpoint keeps of it."""

import copy

import pytest
import torch
from support.stepping import same, snapshot

from ebc_lab.components.stabilizers.rivals import TrustRegion
from ebc_lab.ebc import EllipsotopeClip, attach

DOUBLE = {"target_kl": 0.012, "budget": "tracked", "measure": "when_needed"}
RAMP = {"radius_unit": "initial", "ramp": 4, "schedule": "hold_decay", "total_steps": 12}
RELATIVE = {"radius": 0.02, **RAMP}


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.02)


def test_without_a_kl_it_is_the_trust_region(make_gpt, batches, train):
    models = [make_gpt() for _ in range(2)]
    alone = EllipsotopeClip(models[0], adam(models[0]), target_kl=torch.inf, audit_every=0, **RELATIVE)
    region = TrustRegion(models[1], adam(models[1]), strength=0.02, audit_every=0, **RAMP)
    stats = train(models[0], alone, batches(6))
    train(models[1], region, batches(6))
    assert all(step.measurements == 0 and step.ruled == 2 for step in stats)
    for mine, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)  # ||dW|| is summed in another order


def test_attached_to_any_optimizer_it_bounds_every_step(make_gpt, batches, backward):
    model = make_gpt()
    optimizer = adam(model)
    ebc = attach(model, optimizer, **DOUBLE, radius=0.1)
    for batch in batches(6):
        before = [p.detach().clone() for p in model.parameters()]
        backward(model, batch)
        optimizer.step()
        ebc.state_dict()  # ends the step
        moved = torch.stack([(p - w).norm() for p, w in zip(model.parameters(), before, strict=True)]).norm()
        assert moved <= 0.1 * (1 + 1e-4)
    assert ebc.last.ruled == 2


def test_a_checkpoint_goes_on_bit_for_bit(make_gpt, batches, train):
    options = {**DOUBLE, **RELATIVE, "audit_every": 3}
    model = make_gpt()
    optimizer = EllipsotopeClip(model, adam(model), **options)
    train(model, optimizer, batches(5))
    again = copy.deepcopy(model)
    resumed = EllipsotopeClip(again, adam(again), **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for trained, by in ((model, optimizer), (again, resumed)):
        train(trained, by, batches(6, seed=7))
    assert same(snapshot(model), snapshot(again))
    assert optimizer.radius.start == resumed.radius.start


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"radius": 0.0}, "must be > 0"),
        ({"radius": 1.0, "radius_unit": "current"}, "radius_unit"),
        ({"ramp": 5}, "give radius"),
        ({"radius": 1.0, "schedule": "hold_decay"}, "total_steps"),
        ({"radius": 1.0, "budget": "lagged"}, "takes no radius"),
    ],
)
def test_a_radius_that_cannot_be_is_refused(make_gpt, options, problem):
    model = make_gpt()
    with pytest.raises(ValueError, match=problem):
        EllipsotopeClip(model, adam(model), target_kl=0.01, **options)

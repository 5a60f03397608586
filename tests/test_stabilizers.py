"""What may stand between backward and the applied update: one contract, two entries."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ebc_lab.config import (
    BudgetConfig,
    ControllerConfig,
    ModelConfig,
    OptimizerConfig,
    ProjectionConfig,
    RunConfig,
    StabilizerConfig,
    resolve_controller,
)
from ebc_lab.model import build as build_model
from ebc_lab.optimizers import build as build_optimizers
from ebc_lab.projections import build as build_projection
from ebc_lab.stabilizers import STABILIZERS, build

RUN = RunConfig(
    steps=12,
    audit_every=4,
    audit_tokens=32,
    model=ModelConfig(blocks=2, width=16, heads=2, context=8),
    optimizer=OptimizerConfig("adam", lr=0.05),
)


def prepare(run):
    """-> the model, its plain base optimizers and the stabilizer around them."""
    run = resolve_controller(run)
    model = build_model(run.model, 11, run.seed)
    bases = build_optimizers(model, run.optimizer)
    return model, bases, build(model, bases, build_projection(model, run.projection), run)


def gradients(model, step):
    tokens = torch.randint(11, (8, 8), generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    logits = model(tokens)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return tokens, logits


def ebc(**options):
    return replace(RUN, stabilizer=StabilizerConfig("ebc"), **options)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "muon"])
@pytest.mark.parametrize("projection", ["none", "spectral"])
@pytest.mark.parametrize("name", STABILIZERS)
def test_contract(name, projection, optimizer):
    run = replace(
        RUN,
        stabilizer=StabilizerConfig(name),
        projection=ProjectionConfig(projection),
        optimizer=OptimizerConfig(optimizer, lr=0.05),
    )
    model, _, stabilizer = prepare(run)
    assert isinstance(stabilizer, torch.optim.Optimizer)
    for step in range(6):
        tokens, logits = gradients(model, step)
        stats = stabilizer.step(tokens, logits)
        assert 0 < stats.clip_coefficient <= 1
        assert stats.grad_norm > 0
        assert (stats.applied_kl is not None) == (step % 4 == 0)
        assert stats.audit_tokens == (32 if step % 4 == 0 else 0)
    stabilizer.load_state_dict(stabilizer.state_dict())
    gradients(model, 6)
    next(model.parameters()).grad[0, 0] = math.nan
    assert stabilizer.step(tokens, logits).skipped


@pytest.mark.parametrize("name", STABILIZERS)
def test_the_runs_projection_is_applied(name):
    run = replace(RUN, stabilizer=StabilizerConfig(name), projection=ProjectionConfig("spectral", bound=1.1))
    model, _, stabilizer = prepare(run)
    first = model.blocks[0].q.weight
    limit = 1.1 * torch.linalg.matrix_norm(first.detach(), ord=2)
    for step in range(6):
        stabilizer.step(*gradients(model, step))
        assert torch.linalg.matrix_norm(first.detach(), ord=2) <= limit * (1 + 1e-5)
    assert torch.linalg.matrix_norm(first.detach(), ord=2) > 0.9 * limit


def test_none_is_the_plain_optimizer():
    model, _, stabilizer = prepare(RUN)
    plain, bases, _ = prepare(RUN)
    for step in range(6):
        stabilizer.step(*gradients(model, step))
        gradients(plain, step)
        for base in bases:
            base.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def test_ebc_is_built_as_the_run_says():
    run = ebc(
        steps=100,
        budget=BudgetConfig(
            "surrogate",
            target_kl=0.02,
            schedule="linear",
            probe_sequences=3,
            aggregate="sqrtl_l2",
            probe="fd",
            cadence="published",
            beta_init="zero",
        ),
        controller=ControllerConfig("log_pi", kp=0.5),
    )
    model, bases, stabilizer = prepare(run)
    assert (stabilizer.target_kl, stabilizer.budget, stabilizer.aggregate) == (0.02, "surrogate", "sqrtl_l2")
    assert (stabilizer.schedule, stabilizer.total_steps, stabilizer.probe_sequences) == ("linear", 100, 3)
    assert (stabilizer.probe, stabilizer.cadence, stabilizer.audit_every) == ("fd", "published", 4)
    assert all(f.init == "zero" for f in stabilizer.filters.values())
    assert stabilizer.controller.gain == {"kp": 0.5, "ki": 0.3}  # what is not given is the kind's own
    assert stabilizer.bases == bases
    assert sum(len(members) for members in stabilizer.groups.values()) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("budget", "controller", "kind", "every"),
    [
        ("shadow", "auto", "Fixed", 4),
        ("surrogate", "auto", "LogPI", 4),
        ("surrogate", "pi", "PI", 20),
        ("shadow", "log_pi", "LogPI", 4),
    ],
)
def test_controllers(budget, controller, kind, every):
    _, _, stabilizer = prepare(ebc(budget=BudgetConfig(budget), controller=ControllerConfig(controller)))
    assert type(stabilizer.controller).__name__ == kind
    assert stabilizer.audit_every == every


def test_a_refused_combination_says_why():
    with pytest.raises(ValueError, match="Fixed has no gain kp"):
        prepare(ebc(controller=ControllerConfig("fixed", kp=0.5)))

"""Optimizers as users have them: which can be limited, and weights that are added or unfrozen in training."""

import copy
import math
import pickle

import pytest
import torch
from support.tokenwise import Tokenwise, integers, loss_of
from torch import nn

from ebc_lab.ebc import EllipsotopeClip, mean_kl
from ebc_lab.ebc.given.bases import COPIED, Gradients, weight_copies

LR = 0.05


def wrap(model, base=None, **options):
    base = base or torch.optim.Adam(model.parameters(), lr=LR)
    return EllipsotopeClip(model, base, **{"target_kl": 0.002, "probe_sequences": 12, **options})


def step(model, optimizer, seed=0, rows=24):
    tokens = integers(rows, 12, seed=seed)
    logits = model(tokens)
    loss_of(logits, tokens).backward()
    stats = optimizer.step(tokens, logits)
    with torch.no_grad():
        kl = mean_kl(logits, model(tokens)).item()
    optimizer.zero_grad()
    return stats, kl


# -- weights that come later ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["unfrozen", "added to the base", "added to the wrapper"])
@pytest.mark.parametrize("budget", ["shadow", "surrogate"])
def test_weights_that_come_later_are_limited_too(how, budget):
    model = Tokenwise()
    head = [model.head.weight]
    base = torch.optim.Adam(model.embedding.parameters(), lr=LR)
    if how == "unfrozen":
        base = torch.optim.Adam([*model.embedding.parameters(), *head], lr=LR)
        model.head.requires_grad_(False)
    target_kl = 0.002 if budget == "shadow" else 1e-3
    optimizer = wrap(model, base, budget=budget, target_kl=target_kl, grouping="tensor")
    for seed in range(3):
        step(model, optimizer, seed)
    if how == "unfrozen":
        model.head.requires_grad_(True)
    else:
        (base if how == "added to the base" else optimizer).add_param_group({"params": head, "lr": 30 * LR})
    before = model.head.weight.detach().clone()
    for seed in range(3, 6):
        stats, kl = step(model, optimizer, seed)
        assert stats.clip_coefficient < 1
        if budget == "shadow":
            assert kl < 1.5 * stats.target_kl
        else:
            assert (stats.contributions > 0).tolist() == [True, True]  # of both groups
    assert not torch.equal(model.head.weight, before)
    assert len(optimizer.param_groups) == (1 if how == "unfrozen" else 2)


def test_a_weight_that_is_frozen_later_stays():
    model = Tokenwise()
    optimizer = wrap(model)
    step(model, optimizer)
    model.head.requires_grad_(False)
    before = model.head.weight.detach().clone()
    stats, _ = step(model, optimizer, 1)
    assert torch.equal(model.head.weight, before)
    assert 0 < stats.clip_coefficient < 1


def test_a_foreign_weight_that_comes_later_is_refused():
    model = Tokenwise()
    optimizer = wrap(model)
    step(model, optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    with pytest.raises(ValueError, match="not the model's"):
        step(model, optimizer, 1)


# -- closures, copies, checkpoints ---------------------------------------------------------------------------


def test_a_closure_computes_the_gradients_and_its_loss_is_returned():
    plain, model = Tokenwise(), Tokenwise()
    adam = torch.optim.Adam(plain.parameters(), lr=LR)
    optimizer = wrap(model, target_kl=math.inf)
    losses = []
    for m, stepper in ((plain, adam), (model, optimizer)):

        def closure(m=m, stepper=stepper):
            stepper.zero_grad()
            loss = loss_of(m(integers(8, 6)), integers(8, 6))
            loss.backward()
            return loss

        with torch.no_grad():
            losses.append(stepper.step(closure))
    assert torch.equal(*losses)
    assert optimizer.last.clip_coefficient == 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def test_with_a_budget_a_closure_comes_with_the_batch():
    model = Tokenwise()
    optimizer = wrap(model)
    tokens = integers(24, 12)

    def closure():
        loss = loss_of(model(tokens), tokens)
        loss.backward()
        return loss

    assert optimizer.step(tokens, closure=closure).requires_grad
    assert 0 < optimizer.last.clip_coefficient < 1
    with pytest.raises(ValueError, match="needs the batch"):
        optimizer.step(closure)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_go_on_as_the_original(copied):
    model = Tokenwise()
    optimizer = wrap(model, controller="log_pi", audit_every=2)
    for seed in range(3):
        step(model, optimizer, seed)
    twin, second = copied((model, optimizer))
    for seed in range(3, 6):
        ours, _ = step(model, optimizer, seed)
        theirs, _ = step(twin, second, seed)
        assert ours.clip_coefficient == theirs.clip_coefficient
        assert ours.delta == theirs.delta
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_plain_optimizers_state_is_told_from_its_own():
    model = Tokenwise()
    adam = torch.optim.Adam(model.parameters(), lr=LR)
    with pytest.raises(ValueError, match=r"not the state of a EllipsotopeClip.*before it is wrapped"):
        wrap(model, adam).load_state_dict(adam.state_dict())


# -- kinds of optimizers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("writes", range(COPIED + 2))
def test_an_optimizer_that_writes_to_gradients_is_noticed_at_its_first_write(writes):
    """Copies are kept of the first steps, and of all once it has written."""
    p = nn.Parameter(torch.zeros(3))
    optimizer, gradients = torch.optim.SGD([p], lr=LR), Gradients()
    for step in range(writes + 2):
        p.grad = torch.arange(3.0)
        gradients.see(optimizer)
        if step >= writes:
            p.grad.mul_(2)
        [found] = gradients.of([p])
        lost = step == writes >= COPIED
        torch.testing.assert_close(
            found, torch.full((3,), torch.nan) if lost else torch.arange(3.0), equal_nan=True
        )
        gradients.forget()


def test_weights_on_no_memory_share_none():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(0, 2))
    wrap(model, torch.optim.SGD(model.parameters(), lr=LR))


@pytest.mark.parametrize(
    ("module", "name", "copies"),
    [
        ("schedulefree.adamw_schedulefree", "AdamWScheduleFree", ("z",)),
        ("schedulefree.wrap", "ScheduleFreeWrapperReference", ("x", "y", "z")),
        ("elsewhere", "ProdigyPlusScheduleFree", ("z",)),
        ("pytorch_optimizer.optimizer", "ScheduleFreeAdamW", ("z",)),
        ("pytorch_optimizer.optimizer", "SPlus", ()),
        ("heavyball", "ScheduleFree", ("z of heavyball",)),
        ("elsewhere", "ScheduleFreeAdamW", ()),
        ("pytorch_optimizer.optimizer", "Lion", ()),
    ],
)
def test_the_libraries_whose_states_hold_copies_of_weights_are_known(module, name, copies):
    kind = type(name, (torch.optim.SGD,), {"__module__": module})
    kind._find_val_name = lambda self, key: f"{key} of heavyball"
    made = type("Own", (kind,), {})(Tokenwise().parameters(), lr=LR)  # a subclass of it too
    assert weight_copies(made) == copies
    made.weight_copies = ["w"]
    assert weight_copies(made) == ("w",)


def test_a_base_without_a_rate():
    class WithoutRate(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.sub_(0.5 * p.grad)

    model = Tokenwise()
    stats, kl = step(model, wrap(model, WithoutRate(model.parameters(), {}), schedule="lr_squared"))
    assert 0 < stats.clip_coefficient < 1
    assert kl < 1.5 * 0.002


def test_what_cannot_be_limited_is_refused_at_once():
    model = Tokenwise()
    with pytest.raises(ValueError, match="LBFGS moves the weights several times"):
        wrap(model, torch.optim.LBFGS(model.parameters()))
    sparse = nn.Sequential(nn.Embedding(11, 4, sparse=True), nn.Linear(4, 11))
    with pytest.raises(ValueError, match=r"SparseAdam takes sparse gradients.*use Adam"):
        wrap(sparse, torch.optim.SparseAdam(sparse[0].parameters()))
    with pytest.raises(ValueError, match="0 has sparse gradients: set sparse=False"):
        wrap(sparse, torch.optim.SGD(sparse.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"list is no torch\.optim"):
        wrap(model, [[]])
    with pytest.raises(ValueError, match="no optimizer was given"):
        EllipsotopeClip(model, [], target_kl=0.01)
    wrap(sparse, torch.optim.SGD(sparse[1].parameters(), lr=0.1))  # nothing sparse is trained


def test_an_error_in_a_measurement_leaves_the_weights_where_they_were():
    model = Tokenwise()
    calls = []

    def forward(model, tokens):
        calls.append(tokens)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return model(tokens)

    optimizer = wrap(model, forward=forward)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="out of memory"):
        step(model, optimizer)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))


def test_an_optimizer_that_fails_half_way_leaves_the_weights_where_they_were():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            raise KeyboardInterrupt

    model = Tokenwise()
    optimizer = wrap(model, Failing(model.parameters(), lr=1.0))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt):
        step(model, optimizer)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))

"""Measuring leaves a model's own state as it was, and repeats a training forward from its beginning."""

import math
from collections import deque

import pytest
import torch
import torch.nn.functional as F
from support.tokenwise import Tokenwise, attached_adam, integers, learn, loss_of
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from ebc_lab.ebc import mean_kl

TARGET = 0.002


class Counting(Tokenwise):
    """Keeps something of every forward, in training and in evaluation, and adds it to its logits."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.register_buffer("total", torch.zeros(11))
        self.register_buffer("grown", torch.empty(0))
        self.plain = torch.zeros(11)
        self.calls = 0
        self.recent = deque(maxlen=3)
        self.by_name = {"a": [torch.zeros(11)]}
        self.frozen = nn.Parameter(torch.zeros(11), requires_grad=False)

    def kept(self):
        recent = torch.stack([*self.recent, torch.zeros(11)]).sum(0)
        others = self.by_name["a"][0] + self.frozen + self.grown.sum()
        return self.total + self.plain + self.calls + recent + others

    def forward(self, ids):
        z = super().forward(ids) + 0.1 * self.kept().sin()
        seen = z.detach().flatten(0, -2).mean(0)
        match self.kind:
            case "buffer":
                self.total += seen
            case "another buffer":
                self.total = self.total + seen
            case "buffer that evaluation resizes" if not self.training:
                self.grown.resize_(11).fill_(1.0)
            case "attribute":
                self.plain.add_(seen)
            case "number":
                self.calls += 1
            case "deque":
                self.recent.append(seen)
            case "tensor in a list in a dict":
                self.by_name["a"][0].add_(seen)
            case "frozen weight":
                self.frozen.data.mul_(0.9).add_(seen)
        return z


KINDS = [
    "buffer",
    "another buffer",
    "buffer that evaluation resizes",
    "attribute",
    "number",
    "deque",
    "tensor in a list in a dict",
    "frozen weight",
]


def kept_at_each_step(kind, steps, options, *, evaluated=0, begins=0):
    """Weights, and what the model keeps, at each step of a loop; without EBC where `options` are None.

    Evaluated some times first, the model begins to keep something at a step.
    """
    torch.manual_seed(0)
    model = Counting(kind if begins == 0 else "nothing")
    optimizer, ebc = attached_adam(model, lr=0.02, **(options or {}))
    if options is None:
        ebc.detach()
    with torch.no_grad():
        for step in range(evaluated):
            model(integers(24, 12, seed=100 + step))
    seen = []
    for step in range(steps):
        if step == begins:
            model.kind = kind
        learn(model, optimizer, integers(24, 12, seed=step))
        seen += [model.head.weight.sum().item(), model.kept().sum().item()]
    return seen


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_model_keeps_is_as_without_ebc(kind):
    options = {"target_kl": 1e9, "audit_every": 5}
    assert kept_at_each_step(kind, 25, None) == kept_at_each_step(kind, 25, options)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["buffer", "another buffer", "deque"])
@pytest.mark.parametrize("target_kl", [1e9, math.inf])
def test_a_model_that_begins_to_keep_something_late_or_was_evaluated_first(kind, target_kl):
    late = {"evaluated": 14, "begins": 15}
    options = {"target_kl": target_kl, "audit_every": 3}
    assert kept_at_each_step(kind, 40, None, **late) == kept_at_each_step(kind, 40, options, **late)


def test_hooks_that_a_model_installs_at_its_first_forward_are_there_once():
    class Capturing(Tokenwise):
        """Has a hook of its own, as transformers has one that captures a router's logits."""

        installed = False

        def forward(self, ids):
            if not self.installed:
                self.installed = True
                self.head.register_forward_hook(lambda module, args, z: 1.1 * z)
            return super().forward(ids)

    model = Capturing()
    optimizer, _ = attached_adam(model, lr=0.02, target_kl=1e9, audit_every=2)
    for step in range(6):
        learn(model, optimizer, integers(24, 12, seed=step))
    assert len(model.head._forward_hooks) == 1


def limited(model, step, *, steps=16, **options):
    """-> KL of each clipped step over the target, on the rows that it was trained on, in training mode."""
    optimizer, ebc = attached_adam(model, lr=0.03, **{"probe_sequences": "all", **options})
    ratios = []
    for number in range(steps):
        before, after = step(model, optimizer, integers(24, 12, seed=number))
        if ebc.last.clip_coefficient < 0.999:
            ratios.append(float(mean_kl(before, after)) / TARGET)
    return ratios


def plain_step(model, optimizer, ids):
    z = model(ids)
    loss_of(z, ids).backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        return z.detach(), model(ids)


def on_target(ratios):
    return len(ratios) > 8 and all(0.8 < r < 1.25 for r in ratios[3:]) and max(ratios) < 1.5


def test_weights_that_train_merges_keep_their_bits():
    modes = set()  # outside the modules, which do not keep what a measurement changes

    class Merging(nn.Linear):
        merged = False

        def __init__(self, *shape):
            super().__init__(*shape)
            self.weight.requires_grad_(False)
            self.delta = nn.Parameter(torch.zeros_like(self.weight))

        def train(self, mode=True):
            super().train(mode)
            modes.add(mode)
            if mode is self.merged:
                self.weight.data += -self.delta.data if mode else self.delta.data
                self.merged = not mode
            return self

        def forward(self, x):
            return F.linear(x, self.weight if self.merged else self.weight + self.delta, self.bias)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 8), Merging(8, 8), nn.Tanh(), Merging(8, 11))
    base = [m.weight.clone() for m in (model[1], model[3])]
    assert on_target(limited(model, plain_step, steps=24))
    assert modes == {True, False}
    assert all(torch.equal(w, m.weight) for w, m in zip(base, (model[1], model[3]), strict=True))


def test_weights_that_parametrize_has_cached_around_a_step():
    def step(model, optimizer, ids):
        with parametrize.cached():
            z = model(ids)
            loss_of(z, ids).backward()
            optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            return z.detach(), model(ids)

    torch.manual_seed(0)
    first, last = (parametrizations.weight_norm(nn.Linear(8, n)) for n in (8, 11))
    assert on_target(limited(nn.Sequential(nn.Embedding(11, 8), first, nn.Tanh(), last), step, steps=12))


class Recurrent(nn.Module):
    """Carries its state from batch to batch by itself."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.cell = nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 11)
        self.state = None

    def forward(self, ids):
        y, h = self.cell(self.tokens(ids), self.state)
        self.state = h.detach()
        return self.head(y)


@pytest.mark.thorough
def test_a_recurrent_state_is_that_of_the_training_forward():
    def step(model, optimizer, ids):
        state = model.state
        z = model(ids)
        loss_of(z, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        after = model.state
        with torch.no_grad():
            model.state = state
            moved = model(ids)
        model.state = after
        return z.detach(), moved

    for rows in ("all", 12):
        torch.manual_seed(0)
        ratios = limited(Recurrent(), step, probe_sequences=rows)
        assert len(ratios) > 8
        assert 0.7 < sorted(ratios)[len(ratios) // 2] < 1.4


class Routed(nn.Module):
    """A bias of its router, a buffer, is moved by a hook of the optimizer."""

    def __init__(self):
        super().__init__()
        self.net = Tokenwise()
        self.register_buffer("bias", torch.zeros(11))

    def forward(self, ids):
        return self.net(ids) + self.bias

    @torch.no_grad()
    def balance(self, *_):
        self.bias += 0.05 * (torch.arange(11) % 2 - 0.5)


@pytest.mark.thorough
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_buffer_that_a_hook_of_the_optimizer_moves(when):
    model = Routed()
    optimizer, ebc = attached_adam(model, lr=0.03)
    hooks = {"before": optimizer.register_step_pre_hook, "after": optimizer.register_step_post_hook}
    hooks[when](model.balance)
    for number in range(30):
        ids = integers(48, 12, seed=number)
        before = [p.detach().clone() for p in model.parameters()]
        learn(model, optimizer, ids)
    assert ebc.last.clip_coefficient > 0.01
    with torch.no_grad():
        after = model(ids)
        for p, w in zip(model.parameters(), before, strict=True):
            p.copy_(w)
        assert 0.7 < mean_kl(model(ids), after) / TARGET < 1.4


def test_weights_that_torch_func_lends_are_no_forward_of_the_model():
    model = Tokenwise()
    optimizer, _ = attached_adam(model)
    ids = integers(24, 12)
    fast = {name: 0.9 * p for name, p in model.named_parameters()}
    loss_of(torch.func.functional_call(model, fast, (ids,)), ids).backward()
    with pytest.raises(ValueError, match="never called as a module with gradients on"):
        optimizer.step()


def test_torch_func_is_left_alone():
    model = Tokenwise()
    optimizer, _ = attached_adam(model, target_kl=math.inf)
    ids = integers(6, 12)

    def loss(weights, row):
        return loss_of(torch.func.functional_call(model, weights, (row[None],)), row[None])

    weights = {name: p.detach() for name, p in model.named_parameters()}
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, ids)
    for name, p in model.named_parameters():
        p.grad = each[name].mean(0)
    before = model.head.weight.clone()
    optimizer.step()
    assert not torch.equal(before, model.head.weight)

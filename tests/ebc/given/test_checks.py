"""Batches and logits that are wrong, each told in one sentence, and right ones of every shape."""

import warnings
from collections import namedtuple

import pytest
import torch
from support.tokenwise import Tokenwise, integers, loss_of
from torch import nn

from ebc_lab.ebc import EBCWarning, EllipsotopeClip
from ebc_lab.ebc.given.rows import cut


def wrap(model, **options):
    options = {"target_kl": 0.002, "probe_sequences": 12, **options}
    return EllipsotopeClip(model, torch.optim.Adam(model.parameters(), lr=0.05), **options)


def refused(message, model=None, given=None, **options):
    """A step that raises ValueError or TypeError with this message, and leaves the weights alone."""
    model = model or Tokenwise()
    optimizer = wrap(model, **options)
    tokens = integers(24, 12)
    logits = model(tokens)
    loss_of(logits, tokens).backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer.step(*given(tokens, logits))
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))


class LastOnly(Tokenwise):
    """In evaluation mode it returns the logits of the last position alone."""

    def forward(self, tokens):
        z = super().forward(tokens)
        return z if self.training else z[:, -1:]


@pytest.mark.parametrize("budget", ["shadow", "tracked", "fisher", "surrogate"])
def test_a_forward_of_another_shape(budget):
    shapes = r"returned logits of shape \(12, 1, 11\), and those given have \(12, 12, 11\)"
    refused(shapes, LastOnly(), lambda x, z: (x, z), budget=budget, target_kl=0.005)


@pytest.mark.parametrize(
    ("message", "given"),
    [
        ("this looks like a loss", lambda x, z: (x, loss_of(z, x))),
        ("arguments are step.tokens, logits., in this order", lambda x, z: (z, x)),
        (
            "returned logits of shape .24, 12, 11., and those given have .10, 12, 11.",
            lambda x, z: (x, z[:10]),
        ),
        ("differ from the model's own on this batch by a KL", lambda x, z: (x, z.flip(0))),
        ("no logits in a tuple: say where they are", lambda x, z: (x, (z, 1))),
        ("got an unexpected keyword argument", lambda x, z: ({"x": None}, z)),
        (r"a mask of shape \(24,\) for logits", lambda x, z: (x, z, torch.ones(24))),
    ],
)
def test_wrong_arguments(message, given):
    refused(message, given=given)


def test_one_class_is_refused_and_two_are_not():
    class Regression(nn.Module):
        def __init__(self, classes):
            super().__init__()
            self.layer = nn.Linear(3, 1)
            self.classes = classes

        def forward(self, x):
            z = self.layer(x)
            return z if self.classes == 1 else torch.cat([torch.zeros_like(z), z], -1)

    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    for classes in (1, 2):
        model = Regression(classes)
        optimizer = wrap(model, probe_sequences=128, target_kl=2e-4)
        logits = model(x)
        logits.square().sum().backward()
        if classes == 1:
            with pytest.raises(ValueError, match=r"its KL 0, and nothing would be limited.*regression"):
                optimizer.step(x, logits)
        else:
            assert 0 < optimizer.step(x, logits).clip_coefficient < 1


def test_random_numbers_that_no_module_shows():
    class Noisy(Tokenwise):
        def forward(self, tokens):
            z = super().forward(tokens)
            return nn.functional.dropout(z, 0.3, self.training)

    torch.manual_seed(0)
    model = Noisy()
    optimizer = wrap(model)
    tokens = integers(24, 12)
    logits = model(tokens)
    loss_of(logits, tokens).backward()
    with pytest.warns(EBCWarning, match=r"differ from the model's own, without what.*fresh_logits=True"):
        stats = optimizer.step(tokens, logits)
    assert 0 < stats.clip_coefficient < 1


def test_few_tokens_are_told_once():
    model = Tokenwise()
    for rows, told in ((2, 1), (12, 0)):
        optimizer = wrap(model, probe_sequences=rows)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for seed in range(3):
                tokens = integers(24, 12, seed=seed)
                logits = model(tokens)
                loss_of(logits, tokens).backward()
                optimizer.step(tokens, logits)
        found = [w for w in seen if issubclass(w.category, EBCWarning)]
        assert len(found) == told
        assert not told or "c is chosen by 24 tokens" in str(found[0].message)


class Shared(Tokenwise):
    """Takes beside its tokens what all rows share: a gain, positions (1, T), a weight for each class (V,)."""

    def forward(self, gain, ids, positions, scale):
        return super().forward((ids + positions) % 11) * scale * gain


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("budget", ["shadow", "surrogate"])
def test_only_tensors_with_the_batchs_rows_are_cut(budget, given):
    model = Shared()
    optimizer = wrap(model, budget=budget, target_kl=1e-3)
    ids = integers(24, 12)
    shared = {"positions": torch.arange(12)[None], "scale": torch.linspace(0.5, 1, 11)}
    batch = {"gain": torch.tensor(1.0), "ids": ids, **shared}
    logits = model(**batch)
    loss_of(logits, ids).backward()
    stats = optimizer.step(batch, logits if given else None)
    assert 0 < stats.clip_coefficient < 1
    assert stats.audit_tokens == 12 * 12


def test_cutting_keeps_the_kind_of_a_batch():
    Pair = namedtuple("Pair", "x y")
    x = torch.arange(8).reshape(4, 2)
    found = cut([Pair(x, 3), {"a": (x, torch.tensor(5))}], slice(1, 3), 4)
    assert torch.equal(found[0].x, x[1:3])
    assert found[0].y == 3
    assert torch.equal(found[1]["a"][0], x[1:3])
    assert found[1]["a"][1] == 5

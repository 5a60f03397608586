"""A budget that stops training says so, once, and a KL that shows nothing is not believed."""

import math
import warnings

import pytest
import torch
from support.tokenwise import Tokenwise, attached_adam, integers, loss_of

from ebc_lab.ebc import EBCWarning


def said(model, steps=25, loss=lambda value: value, forward=None, **options):
    """What is said of `steps` steps in a row, without what is said of the first."""
    optimizer, ebc = attached_adam(model, lr=0.03, **options)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", EBCWarning)
        for step in range(steps):
            ids = integers(48, 12, seed=step)
            loss(loss_of(model(ids), ids)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if forward is not None:
                forward(model)
    return ebc, [str(w.message) for w in told if "steps in a row" in str(w.message)]


@pytest.mark.parametrize("target_kl", [0.002, math.inf])
def test_losses_that_are_not_finite(target_kl):
    _, sentences = said(Tokenwise(), loss=lambda value: value * math.nan, target_kl=target_kl)
    assert len(sentences) == 1
    assert "a gradient was not finite: look at the loss" in sentences[0]
    _, sentences = said(Tokenwise(), steps=9, loss=lambda value: value * math.nan, target_kl=target_kl)
    assert sentences == []


def test_masks_that_leave_nothing():
    _, sentences = said(Tokenwise(), mask_of=lambda given: torch.zeros(48, 12))
    assert len(sentences) == 1
    assert "look at what mask_of, or the attention mask, leaves" in sentences[0]


def test_predictions_that_something_else_moves():
    drift = [0.0]

    class Drifting(Tokenwise):
        """Its logits move from forward to forward, by nothing that a module holds."""

        def forward(self, ids):
            drift[0] += 1.0
            return super().forward(ids) + drift[0] * torch.arange(11) % 7

    ebc, sentences = said(Drifting(), steps=40, check=False, fresh_logits=False)
    assert ebc.last.clip_coefficient < 1e-6
    assert len(sentences) == 1
    assert "something other than the weights changes predictions" in sentences[0]


def test_a_step_that_changes_no_prediction_is_refused_and_weights_are_at_w():
    copies = {}

    class Copied(Tokenwise):
        """Evaluates what its weights were at first."""

        def forward(self, ids):
            if self.training:
                return super().forward(ids)
            if not copies:
                copies.update({name: p.detach().clone() for name, p in self.named_parameters()})
            x = copies["embedding.weight"][ids]
            return torch.tanh(x @ copies["blocks.0.weight"].T) @ copies["head.weight"].T

    model = Copied()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"says exactly the same: it computes from a copy of the weights"):
        said(model, fresh_logits=True)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))

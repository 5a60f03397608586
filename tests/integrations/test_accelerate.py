"""`attach` in a loop that Accelerate runs, which needs no integration."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from ebc_lab.ebc import attach

pytestmark = pytest.mark.filterwarnings("error::ebc_lab.ebc.given.checks.EBCWarning")
OPTIONS = {"target_kl": 1e-3, "audit_every": 4}


@pytest.fixture(autouse=True)
def anew():
    """Accelerate keeps one state for a process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Loop:
    """A prepared model with dropout, and EBC attached `before` that or after it."""

    def __init__(self, before=False, **options):
        torch.manual_seed(0)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, **options)
        model = nn.Sequential(nn.Embedding(64, 16), nn.Dropout(0.1), nn.Linear(16, 64))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        given = {**OPTIONS, "floor": 1e-5} if options else OPTIONS
        if before:
            self.ebc = attach(model, optimizer, **given)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        if not before:
            self.ebc = attach(self.model, self.optimizer, **given)
        self.clipped = []

    def train(self, first, last):
        draw = torch.Generator().manual_seed(0)
        batches = [torch.randint(64, (16, 51), generator=draw) for _ in range(last)]
        for batch in batches[first:]:
            with self.accelerator.accumulate(self.model):
                logits = self.model(batch[:, :-1])
                loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 0.1)
                self.optimizer.step()
                self.optimizer.zero_grad()
            if self.accelerator.sync_gradients:
                self.clipped.append(float(self.ebc.last.clip_coefficient))
        return self


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))


@pytest.mark.parametrize("options", [{}, {"mixed_precision": "bf16"}])
def test_attached_before_or_after_prepare_it_is_the_same_training(options):
    before = Loop(before=True, **options).train(0, 24)
    after = Loop(**options).train(0, 24)
    assert len(after.clipped) == 12  # one step for two batches
    assert min(after.clipped) < 0.9
    assert same(before, after)
    assert before.clipped == after.clipped


def test_a_saved_state_goes_on_with_the_same_bits(tmp_path):
    whole = Loop().train(0, 12)
    whole.accelerator.save_state(tmp_path)
    whole.train(12, 24)
    again = Loop()
    again.accelerator.load_state(tmp_path)
    again.train(12, 24)
    assert same(whole, again)
    assert whole.clipped == [*whole.clipped[:6], *again.clipped]
    assert again.ebc.state_dict()["step_index"] == 12

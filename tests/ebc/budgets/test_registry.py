"""Each budget has a class of its own, and reads states from when one class carried every budget's numbers."""

import copy
import math

import pytest
import torch
from support.stepping import go, same, snapshot

from ebc_lab.ebc import EllipsotopeClip
from ebc_lab.ebc.options import BUDGETS as NAMES

FORMERLY = {"trial": 0.1, "kl_rate": 0.0, "log_ratio": math.nan, "variance": math.nan, "log_k": math.nan}


@pytest.mark.thorough
@pytest.mark.parametrize("budget", NAMES)
def test_a_state_with_every_budgets_numbers_is_continued(make_gpt, batches, backward, budget):
    def clip(model):
        base = torch.optim.Adam(model.parameters(), lr=0.02)
        return EllipsotopeClip(model, base, target_kl=0.002, budget=budget, audit_every=4)

    data = batches(8)
    model = make_gpt()
    optimizer = clip(model)
    for batch in data[:4]:
        go(model, optimizer, batch, backward)
    state = copy.deepcopy(optimizer.state_dict())
    former = {name: torch.tensor(value, dtype=torch.float64) for name, value in FORMERLY.items()} | state
    assert set(state) & set(FORMERLY) == set(optimizer.budget.initial) - {"flicker"}  # which came later

    again = make_gpt()
    again.load_state_dict(model.state_dict())
    resumed = clip(again)
    resumed.load_state_dict(former)
    for batch in data[4:]:
        go(model, optimizer, batch, backward)
        go(again, resumed, batch, backward)
    assert same(snapshot(model), snapshot(again))

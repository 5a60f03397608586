"""EBC and audits where the base optimizer moves the weights inside backward."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.stepping import same, snapshot

from ebc_lab.axiom import AXIOM
from ebc_lab.ebc import EllipsotopeClip, InBackward, LaggedClip, StepInputs


def base(model, lr=0.02, hooks=True):
    optimizer = AXIOM(model.named_parameters(), lr=lr, relative=True, rank=2)
    if hooks:
        optimizer.register_hooks()
    return optimizer


def go(model, optimizer, batch):
    """One step on `batch`, (rows, 17) characters, of an optimizer with hooks or without."""
    t = optimizer.begin_step()
    inputs, targets = batch[:, :-1], batch[:, 1:]
    logits = model(inputs)
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    stats = optimizer.take_step(StepInputs(t, inputs, logits, targets=targets))
    model.zero_grad()
    return stats


def lagged(model, **settings):
    return LaggedClip(model, base(model, settings.pop("lr", 0.02)), **{"target_kl": 0.01, **settings})


def test_an_infinite_target_is_the_plain_optimizer(make_gpt, batches):
    ends = []
    for target in (None, math.inf):
        model = make_gpt()
        optimizer = InBackward(model, base(model)) if target is None else lagged(model, target_kl=target)
        for batch in batches(4):
            go(model, optimizer, batch)
        ends.append(snapshot(model))
    assert same(*ends)


def test_c_rises_threefold_from_a_tenth_until_the_kl_is_known_to_allow_no_more(make_gpt, batches):
    model = make_gpt()
    optimizer = lagged(model, target_kl=1.0, lr=1e-4)
    found = [float(go(model, optimizer, batch).clip_coefficient) for batch in batches(4)]
    assert found == pytest.approx([0.1, 0.3, 0.9, 1.0])


def test_c_follows_from_the_kl_of_earlier_steps(make_gpt, batches):
    """ln(KL/(c·lr)²) is averaged half-way; the first one is taken whole."""
    model = make_gpt()
    optimizer = lagged(model, lr=0.2, target_kl=2e-4)
    log_k, rates = math.nan, []
    for i, batch in enumerate(batches(6)):
        rate = 0.2 if i < 3 else 0.4
        optimizer.param_groups[0]["lr"] = rate
        before = float(optimizer.budget.trial)
        expected = 0.1 if math.isnan(log_k) else min(1, math.sqrt(2e-4 / math.exp(log_k)) / rate, 3 * before)
        stats = go(model, optimizer, batch)
        c = float(stats.clip_coefficient)
        assert c == pytest.approx(expected, rel=1e-6)
        seen = math.log(max(float(stats.trial_kl), 1e-7) / (c * rate) ** 2)
        log_k = seen if math.isnan(log_k) else (log_k + seen) / 2
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.2, 0.2, 0.2, 0.4, 0.4, 0.4]


def test_a_bad_gradient_is_a_skipped_step_although_other_tensors_moved(make_gpt, batches):
    model = make_gpt()
    optimizer = lagged(model)
    first, second, third = batches(3)
    go(model, optimizer, first)
    known = float(optimizer.budget.log_k)
    before = snapshot(model)
    handle = model.blocks[0].q.weight.register_hook(lambda g: g * math.nan)
    stats = go(model, optimizer, second)
    handle.remove()
    assert stats.skipped
    assert stats.bad_gradient
    assert stats.clip_coefficient == 0
    assert float(optimizer.budget.log_k) == known
    after = snapshot(model)
    assert torch.equal(after["blocks.0.q.weight"], before["blocks.0.q.weight"])
    assert not torch.equal(after["head.weight"], before["head.weight"])
    assert not go(model, optimizer, third).skipped


@pytest.mark.parametrize("known", [True, False])
def test_a_kl_that_is_not_finite_divides_c_by_ten(make_gpt, batches, monkeypatch, known):
    model = make_gpt()
    optimizer = lagged(model, lr=1e-3)
    first, second, third = batches(3)
    if known:
        go(model, optimizer, first)
    with monkeypatch.context() as patch:
        patch.setattr("ebc_lab.ebc.budgets.lagged.mean_kl", lambda *args: torch.tensor(math.nan))
        c = float(go(model, optimizer, second).clip_coefficient)
    assert float(go(model, optimizer, third).clip_coefficient) == pytest.approx(c / 10)


def test_what_needs_the_whole_step_is_refused(make_gpt):
    model = make_gpt()
    with pytest.raises(ValueError, match="registered hooks"):
        InBackward(model, torch.optim.Adam(model.parameters()))
    with pytest.raises(ValueError, match="budget='lagged' is unknown"):
        EllipsotopeClip(model, torch.optim.Adam(model.parameters()), target_kl=0.01, budget="lagged")
    with pytest.raises(ValueError, match="budget='shadow' is unknown; it takes lagged"):
        lagged(model, budget="shadow")
    with pytest.raises(ValueError, match="another grouping"):
        lagged(make_gpt(), grouping="matrices")
    with pytest.raises(ValueError, match="compares losses"):
        lagged(make_gpt(), controller="agreement")
    with pytest.raises(ValueError, match="curve_every"):
        lagged(make_gpt(), curve_every=5)
    dropping = make_gpt(dropout=0.1)
    with pytest.raises(ValueError, match="dropout"):
        lagged(dropping)
    with pytest.raises(RuntimeError, match="begin_step"):
        lagged(make_gpt()).step(None)

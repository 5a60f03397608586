"""`tracked` step by step: what it predicts, what a measurement is worth, and what leaves it alone."""

import math

import pytest
import torch
from support.stepping import go, same, snapshot

from ebc_lab.ebc import EllipsotopeClip

LR = 0.02
TOKENS = 2 * 16  # of two probe rows
FLICKER = 0.04


def clip(model, base=None, **options):
    options = {"target_kl": 0.002, "budget": "tracked", "audit_every": 0, **options}
    return EllipsotopeClip(model, base or torch.optim.Adam(model.parameters(), lr=LR), **options)


def test_a_weight_without_a_gradient_counts_for_nothing(make_gpt, batches, train):
    scales = []
    for frozen in (False, True):
        model = make_gpt()
        model.token_embedding.requires_grad_(not frozen)
        kept = [p for p in model.parameters() if p.requires_grad]
        if not frozen:  # its optimizer is there, its gradient is not
            model.token_embedding.weight.register_post_accumulate_grad_hook(
                lambda p: setattr(p, "grad", None)
            )
        optimizer = clip(model, torch.optim.Adam(kept, lr=LR))
        scales.append([s.tracked_scale.item() for s in train(model, optimizer, batches(3))])
    assert scales[0] == pytest.approx(scales[1], rel=1e-5)


def test_only_tokens_that_count_make_a_measurement_certain(make_gpt, batches, backward):
    model = make_gpt()
    (batch,) = batches(1)
    mask = torch.ones_like(batch[:, :-1], dtype=torch.bool)
    mask[0, 4:] = False
    stats = go(model, clip(model), batch, backward, mask=mask)
    assert stats.tracked_variance.item() == pytest.approx(FLICKER + 9 / 20)


@pytest.mark.thorough
def test_the_rate_is_inert_where_every_step_is_clipped(make_gpt, batches, train):
    found = []
    for factor in (1, 4):
        model = make_gpt(dtype=torch.float64)
        optimizer = clip(model, torch.optim.SGD(model.parameters(), lr=factor), floor=1e-7)
        optimizer.budget.trial /= factor
        steps = train(model, optimizer, batches(25))
        assert all(s.clip_coefficient < 1 for s in steps)
        found.append([factor * s.clip_coefficient.item() for s in steps])
    assert found[1] == pytest.approx(found[0], rel=1e-9)


def test_a_kl_that_is_not_finite_is_tried_again_at_a_tenth_and_forgets_the_prediction(
    make_gpt, batches, backward
):
    broken = [0]

    def forward(model, inputs):
        broken[0] -= 1
        return model(inputs) * (math.nan if broken[0] >= 0 else 1)

    model = make_gpt()
    optimizer = clip(model, forward=forward, refine_steps=0)
    data = batches(9)
    for batch in data[:6]:
        usual = go(model, optimizer, batch, backward)
    broken[0] = 1
    before = snapshot(model)
    lost = go(model, optimizer, data[6], backward)
    assert lost.skipped
    assert same(snapshot(model), before)
    assert lost.tracked_variance.isnan()
    after = go(model, optimizer, data[7], backward)
    assert after.trial.item() == pytest.approx(lost.trial.item() / 10)
    assert after.innovation.isnan()
    assert after.tracked_variance.item() == pytest.approx(after.tracked_flicker.item() + 9 / TOKENS)
    assert after.clip_coefficient.item() == pytest.approx(1.5 * after.trial.item())  # and little further
    recovered = go(model, optimizer, data[8], backward)
    assert recovered.clip_coefficient.item() == pytest.approx(usual.clip_coefficient.item(), rel=0.5)


def test_without_a_measurement_a_bound_is_not_exceeded(make_gpt, batches, backward):
    model = make_gpt()
    optimizer = clip(model, floor=2e-4, refine_steps=0, measure_every=2)
    optimizer.budget.trial.fill_(1e-3)
    first, second = (go(model, optimizer, batch, backward) for batch in batches(2))
    assert first.clip_coefficient.item() == pytest.approx(1e-3)
    assert second.measurements == 0
    most = math.sqrt(0.002 / (first.tracked_log_ratio.exp() * second.tracked_scale).item())
    assert second.clip_coefficient.item() == pytest.approx(min(1e-2, most))


def test_a_zero_gradient_moves_nothing_and_teaches_nothing(make_gpt, batches, backward):
    model = make_gpt()
    optimizer = clip(model, torch.optim.SGD(model.parameters(), lr=LR), refine_steps=0)
    data = batches(4)
    for batch in data[:3]:
        go(model, optimizer, batch, backward)
    x = optimizer.budget.log_ratio.item()
    before = snapshot(model)
    backward(model, data[3])
    for p in model.parameters():
        p.grad.zero_()
    stats = optimizer.step(data[3][:, :-1], model(data[3][:, :-1]))
    assert not stats.skipped
    assert optimizer.budget.log_ratio.item() == x
    assert same(snapshot(model), before)


def test_where_nothing_can_be_predicted_the_measurement_alone_decides(make_gpt, batches, backward):
    model = make_gpt()
    optimizer = clip(model)
    data = batches(5)
    for batch in data[:4]:
        go(model, optimizer, batch, backward)
    x = optimizer.budget.log_ratio.item()
    logits = backward(model, data[4])
    for p in model.parameters():
        p.grad.zero_()  # Adam moves on by its momentum
    stats = optimizer.step(data[4][:, :-1], logits)
    assert stats.tracked_scale == 0
    allowed = math.sqrt(0.002 / stats.trial_kl.item()) * stats.trial.item()
    assert stats.clip_coefficient.item() == pytest.approx(min(1, allowed, 1.5 * stats.trial.item()))
    assert optimizer.budget.log_ratio.item() == x


def test_beside_a_radius_an_audit_is_a_measurement_of_its_tokens(make_gpt, batches, train, backward):
    model = make_gpt()
    options = {"measure": "when_needed", "radius": 1e-2, "radius_unit": "initial", "audit_every": 1}
    optimizer = clip(model, target_kl=10.0, **options)
    data = batches(31)
    train(model, optimizer, data[:30])
    stats = go(model, optimizer, data[30], backward)
    assert stats.measurements == 0
    x, prior, flicker = (
        getattr(stats, f"tracked_{name}").item() for name in ("log_ratio", "variance", "flicker")
    )
    noise = 9 / stats.audit_tokens
    per_c2 = stats.applied_kl.item() / stats.clip_coefficient.item() ** 2
    off = math.log(per_c2 / stats.tracked_scale.item()) + noise / 2 - x
    spread = prior + flicker + noise
    assert off**2 < 9 * spread  # no jump
    assert optimizer.budget.log_ratio.item() == pytest.approx(x + prior / spread * off)
    assert optimizer.budget.variance.item() == pytest.approx(prior / spread * (flicker + noise))


@pytest.mark.thorough
def test_its_budget_is_spent(make_gpt, batches, train):
    model = make_gpt()
    steps = train(model, clip(model, audit_every=1, probe_sequences=4, audit_tokens=64), batches(40))
    ratios = torch.stack([s.applied_kl for s in steps[20:]]) / 0.002
    assert all(s.clip_coefficient < 1 for s in steps)
    assert ratios.median().item() == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "shadow", "measure": "when_needed"}, "goes with budget='tracked'"),
        ({"measure": "when_needed", "measure_every": 2}, "measure_every=1"),
        ({"measure": "when_needed", "measure_above": 0.0}, "measure_above must be > 0"),
        ({"measure": "sometimes"}, "measure"),
        ({"stretch": 0.9}, "stretch must be at least 1"),
    ],
)
def test_what_does_not_say_where_to_measure_or_to_go_is_refused(make_gpt, options, message):
    with pytest.raises(ValueError, match=message):
        clip(make_gpt(), **options)

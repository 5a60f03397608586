"""`tracked` step by step: what it predicts, what a measurement is worth, and what leaves it alone."""

import copy
import itertools
import math

import pytest
import torch
from support.stepping import go, same, snapshot

from ebc_lab.ebc import EllipsotopeClip

LR = 0.02
TOKENS = 2 * 16  # of two probe rows
CARRIED = ("trial", "log_ratio", "variance", "flicker")
EARLY_DRIFT, DRIFT, FLICKER = 0.04, 0.002, 0.04


def clip(model, base=None, **options):
    options = {"target_kl": 0.002, "budget": "tracked", "audit_every": 0, **options}
    return EllipsotopeClip(model, base or torch.optim.Adam(model.parameters(), lr=LR), **options)


def carried(optimizer):
    return [getattr(optimizer.budget, name).item() for name in CARRIED]


def test_the_first_measurement_is_believed_in_full_and_later_ones_in_part(make_gpt, batches, train):
    model = make_gpt()
    first, *steps = train(model, clip(model, refine_steps=0), batches(12))
    assert first.innovation.isnan()
    assert first.tracked_variance.item() == pytest.approx(FLICKER + 9 / TOKENS)
    assert first.clip_coefficient.item() == pytest.approx(
        min(1.5 * 0.1, 0.1 * math.sqrt(0.002 / first.trial_kl.item() / math.exp(9 / TOKENS / 2))), rel=1e-9
    )
    before = first
    for step in steps:
        prior, flicker = before.tracked_variance.item() + EARLY_DRIFT, before.tracked_flicker.item()
        spread = prior + flicker + 9 / TOKENS
        gain = prior / spread
        x = before.tracked_log_ratio.item()
        seen = math.log(step.trial_kl / step.trial**2 / step.tracked_scale) + 9 / TOKENS / 2
        assert step.innovation.item() == pytest.approx(seen - x)
        assert step.tracked_log_ratio.item() == pytest.approx(x + gain * (seen - x))
        assert step.tracked_variance.item() == pytest.approx((1 - gain) * prior)
        learned = flicker + 0.02 * ((seen - x) ** 2 - spread)
        assert step.tracked_flicker.item() == pytest.approx(max(0, learned))
        # where the measurement was made, and where the step went: by what is seen of its own flicker too
        here = x + (prior + flicker) / spread * (seen - x)
        furthest = 1.5 * step.trial.item()
        for c, ratio, most in ((step.trial, x, 1), (step.clip_coefficient, here, min(1, furthest))):
            predicted = math.sqrt(0.002 / (step.tracked_scale.item() * math.exp(ratio)))
            assert c.item() == pytest.approx(min(most, predicted))
        before = step


def test_p_is_made_of_the_batchs_gradient_and_the_whole_proposal(make_gpt, batches, backward):
    model = make_gpt()
    optimizer = clip(model, audit_every=1)
    for batch in batches(3):
        logits = backward(model, batch)
        gradients = [p.grad.clone() for p in model.parameters()]
        before = [p.detach().clone() for p in model.parameters()]
        stats = optimizer.step(batch[:, :-1], logits)
        assert all(torch.equal(g, p.grad) for g, p in zip(gradients, model.parameters(), strict=True))
        applied = zip(before, (p.detach() for p in model.parameters()), strict=True)
        n = math.sqrt(sum((p - w).square().sum() for w, p in applied)) / stats.clip_coefficient.item()
        u = max(-stats.slope.item(), 0.05 * stats.grad_norm.item() * n)
        assert stats.tracked_scale.item() == pytest.approx(u * n, rel=1e-4)


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


def test_a_repeated_measurement_counts_once(make_gpt, batches, backward):
    model = make_gpt()
    optimizer = clip(model, probe_sequences=6)
    noise = 9 / (3 * TOKENS)
    *start, batch = batches(8)
    for each in start:
        before = go(model, optimizer, each, backward)
    optimizer.budget.log_ratio -= 1.9  # the predicted c is 2.6 times too large
    stats = go(model, optimizer, batch, backward)
    assert stats.measurements > 1
    prior, flicker = before.tracked_variance.item() + EARLY_DRIFT, before.tracked_flicker.item()
    spread = prior + flicker + noise
    jump = max(0, stats.innovation.item() ** 2 - spread)
    assert jump > 15 * spread  # 1.9 is more than four standard deviations
    gain = (prior + jump) / (spread + jump)
    assert stats.tracked_variance.item() == pytest.approx(gain * (flicker + noise))
    assert stats.tracked_log_ratio.item() == pytest.approx(
        before.tracked_log_ratio.item() - 1.9 + gain * stats.innovation.item()
    )


def test_only_tokens_that_count_make_a_measurement_certain(make_gpt, batches, backward):
    model = make_gpt()
    (batch,) = batches(1)
    mask = torch.ones_like(batch[:, :-1], dtype=torch.bool)
    mask[0, 4:] = False
    stats = go(model, clip(model), batch, backward, mask=mask)
    assert stats.tracked_variance.item() == pytest.approx(FLICKER + 9 / 20)


def test_between_measurements_the_prediction_alone_decides(make_gpt, batches, train):
    model = make_gpt()
    steps = train(model, clip(model, measure_every=3, refine_steps=0, audit_every=10), batches(12))
    assert [s.measurements for s in steps] == [1, 0, 0] * 4
    for before, step in itertools.pairwise(steps):
        if not step.measurements:
            assert step.innovation is None
            assert step.tracked_log_ratio == before.tracked_log_ratio
            assert step.tracked_variance.item() == pytest.approx(before.tracked_variance.item() + EARLY_DRIFT)
            assert step.tracked_flicker == before.tracked_flicker
            predicted = math.sqrt(0.002 / (step.tracked_scale * step.tracked_log_ratio.exp()).item())
            assert step.clip_coefficient.item() == pytest.approx(min(1, predicted))
    assert sum(s.clip_coefficient.item() < 1 for s in steps) == len(steps)


def test_a_rate_that_jumps_is_predicted(make_gpt, batches, backward):
    """u and n grow with it, so that c falls at once by the same factor, measured or not."""
    model = make_gpt()
    optimizer = clip(
        model, torch.optim.SGD(model.parameters(), lr=0.5), measure_every=2, refine_steps=0, audit_every=10
    )
    *start, batch = batches(8)
    for each in start:
        usual = go(model, optimizer, each, backward)
    optimizer.param_groups[0]["lr"] = 5.0
    stats = go(model, optimizer, batch, backward)
    assert stats.measurements == 0
    rates = [0.5 * usual.clip_coefficient.item(), 5.0 * stats.clip_coefficient.item()]
    assert rates[1] == pytest.approx(rates[0], rel=0.3)


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


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_gradient_moves_neither_measurement_nor_prediction(make_gpt, batches, backward, bad):
    model = make_gpt()
    optimizer = clip(model)
    data = batches(6)
    for batch in data[:5]:
        go(model, optimizer, batch, backward)
    before = carried(optimizer)
    logits = backward(model, data[5])
    model.head.weight.grad[0, 0] = bad
    stats = optimizer.step(data[5][:, :-1], logits)
    assert stats.skipped
    assert carried(optimizer) == before


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


def test_a_kl_below_the_floor_is_accepted_and_ten_times_as_much_is_tried_next(make_gpt, batches, backward):
    model = make_gpt()
    optimizer = clip(model, floor=2e-4, refine_steps=0)
    optimizer.budget.trial.fill_(1e-3)
    trials = []
    for batch in batches(5):
        stats = go(model, optimizer, batch, backward)
        trials.append(stats.trial.item())
        if stats.tracked_variance.isnan():
            assert stats.clip_coefficient == stats.trial
            bound = stats.tracked_log_ratio.exp() * stats.tracked_scale * stats.trial**2
            assert bound.item() == pytest.approx(2e-4)
    assert trials[:3] == pytest.approx([1e-3, 1e-2, 1e-1])
    assert stats.tracked_variance.isfinite()
    assert stats.trial_kl.item() == pytest.approx(0.002, rel=0.9)


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


def test_its_budget_is_spent(make_gpt, batches, train):
    model = make_gpt()
    steps = train(model, clip(model, audit_every=1, probe_sequences=4, audit_tokens=64), batches(40))
    ratios = torch.stack([s.applied_kl for s in steps[20:]]) / 0.002
    assert all(s.clip_coefficient < 1 for s in steps)
    assert ratios.median().item() == pytest.approx(1, abs=0.25)


def test_when_needed_measures_where_the_prediction_is_not_sure_enough(make_gpt, batches, train):
    model = make_gpt()
    above = 0.25
    optimizer = clip(model, measure="when_needed", measure_above=above)
    steps = train(model, optimizer, batches(60))
    assert all(s.measurements for s in steps[:20])
    unsure = 0
    for before, step in itertools.pairwise(steps[19:]):
        sd = math.sqrt((before.tracked_variance + before.tracked_flicker).item() + DRIFT)
        assert bool(step.measurements) == (sd > above)
        unsure += sd > above
    assert 0 < unsure < 40


def test_when_needed_measures_more_where_less_is_known_and_audits_see_every_distance(
    make_gpt, batches, train
):
    shares = []
    for above in (0.22, 0.3):
        model = make_gpt()
        options = {"measure": "when_needed", "measure_above": above, "audit_every": 5}
        steps = train(model, clip(model, **options), batches(80))
        shares.append(sum(s.measurements > 0 for s in steps))
    assert shares[0] > shares[1]
    last = [max(i for i in range(t + 1) if steps[i].measurements) for t in range(len(steps))]
    since = {t - last[t] for t in range(20, 80, 5)}
    assert len(since) >= 4


def test_when_needed_resumes_at_the_same_bits(make_gpt, batches, backward):
    data = batches(40)

    def fresh():
        model = make_gpt()
        return model, clip(model, measure="when_needed", measure_above=0.25, audit_every=5)

    model, optimizer = fresh()
    for batch in data[:30]:
        go(model, optimizer, batch, backward)
    again, resumed = fresh()
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for batch in data[30:]:
        whole, rest = go(model, optimizer, batch, backward), go(again, resumed, batch, backward)
        assert whole.measurements == rest.measurements
    assert same(snapshot(model), snapshot(again))


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

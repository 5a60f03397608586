"""What one budgeted step does: golden values, bit-equality without a budget, audits, and steps that fail."""

import math

import pytest
import torch
from support.stepping import adam_clip
from support.tokenwise import Linear

from ebc_lab.ebc import EllipsotopeClip, NonFiniteUpdateError, aggregate


def bits(tensors):
    return [t.detach().view(torch.uint8).tolist() if t.ndim else t.item() for t in tensors]


def golden_step(values, **options):
    """One step whose proposal is the golden dW; the audit rows repeat the probe rows."""
    model = Linear(torch.tensor(values["W"], dtype=torch.float64))
    for block, dw in zip(model.blocks, values["dW"], strict=True):
        block.weight.grad = -torch.tensor(dw, dtype=torch.float64)
    x = torch.tensor(values["X"], dtype=torch.float64).transpose(0, 1)
    rows = {"probe_sequences": len(x), "target_kl": values["delta"], **options}
    optimizer = EllipsotopeClip(model, torch.optim.SGD(model.parameters(), lr=1.0), **rows)
    return optimizer.step(torch.cat([x, x]))


@pytest.mark.parametrize("kind", ["l1", "sqrtl_l2", "l2"])
@pytest.mark.parametrize("probe", ["jvp", "fd"])
def test_golden_surrogate_step(golden, kind, probe):
    values = golden["linear_model"]
    stats = golden_step(values, budget="surrogate", aggregate=kind, probe=probe)
    assert stats.sensitivities.tolist() == pytest.approx(values["beta"], rel=1e-6)
    assert stats.contributions.tolist() == pytest.approx(values["contribution"], rel=1e-6)
    assert stats.surrogate.item() == pytest.approx(values["S"][kind], rel=1e-6)
    assert stats.clip_coefficient.item() == pytest.approx(values["c"][kind], rel=1e-6)
    assert stats.applied_kl.item() == pytest.approx(values["applied_kl"][kind], rel=1e-6)
    assert stats.movement.item() == pytest.approx(values["c"][kind] * values["T"], rel=1e-6)
    assert stats.tightness.item() == pytest.approx(values["tightness"][kind], rel=1e-6)
    assert stats.audit_tokens == 6


@pytest.mark.parametrize(("measurements", "case"), [(3, "start_0p1"), (1, "start_0p1")])
def test_golden_shadow_step(golden, measurements, case):
    values = golden["linear_model"]
    shadow = values["shadow"][case]
    stats = golden_step(values, budget="shadow", measurements=measurements)
    assert (stats.trial.item(), stats.trial_kl.item()) == pytest.approx(
        (0.1, shadow["trace"][0]["kl"]), rel=1e-6
    )
    assert stats.clip_coefficient.item() == pytest.approx(shadow["c"], rel=1e-6)
    assert stats.applied_kl.item() == pytest.approx(shadow["applied_kl"], rel=1e-6)


def test_golden_fisher_step(golden):
    values = golden["linear_model"]
    stats = golden_step(values, budget="fisher")
    assert stats.predicted_kl.item() == pytest.approx(values["q"], rel=1e-6)
    assert stats.clip_coefficient.item() == pytest.approx(values["fisher_c"], rel=1e-6)


@pytest.mark.parametrize("kind", ["l1", "sqrtl_l2", "l2"])
def test_golden_calibrated_step(golden, kind):
    """At its first probe k is fitted to q, so that S does not matter."""
    values = golden["linear_model"]
    stats = golden_step(values, budget="calibrated", aggregate=kind)
    assert stats.surrogate.item() == pytest.approx(values["S"][kind], rel=1e-6)
    assert stats.predicted_kl.item() == pytest.approx(values["q"], rel=1e-6)
    assert stats.clip_coefficient.item() == pytest.approx(values["calibrated_c_first_probe"], rel=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("options", "refined"), [({}, 23), ({"refine_steps": 3}, 3), ({"refine_steps": 0}, 0)]
)
def test_which_steps_may_measure_again(make_gpt, batches, train, options, refined):
    model = make_gpt()
    optimizer = adam_clip(model, **options)
    measured = []
    for batch in batches(23):
        optimizer.budget.trial = torch.tensor(1e-3, dtype=torch.float64)  # far off at every step
        measured.append(train(model, optimizer, [batch])[0].measurements)
    assert [m > 1 for m in measured] == [t < refined for t in range(23)]
    assert max(measured) <= 3


def test_an_applied_kl_is_never_negative(make_gpt, batches, train):
    model = make_gpt()
    sgd = torch.optim.SGD(model.parameters(), lr=1e-5)  # moves no further than float32 rounding does
    steps = train(model, EllipsotopeClip(model, sgd, target_kl=math.inf, audit_every=1), batches(12))
    assert all(0 <= s.applied_kl < 1e-7 for s in steps)


@pytest.mark.thorough
def test_recording_sensitivities_leaves_a_shadow_run_alone(make_gpt, batches, train):
    silent = make_gpt()
    recorded = make_gpt()
    data = batches(7)
    train(silent, adam_clip(silent), data)
    steps = train(recorded, adam_clip(recorded, sensitivity_every=3), data)
    assert bits(recorded.parameters()) == bits(silent.parameters())
    assert [t for t, s in enumerate(steps) if s.surrogate is not None] == [0, 3, 6]
    assert steps[3].contributions.shape == (4,)
    assert torch.equal(steps[3].surrogate, aggregate(steps[3].contributions, "l1"))


# -- audits --------------------------------------------------------------------------------------------------


def recorder(seen):
    def forward(model, inputs):
        seen.append(inputs)
        return model(inputs)

    return forward


@pytest.mark.parametrize(("rows", "audited"), [(48, 32), (34, 32), (10, 8)])
def test_the_audit_reads_only_rows_that_did_not_choose_c(make_gpt, batches, train, rows, audited):
    model = make_gpt()
    seen = []
    optimizer = adam_clip(model, forward=recorder(seen), audit_every=1)
    (batch,) = batches(1, rows=rows)
    (stats,) = train(model, optimizer, [batch])
    given, *probes, audit = seen  # the first looks whether the logits are the batch's
    assert torch.equal(given, batch[:2, :-1])
    assert len(probes) == stats.measurements
    assert all(torch.equal(rows, batch[:2, :-1]) for rows in probes)
    assert torch.equal(audit, batch[2 : 2 + audited, :-1])
    assert stats.audit_tokens == audited * 16  # 512, or all there are


def test_a_batch_without_audit_rows_is_limited_and_not_audited(make_gpt, batches, train):
    model = make_gpt()
    optimizer = adam_clip(model, audit_every=1, curve_every=1)
    steps = train(model, optimizer, [*batches(1, rows=2), *batches(1, rows=1), *batches(1)])
    assert [s.applied_kl is None for s in steps] == [True, True, False]
    assert [s.kl_curve is None for s in steps] == [True, True, False]
    assert all(0 < s.clip_coefficient < 1 for s in steps)
    with pytest.raises(ValueError, match="needs the batch"):
        optimizer.step()


# -- failing steps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["shadow", "surrogate"])
def test_a_proposal_that_is_not_finite_ends_the_run_with_the_weights_restored(
    make_gpt, batches, train, weights_of, budget
):
    model = make_gpt()
    optimizer = EllipsotopeClip(
        model, torch.optim.SGD(model.parameters(), lr=math.inf), target_kl=0.01, budget=budget
    )
    before = weights_of(model)
    with pytest.raises(NonFiniteUpdateError, match="step 0"):
        train(model, optimizer, batches(1))
    assert bits(model.parameters()) == bits(before)


@pytest.mark.parametrize("budget", ["shadow", "surrogate"])
def test_a_zero_gradient_moves_nothing(make_gpt, batches, train, weights_of, budget):
    model = make_gpt()
    optimizer = adam_clip(model, budget=budget, target_kl=1e-3, audit_every=1)
    before = weights_of(model)
    (batch,) = batches(1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    stats = optimizer.step(batch[:, :-1])
    assert (stats.skipped, stats.clip_coefficient, stats.applied_kl) == (False, 1, 0)
    assert bits(model.parameters()) == bits(before)
    (stats,) = train(model, optimizer, [batch])
    assert stats.clip_coefficient < 1  # the first real update is measured like any other


@pytest.mark.parametrize("budget", ["shadow", "surrogate"])
def test_a_group_at_rest_is_left_out(make_gpt, batches, train, budget):
    model = make_gpt()
    for p in model.blocks[0].parameters():
        p.requires_grad_(False)
    optimizer = adam_clip(model, budget=budget, sensitivity_every=1)
    for p in model.blocks[1].parameters():
        p.register_hook(torch.zeros_like)
    (stats,) = train(model, optimizer, batches(1))
    assert list(optimizer.groups) == ["embeddings", "block1", "head"]
    assert stats.contributions.ne(0).tolist() == [True, False, True]
    assert stats.surrogate.isfinite()


# -- configuration errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_kl": 0.0}, "target_kl must be > 0"),
        ({"target_kl": math.nan}, "target_kl must be > 0"),
        ({"budget": "fast"}, "budget='fast' is unknown; it takes "),
        ({"aggregate": "max"}, "aggregate='max' is unknown"),
        ({"grouping": "colour"}, "grouping='colour' is unknown"),
        ({"controller": "pid"}, "controller='pid' is unknown"),
        ({"schedule": "step"}, "schedule='step' is unknown"),
        ({"schedule": "linear"}, "needs total_steps"),
        ({"probe": "backward"}, "probe='backward' is unknown"),
        ({"probe_sequences": 0}, "probe_sequences must be at least 1"),
        ({"cadence": "daily"}, "cadence='daily' is unknown"),
        ({"target_kl": 9e-7, "floor": 1e-7}, "below ten times 1e-07"),
    ],
)
def test_impossible_settings_are_refused(make_gpt, options, message):
    with pytest.raises(ValueError, match=message):
        adam_clip(make_gpt(), **options)


def test_optimizers_must_share_out_the_models_parameters(make_gpt):
    model = make_gpt()
    other = make_gpt()
    adam = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match="belongs to two"):
        EllipsotopeClip(model, [adam, torch.optim.SGD(model.head.parameters())], target_kl=0.01)
    with pytest.raises(ValueError, match="not the model's"):
        EllipsotopeClip(other, adam, target_kl=0.01)

"""Low precision: which arithmetic a measurement runs in, and weights that autocast would read back stale."""

import pytest
import torch
import torch.nn.functional as F
from support.stepping import adam_clip

from ebc_lab.ebc.options import KL_FLOOR


def bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


def forward_backward(model, batch):
    model.zero_grad()
    logits = model(batch[:, :-1])
    F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten()).backward()
    return logits


def run(model, optimizer, data, *, enclosed):
    """Train under bf16 autocast; `step` is called inside the same block, or after it."""
    steps = []
    for batch in data:
        with bfloat16():
            logits = forward_backward(model, batch)
            if enclosed:
                steps.append(optimizer.step(batch[:, :-1], logits))
        if not enclosed:
            steps.append(optimizer.step(batch[:, :-1], logits))
    return steps


@pytest.mark.thorough
@pytest.mark.parametrize("enclosed", [True, False])
def test_a_trial_sees_the_weights_it_set(make_gpt, batches, enclosed):
    model = make_gpt()
    optimizer = adam_clip(model, audit_every=1)
    steps = run(model, optimizer, batches(12), enclosed=enclosed)
    assert all(
        s.trial_kl > KL_FLOOR["bfloat16"] for s in steps
    )  # 0 where a cached copy of the old weights was read
    assert all(s.applied_kl > 0 for s in steps)
    assert all(0 < s.clip_coefficient < 1 for s in steps)
    assert optimizer.budget.floor == KL_FLOOR["bfloat16"]


def test_inside_and_outside_the_block_are_the_same_run(make_gpt, batches):
    inside = make_gpt()
    outside = make_gpt()
    run(inside, adam_clip(inside), batches(8), enclosed=True)
    run(outside, adam_clip(outside), batches(8), enclosed=False)
    assert all(torch.equal(p, q) for p, q in zip(inside.parameters(), outside.parameters(), strict=True))


@pytest.mark.parametrize("options", [{}, {"budget": "surrogate"}, {"target_kl": float("inf")}])
def test_the_next_forward_in_the_same_block_sees_the_step(make_gpt, batches, options):
    model = make_gpt()
    optimizer = adam_clip(model, **options)
    first, second = batches(2)
    with bfloat16():
        logits = forward_backward(model, first)
        optimizer.step(first[:, :-1], logits)
        within = model(second[:, :-1])
    with bfloat16():
        after = model(second[:, :-1])
    assert torch.equal(within, after)


def test_measurements_run_in_the_precision_of_training(make_gpt, batches):
    def forward(model, inputs):
        seen.append((out := model(inputs)).dtype)
        return out

    for enclosed in (True, False):
        seen = []
        model = make_gpt()
        run(model, adam_clip(model, forward=forward), batches(1), enclosed=enclosed)
        assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("enclosed", [True, False])
def test_sensitivities_are_measured_in_float32(make_gpt, batches, enclosed):
    seen = {}
    for probe in ("jvp", "fd"):
        model = make_gpt(width=32)
        optimizer = adam_clip(model, budget="surrogate", probe=probe)
        seen[probe] = run(model, optimizer, batches(1), enclosed=enclosed)[0].sensitivities
    torch.testing.assert_close(seen["fd"], seen["jvp"], rtol=1e-3, atol=0)


def test_floors(make_gpt, batches, train):
    model = make_gpt()
    optimizer = adam_clip(model, target_kl=5e-5)  # fine in float32
    train(model, optimizer, batches(1))
    assert optimizer.budget.floor == KL_FLOOR["float32"]
    low = make_gpt(dtype=torch.bfloat16)
    optimizer = adam_clip(low, forward=lambda m, x: m(x).float())  # its logits do not show it
    (batch,) = batches(1)
    optimizer.step(batch[:, :-1], forward_backward(low, batch).float())
    assert optimizer.budget.floor == KL_FLOOR["bfloat16"]


@pytest.mark.parametrize("enclosed", [True, False])
def test_a_target_that_bfloat16_cannot_see_is_refused_before_anything_moves(
    make_gpt, batches, weights_of, enclosed
):
    model = make_gpt()
    before = weights_of(model)
    with pytest.raises(ValueError, match="target_kl=9e-05 is below ten times 1e-05"):
        run(model, adam_clip(model, target_kl=9e-5), batches(1), enclosed=enclosed)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_bound_needs_no_floor(make_gpt, batches):
    model = make_gpt()
    (stats,) = run(model, adam_clip(model, budget="surrogate", target_kl=9e-5), batches(1), enclosed=True)
    assert 0 < stats.clip_coefficient < 1

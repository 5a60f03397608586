"""`EllipsotopeClip` as a torch optimizer: checkpoints, schedulers, scalers, models and batches."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.stepping import LR, adam_clip
from support.tokenwise import Tokenwise, integers

from ebc_lab.ebc import EllipsotopeClip, centre, mean_kl, rms_norm


def identical(first, second):
    return all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


# -- schedulers, scalers, groups -----------------------------------------------------------------------------


@pytest.mark.parametrize("target_kl", [0.01, math.inf])
def test_a_learning_rate_scheduler_drives_the_bases(make_gpt, make_bases, batches, train, target_kl):
    model = make_gpt()
    optimizer = EllipsotopeClip(model, make_bases("muon", model), target_kl=target_kl)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
    data = batches(6)
    for batch in data[:3]:
        train(model, optimizer, [batch])
        scheduler.step()
    assert [base.param_groups[0]["lr"] for base in optimizer.bases] == [LR / 8, LR / 8]
    optimizer.load_state_dict(optimizer.state_dict())  # the groups are new objects afterwards
    scheduler.step()
    assert [base.param_groups[0]["lr"] for base in optimizer.bases] == [LR / 16, LR / 16]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, data[3:4])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_schedulers_that_read_the_defaults_work_too(make_gpt, batches, train):
    model = make_gpt()
    optimizer = adam_clip(model)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=10)
    train(model, optimizer, batches(1))
    scheduler.step()
    assert optimizer.bases[0].param_groups[0]["betas"][0] < 0.95  # it cycles Adam's momentum as well


def test_a_gradient_scaler_sees_an_optimizer(make_gpt, batches, weights_of):
    model = make_gpt()
    plain = make_gpt()
    optimizer = adam_clip(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    (batch,) = batches(1)
    for m in (model, plain):
        logits = m(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        (scaler.scale(loss) if m is model else loss).backward()
    scaler.unscale_(optimizer)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    stats = scaler.step(optimizer, batch[:, :-1], logits.detach())
    scaler.update()
    assert 0 < stats.clip_coefficient < 1
    before = weights_of(model)
    scaler.scale(model(batch[:, :-1]).sum() * math.inf).backward()
    assert (
        scaler.step(optimizer, batch[:, :-1], logits.detach()) is None
    )  # the scaler itself leaves such a step out
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("budget", ["shadow", "surrogate"])
def test_parameter_groups_keep_their_own_settings(make_gpt, batches, backward, budget):
    def two_groups(model):
        blocks = list(model.blocks.parameters())
        rest = [p for p in model.parameters() if not any(p is b for b in blocks)]
        return torch.optim.AdamW(
            [{"params": rest, "lr": LR}, {"params": blocks, "lr": LR / 4, "weight_decay": 0.3}]
        )

    plain = make_gpt()
    model = make_gpt()
    base = two_groups(plain)
    optimizer = EllipsotopeClip(model, two_groups(model), target_kl=0.01, budget=budget)
    assert [group["lr"] for group in optimizer.param_groups] == [LR, LR / 4]
    (batch,) = batches(1)
    before = [p.detach().clone() for p in plain.parameters()]
    backward(plain, batch)
    base.step()
    c = optimizer.step(batch[:, :-1], backward(model, batch)).clip_coefficient.item()
    assert 0 < c < 1
    for old, new, applied in zip(before, plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(applied, torch.lerp(old, new, c))


def test_tied_parameters_move_together(weights_of):
    tokens = integers(12, 5)
    model = Tokenwise(tied=True).double()
    before = weights_of(model)
    optimizer = adam_clip(model, budget="surrogate", target_kl=1e-3, floor=1e-7)
    logits = model(tokens)
    F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    stats = optimizer.step(tokens, logits)
    assert model.head.weight is model.embedding.weight
    assert list(optimizer.groups.values()) == [[0], [1, 2]]
    c = stats.clip_coefficient.item()
    update = (model.embedding.weight.detach() - before[0]) / c

    def moved(amount):
        twin = Tokenwise(tied=True).double()
        with torch.no_grad():
            twin.embedding.weight.add_(update, alpha=amount)
            return twin(tokens[:2])

    derivative = (moved(1e-5) - moved(-1e-5)) / 2e-5  # through the embedding and the head at once
    assert stats.contributions[0].item() == pytest.approx(rms_norm(centre(derivative)).item(), rel=1e-6)


def watched(seen):
    """A forward that notes the rows it is given and whether any part of the model is in training mode."""

    def forward(model, inputs):
        seen.append((len(inputs), any(m.training for m in model.modules())))
        return model(inputs)

    return forward


# -- models and batches --------------------------------------------------------------------------------------


class Named(Tokenwise):
    """Takes its batch by name and answers with an object, as many libraries' models do."""

    def forward(self, ids, scale):
        return SimpleNamespace(logits=super().forward(ids) * scale[..., None], loss=None)


@pytest.mark.parametrize("budget", ["shadow", "surrogate"])
def test_batches_by_name_and_outputs_with_logits(budget):
    tokens = integers(12, 5)
    scale = torch.rand(12, 5, generator=torch.Generator().manual_seed(1)) + 0.5
    named = Named()
    plain = Tokenwise()
    results = []
    for model, inputs, options in (
        (named, {"ids": tokens, "scale": scale}, {}),
        (plain, (tokens, scale), {"forward": lambda m, x: m(x[0]) * x[1][..., None]}),
    ):
        optimizer = adam_clip(model, budget=budget, target_kl=1e-3, **options)
        output = (
            model(**inputs) if model is named else SimpleNamespace(logits=model(tokens) * scale[..., None])
        )
        F.cross_entropy(output.logits.flatten(0, 1), tokens.flatten()).backward()
        results.append(optimizer.step(inputs, output if model is named else output.logits))
    assert identical(named, plain)
    assert 0 < results[0].clip_coefficient < 1
    assert torch.equal(results[0].applied_kl, results[1].applied_kl)


@pytest.mark.parametrize("budget", ["shadow", "surrogate"])
def test_one_token_per_row(budget):
    """Logits of shape (B, V): a classifier."""
    tokens = integers(40)
    model = Tokenwise()
    optimizer = adam_clip(model, budget=budget, target_kl=1e-3, probe_sequences=8)
    logits = model(tokens)
    F.cross_entropy(logits, tokens).backward()
    stats = optimizer.step(tokens, logits)
    assert 0 < stats.clip_coefficient < 1
    assert stats.audit_tokens == 32
    with torch.no_grad():
        assert stats.applied_kl.item() == pytest.approx(
            mean_kl(logits[8:], model(tokens[8:])).item(), rel=1e-5
        )


@pytest.mark.parametrize("budget", ["shadow", "surrogate"])
def test_masked_tokens_have_no_say(budget):
    tokens = integers(12, 6)
    mask = torch.rand(12, 6, generator=torch.Generator().manual_seed(2)) < 0.7
    padded = torch.where(mask, tokens, (tokens + 5) % 11)
    assert not torch.equal(padded, tokens)
    results = []
    for inputs in (tokens, padded):
        model = Tokenwise()
        optimizer = adam_clip(model, budget=budget, target_kl=1e-3)
        logits = model(inputs)
        F.cross_entropy(logits[mask], inputs[mask]).backward()
        stats = optimizer.step(inputs, logits, mask)
        assert stats.audit_tokens == mask[2:].sum()
        with torch.no_grad():
            kl = mean_kl(logits[2:][mask[2:]], model(inputs)[2:][mask[2:]])
        assert stats.applied_kl.item() == pytest.approx(kl.item(), rel=1e-4)
        results.append((stats.clip_coefficient.item(), stats.applied_kl.item()))
    assert 0 < results[0][0] < 1
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_the_audit_counts_the_tokens_that_the_mask_keeps():
    tokens = integers(40, 6)
    seen = []
    mask = torch.zeros(40, 6, dtype=torch.bool)
    mask[:, :2] = True
    model = Tokenwise()
    optimizer = adam_clip(model, audit_tokens=21, forward=watched(seen))
    logits = model(tokens)
    F.cross_entropy(logits[mask], tokens[mask]).backward()
    stats = optimizer.step(tokens, logits, mask)
    assert (stats.audit_tokens, seen[-1][0]) == (22, 11)  # rows of 2 tokens each, the first to reach 21


@pytest.mark.parametrize("training", [True, False])
def test_with_dropout_the_logits_are_computed_again(make_gpt, batches, backward, training):
    models = [make_gpt(dropout=0.4).train(training) for _ in range(2)]
    (batch,) = batches(1)
    results = []
    for model, garbage in zip(models, (0.0, 5.0), strict=True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            logits = backward(model, batch)
        optimizer = adam_clip(model, fresh_logits=None if training else False)
        random = torch.get_rng_state()
        stats = optimizer.step(batch[:, :-1], logits + garbage * torch.eye(logits.shape[-1])[batch[:, :-1]])
        assert torch.equal(torch.get_rng_state(), random)  # no dropout in any measurement
        results.append((stats.clip_coefficient, stats.applied_kl))
    assert (results[0] == results[1]) == training


@pytest.mark.parametrize("options", [{}, {"budget": "surrogate"}, {"target_kl": math.inf, "audit_every": 1}])
def test_every_module_is_left_in_its_mode(make_gpt, batches, train, options):
    for training in (True, False):
        model = make_gpt(dropout=0.1).train(training)
        model.blocks[0].train(not training)
        modes = [m.training for m in model.modules()]
        seen = []
        train(model, adam_clip(model, forward=watched(seen), **options), batches(1))
        assert [m.training for m in model.modules()] == modes
        assert {training for _, training in seen} == {False}

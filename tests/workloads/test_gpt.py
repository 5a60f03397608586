"""The GPT: shapes, seeded weights, causality, precision."""

import math
from dataclasses import replace

import pytest
import torch

from ebc_lab.config.parts.model import ModelConfig
from ebc_lab.workloads.gpt import attention, build, effective_weights, hidden_matrices, plain

CONFIG = ModelConfig(blocks=2, width=32, heads=4, context=16)
VOCABULARY = 23


def some_tokens(length=16):
    return torch.randint(VOCABULARY, (3, length), generator=torch.Generator().manual_seed(2))


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_weights_come_from_the_seed_alone():
    first = build(CONFIG, VOCABULARY, seed=7)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    second = build(CONFIG, VOCABULARY, seed=7)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's generator is left alone
    assert same(first, second)
    assert not same(first, build(CONFIG, VOCABULARY, seed=8))


def test_initial_scales():
    model = build(ModelConfig(blocks=2, width=128, heads=4), VOCABULARY, seed=0)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert torch.equal(p, torch.ones_like(p)), name
        else:
            into_the_stream = name.endswith((".o.weight", ".mlp_out.weight"))
            want = 0.02 / math.sqrt(2 * 2) if into_the_stream else 0.02
            assert p.std().item() == pytest.approx(want, rel=0.05), name
    three = build(replace(CONFIG, init_scale=3.0), 65, 0)
    for (name, p), q in zip(build(CONFIG, 65, 0).named_parameters(), three.parameters(), strict=True):
        torch.testing.assert_close(q, 3 * p if p.ndim == 2 else p, msg=name)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("length", [16, 200])
def test_a_later_token_does_not_reach_back(bfloat16, length):
    model = build(replace(CONFIG, context=length), VOCABULARY, seed=0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".q." in name or ".k." in name or ".v." in name or ".o." in name:
                p.mul_(20)  # so that attention matters
    tokens = some_tokens(length)
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % VOCABULARY
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        moved = (model(changed) - model(tokens)).float().abs().amax(-1)  # (B, T)
    assert moved[:, :9].max() < 1e-6
    assert moved[:, 9:].mean(0).min() > 1e-6


def test_attention_is_the_textbook_one():
    block = build(CONFIG, VOCABULARY, seed=0).double().blocks[0]
    x = torch.randn(3, 16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    heads = []
    for h in range(4):
        q, k, v = (x @ m.weight[8 * h : 8 * h + 8].T for m in (block.q, block.k, block.v))  # (B, T, D)
        scores = (q @ k.mT / math.sqrt(8)).masked_fill(torch.ones(16, 16).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v)
    qkv = torch.cat([x @ m.weight.T for m in (block.q, block.k, block.v)], -1)
    torch.testing.assert_close(attention(qkv.flatten(0, 1), 3, 4, 0.0).view(3, 16, 32), torch.cat(heads, -1))


@pytest.mark.parametrize("length", [16, 200])
def test_bfloat16_autocast_stays_close_to_float32(length):
    model = build(replace(CONFIG, context=length), VOCABULARY, seed=0)
    with torch.no_grad():
        for p in hidden_matrices(model):
            p.mul_(5)
    tokens = some_tokens(length)
    full = model(tokens)
    full.square().mean().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(tokens)
    low.float().square().mean().backward()
    assert low.dtype == torch.bfloat16
    assert (low.float() - full).norm() < 0.02 * full.norm()
    for p, want in zip(model.parameters(), gradients, strict=True):
        assert (p.grad - want).norm() < 0.05 * want.norm()


def test_dropout_acts_in_training_only():
    tokens = some_tokens()
    model = build(ModelConfig(blocks=2, width=32, heads=4, context=16, dropout=0.5), VOCABULARY, seed=0)
    plain = build(CONFIG, VOCABULARY, seed=0)
    assert not torch.equal(model(tokens), model(tokens))
    assert torch.equal(model.eval()(tokens), plain(tokens))


def test_hidden_matrices_are_the_six_of_each_block():
    model = build(CONFIG, VOCABULARY, seed=0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in hidden_matrices(model)] == [
        f"blocks.{i}.{part}.weight" for i in range(2) for part in ("q", "k", "v", "o", "mlp_in", "mlp_out")
    ]


def test_what_the_forward_uses_of_each_weight_stands_in_the_models_order():
    model = plain(11, context=8, width=16, blocks=1, heads=2, seed=0, quantize=torch.sign)
    hidden = {id(p) for p in hidden_matrices(model)}
    found = effective_weights(model)
    assert len(found) == len(list(model.parameters()))
    for used, p in zip(found, model.parameters(), strict=True):
        assert torch.equal(used, p.sign() if id(p) in hidden else p)

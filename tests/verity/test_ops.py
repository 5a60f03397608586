"""Exact layers: golden values, a slow plain reference, gradients against float64, and what they refuse."""

import itertools
import math
import re
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from support.exact_gpt import GOLDEN, numbers
from support.tensors import normal

from ebc_lab.verity import VerityError, VerityGPT, bits_for, exact_matmul, ops
from ebc_lab.verity.bits import left_for

pytestmark = pytest.mark.usefixtures("engine")


# -- golden values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "make", "width"),
    [
        ("linear", lambda: ops.VLALinear(5, 4), 5),
        ("layer_norm", lambda: ops.VLALayerNorm(6, bias=False), 6),
    ],
)
def test_the_golden_layers(name, make, width):
    g = GOLDEN[name]
    x = numbers(g["x"], 3, width).requires_grad_()
    layer = make()
    layer.load_state_dict({n: numbers(g[n[0]], *p.shape) for n, p in layer.named_parameters()})
    y = layer(x)
    y.backward(numbers(g["dy"], *y.shape))
    assert torch.equal(y, numbers(g["y"], *y.shape))
    assert torch.equal(x.grad, numbers(g["dx"], 3, width))
    for n, p in layer.named_parameters():
        assert torch.equal(p.grad, numbers(g["d" + n[0]], *p.shape))


def test_the_golden_attention_softmax_and_cross_entropy():
    g = GOLDEN["attention"]
    qkv = numbers(g["qkv"], 8, 12).requires_grad_()
    y = ops.attention(qkv, 2, 2)
    y.backward(numbers(g["dy"], 8, 4))
    assert torch.equal(y, numbers(g["y"], 8, 4))
    assert torch.equal(qkv.grad, numbers(g["dqkv"], 8, 12))
    g = GOLDEN["softmax"]
    assert torch.equal(ops.softmax(numbers(g["x"], 3, 7)), numbers(g["y"], 3, 7))
    g = GOLDEN["cross_entropy"]
    z = numbers(g["z"], 4, 5).requires_grad_()
    loss = ops.cross_entropy(z, torch.tensor(g["targets"]))
    loss.backward()
    assert loss.item() == float.fromhex(g["sum"])
    assert torch.equal(z.grad, numbers(g["dz"], 4, 5))


# -- against a slow plain reference, and against float64 -----------------------------------------------------


def quantized(values: list[float], bits: int) -> tuple[list[int], int]:
    """Whole numbers and their common exponent, by Python's own arithmetic."""
    e = max(math.frexp(v)[1] if v else -10000 for v in values)
    e = 0 if e == -10000 else e
    return [round(Fraction(v) * Fraction(2) ** (bits - e)) for v in values], e


@pytest.mark.parametrize(("N", "K", "M"), [(1, 1, 1), (3, 5, 2), (4, 33, 3), (2, 100, 65)])
def test_a_product_is_the_sum_of_whole_numbers(N, K, M):
    a = normal(N, K, seed=K)
    b = 1e-3 * normal(K, M, seed=M + 100)
    a[0, 0] = 0.0
    bits = bits_for(max(K, M))
    taken = left_for(K, bits)
    whole, e_b = quantized(b.flatten().tolist(), bits)
    expected = []
    for row in a.tolist():
        own, e_a = quantized(row, taken)
        sums = [sum(own[k] * whole[k * M + j] for k in range(K)) for j in range(M)]
        expected.append([float(s) * 2.0 ** (e_a - taken + e_b - bits) for s in sums])
    assert torch.equal(exact_matmul(a, b), torch.tensor(expected, dtype=torch.float64).float())


def test_the_order_of_what_is_summed_changes_nothing():
    a, b = normal(6, 200), normal(200, 5, seed=1)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(2))
    assert torch.equal(exact_matmul(a, b), exact_matmul(a[:, order], b[order]))
    assert not torch.equal(a @ b, a[:, order] @ b[order])  # which is what torch cannot promise


def close(found: torch.Tensor, expected: torch.Tensor, by: float = 1e-5) -> bool:
    return bool((found.double() - expected).norm() <= by * expected.norm())


def test_attention_of_another_layout_says_how_to_make_it():
    """And what it says makes it."""
    q, k, v = (normal(2, 3, 5, 4, seed=i) for i in range(3))
    for arguments in ((q, k, v), (normal(7, 12), 2, 1), (normal(8, 15), 2, 3)):
        with pytest.raises(ValueError, match=r"attention takes qkv \(B·T.+ make torch.cat") as refused:
            ops.attention(*arguments)
    [code] = re.findall(r"make (torch.cat.+\))\.$", str(refused.value))
    found = ops.attention(eval(code, {"torch": torch, "q": q, "k": k, "v": v}), 2, 3)
    expected = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), is_causal=True)
    assert close(found, expected.transpose(1, 2).flatten(0, 1).flatten(1))
    for shape, B, heads in (((2, 3, 5, 4), 2, 3), ((8, 6), 2, 2), ((7, 8), 2, 2), ((8, 8), 2, 0)):
        with pytest.raises(ValueError, match=r"rotary takes queries or keys \(B·T, heads·D\)"):
            ops.rotary(torch.zeros(shape), B, heads)


@pytest.mark.parametrize("window", [(3, 1, 1), ((2, 3), (2, 1), (0, 2)), (2, 3, 0)])
def test_gradients_of_a_convolution_and_of_means_of_tiles(window):
    layer = ops.VLAConv2d(3, 5, *window)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(normal(*p.shape, seed=p.numel()))
    tile = (1, 2) if layer(torch.zeros(1, 3, 8, 6)).shape[3] % 2 == 0 else (1, 1)
    leaves = [t.detach() for t in (normal(2, 3, 8, 6), layer.weight, layer.bias)]
    x, weight, bias = (t.double().requires_grad_() for t in leaves)
    expected = F.avg_pool2d(F.conv2d(x, weight, bias, *window[1:]), tile)
    own = leaves[0].requires_grad_()
    found = ops.VLAAvgPool2d(tile)(layer(own))
    dy = normal(*expected.shape, seed=9)
    found.backward(dy)
    expected.backward(dy.double())
    pairs = [(found.detach(), expected.detach()), (own.grad, x.grad)]
    pairs += [(layer.weight.grad, weight.grad), (layer.bias.grad, bias.grad)]
    assert all(close(a, b) for a, b in pairs)


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_of_a_linear_layer_and_of_a_layer_norm(bias):
    x = normal(40, 12).requires_grad_()
    wide = x.detach().double().requires_grad_()
    dy = normal(40, 7, seed=3)
    norm, linear = ops.VLALayerNorm(12, bias=bias), ops.VLALinear(12, 7, bias=bias)
    with torch.no_grad():
        for p in (*norm.parameters(), *linear.parameters()):
            p.copy_(normal(*p.shape, seed=p.numel()))
    linear(norm(x)).backward(dy)
    parts = {n: p.detach().double().requires_grad_() for n, p in [*norm.named_parameters()]}
    others = {n: p.detach().double().requires_grad_() for n, p in [*linear.named_parameters()]}
    h = F.layer_norm(wide, (12,), parts["weight"], parts.get("bias"))
    F.linear(h, others["weight"], others.get("bias")).backward(dy.double())
    assert close(x.grad, wide.grad)
    for layer, expected in ((norm, parts), (linear, others)):
        for name, p in layer.named_parameters():
            assert close(p.grad, expected[name].grad), name


def test_gradients_of_attention_gelu_softmax_and_embedding():
    B, T, H, C = 2, 9, 2, 8
    table = ops.VLAEmbedding(5, 3 * C)
    with torch.no_grad():
        table.weight.copy_(normal(5, 3 * C))
    ids = torch.randint(0, 5, (B * T,), generator=torch.Generator().manual_seed(1))
    dy = normal(B * T, C, seed=4)
    found = ops.softmax(ops.gelu(ops.attention(table(ids), B, H)))
    found.backward(dy)
    weight = table.weight.detach().double().requires_grad_()
    q, k, v = weight[ids].view(B, T, 3, H, C // H).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B * T, C)
    expected = F.gelu(y).softmax(-1)
    expected.backward(dy.double())
    assert close(found.detach(), expected.detach())
    assert close(table.weight.grad, weight.grad)


def test_a_stack_is_its_layers_side_by_side():
    layers = [ops.VLALinear(6, n, bias=False) for n in (4, 4, 5)]
    for i, layer in enumerate(layers):
        torch.nn.init.uniform_(layer.weight, -1, 1, generator=torch.Generator().manual_seed(i))
    x = normal(3, 2, 6).requires_grad_()
    y = ops.VLAStack(*layers)(x)
    wide = torch.cat([layer.weight.detach() for layer in layers]).double()
    dy = normal(3, 2, 13, seed=1)
    y.backward(dy)
    assert close(y.detach(), x.detach().double() @ wide.t())
    assert close(x.grad, dy.double() @ wide)
    expected = dy.double().flatten(0, 1).t() @ x.detach().double().flatten(0, 1)
    assert close(torch.cat([layer.weight.grad for layer in layers]), expected)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_the_loss_does_not_depend_on_the_order_of_its_tokens(reduction):
    z = normal(300, 13).requires_grad_()
    y = torch.randint(0, 13, (300,), generator=torch.Generator().manual_seed(0))
    weights = normal(300, seed=2).double() if reduction == "none" else 1.0  # each token has its gradient
    loss = ops.cross_entropy(z, y, reduction)
    (loss * weights).sum().backward()
    wide = z.detach().double().requires_grad_()
    expected = F.cross_entropy(wide, y, reduction=reduction)
    (expected * weights).sum().backward()
    assert torch.allclose(loss, expected, rtol=1e-9)
    assert close(z.grad, wide.grad)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    again = ops.cross_entropy(z[order], y[order], reduction)
    assert torch.equal(again, loss[order] if reduction == "none" else loss)


@pytest.mark.parametrize("size", [1e3, 2e9, 1e12])
def test_large_losses_are_summed_exactly_and_not_wrapped_around(size):
    """-ln p of classes that large logits leave without a chance."""
    z = torch.zeros(6, 3)
    z[:, 0] = size
    y = torch.ones(6, dtype=torch.int64)
    assert float(ops.cross_entropy(z, y).detach()) == 6 * float(z[0, 0])
    parts = [ops.cross_entropy(z[:2], y[:2], "none"), ops.cross_entropy(z[2:], y[2:], "none")]
    assert sum(map(ops.loss_total, parts)) == ops.loss_total(torch.cat(parts)) == 6 * int(z[0, 0]) * 2**32
    with pytest.raises(VerityError, match=r"below 2\^40 nats"):
        ops.cross_entropy(1e20 * z, y)


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["input", "weight", "gradient"])
def test_a_linear_layer_refuses_what_is_not_finite(bad, where):
    layer = ops.VLALinear(4, 3)
    x = normal(5, 4)
    dy = torch.ones(5, 3)
    with torch.no_grad():
        {"input": x, "weight": layer.weight, "gradient": dy}[where].view(-1)[2] = bad
    with pytest.raises(VerityError, match="not finite"):
        layer(x.requires_grad_()).backward(dy)


def test_attention_and_the_loss_refuse_what_is_not_finite():
    qkv = normal(4, 6)
    qkv[3, 5] = math.inf
    with pytest.raises(VerityError, match="not finite"):
        ops.attention(qkv, 1, 1)
    with pytest.raises(VerityError, match="not finite"):
        ops.cross_entropy(torch.full((2, 3), math.nan), torch.tensor([0, 1]))
    with pytest.raises(VerityError, match="not finite"):
        ops.softmax(torch.full((2, 3), math.inf))


def test_other_precisions_and_classes_that_do_not_exist_are_refused():
    for dtype, function in itertools.product(
        (torch.bfloat16, torch.float64), (ops.VLALinear(4, 3), ops.gelu, ops.softmax)
    ):
        with pytest.raises(ValueError, match="takes float32"):
            function(torch.zeros(2, 4, dtype=dtype))
    with pytest.raises(ValueError, match=r"targets must be integers, not torch\.float32"):
        ops.cross_entropy(normal(2, 5), torch.tensor([0.9, 1.0]))
    with pytest.raises(ValueError, match="targets must be in 0…4"):
        ops.cross_entropy(torch.zeros(2, 5), torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="ids must be in 0…4"):
        ops.VLAEmbedding(5, 2)(torch.tensor([-1]))
    with pytest.raises(ValueError, match="reduction='max'"):
        ops.cross_entropy(torch.zeros(2, 5), torch.tensor([0, 1]), "max")
    with pytest.raises(ValueError, match=r"logits \(2, 5\) do not go with targets \(3,\)"):
        ops.cross_entropy(torch.zeros(2, 5), torch.tensor([0, 1, 2]))
    for layer in (ops.VLALayerNorm(8), ops.VLALinear(8, 2), ops.VLAStack(ops.VLALinear(8, 2, bias=False))):
        with pytest.raises(ValueError, match="takes rows of 8 numbers, not 4"):
            layer(torch.zeros(6, 4))
    for layer, x, message in (
        (ops.VLAConv2d(3, 2, 3), torch.zeros(1, 2, 9, 9), r"images \(B, 3, H, W\), not \(1, 2, 9, 9\)"),
        (ops.VLAConv2d(3, 2, 3), torch.zeros(1, 3, 2, 9), r"no window of \(3, 3\) pixels fits"),
        (ops.VLAAvgPool2d(2), torch.zeros(1, 3, 6, 9), "into tiles of 2×2 pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(x)
    for settings in ({"groups": 3}, {"padding": "same"}):
        with pytest.raises(ValueError, match=r"takes (dilation=1 and groups=1|a whole number)"):
            ops.VLAConv2d(3, 3, 3, **settings)
    with pytest.raises(ValueError, match="without bias"):
        ops.VLAStack(ops.VLALinear(2, 2))
    with pytest.raises(ValueError, match="multiple of heads"):
        VerityGPT(5, 4, 10, 1, 3)


def test_modules_are_their_functions():
    x = torch.linspace(-3, 3, 24).view(2, 3, 4)
    for module, function in (
        (ops.VLAGELU(), ops.gelu),
        (ops.VLASiLU(), ops.silu),
        (ops.VLASoftmax(), ops.softmax),
    ):
        assert torch.equal(module(x), function(x))

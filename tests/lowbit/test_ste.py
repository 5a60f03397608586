"""Training through the quantizer: the forward's bits, its derivatives, and that nothing is remembered."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.low_bit import LEVELS, assert_same_bits
from torch import Tensor, nn

from ebc_lab.lowbit.levels import quantize
from ebc_lab.lowbit.ste import codes_of, effective, flip_share, straight_through

GROUPS: tuple[Any, ...] = ("tensor", "row", 1, 7, 1000)


def weights(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("scale", ["absmean", "absmax", 0.015])
def test_the_forward_is_quantize_to_the_bit_and_the_backward_the_identity(levels, group, scale) -> None:
    weight = weights(1, 30, 45)
    weight[3] = 0
    weight[4, 4] = -0.0
    weight.requires_grad_(True)
    got = straight_through(weight, levels, group, scale)
    expected = quantize(weight, levels, group=group, scale=scale)
    assert_same_bits(got, expected.values())
    assert_same_bits(codes_of(weight, levels, group, scale), expected.codes)
    upstream = weights(2, 30, 45)
    (gradient,) = torch.autograd.grad(got, weight, upstream)
    assert_same_bits(gradient, upstream)


def test_vmap_quantizes_each_matrix_by_itself_and_composes_with_derivatives() -> None:
    stack = weights(7, 3, 8, 6) * torch.tensor([1.0, 10.0, 0.1])[:, None, None]

    def through(w: Tensor) -> Tensor:
        return straight_through(w, "five", "row")

    each = torch.stack([through(w) for w in stack])
    assert_same_bits(torch.func.vmap(through)(stack), each)
    gradient = torch.func.vmap(torch.func.grad(lambda w: (through(w) ** 2).sum()))(stack)
    assert torch.equal(gradient, 2 * each)
    both = torch.func.vmap(lambda w, t: torch.func.jvp(through, (w,), (t,)))(stack, stack)
    assert torch.equal(both[0], each)
    assert torch.equal(both[1], stack)
    gradients = torch.func.grad(lambda w: (through(w) ** 2).sum())
    assert torch.equal(torch.func.jvp(gradients, (stack[0],), (stack[1],))[1], 2 * stack[1])


def test_weights_swapped_behind_torchs_back_change_the_forward() -> None:
    """Its trial weights are put in place without a version bump: a cached value would show KL = 0."""
    weight = nn.Parameter(weights(0, 24, 16))
    first = straight_through(weight, "ternary")
    kept = first.detach().clone()
    version = weight._version
    new = weights(11, 24, 16)
    for swap in (lambda: weight.data.copy_(new), lambda: setattr(weight, "data", -new)):
        swap()
        assert weight._version == version
        assert_same_bits(straight_through(weight, "ternary"), quantize(weight, "ternary").values())
    assert torch.equal(first, kept)  # in memory of its own


def test_under_autocast_the_step_comes_from_the_float32_weight() -> None:
    weight = weights(13, 40, 30).requires_grad_(True)
    x = weights(14, 4, 30)
    expected = quantize(weight.detach().numpy(), "ternary").values()
    with torch.autocast("cpu", torch.bfloat16):
        effective_weight = straight_through(weight, "ternary")
        out = F.linear(x, effective_weight)
        traced = torch.func.vmap(lambda w: straight_through(w, "ternary"))(weight[None])[0]
    assert effective_weight.dtype == torch.float32
    assert_same_bits(effective_weight, expected)
    assert_same_bits(traced, expected)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_read_as_float32(dtype: torch.dtype) -> None:
    weight = weights(15, 9, 8).to(dtype).requires_grad_(True)
    got = straight_through(weight, "five")
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_same_bits(got.float(), quantize(weight.detach().float().numpy(), "five").values())
    got.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == dtype
    tangent = torch.ones_like(weight)
    derivative = torch.func.jvp(lambda w: straight_through(w, "five"), (weight.detach(),), (tangent,))[1]
    assert torch.equal(derivative, tangent.to(got.dtype))


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_diverged_weight_shows_and_does_not_raise(levels: str, bad: float) -> None:
    weight = weights(16, 6, 8)
    weight[2, 3] = bad
    assert not straight_through(weight, levels).isfinite().any()
    rows = straight_through(weight, levels, "row")
    assert not rows[2].isfinite().any()
    finite = [0, 1, 3, 4, 5]
    expected = quantize(weight[finite], levels, group="row")
    assert_same_bits(rows[finite], expected.values())
    codes = codes_of(weight, levels, "row")
    assert not codes[2].any()
    assert_same_bits(codes[finite], expected.codes)


def test_flip_share_counts_codes_that_differ() -> None:
    before = torch.tensor([[1, 0, -1, 2]], dtype=torch.int8)
    after = torch.tensor([[1, 1, 1, 2]], dtype=torch.int8)
    assert flip_share(before, after).item() == 0.5
    assert flip_share(before, before).item() == 0
    empty = torch.zeros(0, dtype=torch.int8)
    assert flip_share(empty, empty).item() == 0
    with pytest.raises(ValueError, match="one weight"):
        flip_share(before, after.T)


def test_unknown_settings_are_refused() -> None:
    for function in (straight_through, codes_of):
        with pytest.raises(ValueError, match="levels"):
            function(weights(0, 4, 4), "four")
    with pytest.raises(ValueError, match="matrix"):
        straight_through(weights(0, 4), "five", "row")
    with pytest.raises(ValueError, match="real"):
        effective(weights(0, 4).to(torch.complex64), "five", "tensor", "absmean")


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("levels", LEVELS)
def test_compiled_without_a_graph_break_the_bits_are_the_same(levels: str, backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(
        lambda w: straight_through(w, levels, "row"), fullgraph=True, backend=backend, dynamic=False
    )
    weight = weights(22, 30, 45).requires_grad_(True)
    got = compiled(weight)
    assert_same_bits(got, quantize(weight.detach().numpy(), levels, group="row").values())
    upstream = weights(23, 30, 45)
    (gradient,) = torch.autograd.grad(got, weight, upstream)
    assert_same_bits(gradient, upstream)
    torch.compiler.reset()

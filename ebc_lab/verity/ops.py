"""Exact layers: linear, convolution, norms, attention, rotary positions, embedding, GELU, SiLU, softmax,
means of tiles and cross-entropy, with gradients.

Tensors between operations are float32. Rows (tokens) are independent of each other, so that a batch may be
split anywhere; gradients of weights are integer sums over rows (`grids`). A tensor feeds two consumers at
most: torch adds their gradients in an order of its own, and a sum of two has only one.

Layer norm: Ba, Kiros & Hinton, arXiv:1607.06450. RMSNorm: Zhang & Sennrich, arXiv:1910.07467. GELU, SiLU:
Hendrycks & Gimpel, arXiv:1606.08415. Rotary positions: Su et al., arXiv:2104.09864. Grouped queries: Ainslie
et al., arXiv:2305.13245.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .bits import NOT_FINITE, VerityError, bits_for, divided, left_for, pow2f, tree_sum
from .engine import engine_of
from .functions import exp64, log64, rotations, sqrt32
from .grids import Products, Terms, on_grid, step_of
from .optim import VerityAdam
from .windows import Pair, Patches, TileMeans, counts, pair

__all__ = [
    "VLAGELU",
    "VLAAvgPool2d",
    "VLAConv2d",
    "VLAEmbedding",
    "VLALayerNorm",
    "VLALinear",
    "VLARMSNorm",
    "VLASiLU",
    "VLASoftmax",
    "VLAStack",
    "VerityAdam",
    "attention",
    "cross_entropy",
    "exact_matmul",
    "exp64",
    "gelu",
    "log64",
    "loss_total",
    "rotary",
    "silu",
    "softmax",
    "sqrt32",
    "tree_sum",
]
LOSS_BITS = 32  # of the sum of losses
MOST_LOSS = 40  # log2 of the loss of a token, nats, which ends a run
HALF = 31  # bits of the lower part of a loss


def _check(x: Tensor, what: str, width: int | None = None) -> Tensor:
    """Return x contiguous. ValueError unless it is float32 and, if `width` is given, (..., width)."""
    if x.dtype != torch.float32:
        raise ValueError(f"{what} takes float32, not {str(x.dtype).removeprefix('torch.')}.")
    if width is not None and x.shape[-1] != width:
        raise ValueError(f"{what} takes rows of {width} numbers, not {x.shape[-1]}.")
    return x.contiguous()


def _finite(e: Tensor, what: str) -> Tensor:
    """Return exponents, unless one says that a value is not finite: VerityError."""
    if e.numel() and int(e.max()) == NOT_FINITE:
        raise VerityError(f"{what}: a value is not finite.")
    return e


def _applied(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """Call a function that has a gradient of its own; torch types what `apply` returns as anything."""
    apply: Any = function.apply
    result: Tensor = apply(*arguments)
    return result


# -- products with weights -----------------------------------------------------------------------------------


class _Product(torch.autograd.Function):
    """Multiply x (N, K) with each of some weights (M_j, …) of K numbers a row, side by side: (N, Σ M_j)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, products: Products, terms: Terms | None, bias: Tensor | None, *weights: Tensor
    ) -> Tensor:
        engine = engine_of(x.device)
        K = x.shape[1]
        sizes = [len(w) for w in weights]
        bits = bits_for(max(K, sum(sizes)))
        weight = weights[0].flatten(1) if len(weights) == 1 else torch.cat(weights)
        E = engine.max_exponent(weight)
        if E == NOT_FINITE:
            raise VerityError("a weight is not finite.")
        # weights share one exponent, each row of x has its own: the product of whole numbers is exact
        W = on_grid(weight, E, bits)
        taken = left_for(K, bits)
        e = _finite(engine.row_exponents(x), "the input of a linear layer")
        P = engine.quantize_rows(x, e, taken) @ W.t()
        ctx.save_for_backward(x, W)
        ctx.summed = products
        ctx.terms, ctx.sizes, ctx.scale = terms, sizes, (bits, E)
        y: Tensor = engine.scaled_rows(P, e, E - bits - taken, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, W = ctx.saved_tensors
        dy = dy.contiguous()
        parts = [dy] if len(ctx.sizes) == 1 else [part.contiguous() for part in dy.split(ctx.sizes, -1)]
        with step_of(ctx):
            dx = _input_gradient(dy, W, *ctx.scale) if ctx.needs_input_grad[0] else None
            gradients = ctx.summed.gradients(parts, x)
            of_bias = None if ctx.terms is None else ctx.terms.gradient(dy)
        return (dx, None, None, of_bias, *gradients)


def _input_gradient(dy: Tensor, W: Tensor, bits: int, E: int) -> Tensor:
    """Multiply dy with the quantized weights, (N, M) and (M, K) -> (N, K) float32."""
    engine = engine_of(dy.device)
    taken = left_for(len(W), bits)
    e = _finite(engine.row_exponents(dy), "the gradient of a linear layer's output")
    P = engine.quantize_rows(dy, e, taken) @ W
    dx: Tensor = engine.scaled_rows(P, e, E - bits - taken, None)
    return dx


class VLALinear(nn.Module):
    """x W^T + b of exact integer products, (…, K) float32 -> (…, M) float32."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self._products = Products([self])
        self._terms = Terms(self, "bias") if self.bias is not None else None

    @property
    def summed(self) -> list[Products | Terms]:
        return [self._products] if self._terms is None else [self._products, self._terms]

    def forward(self, x: Tensor) -> Tensor:
        flat = _check(x, type(self).__name__, self.in_features).reshape(-1, self.in_features)
        with step_of(self._products):
            y = _applied(_Product, flat, self._products, self._terms, self.bias, self.weight)
        return y.view(*x.shape[:-1], self.out_features)


class VLAStack(nn.Module):
    """Several linear layers without bias of one input as one product, their outputs side by side.

    The layers stay their owner's: they are no submodules here.
    """

    def __init__(self, *linears: VLALinear):
        super().__init__()
        if any(linear.bias is not None for linear in linears):
            raise ValueError("VLAStack takes linear layers without bias.")
        self._linears = linears
        self._products = Products(linears)

    @property
    def summed(self) -> list[Products]:
        return [self._products]

    def forward(self, x: Tensor) -> Tensor:
        weights = [linear.weight for linear in self._linears]
        flat = _check(x, "VLAStack", weights[0].shape[1]).reshape(-1, x.shape[-1])
        with step_of(self._products):
            y = _applied(_Product, flat, self._products, None, None, *weights)
        return y.view(*x.shape[:-1], y.shape[-1])


class VLAConv2d(VLALinear):
    """A convolution, as the same product of each window's pixels: (B, C, H, W) -> (B, M, H', W') float32.

    Every place of the window counts as a token of the step. Arguments and weights are those of `nn.Conv2d`.

    Raises:
        ValueError: padding by name, a dilation, or groups.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
    ):
        self.kernel_size = pair(kernel_size, "kernel_size", 1)
        self.stride, self.padding = pair(stride, "stride", 1), pair(padding, "padding", 0)
        if pair(dilation, "dilation", 1) != (1, 1) or groups != 1:
            raise ValueError(f"VLAConv2d takes dilation=1 and groups=1, not {dilation} and {groups}.")
        super().__init__(in_channels * self.kernel_size[0] * self.kernel_size[1], out_channels, bias)
        self.weight = nn.Parameter(torch.zeros(out_channels, in_channels, *self.kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        channels = self.weight.shape[1]
        _check(x, "VLAConv2d")
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"VLAConv2d takes images (B, {channels}, H, W), not {tuple(x.shape)}.")
        window = self.kernel_size, self.stride, self.padding
        down, across = counts(x.shape[2], x.shape[3], *window)
        y = super().forward(_applied(Patches, x, *window))
        return y.view(len(x), down, across, self.out_features).permute(0, 3, 1, 2).contiguous()


class VLAAvgPool2d(nn.Module):
    """The means of tiles that do not overlap, (B, C, H, W) -> (B, C, H/kh, W/kw) float32."""

    def __init__(self, kernel_size: int | Pair):
        super().__init__()
        self.kernel_size = pair(kernel_size, "kernel_size", 1)

    def forward(self, x: Tensor) -> Tensor:
        _check(x, "VLAAvgPool2d")
        kh, kw = self.kernel_size
        if x.ndim != 4 or x.shape[2] % kh or x.shape[3] % kw:
            raise ValueError(f"VLAAvgPool2d cannot divide {tuple(x.shape)} into tiles of {kh}×{kw} pixels.")
        return _applied(TileMeans, x, self.kernel_size)


def exact_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return a b of exact integer products: (N, K) quantized by rows, (K, M) as a whole -> (N, M) float32."""
    weight = _check(b, "exact_matmul").t().contiguous()
    products = Products([SimpleNamespace(weight=weight)])
    return _applied(_Product, _check(a, "exact_matmul"), products, None, None, weight)


# -- norms ---------------------------------------------------------------------------------------------------


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, terms: tuple[Any, ...], eps: float, centred: bool, w: Tensor, bias: Tensor | None
    ) -> Tensor:
        y: Tensor
        y, mean, rstd = engine_of(x.device).layer_norm(x, w, bias, eps, centred)
        ctx.save_for_backward(x, w, mean, rstd)
        ctx.summed, _ = ctx.terms = terms
        ctx.centred = centred
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, w, mean, rstd = ctx.saved_tensors
        dy = dy.contiguous()
        of_gain, of_bias = ctx.terms
        dx, terms = engine_of(x.device).layer_norm_backward(dy, x, w, mean, rstd, ctx.centred)
        with step_of(ctx):
            dbias = None if of_bias is None else of_bias.gradient(dy)
            return dx, None, None, None, of_gain.gradient(terms), dbias


class VLALayerNorm(nn.Module):
    """Rows of d numbers to mean 0 and deviation 1, times a gain, + a bias: (…, d) float32 -> the same."""

    centred = True

    def __init__(self, d: int, eps: float = 1e-5, bias: bool = True):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d))
        self.bias = nn.Parameter(torch.zeros(d)) if bias else None
        self._gain = Terms(self, "weight")
        self._bias = Terms(self, "bias") if self.bias is not None else None

    @property
    def summed(self) -> list[Terms]:
        return [self._gain] if self._bias is None else [self._gain, self._bias]

    def forward(self, x: Tensor) -> Tensor:
        flat = _check(x, type(self).__name__, len(self.weight)).reshape(-1, x.shape[-1])
        settings = (self._gain, self._bias), self.eps, self.centred
        return _applied(_LayerNorm, flat, *settings, self.weight, self.bias).view(x.shape)


class VLARMSNorm(VLALayerNorm):
    """Rows of d numbers to a mean square of 1, times a gain: (…, d) float32 -> the same."""

    centred = False

    def __init__(self, d: int, eps: float = 1e-6):
        super().__init__(d, eps, bias=False)


# -- attention -----------------------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, B: int, H: int) -> Tensor:
        engine = engine_of(qkv.device)
        N, width = qkv.shape
        T, D = N // B, width // (3 * H)
        bits, p_bits = min(bits_for(D), bits_for(T)), bits_for(T)
        ctx.shape = B, H, bits, p_bits, 1.0 / math.sqrt(D)
        parts, e = engine.heads(qkv, B, 3, H, bits)
        _finite(e, "the input of attention")
        q, k, v = parts
        scores = torch.bmm(q, k.mT)
        p, p_int = engine.causal_softmax(scores, e[0] + e[1] - 2 * bits, ctx.shape[-1], p_bits)
        ctx.save_for_backward(parts, e, p, p_int)
        y: Tensor = engine.merged([torch.bmm(p_int, v)], (e[2] - bits - p_bits)[None], B, H)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        parts, e, p, p_int = ctx.saved_tensors
        B, H, bits, p_bits, alpha = ctx.shape
        engine = engine_of(dy.device)
        q, k, v = parts
        g, e_g = engine.heads(dy.contiguous(), B, 1, H, bits)
        with step_of(ctx):
            _finite(e_g, "the gradient of attention's output")
        dy_int, e_dy = g[0], e_g[0]
        dP = torch.bmm(dy_int, v.mT)
        ds, e_ds = engine.causal_softmax_backward(dP, e_dy + e[2] - 2 * bits, p, alpha, p_bits)
        with step_of(ctx):
            _finite(e_ds, "the gradient of attention's scores")
        back = [torch.bmm(ds, k), torch.bmm(ds.mT, q), torch.bmm(p_int.mT, dy_int)]
        scale = torch.stack([e_ds + e[1], e_ds + e[0], e_dy]) - bits - p_bits
        return engine.merged(back, scale, B, H), None, None


class _Repeated(torch.autograd.Function):
    """Each of `groups` heads `times` times in a row; the gradients of its copies are a tree's sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, times: int) -> Tensor:
        N, width = x.shape
        ctx.shape = N, groups, times, width // groups
        return x.reshape(N, groups, 1, -1).expand(ctx.shape).reshape(N, width * times)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        N, groups, _, D = ctx.shape
        return tree_sum(dy.reshape(ctx.shape).transpose(2, 3)).float().view(N, groups * D), None, None


def attention(qkv: Tensor, B: int, heads: int, kv_heads: int | None = None) -> Tensor:
    """Attend causally: B·T tokens' queries, keys and values, (B·T, 3C) float32 -> (B·T, C) float32.

    Args:
        qkv: of each token heads·D numbers of queries, then those of keys and of values.
        kv_heads: how many heads keys and values have, where these are fewer; heads / kv_heads queries' heads
            in a row share one.
    Raises:
        ValueError: another layout.
    """
    shared = heads if kv_heads is None else kv_heads
    _check_layout(qkv, B, heads, shared)
    if shared != heads:
        D = qkv.shape[1] // (heads + 2 * shared)
        q, *kv = qkv.split([heads * D, shared * D, shared * D], -1)
        qkv = torch.cat([q, *(_applied(_Repeated, x, shared, heads // shared) for x in kv)], -1)
    with step_of(qkv):
        return _applied(_Attention, qkv.contiguous(), B, heads)


def _check_layout(qkv: Tensor, B: Any, heads: Any, kv_heads: Any) -> None:
    """Raise ValueError unless queries, keys, values, sequences and heads can be told apart."""
    if _check(qkv, "attention").ndim == 2 and _are_counts(B, heads, kv_heads):
        N, width = qkv.shape
        if not (N % B or heads % kv_heads or width % (heads + 2 * kv_heads)):
            return
    counted = [n if isinstance(n, int) else type(n).__name__ for n in (B, heads, kv_heads)]
    raise ValueError(
        "attention takes qkv (B·T, (heads + 2·kv_heads)·D), each token's queries, keys and values side by "
        f"side, then B and heads, not {tuple(qkv.shape)} with B, heads, kv_heads = {counted}: from q, k, v "
        "of (B, heads, T, D) make torch.cat([x.transpose(1, 2).flatten(0, 1).flatten(1) for x in (q, k, v)], "
        "1)."
    )


def _are_counts(*numbers: Any) -> bool:
    return all(isinstance(n, int) and n > 0 for n in numbers)


# -- rotary positions ----------------------------------------------------------------------------------------


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, T: int, D: int, base: float) -> Tensor:
        ctx.tables = rotations(T, D, base, x.device)
        y: Tensor = engine_of(x.device).rotated(x, *ctx.tables)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        cosine, sine = ctx.tables
        return engine_of(dy.device).rotated(dy.contiguous(), cosine, -sine), None, None, None


def rotary(x: Tensor, B: int, heads: int, base: float = 10000.0) -> Tensor:
    """Turn queries or keys by their places, (B·T, heads·D) float32 -> the same, before `attention`.

    At place t the numbers i and i + D/2 of a head turn by the angle t·base^(-2i/D). ValueError for another
    layout, an odd D, or a base below 1.
    """
    if _check(x, "rotary").ndim == 2 and _are_counts(B, heads) and base >= 1:
        N, width = x.shape
        if not (N % B or width % (2 * heads)):
            return _applied(_Rotary, x.contiguous(), N // B, width // heads, float(base))
    raise ValueError(
        "rotary takes queries or keys (B·T, heads·D) with an even D, then B, heads and a base of 1 or more, "
        f"not {tuple(x.shape)} with B={B}, heads={heads}, base={base}."
    )


# -- embedding, GELU, SiLU, softmax --------------------------------------------------------------------------


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, terms: Terms, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.summed = terms
        return weight[ids]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        (ids,) = ctx.saved_tensors
        with step_of(ctx):
            return None, None, ctx.summed.gradient(dy.contiguous(), ids)


class VLAEmbedding(nn.Module):
    """Rows of a table: ids (…) of integers in 0…n-1 -> (…, d) float32."""

    def __init__(self, n: int, d: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n, d))
        self._terms = Terms(self, "weight")

    @property
    def summed(self) -> list[Terms]:
        return [self._terms]

    def forward(self, ids: Tensor) -> Tensor:
        n, d = self.weight.shape
        flat = _checked_ids(ids, n, "an embedding's ids")
        return _applied(_Embedding, flat, self._terms, self.weight).view(*ids.shape, d)


def _checked_ids(ids: Tensor, n: int, what: str) -> Tensor:
    """Return ids flat and int64. ValueError unless all are integers in 0…n-1."""
    if ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"{what} must be integers, not {ids.dtype}.")
    least, most = torch.stack(ids.aminmax()).tolist() if ids.numel() else (0, 0)
    if not 0 <= least <= most < n:
        raise ValueError(f"{what} must be in 0…{n - 1}.")
    return ids.reshape(-1).long()


class _Curve(torch.autograd.Function):
    """A function of each number, by its name in the engine."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        y: Tensor
        y, slope = getattr(engine_of(x.device), name)(x)
        ctx.save_for_backward(slope)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        (slope,) = ctx.saved_tensors
        return dy * slope, None


def gelu(x: Tensor) -> Tensor:
    """Return x·Phi(x), float32 of any shape."""
    return _applied(_Curve, _check(x, "gelu"), "gelu")


class VLAGELU(nn.Module):
    """`gelu` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return gelu(x)


def silu(x: Tensor) -> Tensor:
    """Return x/(1 + exp(-x)), float32 of any shape; SwiGLU is `silu(gate) * up`."""
    return _applied(_Curve, _check(x, "silu"), "silu")


class VLASiLU(nn.Module):
    """`silu` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return silu(x)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        engine = engine_of(x.device)
        _finite(engine.row_exponents(x), "the input of softmax")
        p: Tensor = engine.softmax(x)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dp: Tensor) -> Tensor:
        p: Tensor
        (p,) = ctx.saved_tensors
        wide, g = p.double(), dp.double()
        return ((g - tree_sum(g * wide)[..., None]) * wide).float()


def softmax(x: Tensor) -> Tensor:
    """Return the softmax over the last dimension, float32."""
    flat = _check(x, "softmax").reshape(-1, x.shape[-1])
    with step_of(x):
        return _applied(_Softmax, flat).view(x.shape)


class VLASoftmax(nn.Module):
    """`softmax` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return softmax(x)


# -- the loss ------------------------------------------------------------------------------------------------


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor) -> Tensor:
        engine = engine_of(z.device)
        _finite(engine.row_exponents(z), "the logits")
        losses: Tensor
        losses, dz = engine.cross_entropy(z, y)
        ctx.save_for_backward(dz)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        (dz,) = ctx.saved_tensors
        return (dz.double() * g[:, None]).float(), None


class _Total(torch.autograd.Function):
    """Sum losses exactly on the grid 2^-32, over `count`; every token's gradient is 1/count."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, count: int) -> Tensor:
        ctx.shape, ctx.count = losses.shape, count
        mean = loss_total(losses) / ((1 << LOSS_BITS) * count)  # of whole numbers, rounded once
        return torch.tensor(mean, dtype=torch.float64, device=losses.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        return divided(g, float(ctx.count)).expand(ctx.shape), None


def loss_totals(losses: Tensor) -> list[int]:
    """Return Σ rint(loss·2^32) of each row, float64 (N, T) -> N whole numbers.

    Raises VerityError for a loss of 2^40 nats or more.
    """
    if not bool((losses.abs() < pow2f(MOST_LOSS)).all()):
        raise VerityError(f"a loss is not a number below 2^{MOST_LOSS} nats.")
    whole = (losses * pow2f(LOSS_BITS)).round()
    high = (whole * pow2f(-HALF)).floor()  # in two parts, whose sums both fit into int64
    low = whole - high * pow2f(HALF)
    sums = torch.stack([part.to(torch.int64).sum(-1, dtype=torch.int64) for part in (high, low)])
    return [(h << HALF) + rest for h, rest in zip(*sums.tolist(), strict=True)]


def loss_total(losses: Tensor) -> int:
    """Return the same of all losses, float64 of any shape."""
    return loss_totals(losses.reshape(1, -1))[0]


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
    """Return the cross-entropy of logits (…, V) float32 and targets (…), nats, float64.

    Args:
        reduction: "sum" or "mean" of all tokens, 0-dim and a multiple of 2^-32 (the sum), so that it does not
            depend on their order; "none": of each token.
    Raises:
        ValueError: a target that is no class, other shapes, or an unknown reduction.
        VerityError: a logit that is not finite, or in a sum a loss of 2^40 nats.
    """
    if reduction not in ("sum", "mean", "none"):
        raise ValueError(f"reduction={reduction!r} is unknown; it takes sum, mean, none.")
    V = logits.shape[-1]
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"logits {tuple(logits.shape)} do not go with targets {tuple(targets.shape)}.")
    y = _checked_ids(targets, V, "targets")
    with step_of(logits):
        losses = _applied(_TokenLosses, _check(logits, "cross_entropy").reshape(-1, V), y)
        if reduction == "none":
            return losses.view(targets.shape)
        return _applied(_Total, losses, losses.numel() if reduction == "mean" else 1)

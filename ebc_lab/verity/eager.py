"""What the operations are made of, by torch alone, one IEEE operation a kernel, on a CPU or a GPU.

`native` has the same functions in C with the same bits. N tokens, K inputs, M outputs, B sequences of T
tokens, H heads of D features. An exponent of `NOT_FINITE` says that a value is NaN or infinite; whoever asked
for the exponents looks at them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .bits import divided, exponent, largest, pow2, pow2f, tree_sum
from .functions import exp64, gelu64, log64, silu64, sqrt64


def max_exponent(x: Tensor) -> int:
    """Return e of the largest |x| of all."""
    return int(exponent(largest(x)))


def row_exponents(x: Tensor) -> Tensor:
    """Return e of each row's largest |x|, (N, K) float32 -> (N,) int64."""
    return exponent(x.abs().amax(-1)) if x.shape[-1] else x.new_zeros(len(x), dtype=torch.int64)


def quantize_rows(x: Tensor, e: Tensor, bits: int) -> Tensor:
    """Return rint(x·2^(bits-e)), (N, K) float32 and (N,) int64 -> integers (N, K) float64."""
    return x.double().mul_(pow2(bits - e)[:, None]).round_()


def scaled_rows(P: Tensor, e: Tensor, s: int, bias: Tensor | None) -> Tensor:
    """Return P·2^(e_i + s), + bias_j, in float64, then rounded: (N, M), (N,), (M,) -> (N, M) float32."""
    y = P * pow2(e + s)[:, None]
    return (y if bias is None else y + bias.double()).float()


def add_integers(S: Tensor, P: Tensor) -> None:
    """Do S += P, of int64 and of integers in float64."""
    S.add_(P.to(torch.int64))


def sum_rows(terms: Tensor, shift: int, out: Tensor) -> None:
    """Do out_j += Σ_n rint(terms_nj·2^shift), (N, M) -> (M,) int64."""
    out.add_((terms.double() * pow2f(shift)).round_().to(torch.int64).sum(0, dtype=torch.int64))


def sum_rows_by_id(terms: Tensor, ids: Tensor, shift: int, out: Tensor) -> None:
    """Do out_ij += the same over the rows n with id i, (N, M) float32, (N,) int64 -> (V, M) int64."""
    out.index_add_(0, ids, (terms.double() * pow2f(shift)).round_().to(torch.int64))


def layer_norm(
    x: Tensor, w: Tensor, bias: Tensor | None, eps: float, centred: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (N, d) float32, mean and 1/deviation (N,) float64 of rows (N, d); gain and bias are (d,).

    Not `centred`, a mean of 0 stands for the rows' own: RMSNorm.
    """
    wide = x.double()
    d = float(x.shape[-1])
    mean = divided(tree_sum(wide), d) if centred else wide.new_zeros(len(x))
    c = wide - mean[:, None]
    v = divided(tree_sum(c * c), d) + eps
    rstd = divided(torch.ones_like(v), sqrt64(v))
    y = (c * rstd[:, None]) * w.double()
    return (y if bias is None else y + bias.double()).float(), mean, rstd


def layer_norm_backward(
    dy: Tensor, x: Tensor, w: Tensor, mean: Tensor, rstd: Tensor, centred: bool = True
) -> tuple[Tensor, Tensor]:
    """Return dx (N, d) float32, and the terms of the gain's gradient, (N, d) float64."""
    wide = dy.double()
    d = float(x.shape[-1])
    h = (x.double() - mean[:, None]) * rstd[:, None]
    g = wide * w.double()
    b = divided(tree_sum(g * h), d)[:, None]
    centre = g - divided(tree_sum(g), d)[:, None] if centred else g
    dx = (centre - h * b) * rstd[:, None]
    return dx.float(), wide * h


def gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x·Phi(x) and its derivative, float32 of any shape."""
    y, slope = gelu64(x.double())
    return y.float(), slope.float()


def silu(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x·sigma(x) and its derivative, float32 of any shape."""
    y, slope = silu64(x.double())
    return y.float(), slope.float()


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn each pair (x_i, x_(i+D/2)) of a head, (B·T, H·D) float32 by the angles of (T, D/2) float64."""
    T, half = cosine.shape
    a, b = x.double().view(-1, T, x.shape[1] // (2 * half), 2, half).unbind(3)
    c, s = cosine[:, None], sine[:, None]
    return torch.stack([a * c - b * s, b * c + a * s], 3).float().view(x.shape)


def heads(x: Tensor, B: int, n: int, H: int, bits: int) -> tuple[Tensor, Tensor]:
    """Quantize n tensors (B·T, n·H·D) float32 -> integers (n, B·H, T, D) float64 and exponents (n, B·H)."""
    N, width = x.shape
    T, D = N // B, width // (n * H)
    parted = x.view(B, T, n, H, D).permute(2, 0, 3, 1, 4).reshape(n * B * H, T * D)
    e = row_exponents(parted)
    return quantize_rows(parted, e, bits).view(n, B * H, T, D), e.view(n, B * H)


def merged(P: Sequence[Tensor], s: Tensor, B: int, H: int) -> Tensor:
    """Go the way back: n tensors (B·H, T, D) float64, each times 2^s, (n, B·H) -> (B·T, n·H·D) float32."""
    n = len(P)
    _, T, D = P[0].shape
    y = torch.stack(list(P)) * pow2(s)[..., None, None]
    return y.float().view(n, B, H, T, D).permute(1, 3, 0, 2, 4).reshape(B * T, n * H * D)


def causal_softmax(Z: Tensor, s: Tensor, alpha: float, bits: int) -> tuple[Tensor, Tensor]:
    """Turn scores Z·2^s·alpha, (B·H, T, T) integers and (B·H,), into p float32 and rint(p·2^bits) float64."""
    z = (Z * pow2(s)[:, None, None]) * alpha
    at = torch.arange(Z.shape[-1], device=Z.device)
    seen = at[:, None] >= at  # where token i sees token j
    z = torch.where(seen, z, -torch.inf)
    e = torch.where(seen, exp64((z - z.amax(-1, keepdim=True)).clamp_(min=-1000.0)), 0.0)
    p = divided(e, tree_sum(e)[..., None]).float()
    return p, (p.double() * pow2f(bits)).round_()


def causal_softmax_backward(
    dP: Tensor, s: Tensor, p: Tensor, alpha: float, bits: int
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the scores before alpha from dP·2^s and p: integers and exponents."""
    dp = dP * pow2(s)[:, None, None]
    wide = p.double()
    ds = (((dp - tree_sum(dp * wide)[..., None]) * wide) * alpha).float()
    flat = ds.flatten(1)
    e = row_exponents(flat)
    return quantize_rows(flat, e, bits).view(dP.shape), e


def softmax(x: Tensor) -> Tensor:
    """Return the softmax over the last dimension, (N, V) float32 -> float32."""
    wide = x.double()
    e = exp64(wide - wide.amax(-1, keepdim=True))
    return divided(e, tree_sum(e)[..., None]).float()


def cross_entropy(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return each token's loss, (N,) float64, and gradient (N, V) float32; logits (N, V), targets (N,)."""
    wide = z.double()
    m = wide.amax(-1, keepdim=True)
    e = exp64(wide - m)
    S = tree_sum(e)
    loss = (log64(S) + m[:, 0]) - wide.gather(1, y[:, None])[:, 0]
    p = divided(e, S[:, None])
    hit = torch.arange(z.shape[-1], device=z.device) == y[:, None]
    return loss, torch.where(hit, p - 1.0, p).float()


def adam(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    c1: float,
    c2: float,
) -> None:
    """Do one step of Adam on float32 tensors, in place; decay = lr·wd, c1 = 1 - beta1^t, c2 = 1 - beta2^t."""
    wide = g.double()
    first = (m.double() * beta1 + wide * (1.0 - beta1)).float()
    second = (v.double() * beta2 + (wide * wide) * (1.0 - beta2)).float()
    m.copy_(first)
    v.copy_(second)
    at = w.double()
    if decay:
        at = at - at * decay
    root = sqrt64(divided(second.double(), c2)) + eps
    w.copy_((at - divided(divided(first.double(), c1), root) * lr).float())

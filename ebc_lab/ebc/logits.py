"""How far predictions moved: the geometry of logits (docs/method.md, "Symbols").

All functions take logits of shape (..., V), V the vocabulary, and treat every leading position as one token.
`mask`, of the leading shape, keeps the tokens where it is true. Reductions run in float32 or better.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _float32_at_least(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def token_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of `values` (one for each token, any shape) -> 0-dim; over the tokens of `mask` if given."""
    if mask is None:
        return values.mean()
    counted = mask.bool()
    return torch.where(counted, values, 0).sum() / counted.sum()  # not a product: padding may hold NaN


def mean_cross_entropy(z: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of logits (..., V) with class indices (...), float32 or better, nats per token."""
    losses = F.cross_entropy(_float32_at_least(z).flatten(0, -2), targets.flatten(), reduction="none")
    return token_mean(losses.view(targets.shape), mask)


def centre(x: Tensor) -> Tensor:
    """`x` (..., V) minus its mean over V, token by token: the part of the logits that softmax can see."""
    x = _float32_at_least(x)
    return x - x.mean(-1, keepdim=True)


def rms_norm(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """sqrt of the mean over tokens of the squared L2 norm over V; (..., V) -> 0-dim, logits per token."""
    return token_mean(_float32_at_least(x).square().sum(-1), mask).sqrt()


def mean_kl(z: Tensor, z_new: Tensor, mask: Tensor | None = None, look: bool = True) -> Tensor:
    """Mean over tokens of KL(softmax(z) || softmax(z_new)); (..., V) twice -> 0-dim, nats per token.

    With d = z_new - z, less its mean under p = softmax(z), the KL is ln(1 + Σ p·(e^d - 1)): no digits of a
    small step cancel. Where that is not finite, as where the vocabulary is masked, it is Σ p·(ln p - ln q).
    Rounding can make it slightly negative. `look`: whether the host may look at the first of them before the
    second is computed.
    """
    z, z_new = _float32_at_least(z), _float32_at_least(z_new)
    p = z.softmax(-1)
    d = z_new - z
    d = d - (p * d).sum(-1, keepdim=True)
    kl = token_mean((p * d.expm1()).sum(-1).log1p(), mask)
    if look and math.isfinite(kl):
        return kl
    log_p = z.log_softmax(-1)
    # p is 0 where the vocabulary is masked; one that is NaN must show
    terms = torch.where(p == 0, 0, p * (log_p - z_new.log_softmax(-1)))
    return torch.where(kl.isfinite(), kl, token_mean(terms.sum(-1), mask))


def overconfidence(z: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """d(loss)/d(ln s) of logits s·z at s = 1, over its standard error: too bold where > 0; 0-dim, no unit.

    Logits (..., V) and targets (...); negative targets and what `mask` drops do not count. NaN for fewer
    than two tokens.
    """
    z = _float32_at_least(z)
    label = z.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    p = z.softmax(-1)
    excess = torch.where(p > 0, p * z, 0).sum(-1) - label  # p = 0 where the vocabulary is masked
    counted = targets >= 0 if mask is None else (targets >= 0) & mask.bool()
    count = counted.sum()
    mean = token_mean(excess, counted)
    variance = token_mean((excess - mean).square(), counted) / (count - 1)
    return mean / variance.sqrt()


def half_fisher(z: Tensor, dz: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of ½·Var(dz) under softmax(z), the KL to second order; 0-dim, nats per token."""
    p = _float32_at_least(z).softmax(-1)
    dz = _float32_at_least(dz)
    mean = (p * dz).sum(-1, keepdim=True)
    return 0.5 * token_mean((p * (dz - mean).square()).sum(-1), mask)

"""`Arithmetic`: what an optimizer that budgets its updates measures, with bits that no machine changes.

It has the methods that `ebc_lab.ebc` asks of its `arithmetic`: norms and slopes as trees of float64 sums, KLs
from `exp64` and `log64`, means over tokens as integer sums, so that neither the order of the rows nor the
layout of the weights in memory matters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .bits import VerityError, divided, exponent, largest, lg, pow2, pow2f, tree_sum
from .functions import exp64, log64, sqrt64

KL_BITS = 40  # a token's KL is a whole number of 2^-40 nats in the mean
SUM_BITS = 62  # what a sum of integers may reach
MOST_SHIFT = 1000
PIECE = 2**18  # elements that are interpolated at once, which bounds the memory for them in float64


class Arithmetic:
    """For `EllipsotopeClip(…, arithmetic=Arithmetic())`. It has no state.

    Tensors may be float32 or float64, logits (..., V) and masks (...). Results are 0-dim float64 on the
    tensors' device, and nothing is read on the host. A value that is not finite makes the result NaN or
    infinite, and raises nothing.
    """

    refusals: tuple[type[Exception], ...] = (VerityError,)  # of a forward: its logits count as NaN

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the L2 norm of all elements: root of the tree sum, over tensors, of tree sums of squares."""
        if not tensors:
            return torch.zeros((), dtype=torch.float64)
        return sqrt64(_total(wide * wide for wide in (t.double() for t in tensors)))

    def slope(self, gradients: Sequence[Tensor], old: Sequence[Tensor], new: Sequence[Tensor]) -> Tensor:
        """Return <gradients, new - old>: g·(new - old) element by element, summed as in `norm`."""
        triples = zip(gradients, old, new, strict=True)
        return _total(g.double() * (b.double() - a.double()) for g, a, b in triples)

    def mean_kl(self, z: Tensor, z_new: Tensor, mask: Tensor | None = None, look: bool = True) -> Tensor:
        """Return the mean over tokens of KL(softmax(z) || softmax(z_new)), nats per token.

        For each token u = z - max, S = tree_sum(exp64(u)), p = exp64(u)/S, ln p = u - log64(S), ln q
        likewise, and KL = tree_sum(p·(ln p - ln q)), without the terms where p = 0. The mean is
        Σ rint(KL·2^40)·2^-40 over the number of tokens. It is infinite where a token's KL is above 2^22 nats
        over the number of positions rounded up to a power of two: the sum might not fit.
        """
        p, log_p = _softmax(z)
        _, log_q = _softmax(z_new)
        terms = torch.where(p == 0, 0.0, p * (log_p - log_q))
        return _mean(tree_sum(terms), mask, KL_BITS)

    def movement(self, z: Tensor, z_new: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the root of the mean over tokens of |d - mean(d)|² with d = z_new - z; logits per token.

        For each token d = z_new - z, c = d - tree_sum(d)/V, and the square is tree_sum(c·c). The mean is as
        that of KLs, but with a scale that fits the largest token.
        """
        d = z_new.double() - z.double()
        c = d - divided(tree_sum(d), float(d.shape[-1]))[..., None]
        return sqrt64(_mean(tree_sum(c * c), mask, None))

    def interpolate(
        self, old: Sequence[Tensor], new: Sequence[Tensor], c: Tensor | float, out: Sequence[Tensor]
    ) -> None:
        """Set each of `out` to old + (new - old)·c, three operations in float64, then rounded to its type.

        At c = 0 it is old and at c = 1 new, bit for bit. `out` may be `new` or `old`. c is 0-dim.
        """
        for a, b, to in zip(old, new, out, strict=True):
            share = torch.as_tensor(c, dtype=torch.float64, device=b.device)
            for start, end, place in zip(_pieces(a), _pieces(b), _pieces(to), strict=True):
                wide = start.double()
                moved = (((end.double() - wide) * share) + wide).to(place.dtype)
                place.copy_(torch.where(share == 0, start, torch.where(share == 1, end, moved)))


def _total(terms: Iterable[Tensor]) -> Tensor:
    """Return the tree sum, over some tensors, of the tree sums of their elements."""
    return tree_sum(torch.stack([tree_sum(t.reshape(-1)) for t in terms]))


def _softmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return p and ln p, float64 (..., V)."""
    u = z.double()
    u = u - u.amax(-1, keepdim=True)
    e = exp64(u)
    S = tree_sum(e)[..., None]
    return divided(e, S), u - log64(S)


def _mean(values: Tensor, mask: Tensor | None, bits: int | None) -> Tensor:
    """Return the mean of float64 values, those in `mask` if given, summed as integers of 2^-bits; 0-dim.

    Without `bits`, as fine as the largest value allows. NaN and infinite values, and those too large for
    such a sum, make it NaN or infinite.
    """
    counted = values if mask is None else torch.where(mask.bool(), values, 0.0)
    room = SUM_BITS - lg(max(1, counted.numel()))
    top = largest(counted)
    if bits is None:
        shift = (room - exponent(top)).clamp(max=MOST_SHIFT)
    else:
        shift = torch.full_like(top, bits, dtype=torch.int64)
    scaled = counted * pow2(shift)
    fits = scaled.abs() <= pow2f(room)
    total = torch.where(fits, scaled, 0.0).round().to(torch.int64).sum(dtype=torch.int64)
    count = float(counted.numel()) if mask is None else mask.bool().sum(dtype=torch.int64).double()
    mean = divided(total.double() * pow2(-shift), count)
    return torch.where(top * pow2(shift) <= pow2f(room), mean, top * torch.inf)


def _pieces(x: Tensor) -> Iterator[Tensor]:
    """Yield views of parts of a tensor."""
    x = torch.atleast_1d(x)
    yield from x.split(max(1, PIECE * len(x) // max(1, x.numel())))

"""What `components.optimizer` makes of torch's Muon, which is slow, and of its Adafactor, which breaks the
contract there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class StackedMuon(torch.optim.Muon):
    """torch's Muon, with one batch of Newton–Schulz products for all matrices of one shape or its transpose.

    State, defaults and formula are torch's, with Nesterov momentum and `adjust_lr_fn` of `original` (Jordan
    et al. 2024) or `match_rms_adamw` (Liu et al., arXiv:2502.16982) only.
    Set `precision` to float32 where bfloat16 products, which torch's Muon takes everywhere, are the slower
    ones: on a CPU without AMX they take twice as long. The updates agree up to rounding.
    """

    precision = torch.bfloat16  # of the products

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        # as in torch's fused optimizers: where it is 1, nothing may change
        bad = getattr(self, "found_inf", None)
        for group in self.param_groups:
            stacks: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    stacks.setdefault(tuple(sorted(p.shape)), []).append(p)
            for (_, long), matrices in stacks.items():
                updates = orthogonal(self._momenta(matrices, group, bad).to(self.precision), group)
                by_shape = group["adjust_lr_fn"] == "original"
                rates = {p.shape: _rate(p.shape, group, bad) for p in matrices} if by_shape else {}
                rate = 0.0 if by_shape else _rate((1, long), group, bad)
                decay = group["lr"] * group["weight_decay"]
                if bad is not None:
                    decay = decay * (1 - bad)
                if group["weight_decay"]:
                    torch._foreach_mul_(tuple(matrices), 1 - decay)
                for p, u in zip(matrices, updates, strict=True):
                    turned = u if u.shape == p.shape else u.T
                    rate = rates.get(p.shape, rate)
                    if isinstance(rate, Tensor):
                        p.addcmul_(turned.to(p.dtype), rate, value=-1)
                    else:
                        p.add_(turned, alpha=-rate)

    def _momenta(self, matrices: list[nn.Parameter], group: dict[str, Any], bad: Tensor | None) -> Tensor:
        """The Nesterov momenta after this step's gradients, transposed if tall, (n, short, long)."""
        gradients = [p.grad for p in matrices if p.grad is not None]
        for p in matrices:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in matrices]
        weight = 1 - group["momentum"]
        if bad is None:
            torch._foreach_lerp_(buffers, gradients, weight)
            return _stacked(torch._foreach_lerp(gradients, buffers, group["momentum"]))
        stacked = _stacked(buffers)
        new = _stacked(gradients)
        new = torch.where(bad > 0, stacked, new)
        stacked = stacked.lerp(new, weight)
        back = [h if h.shape == b.shape else h.T for h, b in zip(stacked, buffers, strict=True)]
        torch._foreach_copy_(buffers, back)
        return new.lerp(stacked, group["momentum"])


def _rate(shape: Sequence[int], group: dict[str, Any], bad: Tensor | None) -> Any:
    """The factor on the orthogonal update of a matrix; 0 where `bad` is 1."""
    if group["adjust_lr_fn"] == "original":
        rate = group["lr"] * math.sqrt(max(1, shape[0] / shape[1]))
    else:
        rate = group["lr"] * 0.2 * math.sqrt(max(shape))
    return rate if bad is None else rate * (1 - bad)


def _stacked(matrices: Sequence[Tensor]) -> Tensor:
    """Matrices of one shape or its transpose, as a stack (n, short, long)."""
    return torch.stack([m if m.shape[0] <= m.shape[1] else m.T for m in matrices])


def orthogonal(x: Tensor, group: dict[str, Any]) -> Tensor:
    """Orthogonalise matrices (n, short, long) by Newton–Schulz, x ← (a + b·xxᵀ + c·(xxᵀ)²)x, in their dtype.

    All iterates have the singular vectors of the first. So in float32 those of long matrices are polynomials
    of its Gram matrix, which is short, and only the last one is multiplied with x: half the products at
    (128, 512). In bfloat16 that would lose the small singular values.
    """
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=group["eps"])
    short, long = x.shape[-2:]
    if x.dtype == torch.bfloat16 or 2 * long <= 3 * short:
        a, b, c = group["ns_coefficients"]
        for _ in range(group["ns_steps"]):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x
    gram = x @ x.mT  # of the present iterate, which is product @ x
    product = factor = _polynomial(gram, *group["ns_coefficients"])
    for _ in range(group["ns_steps"] - 1):
        gram = factor @ gram @ factor
        factor = _polynomial(gram, *group["ns_coefficients"])
        product = factor @ product
    return product @ x


def _polynomial(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """Return a + b·gram + c·gram² of matrices (n, m, m)."""
    polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
    return polynomial


class UncappedAdafactor(torch.optim.Adafactor):
    """torch's Adafactor without its cap of the learning rate at 1/sqrt(step); decoupled weight decay.

    lr is relative, as in torch: a tensor moves by lr·max(1e-3, rms(W)) times an update whose rms is at most
    1. If torch caps lr, the movement is stretched back afterwards, which costs a copy of the tensor on those
    steps only.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        capped = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    step = 1 + float(self.state[p].get("step", 0))
                    stretch = group["lr"] * math.sqrt(step)
                    if stretch > 1:
                        capped.append((p, p * (1 - group["lr"] * group["weight_decay"]), stretch))
        super().step()  # type: ignore[no-untyped-call]
        for p, decayed, stretch in capped:
            p.copy_(decayed.lerp_(p, stretch))

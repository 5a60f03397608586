"""AdaGC, which clips each tensor's gradient by what its own norm has been."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ebc_lab.ebc import StepStats
from ebc_lab.ebc.energy.record import tensor_norms
from ebc_lab.ebc.flat import joint_norm

from .rivals import Rival, share


class AdaGC(Rival):
    """Each tensor's gradient norm is at most `strength` times its own running average.

    Wang et al., arXiv:2502.11034. The average (`beta`) is over the norms after clipping. The first steps, up
    to `warm_up`, clip the global norm to `global_norm`, and the average starts from the smallest norm that
    each tensor had then. The whole tensor is scaled, by one factor.

    Where it differs from `pytorch_optimizer.AdaGC`, which is Adam with this clip: a norm of zero does not
    count as the smallest one. A tensor whose gradient vanishes at the start, as behind a matrix of zeros,
    would never move again.
    """

    default = 1.05
    beta = 0.98
    warm_up = 100  # the first step that is clipped tensor by tensor, counted from 1
    global_norm = 1.0
    eps = 1e-8  # of the library, under every norm that is divided by

    def __init__(self, model: nn.Module, optimizers: Optimizer | Sequence[Optimizer], **options: Any):
        super().__init__(model, optimizers, **options)
        self.seen = 0  # steps
        self.usual = self._unknown()  # the norm that each tensor has had; inf: none yet

    def _unknown(self) -> Tensor:
        return torch.full((len(self.weights),), torch.inf, device=self.weights[0].device)

    def _weights_changed(self) -> None:
        self.usual = self._unknown()

    def _move(self, device: torch.device) -> None:
        super()._move(device)
        self.usual = self.usual.to(device)

    def _own_state(self) -> dict[str, Any]:
        return {"seen": torch.tensor(self.seen), "usual": self.usual.clone()}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        self.seen = int(state["seen"])
        self.usual = state["usual"].to(self.usual.device, copy=True)

    def _limit_gradients(self, stats: StepStats, gradients: list[Tensor]) -> None:
        stats.gradient_scale = torch.ones_like(self._one)
        self.seen += 1
        if not gradients:
            return
        at = [i for i, p in enumerate(self.weights) if p.grad is not None]
        usual = self.usual[at]
        early = ~usual.isfinite() | (self.seen < self.warm_up)
        norms = tensor_norms(gradients).float()
        together = torch.clamp(self.global_norm / (stats.grad_norm + self.eps), max=1).to(norms.dtype)
        allowed = self.strength * usual.clamp(min=self.eps) / norms.clamp(min=self.eps)
        factors = torch.where(early, together, allowed.clamp(max=1))
        torch._foreach_mul_(gradients, list(factors.unbind()))

        clipped = tensor_norms(gradients).float()
        smallest = torch.where(clipped > 0, torch.minimum(usual, clipped), usual)
        self.usual[at] = torch.where(early, smallest, torch.lerp(usual, clipped, 1 - self.beta))
        stats.gradient_scale = share(joint_norm(gradients), stats.grad_norm)

"""Projections of the weights onto a convex set, applied inside the proposal: dW becomes P(W + dW) - W."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .config import ProjectionConfig
from .model import hidden_matrices


def norm_bound(stack: Tensor, squarings: int = 5) -> Tensor:
    """An upper bound of the operator norm of each matrix of `stack` (n, a, b), within a few per cent, without an SVD.

    ||W||_2 <= ||(W W^T)^(2^k)||_F^(1/2^(k+1)), each square normalised so that it cannot overflow. -> (n,)
    """
    gram = stack @ stack.mT if stack.shape[-2] <= stack.shape[-1] else stack.mT @ stack
    log_norm = torch.zeros(len(stack), dtype=torch.float64, device=stack.device)
    power = 1.0
    for _ in range(squarings):
        size = torch.linalg.matrix_norm(gram).clamp(min=1e-30)
        log_norm += size.double().log() * power
        gram = gram / size[:, None, None]
        gram = gram @ gram
        power /= 2
    log_norm += torch.linalg.matrix_norm(gram).clamp(min=1e-30).double().log() * power
    return (log_norm / 2).exp()


class Spectral:
    """Operator norm of each hidden matrix at most `bound` times its largest initial singular value.

    The exact (Frobenius-nearest) projection clips singular values. An SVD is made only for matrices that a cheap upper bound
    does not already clear.
    """

    def __init__(self, matrices: Sequence[Tensor], bound: float):
        shapes: dict[tuple[int, ...], list[Tensor]] = {}
        for m in matrices:
            shapes.setdefault(tuple(m.shape), []).append(m)
        self.stacks = list(shapes.values())
        with torch.no_grad():
            self.limits = [bound * torch.linalg.matrix_norm(torch.stack(ms), ord=2) for ms in self.stacks]

    @torch.no_grad()
    def __call__(self) -> None:
        for matrices, limits in zip(self.stacks, self.limits, strict=True):
            suspect = (norm_bound(torch.stack(matrices)) * (1 + 1e-4) > limits).nonzero().flatten().tolist()
            for i in suspect:
                u, s, vh = torch.linalg.svd(matrices[i], full_matrices=False)
                if s[0] > limits[i]:
                    matrices[i].copy_((u * s.clamp(max=limits[i])) @ vh)


def none(model: nn.Module, config: ProjectionConfig) -> None:
    return None


def spectral(model: nn.Module, config: ProjectionConfig) -> Callable[[], None]:
    return Spectral(hidden_matrices(model), config.bound)


PROJECTIONS: dict[str, Callable[[nn.Module, ProjectionConfig], Callable[[], None] | None]] = {
    "none": none,
    "spectral": spectral,
}


def build(model: nn.Module, config: ProjectionConfig) -> Callable[[], None] | None:
    """The projection of `model`, to be built while it holds its initial weights; None for `none`."""
    return PROJECTIONS[config.name](model, config)

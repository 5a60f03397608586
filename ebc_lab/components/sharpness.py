"""`sharpness_every`: the largest eigenvalue of the Hessian of the training loss, beside a run that it leaves
as it is.

Lanczos' iteration (Lanczos 1950) with Hessian-vector products (Pearlmutter 1994), which starts where it ended
last: the sharpest direction turns slowly. Power iteration, at the same price, takes longer, and finds a
negative eigenvalue where that is the largest in size, as in runs that went astray. Sharpness and the edge of
stability: Cohen et al., arXiv:2103.00065; under Adam that of the Hessian between two factors P^(-1/2),
P = sqrt(v) + eps: Cohen et al., arXiv:2207.14484.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ebc_lab.config.schema import RunConfig
from ebc_lab.ebc import StepInputs
from ebc_lab.workloads.losses import token_losses

from .hook import Built, Hook

PRODUCTS = 8  # with the Hessian, in a measurement: from the last vector on, so that few are enough
SHARPNESS, PRECONDITIONED = "sharpness", "preconditioned_sharpness"

Product = Callable[[Tensor], Tensor]  # (n,) -> (n,), linear and symmetric


class Sharpness(Hook):
    """Measures the sharpness on the leading rows of the batch, as many as an audit needs, before the step.

    In float32 outside autocast, without dropout. With torch's Adam on all weights the preconditioned one,
    too, by the second moments of the step before.
    """

    name = "sharpness"

    def __init__(self, run: RunConfig, built: Built):
        self.every = run.sharpness_every
        self.rows = math.ceil(run.audit_tokens / run.model.context)
        self.optimizer = built.optimizer
        self.weights = list(built.optimizer.weights)
        adam = all(isinstance(base, torch.optim.Adam) for base in self.optimizer.bases)
        self.columns = (SHARPNESS, PRECONDITIONED) if adam else (SHARPNESS,)
        # of its own generator: training draws what it would have drawn
        draw = torch.Generator().manual_seed(run.seed)
        first = torch.randn(sum(p.numel() for p in self.weights), generator=draw).to(self.weights[0].device)
        self.vectors = dict.fromkeys(self.columns, first)

    @classmethod
    def acts(cls, run: RunConfig) -> bool:
        return run.sharpness_every > 0

    def event_at(self, t: int) -> bool:
        return t % self.every == 0

    def before(self, t: int, batch: StepInputs) -> dict[str, Tensor]:
        """Measure at W, on the batch of the step."""
        if not self.event_at(t):
            return {}
        found = {}
        with ExitStack() as stack:
            stack.enter_context(self.optimizer.prober.measuring())
            stack.enter_context(torch.autocast(self.weights[0].device.type, enabled=False))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # fused attention has no second derivative
            product = self._hessian(batch)
            for column, scale in self._scales().items():
                scaled = _between(product, scale)
                found[column], self.vectors[column] = largest_eigenvalue(
                    scaled, self.vectors[column], PRODUCTS
                )
        return found

    def _hessian(self, batch: StepInputs) -> Product:
        """Return what multiplies the Hessian of the loss at W with a vector."""
        assert batch.targets is not None
        inputs, targets = batch.tokens[: self.rows], batch.targets[: self.rows]
        with torch.enable_grad():
            loss = token_losses(self.optimizer.prober(inputs), targets).mean()
            gradient = _flat(
                torch.autograd.grad(loss, self.weights, create_graph=True, materialize_grads=True)
            )

        def product(vector: Tensor) -> Tensor:
            along = torch.autograd.grad(
                gradient, self.weights, vector, retain_graph=True, materialize_grads=True
            )
            return _flat(along)

        return product

    def _scales(self) -> dict[str, Tensor | None]:
        """Return each column's factor on both sides of the Hessian; None: 1."""
        scales: dict[str, Tensor | None] = {SHARPNESS: None}
        states = [base.state[p] for base in self.optimizer.bases for p in self.weights if p in base.state]
        if PRECONDITIONED in self.columns and len(states) == len(self.weights):
            scales[PRECONDITIONED] = _flat([self._factor(p) for p in self.weights])
        return scales

    @torch.no_grad()
    def _factor(self, p: Tensor) -> Tensor:
        """P^(-1/2) of Adam for one weight."""
        base = next(base for base in self.optimizer.bases if p in base.state)
        group = next(g for g in base.param_groups if any(q is p for q in g["params"]))
        state = base.state[p]
        corrected = state["exp_avg_sq"] / (1 - group["betas"][1] ** state["step"])
        factor: Tensor = (corrected.sqrt() + group["eps"]).rsqrt()
        return factor

    def state_dict(self) -> dict[str, Any]:
        return dict(self.vectors)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        shapes = {column: vector.shape for column, vector in self.vectors.items()}
        if {column: getattr(vector, "shape", None) for column, vector in state.items()} != shapes:
            raise ValueError("its vectors are not this run's")
        self.vectors = {column: vector.to(self.weights[0].device) for column, vector in state.items()}


HOOK = Sharpness


def largest_eigenvalue(product: Product, vector: Tensor, products: int) -> tuple[Tensor, Tensor]:
    """Find the largest eigenvalue of a symmetric matrix by Lanczos' iteration from `vector`.

    -> the largest Ritz value, 0-dim float64, and its vector, of norm 1. Where they are not finite: NaN, and
    `vector`.
    """
    basis: list[Tensor] = []
    images: list[Tensor] = []
    following = vector
    for _ in range(products):
        norm = torch.linalg.vector_norm(following)
        if norm == 0:
            break  # the basis holds all that the matrix makes of the vector
        basis.append(following / norm)
        images.append(product(basis[-1]))
        following = images[-1]
        for _ in range(2):  # once more, for what rounding leaves of the first time
            for known in basis:
                following = following - torch.dot(known, following) * known
    rows = torch.stack(basis)
    small = (rows @ torch.stack(images).T).double()
    if not torch.isfinite(small).all():
        return torch.full((), torch.nan, dtype=torch.float64, device=vector.device), vector
    values, vectors = torch.linalg.eigh((small + small.T) / 2)
    return values[-1], vectors[:, -1].to(rows.dtype) @ rows


def _between(product: Product, scale: Tensor | None) -> Product:
    """Return the product of diag(scale) · the matrix · diag(scale)."""
    return product if scale is None else lambda vector: scale * product(scale * vector)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])

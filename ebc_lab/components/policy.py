"""A policy in a run: factors on the learning rate and on the trust radius, chosen at every step.

The policies themselves are in `ebc_lab.lowbit.policy` (docs/lowbit.md). Everything here reads values on the
host, so that a run with a policy is not captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ebc_lab.config.parts.policy import PolicyConfig
from ebc_lab.config.schema import RunConfig
from ebc_lab.ebc import StepStats
from ebc_lab.ebc.flat import joint_norm
from ebc_lab.ebc.options import CLIPPED_BELOW
from ebc_lab.lowbit.policy import Observed, make_policy

from .hook import Built, Hook


class Steering(Hook):
    """A run's policy, with what it is fed: the step before, and how the new gradient judges it."""

    part = PolicyConfig
    name = "steering"
    graphed = False
    columns = ("lr_factor", "radius_factor")

    def __init__(self, run: RunConfig, built: Built):
        self.policy = make_policy(PolicyConfig.from_run(run).name, run.seed)
        self.steps = run.steps
        self.optimizer = built.optimizer
        self.update: list[Tensor] | None = None  # the last one applied; None: skipped, or there was none
        self.update_norm = 0.0
        self.clipped = False

    def gradients(self, t: int, loss: Tensor, lr: float) -> dict[str, Tensor]:
        """Judge the last update by the gradient, then set the step's learning rate, `lr` times the policy's
        factor, and its radius."""
        weights = self.optimizer.weights
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in weights]
        length = joint_norm(gradients)
        dot = length if self.update is None else _dot(gradients, self.update)
        norm, along, observed = _on_host(length, dot, loss.detach())
        if self.update is not None and norm > 0 and self.update_norm > 0:
            self.policy.feedback(along / (norm * self.update_norm), self.clipped)
        progress = t / self.steps
        seen = Observed(observed, norm, self.update_norm, progress, self.clipped)
        on_rate, on_radius = self.policy.factors(t, seen)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * on_rate
        self.optimizer.radius_factor = on_radius
        self.update = [p.detach().clone() for p in weights]  # W, until the step is taken
        number = partial(torch.full, (), dtype=torch.float64, device=loss.device)
        return {"lr_factor": number(on_rate), "radius_factor": number(on_radius)}

    @torch.no_grad()
    def after(self, t: int, stats: StepStats) -> dict[str, Tensor]:
        """Keep what was applied."""
        assert self.update is not None
        update = list(torch._foreach_sub(list[Tensor](self.optimizer.weights), self.update))
        skipped, norm, c = _on_host(stats.skipped, joint_norm(update), stats.clip_coefficient)
        if skipped:
            self.update = None
            return {}
        self.update, self.update_norm, self.clipped = update, norm, c < CLIPPED_BELOW
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "policy": self.policy.state_dict(),
            "update": self.update,
            "update_norm": self.update_norm,
            "clipped": self.clipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy.load_state_dict(state["policy"])
        update = state["update"]
        devices = [p.device for p in self.optimizer.weights]
        self.update = None if update is None else [u.to(d) for u, d in zip(update, devices, strict=True)]
        self.update_norm = state["update_norm"]
        self.clipped = state["clipped"]


HOOK = Steering


def _on_host(*numbers: Tensor | float) -> list[float]:
    """Read 0-dim tensors of one device, of any real dtype, in one look: a GPU is waited for once."""
    return torch.stack([torch.as_tensor(number, dtype=torch.float64) for number in numbers]).tolist()


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    parts = [torch.dot(x.flatten().double(), y.flatten().double()) for x, y in zip(a, b, strict=True)]
    return torch.stack(parts).sum()

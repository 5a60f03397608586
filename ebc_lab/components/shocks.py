"""One disturbance at one step, to see how a stabilizer recovers: wrong labels, a rate spike, a bad gradient.

Each is a function of the run's seed alone, so that paired runs get the same one. `shock` is None at all other
steps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from ebc_lab.config.parts.shock import ShockConfig
from ebc_lab.config.schema import RunConfig


def step_of(run: RunConfig) -> int:
    """The step (0-based) at which the run's shock strikes."""
    return run.steps // 2 if run.shock.step is None else run.shock.step


def strikes(run: RunConfig, step: int) -> bool:
    return run.shock.name != "none" and step == step_of(run)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed + 0x5EED)


def learning_rate(shock: ShockConfig | None, lr: float) -> float:
    """The scheduled rate, or `size` times it."""
    return lr * shock.size if shock and shock.name == "lr_spike" else lr


def targets(shock: ShockConfig | None, targets: Tensor, vocabulary: int, seed: int) -> Tensor:
    """Targets (B, T), or the same with a share `size` of them drawn uniformly from the vocabulary."""
    if not shock or shock.name != "label_noise":
        return targets
    draw = _generator(seed)
    wrong = torch.randint(vocabulary, targets.shape, generator=draw).to(targets)
    chosen = (torch.rand(targets.shape, generator=draw) < shock.size).to(targets.device)
    return torch.where(chosen, wrong, targets)


def gradients(shock: ShockConfig | None, model: nn.Module, seed: int) -> None:
    """Add Gaussian noise of `size` times the gradient's own norm to the gradient, in place."""
    if not shock or shock.name != "corrupt_gradient":
        return
    own = [p.grad for p in model.parameters() if p.grad is not None]
    draw = _generator(seed)
    noise = [torch.randn(g.shape, generator=draw).to(g) for g in own]
    scale = shock.size * get_total_norm(own) / get_total_norm(noise)
    torch._foreach_add_(own, [n * scale for n in noise])

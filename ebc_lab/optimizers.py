"""Base optimizers: a name -> the torch optimizers that share out a model's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from .config import OptimizerConfig
from .model import hidden_matrices

Params = Iterable[nn.Parameter]


def _adam(params: Params, c: OptimizerConfig) -> Optimizer:
    return torch.optim.Adam(params, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, weight_decay=c.weight_decay, fused=True)


def adam(model: nn.Module, c: OptimizerConfig) -> list[Optimizer]:
    """Adam with bias correction; `weight_decay` is added to the gradient."""
    return [_adam(model.parameters(), c)]


def adamw(model: nn.Module, c: OptimizerConfig) -> list[Optimizer]:
    """Adam with decoupled weight decay."""
    return [
        torch.optim.AdamW(
            model.parameters(), lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, weight_decay=c.weight_decay, fused=True
        )
    ]


def sgd(model: nn.Module, c: OptimizerConfig) -> list[Optimizer]:
    """SGD with heavy-ball momentum."""
    return [torch.optim.SGD(model.parameters(), lr=c.lr, momentum=c.momentum, weight_decay=c.weight_decay, fused=True)]


def muon(model: nn.Module, c: OptimizerConfig) -> list[Optimizer]:
    """Muon on the hidden matrices, its updates matched to Adam's rms so one learning rate serves both; Adam on the rest."""
    matrices = hidden_matrices(model)
    hidden = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in hidden]
    return [
        torch.optim.Muon(matrices, lr=c.lr, momentum=c.momentum, weight_decay=c.weight_decay, adjust_lr_fn="match_rms_adamw"),
        _adam(rest, c),
    ]


OPTIMIZERS: dict[str, Callable[[nn.Module, OptimizerConfig], list[Optimizer]]] = {
    "adam": adam,
    "adamw": adamw,
    "sgd": sgd,
    "muon": muon,
}


def build(model: nn.Module, config: OptimizerConfig) -> list[Optimizer]:
    return OPTIMIZERS[config.name](model, config)

"""The optimizers that propose updates: which can be limited, and the weights that they train now.

Which weights those are is asked at every step: a group may be added or a layer unfrozen in the middle of
training, and FSDP replaces the parameters of a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


def as_list(optimizers: Optimizers) -> list[torch.optim.Optimizer]:
    """The base optimizers. Raises ValueError for one that cannot be limited.

    An optimizer that another library has wrapped and that shows it as `.optimizer` (Accelerate, Lightning)
    stands for the wrapped one.
    """
    listed = list(optimizers) if isinstance(optimizers, Sequence) else [optimizers]
    unwrapped = [_unwrapped(base) for base in listed]
    if not unwrapped:
        raise ValueError("no optimizer was given.")
    for base in unwrapped:
        if not isinstance(base, torch.optim.Optimizer):
            raise TypeError(f"{type(base).__name__} is no torch.optim.Optimizer.")
        if isinstance(base, torch.optim.LBFGS):
            raise ValueError("LBFGS moves the weights several times in a step: it cannot be limited.")
        if isinstance(base, torch.optim.SparseAdam):
            raise ValueError("SparseAdam takes sparse gradients, which cannot be limited: use Adam.")
        name = type(base).__name__
        if hasattr(base, "fused_backward"):
            raise ValueError(f"{name} moves the weights inside backward, where nothing can limit it.")
        if hasattr(base, "second_step") and hasattr(base, "base_optimizer"):
            raise ValueError(f"{name} moves the weights twice in a step: `attach` to its base_optimizer.")
    return unwrapped


def _unwrapped(base: Any) -> Any:
    wraps = type(base).__module__.partition(".")[0] in ("accelerate", "lightning", "pytorch_lightning")
    return base.optimizer if wraps else base


def state_keeper(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer whose state dict has torch's hooks: this one, or one that it wraps and saves, too.

    Raises ValueError where its step or its state dict has none.
    """
    keeper = optimizer
    while not hasattr(keeper, "_optimizer_state_dict_post_hooks") and hasattr(keeper, "optimizer"):
        keeper = keeper.optimizer
    needed = (optimizer, "_optimizer_step_pre_hooks"), (keeper, "_optimizer_state_dict_post_hooks")
    if not all(hasattr(o, name) for o, name in needed) or not hasattr(type(optimizer).step, "hooked"):
        raise ValueError(
            f"{type(optimizer).__name__} was made without torch.optim.Optimizer's hooks: attach to the "
            "optimizer that it wraps."
        )
    return keeper


def _refuse_sparse(model: nn.Module, weights: Iterable[nn.Parameter]) -> None:
    """Raises ValueError where one of the weights is an embedding's that gets sparse gradients."""
    trained = {id(p) for p in weights}
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) is True and id(getattr(module, "weight", None)) in trained:
            raise ValueError(f"{name or type(module).__name__} has sparse gradients: set sparse=False.")


def _held(bases: Sequence[torch.optim.Optimizer]) -> Iterator[nn.Parameter]:
    for base in bases:
        for group in base.param_groups:
            yield from group["params"]


def moving(bases: Sequence[torch.optim.Optimizer]) -> list[int]:
    """The ids of the parameters that a step may move, in the optimizers' order."""
    return [id(p) for p in _held(bases) if p.requires_grad or p.grad is not None]


def trained(model: nn.Module, bases: Sequence[torch.optim.Optimizer]) -> tuple[list[str], list[nn.Parameter]]:
    """The parameters that the optimizers move, in the model's order: names and parameters.

    Raises ValueError for one that is not the model's, belongs to two optimizers or has sparse gradients, and
    where there is none.
    """
    of_model = {id(p) for p in model.parameters()}
    of_bases = [id(p) for p in _held(bases)]
    if len(set(of_bases)) < len(of_bases):
        raise ValueError("a parameter belongs to two of the optimizers.")
    if not of_model.issuperset(of_bases):
        raise ValueError(
            "an optimizer holds a parameter that is not the model's: make it from the model's parameters, "
            "after anything that replaces them, as fully_shard does. A module inside the one that is trained "
            "needs an optimizer of its own: one for its parameters, one for the rest."
        )
    known = set(moving(bases))
    weights = {n: p for n, p in model.named_parameters() if id(p) in known}
    if not weights:
        raise ValueError("the optimizers hold no trainable parameter.")
    _refuse_sparse(model, weights.values())
    return list(weights), list(weights.values())

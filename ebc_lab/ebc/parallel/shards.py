"""Weights that FSDP2 has shared out: each process holds, and moves, its own part of every one.

The parts are plain tensors. A trial of other weights has to be written into them, since the gather that comes
before a forward does not see a parameter that points elsewhere; and modules must forget what they gathered
before and after each measurement: the root module keeps its own weights, so that it would go on with those
of the trial.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn


def shared_out(tensor: Tensor) -> bool:
    """Whether it is a DTensor, told without importing what defines it."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor; a tensor that is not shared out is its own."""
    return tensor.to_local() if shared_out(tensor) else tensor  # type: ignore[attr-defined]


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was applied to. Raises ValueError for those of the older FSDP."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if any(isinstance(m, FullyShardedDataParallel) for m in model.modules()):
        raise ValueError("FullyShardedDataParallel flattens the weights: use fully_shard (FSDP2) or DDP.")
    return [m for m in model.modules() if isinstance(m, FSDPModule)]


def sharding_group(model: nn.Module, weights: Sequence[Tensor]) -> dist.ProcessGroup | None:
    """The processes among which FSDP2 has shared out the weights; None where it has not.

    Raises ValueError where weights are shared out in another way.
    """
    meshes: list[Any] = [p.device_mesh for p in weights if shared_out(p)]  # type: ignore[attr-defined]
    if not meshes:
        return None
    if any(mesh.ndim > 1 for mesh in meshes):
        raise ValueError(
            "weights on a mesh of several dimensions (HSDP, tensor parallelism) cannot be limited yet: "
            "share them out over one dimension, with fully_shard."
        )
    placed = all(shared_out(p) and p.placements[0].is_shard(0) for p in weights)  # type: ignore[attr-defined]
    if not placed or not fsdp_modules(model):
        raise ValueError("tensor parallelism cannot be limited yet: share the weights out with fully_shard.")
    if any(mesh != meshes[0] for mesh in meshes):
        raise ValueError("the weights lie on several meshes: fully_shard all of them over one.")
    return cast(dist.ProcessGroup, meshes[0].get_group())


@contextmanager
def resharded(modules: Sequence[Any]) -> Iterator[None]:
    """A forward meanwhile gathers the weights anew, and leaves none of them behind."""
    for module in modules:
        module.reshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()


@contextmanager
def swapped(parts: Sequence[Tensor], others: Sequence[Tensor]) -> Iterator[None]:
    """The values of `parts` and `others` are exchanged meanwhile; one of them is held twice at a time."""
    _exchange(parts, others)
    try:
        yield
    finally:
        _exchange(parts, others)


@torch.no_grad()
def _exchange(parts: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    for part, other in zip(parts, others, strict=True):
        kept = part.clone()
        part.copy_(other)
        other.copy_(kept)

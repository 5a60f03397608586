"""Weights that FSDP2 has shared out: each process holds, and moves, its own part of every one.

The parts are plain tensors. A trial of other weights has to be written into them, since the gather that comes
before a forward does not see a parameter that points elsewhere; and modules must forget what they gathered
before and after each measurement: the root module keeps its own weights, so that it would go on with those
of the trial.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn


def shared_out(tensor: Tensor) -> bool:
    """Whether it is a DTensor, told without importing what defines it."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor; a tensor that is not shared out is its own, a sparse one dense."""
    if shared_out(tensor):
        return tensor.to_local()  # type: ignore[attr-defined,no-any-return]
    return tensor.to_dense() if tensor.is_sparse else tensor


def gradients_of(weights: Iterable[Tensor]) -> list[Tensor]:
    """The gradients of those that have one, as `local` gives them."""
    found = [g for p in weights if (g := p.grad) is not None]
    return found if all(type(g) is Tensor and not g.is_sparse for g in found) else list(map(local, found))


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of a DistributedDataParallel or DataParallel."""
    kinds = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    return model.module if isinstance(model, kinds) else model


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was applied to. Raises ValueError for those of the older FSDP."""
    if not (dist.is_available() and dist.is_initialized()):
        return []  # and the import takes long
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if any(isinstance(m, FullyShardedDataParallel) for m in model.modules()):
        raise ValueError(
            "FullyShardedDataParallel flattens the weights, which cannot be limited: use fully_shard (FSDP2) "
            "or DistributedDataParallel."
        )
    return [m for m in model.modules() if isinstance(m, FSDPModule)]


def gathered_dtypes(modules: Sequence[Any]) -> set[torch.dtype]:
    """Those of the weights as a forward sees them, which a mixed precision policy may choose."""
    dtypes: set[torch.dtype] = set()
    for module in modules:
        module.unshard()
        dtypes |= {p.dtype for p in module.parameters() if not shared_out(p)}
        module.reshard()
    return dtypes


def sharding_group(model: nn.Module, weights: Sequence[Tensor]) -> dist.ProcessGroup | None:
    """The processes among which FSDP2 has shared out the weights; None where it has not.

    Raises ValueError where weights are shared out in another way.
    """
    parts: list[Any] = [p for p in weights if shared_out(p)]
    meshes = [p.device_mesh for p in parts]
    if not meshes:
        return None
    if any(mesh.ndim > 1 for mesh in meshes):
        raise ValueError(
            "weights on a mesh of several dimensions (HSDP, tensor parallelism) cannot be limited yet: "
            "share them out over one dimension, with fully_shard."
        )
    modules = fsdp_modules(model)
    if not modules or not all(p.placements[0].is_shard() for p in parts):
        raise ValueError(
            "tensor parallelism cannot be limited yet: share the weights out with fully_shard, and give EBC "
            "the module that it was applied to last."
        )
    gathered = {id(p) for module in modules for p in module.parameters()}
    if not all(shared_out(p) and id(p) in gathered for p in weights):
        raise ValueError(
            "some weights are shared out and others are not: apply fully_shard to the whole model, after its "
            "parts, and give EBC that model."
        )
    if any(mesh != meshes[0] for mesh in meshes):
        raise ValueError("the weights lie on several meshes: apply fully_shard over one.")
    if any(local(p).device.type != meshes[0].device_type for p in weights):
        raise ValueError("weights offloaded to the CPU cannot be limited yet: use fully_shard without that.")
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
        copy = part.clone()
        part.copy_(other)
        other.copy_(copy)

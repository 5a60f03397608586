"""What a CUDA graph would see, on a CPU: the operations of a step, recorded and repeated on the same memory.

A `Tape` stands in for `ebc_lab.training.graphs.CudaGraph`. Whatever a step keeps in Python (a counter,
a number read from a tensor, a state that is replaced instead of changed in place) is frozen in it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ebc_lab.training.pending import Packed

READS = ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2")


def name_of(op: Any) -> str:
    return op.overloadpacket.__name__


class Counting(TorchDispatchMode):
    """How often each operation is launched, the `bytes` that copies write, the `reads` the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = name_of(op)
        out = op(*args, **(kwargs or {}))
        if not op.is_view:
            self.ops[name] += 1
        if name in ("copy_", "_foreach_copy_", "clone", "_to_copy"):
            written = args[0] if name.endswith("copy_") else out
            self.bytes += sum(
                t.numel() * t.element_size() for t in tree_leaves(written) if isinstance(t, torch.Tensor)
            )
        return out

    @property
    def reads(self) -> int:
        return sum(self.ops[name] for name in READS)

    @property
    def launches(self) -> int:
        return sum(self.ops.values()) - self.reads


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if name_of(op) in READS:
            raise RuntimeError(f"{op} reads a value on the host")
        if name_of(op) in ("lift_fresh", "lift"):
            raise RuntimeError("a tensor is made of Python numbers, for which a GPU would have to wait")
        kwargs = kwargs or {}
        out = op(*args, **kwargs)
        # the memory, as a graph would: a weight may point elsewhere by the time of the replay
        self.calls.append(tree_map_only(torch.Tensor, torch.Tensor.detach, (op, args, kwargs, out)))
        return out


class Tape:
    """Recording takes the step, unlike capturing, so the first `replay` only returns its values."""

    def __init__(self, compute: Any, earlier: Any):
        with _Recording() as recording:
            self.output: Packed = compute()
        self.calls = recording.calls
        self.fresh = True

    def replay(self) -> Packed:
        if self.fresh:
            self.fresh = False
            return self.output
        with torch.no_grad():
            for op, args, kwargs, out in self.calls:
                again = op(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)
        return self.output

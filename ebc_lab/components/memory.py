"""What a step keeps beside the weights: updates inside backward, packed activations, and what both leave.

The maths is in `ebc_lab.axiom` (docs/axiom.md).
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ebc_lab.axiom.optimizer import AXIOM
from ebc_lab.config.schema import RunConfig

from .hook import Built, Hook

PRIME = 2654435761  # so that no two seeds of a run and of its memory meet soon


class Memory(Hook):
    """How a run saves activations and where it makes its update, and the bytes that its gradients and its
    optimizer's state take, which every run tells."""

    name = "memory"

    def __init__(self, run: RunConfig, built: Built):
        self.graphed = run.memory.changes_nothing()
        self.weights = [p for p in built.model.parameters() if p.requires_grad]
        self.activations: Any = None
        if run.memory.activations == "int4":
            from ebc_lab.axiom.activations import compressed_activations

            seed = (run.seed + PRIME * run.memory.seed) % 2**32  # a CPU generator takes as many bits
            self.activations = compressed_activations(seed=seed, parameters=built.model.parameters())

    @classmethod
    def prepare(cls, run: RunConfig, bases: Sequence[Optimizer]) -> None:
        """Have the base optimizer move the weights inside backward, if the run asks for that."""
        if run.memory.hooks:
            for base in bases:
                if isinstance(base, AXIOM):
                    base.detect_anomaly = True
                    base.register_hooks()

    def saving(self) -> AbstractContextManager[Any]:
        """Pack what autograd saves for backward."""
        return self.activations or nullcontext()

    def figures(self, bases: Sequence[Optimizer]) -> dict[str, int]:
        """Return the bytes of the optimizers' state, of all gradients and of the largest (with hooks no more
        exists at a time), and of what the last step's forward saved, if that was packed."""
        weights = storages(self.weights)
        state = storages(t for base in bases for t in reachable(base.state))
        gradients = [p.numel() * p.element_size() for p in self.weights]
        figures = {
            "state_bytes": sum(n for at, n in state.items() if at not in weights),
            "gradient_bytes": sum(gradients),
            "largest_gradient_bytes": max(gradients),
        }
        if self.activations is not None:
            figures["activation_bytes"] = self.activations.memory_stats()["compressed_bytes"]
        return figures

    def state_dict(self) -> dict[str, Any]:
        return {} if self.activations is None else self.activations.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.activations is not None:
            self.activations.load_state_dict(state)


HOOK = Memory


def reachable(root: Any) -> list[Tensor]:
    """Return every tensor that an object leads to: by attributes, containers, closures and bound methods."""
    tensors: list[Tensor] = []
    seen: set[int] = set()
    left = [root]
    while left:
        x = left.pop()
        if id(x) in seen or isinstance(x, str | bytes | int | float | type | types.ModuleType):
            continue
        seen.add(id(x))
        if is_traceable_wrapper_subclass(x):
            left += [getattr(x, name) for name in x.__tensor_flatten__()[0]]
        elif isinstance(x, Tensor):
            tensors.append(x)
        if isinstance(x, Mapping):
            left += [*x.keys(), *x.values()]
        elif isinstance(x, list | tuple | set | frozenset):
            left += x
        elif isinstance(x, types.MethodType):
            left += [x.__self__, x.__func__]
        elif isinstance(x, types.FunctionType):
            left += x.__closure__ or ()
        elif isinstance(x, types.CellType):
            with contextlib.suppress(ValueError):  # an empty cell
                left.append(x.cell_contents)
        elif hasattr(x, "__dict__") and not isinstance(x, Tensor):
            left += list(vars(x).values())
    return tensors


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address -> bytes of the memory behind tensors; views of one memory count once."""
    return {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if t.untyped_storage().nbytes()
    }

"""What a step keeps beside the weights: updates inside backward, packed activations, and what both leave.

The maths is in `ebc_lab.axiom` (docs/axiom.md).
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ebc_lab.axiom.optimizer import AXIOM
from ebc_lab.config.parts.memory import MemoryConfig
from ebc_lab.config.schema import RunConfig

PRIME = 2654435761  # so that no two seeds of a run and of its memory meet soon


def unused(config: MemoryConfig) -> bool:
    """Whether a run keeps what any other does."""
    return not config.hooks and config.activations == "none"


def register_hooks(bases: Sequence[Optimizer], config: MemoryConfig) -> None:
    """Have the run's base optimizer move the weights inside backward, if the run asks for that."""
    if not config.hooks:
        return
    for base in bases:
        if isinstance(base, AXIOM):
            base.detect_anomaly = True
            base.register_hooks()


class Memory:
    """How a run saves activations, and the bytes that its gradients and its optimizer's state take."""

    def __init__(self, run: RunConfig, model: nn.Module):
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.activations: Any = None
        if run.memory.activations == "int4":
            from ebc_lab.axiom.activations import compressed_activations

            seed = (run.seed + PRIME * run.memory.seed) % 2**32  # a CPU generator takes as many bits
            self.activations = compressed_activations(seed=seed, parameters=model.parameters())

    def saving(self) -> AbstractContextManager[Any]:
        """Around a forward: what autograd saves for backward is packed."""
        return self.activations or nullcontext()

    def figures(self, bases: Sequence[Optimizer]) -> dict[str, int]:
        """Bytes of the optimizers' state, of all gradients and of the largest (with hooks no more exists at a
        time), and of what the last step's forward saved, if that was packed."""
        held = storages(self.weights)
        state = storages(t for base in bases for t in reachable(base.state))
        gradients = [p.numel() * p.element_size() for p in self.weights]
        found = {
            "state_bytes": sum(n for at, n in state.items() if at not in held),
            "gradient_bytes": sum(gradients),
            "largest_gradient_bytes": max(gradients),
        }
        if self.activations is not None:
            found["activation_bytes"] = self.activations.memory_stats()["compressed_bytes"]
        return found

    def state_dict(self) -> dict[str, Any]:
        return {} if self.activations is None else self.activations.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.activations is not None:
            self.activations.load_state_dict(state)


def reachable(root: Any) -> list[Tensor]:
    """Every tensor that an object leads to: through attributes, containers, closures and bound methods."""
    found: list[Tensor] = []
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
            found.append(x)
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
    return found


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address -> bytes of the memory behind tensors; views of one memory count once."""
    return {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if t.untyped_storage().nbytes()
    }

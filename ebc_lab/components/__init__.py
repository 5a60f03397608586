"""The named parts of a run. Importing this package loads no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ebc_lab.config.schema import RunConfig

if TYPE_CHECKING:
    from .determinism import Torch
    from .hook import Hook


def _shock() -> type[Hook]:
    from .shocks import Shock

    return Shock


def _quantizer() -> type[Hook]:
    from .quantizers import LowBit

    return LowBit


def _policy() -> type[Hook]:
    from .policies import Steering

    return Steering


def _memory() -> type[Hook]:
    from .memory import Memory

    return Memory


# in the order in which they act at every turn of a step
HOOKS: list[Callable[[], type[Hook]]] = [_shock, _quantizer, _policy, _memory]


def hooks_of(run: RunConfig) -> list[type[Hook]]:
    """Return the hooks that a run needs, in the order in which they act, after its numerics."""
    return [kind for kind in (load() for load in HOOKS) if kind.acts(run)]


def numerics_of(run: RunConfig) -> type[Torch]:
    """Return what computes a run's gradients and sums: nothing else asks on what its bits depend."""
    from .determinism import NUMERICS

    return NUMERICS[run.determinism.name]

"""The named parts of a run. Importing this package loads no torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ebc_lab.config.parts import PARTS
from ebc_lab.config.schema import RunConfig

if TYPE_CHECKING:
    from .determinism import Torch
    from .hook import Hook


def _declared() -> list[Callable[[], type[Hook] | None]]:
    """Return what imports the hook of each part that has one, in the order in which they act at every turn of
    a step: `HOOK` in the part's file here. The sharpness, which only looks, is the run's own setting."""
    files = [f"{__name__}.{name}" for name in (*(part.group_name for part in PARTS), "sharpness")]
    return [functools.partial(_hook, file) for file in files if find_spec(file)]


def _hook(file: str) -> type[Hook] | None:
    kind: type[Hook] | None = getattr(import_module(file), "HOOK", None)
    return kind


HOOKS = _declared()


def hooks_of(run: RunConfig) -> list[type[Hook]]:
    """Return the hooks that a run needs, in the order in which they act, after its numerics."""
    return [kind for load in HOOKS if (kind := load()) and kind.acts(run)]


def numerics_of(run: RunConfig) -> type[Torch]:
    """Return what computes a run's gradients and sums: nothing else asks on what its bits depend."""
    from .determinism import NUMERICS

    return NUMERICS[run.determinism.name]

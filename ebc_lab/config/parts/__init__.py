"""The parts of a run, in the order in which they show in its name: every `Part` of a file in this folder."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any

from ..part import Part


def _declared() -> list[Part[Any]]:
    modules = [import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    return [value for module in modules for value in vars(module).values() if isinstance(value, Part)]


PARTS: tuple[Part[Any], ...] = tuple(sorted(_declared(), key=lambda part: (part.place, part.name)))
PART: dict[str, Part[Any]] = {part.name: part for part in PARTS}

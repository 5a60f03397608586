"""AXIOM: training with little memory beside the weights, measured.

A library of its own: it imports torch and nothing else of `ebc_lab`. The formulas and the figures are in
docs/axiom.md. Importing this package does not load torch; a name is imported when it is used.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "optimizer": ("AXIOM", "Axiom"),
    "checks": ("AnomalyError",),
    "activations": ("compressed_activations",),
    "packing": ("AXIOM_CHECKPOINT",),
    "distributed": ("AXIOM_DDP", "AxiomDDPState", "axiom_hook"),
    "memory": ("estimate_memory",),
    "loading": ("load_model",),
    "trainer": ("AXIOM_Trainer",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)

"""EBC Lab: ablations of Ellipsotope-Budgeted Clipping, run, decided and reported by one command.

`load` and `board` give results as pandas tables (docs/results.md); they are imported when first asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ebc_lab.results import board, load

__version__ = "1.0.0"
__all__ = ["board", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(".results", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

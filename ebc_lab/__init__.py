"""EBC Lab: ablations of Ellipsotope-Budgeted Clipping, run, decided and reported by one command.

`load` and `board` give results as pandas tables (docs/results.md), `judge` those of runs that others trained
(docs/judge.md); they are imported when first asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ebc_lab.judging.judgement import judge
    from ebc_lab.results import board, load

__version__ = "2.0.0"
__all__ = ["board", "judge", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    place = ".judging.judgement" if name == "judge" else ".results"
    return getattr(import_module(place, __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

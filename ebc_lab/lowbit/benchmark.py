"""The way to the benchmark: `benchmarks/lowbit` of the repository, which a wheel has beside this file.

`python -m ebc_lab.lowbit bench` and `ebc_lab.lowbit.PerformanceBenchmark` load it, by its path: `benchmarks`
may be a module of yours.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

FOLDERS = (Path(__file__).parent / "benchmarks", Path(__file__).parents[2] / "benchmarks" / "lowbit")
_NAME = "ebc_lab_lowbit_benchmark"


@functools.cache
def load() -> Any:
    """Import the package in the first of `FOLDERS`; ImportError where the library was copied without it."""
    source = _source()
    if source is None:
        raise ImportError(
            "the benchmark was not copied with ebc_lab/lowbit: copy benchmarks/lowbit of the repository to "
            f"{FOLDERS[0]}, or install ebc-lab."
        )
    spec = importlib.util.spec_from_file_location(_NAME, source)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[_NAME] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _source() -> Path | None:
    sources = (folder / "__init__.py" for folder in FOLDERS)
    return next((source for source in sources if source.is_file()), None)


def _not_here(config: dict[str, Any] | None = None) -> Any:
    """Stand for `PerformanceBenchmark` where it was not copied: it can be imported, not made."""
    return load().PerformanceBenchmark(config)


def __getattr__(name: str) -> Any:
    if name != "PerformanceBenchmark":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _not_here if _source() is None else load().PerformanceBenchmark

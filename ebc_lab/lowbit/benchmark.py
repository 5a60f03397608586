"""The way to the benchmark, which lies in `benchmarks/lowbit` of the repository, not in a wheel.

`python -m ebc_lab.lowbit bench` and `ebc_lab.lowbit.PerformanceBenchmark` load it from the checkout that this
file belongs to; no other use of the library needs it.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "benchmarks" / "lowbit"
_NAME = "ebc_lab_lowbit_benchmark"  # as a module: `benchmarks` may be another project's


@functools.cache
def load() -> Any:
    """Import the package in `FOLDER`. ImportError, saying where it is, if this is no checkout."""
    source = FOLDER / "__init__.py"
    if not source.is_file():
        raise ImportError(
            "the benchmark is not installed with the package: it is benchmarks/lowbit of the repository, "
            "so run `python -m ebc_lab.lowbit bench` in a checkout."
        )
    spec = importlib.util.spec_from_file_location(_NAME, source)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[_NAME] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _not_here(config: dict[str, Any] | None = None) -> Any:
    """Stand for `PerformanceBenchmark` outside of a checkout: importing it works, making one says why not."""
    return load().PerformanceBenchmark(config)


def __getattr__(name: str) -> Any:
    if name != "PerformanceBenchmark":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return load().PerformanceBenchmark if FOLDER.is_dir() else _not_here

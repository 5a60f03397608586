"""Running a benchmark: settings, one child process on one thread, times in turns, peaks of memory."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ebc_lab.lowbit.backends import get_backend
from ebc_lab.lowbit.dispatch import create_auto_dispatcher
from ebc_lab.lowbit.names import Familiar, misnamed

from .cases import Call, Case, all_cases, unavailable
from .report import BACKEND, Report, Row, title, with_speedups

DEFAULTS: dict[str, Any] = {
    "sizes": [1_000_000],  # values of an array
    "iterations": 5,  # times each candidate is timed
    "kmeans": [[1000, 64, 10]],  # points, features, clusters
    "torch_compile": False,  # the anchor that takes a minute to compile
    "seed": 0,
}
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_CHILD = "from ebc_lab.lowbit.benchmark import load; load().runner.measure()"
_EVICTED_BY = 1 << 27  # bytes that are touched to empty the caches
_TINY = 1000  # values, of a call whose cost is the call's own
_TINY_CALLS = 2000


class PerformanceBenchmark(Familiar):
    """Time every backend beside every anchor, in turns, in a process of its own on one thread.

    `config` changes entries of DEFAULTS; it can be changed until the benchmark runs. An unknown entry is a
    TypeError that names the nearest, a wrong value a ValueError. `FULL` is the config of the figures that are
    published, which takes minutes.
    """

    FULL: ClassVar[dict[str, Any]] = {
        "sizes": [1_000_000, 10_000_000],
        "iterations": 9,
        "kmeans": [[10_000, 100, 10], [10_000, 128, 10]],
        "torch_compile": True,
    }

    def __init__(self, config: dict[str, Any] | None = None):
        self.config = DEFAULTS | dict(config or {})
        _check(self.config)

    def run_all_benchmarks(self) -> Report:
        """Measure everything; on a terminal, a line on stderr says what each operation took."""
        _check(self.config)
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = os.environ | dict.fromkeys(_ONE_THREAD, "1") | {"PYTHONPATH": paths}
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "rows.json"
            command = [sys.executable, "-c", _CHILD, str(answer)]
            child = subprocess.run(command, input=json.dumps(self.config).encode(), env=environment)
            if child.returncode != 0 or not answer.exists():
                raise ChildProcessError(
                    f"the measuring process ended with code {child.returncode}: see what it printed above, "
                    "or measure smaller sizes."
                )
            measured = json.loads(answer.read_text(encoding="utf-8"))
        rows = [Row(**row) for row in measured["rows"]]
        return Report(rows, measured["dispatch"], measured["machine"], self.config)


def _check(config: dict[str, Any]) -> None:
    if wrong := misnamed(config, DEFAULTS, "the benchmark"):
        raise TypeError(wrong)
    if not _are_counts([config["iterations"]], 1):
        raise ValueError(f"iterations is {config['iterations']!r}: give an integer of at least 1.")
    if not _are_counts(config["sizes"], 8):
        raise ValueError(f"sizes is {config['sizes']!r}: give integers of at least 8.")
    for shape in config["kmeans"]:
        if not _are_counts(shape, 1) or len(shape) != 3 or shape[2] > shape[0]:
            raise ValueError(f"kmeans has {shape!r}: give points, features and no more clusters than points.")


def _are_counts(values: Any, least: int) -> bool:
    if not isinstance(values, list | tuple):
        return False
    return all(isinstance(v, int) and not isinstance(v, bool) and v >= least for v in values)


# -- in the child --------------------------------------------------------------------------------------------


def measure() -> None:
    """Measure what stdin asks for and write the rows to the file that the first argument names."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torch's, of its own older parts
    config = json.loads(sys.stdin.read())
    rows = []
    for case in all_cases(config):
        rows += (measured := _measured(case, config["iterations"]))
        if sys.stderr.isatty():
            times = [
                f"{row.candidate} {row.minimum_ms:.3g}" for row in measured if row.minimum_ms is not None
            ]
            print(f"{title(measured[0].group)}: {', '.join(times)} ms", file=sys.stderr)
    rows = with_speedups(rows)
    dispatch = [_overhead(), *_choices(config, rows)]
    answer = {"rows": [asdict(row) for row in rows], "dispatch": dispatch, "machine": _machine()}
    Path(sys.argv[1]).write_text(json.dumps(answer), encoding="utf-8")


def _measured(case: Case, iterations: int) -> list[Row]:
    """Return each candidate's row: all are warmed up, then take turns, each time in another order."""
    calls: dict[str, Call] = {}
    reasons: dict[str, str] = {}
    for candidate in case.candidates:
        try:
            calls[candidate.name] = candidate.make()
            calls[candidate.name]()
        except Exception as error:  # whatever a library raises is why it is missing
            calls.pop(candidate.name, None)
            reasons[candidate.name] = unavailable(error)
    times: dict[str, list[float]] = {name: [] for name in calls}
    evict = _evictor() if case.cold else None
    names = list(calls)
    for turn in range(iterations):
        shift = turn % max(1, len(names))
        for name in names[shift:] + names[:shift]:
            if evict is not None:
                evict()
            begin = time.perf_counter()
            calls[name]()
            times[name].append(1e3 * (time.perf_counter() - begin))
    rows = []
    for candidate in case.candidates:
        start = (case.operation, case.levels, case.size, candidate.name, candidate.kind, candidate.threads)
        if candidate.name in calls:
            least = min(times[candidate.name])
            middle = statistics.median(times[candidate.name])
            peak = _peak_of(calls[candidate.name])
            throughput = case.work / least / 1e3
            rows.append(Row(*start, least, middle, peak, throughput, None, candidate.note))
        else:
            rows.append(Row(*start, note=reasons[candidate.name]))
    return rows


def _evictor() -> Callable[[], object]:
    buffer = np.zeros(_EVICTED_BY, np.uint8)
    return lambda: np.add(buffer, 1, out=buffer)


def _peak_of(call: Call) -> float | None:
    """Return the peak of this process's memory during the call above what it was before, in 2^20 bytes."""
    _give_back()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is now
        before = _status("VmHWM")
        call()
        return max(0.0, (_status("VmHWM") - before) / 1024)
    except OSError:
        return None


def _give_back() -> None:
    """Return freed memory to the system: what the C library keeps would not be seen when a call takes it."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _status(field: str) -> int:
    """Read a line of /proc/self/status, in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def _overhead() -> str:
    """Tell what a call through the dispatcher costs once it has measured, on so few values that it shows."""
    values = np.linspace(-1, 1, _TINY, dtype=np.float32)
    dispatcher = create_auto_dispatcher()
    dispatcher.quantize(values)
    chosen = dispatcher.get_metrics()["choices"][0]["backend"]
    backend = get_backend(chosen)
    through: list[float] = []
    direct: list[float] = []
    for _ in range(5):
        through.append(_microseconds(lambda: dispatcher.quantize(values)))
        direct.append(_microseconds(lambda: backend.effective(values, "five")))
    more = min(through) - min(direct)
    return (
        f"dispatcher, {_TINY} values: {min(through):.2f} us a call, {chosen} directly {min(direct):.2f}: "
        f"{more:.2f} us more"
    )


def _microseconds(call: Call) -> float:
    begin = time.perf_counter()
    for _ in range(_TINY_CALLS):
        call()
    return 1e6 * (time.perf_counter() - begin) / _TINY_CALLS


def _choices(config: dict[str, Any], rows: list[Row]) -> list[str]:
    """Tell which backend the dispatcher chose for each size, beside the quickest one of the rows."""
    dispatcher = create_auto_dispatcher()
    lines = []
    for size in config["sizes"]:
        dispatcher.quantize(np.random.default_rng(0).standard_normal(size).astype(np.float32))
        chosen = dispatcher.get_metrics()["choices"][-1]["backend"]
        times = {}
        for row in rows:
            alone = row.kind == BACKEND and row.threads == 1 and row.minimum_ms is not None
            if row.group == ("values", "five", size) and alone:
                times[row.candidate] = row.minimum_ms or 0.0
        best = min(times, key=times.__getitem__)
        if chosen in times:
            lines.append(
                f"dispatcher, values five, {size:,}: chose {chosen}, best single backend {best}: "
                f"{times[best] / times[chosen]:.2f}"
            )
    return lines


def _machine() -> dict[str, Any]:
    import torch

    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return {"cpu": name, "cores": os.cpu_count(), "numpy": np.__version__, "torch": torch.__version__}

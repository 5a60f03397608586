"""Which backend is quickest here, measured and not guessed (docs/lowbit.md, backends).

* For each operation, levels, kind of input and power of two of its size, the first call times every candidate
  on the input's first 2^20 values: the median of three after one to warm up, copies to a device and back
  included. Their bits are compared with numpy's: who differs is out, with a warning. Later calls go straight
  to the quickest.
* Candidates are numpy, the compiled backends, and torch where the program has imported it or where a tensor
  comes in. A GPU is one from `min_size_for_gpu` values on; torch is imported for that only where a driver is.
* What comes in decides what comes out: numpy arrays for numpy, tensors of the same device for tensors.
"""

from __future__ import annotations

import functools
import math
import os
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np

from .backends import Backend, BackendUnavailableError, get_backend
from .backends.formulas import Array, Group, Scale, as_float32, check_finite, is_tensor
from .backends.planes import CODES, WIDTH
from .levels import Quantized
from .names import Familiar, Settings
from .packing import packed_size

SAMPLE = 1 << 20  # values that candidates are timed on
REPEATS = 3
_PASSES = 3  # of the k-means that candidates are timed on
_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA, AMD, either under Windows

# An operation's work on one backend: arrays in, one array or several out.
Work: TypeAlias = Callable[[Backend], Any]


@dataclass
class BackendConfig(Settings):
    """Who may compute. What is not preferred is no candidate; the least sizes count values.

    Attributes can be set, too; a dispatcher heeds that where it has not chosen yet. TypeError, with the
    nearest name, for a setting that there is none of.
    """

    prefer_gpu: bool = True
    prefer_cpp: bool = True
    prefer_c: bool = True
    min_size_for_gpu: int = 1_000_000  # of input on the host; tensors of a GPU are there already
    min_size_for_cpp: int = 0
    min_size_for_c: int = 0
    verbose: bool = False  # print each choice
    benchmark_mode: bool = False  # time all candidates at every call
    threads: int = 1  # of the backend cpp

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        if self.threads < 1:
            raise ValueError(f"threads must be at least 1, not {self.threads}")


class _Key(NamedTuple):
    operation: str
    levels: str | None
    size: int  # floor(log2 of the values), -1 for none
    kind: str  # numpy, or the device of tensors: cpu, cuda


class _Choice(NamedTuple):
    backend: Backend
    measured_ms: dict[str, float]


@dataclass
class _Tally:
    count: int = 0
    total: float = 0.0
    least: float = math.inf
    most: float = 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.total += seconds
        self.least = min(self.least, seconds)
        self.most = max(self.most, seconds)

    def summary(self) -> dict[str, float]:
        return {
            "count": self.count,
            "avg_time_ms": 1e3 * self.total / self.count,
            "min_time_ms": 1e3 * self.least,
            "max_time_ms": 1e3 * self.most,
            "total_time_ms": 1e3 * self.total,
        }


class HybridDispatcher(Familiar):
    """The low-bit operations, each on the backend that was quickest when it was first asked for."""

    def __init__(self, config: BackendConfig | None = None) -> None:
        self.config = config or BackendConfig()
        self.config.check()
        self._choices: dict[_Key, _Choice] = {}
        self._tallies: dict[str, _Tally] = {}
        self._unavailable: dict[str, str] = {}
        self._lock = threading.RLock()

    # -- operations ------------------------------------------------------------------------------------------

    def quantize(
        self,
        values: Array,
        levels: str = "five",
        scale: Scale = "absmean",
        group: Group = "tensor",
        *,
        benchmark: bool = False,
    ) -> Array:
        """Return step * code of each value, float32. ValueError where a value is NaN or infinite.

        `benchmark` times the candidates anew, as `benchmark_mode` does at every call.
        """
        values = _as_array(values)
        result = self._run("quantize", "effective", values, (levels, group, scale), group, benchmark)
        if _holds_nan(result, group):
            check_finite(as_float32(values))
        return result

    def encode(
        self, values: Array, levels: str = "five", scale: Scale = "absmean", group: Group = "tensor"
    ) -> Quantized:
        """Return codes and steps, as numpy arrays. ValueError where a value is NaN or infinite."""
        codes, steps = self._run("encode", "quantize", _as_array(values), (levels, group, scale), group)
        return Quantized(_on_host(codes), _on_host(steps), levels, group)

    def stochastic(self, values: Array, levels: str, step: float, key: int) -> Array:
        """Return stochastic codes of this step, int8; `key` is a `rounding_key`."""
        return self._run("stochastic", "stochastic", _as_array(values), (levels, step, key))

    def pack(self, codes: Array, levels: str) -> Array:
        """Return codes, row-major, as flat uint8 bytes."""
        return self._run("pack", "pack", _as_array(codes), (levels,))

    def unpack(self, data: Array, n: int, levels: str) -> Array:
        """Return the n codes in these bytes, flat int8."""
        data = _as_bytes(data)

        def work(backend: Backend) -> Array:
            return backend.unpack(_brought(data, backend), n, levels)

        def sampled(backend: Backend) -> Array:
            part, count = _whole_blocks(data, n, levels)
            return backend.unpack(_brought(part, backend), count, levels)

        return self._call("unpack", levels, n, data, work, sampled)

    def unpack_values(
        self, data: Array, shape: tuple[int, ...], steps: Array, levels: str, group: Group = "tensor"
    ) -> Array:
        """Return step * code for each code in these bytes, float32 of this shape."""
        data = _as_bytes(data)
        n = math.prod(shape)

        def work(backend: Backend) -> Array:
            arrays = _brought(data, backend), shape, _brought(steps, backend)
            return backend.unpack_values(*arrays, levels, group)

        def sampled(backend: Backend) -> Array:
            if n <= SAMPLE:
                return work(backend)
            part, count = _whole_blocks(data, n, levels)
            arrays = _brought(part, backend), (count,), _brought(steps.reshape(-1)[0], backend)
            return backend.unpack_values(*arrays, levels, "tensor")

        return self._call("unpack_values", levels, n, data, work, sampled)

    def kmeans(
        self, data: Array, n_clusters: int, seed: int = 0, *, benchmark: bool = False
    ) -> tuple[Array, Array]:
        """Return (labels (n,), centroids (k, d)) of the rows of `data` (n, d), as numpy arrays."""
        from .clustering import kmeans

        points = _on_host(_as_array(data))

        def work(backend: Backend) -> tuple[Array, Array]:
            result = kmeans(points, n_clusters, seed=seed, backend=backend.name)
            return result.labels, result.centroids

        def sampled(backend: Backend) -> tuple[Array, Array]:
            part = points[: max(n_clusters, SAMPLE // max(1, math.prod(points.shape[1:])))]
            start = part[:n_clusters]
            result = kmeans(part, n_clusters, init=start, max_iter=_PASSES, backend=backend.name)
            return result.labels, result.centroids

        labels, centroids = self._call("kmeans", None, points.size, points, work, sampled, benchmark)
        return labels, centroids

    # -- choosing --------------------------------------------------------------------------------------------

    def _run(
        self,
        operation: str,
        method: str,
        values: Array,
        rest: tuple[Any, ...],
        group: Group = "tensor",
        anew: bool = False,
    ) -> Any:
        """Call a backend's method on an array, whose start can be cut off, and the rest, levels first."""

        def whole(backend: Backend) -> Any:
            return getattr(backend, method)(_brought(values, backend), *rest)

        def sampled(backend: Backend) -> Any:
            return getattr(backend, method)(_brought(_first_values(values, group), backend), *rest)

        return self._call(operation, rest[0], math.prod(values.shape), values, whole, sampled, anew)

    def _call(
        self,
        operation: str,
        levels: str | None,
        n: int,
        like: Array,
        work: Work,
        sampled: Work,
        anew: bool = False,
    ) -> Any:
        """Do `work` on the quickest backend, as arrays of the kind of `like`; `sampled` is what is timed."""
        key = _Key(operation, levels, n.bit_length() - 1, _kind(like))
        choice = self._choices.get(key)
        if choice is None or anew or self.config.benchmark_mode:
            with self._lock:
                choice = self._measure(key, n, lambda backend: _given_back(sampled(backend), like))
        begin = time.perf_counter()
        result = work(choice.backend)
        if key.kind != "numpy":
            result = _given_back(result, like)
        seconds = time.perf_counter() - begin
        with self._lock:
            self._tallies.setdefault(choice.backend.name, _Tally()).add(seconds)
        return result

    def _measure(self, key: _Key, n: int, sampled: Work) -> _Choice:
        """Time the candidates; numpy, the reference, comes first: what it refuses, all refuse."""
        measured = {}
        expected = None
        names = self._candidates(key, n) if n else ["numpy"]
        for name in names:
            try:
                result, milliseconds = _timed(sampled, self._backend(name), key.kind)
            except Exception as error:
                if name == "numpy":
                    raise
                self._drop(name, f"it failed in {key.operation}: {' '.join(str(error).split())}")
                continue
            if expected is None:
                expected = result
            if _same_bits(result, expected):
                measured[name] = milliseconds
            else:
                self._drop(name, f"its bits in {key.operation} differ from numpy's")
        stays = key.kind == "cuda" and "cuda" in measured
        quickest = "cuda" if stays else min(measured, key=measured.__getitem__)
        choice = _Choice(self._backend(quickest), measured)
        self._choices[key] = choice
        if self.config.verbose:
            times = ", ".join(f"{name} {ms:.3g} ms" for name, ms in measured.items())
            what = f"{key.operation} {key.levels or ''} of {n} values ({key.kind})"
            print(f"{what}: {choice.backend.name} ({times})")
        return choice

    def _candidates(self, key: _Key, n: int) -> list[str]:
        config = self.config
        on_gpu = key.kind == "cuda"
        names = ["numpy"]
        if config.prefer_c and n >= config.min_size_for_c:
            names.append("c")
        if config.prefer_cpp and n >= config.min_size_for_cpp:
            names.append("cpp")
        if "torch" in sys.modules:
            names.append("torch")
        if config.prefer_gpu and on_gpu:
            names = ["numpy", "cuda"]  # numpy vouches for the bits: it would make each step wait for copies
        elif config.prefer_gpu and n >= config.min_size_for_gpu and _has_driver():
            names += ["cuda", "cupy"]
        if key.operation == "kmeans":
            names = [name for name in names if name != "cupy"]
        return [name for name in names if name not in self._unavailable and self._usable(name)]

    def _usable(self, name: str) -> bool:
        try:
            self._backend(name)
        except BackendUnavailableError as error:
            self._unavailable[name] = str(error)
            return False
        return True

    def _backend(self, name: str) -> Backend:
        return get_backend(name, self.config.threads if name == "cpp" else 1)

    def _drop(self, name: str, reason: str) -> None:
        """Ask a backend that is wrong once no more, nor for what it was chosen before."""
        warnings.warn(f"the backend {name} is no longer used: {reason}", RuntimeWarning, stacklevel=6)
        self._unavailable[name] = reason
        for key, choice in list(self._choices.items()):
            if choice.backend.name == name:
                del self._choices[key]

    # -- metrics ---------------------------------------------------------------------------------------------

    def get_metrics(self) -> dict[str, Any]:
        """Return what was asked and who did it: `total_operations`; `backend_summary` {name: count and times
        in ms}; `choices`, with the median times measured; `unavailable` {name: reason}.

        Times of tensors on a GPU are those of starting the work. `size` is the least of its power of two.
        """
        with self._lock:
            choices = []
            for key, choice in self._choices.items():
                asked: dict[str, Any] = {"operation": key.operation, "levels": key.levels}
                asked |= {"size": 1 << key.size if key.size >= 0 else 0, "input": key.kind}
                answer = {"backend": choice.backend.name, "measured_ms": dict(choice.measured_ms)}
                choices.append(asked | answer)
            return {
                "total_operations": sum(tally.count for tally in self._tallies.values()),
                "backend_summary": {name: tally.summary() for name, tally in self._tallies.items()},
                "choices": choices,
                "unavailable": dict(self._unavailable),
            }


def create_auto_dispatcher() -> HybridDispatcher:
    """Make a dispatcher with the default settings."""
    return HybridDispatcher()


@functools.cache
def default_dispatcher() -> HybridDispatcher:
    """Return the dispatcher that this process shares."""
    return HybridDispatcher()


# -- arrays --------------------------------------------------------------------------------------------------


def _kind(array: Array) -> str:
    """Return where an array lies: numpy, cpu (a tensor) or cuda (a tensor)."""
    if type(array) is np.ndarray or not is_tensor(array):
        return "numpy"
    return cast(str, array.device.type)


def _as_array(values: Any) -> Array:
    return values if type(values) is np.ndarray or is_tensor(values) else np.asarray(values)


def _as_bytes(data: Any) -> Array:
    if isinstance(data, bytes | bytearray | memoryview):
        data = np.frombuffer(data, np.uint8)
    return _as_array(data)


def _on_host(array: Array) -> Array:
    return array.detach().cpu().numpy() if is_tensor(array) else np.asarray(array)


def _brought(array: Array, backend: Backend) -> Array:
    """Return a tensor as a numpy array for backends that do not take tensors from where it lies."""
    if type(array) is np.ndarray or backend.name in ("torch", "cuda") or not is_tensor(array):
        return array
    return array if array.is_cpu and backend.name in ("c", "cpp") else _on_host(array)


def _given_back(result: Any, like: Array) -> Any:
    """Return the result as numpy arrays where `like` is one, else as tensors of its device."""
    if isinstance(result, tuple):
        return tuple(_given_back(one, like) for one in result)
    if not is_tensor(like):
        return result
    if not is_tensor(result):
        result = sys.modules["torch"].from_numpy(np.asarray(result))
    return result.to(like.device)


def _first_values(values: Array, group: Group) -> Array:
    """Return the first SAMPLE values: whole rows where groups lie in rows."""
    if math.prod(values.shape) <= SAMPLE:
        return values
    if group == "tensor" or len(values.shape) != 2:
        return values.reshape(-1)[:SAMPLE]
    return values[: max(1, SAMPLE // values.shape[1])]


def _whole_blocks(data: Array, n: int, levels: str) -> tuple[Array, int]:
    """Return the bytes of at most SAMPLE codes, and their count: whole blocks stand for themselves."""
    if n <= SAMPLE or levels not in CODES:
        return data, n
    block = CODES[levels] * WIDTH
    count = SAMPLE // block * block
    return data[: packed_size(count, levels)], count


def _holds_nan(result: Array, group: Group) -> bool:
    """Say whether a group is NaN: then all of it is, so its first value tells."""
    if math.prod(result.shape) == 0:
        return False
    if group == "tensor":
        first = result.reshape(-1)[0]
        return bool(first != first)
    every = result[:, :1] if group == "row" else result[:, :: cast(int, group)]
    return bool((every != every).any())


def _timed(work: Work, backend: Backend, kind: str) -> tuple[Any, float]:
    """Return the result, and the median of the milliseconds that the work took."""
    result = work(backend)
    times = []
    for _ in range(REPEATS):
        _wait(kind)
        begin = time.perf_counter()
        work(backend)
        _wait(kind)
        times.append(1e3 * (time.perf_counter() - begin))
    return result, statistics.median(times)


def _wait(kind: str) -> None:
    if kind == "cuda":
        sys.modules["torch"].cuda.synchronize()


def _same_bits(one: Any, other: Any) -> bool:
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_same_bits, one, other))
    first = _on_host(one)
    second = _on_host(other)
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    if first.tobytes() == second.tobytes():
        return True
    wrong = first != first  # NaN has many bit patterns
    if not np.array_equal(wrong, second != second):
        return False
    return bool(first[~wrong].tobytes() == second[~wrong].tobytes())


def _has_driver() -> bool:
    return "torch" in sys.modules or any(map(os.path.exists, _DRIVERS))

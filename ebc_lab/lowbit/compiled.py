"""The low-bit operations compiled from C and C++ at their first use (docs/lowbit.md, backends).

* `kernels.c` runs on one thread, `kernels.cpp` on `threads`; both give the bits of the numpy reference.
* A library's name holds the sha256 of all that made it, the CPU's features included: a home folder shared
  with another CPU, an edited source or a new compiler never meet a library of before. Beside it lies its own
  sha256, so that a damaged one is built again. It is built under another name and renamed.
* Whatever goes wrong (no compiler, a failing or hanging one, a folder that cannot be written, a library that
  does not load or counts wrongly) is a `BackendUnavailableError` with the reason; nothing else is affected.
* Arrays are numpy's or torch's on the CPU; tensors are read where they lie. torch is not imported here.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, cast

import numpy as np

from .levels import (
    Array,
    Group,
    Scale,
    as_float32,
    check_finite,
    check_group,
    check_levels,
    check_scale,
    check_step,
    steps_shape,
)
from .packing import check_bytes, check_codes, packed_size, refuse_length

_Dtype: TypeAlias = np.dtype[Any]

FLAGS = (
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
)
COMPILE_SECONDS = 60.0  # that a compiler may take
_HERE = Path(__file__).parent
_FLOAT32, _INT8, _UINT8 = np.dtype(np.float32), np.dtype(np.int8), np.dtype(np.uint8)
_SCALE_CODES: dict[Scale, int] = {"absmean": 0, "absmax": 1}  # as in the kernels
_GIVEN = 2
_NOT_FINITE, _NO_MEMORY = 1, -1


class BackendUnavailableError(ValueError):
    """A backend cannot be used here; the message says why and what to do."""


@dataclass(frozen=True)
class _Language:
    source: str
    variable: str  # of the environment, that names a compiler
    compiler: str  # without it
    flags: tuple[str, ...]


_LANGUAGES = {
    "c": _Language("kernels.c", "CC", "cc", ("-std=c11", "-pthread")),
    "cpp": _Language("kernels.cpp", "CXX", "c++", ("-std=c++17", "-pthread")),
}
_HEADERS = ("kmeans.h",)

# What each function takes; all but ebc_decode return an int64. Addresses travel as plain integers.
_P, _L, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "ebc_quantize": (_P, _L, _L, _L, _I, _I, _P, _P, _P, _I),
    "ebc_decode": (_P, _L, _L, _L, _P, _P, _I),
    "ebc_stochastic": (_P, _L, _I, ctypes.c_float, ctypes.c_uint32, _P, _I),
    "ebc_pack": (_P, _L, _I, _P, _I),
    "ebc_unpack": (_P, _L, _I, _P, _I),
    "ebc_unpack_values": (_P, _L, _L, _L, _I, _P, _P, _I),
    "ebc_kmeans": (_P, _L, _L, _P, _L, _L, _P, _I),
}

# -- building ------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where compiled libraries are kept: $EBC_LAB_LOWBIT_CACHE, else ebc-lab/lowbit in the user's cache."""
    own = os.environ.get("EBC_LAB_LOWBIT_CACHE")
    if own:
        return Path(own)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "ebc-lab" / "lowbit"


_loaded: dict[tuple[object, ...], ctypes.CDLL | BackendUnavailableError] = {}
_one_at_a_time = threading.Lock()


def library(name: str) -> ctypes.CDLL:
    """The compiled library "c" or "cpp", built if the cache does not hold it; the outcome is remembered.

    BackendUnavailableError where there is none, with the reason.
    """
    if name not in _LANGUAGES:
        raise ValueError(f"a compiled backend is one of {', '.join(_LANGUAGES)}, not {name!r}")
    variables = (_LANGUAGES[name].variable, "PATH", "EBC_LAB_LOWBIT_CACHE", "XDG_CACHE_HOME", "HOME")
    setting = (name, FLAGS, *(os.environ.get(variable) for variable in variables))
    with _one_at_a_time:
        if setting not in _loaded:
            try:
                _loaded[setting] = _built_or_cached(name)
            except BackendUnavailableError as error:
                _loaded[setting] = error
    outcome = _loaded[setting]
    if isinstance(outcome, BackendUnavailableError):
        raise BackendUnavailableError(*outcome.args)
    return outcome


def _unavailable(name: str, reason: str) -> BackendUnavailableError:
    return BackendUnavailableError(f"the backend {name} is not available: {reason}")


def _built_or_cached(name: str) -> ctypes.CDLL:
    command = _compiler(name)
    try:
        folder = cache_folder()
    except RuntimeError as error:  # no home
        raise _unavailable(name, f"{error}; set EBC_LAB_LOWBIT_CACHE to a folder") from error
    path = folder / f"lowbit-{name}-{_fingerprint(name, command)}.so"
    if _is_whole(path):
        with contextlib.suppress(BackendUnavailableError):
            return _load(name, path)
    _build(name, command, path)
    return _load(name, path)


def _compiler(name: str) -> list[str]:
    language = _LANGUAGES[name]
    command = shlex.split(os.environ.get(language.variable, "")) or [language.compiler]
    found = shutil.which(command[0])
    if found is None:
        advice = f"install one (gcc or clang) or set {language.variable} to one"
        raise _unavailable(name, f"there is no compiler {command[0]!r}; {advice}")
    return [found, *command[1:]]


def _flags(name: str) -> tuple[str, ...]:
    return (*FLAGS, *_LANGUAGES[name].flags)


def _fingerprint(name: str, command: list[str]) -> str:
    """The sha256 of sources, flags, compiler and CPU features."""
    digest = hashlib.sha256()
    for source in (_LANGUAGES[name].source, *_HEADERS):
        digest.update((_HERE / source).read_bytes())
    with tempfile.TemporaryDirectory() as scratch:
        version = _run(name, [*command, "--version"], Path(scratch))
    for text in (*_flags(name), *command, version, _cpu_features()):
        digest.update(b"\0" + text.encode())
    return digest.hexdigest()


def _cpu_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.partition(":")[0].strip().lower() in ("flags", "features"):
            return line
    return f"{platform.machine()} {platform.processor()}"


def _run(name: str, command: list[str], scratch: Path) -> str:
    """What a compiler prints. After COMPILE_SECONDS it is ended, with all the processes that it began."""
    with (scratch / "output").open("w+b") as output:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise _unavailable(name, f"{command[0]} cannot be run: {error}") from error
        try:
            code = process.wait(COMPILE_SECONDS)
        except (
            BaseException
        ) as error:  # Ctrl-C too: the compiler has a session of its own and does not hear it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            reason = (
                f"{command[0]} did not end within {COMPILE_SECONDS:g} s and was stopped; set another compiler"
            )
            raise _unavailable(name, reason) from error
        output.seek(0)
        said = output.read().decode(errors="replace")
    if code != 0:
        last = " ".join(said.split())[-400:] or "it printed nothing"
        variable = _LANGUAGES[name].variable
        reason = (
            f"`{shlex.join(command)}` failed with code {code}: {last}; set {variable} to a working compiler"
        )
        raise _unavailable(name, reason)
    return said


def _build(name: str, command: list[str], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=".build-", dir=path.parent, ignore_cleanup_errors=True
        ) as scratch:
            built = Path(scratch) / "library.so"
            source = str(_HERE / _LANGUAGES[name].source)
            _run(name, [*command, *_flags(name), source, "-o", str(built), "-lm"], Path(scratch))
            content = built.read_bytes()
            check = Path(scratch) / "checksum"
            check.write_text(hashlib.sha256(content).hexdigest())
            os.replace(built, path)
            os.replace(check, _checksum_of(path))
    except OSError as error:
        advice = "set EBC_LAB_LOWBIT_CACHE to a folder that can be written"
        raise _unavailable(name, f"{path.parent} cannot hold its library ({error}); {advice}") from error


def _checksum_of(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _is_whole(path: Path) -> bool:
    """Whether the library is there, all of it: to load a truncated one could end the process."""
    try:
        expected = _checksum_of(path).read_text(encoding="utf-8", errors="replace")
        return hashlib.sha256(path.read_bytes()).hexdigest() == expected
    except OSError:
        return False


def _load(name: str, path: Path) -> ctypes.CDLL:
    try:
        loaded = ctypes.CDLL(str(path))
        for function, arguments in _SIGNATURES.items():
            entry = getattr(loaded, function)
            entry.argtypes = arguments
            entry.restype = None if function == "ebc_decode" else _L
    except (OSError, AttributeError) as error:
        reason = f"its library does not load ({error}); set {_LANGUAGES[name].variable} to another compiler"
        raise _unavailable(name, reason) from error
    if not _counts_rightly(loaded):
        advice = f"set {_LANGUAGES[name].variable} to another compiler than that of {path}"
        raise _unavailable(name, f"its library gives wrong codes; {advice}")
    return loaded


def _counts_rightly(loaded: ctypes.CDLL) -> bool:
    """Values of mean 1 whose codes, with ties, are known: above 0.5 it is 1, from 1.5 on 2."""
    values = np.array([0.5, -0.5, 1.5, -1.5, 1.4999999, 0.5000001, -0.0, 2.0, 2.0, -0.0], dtype=np.float32)
    expected = np.array([0, 0, 2, -2, 1, 1, 0, 2, 2, 0], dtype=np.int8)
    step = np.zeros(1, dtype=np.float32)
    codes = np.empty_like(expected)
    data = np.empty(7, dtype=np.uint8)
    back = np.empty_like(expected)
    n = len(values)
    of = _NUMPY.address
    made = loaded.ebc_quantize(of(values), 1, n, n, 2, _SCALE_CODES["absmean"], of(step), of(codes), None, 1)
    packed = loaded.ebc_pack(of(codes), n, 2, of(data), 1)
    unpacked = loaded.ebc_unpack(of(data), n, 2, of(back), 1)
    right = np.array_equal(codes, expected) and np.array_equal(back, expected)
    return bool((made, packed, unpacked) == (0, -1, -1) and step[0] == np.float32(1.0) and right)


# -- arrays --------------------------------------------------------------------------------------------------


class _NumpyArrays:
    def take(self, array: Any, dtype: _Dtype) -> Array:
        """The array in this dtype, contiguous and aligned: itself where it is so already."""
        if type(array) is np.ndarray and array.dtype == dtype:
            flags = array.flags
            if flags.c_contiguous and flags.aligned:
                return array
        if dtype == _FLOAT32:
            array = as_float32(array)
        return np.require(np.asarray(array), dtype, ["C", "A"])

    def empty(self, shape: tuple[int, ...], dtype: _Dtype) -> Array:
        return np.empty(shape, dtype)

    def full(self, shape: tuple[int, ...], value: float) -> Array:
        return np.full(shape, value, np.float32)

    def address(self, array: Any) -> int:
        return cast(int, array.ctypes.data)

    def host(self, array: Any) -> Array:
        return array


class _TorchArrays:
    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._dtypes = {_FLOAT32: torch.float32, _INT8: torch.int8, _UINT8: torch.uint8}

    def take(self, array: Any, dtype: _Dtype) -> Array:
        if not array.is_cpu:
            raise ValueError(f"a compiled backend takes tensors of the CPU, not of {array.device}: use cuda")
        if array.is_complex():
            raise ValueError(f"values must be real numbers, not a tensor of {array.dtype}")
        wanted = self._dtypes[dtype]
        if array.dtype is wanted and array.is_contiguous() and not array.is_neg():
            return array
        return array.detach().resolve_neg().to(wanted).contiguous()

    def empty(self, shape: tuple[int, ...], dtype: _Dtype) -> Array:
        return self._torch.empty(shape, dtype=self._dtypes[dtype])

    def full(self, shape: tuple[int, ...], value: float) -> Array:
        return self._torch.full(shape, value, dtype=self._torch.float32)

    def address(self, array: Any) -> int:
        return cast(int, array.data_ptr())

    def host(self, array: Any) -> Array:
        return array.detach().cpu().numpy()


_Arrays: TypeAlias = _NumpyArrays | _TorchArrays
_NUMPY = _NumpyArrays()
_torch_arrays = functools.cache(_TorchArrays)


def _kind(array: Any) -> _Arrays:
    if type(array) is not np.ndarray and "torch" in sys.modules:
        torch = sys.modules["torch"]
        if isinstance(array, torch.Tensor):
            return _torch_arrays(torch)
    return _NUMPY


def _room(kind: _Arrays, shape: tuple[int, ...], dtype: _Dtype, out: Any) -> Array:
    """A new array, or `out` where it fits."""
    if out is None:
        return kind.empty(shape, dtype)
    if _kind(out) is kind and tuple(out.shape) == shape and kind.take(out, dtype) is out:
        return out
    raise ValueError(f"out must be a contiguous array of {dtype} and shape {shape}, of the input's kind")


# -- the backend ---------------------------------------------------------------------------------------------


class CompiledBackend:
    """The operations of `backends.Backend` in C ("c", one thread) or C++ ("cpp", `threads` threads).

    Numpy in, numpy out; CPU tensor in, CPU tensor out. Contiguous float32 (int8, uint8) is not copied.
    `out`, where given, takes the result: contiguous, of its dtype and shape, apart from the input.
    """

    def __init__(self, name: str, threads: int = 1) -> None:
        if threads < 1:
            raise ValueError(f"a backend needs at least 1 thread, not {threads}")
        self.name = name
        self.threads = threads if name == "cpp" else 1
        self._calls = library(name)

    def quantize(
        self,
        values: Array,
        levels: str,
        group: Group = "tensor",
        scale: Scale = "absmean",
        *,
        out: Array = None,
    ) -> tuple[Array, Array]:
        """The nearest codes, int8, and the steps. ValueError where a value is NaN or infinite."""
        kind = _kind(values)
        values = kind.take(values, _FLOAT32)
        codes = _room(kind, values.shape, _INT8, out)
        return codes, self._quantize(kind, values, levels, group, scale, kind.address(codes), None)

    def effective(
        self,
        values: Array,
        levels: str,
        group: Group = "tensor",
        scale: Scale = "absmean",
        *,
        out: Array = None,
    ) -> Array:
        """step * code, float32; NaN throughout a group that holds NaN or infinity."""
        kind = _kind(values)
        values = kind.take(values, _FLOAT32)
        result = _room(kind, values.shape, _FLOAT32, out)
        self._quantize(kind, values, levels, group, scale, None, kind.address(result))
        return result

    def _quantize(
        self,
        kind: _Arrays,
        values: Array,
        levels: str,
        group: Group,
        scale: Scale,
        codes: int | None,
        result: int | None,
    ) -> Array:
        """Writes codes or values to these addresses and returns the steps."""
        top = check_levels(levels)
        scale = check_scale(scale)
        shape = values.shape
        rows, columns, width = _layout(shape, check_group(group, shape))
        of_steps = steps_shape(shape, group)
        if rows * columns == 0:
            return kind.full(of_steps, 0.0)
        steps = kind.empty(of_steps, _FLOAT32) if isinstance(scale, str) else kind.full(of_steps, scale)
        at = kind.address(values), kind.address(steps)
        by = _SCALE_CODES.get(scale, _GIVEN)
        outcome = self._calls.ebc_quantize(
            at[0], rows, columns, width, top, by, at[1], codes, result, self.threads
        )
        if outcome == _NO_MEMORY:
            raise MemoryError(f"no memory to quantize {rows * columns} values")
        if outcome == _NOT_FINITE:
            _refuse(kind, values)
        return steps

    def decode(
        self, codes: Array, steps: Array, levels: str, group: Group = "tensor", *, out: Array = None
    ) -> Array:
        """step * code, float32, +0 where the code is 0."""
        check_levels(levels)
        kind = _kind(codes)
        codes = kind.take(codes, _INT8)
        layout = _layout(codes.shape, check_group(group, codes.shape))
        steps = _checked_steps(kind, steps, codes.shape, group)
        result = _room(kind, codes.shape, _FLOAT32, out)
        at = kind.address(steps), kind.address(result)
        self._calls.ebc_decode(kind.address(codes), *layout, *at, self.threads)
        return result

    def stochastic(self, values: Array, levels: str, step: float, key: int, *, out: Array = None) -> Array:
        """The stochastic codes, int8; `key` is a `rounding_key`. ValueError where a value is not finite."""
        top = check_levels(levels)
        step = check_step(step)
        kind = _kind(values)
        values = kind.take(values, _FLOAT32)
        codes = _room(kind, values.shape, _INT8, out)
        at = kind.address(values), kind.address(codes)
        n = math.prod(values.shape)
        if step == 0:
            check_finite(kind.host(values))
            codes[...] = 0
        elif self._calls.ebc_stochastic(at[0], n, top, step, key & 0xFFFFFFFF, at[1], self.threads):
            _refuse(kind, values)
        return codes

    def pack(self, codes: Array, levels: str, *, out: Array = None) -> Array:
        """Codes, row-major, as flat uint8 of `packed_size` bytes. ValueError for what is no code."""
        top = check_levels(levels)
        kind = _kind(codes)
        taken = kind.take(codes, _INT8)
        if taken is not codes:
            check_codes(kind.host(codes), levels)  # before they were rounded to int8
        n = math.prod(taken.shape)
        data = _room(kind, (packed_size(n, levels),), _UINT8, out)
        wrong = self._calls.ebc_pack(kind.address(taken), n, top, kind.address(data), self.threads)
        if wrong >= 0:
            check_codes(kind.host(taken), levels)
        return data

    def unpack(self, data: Array, n: int, levels: str, *, out: Array = None) -> Array:
        """The n codes, flat int8. ValueError for another length, or naming the first byte without codes."""
        top = check_levels(levels)
        kind, data = _checked_bytes(data, n, levels)
        codes = _room(kind, (n,), _INT8, out)
        wrong = self._calls.ebc_unpack(kind.address(data), n, top, kind.address(codes), self.threads)
        _refuse_byte(data, wrong, levels)
        return codes

    def unpack_values(
        self,
        data: Array,
        shape: tuple[int, ...],
        steps: Array,
        levels: str,
        group: Group = "tensor",
        *,
        out: Array = None,
    ) -> Array:
        """The values of packed codes, float32 of this shape, without codes between; errors as in `unpack`."""
        top = check_levels(levels)
        shape = tuple(shape)
        layout = _layout(shape, check_group(group, shape))
        kind, data = _checked_bytes(data, math.prod(shape), levels)
        steps = _checked_steps(kind, steps, shape, group)
        result = _room(kind, shape, _FLOAT32, out)
        at = kind.address(steps), kind.address(result)
        wrong = self._calls.ebc_unpack_values(kind.address(data), *layout, top, *at, self.threads)
        _refuse_byte(data, wrong, levels)
        return result

    def kmeans(self, grid: Array, start: Array, max_iter: int) -> tuple[Array, Array, int]:
        """Lloyd's passes on a grid of integers (n, d) from centres (k, d): (labels, centres, passes)."""
        points = np.require(np.asarray(grid), np.float64, ["C", "A"])
        centres = np.array(start, dtype=np.float64, order="C")
        fit = points.ndim == 2 and centres.ndim == 2 and points.shape[1:] == centres.shape[1:]
        if not (fit and 1 <= len(centres) <= len(points) and points.size and max_iter >= 1):
            given = f"grid {points.shape}, start {centres.shape}, {max_iter} passes"
            raise ValueError(
                f"k-means needs a grid (n, d), a start (k, d) with k <= n, and a pass, not {given}"
            )
        labels = np.empty(len(points), dtype=np.int32)
        at = _NUMPY.address(points), _NUMPY.address(centres), _NUMPY.address(labels)
        sizes = len(centres), max_iter
        passes = self._calls.ebc_kmeans(at[0], *points.shape, at[1], *sizes, at[2], self.threads)
        if passes < 0:
            raise MemoryError(f"no memory for k-means of a grid of shape {points.shape}")
        return labels, centres, int(passes)


def _layout(shape: tuple[int, ...], group: Group) -> tuple[int, int, int]:
    """(rows, columns, neighbours in a group) of a row-major array: one row and one group for a tensor."""
    if group == "tensor":
        n = math.prod(shape)
        return 1, n, n
    rows, columns = shape
    return rows, columns, columns if group == "row" else min(cast(int, group), columns)


def _refuse(kind: _Arrays, values: Array) -> NoReturn:
    check_finite(kind.host(values))
    raise RuntimeError("the values changed while they were quantized: keep other threads from writing them")


def _checked_steps(kind: _Arrays, steps: Array, shape: tuple[int, ...], group: Group) -> Array:
    steps = kind.take(steps, _FLOAT32)
    expected = steps_shape(shape, group)
    if tuple(steps.shape) != expected:
        raise ValueError(f"values of shape {shape} have steps of shape {expected}, not {tuple(steps.shape)}")
    return steps


def _checked_bytes(data: Array, n: int, levels: str) -> tuple[_Arrays, Array]:
    kind = _kind(data)
    if kind is _NUMPY:
        return kind, check_bytes(data, n, levels)
    data = kind.take(data.reshape(-1), _UINT8)
    refuse_length(len(data), n, levels)
    return kind, data


def _refuse_byte(data: Array, index: int, levels: str) -> None:
    if index >= 0:
        raise ValueError(
            f"byte {index} of the packed data, {int(data[index])}, holds no {levels} codes: "
            "the data is damaged, or was packed with other levels"
        )

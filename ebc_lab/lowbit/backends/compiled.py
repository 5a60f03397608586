"""The low-bit operations in C and C++ (docs/lowbit.md, backends).

* `kernels.c` runs on one thread, `kernels.cpp` on `threads`; both give the bits of the numpy reference.
* Arrays are numpy's or torch's on the CPU; tensors are read where they lie. torch is not imported here.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import Any, NoReturn, TypeAlias, cast

import numpy as np

from .build import SCALE_CODES, library
from .formulas import (
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
from .planes import check_bytes, check_codes, packed_size, refuse_length

_Dtype: TypeAlias = np.dtype[Any]

_FLOAT32, _INT8, _UINT8 = np.dtype(np.float32), np.dtype(np.int8), np.dtype(np.uint8)
_GIVEN = 2
_NOT_FINITE, _NO_MEMORY = 1, -1

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
        by = SCALE_CODES.get(scale, _GIVEN)
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

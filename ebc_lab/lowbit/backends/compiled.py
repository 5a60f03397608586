"""The low-bit operations in C and C++ (docs/lowbit.md, backends).

* `kernels.c` runs them on one thread, `kernels.cpp` on `threads`; both give the bits of the numpy reference.
* Arrays are numpy's or torch's on the CPU; tensors are read where they lie. torch is not imported here.
"""

from __future__ import annotations

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
    is_tensor,
    steps_shape,
)
from .planes import check_bytes, check_codes, packed_size

_Dtype: TypeAlias = np.dtype[Any]

_FLOAT32, _INT8, _UINT8 = np.dtype(np.float32), np.dtype(np.int8), np.dtype(np.uint8)
_NAMES = {_FLOAT32: "float32", _INT8: "int8", _UINT8: "uint8"}  # in torch
_GIVEN = 2
_NOT_FINITE, _NO_MEMORY = 1, -1

# -- arrays --------------------------------------------------------------------------------------------------


def _taken(array: Any, dtype: _Dtype) -> Array:
    """Return an array or a tensor as numpy's, in this dtype, contiguous and aligned: the same memory where it
    is so already."""
    if type(array) is np.ndarray and array.dtype == dtype:
        flags = array.flags
        if flags.c_contiguous and flags.aligned:
            return array
    if is_tensor(array):
        if not array.is_cpu:
            raise ValueError(f"a compiled backend takes tensors of the CPU, not of {array.device}: use cuda")
        if array.is_complex():
            raise ValueError(f"values must be real numbers, not a tensor of {array.dtype}")
        wanted = getattr(sys.modules["torch"], _NAMES[dtype])
        array = array.detach()
        if array.dtype is not wanted or not array.is_contiguous() or array.is_neg():
            array = array.resolve_neg().to(wanted).contiguous()
        return array.numpy()
    if dtype == _FLOAT32:
        array = as_float32(array)
    return np.require(np.asarray(array), dtype, ["C", "A"])


def _given_back(array: Array, like: object) -> Array:
    """Return a result as a tensor where the input was one."""
    return sys.modules["torch"].from_numpy(array) if is_tensor(like) else array


def _room(like: object, shape: tuple[int, ...], dtype: _Dtype, out: Any) -> Array:
    """Make a new array, or check that `out` fits, which is of the kind of `like`."""
    if out is None:
        return np.empty(shape, dtype)
    if is_tensor(out) == is_tensor(like) and tuple(out.shape) == shape:
        room = _taken(out, dtype)
        if room is out or (is_tensor(out) and room.ctypes.data == out.data_ptr()):
            return room
    raise ValueError(f"out must be a contiguous array of {dtype} and shape {shape}, of the input's kind")


def _address(array: Array) -> int:
    return cast(int, array.__array_interface__["data"][0])  # in half the time of array.ctypes


# -- the backend ---------------------------------------------------------------------------------------------


class CompiledBackend:
    """The operations of `backends.Backend`, and the errors they raise, in C ("c", one thread) or C++ ("cpp",
    `threads` threads).

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
        out: Any = None,
    ) -> tuple[Array, Array]:
        weights = _taken(values, _FLOAT32)
        codes = _room(values, weights.shape, _INT8, out)
        steps = self._quantize(weights, levels, group, scale, _address(codes), None)
        return _given_back(codes, values) if out is None else out, _given_back(steps, values)

    def effective(
        self,
        values: Array,
        levels: str,
        group: Group = "tensor",
        scale: Scale = "absmean",
        *,
        out: Any = None,
    ) -> Array:
        weights = _taken(values, _FLOAT32)
        result = _room(values, weights.shape, _FLOAT32, out)
        self._quantize(weights, levels, group, scale, None, _address(result))
        return _given_back(result, values) if out is None else out

    def _quantize(
        self, weights: Array, levels: str, group: Group, scale: Scale, codes: int | None, result: int | None
    ) -> Array:
        """Write codes or values to these addresses; return the steps."""
        top = check_levels(levels)
        scale = check_scale(scale)
        shape = weights.shape
        layout = _layout(shape, check_group(group, shape))
        if weights.size == 0:
            return np.zeros(steps_shape(shape, group), np.float32)
        steps = np.empty(steps_shape(shape, group), np.float32)
        if not isinstance(scale, str):
            steps[...] = scale
        by = SCALE_CODES.get(scale, _GIVEN)
        at = _address(weights), _address(steps)
        outcome = self._calls.ebc_quantize(at[0], *layout, top, by, at[1], codes, result, self.threads)
        if outcome == _NO_MEMORY:
            raise MemoryError(f"no memory to quantize {weights.size} values")
        if outcome == _NOT_FINITE:
            _refuse(weights)
        return steps

    def decode(
        self, codes: Array, steps: Array, levels: str, group: Group = "tensor", *, out: Any = None
    ) -> Array:
        check_levels(levels)
        taken = _taken(codes, _INT8)
        layout = _layout(taken.shape, check_group(group, taken.shape))
        sizes = _checked_steps(steps, taken.shape, group)
        result = _room(codes, taken.shape, _FLOAT32, out)
        self._calls.ebc_decode(_address(taken), *layout, _address(sizes), _address(result), self.threads)
        return _given_back(result, codes) if out is None else out

    def stochastic(self, values: Array, levels: str, step: float, key: int, *, out: Any = None) -> Array:
        top = check_levels(levels)
        step = check_step(step)
        weights = _taken(values, _FLOAT32)
        codes = _room(values, weights.shape, _INT8, out)
        at = _address(weights), _address(codes)
        if step == 0:
            check_finite(weights)
            codes[...] = 0
        elif self._calls.ebc_stochastic(
            at[0], weights.size, top, step, key & 0xFFFFFFFF, at[1], self.threads
        ):
            _refuse(weights)
        return _given_back(codes, values) if out is None else out

    def pack(self, codes: Array, levels: str, *, out: Any = None) -> Array:
        top = check_levels(levels)
        taken = _taken(codes, _INT8)
        if str(getattr(codes, "dtype", "")) not in ("int8", "torch.int8"):  # check them as they came
            check_codes(codes.detach().numpy() if is_tensor(codes) else codes, levels)
        data = _room(codes, (packed_size(taken.size, levels),), _UINT8, out)
        wrong = self._calls.ebc_pack(_address(taken), taken.size, top, _address(data), self.threads)
        if wrong >= 0:
            check_codes(taken, levels)
        return _given_back(data, codes) if out is None else out

    def unpack(self, data: Array, n: int, levels: str, *, out: Any = None) -> Array:
        """Return the n codes, flat int8. ValueError for another length, or naming the first byte without
        codes."""
        top = check_levels(levels)
        taken = _checked_bytes(data, n, levels)
        codes = _room(data, (n,), _INT8, out)
        wrong = self._calls.ebc_unpack(_address(taken), n, top, _address(codes), self.threads)
        _refuse_byte(taken, wrong, levels)
        return _given_back(codes, data) if out is None else out

    def unpack_values(
        self,
        data: Array,
        shape: tuple[int, ...],
        steps: Array,
        levels: str,
        group: Group = "tensor",
        *,
        out: Any = None,
    ) -> Array:
        """Return the values of packed codes, float32 of this shape, without codes between; errors as in
        `unpack`."""
        top = check_levels(levels)
        shape = tuple(shape)
        layout = _layout(shape, check_group(group, shape))
        taken = _checked_bytes(data, math.prod(shape), levels)
        sizes = _checked_steps(steps, shape, group)
        result = _room(data, shape, _FLOAT32, out)
        at = _address(sizes), _address(result)
        wrong = self._calls.ebc_unpack_values(_address(taken), *layout, top, *at, self.threads)
        _refuse_byte(taken, wrong, levels)
        return _given_back(result, data) if out is None else out

    def kmeans(self, grid: Array, start: Array, max_iter: int) -> tuple[Array, Array, int]:
        points = np.require(np.asarray(grid), np.float64, ["C", "A"])
        centres = np.array(start, dtype=np.float64, order="C")
        fit = points.ndim == 2 and centres.ndim == 2 and points.shape[1:] == centres.shape[1:]
        if not (fit and 1 <= len(centres) <= len(points) and points.size and max_iter >= 1):
            raise ValueError(
                "k-means needs a grid (n, d), a start (k, d) with k <= n, and a pass, not "
                f"grid {points.shape}, start {centres.shape}, {max_iter} passes"
            )
        labels = np.empty(len(points), dtype=np.int32)
        at = _address(points), _address(centres), _address(labels)
        sizes = len(centres), max_iter
        passes = self._calls.ebc_kmeans(at[0], *points.shape, at[1], *sizes, at[2], self.threads)
        if passes < 0:
            raise MemoryError(f"no memory for k-means of a grid of shape {points.shape}")
        return labels, centres, int(passes)


def _layout(shape: tuple[int, ...], group: Group) -> tuple[int, int, int]:
    """Return (rows, columns, neighbours in a group), row-major: one row and one group for a tensor."""
    if group == "tensor":
        n = math.prod(shape)
        return 1, n, n
    rows, columns = shape
    return rows, columns, columns if group == "row" else min(cast(int, group), columns)


def _refuse(values: Array) -> NoReturn:
    check_finite(values)
    raise RuntimeError("the values changed while they were quantized: keep other threads from writing them")


def _checked_steps(steps: Array, shape: tuple[int, ...], group: Group) -> Array:
    steps = _taken(steps, _FLOAT32)
    expected = steps_shape(shape, group)
    if steps.shape != expected:
        raise ValueError(f"values of shape {shape} have steps of shape {expected}, not {steps.shape}")
    return steps


def _checked_bytes(data: Array, n: int, levels: str) -> Array:
    if is_tensor(data):
        data = _taken(data.reshape(-1), _UINT8)
    return check_bytes(data, n, levels)


def _refuse_byte(data: Array, index: int, levels: str) -> None:
    if index >= 0:
        raise ValueError(
            f"byte {index} of the packed data, {int(data[index])}, holds no {levels} codes: "
            "the data is damaged, or was packed with other levels"
        )

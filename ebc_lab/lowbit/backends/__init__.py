"""Who computes: numpy (the reference), torch on a CPU or GPU, compiled C and C++, cupy (docs/lowbit.md).

All give the same bits, because only comparisons, single IEEE operations and exact integer sums decide. Where
a backend cannot be used, `get_backend` says why, and everything else works without it. torch is loaded
at first use.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any, cast

import numpy as np

from .build import BackendUnavailableError as BackendUnavailableError
from .compiled import CompiledBackend
from .formulas import (
    CHUNK,
    Array,
    Group,
    Scale,
    as_float32,
    check_finite,
    check_group,
    check_levels,
    check_scale,
    check_step,
    decode,
    encode,
    key_at,
    steps_of,
    stochastic_codes,
)
from .lloyd import lloyd_numpy, lloyd_torch
from .planes import (
    check_bytes,
    check_codes,
    pack_flat,
    refuse_codes,
    refuse_length,
    refuse_wrong,
    unpack_flat,
)

NAMES = ("numpy", "c", "cpp", "torch", "cuda", "cupy")


class Backend:
    """The operations with their checks, on numpy's arrays; what other arrays need is replaced in a subclass.

    Arrays are numpy's unless a backend says that it takes others as well. Values are float32 of any shape
    (2-D for the groups other than "tensor"); codes are int8 of that shape; steps are float32 of shape (),
    (rows,) or (rows, ceil(columns / g)).
    """

    name = ""
    chunk = CHUNK  # values whose stochastic codes are drawn together

    def __init__(self, xp: Any = np) -> None:
        self.xp = xp
        self._empty: Callable[[int, str], Array] = xp.empty
        self._steps: Callable[[Array, str, Group, Scale], Array] = functools.partial(steps_of, xp)
        self._encode: Callable[[Array, Array, str, Group], Array] = functools.partial(encode, xp)
        self._decode: Callable[[Array, Array, Group], Array] = functools.partial(decode, xp)
        self._draw: Callable[[Array, str, float, int], Array] = functools.partial(stochastic_codes, xp)

    def quantize(
        self, values: Array, levels: str, group: Group = "tensor", scale: Scale = "absmean"
    ) -> tuple[Array, Array]:
        """Return the nearest codes and the steps. ValueError where a value is NaN or infinite."""
        weights, steps = self._weights_and_steps(values, levels, group, scale)
        if not bool((steps == steps).all()):  # the step of what is not finite is NaN
            check_finite(as_float32(values))
        codes = self._encode(weights, steps, levels, group)
        return self._give(codes, values), self._give(steps, values)

    def effective(
        self, values: Array, levels: str, group: Group = "tensor", scale: Scale = "absmean"
    ) -> Array:
        """Return step * code for each value. A group that holds NaN or infinity is NaN throughout: nothing is
        refused, and a diverged run shows it."""
        weights, steps = self._weights_and_steps(values, levels, group, scale)
        codes = self._encode(weights, steps, levels, group)
        return self._give(self._decode(codes, steps, group), values)

    def decode(self, codes: Array, steps: Array, levels: str, group: Group) -> Array:
        """Return step * code, +0 where the code is 0."""
        check_levels(levels)
        return self._give(self._decode(self._moved(codes), self._take(steps), group), codes)

    def stochastic(self, values: Array, levels: str, step: float, key: int) -> Array:
        """Return the stochastic codes of finite values; `key` is a `rounding_key`."""
        check_levels(levels)
        step = check_step(step)
        weights = self._take(values)
        flat = weights.reshape(-1)
        codes = self._empty(len(flat), "int8")
        for start in range(0, len(flat), self.chunk):
            part = slice(start, start + self.chunk)
            codes[part] = self._draw(flat[part], levels, step, key_at(key, start))
        return self._give(codes.reshape(weights.shape), values)

    def pack(self, codes: Array, levels: str) -> Array:
        """Return codes, row-major, as flat uint8 of `packed_size` bytes. ValueError for what is no code."""
        return self._give(pack_flat(self._flat_codes(codes, levels), levels, self._empty), codes)

    def unpack(self, data: Array, n: int, levels: str) -> Array:
        """Return the n codes, flat. ValueError where the bytes are no codes."""
        codes, wrong = unpack_flat(self._flat_bytes(data, n, levels), n, levels, self._empty)
        if wrong:
            refuse_wrong(int(sum((left != 0).sum() for left in wrong)), levels)
        return self._give(codes, data)

    def unpack_values(
        self, data: Array, shape: tuple[int, ...], steps: Array, levels: str, group: Group
    ) -> Array:
        """Return the values of packed codes, float32 of this shape."""
        codes = self.unpack(data, math.prod(shape), levels).reshape(shape)
        return self.decode(codes, steps, levels, group)

    def kmeans(self, grid: Array, start: Array, max_iter: int) -> tuple[Array, Array, int]:
        """Do Lloyd's passes on a grid of integers (n, d) from centres (k, d): (labels, centres, passes)."""
        return lloyd_numpy(grid, start, max_iter)

    def _weights_and_steps(
        self, values: Array, levels: str, group: Group, scale: Scale
    ) -> tuple[Array, Array]:
        check_levels(levels)
        scale = check_scale(scale)
        weights = self._take(values)
        check_group(group, tuple(weights.shape))
        return weights, self._steps(weights, levels, group, scale)

    # -- what other arrays than numpy's need in another way --------------------------------------------------

    def _take(self, values: object) -> Array:
        """Bring values here, as contiguous float32."""
        return as_float32(values)

    def _moved(self, array: Array) -> Array:
        """Bring an array here in its own dtype."""
        return self.xp.asarray(array)

    def _give(self, array: Array, like: object) -> Array:
        """Bring a result to where the argument it came from lies."""
        return np.asarray(array)

    def _flat_codes(self, codes: Array, levels: str) -> Array:
        """Bring codes here, flat and int8. ValueError for what is no code of these levels."""
        return check_codes(codes, levels)

    def _flat_bytes(self, data: Array, n: int, levels: str) -> Array:
        """Bring packed codes here, flat and uint8. ValueError for what n codes cannot be."""
        return check_bytes(data, n, levels)


class NumpyBackend(Backend):
    """The reference: vectorised numpy."""

    name = "numpy"


class CupyBackend(Backend):
    """The same formulas on cupy's arrays: numpy in, numpy out; cupy in, cupy out; k-means on the host."""

    name = "cupy"
    chunk = sys.maxsize

    def __init__(self) -> None:
        import cupy  # type: ignore[import-not-found,unused-ignore]

        super().__init__(cupy)

    def _take(self, values: object) -> Array:
        if isinstance(values, self.xp.ndarray) and values.dtype.kind in "fiub":
            return self.xp.ascontiguousarray(values, dtype=self.xp.float32).reshape(values.shape)
        return self.xp.asarray(as_float32(values))

    def _give(self, array: Array, like: object) -> Array:
        array = self.xp.asarray(array)
        return array if isinstance(like, self.xp.ndarray) else self.xp.asnumpy(array)

    def _flat_codes(self, codes: Array, levels: str) -> Array:
        flat = self.xp.asarray(codes).reshape(-1)
        refuse_codes(flat, levels)
        return flat.astype(self.xp.int8)

    def _flat_bytes(self, data: Array, n: int, levels: str) -> Array:
        flat = self.xp.asarray(data, dtype=self.xp.uint8).reshape(-1)
        refuse_length(flat.size, n, levels)
        return flat


class TorchBackend(Backend):
    """torch on a CPU or a GPU: numpy in, numpy out; tensor in, tensor out on the tensor's own device."""

    def __init__(self, device: str = "cpu") -> None:
        import torch

        from . import tensors

        super().__init__(torch)
        self.name = "torch" if device == "cpu" else device
        self.device = torch.device(device)
        self.chunk = CHUNK if device == "cpu" else 1 << 26  # an int64 for each value at a time
        self._empty = tensors.empty_on(self.device)
        self._steps = tensors.torch_steps
        self._encode = tensors.torch_codes
        self._decode = tensors.torch_decode
        self._draw = tensors.torch_stochastic

    def _take(self, values: object) -> Array:
        if isinstance(values, self.xp.Tensor) and not values.is_complex():
            return values.detach().to(self.device, self.xp.float32).contiguous()
        return self._moved(as_float32(values))

    def _moved(self, array: Array) -> Array:
        if not isinstance(array, self.xp.Tensor):
            array = np.asarray(array)
            if not array.flags.writeable:
                array = array.copy()  # torch has no read-only tensors
            array = self.xp.from_numpy(array)
        return array.detach().to(self.device)

    def _give(self, array: Array, like: object) -> Array:
        return array.to(like.device) if isinstance(like, self.xp.Tensor) else array.cpu().numpy()

    def _flat_codes(self, codes: Array, levels: str) -> Array:
        flat = self._moved(codes).reshape(-1)
        if flat.is_floating_point() or flat.is_complex():
            raise ValueError(f"codes must be integers, not {flat.dtype}")
        refuse_codes(flat if flat.element_size() > 1 else flat.short(), levels)  # no uint8 is below -1
        return flat.char()

    def _flat_bytes(self, data: Array, n: int, levels: str) -> Array:
        if not isinstance(data, self.xp.Tensor):
            data = check_bytes(data, n, levels)
        flat = self._moved(data).reshape(-1)
        if flat.dtype != self.xp.uint8:
            raise ValueError(f"packed codes must be bytes, not {flat.dtype}")
        refuse_length(len(flat), n, levels)
        return flat

    def kmeans(self, grid: Array, start: Array, max_iter: int) -> tuple[Array, Array, int]:
        return lloyd_torch(grid, start, max_iter, str(self.device))


# -- choosing ------------------------------------------------------------------------------------------------


def get_backend(name: str, threads: int = 1) -> Backend:
    """Return a backend by name; `threads` is for "cpp". BackendUnavailableError, saying why, where it cannot
    be used."""
    if name not in NAMES:
        raise BackendUnavailableError(f"backend must be one of {', '.join(NAMES)}, not {name!r}")
    if (name, threads) not in _MADE:
        try:
            _MADE[name, threads] = _make(name, threads)
        except BackendUnavailableError:
            raise
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            raise BackendUnavailableError(f"the backend {name} is not available: {error}") from error
    return _MADE[name, threads]


_MADE: dict[tuple[str, int], Backend] = {}


def _make(name: str, threads: int) -> Backend:
    if name == "numpy":
        return NumpyBackend()
    if name == "cupy":
        return CupyBackend()
    if name in ("c", "cpp"):
        return cast(Backend, CompiledBackend(name, threads))
    if name == "cuda" and not _torch_sees_a_gpu():
        raise BackendUnavailableError("the backend cuda is not available: torch sees no CUDA device")
    return TorchBackend("cpu" if name == "torch" else "cuda")


def _torch_sees_a_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def available_backends() -> dict[str, str | None]:
    """Return each backend's name, and None where it works, else the reason why it does not."""
    return {name: _reason(name) for name in NAMES}


def _reason(name: str) -> str | None:
    """Return None where a few values come out right on this backend, else what is wrong."""
    values = np.linspace(-1, 1, 100, dtype=np.float32)
    try:
        codes, steps = get_backend(name).quantize(values, "five")
    except Exception as error:  # a driver or a compiler may fail in ways of its own
        return " ".join(str(error).split()) or type(error).__name__
    expected_codes, expected_steps = NumpyBackend().quantize(values, "five")
    if np.array_equal(codes, expected_codes) and steps == expected_steps:
        return None
    return f"the backend {name} gives other codes than numpy"


def __getattr__(name: str) -> Any:
    if name != "HAS_GPU":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return _torch_sees_a_gpu()
    except ImportError:
        return False

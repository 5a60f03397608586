"""Who computes: numpy (the reference), torch on a CPU or GPU, compiled C and C++, cupy (docs/lowbit.md).

All give the same bits, because only comparisons, single IEEE operations and exact integer sums decide. Where
a backend cannot be used, `get_backend` says why, and everything else works without it. torch is loaded
at first use.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

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
    pack_array,
    refuse_codes,
    refuse_length,
    refuse_wrong,
    unpack_array,
)

if TYPE_CHECKING:
    from torch import Tensor

NAMES = ("numpy", "c", "cpp", "torch", "cuda", "cupy")


class Backend:
    """What every backend does. Arrays are numpy's unless a backend says that it takes others as well.

    Values are float32 of any shape (2-D for the groups other than "tensor"); codes are int8 of that shape;
    steps are float32 of shape (), (rows,) or (rows, ceil(columns / g)).
    """

    name = ""

    def quantize(
        self, values: Array, levels: str, group: Group = "tensor", scale: Scale = "absmean"
    ) -> tuple[Array, Array]:
        """The nearest codes and the steps. ValueError where a value is NaN or infinite."""
        raise NotImplementedError

    def effective(
        self, values: Array, levels: str, group: Group = "tensor", scale: Scale = "absmean"
    ) -> Array:
        """step * code for each value. A group that holds NaN or infinity is NaN throughout: nothing is
        refused, and a diverged run shows it."""
        raise NotImplementedError

    def decode(self, codes: Array, steps: Array, levels: str, group: Group) -> Array:
        """step * code, +0 where the code is 0."""
        raise NotImplementedError

    def stochastic(self, values: Array, levels: str, step: float, key: int) -> Array:
        """The stochastic codes of finite values; `key` is a `rounding_key`."""
        raise NotImplementedError

    def pack(self, codes: Array, levels: str) -> Array:
        """Codes, row-major, as flat uint8 of `packed_size` bytes."""
        raise NotImplementedError

    def unpack(self, data: Array, n: int, levels: str) -> Array:
        """The n codes, flat. ValueError where the bytes are no codes."""
        raise NotImplementedError

    def unpack_values(
        self, data: Array, shape: tuple[int, ...], steps: Array, levels: str, group: Group
    ) -> Array:
        """The values of packed codes, float32 of this shape."""
        codes = self.unpack(data, math.prod(shape), levels).reshape(shape)
        return self.decode(codes, steps, levels, group)

    def kmeans(self, grid: Array, start: Array, max_iter: int) -> tuple[Array, Array, int]:
        """Lloyd's passes on a grid of integers (n, d) from centres (k, d): (labels, centres, passes)."""
        return lloyd_numpy(grid, start, max_iter)


class NumpyBackend(Backend):
    """The reference: vectorised numpy."""

    name = "numpy"
    xp: Any = np

    def take(self, values: object) -> Array:
        """Values as this library's float32."""
        return as_float32(values)

    def give(self, array: Array, like: object) -> Array:
        """A result where the argument it came from lies."""
        return array

    def quantize(
        self, values: Array, levels: str, group: Group = "tensor", scale: Scale = "absmean"
    ) -> tuple[Array, Array]:
        weights, steps = self._steps(values, levels, group, scale)
        if not bool(self.xp.isfinite(steps).all()):
            check_finite(as_float32(values))
        codes = self.xp.asarray(encode(self.xp, weights, steps, levels, group))
        return self.give(codes, values), self.give(steps, values)

    def _steps(self, values: Array, levels: str, group: Group, scale: Scale) -> tuple[Array, Array]:
        check_levels(levels)
        scale = check_scale(scale)
        weights = self.take(values)
        check_group(group, weights.shape)
        with np.errstate(invalid="ignore"):
            return weights, steps_of(self.xp, weights, levels, group, scale)

    def effective(
        self, values: Array, levels: str, group: Group = "tensor", scale: Scale = "absmean"
    ) -> Array:
        weights, steps = self._steps(values, levels, group, scale)
        with np.errstate(invalid="ignore"):
            codes = encode(self.xp, weights, steps, levels, group)
            return self.give(self.xp.asarray(decode(self.xp, codes, steps, group)), values)

    def decode(self, codes: Array, steps: Array, levels: str, group: Group) -> Array:
        check_levels(levels)
        taken = self.xp.asarray(codes), self.xp.asarray(steps, dtype=self.xp.float32)
        return self.give(self.xp.asarray(decode(self.xp, *taken, group)), codes)

    def stochastic(self, values: Array, levels: str, step: float, key: int) -> Array:
        check_levels(levels)
        codes = stochastic_codes(self.xp, self.take(values), levels, check_step(step), key)
        return self.give(self.xp.asarray(codes), values)

    def pack(self, codes: Array, levels: str) -> Array:
        return self.give(pack_array(self.xp, check_codes(codes, levels), levels), codes)

    def unpack(self, data: Array, n: int, levels: str) -> Array:
        return self.give(unpack_array(self.xp, check_bytes(data, n, levels), n, levels), data)


class CupyBackend(NumpyBackend):
    """The same formulas on cupy's arrays: numpy in, numpy out; cupy in, cupy out; k-means on the host."""

    name = "cupy"

    def __init__(self) -> None:
        import cupy  # type: ignore[import-not-found,unused-ignore]

        self.xp = cupy

    def take(self, values: object) -> Array:
        if isinstance(values, self.xp.ndarray) and values.dtype.kind in "fiub":
            return self.xp.ascontiguousarray(values, dtype=self.xp.float32).reshape(values.shape)
        return self.xp.asarray(as_float32(values))

    def give(self, array: Array, like: object) -> Array:
        return array if isinstance(like, self.xp.ndarray) else self.xp.asnumpy(array)

    def pack(self, codes: Array, levels: str) -> Array:
        taken = self.xp.asarray(codes).reshape(-1)
        refuse_codes(taken, levels)
        return self.give(pack_array(self.xp, taken.astype(self.xp.int8), levels), codes)

    def unpack(self, data: Array, n: int, levels: str) -> Array:
        taken = self.xp.asarray(data, dtype=self.xp.uint8).reshape(-1)
        refuse_length(taken.size, n, levels)
        return self.give(unpack_array(self.xp, taken, n, levels), data)


class TorchBackend(Backend):
    """torch on a CPU or a GPU: numpy in, numpy out; tensor in, tensor out on the tensor's own device."""

    def __init__(self, device: str = "cpu") -> None:
        import torch

        from . import tensors

        self._tensors = tensors
        self.name = "torch" if device == "cpu" else device
        self.device = torch.device(device)

    def _take(self, array: object) -> Tensor:
        """Values as a contiguous float32 tensor of this backend's device."""
        import torch

        if isinstance(array, torch.Tensor) and not array.is_complex():
            return array.detach().to(self.device, torch.float32).contiguous()
        return self._moved(as_float32(array))

    def _moved(self, array: Array) -> Tensor:
        import torch

        if not isinstance(array, torch.Tensor):
            array = np.asarray(array)
            if not array.flags.writeable:
                array = array.copy()  # torch has no read-only tensors
            array = torch.from_numpy(array)
        return cast("Tensor", array.detach().to(self.device))

    def _give(self, tensor: Tensor, like: object) -> Array:
        import torch

        if isinstance(like, torch.Tensor):
            return tensor.to(like.device)
        return tensor.cpu().numpy()

    def quantize(
        self, values: Array, levels: str, group: Group = "tensor", scale: Scale = "absmean"
    ) -> tuple[Array, Array]:
        weight, scale = self._checked(values, levels, group, scale)
        steps = self._tensors.torch_steps(weight, levels, group, scale)
        if not bool(steps.isfinite().all()):
            check_finite(as_float32(values))
        codes = self._tensors.torch_codes(weight, steps, levels, group)
        return self._give(codes, values), self._give(steps, values)

    def _checked(self, values: Array, levels: str, group: Group, scale: Scale) -> tuple[Tensor, Scale]:
        check_levels(levels)
        scale = check_scale(scale)
        weight = self._take(values)
        check_group(group, tuple(weight.shape))
        return weight, scale

    def effective(
        self, values: Array, levels: str, group: Group = "tensor", scale: Scale = "absmean"
    ) -> Array:
        weight, scale = self._checked(values, levels, group, scale)
        return self._give(self._tensors.torch_effective(weight, levels, group, scale), values)

    def decode(self, codes: Array, steps: Array, levels: str, group: Group) -> Array:
        check_levels(levels)
        taken = self._moved(codes), self._moved(steps).float()
        return self._give(self._tensors.torch_decode(*taken, group), codes)

    def stochastic(self, values: Array, levels: str, step: float, key: int) -> Array:
        import torch

        check_levels(levels)
        step = check_step(step)
        taken = self._take(values)
        flat = taken.reshape(-1)
        count = CHUNK if self.device.type == "cpu" else 1 << 26  # an int64 for each value at a time
        codes = flat.new_empty(flat.shape, dtype=torch.int8)
        for start in range(0, len(flat), count):
            chunk = slice(start, start + count)
            codes[chunk] = self._tensors.torch_stochastic(flat[chunk], levels, step, key_at(key, start))
        return self._give(codes.reshape(taken.shape), values)

    def pack(self, codes: Array, levels: str) -> Array:
        taken = self._moved(codes).reshape(-1)
        if taken.is_floating_point() or taken.is_complex():
            raise ValueError(f"codes must be integers, not {taken.dtype}")
        refuse_codes(taken if taken.element_size() > 1 else taken.short(), levels)  # no uint8 is below -1
        return self._give(self._tensors.torch_pack(taken.char(), levels), codes)

    def unpack(self, data: Array, n: int, levels: str) -> Array:
        import torch

        if not isinstance(data, torch.Tensor):
            data = check_bytes(data, n, levels)
        taken = self._moved(data).reshape(-1)
        if taken.dtype != torch.uint8:
            raise ValueError(f"packed codes must be bytes, not {taken.dtype}")
        refuse_length(len(taken), n, levels)
        codes, wrong = self._tensors.torch_unpack(taken, n, levels)
        for left in wrong:
            refuse_wrong(int((left != 0).sum()), levels)
        return self._give(codes, data)

    def kmeans(self, grid: Array, start: Array, max_iter: int) -> tuple[Array, Array, int]:
        return lloyd_torch(grid, start, max_iter, str(self.device))


# -- choosing ------------------------------------------------------------------------------------------------


def get_backend(name: str, threads: int = 1) -> Backend:
    """A backend by name; `threads` is for "cpp". BackendUnavailableError where it cannot be used, and why."""
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
    """Each backend's name, and None where it works, else the reason why it does not."""
    found: dict[str, str | None] = {}
    for name in NAMES:
        found[name] = _reason(name)
    return found


def _reason(name: str) -> str | None:
    """None where a few values come out right on this backend."""
    values = np.linspace(-1, 1, 100, dtype=np.float32)
    try:
        codes, steps = get_backend(name).quantize(values, "five")
    except Exception as error:  # a driver or a compiler may fail in ways of its own
        return " ".join(str(error).split()) or type(error).__name__
    right = NumpyBackend().quantize(values, "five")
    if np.array_equal(codes, right[0]) and steps == right[1]:
        return None
    return f"the backend {name} gives other codes than numpy"


def __getattr__(name: str) -> Any:
    if name != "HAS_GPU":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return _torch_sees_a_gpu()
    except ImportError:
        return False

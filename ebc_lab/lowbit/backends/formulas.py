"""The formulas of steps and codes over an array module `xp`, numpy or cupy, and the checks of what they take
(docs/lowbit.md).

* No result depends on the order of a float sum: magnitudes are counted as integers in blocks of 4096, block
  totals are added by halves. So every backend, thread count and device gives the same bits.
* Nearest codes come from comparisons, never from a division; stochastic ones from one division and one hash
  of (position, key), so there is no generator whose state could be lost.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = Any  # of numpy or cupy
Floats: TypeAlias = NDArray[np.float32]
Codes: TypeAlias = NDArray[np.int8]
Group: TypeAlias = str | int
Scale: TypeAlias = str | float

TOP = {"ternary": 1, "five": 2}
SCALES = ("absmean", "absmax")
BLOCK = 4096
CHUNK = 1 << 16  # values that are worked on together: their intermediate results stay in a CPU's cache
CLIP_AT = 2.5  # root mean squares beyond which a gradient is clipped

_FRACTION_BITS = 23  # of a float32
_SMALLEST_EXPONENT = 37  # the biased exponent of 2^-90: blocks below it count as zero
_GOLDEN_RATIO = 0x9E3779B9
_MASK = 0xFFFFFFFF

# -- checks --------------------------------------------------------------------------------------------------


def check_levels(levels: str) -> int:
    """Return the largest code of these levels."""
    if not isinstance(levels, str) or levels not in TOP:
        raise ValueError(f"levels must be one of {', '.join(TOP)}, not {levels!r}")
    return TOP[levels]


def check_group(group: Group, shape: tuple[int, ...]) -> Group:
    """Return the group as "tensor", "row" or a Python int; rows and neighbours need a matrix."""
    if isinstance(group, int | np.integer) and not isinstance(group, bool):
        if group < 1:
            raise ValueError(f"a group needs at least 1 neighbour, not {group}")
        group = int(group)
    elif not isinstance(group, str) or group not in ("tensor", "row"):
        raise ValueError(f"group must be tensor, row or a count of at least 1, not {group!r}")
    if group != "tensor" and len(shape) != 2:
        raise ValueError(f"the group {group!r} needs a matrix, not an array of shape {tuple(shape)}")
    return group


def check_scale(scale: Scale) -> Scale:
    """Return a name in SCALES, or the step itself, rounded to float32."""
    if isinstance(scale, str):
        if scale in SCALES:
            return scale
    elif isinstance(scale, int | float | np.integer | np.floating) and not isinstance(scale, bool):
        with np.errstate(over="ignore", under="ignore"):
            step = np.float32(scale)
        if np.isfinite(step) and step > 0:
            return float(step)
    raise ValueError(f"scale must be {', '.join(SCALES)} or a positive float32 number, not {scale!r}")


def as_float32(values: object) -> Floats:
    """Return the values as a contiguous numpy array of float32: wider floats rounded, narrower ones widened.

    Tensors of any device come to the host. Complex numbers, objects and text are refused; NaN and infinity
    are not (see `check_finite`).
    """
    cupy = sys.modules.get("cupy")
    if is_tensor(values):
        values = _from_torch(values)
    elif cupy is not None and isinstance(values, cupy.ndarray):
        values = cupy.asnumpy(values)
    array = np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"values must be real numbers, not an array of {array.dtype}")
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(array, dtype=np.float32, order="C")


def is_tensor(array: object) -> bool:
    """Say whether this is a tensor of torch, which need not be imported."""
    return "torch" in sys.modules and isinstance(array, sys.modules["torch"].Tensor)


def _from_torch(tensor: Any) -> NDArray[Any]:
    if tensor.is_complex():
        raise ValueError(f"values must be real numbers, not a tensor of {tensor.dtype}")
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point() and tensor.element_size() < 4:
        tensor = tensor.float()  # numpy knows no bfloat16
    return cast(NDArray[Any], tensor.numpy())


def check_finite(values: Floats) -> None:
    """Refuse NaN and infinity, naming how many there are and the first place."""
    finite = np.isfinite(values)
    if finite.all():
        return
    flat = finite.reshape(-1)
    first = int(np.argmin(flat))
    value = float(values.reshape(-1)[first])
    place = tuple(map(int, np.unravel_index(first, values.shape))) if values.ndim > 1 else first
    count = flat.size - int(np.count_nonzero(flat))
    raise ValueError(
        f"{count} of {flat.size} values are NaN or infinite as float32, the first {value} at index {place}: "
        "such values have no code"
    )


# -- steps ---------------------------------------------------------------------------------------------------


def steps_shape(shape: tuple[int, ...], group: Group) -> tuple[int, ...]:
    """Return the shape of the steps of an array of this shape."""
    if group == "tensor":
        return ()
    if group == "row":
        return (shape[0],)
    return (shape[0], -(-shape[1] // cast(int, group)))


@np.errstate(invalid="ignore")
def steps_of(xp: Any, weights: Array, levels: str, group: Group, scale: Scale) -> Array:
    """Return the float32 steps of an array's groups; NaN where a value of the group is NaN or infinite."""

    def step_of(groups: Array) -> Array:
        if scale == "absmean":
            return order_free_mean(xp, groups).astype(xp.float32)
        largest = xp.abs(groups).max(axis=-1)
        if scale == "absmax":
            return largest / xp.float32(TOP[levels])
        return largest * xp.float32(0) + xp.float32(scale)  # NaN where a value is NaN or infinite

    if weights.size == 0:
        return xp.zeros(steps_shape(weights.shape, group), xp.float32)
    return in_groups(xp, weights, group, step_of)


def in_groups(xp: Any, weights: Array, group: Group, step_of: Callable[[Array], Array]) -> Array:
    """Return `step_of`, (…, width) -> (…), of each group of an array or a tensor that is not empty."""
    steps = xp.concatenate([step_of(part) for part in parts_of(weights, group)], axis=-1)
    return (steps - steps * 0).reshape(steps_shape(tuple(weights.shape), group))  # NaN instead of infinity


def parts_of(weights: Array, group: Group) -> list[Array]:
    """Cut an array or a tensor into its groups, (…, groups, width), in parts of equal width: the whole
    neighbours of each row, (rows, groups, g), and the shorter ones at its end, (rows, 1, rest)."""
    if group == "tensor":
        return [weights.reshape(1, -1)]
    if group == "row":
        return [weights[:, None, :]]
    group = cast(int, group)
    rows, columns = weights.shape
    count = columns // group
    whole = count * group
    parts = []
    if count:
        parts.append(weights[:, :whole].reshape(rows, count, group))
    if whole < columns:
        parts.append(weights[:, None, whole:])
    return parts


def order_free_mean(xp: Any, values: Array, power: int = 1) -> Array:
    """Return the float64 mean of |v|^power over the last axis (power 1 or 2, length > 0), in any order.

    It differs from the exact mean by less than 2^-30 of the largest magnitude (2^-14 of its square).
    A block whose largest magnitude is below 2^-90 counts as zero.
    """
    return order_free_total(xp, values, power, _block_totals) / values.shape[-1]


def order_free_total(
    xp: Any, values: Array, power: int, block_totals: Callable[[Any, Array, int], Array]
) -> Array:
    """Return the float64 sum that is the mean of `order_free_mean`, of numpy, cupy or torch.

    `block_totals` sums blocks exactly, (…, blocks, width) -> (…, blocks).
    """
    length = values.shape[-1]
    whole = length - length % BLOCK
    totals = []
    if whole:
        cut = (*values.shape[:-1], whole // BLOCK, BLOCK)
        totals.append(block_totals(xp, values[..., :whole].reshape(cut), power))
    if whole < length:
        totals.append(block_totals(xp, values[..., None, whole:], power))
    return add_by_halves(xp, xp.concatenate(totals, axis=-1))


def _block_totals(xp: Any, blocks: Array, power: int) -> Array:
    """Return each block's sum of |v|^power, (…, blocks, width) -> (…, blocks)."""
    flat = blocks.reshape(-1, blocks.shape[-1])
    count = len(flat)
    if xp is np:
        count = max(1, CHUNK // flat.shape[1])
    chunks = range(0, len(flat), count)
    totals = [_counted(xp, flat[start : start + count], power) for start in chunks]
    return xp.concatenate(totals).reshape(blocks.shape[:-1])


def _counted(xp: Any, blocks: Array, power: int) -> Array:
    """Return each block's sum of |v|^power, (blocks, width) -> (blocks,), counted in units of its own.

    Counts are integers of at most 30 bits, so that a float64 sum of 4096 of them is exact. Powers of two are
    put together from bits, because not every library's ldexp is exact.
    """
    magnitudes = xp.abs(blocks)
    largest = magnitudes.max(axis=-1)
    # the largest magnitude of a block sets the unit that its counts are in
    exponent = (largest.view(xp.int32) >> _FRACTION_BITS) & 0xFF
    exponent = xp.maximum(exponent, _SMALLEST_EXPONENT)
    bits = 30 // power
    scale = ((bits + 253 - exponent) << _FRACTION_BITS).view(xp.float32)
    unit = ((exponent - bits + 1) << _FRACTION_BITS).view(xp.float32).astype(xp.float64)
    magnitudes *= scale[..., None]
    counts = xp.rint(magnitudes, out=magnitudes)
    if power == 2:
        counts = xp.square(counts.astype(xp.float64))
        unit = unit * unit
    sums = counts.sum(axis=-1, dtype=xp.float64)
    return xp.where(largest < 2.0**-90, 0.0, sums * unit)


def add_by_halves(xp: Any, totals: Array) -> Array:
    """Return the float64 sum over the last axis: halves of a power of two are added until one is left.

    What has no partner stays as it is, which is what zeros up to the power of two would give.
    """
    count = totals.shape[-1]
    while count > 1:
        half = (1 << (count - 1).bit_length()) // 2
        paired = totals[..., : count - half] + totals[..., half:]
        totals = xp.concatenate((paired, totals[..., count - half : half]), axis=-1)
        count = half
    return totals[..., 0]


# -- codes ---------------------------------------------------------------------------------------------------


def spread(xp: Any, steps: Array, group: Group, columns: int) -> Array:
    """Return steps in a shape that broadcasts against the weights."""
    if group == "tensor":
        return steps
    if group == "row":
        return steps[:, None]
    return xp.repeat(steps, cast(int, group), axis=1)[:, :columns]


@np.errstate(over="ignore", invalid="ignore")
def encode(xp: Any, weights: Array, steps: Array, levels: str, group: Group) -> Array:
    """Return the nearest codes, int8: above half a step 1, from one and a half steps on 2 (`five`)."""
    columns = weights.shape[-1] if weights.ndim else 1
    one = xp.where(steps > 0, xp.float32(0.5) * steps, xp.float32(math.inf))
    one = spread(xp, one, group, columns)
    codes = (weights > one).view(xp.int8) - (weights < -one).view(xp.int8)
    if levels == "five":
        two = xp.where(steps > 0, xp.float32(1.5) * steps, xp.float32(math.inf))  # infinity is never reached
        two = spread(xp, two, group, columns)
        codes += (weights >= two).view(xp.int8)
        codes -= (weights <= -two).view(xp.int8)
    return codes


def decode(xp: Any, codes: Array, steps: Array, group: Group) -> Array:
    """Return step * code, float32; +0 where the code is 0, unless the step is NaN."""
    columns = codes.shape[-1] if codes.ndim else 1
    return xp.multiply(codes, spread(xp, steps, group, columns), dtype=xp.float32)


def mix(h: Any) -> Any:
    """Return murmur3's 32-bit finaliser of a Python int, array of uint32, or int64 tensor in [0, 2^32)."""
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) & _MASK
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & _MASK
    return h ^ (h >> 16)


def rounding_key(seed: int, step: int, stream: int) -> int:
    """Return the key of `uniforms` for one array (stream) at one step of a run; a 32-bit integer."""
    mixed = mix(mix(seed & _MASK) ^ (step & _MASK))
    return int(mix(mixed ^ (stream * _GOLDEN_RATIO & _MASK)))


def key_at(key: int, start: int) -> int:
    """Return the key whose first uniform is the one at place `start` of this key."""
    return (key + start * _GOLDEN_RATIO) & _MASK


def uniforms_of(xp: Any, n: int, key: int) -> Array:
    """Return uniform numbers of `xp`: see `uniforms`."""
    places = xp.arange(n, dtype=xp.uint32)
    hashed = mix(places * _GOLDEN_RATIO + (key & _MASK))
    return (hashed >> 8).astype(xp.float32) * xp.float32(2.0**-24)


@np.errstate(over="ignore", under="ignore")
def stochastic_codes(xp: Any, values: Array, levels: str, step: float, key: int) -> Array:
    """Draw codes, as floats, that are unbiased for |value| <= top * step: see `quantize_stochastic`."""
    if step == 0:
        return xp.zeros(len(values), xp.float32)
    position = xp.minimum(xp.abs(values) / xp.float32(step), xp.float32(TOP[levels]))
    below = xp.floor(position)
    up = uniforms_of(xp, len(values), key) < position - below
    return xp.copysign(below + up, values)


def check_step(step: float) -> float:
    """Return a stochastic step, rounded to float32: finite, 0 or more."""
    with np.errstate(over="ignore", under="ignore"):
        rounded = np.float32(step)
    if not (np.isfinite(rounded) and rounded >= 0):
        raise ValueError(f"the step must be 0 or a positive float32 number, not {step!r}")
    return float(rounded)


def root_mean_square(values: Floats) -> float:
    """Return sqrt(mean of squares), the same bits in any order; 0 for an empty array."""
    if values.size == 0:
        return 0.0
    return math.sqrt(float(order_free_mean(np, values.reshape(1, -1), power=2)[0]))

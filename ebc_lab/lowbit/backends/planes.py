"""Codes in few bytes: five ternary codes a byte, twenty-four five-level codes in seven (docs/lowbit.md).

Codes lie in planes, not side by side: digit j of a block's byte i is code j * w + i. So packing and unpacking
are a few operations on contiguous bytes, which compilers and array libraries vectorise. The formulas below
use only indexing and integer operators, so they serve numpy, cupy and torch alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from .formulas import TOP, Array, Codes, check_levels

Empty: TypeAlias = Callable[[int, str], Array]  # (length, dtype) -> an array that nothing is in yet

WIDTH = 64  # bytes of a plane in a whole block
CODES = {"ternary": 5, "five": 24}  # in one byte of each plane
PLANES = {"ternary": 1, "five": 7}
LARGEST = {"ternary": 242, "five": 124}  # of a byte, or of its three digits


def packed_size(n: int, levels: str) -> int:
    """Return the bytes that n codes take: ceil(n / 5), or 7 ceil(n / 24)."""
    check_levels(levels)
    if n < 0:
        raise ValueError(f"a count of codes cannot be negative: {n}")
    return PLANES[levels] * -(-n // CODES[levels])


def matrices_size(counts: Iterable[int], levels: str) -> int:
    """Return the bytes of packed matrices of so many codes, each with one float32 step."""
    return sum(packed_size(n, levels) + 4 for n in counts)


def check_codes(codes: object, levels: str) -> Codes:
    """Return codes as a flat int8 array; refuse what is no integer in [-top, top]."""
    array = np.asarray(codes).reshape(-1)
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"codes must be integers, not {array.dtype}")
    refuse_codes(array, levels)
    return np.ascontiguousarray(array, dtype=np.int8)


def refuse_codes(codes: Array, levels: str) -> None:
    """Raise for integers outside [-top, top]; a flat array of numpy, cupy or torch."""
    top = check_levels(levels)
    if len(codes) == 0 or bool((codes.min() >= -top) & (codes.max() <= top)):  # one look at a GPU, not two
        return
    wrong = (codes < -top) | (codes > top)
    first = int(wrong.nonzero()[0][0])
    raise ValueError(
        f"{int(wrong.sum())} of {len(codes)} codes lie outside [-{top}, {top}] of {levels}, "
        f"the first {int(codes[first])} at index {first}"
    )


def check_bytes(data: object, n: int, levels: str) -> NDArray[np.uint8]:
    """Return bytes, or an array of uint8, as a flat array of exactly the length that n codes take."""
    if isinstance(data, bytes | bytearray | memoryview):
        data = np.frombuffer(data, np.uint8)
    array = np.asarray(data).reshape(-1)
    if array.dtype != np.uint8:
        raise ValueError(f"packed codes must be bytes, not {array.dtype}")
    refuse_length(array.size, n, levels)
    return np.ascontiguousarray(array)


def refuse_length(length: int, n: int, levels: str) -> None:
    """Raise where this many bytes are not what n codes take."""
    size = packed_size(n, levels)
    if length != size:
        raise ValueError(f"{n} {levels} codes take {size} bytes, not {length}")


def refuse_packed(data: NDArray[np.uint8], n: int, levels: str) -> None:
    """Raise where flat bytes of the right length hold what no codes give, without unpacking them."""
    wrong = 0
    for part in parts(data, PLANES[levels], n, levels):
        if levels == "ternary":
            if part.max() > LARGEST[levels]:  # a maximum needs no memory
                wrong += int(np.count_nonzero(part > LARGEST[levels]))
            continue
        for m in range(8):
            wrong += int(np.count_nonzero(_value(part, m) > LARGEST[levels]))
    refuse_wrong(wrong, levels)


def refuse_wrong(count: int, levels: str) -> None:
    """Raise for a count above 0 of packed values that no codes give."""
    if count:
        raise ValueError(
            f"{count} packed values are above {LARGEST[levels]}: these bytes hold no {levels} codes"
        )


def pack_planes(codes: Array, data: Array, levels: str) -> None:
    """Write int8 codes (blocks, CODES, w) into uint8 data (blocks, PLANES, w)."""
    if levels == "ternary":
        packed = codes[:, 4] + 1
        for j in (3, 2, 1):
            packed = packed * 3 + (codes[:, j] + 1)  # at most 80: still int8
        data[:, 0] = _unsigned(packed, data) * 3 + _unsigned(codes[:, 0] + 1, data)
        return
    shape = (codes.shape[0], 8, 3, codes.shape[2])
    digits = codes.reshape(shape) + TOP[levels]
    values = _unsigned((digits[:, :, 2] * 5 + digits[:, :, 1]) * 5 + digits[:, :, 0], data)
    for m in range(7):
        data[:, m] = values[:, m] + ((values[:, 7] >> m) & 1) * 128


def _unsigned(values: Array, like: Array) -> Array:
    """View non-negative int8 as uint8, in numpy, cupy and torch."""
    return values.view(like.dtype)


def unpack_planes(data: Array, codes: Array, levels: str) -> Array:
    """Write uint8 data (blocks, PLANES, w) into int8 codes (blocks, CODES, w).

    Returns an array that is not 0 where a packed value is larger than codes can give.
    """
    if levels == "ternary":
        left = _digits(data[:, 0], codes, 3)
    else:
        digits = codes.reshape(codes.shape[0], 8, 3, codes.shape[2])
        left = _digits(_value(data, 7), digits[:, 7], 5)
        for m in range(7):
            left = left | _digits(_value(data, m), digits[:, m], 5)
    codes -= TOP[levels]
    return left


def _value(data: Array, m: int) -> Array:
    """Return the m-th of eight values, (blocks, 7, w) -> (blocks, w); the last lies in the high bits."""
    if m < 7:
        return data[:, m] & 127
    value = data[:, 0] >> 7
    for plane in range(1, 7):
        value = value + ((data[:, plane] >> 7) << plane)
    return value


def _digits(values: Array, digits: Array, base: int) -> Array:
    """Write the digits of (blocks, w) values to (blocks, count, w), the least first; return what is left."""
    for j in range(digits.shape[1]):
        above = values // base
        digits[:, j] = values - above * base
        values = above
    return values


def pack_flat(codes: Array, levels: str, empty: Empty) -> Array:
    """Pack flat int8 codes into flat uint8 bytes, where `empty` makes the arrays."""
    n = len(codes)
    data = empty(packed_size(n, levels), "uint8")
    count = CODES[levels] * len(data) // PLANES[levels]
    if count > n:  # missing codes are 0
        padded = empty(count, "int8")
        padded[:n] = codes
        padded[n:] = 0
        codes = padded
    sources = parts(codes, CODES[levels], n, levels)
    for source, target in zip(sources, parts(data, PLANES[levels], n, levels), strict=True):
        pack_planes(source, target, levels)
    return data


def unpack_flat(data: Array, n: int, levels: str, empty: Empty) -> tuple[Array, list[Array]]:
    """Unpack flat uint8 bytes into the n codes, flat int8, and arrays that hold a value other than 0 where
    the bytes were no codes."""
    codes = empty(CODES[levels] * len(data) // PLANES[levels], "int8")
    targets = parts(codes, CODES[levels], n, levels)
    pairs = zip(parts(data, PLANES[levels], n, levels), targets, strict=True)
    wrong = [unpack_planes(source, target, levels) for source, target in pairs]
    return codes[:n], wrong


def parts(array: Array, planes: int, n: int, levels: str) -> list[Array]:
    """Cut a flat array into views (blocks, planes, w): whole blocks of n codes, then the shorter last one."""
    count = CODES[levels]
    blocks, rest = divmod(n, count * WIDTH)
    cut = blocks * planes * WIDTH
    views = []
    if blocks:
        views.append(array[:cut].reshape(blocks, planes, WIDTH))
    if rest:
        views.append(array[cut:].reshape(1, planes, -(-rest // count)))
    return views

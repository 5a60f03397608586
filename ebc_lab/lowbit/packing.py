"""Codes in few bytes: five ternary codes a byte, twenty-four five-level codes in seven (docs/lowbit.md)."""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import NDArray

from .backends import get_backend
from .backends.formulas import Codes
from .backends.planes import check_bytes, check_codes
from .backends.planes import packed_size as packed_size


def pack(codes: object, levels: str, *, backend: str = "numpy") -> NDArray[np.uint8]:
    """Return the codes, row-major, as `packed_size` bytes; ValueError for what is no code of these levels."""
    array = check_codes(codes, levels)
    return cast(NDArray[np.uint8], np.asarray(get_backend(backend).pack(array, levels)))


def unpack(data: object, n: int, levels: str, *, backend: str = "numpy") -> Codes:
    """Return the n codes in these bytes, int8, (n,); ValueError for another length or other bytes."""
    array = check_bytes(data, n, levels)
    return cast(Codes, np.asarray(get_backend(backend).unpack(array, n, levels)))

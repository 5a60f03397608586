"""What the tests of the low-bit library share: golden values, comparisons by bytes, all operations."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ebc_lab.lowbit.levels import rounding_key, uniforms

GOLDEN = json.loads((Path(__file__).parents[1] / "lowbit" / "golden.json").read_text())
LEVELS = ("ternary", "five")
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def assert_same_bits(found: Any, expected: Any) -> None:
    """Arrays or tensors have the same type, shape and bits, so that -0 is not +0."""
    found, expected = map(np.asarray, (on_host(found), on_host(expected)))
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes() == expected.tobytes()


def on_host(array: Any) -> Any:
    return array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else array


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def large_golden() -> np.ndarray:
    """The 10,000 values of the golden file, by its rule."""
    powers = 2.0 ** (np.arange(10000) % 7 - 3)
    values = 2 * uniforms(10000, rounding_key(7, 0, 0)).astype(np.float64) - 1
    return values.astype(np.float32) * powers.astype(np.float32)


def saved_and_loaded(state: Any) -> Any:
    """What torch.load with `weights_only=True` makes of a state that torch.save has written."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def agree(
    backend: Any,
    reference: Any,
    values: np.ndarray,
    levels: str,
    group: Any = "tensor",
    scale: Any = "absmean",
    kind: Callable[[np.ndarray], Any] = np.asarray,
) -> None:
    """Every operation but k-means gives the reference's bytes, as arrays of the kind that it takes."""
    codes, steps = reference.quantize(values, levels, group, scale)
    effective = reference.effective(values, levels, group, scale)
    data = reference.pack(codes, levels)
    drawn = reference.stochastic(values, levels, 0.7, 3887079537)
    assert_same_bits(effective, reference.decode(codes, steps, levels, group))
    x, q, packed = kind(values), kind(codes), kind(data)
    found = backend.quantize(x, levels, group, scale)
    for result, expected in (
        (found[1], steps),
        (found[0], codes),
        (backend.effective(x, levels, group, scale), effective),
        (backend.decode(q, kind(steps), levels, group), effective),
        (backend.pack(q, levels), data),
        (backend.unpack(packed, codes.size, levels), codes.reshape(-1)),
        (backend.unpack_values(packed, codes.shape, kind(steps), levels, group), effective),
        (backend.stochastic(x, levels, 0.7, 3887079537), drawn),
    ):
        assert type(result) is type(q)
        assert getattr(result, "device", None) == getattr(q, "device", None)
        assert_same_bits(result, expected)

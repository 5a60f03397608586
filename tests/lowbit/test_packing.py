"""Packed codes: the golden bytes, a plain transcription, every length, and what is refused."""

import hashlib

import numpy as np
import pytest
import torch
from support.low_bit import GOLDEN

from ebc_lab.lowbit.backends import get_backend
from ebc_lab.lowbit.backends.formulas import TOP
from ebc_lab.lowbit.backends.planes import refuse_packed
from ebc_lab.lowbit.levels import rounding_key, uniforms
from ebc_lab.lowbit.packing import pack, packed_size, unpack

LENGTHS = [*range(401), 639, 640, 641, *range(1510, 1540), 3071, 3072, 3073, 5000]

backends = pytest.mark.parametrize("backend", ["numpy", "torch"])
levels = pytest.mark.parametrize("levels", TOP)


def some_codes(n: int, levels: str, key: int = 3) -> np.ndarray:
    top = TOP[levels]
    return (np.floor(uniforms(n, key) * np.float32(2 * top + 1)) - top).astype(np.int8)


def plain_pack(codes: list[int], levels: str) -> bytes:
    """docs/lowbit.md, byte by byte."""
    per_byte, planes, base, top = {"ternary": (5, 1, 3, 1), "five": (24, 7, 5, 2)}[levels]
    packed = bytearray()
    for start in range(0, len(codes), 64 * per_byte):
        block = codes[start : start + 64 * per_byte]
        width = -(-len(block) // per_byte)
        block = block + [0] * (width * per_byte - len(block))
        if levels == "ternary":
            for i in range(width):
                packed.append(sum(base**j * (block[j * width + i] + top) for j in range(5)))
            continue
        for m in range(planes):
            for i in range(width):
                value, last = (
                    sum(base**j * (block[(3 * plane + j) * width + i] + top) for j in range(3))
                    for plane in (m, 7)
                )
                packed.append(value + 128 * (last >> m & 1))
    return bytes(packed)


@pytest.mark.parametrize("backend", ["numpy", "torch", "c", "cpp"])
@pytest.mark.parametrize("case", GOLDEN["packing"], ids=lambda case: f"{case['levels']}-{case['n']}")
def test_the_bytes_are_those_of_the_golden_file(case, backend):
    n, top = case["n"], TOP[case["levels"]]
    codes = some_codes(n, case["levels"], rounding_key(11, n, top))
    packed = pack(codes, case["levels"], backend=backend)
    assert packed.dtype == np.uint8
    if "hex" in case:
        assert packed.tobytes().hex() == case["hex"]
    else:
        assert packed.nbytes == case["bytes"]
        assert hashlib.sha256(packed.tobytes()).hexdigest() == case["sha256"]
    assert np.array_equal(unpack(packed, n, case["levels"], backend=backend), codes)


@pytest.mark.thorough
@backends
@levels
def test_every_length_packs_as_the_transcription_and_comes_back(levels, backend):
    codes = some_codes(max(LENGTHS), levels)
    for n in LENGTHS:
        packed = pack(codes[:n], levels, backend=backend)
        assert packed.tobytes() == plain_pack(codes[:n].tolist(), levels), n
        assert packed.nbytes == packed_size(n, levels)
        back = unpack(packed, n, levels, backend=backend)
        assert back.dtype == np.int8
        assert np.array_equal(back, codes[:n]), n


@levels
def test_sizes(levels):
    sizes = GOLDEN["sizes"]
    assert 8 * packed_size(120_000, levels) / 120_000 == sizes["packed_bits"][levels]
    assert 4 * 120_000 / packed_size(120_000, levels) == pytest.approx(sizes["ratio_packed"][levels])
    with pytest.raises(ValueError, match="negative"):
        packed_size(-1, levels)


@pytest.mark.thorough
@levels
def test_all_bytes_that_are_no_codes_are_refused_and_all_others_are_taken(levels):
    n = {"ternary": 5, "five": 24}[levels]
    whole = bytearray(pack(np.zeros(n, np.int8), levels).tobytes())
    for place in range(len(whole)):
        for byte in range(256):
            data = bytearray(whole)
            data[place] = byte
            if levels == "ternary":
                good = byte <= 242
            else:
                last = sum((data[m] >> 7) << m for m in range(7))
                good = byte & 127 <= 124 and last <= 124
            for backend in ("numpy", "torch"):
                if good:
                    assert pack(unpack(data, n, levels, backend=backend), levels).tobytes() == data
                    continue
                with pytest.raises(ValueError, match=f"hold no {levels} codes"):
                    unpack(data, n, levels, backend=backend)


@backends
def test_one_bad_byte_among_many_blocks_is_found(backend):
    for name, n in (("ternary", 1000), ("five", 4000)):
        packed = pack(np.zeros(n, np.int8), name)
        for place in (0, 70, packed.size - 1):
            damaged = packed.copy()
            damaged[place] |= 127 if name == "five" else 255
            with pytest.raises(ValueError, match=r"^1 packed values"):
                unpack(damaged, n, name, backend=backend)
            with pytest.raises(ValueError, match=r"^1 packed values"):
                refuse_packed(damaged, n, name)


@pytest.mark.parametrize("backend", ["numpy", "torch", "c", "cpp"])
@levels
def test_codes_out_of_range_are_refused(levels, backend):
    top = TOP[levels]
    for wrong in (top + 1, -top - 1, 100, -128):
        codes = np.array([[0, 1], [wrong, wrong]])
        message = rf"2 of 4 codes lie outside \[-{top}, {top}\].*first {wrong} at index 2"
        with pytest.raises(ValueError, match=message):
            pack(codes, levels, backend=backend)
        with pytest.raises(ValueError, match=message):
            get_backend(backend).pack(codes, levels)
        with pytest.raises(ValueError, match=message):
            get_backend(backend).pack(codes.astype(np.int16), levels)
    with pytest.raises(ValueError, match="integers, not float64"):
        pack(np.zeros(3), levels, backend=backend)


@backends
def test_bytes_of_another_length_or_type_are_refused(backend):
    for n in (0, 4, 11):
        with pytest.raises(ValueError, match=f"{n} ternary codes take {-(-n // 5)} bytes, not 2"):
            unpack(b"\0\0", n, "ternary", backend=backend)
    with pytest.raises(ValueError, match="bytes, not int64"):
        unpack(np.zeros(2, np.int64), 10, "ternary", backend=backend)
    for data in (b"\0\0", bytearray(2), memoryview(b"\0\0"), np.zeros((1, 2), np.uint8)):
        assert unpack(data, 10, "ternary", backend=backend).tolist() == [-1] * 10


def test_codes_of_any_integer_type_shape_and_layout_pack_alike():
    codes = some_codes(600, "five").reshape(20, 30)
    expected = pack(codes.reshape(-1), "five")
    for same in (codes, codes.astype(np.int64), np.asfortranarray(codes), torch.from_numpy(codes)):
        assert np.array_equal(pack(same, "five"), expected)
        assert np.array_equal(pack(same, "five", backend="torch"), expected)

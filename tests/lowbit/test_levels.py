"""Steps and codes: against the golden file, exact fractions, and a plain transcription of docs/lowbit.md."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.low_bit import GOLDEN, assert_same_bits, gaussian, large_golden

from ebc_lab.lowbit.backends.formulas import SCALES, TOP, as_float32, order_free_mean, root_mean_square
from ebc_lab.lowbit.levels import (
    absmean,
    entropy_bits,
    quantize,
    quantize_stochastic,
    rounding_key,
    stochastic_step,
    uniforms,
    zero_share,
)

LARGEST = float(np.finfo(np.float32).max)

floats = st.floats(-LARGEST, LARGEST, width=32)
near_one = st.floats(-4, 4, width=32)
arrays = hnp.arrays(np.float32, st.integers(1, 60), elements=floats | near_one | st.just(-0.0))
levels = pytest.mark.parametrize("levels", TOP)


# -- a plain transcription -----------------------------------------------------------------------------------


def plain_total(block: list[float], bits: int, power: int) -> float:
    largest = max(abs(w) for w in block)
    if largest < 2.0**-90:
        return 0.0
    exponent = math.frexp(largest)[1]
    counts = [round(abs(w) * 2.0 ** (bits - exponent)) ** power for w in block]  # exact in float64
    return sum(counts) * 2.0 ** (power * (exponent - bits))


def plain_mean(values: np.ndarray, power: int = 1) -> float:
    flat = values.reshape(-1).tolist()
    totals = [plain_total(flat[i : i + 4096], 30 // power, power) for i in range(0, len(flat), 4096)]
    while len(totals) & (len(totals) - 1):
        totals.append(0.0)
    while len(totals) > 1:
        half = len(totals) // 2
        totals = [totals[i] + totals[half + i] for i in range(half)]
    return totals[0] / len(flat)


def plain_code(w: np.float32, step: np.float32, levels: str) -> int:
    if step == 0:
        return 0
    code = int(abs(w) > np.float32(0.5) * step)
    with np.errstate(over="ignore"):
        if levels == "five" and abs(w) >= np.float32(1.5) * step:
            code = 2
    return -code if w < 0 else code


def plain_uniform(i: int, key: int) -> float:
    h = (i * 0x9E3779B9 + key) % 2**32
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h ^= h >> shift
        h = h * factor % 2**32
    h ^= h >> 16
    return (h >> 8) / 2**24


# -- steps ---------------------------------------------------------------------------------------------------


@given(arrays)
def test_the_step_is_the_mean_magnitude_of_the_transcription(values):
    assert absmean(values) == np.float32(plain_mean(values))


@pytest.mark.parametrize("n", [4095, 4096, 4097, 8192, 12289, 20000, 27 * 4096])
def test_blocks_of_4096_are_counted_in_units_of_their_own_and_added_by_halves(n):
    scales = 2.0 ** np.random.default_rng(1).integers(-92, 60, n // 4096 + 1)
    values = gaussian(n) * np.repeat(scales, 4096)[:n].astype(np.float32)
    assert order_free_mean(np, values[None])[0] == plain_mean(values)
    assert order_free_mean(np, values[None], power=2)[0] == plain_mean(values, power=2)
    assert absmean(values) == np.float32(plain_mean(values))


def test_a_block_below_2_to_the_minus_90_counts_as_zero():
    smallest = np.float32(2.0**-90)
    assert absmean(np.full(5, smallest)) == smallest
    assert absmean(np.full(5, np.nextafter(smallest, np.float32(0)))) == 0
    assert absmean(np.full(3, 1e-45, np.float32)) == 0


def test_the_largest_numbers_have_a_finite_mean():
    values = np.full(5000, LARGEST, np.float32)
    assert absmean(values) == np.float32(LARGEST)
    assert quantize(values, "five").codes.tolist() == [1] * 5000


@levels
def test_absmax_is_the_largest_magnitude_over_top(levels):
    values = np.array([0.25, -3.0, 1.0], np.float32)
    quantized = quantize(values, levels, scale="absmax")
    assert quantized.steps == np.float32(3 / TOP[levels])
    assert quantized.codes[1] == -TOP[levels]


@pytest.mark.parametrize("scale", SCALES)
@levels
def test_each_group_is_quantized_as_if_it_were_alone(levels, scale):
    values = gaussian(3, 9001) * np.float32([[1], [1e-3], [50]])
    for group, width in (("row", 9001), (9001, 9001), (20000, 9001), (4097, 4097), (64, 64), (7, 7), (1, 1)):
        quantized = quantize(values, levels, group=group, scale=scale)
        starts = range(0, 9001, width)
        if width < 64:
            starts = [*starts[:3], *starts[-2:]]
        assert quantized.steps.shape == ((3,) if group == "row" else (3, -(-9001 // width)))
        steps = quantized.steps.reshape(3, -1)
        for row in range(3):
            for start in starts:
                alone = quantize(values[row, start : start + width], levels, scale=scale)
                assert_same_bits(steps[row, start // width], alone.steps[()])
                assert_same_bits(quantized.codes[row, start : start + width], alone.codes)
                assert_same_bits(quantized.values()[row, start : start + width], alone.values())


def test_a_given_step_fills_every_group():
    steps = quantize(gaussian(2, 5), group=2, scale=0.1).steps
    assert_same_bits(steps, np.full((2, 3), 0.1, np.float32))


# -- codes ---------------------------------------------------------------------------------------------------


def test_ties_go_to_the_even_code():
    above = np.nextafter(np.float32(0.5), np.float32(1))
    below = np.nextafter(np.float32(1.5), np.float32(0))
    values = np.array([0.5, above, -0.5, -above, 1, below, 1.5, -1.5, -below, 2.5, -2.5, 1e30], np.float32)
    assert quantize(values, "five", scale=1.0).codes.tolist() == [0, 1, 0, -1, 1, 1, 2, -2, -1, 2, -2, 2]
    assert quantize(values, "ternary", scale=1.0).codes.tolist() == [0, 1, 0, -1, 1, 1, 1, -1, -1, 1, -1, 1]


@given(arrays, st.sampled_from(sorted(TOP)), st.sampled_from(SCALES))
def test_codes_are_the_exact_quotient_rounded_to_even_and_clipped(values, levels, scale):
    quantized = quantize(values, levels, scale=scale)
    step = quantized.steps[()]
    with np.errstate(over="ignore"):
        limit = np.float32(1.5) * step
    for w, code in zip(values, quantized.codes.tolist(), strict=True):
        assert code == plain_code(w, step, levels)
        # 1.5 steps are rounded to float32 before they are compared; half a step is exact above 2^-125
        if step > 2.0**-125 and abs(w) != limit:
            exact = round(Fraction(float(w)) / Fraction(float(step)))
            assert code == max(-TOP[levels], min(TOP[levels], exact))


@levels
def test_what_has_code_zero_is_positive_zero(levels):
    quantized = quantize(np.array([-0.0, 0.0, -1e-9, 5.0, -5.0], np.float32), levels)
    assert quantized.codes.dtype == np.int8
    assert quantized.codes[:3].tolist() == [0, 0, 0]
    assert not np.signbit(quantized.values()[:3]).any()
    assert quantized.values().dtype == np.float32
    nothing = quantize(np.array([-0.0, 0.0, -1e-40], np.float32), levels)
    assert nothing.steps == 0
    assert nothing.codes.tolist() == [0, 0, 0]
    assert not np.signbit(nothing.values()).any()


@given(arrays, st.sampled_from(sorted(TOP)))
def test_the_value_is_step_times_code(values, levels):
    quantized = quantize(values, levels, scale="absmax")
    expected = [float(quantized.steps) * code for code in quantized.codes.tolist()]
    assert quantized.values().tolist() == expected
    assert quantized.shape == values.shape


@pytest.mark.parametrize(
    ("shape", "group", "steps"),
    [
        ((0,), "tensor", ()),
        ((0, 5), "tensor", ()),
        ((0, 5), "row", (0,)),
        ((3, 0), "row", (3,)),
        ((3, 0), 4, (3, 0)),
        ((0, 5), 4, (0, 2)),
    ],
)
def test_an_empty_array_has_no_codes_and_steps_of_zero(shape, group, steps):
    for scale, backend in itertools.product((*SCALES, 0.5), ("numpy", "torch")):
        quantized = quantize(np.zeros(shape), group=group, scale=scale, backend=backend)
        assert quantized.codes.shape == quantized.values().shape == shape
        assert_same_bits(quantized.steps, np.zeros(steps, np.float32))
    assert absmean([]) == 0
    assert stochastic_step([], "five") == 0


# -- what goes in --------------------------------------------------------------------------------------------


def test_numbers_of_any_type_and_layout_are_first_those_of_float32():
    just_above_half = 0.5 + 1e-12  # a tie once it is float32
    assert quantize(np.array([just_above_half]), scale=1.0).codes.tolist() == [0]
    values = gaussian(6, 8)
    expected = quantize(values, "five", group=3)
    for same in (
        values.astype(np.float64),
        values.tolist(),
        torch.tensor(values, requires_grad=True),
        np.asfortranarray(values),
        values.astype(">f4"),
        np.repeat(values, 2, 1)[:, ::2],
    ):
        assert_same_bits(quantize(same, "five", group=3).codes, expected.codes)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = torch.from_numpy(values).to(dtype)
        assert_same_bits(as_float32(narrow), narrow.float().numpy())
    assert_same_bits(as_float32(values.astype(np.float16)), values.astype(np.float16).astype(np.float32))
    assert as_float32(np.array([2**24 + 1]))[0] == np.float32(2**24)
    assert as_float32(np.array([True, False])).tolist() == [1.0, 0.0]
    cube = gaussian(2, 3, 4)
    assert_same_bits(quantize(cube).codes, quantize(cube.reshape(-1)).codes.reshape(2, 3, 4))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 1e300])
def test_what_is_not_finite_is_refused_with_count_and_place(wrong):
    """By `quantize` of each backend: backends/test_backends.py."""
    flat = np.array([0.0, wrong])
    for refuses in (
        quantize,
        absmean,
        lambda x: stochastic_step(x, "five"),
        lambda x: quantize_stochastic(x, "five", step=1.0, key=0),
    ):
        with pytest.raises(ValueError, match=r"1 of 2 values .* index \(?1"):
            refuses(flat)


@pytest.mark.parametrize(
    "values", [np.ones(2, complex), np.array([object()]), ["a"], torch.ones(2, dtype=torch.complex64), [None]]
)
def test_what_is_no_real_number_is_refused(values):
    with pytest.raises(ValueError, match="real numbers"):
        quantize(values)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 0.0}, "positive"),
        ({"levels": "four"}, "ternary, five, not 'four'"),
        ({"levels": 2}, "ternary, five, not 2"),
        ({"scale": "mean"}, "absmean, absmax or a positive float32 number, not 'mean'"),
        ({"scale": -1}, "positive"),
        ({"scale": math.nan}, "positive"),
        ({"scale": 1e300}, "positive"),
        ({"scale": 1e-60}, "positive"),
        ({"scale": True}, "positive"),
        ({"group": 0}, "at least 1"),
        ({"group": -3}, "at least 1"),
        ({"group": "column"}, "tensor, row or a count of at least 1, not 'column'"),
        ({"group": 2.0}, "tensor, row or a count"),
        ({"group": True}, "tensor, row or a count"),
        ({"backend": "fortran"}, "numpy, c, cpp, torch, cuda, cupy, not 'fortran'"),
    ],
)
def test_unknown_settings_are_refused_with_what_there_is(settings, message):
    with pytest.raises(ValueError, match=message):
        quantize(np.ones((2, 2)), **settings)


@pytest.mark.parametrize("group", ["row", 1, np.int64(2)])
def test_rows_and_neighbours_need_a_matrix(group):
    for shape in ((), (4,), (2, 2, 2)):
        with pytest.raises(ValueError, match="needs a matrix"):
            quantize(np.ones(shape), group=group)


# -- stochastic codes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN["uniforms"])
def test_uniforms_are_those_of_the_golden_file(case):
    key = rounding_key(case["seed"], case["step"], case["stream"])
    assert key == case["key"]
    found = uniforms(1_000_001, key)
    assert found.dtype == np.float32
    assert found[:5].tolist() == case["first"]
    assert found[-1] == case["at_1000000"]


@given(st.integers(0, 2**32 - 1))
def test_uniforms_are_those_of_the_transcription(key):
    assert uniforms(50, key).tolist() == [plain_uniform(i, key) for i in range(50)]


@given(arrays, st.sampled_from(sorted(TOP)), near_one, st.integers(0, 2**32 - 1))
def test_stochastic_codes_are_those_of_the_transcription(values, levels, step, key):
    step = np.float32(abs(step))
    found = quantize_stochastic(values, levels, step=float(step), key=key)
    assert found.dtype == np.int8
    for i, (w, code) in enumerate(zip(values, found.tolist(), strict=True)):
        if step == 0:
            assert code == 0
            continue
        with np.errstate(over="ignore", under="ignore"):
            y = min(np.float32(abs(w)) / step, np.float32(TOP[levels]))
        size = math.floor(y) + (plain_uniform(i, key) < y - np.float32(math.floor(y)))
        assert code == (-size if w < 0 else size)


@pytest.mark.parametrize("backend", ["numpy", "torch", "c", "cpp"])
def test_a_value_rounds_up_where_its_uniform_is_smaller_than_its_share(backend):
    draws = uniforms(5000, 77)
    below = quantize_stochastic(draws, "ternary", step=1.0, key=77, backend=backend)
    above = quantize_stochastic(
        -np.nextafter(draws, np.float32(2)), "five", step=1.0, key=77, backend=backend
    )
    assert not below.any()
    assert (above == -1).all()


@pytest.mark.parametrize("step", [-1.0, math.nan, math.inf, 1e300])
def test_a_step_that_is_no_step_is_refused(step):
    with pytest.raises(ValueError, match="step must be"):
        quantize_stochastic([1.0], "five", step=step, key=0)


def test_the_stochastic_step_is_that_of_the_golden_file():
    golden = GOLDEN["stochastic_step"]
    assert root_mean_square(as_float32(golden["x"])) == pytest.approx(golden["rms"], rel=1e-15)
    assert root_mean_square(large_golden()) == pytest.approx(golden["large"]["rms"], rel=1e-15)
    for name in TOP:
        assert stochastic_step(golden["x"], name) == golden[name]
    assert stochastic_step(large_golden(), "ternary") == golden["large"]["ternary"]


# -- what codes are worth ------------------------------------------------------------------------------------


def test_entropy_and_zero_share():
    assert entropy_bits([0, 0, 1, -1]) == 1.5
    assert entropy_bits(np.array([[0, 1, 2, -1, -2]], np.int8)) == pytest.approx(math.log2(5), rel=1e-12)
    assert entropy_bits([1, 1]) == 0
    assert math.copysign(1, entropy_bits([])) == 1
    assert zero_share([0, 1, 0, -2]) == 0.5
    assert zero_share([]) == 0
    for name in TOP:
        codes = quantize(large_golden(), name).codes
        assert entropy_bits(codes) == pytest.approx(GOLDEN["encode_large"][name]["entropy_bits"], rel=1e-9)

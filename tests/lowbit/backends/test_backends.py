"""Every backend gives the bits of the reference, and says why where it cannot be used.

Tests marked cuda run the same on a GPU (make test-cuda). The compiled backends have tests of their own.
"""

import hashlib

import numpy as np
import pytest
import torch
from support import emulated
from support.low_bit import GOLDEN, agree, assert_same_bits, gaussian, large_golden

from ebc_lab.lowbit import backends as backends_module
from ebc_lab.lowbit.backends import (
    NAMES,
    Backend,
    BackendUnavailableError,
    NumpyBackend,
    TorchBackend,
    available_backends,
    get_backend,
)
from ebc_lab.lowbit.backends.formulas import TOP, order_free_mean
from ebc_lab.lowbit.backends.tensors import (
    torch_effective,
    torch_stochastic,
    torch_stochastic_step,
    torch_uniforms,
)
from ebc_lab.lowbit.levels import quantize, quantize_stochastic, rounding_key, stochastic_step, uniforms
from ebc_lab.lowbit.packing import pack, unpack

GPU = pytest.param("cuda", marks=pytest.mark.cuda)
GROUPS = ["tensor", "row", 1, 7, 64, 4096, 4097, 9001, 20000]

names = pytest.mark.parametrize("name", ["numpy", "torch", "c", "cpp", GPU])
devices = pytest.mark.parametrize("device", ["cpu", GPU])
levels = pytest.mark.parametrize("levels", TOP)


def hard_values() -> np.ndarray:
    """Ragged blocks, magnitudes of all sizes, zeros of both signs, ties, numbers without a leading bit."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((3, 9001)).astype(np.float32)
    values[1] *= 2.0 ** rng.integers(-120, 100, 9001)
    values[2, ::3] = np.round(values[2, ::3] * 2) / 2
    values[0, :4096] = 0
    values[0, 4096:5000] = -0.0
    values[0, 5000:6000] *= 1e-42
    return values


# -- the golden file -----------------------------------------------------------------------------------------


@names
@pytest.mark.parametrize("case", GOLDEN["encode"], ids=lambda case: case["name"])
def test_codes_and_steps_are_those_of_the_golden_file(case, name):
    for level in TOP:
        scale = case["step"] if case["step_given"] else "absmean"
        quantized = quantize(np.array(case["x"]), level, scale=scale, backend=name)
        assert quantized.steps == case["step"]
        assert quantized.codes.tolist() == case[level]


@names
@levels
def test_large_arrays_and_their_bytes_are_those_of_the_golden_file(levels, name):
    golden = GOLDEN["encode_large"]
    quantized = quantize(large_golden(), levels, backend=name)
    assert quantized.steps == golden["step"]
    assert np.unique(quantized.codes, return_counts=True)[1].tolist() == golden[levels]["counts"]
    assert hashlib.sha256(quantized.codes.tobytes()).hexdigest() == golden[levels]["sha256_codes"]
    packed = pack(quantized.codes, levels, backend=name)
    assert packed.nbytes == golden[levels]["packed_bytes"]
    assert hashlib.sha256(packed.tobytes()).hexdigest() == golden[levels]["sha256_packed"]
    assert_same_bits(unpack(packed, 10000, levels, backend=name), quantized.codes)


@names
def test_groups_are_those_of_the_golden_file(name):
    golden = GOLDEN["groups"]
    rows = quantize(golden["x"], "ternary", group="row", backend=name)
    assert rows.steps.tolist() == golden["row"]["steps"]
    assert rows.codes.tolist() == golden["row"]["ternary"]
    pairs = quantize(golden["x"], "five", group=2, backend=name)
    assert pairs.steps.tolist() == golden["group_2"]["steps"]
    assert pairs.codes.tolist() == golden["group_2"]["five"]


@names
@pytest.mark.parametrize("case", GOLDEN["stochastic"])
def test_stochastic_codes_are_those_of_the_golden_file(case, name):
    key = rounding_key(case["seed"], case["stochastic_step"], case["stream"])
    codes = quantize_stochastic(case["x"], case["levels"], step=case["step"], key=key, backend=name)
    assert codes.tolist() == case["codes"]


# -- the same bits -------------------------------------------------------------------------------------------


@pytest.mark.thorough
@devices
@levels
@pytest.mark.parametrize("scale", ["absmean", "absmax", 0.3])
def test_torch_gives_the_bits_of_numpy_for_every_group(levels, scale, device):
    values = hard_values()
    for group in GROUPS:
        agree(TorchBackend(device), NumpyBackend(), values, levels, group, scale)


@devices
@levels
def test_torch_draws_the_numbers_of_numpy(levels, device):
    values = hard_values()
    key = rounding_key(4, 5, 6)
    for step in (0.0, 0.7, 3e-42, 1e30):
        expected = NumpyBackend().stochastic(values, levels, step, key)
        assert_same_bits(TorchBackend(device).stochastic(values, levels, step, key), expected)
    assert_same_bits(torch_uniforms(5000, key, device).cpu().numpy(), uniforms(5000, key))
    tensor = torch.from_numpy(values).to(device)
    step = torch_stochastic_step(tensor, levels)
    assert_same_bits(step.cpu().numpy(), np.asarray(stochastic_step(values, levels)))
    drawn = torch_stochastic(tensor, levels, step, key)
    expected = NumpyBackend().stochastic(values, levels, float(step), key)
    assert_same_bits(drawn.cpu().numpy(), expected)
    assert torch_stochastic_step(torch.zeros(0, device=device), levels) == 0


@names
def test_more_values_than_are_worked_on_together(name):
    values = np.random.default_rng(3).standard_normal((3, 65_536 + 4_096 + 17)).astype(np.float32)
    values *= np.float32([[1], [1e-3], [1e3]])
    backend = get_backend(name)
    steps = backend.quantize(values, "five")[1]
    assert steps == np.float32(order_free_mean(np, values.reshape(1, -1))[0])
    key = rounding_key(1, 2, 3)
    drawn = backend.stochastic(values, "five", 0.5, key).reshape(-1)
    size = np.minimum(np.abs(values.reshape(-1)) / np.float32(0.5), np.float32(2))
    whole = np.floor(size)
    expected = np.copysign(whole + (uniforms(values.size, key) < size - whole), values.reshape(-1))
    assert np.array_equal(drawn, expected)


@names
def test_a_single_number_is_an_array_without_axes(name):
    backend = get_backend(name)
    codes, steps = backend.quantize(np.array(-3, np.float32), "five")
    results = [codes, steps, backend.effective(np.array(-3, np.float32), "five")]
    results += [backend.decode(codes, steps, "five", "tensor"), backend.stochastic(steps, "five", 3.0, 1)]
    for result in results:
        assert isinstance(result, np.ndarray)
        assert result.shape == ()
    assert [float(result) for result in results] == [-1, 3, -3, -3, 1]


def test_tensors_of_wrong_types_are_refused():
    backend = TorchBackend()
    with pytest.raises(ValueError, match=r"integers, not torch\.float32"):
        backend.pack(torch.zeros(3), "five")
    with pytest.raises(ValueError, match=r"bytes, not torch\.int64"):
        backend.unpack(torch.zeros(1, dtype=torch.int64), 3, "ternary")
    with pytest.raises(ValueError, match="take 1 bytes, not 2"):
        backend.unpack(torch.zeros(2, dtype=torch.uint8), 3, "ternary")
    with pytest.raises(ValueError, match="real numbers"):
        backend.quantize(torch.ones(2, dtype=torch.complex64), "five")
    as_bytes = torch.tensor([0, 1, 1], dtype=torch.uint8)
    assert torch.equal(backend.pack(as_bytes, "ternary"), backend.pack(as_bytes.char(), "ternary"))


@devices
def test_another_thread_count_and_layout_gives_the_same_bits(device):
    values = torch.from_numpy(hard_values()).to(device)
    expected = TorchBackend(device).effective(values, "five", 64)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(TorchBackend(device).effective(values, "five", 64), expected)
    finally:
        torch.set_num_threads(threads)
    transposed = values.T.contiguous().T
    assert torch.equal(TorchBackend(device).effective(transposed, "five", 64), expected)


@devices
def test_tensors_come_back_as_tensors_on_their_device(device):
    backend = TorchBackend(device)
    values = gaussian(5, 8)
    agree(backend, NumpyBackend(), values, "ternary", "row", kind=lambda x: torch.from_numpy(x).to(device))
    trained = torch.from_numpy(values).to(device).requires_grad_()
    effective = backend.effective(trained, "ternary", "row")
    for result in (
        *backend.quantize(trained, "five"),
        backend.stochastic(trained, "five", 1.0, 3),
        effective,
    ):
        assert not result.requires_grad
    assert torch.equal(backend.effective(trained.detach().double(), "ternary", "row"), effective)


def test_a_read_only_array_is_taken_and_not_changed():
    values = np.ones((2, 3), np.float32)
    values.flags.writeable = False
    for backend in (NumpyBackend(), TorchBackend()):
        codes, steps = backend.quantize(values, "five")
        codes.flags.writeable = False
        assert backend.decode(codes, steps, "five", "tensor").tolist() == values.tolist()
        assert backend.unpack(backend.pack(codes, "five"), 6, "five").all()


# -- what is not finite --------------------------------------------------------------------------------------


@names
@pytest.mark.parametrize("scale", ["absmean", "absmax", 0.3])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_group_with_a_number_that_is_not_finite_is_nan_throughout_and_has_no_codes(wrong, scale, name):
    backend = get_backend(name)
    values = np.ones((3, 5000), np.float32)
    values[1, 4500] = wrong
    for group in ("tensor", "row", 100):
        effective = backend.effective(values, "five", group, scale)
        expected = np.zeros(values.shape, bool)
        place = {"tensor": np.s_[:], "row": np.s_[1], 100: np.s_[1, 4500:4600]}[group]
        expected[place] = True
        assert np.array_equal(np.isnan(effective), expected)
        with pytest.raises(ValueError, match=r"1 of 15000 values .* \(1, 4500\)"):
            backend.quantize(values, "five", group, scale)


@names
def test_unknown_settings_are_refused_by_the_backend_itself(name):
    backend = get_backend(name)
    values = np.ones((2, 2), np.float32)
    wrong = (("four",), ("five", "column"), ("five", 0), ("five", "row", "mean"), ("five", "row", -1))
    for settings in wrong:
        for operation in (backend.quantize, backend.effective):
            with pytest.raises(ValueError, match=r"must be|at least"):
                operation(values, *settings)
    with pytest.raises(ValueError, match="needs a matrix"):
        backend.effective(values[0], "five", "row")
    with pytest.raises(ValueError, match="step must be"):
        backend.stochastic(values, "five", -1.0, 0)


# -- the tensor functions under torch's transforms -----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("group", ["tensor", "row", 64, 7])
@levels
@devices
def test_compiled_code_gives_the_same_bits(levels, group, device):
    """torch 2.13 compiled repeat_interleave and a slice wrongly on a CPU: ragged groups show it."""
    if device == "cuda" and emulated.wanted():
        pytest.skip("an emulated GPU compiles nothing")
    torch._dynamo.reset()
    compiled = torch.compile(torch_effective, fullgraph=True, dynamic=False)
    for shape in ((96, 5000), (33, 4097), (64, 128), (5, 8)):
        weight = torch.randn(shape, device=device)
        found = compiled(weight, levels, group).cpu().numpy()
        assert_same_bits(found, torch_effective(weight, levels, group).cpu().numpy())


@pytest.mark.cuda
def test_the_tensor_functions_can_be_captured_in_a_graph():
    weight = torch.randn(64, 100, device="cuda")
    torch_effective(weight, "five", 7)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values = torch_effective(weight, "five", 7)
    weight.mul_(-3)
    graph.replay()
    assert torch.equal(values, torch_effective(weight, "five", 7))


# -- choosing ------------------------------------------------------------------------------------------------


def test_backends_are_made_once_and_bear_their_names():
    assert get_backend("numpy") is get_backend("numpy")
    assert get_backend("torch").name == "torch"
    assert isinstance(get_backend("numpy"), Backend)
    with pytest.raises(BackendUnavailableError, match="must be one of numpy, c, cpp, torch, cuda, cupy"):
        get_backend("rust")
    with pytest.raises(BackendUnavailableError, match="must be one of"):
        get_backend(["numpy"])  # type: ignore[arg-type]


def test_each_backend_works_or_says_why_not():
    found = available_backends()
    assert tuple(found) == NAMES
    assert found["numpy"] is found["torch"] is None
    assert (found["cuda"] is None) == backends_module.HAS_GPU == torch.cuda.is_available()
    for name, reason in found.items():
        if reason is None:
            continue
        assert "\n" not in reason
        with pytest.raises(BackendUnavailableError, match=name):
            get_backend(name)

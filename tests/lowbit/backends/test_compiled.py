"""The compiled backends: numpy's bytes in every operation, and a reason wherever they cannot be built."""

import os
import select
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from support.low_bit import LEVELS, agree, assert_same_bits

from ebc_lab.lowbit.backends import NumpyBackend, build
from ebc_lab.lowbit.backends.build import BackendUnavailableError, library
from ebc_lab.lowbit.backends.compiled import CompiledBackend

NAMES = ("c", "cpp")
REFERENCE = NumpyBackend()
QUICK = ("-O0", "-shared", "-fPIC")  # flags of builds that only have to come about


@pytest.fixture(params=NAMES)
def backend(request) -> CompiledBackend:
    return CompiledBackend(request.param)


def spread(n: int, seed: int = 0, exponents: int = 30) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(n) * np.exp2(rng.integers(-exponents, exponents + 1, n))).astype(np.float32)


# -- the same bytes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("n", [0, 1, 6, 25, 319, 320, 321, 1535, 1536, 1537, 4095, 4096, 4097, 20_001])
def test_around_the_edges_of_blocks(backend, levels, n):
    agree(backend, REFERENCE, spread(n, n), levels)
    agree(backend, REFERENCE, spread(n, n), levels, scale="absmax")


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("group", ["row", 1, 3, 64, 5000])
@pytest.mark.parametrize("shape", [(3, 5), (2, 4097), (7, 300), (0, 4), (4, 0)])
def test_groups(backend, levels, group, shape):
    values = spread(shape[0] * shape[1], 5, 10).reshape(shape)
    for scale in ("absmean", "absmax", 0.3):
        agree(backend, REFERENCE, values, levels, group, scale)


@given(
    values=npst.arrays(
        np.float32, st.integers(0, 400), elements=st.floats(allow_nan=False, allow_infinity=False, width=32)
    ),
    levels=st.sampled_from(LEVELS),
    scale=st.sampled_from(["absmean", "absmax", 1e-30, 0.5, 1e30]),
    columns=st.integers(1, 9),
    group=st.one_of(st.just("row"), st.integers(1, 12)),
)
def test_any_values(values, levels, scale, columns, group):
    matrix = values[: len(values) // columns * columns].reshape(-1, columns)
    with np.errstate(over="ignore", invalid="ignore"):
        for name in NAMES:
            agree(CompiledBackend(name), REFERENCE, values, levels, scale=scale)
            agree(CompiledBackend(name), REFERENCE, matrix, levels, group, scale)


@pytest.mark.parametrize("levels", LEVELS)
def test_numbers_at_the_ends_of_float32(backend, levels):
    below = np.nextafter(np.float32(2.0**-90), np.float32(0))
    for numbers in (
        [2.0**-90, below, -0.0, 1e-45],
        [below, below, 1e-45],
        [1e-45, -1e-40, 1e-38],
        [3.4028235e38, -3.4028235e38, 1.0],
        [2.0**127, 1.0, -0.0],
        [-0.0, 0.0],
    ):
        with np.errstate(over="ignore"):
            agree(backend, REFERENCE, np.array(numbers, np.float32), levels)
            agree(backend, REFERENCE, np.array(numbers, np.float32), levels, scale="absmax")
            agree(backend, REFERENCE, np.array(numbers, np.float32), levels, scale=1e-45)


def test_the_mean_counts_in_blocks_of_4096(backend):
    values = np.zeros(8192, np.float32)
    values[0] = 1.0
    values[2048:4096] = 2.0**-32  # below half a unit of their block, which is 2^-29: they do not count
    assert backend.quantize(values, "five")[1] == np.float32(2.0**-13)
    values[4096:6144] = 2.0**-32  # these have a block, and so a unit, of their own
    assert backend.quantize(values, "five")[1] == np.float32(2.0**-13 * (1 + 2.0**-21))


def test_blocks_are_added_by_halves(backend):
    values = np.zeros(4 * 4096, np.float32)
    values[:2] = 1.0, 2.0**-24  # half way between two float32
    values[[4096, 2 * 4096, 3 * 4096]] = 2.0**-53  # half a unit of float64: one by one they would be lost
    assert backend.quantize(values, "five")[1] == np.float32(2.0**-14 * (1 + 2.0**-23))


@pytest.mark.parametrize("levels", LEVELS)
def test_threads_do_not_change_a_bit(levels):
    values = spread(400_003, 3, 20)
    for threads in (1, 2, 3):
        agree(CompiledBackend("cpp", threads), REFERENCE, values, levels)
        agree(CompiledBackend("cpp", threads), REFERENCE, values[:390_000].reshape(30, -1), levels, 129)


def unaligned(values: np.ndarray) -> np.ndarray:
    return np.frombuffer(b"\0" + values.tobytes(), np.uint8)[1:].view(np.float32)


@pytest.mark.parametrize(
    "laid_out",
    [
        lambda values: np.stack([values, values], axis=1)[:, 0],
        lambda values: values[::-1],
        unaligned,
        lambda values: values.astype(">f4"),
        lambda values: values.astype(np.float64) * (1 + 1e-9),
        lambda values: values.astype(np.float16),
        lambda values: (100 * values).astype(np.int64),
        lambda values: values > 0,
        lambda values: values[0],  # no dimensions
    ],
)
def test_any_layout_and_dtype(backend, laid_out):
    given = laid_out(spread(1000, 1, 2))
    agree(backend, REFERENCE, given, "five")


def test_tensors_are_read_where_they_lie(backend):
    values = spread(60 * 70, 1, 3).reshape(60, 70)
    tensor = torch.from_numpy(values).clone().requires_grad_()
    for group in ("tensor", "row", 9):
        agree(backend, REFERENCE, values, "five", group, kind=torch.from_numpy)
        codes = REFERENCE.quantize(values, "five", group)[0]
        for turned in (tensor, tensor.T.contiguous().T):
            assert_same_bits(backend.quantize(turned, "five", group)[0], codes)
    negated = torch.view_as_complex(torch.ones(5, 2)).conj().imag  # a view with the negative bit
    assert backend.quantize(negated, "ternary")[0].tolist() == [-1] * 5
    half = tensor.detach().bfloat16()
    expected = REFERENCE.quantize(half.float().numpy(), "five")[0]
    assert_same_bits(backend.quantize(half, "five")[0], expected)


def test_results_go_into_ready_buffers(backend):
    values = spread(1000, 2, 3)
    codes = np.empty(1000, np.int8)
    data = np.empty(42 * 7, np.uint8)
    result = np.empty(1000, np.float32)
    assert backend.quantize(values, "five", out=codes)[0] is codes
    assert backend.pack(codes, "five", out=data) is data
    steps = REFERENCE.quantize(values, "five")[1]
    assert backend.unpack_values(data, (1000,), steps, "five", out=result) is result
    assert_same_bits(result, REFERENCE.effective(values, "five"))
    with pytest.raises(ValueError, match=r"out must be a contiguous array of float32 and shape \(1000,\)"):
        backend.effective(values, "five", out=result[:999])
    with pytest.raises(ValueError, match="out must be"):
        backend.effective(values, "five", out=codes)


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["absmean", "absmax", 0.5])
@pytest.mark.parametrize(("name", "threads"), [("c", 1), ("cpp", 1), ("cpp", 3)])
def test_what_is_not_finite_is_refused_on_any_thread(name, threads, scale):
    backend = CompiledBackend(name, threads)
    values = spread(300_000).reshape(3, -1)
    values[1, 7] = np.nan
    values[2, 5] = -np.inf
    words = r"2 of 300000 values are NaN or infinite.*index \(1, 7\)"
    for group in ("tensor", "row", 100):
        with pytest.raises(ValueError, match=words):
            backend.quantize(values, "five", group, scale)
    with pytest.raises(ValueError, match=words):
        backend.stochastic(torch.from_numpy(values), "five", 0.5, 1)
    assert np.isnan(backend.effective(values, "five", "row", scale)[1:]).all()


@pytest.mark.parametrize(("levels", "largest", "index"), [("ternary", 242, 70), ("five", 124, 450)])
def test_bytes_that_are_no_codes_are_named(backend, levels, largest, index):
    n = 40_000
    data = REFERENCE.pack(np.zeros(n, np.int8), levels)
    whole = data.copy()
    data[index] = largest
    backend.unpack(data, n, levels)
    data[index] = largest + 1
    for values in (data, torch.from_numpy(data)):
        with pytest.raises(ValueError, match=f"byte {index} of .*, {largest + 1}, holds no {levels}"):
            backend.unpack(values, n, levels)
    with pytest.raises(ValueError, match=f"byte {index} "):
        backend.unpack_values(data, (n,), np.float32(1), levels)
    with pytest.raises(ValueError, match="take"):
        backend.unpack(whole[:-1], n, levels)


def test_the_eighth_value_of_five_levels_is_checked(backend):
    data = np.full(7, 62, np.uint8)
    data[[0, 2, 3, 4, 5, 6]] += 128  # its bits: 1 + 4 + 8 + 16 + 32 + 64 = 125
    with pytest.raises(ValueError, match="byte 0 of the packed data, 190, holds no five codes"):
        backend.unpack(data, 24, "five")
    data[0] -= 128  # 124, the largest
    assert_same_bits(backend.unpack(data, 24, "five"), REFERENCE.unpack(data, 24, "five"))


def test_shapes_that_do_not_fit_are_refused(backend):
    codes = np.zeros((2, 3), np.int8)
    with pytest.raises(ValueError, match=r"have steps of shape \(2, 2\), not \(2,\)"):
        backend.decode(codes, np.ones(2, np.float32), "five", 2)
    with pytest.raises(ValueError, match=r"have steps of shape \(2,\)"):
        backend.unpack_values(bytes(2), (2, 3), np.ones(3, np.float32), "ternary", "row")
    with pytest.raises(ValueError, match="real numbers"):
        backend.quantize(torch.ones(3, dtype=torch.complex64), "five")
    with pytest.raises(ValueError, match="tensors of the CPU"):
        backend.quantize(torch.ones(3, device="meta"), "five")
    with pytest.raises(ValueError, match="k <= n"):
        backend.kmeans(np.zeros((2, 3)), np.zeros((3, 3)), 5)
    with pytest.raises(ValueError, match="at least 1 thread"):
        CompiledBackend("cpp", 0)


# -- building ------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder of its own, and quick builds."""
    monkeypatch.setenv("EBC_LAB_LOWBIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "FLAGS", QUICK)
    monkeypatch.delenv("CC", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Puts a shell script in place of the C compiler; it answers --version, then runs the given lines."""

    def put(lines: str) -> None:
        script = tmp_path / "compiler"
        script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "mine 1.0" && exit\n{lines}\n')
        script.chmod(0o755)
        monkeypatch.setenv("CC", str(script))

    return put


OUTPUT = 'while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done\n'


def names(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


@pytest.mark.thorough
def test_a_library_is_built_once_or_when_damaged_and_named_by_all_that_made_it(cache, monkeypatch):
    library("c")
    (built, checksum) = names(cache)
    assert checksum == built + ".sha256"
    before = (cache / built).stat()
    monkeypatch.setattr(build, "_loaded", {})
    library("c")
    assert (cache / built).stat().st_mtime_ns == before.st_mtime_ns
    content = (cache / built).read_bytes()
    (cache / built).unlink()  # this process has it mapped
    (cache / built).write_bytes(content[: len(content) // 2])
    monkeypatch.setattr(build, "_loaded", {})
    library("c")
    assert (cache / built).read_bytes() == content
    (cache / checksum).unlink()
    monkeypatch.setattr(build, "_loaded", {})
    library("c")
    assert names(cache) == [built, checksum]
    monkeypatch.setattr(build, "FLAGS", (*QUICK, "-g"))
    library("c")
    assert len(names(cache)) == 4
    monkeypatch.setattr(build, "_cpu_features", lambda: "flags: another CPU")
    monkeypatch.setattr(build, "_loaded", {})
    library("c")
    assert len(names(cache)) == 6


@pytest.mark.thorough
def test_two_processes_may_build_at_once(cache):
    code = (
        "from ebc_lab.lowbit.backends import build, compiled\n"
        f"build.FLAGS = {QUICK!r}\n"
        "import numpy as np\n"
        "print(compiled.CompiledBackend('c').quantize(np.ones(9, np.float32), 'five')[0].sum())\n"
    )
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        assert process.communicate()[0] == "9\n"
        assert process.returncode == 0
    assert len(names(cache)) == 2  # nothing is left of the builds


def test_no_compiler(cache, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BackendUnavailableError, match=r"no compiler 'cc'; install one .* or set CC to one"):
        CompiledBackend("c")
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(BackendUnavailableError, match=r"cpp is not available.*'/no/such/compiler'.*set CXX"):
        CompiledBackend("cpp")
    assert not cache.exists()


def test_a_cache_that_is_no_folder(cache):
    cache.write_text("a file")
    with pytest.raises(BackendUnavailableError, match=r"cannot hold its library.*set EBC_LAB_LOWBIT_CACHE"):
        library("c")


def test_a_failing_compiler_is_asked_once(cache, compiler, tmp_path):
    compiler(f"echo once >> {tmp_path}/calls; echo no such instruction: vfoo >&2; exit 3")
    for _ in range(2):
        with pytest.raises(BackendUnavailableError, match="code 3: no such instruction: vfoo; set CC"):
            library("c")
    assert (tmp_path / "calls").read_text() == "once\n"
    assert names(cache) == []


def test_a_compiler_that_writes_garbage(cache, compiler):
    compiler(OUTPUT + "echo garbage > $out")
    with pytest.raises(BackendUnavailableError, match=r"library does not load .*set CC to another compiler"):
        library("c")


@pytest.mark.parametrize("asked", ["--version", "anything"])
def test_a_compiler_that_hangs_is_stopped_with_its_children(cache, tmp_path, monkeypatch, asked):
    monkeypatch.setattr(build, "COMPILE_SECONDS", 0.3)
    script = tmp_path / "compiler"
    fifo = tmp_path / "alive"
    os.mkfifo(fifo)
    script.write_text(
        f'#!/bin/sh\n[ {asked} != --version ] && [ "$1" = --version ] && exit\n'
        f"exec 3>{fifo}\necho begun >&3\nsleep 600 &\nwait\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    alive = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(BackendUnavailableError, match=r"did not end within 0.3 s and was stopped"):
        library("c")
    assert os.read(alive, 100) == b"begun\n"
    assert select.select([alive], [], [], 20)[0] == [alive]  # readable: an end of file, all writers are gone
    assert os.read(alive, 1) == b""
    os.close(alive)


def test_a_library_that_counts_wrongly(cache, compiler, tmp_path):
    stub = tmp_path / "stub.c"
    stub.write_text("\n".join(f"long {name}(void) {{ return 0; }}" for name in build._SIGNATURES))
    compiler(OUTPUT + f"exec cc -shared -fPIC {stub} -o $out")
    with pytest.raises(BackendUnavailableError, match="its library gives wrong codes"):
        library("c")

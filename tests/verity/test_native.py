"""The C engine: the bits of the eager one, whoever compiles it, and a reason where it cannot be built."""

import math
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ebc_lab.components import determinism
from ebc_lab.verity import eager, engine, native
from ebc_lab.verity.engine import engine_name
from ebc_lab.verity.native import NativeUnavailable

WIDE = torch.float64
ALPHA = 1 / math.sqrt(5)
KINDS = ("normal", "wide", "subnormal", "zeros")
SHAPES = ((0, 3), (1, 1), (3, 1), (5, 7), (33, 65), (40, 130))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of this module's own, and no library in use before and after."""
    folder = tmp_path_factory.mktemp("verity")
    native._kernels.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EBC_LAB_VERITY_CACHE", str(folder))
        try:
            native.load()
        except NativeUnavailable as error:
            pytest.skip(str(error))
        yield folder
    native._kernels.clear()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_it_is_what_computes_on_a_cpu():
    assert engine_name("cpu") == "c"
    assert engine_name("cuda") == "eager"


# -- the same bits -------------------------------------------------------------------------------------------


class Numbers:
    """Random numbers of one kind."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.generator = torch.Generator().manual_seed(KINDS.index(kind))

    def real(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=WIDE)
        if self.kind == "wide":
            x = x * torch.exp2(self.whole(-60, 60, *shape).double())
        if self.kind == "subnormal":
            x = x * 2.0**-140
        if self.kind == "zeros":
            x = torch.where(self.whole(0, 4, *shape) == 0, x, x * 0.0)  # of both signs
        return x.to(dtype)

    def whole(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def product(self, *shape: int) -> Tensor:
        """Integers such as an exact product gives."""
        return self.whole(-(2**44), 2**44, *shape).double()


def on_rows(r: Numbers, N: int, K: int) -> Iterator[tuple[object, ...]]:
    """Calls with rows: a function's name and its arguments."""
    x, w, bias = r.real(N, K), r.real(K), r.real(K)
    e = eager.row_exponents(x)
    yield "max_exponent", x
    yield "max_exponent", r.real(N, K, dtype=WIDE)
    yield "row_exponents", x
    yield "quantize_rows", x, e, 24
    yield "scaled_rows", r.product(N, K), e, -31, None
    yield "scaled_rows", r.product(N, K), e, -31, bias
    yield "add_integers", r.whole(-(2**50), 2**50, N, K), r.product(N, K)
    for terms in (x, r.real(N, K, dtype=WIDE)):
        yield "sum_rows", terms, 40 - eager.max_exponent(terms), r.whole(-(2**50), 2**50, K)
    sums = r.whole(-(2**50), 2**50, 9, K)
    yield "sum_rows_by_id", x, r.whole(0, 9, N), 40 - eager.max_exponent(x), sums
    yield "layer_norm", x, w, None, 1e-5
    yield "layer_norm", x, w, bias, 1e-5
    yield "layer_norm_backward", r.real(N, K), x, w, *eager.layer_norm(x, w, bias, 1e-5)[1:]
    yield "gelu", x * 3
    yield "softmax", x * 30
    yield "cross_entropy", x * 30, r.whole(0, K, N)
    for decay in (0.0, 1e-3):
        state = (r.real(N, K), r.real(N, K), r.real(N, K), r.real(N, K).abs())
        yield "adam", *state, 1e-3, 0.9, 0.999, 1e-8, decay, 1 - 0.9, 1 - 0.999


def on_heads(r: Numbers, B: int, T: int, n: int, H: int, D: int) -> Iterator[tuple[object, ...]]:
    """Calls with sequences."""
    yield "heads", r.real(B * T, n * H * D), B, n, H, 22
    yield "merged", [r.product(B * H, T, D) for _ in range(n)], r.whole(-80, 20, n, B * H), B, H
    for size in (-44, -34):
        s = r.whole(size - 3, size, B * H)
        scores, dp = r.product(B * H, T, T), r.product(B * H, T, T)
        yield "causal_softmax", scores, s, ALPHA, 23
        p, _ = eager.causal_softmax(scores, s, ALPHA, 23)
        yield "causal_softmax_backward", dp * r.real(1, dtype=WIDE).sign(), s, p, ALPHA, 23


def bits(x: object) -> object:
    if not isinstance(x, Tensor):
        return list(map(bits, x)) if isinstance(x, tuple) else x
    x = x.contiguous()
    if x.is_floating_point():
        x = x.view(torch.int64 if x.dtype is WIDE else torch.int32).masked_fill(x.isnan(), -1)
    return tuple(x.shape), x.numpy().tobytes()


def outcome(engine: object, name: str, *arguments: object) -> object:
    """The bits of the results and of all arguments afterwards."""
    own = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    found = getattr(engine, name)(*own)
    return bits((found, *(a for a in own if isinstance(a, Tensor))))


def check(calls: Iterator[tuple[object, ...]]) -> None:
    for name, *arguments in calls:
        assert outcome(native, name, *arguments) == outcome(eager, name, *arguments), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_rows_have_the_bits_of_the_eager_engine(kind, N, K):
    check(on_rows(Numbers(kind), N, K))


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1), (2, 1, 3, 2, 5), (3, 7, 3, 2, 8), (2, 33, 1, 3, 16), (1, 16, 2, 2, 4)]
)
def test_sequences_have_the_bits_of_the_eager_engine(kind, shape):
    check(on_heads(Numbers(kind), *shape))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_comes_out_as_in_the_eager_engine(bad):
    x = Numbers("normal").real(9, 13)
    x[2, 3] = x[8, 12] = bad
    assert native.max_exponent(x) == native.max_exponent(x.double()) == 1025
    assert native.row_exponents(x).eq(1025).nonzero().flatten().tolist() == [2, 8]
    e = eager.row_exponents(x)
    w = torch.ones(13)
    targets = torch.arange(9)
    calls = [("quantize_rows", x, e, 24), ("gelu", x), ("softmax", x), ("cross_entropy", x, targets)]
    check(iter([*calls, ("layer_norm", x, w, w, 1e-5)]))


@pytest.mark.thorough
def test_threads_do_not_change_bits(threads, monkeypatch):
    r = Numbers("normal")
    many = [*on_rows(r, 800, 512), *on_heads(r, 4, 48, 3, 4, 32)]
    many.append(("quantize_rows", r.real(1, 300_000), torch.tensor([3]), 21))
    if "OpenMP" in torch.__config__.parallel_info():
        assert native.openmp_team() is not None
    threads(1)
    alone = [outcome(native, *call) for call in many]
    counts = []
    run = native._kernels["gelu"]
    monkeypatch.setitem(native._kernels, "gelu", lambda *a: counts.append(a[-1]) or run(*a))
    threads(2)
    assert [outcome(native, *call) for call in many] == alone
    assert counts == [2]


def test_tensors_may_lie_in_memory_in_any_way():
    r = Numbers("normal")
    x = r.real(7, 12).t()
    check(iter([("row_exponents", x), ("gelu", x), ("max_exponent", x), ("softmax", x)]))
    w, g, m, v = (r.real(7, 12).t() for _ in range(4))
    settings = (1e-3, 0.9, 0.999, 1e-8, 0.0, 0.1, 0.001)
    check(iter([("adam", w, g, m, v.abs(), *settings)]))
    version = w._version
    native.adam(w, g, m, v.abs(), *settings)
    assert w._version > version  # torch hears that the weights changed


def test_an_index_that_is_no_row_is_an_error():
    for target in (-1, 3):
        with pytest.raises(IndexError, match="cross_entropy"):
            native.cross_entropy(torch.zeros(1, 3), torch.tensor([target]))
        with pytest.raises(IndexError, match="sum_rows_by_id"):
            native.sum_rows_by_id(
                torch.zeros(1, 2), torch.tensor([target]), 0, torch.zeros(3, 2, dtype=torch.int64)
            )


def test_another_type_of_number_is_an_error():
    with pytest.raises(TypeError, match="float32"):
        native.gelu(torch.zeros(3, dtype=torch.float16))
    with pytest.raises(ValueError, match="contiguous"):
        native.add_integers(torch.zeros(4, 3, dtype=torch.int64).t(), torch.zeros(3, 4, dtype=WIDE))


@pytest.mark.thorough
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86 processors")
@pytest.mark.parametrize("march", ["x86-64", "x86-64-v3"])
def test_processors_do_not_change_bits(march):
    if march == "x86-64-v3" and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("this processor has no AVX2")
    native.load(march)
    try:
        for kind in KINDS:
            check(on_rows(Numbers(kind), 33, 65))
            check(on_heads(Numbers(kind), 2, 33, 3, 2, 8))
    finally:
        native.load()


# -- building ------------------------------------------------------------------------------------------------


def compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """Set CC to a script of this line."""
    script = folder / "compiler"
    script.write_text(f"#!/bin/sh\n{line}\n")
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))


X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="options of x86 compilers")
FAST = 'exec cc "$@" -march=x86-64 -O1 -ffast-math'
NOTHING = 'while [ $# -gt 0 ]; do [ "$1" = -o ] && echo nothing > "$2"; shift; done'


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 1", "failed with code 1"),
        ("exit 0", "cannot hold the library|does not load"),
        (NOTHING, "does not load"),
        pytest.param(FAST, "wrong values", marks=X86),
    ],
)
def test_a_compiler_that_fails_or_makes_nothing_or_something_else_is_a_reason(
    script, reason, tmp_path, monkeypatch
):
    compiler(tmp_path, monkeypatch, script)
    monkeypatch.setenv("EBC_LAB_VERITY_CACHE", str(tmp_path / "cache"))
    with pytest.raises(NativeUnavailable, match=reason):
        native.load()
    assert torch.tensor(1e-310, dtype=torch.float64) * 0.5 > 0  # loading FAST had these flushed to zero


def test_a_compiler_that_hangs_or_is_not_there_is_a_reason(tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, "sleep 60")
    monkeypatch.setattr(native, "COMPILE_SECONDS", 0.2)
    with pytest.raises(NativeUnavailable, match="did not end within"):
        native.load()
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(NativeUnavailable, match="no compiler 'no-such-compiler'"):
        native.load()


def test_a_cache_that_cannot_be_written_is_a_reason(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EBC_LAB_VERITY_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(NativeUnavailable, match="set EBC_LAB_VERITY_CACHE to a folder"):
        native.load()


@pytest.mark.thorough
def test_a_library_is_built_once_and_again_when_it_is_damaged():
    path = native.build()
    whole, when = path.read_bytes(), path.stat().st_mtime_ns
    assert native.build() == path
    assert path.stat().st_mtime_ns == when
    path.unlink()  # it is in use: another file takes its place
    path.write_bytes(whole[:5000])
    assert native.build() == path
    assert path.read_bytes() == whole


def test_without_the_c_engine_it_is_said_once_what_computes(monkeypatch, caplog):
    monkeypatch.setattr(engine, "why_not_native", lambda: "there is no compiler")
    assert engine._native.__wrapped__() is None
    assert caplog.messages == ["verity computes with torch alone, which is slower: there is no compiler"]
    monkeypatch.setattr(determinism, "why_not_native", lambda: "there is no compiler")
    monkeypatch.setattr(determinism, "engine_name", lambda device: "eager")
    assert determinism.engine_in_words("cpu") == "eager: there is no compiler"
    assert determinism.engine_in_words("cuda") == "eager: c has no code for cuda"
    monkeypatch.setattr(determinism, "engine_name", lambda device: "c")
    assert determinism.engine_in_words("cpu") == "c"

"""The functions of `eager` in C (`kernels.c`), with the same bits, for tensors on a CPU.

The library is built at first use and kept in `cache_folder()` under a name that holds the sha256 of all that
made it: source, flags, compiler, CPU. Beside it lies its own sha256, so that a damaged one is built again.
Whatever goes wrong is a `NativeUnavailable` with the reason. Threads are `torch.get_num_threads()` of those
that torch has itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import eager
from .bits import divided, tree_sum
from .functions import exp64, log64, sqrt64

FLAGS = (
    *("-std=c11", "-O3", "-ffp-contract=off", "-fno-fast-math", "-fno-math-errno", "-fno-trapping-math"),
    *("-shared", "-fPIC"),
)
COMPILE_SECONDS = 120.0  # that a compiler may take
_SOURCE = Path(__file__).with_name("kernels.c")
_DONE, _NO_MEMORY, _OUT_OF_RANGE = range(3)  # as in the kernels

# What each function takes; all return an outcome.
_P, _L, _I, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_double
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "max_exponent": (_P, _L, _I, _P, _L),
    "row_exponents": (_P, _L, _L, _P, _L),
    "quantize_rows": (_P, _L, _L, _P, _L, _P, _L),
    "scaled_rows": (_P, _L, _L, _P, _L, _P, _P, _L),
    "add_integers": (_P, _P, _L, _L),
    "sum_rows": (_P, _L, _L, _I, _L, _P, _L),
    "sum_rows_by_id": (_P, _L, _L, _P, _L, _L, _P, _L),
    "layer_norm": (_P, _L, _L, _P, _P, _D, _P, _P, _P, _L),
    "layer_norm_backward": (_P, _P, _L, _L, _P, _P, _P, _P, _P, _L),
    "gelu": (_P, _L, _P, _P, _L),
    "heads": (_P, _L, _L, _L, _L, _L, _L, _P, _P, _L),
    "merged": (_P, _P, _L, _L, _L, _L, _L, _P, _L),
    "causal_softmax": (_P, _P, _L, _L, _D, _L, _P, _P, _L),
    "causal_softmax_backward": (_P, _P, _L, _L, _P, _D, _L, _P, _P, _L),
    "softmax": (_P, _L, _L, _P, _L),
    "cross_entropy": (_P, _L, _L, _P, _P, _P, _L),
    "adam": (_P, _P, _P, _P, _L, _D, _D, _D, _D, _D, _D, _D, _L),
    "known": (_P, _L, _P),
}


class NativeUnavailable(RuntimeError):
    """The C engine cannot be used here; the message says why, in one sentence."""


# -- building ------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where libraries are kept: $EBC_LAB_VERITY_CACHE, else ebc-lab/verity in the user's cache."""
    own = os.environ.get("EBC_LAB_VERITY_CACHE")
    if own:
        return Path(own)
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(home) if home else Path.home() / ".cache") / "ebc-lab" / "verity"
    except RuntimeError as error:
        raise NativeUnavailable(f"there is no home folder ({error}): set EBC_LAB_VERITY_CACHE") from error


def build(march: str = "native", rebuild: bool = False) -> Path:
    """The library for this `-march`, built if the cache does not hold it whole, or in any case.

    NativeUnavailable where it cannot be built or kept.
    """
    command = shlex.split(os.environ.get("CC", "")) or ["cc"]
    found = shutil.which(command[0])
    if found is None:
        raise NativeUnavailable(
            f"there is no compiler {command[0]!r}: install gcc or clang, or set CC to one"
        )
    command = [found, *command[1:]]
    flags = (*FLAGS, f"-march={march}")
    folder = cache_folder()
    path = folder / f"verity-{_fingerprint(command, flags)}.so"
    if not rebuild and _is_whole(path):
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=folder, ignore_cleanup_errors=True) as scratch:
            made = Path(scratch) / "library.so"
            _run([*command, *flags, str(_SOURCE), "-o", str(made), "-lm"])
            check = Path(scratch) / "checksum"
            check.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
            os.replace(made, path)
            os.replace(check, _checksum_of(path))
    except OSError as error:
        advice = "set EBC_LAB_VERITY_CACHE to a folder that can be written"
        raise NativeUnavailable(f"{folder} cannot hold the library ({error}): {advice}") from error
    return path


def _fingerprint(command: list[str], flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256(_SOURCE.read_bytes())
    for text in (*flags, *command, _run([*command, "--version"]), _cpu()):
        digest.update(b"\0" + text.encode())
    return digest.hexdigest()


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.partition(":")[0].strip().lower() in ("flags", "features"):
                return line
    return f"{platform.machine()} {platform.processor()}"


def _run(command: list[str]) -> str:
    """What a compiler prints. After COMPILE_SECONDS it is ended, with all the processes that it began."""
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        except OSError as error:
            raise NativeUnavailable(f"{command[0]} cannot be run ({error})") from error
        try:
            code = process.wait(COMPILE_SECONDS)
        except BaseException as error:  # Ctrl-C too: the compiler's own session does not hear it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            reason = f"{command[0]} did not end within {COMPILE_SECONDS:g} s and was stopped"
            raise NativeUnavailable(reason) from error
        output.seek(0)
        said = output.read().decode(errors="replace")
    if code != 0:
        last = " ".join(said.split())[-300:] or "it printed nothing"
        raise NativeUnavailable(f"`{shlex.join(command)}` failed with code {code}: {last}")
    return said


def _checksum_of(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _is_whole(path: Path) -> bool:
    """Whether all of the library is there: to load a truncated one could end the process."""
    try:
        expected = _checksum_of(path).read_text(encoding="utf-8", errors="replace")
        return hashlib.sha256(path.read_bytes()).hexdigest() == expected
    except OSError:
        return False


# -- loading -------------------------------------------------------------------------------------------------

_kernels: dict[str, Any] = {}  # what the functions below call
_one_at_a_time = threading.Lock()


def load(march: str = "native") -> None:
    """Build what is missing, and compute with it from now on; the functions below load `native` themselves.

    NativeUnavailable where that cannot be, or where the library fails a check of known values.
    """
    with _one_at_a_time:
        path = build(march)
        try:
            found = _opened(path)
        except NativeUnavailable:
            found = _opened(build(march, rebuild=True))
        _kernels.update(found)


def _opened(path: Path) -> dict[str, Any]:
    kept = _keeps_subnormals()
    try:
        library = ctypes.CDLL(str(path))
        functions = {name: getattr(library, f"verity_{name}") for name in _SIGNATURES}
        team = library.verity_team
    except (OSError, AttributeError) as error:
        raise NativeUnavailable(f"the library that was built does not load ({error})") from error
    finally:
        if kept and not _keeps_subnormals():  # compilers add that to libraries of -ffast-math
            torch.set_flush_denormal(False)
    for name, function in functions.items():
        function.argtypes = _SIGNATURES[name]
        function.restype = ctypes.c_int
    team.argtypes = (_P,)
    team.restype = None
    team(_team())
    if not _computes_rightly(functions["known"]):
        raise NativeUnavailable(f"the library that was built gives wrong values ({path})")
    return functions


def _keeps_subnormals() -> bool:
    return sys.float_info.min * 0.5 > 0


def _team() -> int | None:
    """The address of the function by which torch's OpenMP runs work on its threads; None if it has none."""
    found = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    return None if found is None else ctypes.cast(found, _P).value


def _computes_rightly(known: Any) -> bool:
    """Whether all is as torch has it; contraction, another order or reciprocals would change some value."""
    halves = torch.arange(-9, 0).double() * 0.5
    x = torch.cat([halves, torch.arange(-191, 0).double() * 0.37])
    out = torch.zeros(6, len(x), dtype=torch.float64)
    code = known(x.data_ptr(), len(x), out.data_ptr())
    by_sum = divided(x, tree_sum(x))
    expected = torch.stack([exp64(x), log64(-x), by_sum, sqrt64(-x), x * x + x, x.round()])
    return code == _DONE and torch.equal(out, expected)


def _call(name: str, *arguments: Any) -> None:
    if not _kernels:
        load()
    outcome = _kernels[name](*arguments, torch.get_num_threads())
    if outcome == _NO_MEMORY:
        raise MemoryError(f"verity has no memory for a row in {name}")
    if outcome == _OUT_OF_RANGE:
        raise IndexError(f"{name}: an index is negative or too large")


def _in(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor, contiguous. TypeError for another dtype."""
    if x.dtype is not dtype:
        raise TypeError(f"a tensor of {dtype} is needed here, not one of {x.dtype}")
    return x if x.is_contiguous() else x.contiguous()


def _out(x: Tensor, dtype: torch.dtype) -> int:
    """The address of a tensor that is changed in place. ValueError where it is not contiguous."""
    if x.dtype is not dtype or not x.is_contiguous():
        raise ValueError(f"a contiguous tensor of {dtype} is needed here")
    return x.data_ptr()


# -- the functions of `eager` --------------------------------------------------------------------------------

_f32, _f64, _i64 = torch.float32, torch.float64, torch.int64


def _any_float(x: Tensor) -> tuple[Tensor, int]:
    """The tensor, contiguous, and whether it is float64."""
    wide = x.dtype is _f64
    return _in(x, _f64 if wide else _f32), int(wide)


def max_exponent(x: Tensor) -> int:
    x, wide = _any_float(x)
    e = ctypes.c_int64()
    _call("max_exponent", x.data_ptr(), x.numel(), wide, ctypes.addressof(e))
    return e.value


def row_exponents(x: Tensor) -> Tensor:
    x = _in(x, _f32)
    N, K = x.shape
    e = torch.empty(N, dtype=_i64)
    _call("row_exponents", x.data_ptr(), N, K, e.data_ptr())
    return e


def quantize_rows(x: Tensor, e: Tensor, bits: int) -> Tensor:
    x, e = _in(x, _f32), _in(e, _i64)
    N, K = x.shape
    q = torch.empty(N, K, dtype=_f64)
    _call("quantize_rows", x.data_ptr(), N, K, e.data_ptr(), bits, q.data_ptr())
    return q


def scaled_rows(P: Tensor, e: Tensor, s: int, bias: Tensor | None) -> Tensor:
    P, e = _in(P, _f64), _in(e, _i64)
    b = None if bias is None else _in(bias, _f32)
    N, M = P.shape
    y = torch.empty(N, M, dtype=_f32)
    at = None if b is None else b.data_ptr()
    _call("scaled_rows", P.data_ptr(), N, M, e.data_ptr(), s, at, y.data_ptr())
    return y


def add_integers(S: Tensor, P: Tensor) -> None:
    P = _in(P, _f64)
    _call("add_integers", _out(S, _i64), P.data_ptr(), S.numel())


def sum_rows(terms: Tensor, shift: int, out: Tensor) -> None:
    terms, wide = _any_float(terms)
    N, M = terms.shape
    _call("sum_rows", terms.data_ptr(), N, M, wide, shift, _out(out, _i64))


def sum_rows_by_id(terms: Tensor, ids: Tensor, shift: int, out: Tensor) -> None:
    terms, ids = _in(terms, _f32), _in(ids, _i64)
    N, M = terms.shape
    address = _out(out, _i64)
    _call("sum_rows_by_id", terms.data_ptr(), N, M, ids.data_ptr(), len(out), shift, address)


def layer_norm(x: Tensor, w: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x, w = _in(x, _f32), _in(w, _f32)
    b = None if bias is None else _in(bias, _f32)
    N, d = x.shape
    y = torch.empty(N, d, dtype=_f32)
    mean = torch.empty(N, dtype=_f64)
    rstd = torch.empty(N, dtype=_f64)
    at = None if b is None else b.data_ptr()
    found = (y.data_ptr(), mean.data_ptr(), rstd.data_ptr())
    _call("layer_norm", x.data_ptr(), N, d, w.data_ptr(), at, eps, *found)
    return y, mean, rstd


def layer_norm_backward(
    dy: Tensor, x: Tensor, w: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    dy, x, w, mean, rstd = _in(dy, _f32), _in(x, _f32), _in(w, _f32), _in(mean, _f64), _in(rstd, _f64)
    N, d = x.shape
    dx = torch.empty(N, d, dtype=_f32)
    terms = torch.empty(N, d, dtype=_f64)
    given = (dy.data_ptr(), x.data_ptr(), N, d, w.data_ptr(), mean.data_ptr(), rstd.data_ptr())
    _call("layer_norm_backward", *given, dx.data_ptr(), terms.data_ptr())
    return dx, terms


def gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    x = _in(x, _f32)
    y = torch.empty(x.shape, dtype=_f32)
    slope = torch.empty(x.shape, dtype=_f32)
    _call("gelu", x.data_ptr(), x.numel(), y.data_ptr(), slope.data_ptr())
    return y, slope


def heads(x: Tensor, B: int, n: int, H: int, bits: int) -> tuple[Tensor, Tensor]:
    x = _in(x, _f32)
    N, width = x.shape
    T, D = N // B, width // (n * H)
    q = torch.empty(n, B * H, T, D, dtype=_f64)
    e = torch.empty(n, B * H, dtype=_i64)
    _call("heads", x.data_ptr(), B, T, n, H, D, bits, q.data_ptr(), e.data_ptr())
    return q, e


def merged(P: Sequence[Tensor], s: Tensor, B: int, H: int) -> Tensor:
    P, s = [_in(part, _f64) for part in P], _in(s, _i64)
    n = len(P)
    _, T, D = P[0].shape
    y = torch.empty(B * T, n * H * D, dtype=_f32)
    parts = (ctypes.c_void_p * n)(*[part.data_ptr() for part in P])
    _call("merged", ctypes.addressof(parts), s.data_ptr(), B, T, n, H, D, y.data_ptr())
    return y


def causal_softmax(Z: Tensor, s: Tensor, alpha: float, bits: int) -> tuple[Tensor, Tensor]:
    Z, s = _in(Z, _f64), _in(s, _i64)
    units, T, _ = Z.shape
    p = torch.empty(Z.shape, dtype=_f32)
    q = torch.empty(Z.shape, dtype=_f64)
    _call("causal_softmax", Z.data_ptr(), s.data_ptr(), units, T, alpha, bits, p.data_ptr(), q.data_ptr())
    return p, q


def causal_softmax_backward(
    dP: Tensor, s: Tensor, p: Tensor, alpha: float, bits: int
) -> tuple[Tensor, Tensor]:
    dP, s, p = _in(dP, _f64), _in(s, _i64), _in(p, _f32)
    units, T, _ = dP.shape
    q = torch.empty(dP.shape, dtype=_f64)
    e = torch.empty(units, dtype=_i64)
    given = (dP.data_ptr(), s.data_ptr(), units, T, p.data_ptr(), alpha, bits)
    _call("causal_softmax_backward", *given, q.data_ptr(), e.data_ptr())
    return q, e


def softmax(x: Tensor) -> Tensor:
    x = _in(x, _f32)
    V = x.shape[-1]
    p = torch.empty(x.shape, dtype=_f32)
    _call("softmax", x.data_ptr(), x.numel() // max(V, 1), V, p.data_ptr())
    return p


def cross_entropy(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z, y = _in(z, _f32), _in(y, _i64)
    N, V = z.shape
    loss = torch.empty(N, dtype=_f64)
    dz = torch.empty(N, V, dtype=_f32)
    _call("cross_entropy", z.data_ptr(), N, V, y.data_ptr(), loss.data_ptr(), dz.data_ptr())
    return loss, dz


def adam(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    c1: float,
    c2: float,
) -> None:
    settings = (lr, beta1, beta2, eps, decay, c1, c2)
    if not (w.is_contiguous() and m.is_contiguous() and v.is_contiguous()):
        return eager.adam(w, g, m, v, *settings)
    g = _in(g, _f32)
    _call("adam", _out(w, _f32), g.data_ptr(), _out(m, _f32), _out(v, _f32), w.numel(), *settings)
    increment_version((w, m, v))

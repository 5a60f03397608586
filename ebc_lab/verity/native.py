"""The functions of `eager` in C (`kernels.c`), with the same bits, for tensors on a CPU. `rotated`, `silu`
and norms that are not centred have no kernel: they are those of `eager`.

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
    """Return where libraries are kept: $EBC_LAB_VERITY_CACHE, else ebc-lab/verity in the user's cache."""
    override = os.environ.get("EBC_LAB_VERITY_CACHE")
    if override:
        return Path(override)
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(home) if home else Path.home() / ".cache") / "ebc-lab" / "verity"
    except RuntimeError as error:
        raise NativeUnavailable(f"there is no home folder ({error}): set EBC_LAB_VERITY_CACHE") from error


def build(march: str = "native", rebuild: bool = False) -> Path:
    """Return the library for this `-march`, built if the cache does not hold it whole, or in any case.

    NativeUnavailable where it cannot be built or kept.
    """
    command = shlex.split(os.environ.get("CC", "")) or ["cc"]
    compiler = shutil.which(command[0])
    if compiler is None:
        reason = f"there is no compiler {command[0]!r}: install gcc or clang, or set CC to one"
        raise NativeUnavailable(reason)
    command = [compiler, *command[1:]]
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
    """Return what a compiler prints. After COMPILE_SECONDS it is ended, with all that it began."""
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
        printed = output.read().decode(errors="replace")
    if code != 0:
        last = " ".join(printed.split())[-300:] or "it printed nothing"
        raise NativeUnavailable(f"`{shlex.join(command)}` failed with code {code}: {last}")
    return printed


def _checksum_of(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _is_whole(path: Path) -> bool:
    """Say whether all of the library is there: to load a truncated one could end the process."""
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
            kernels = _opened(path)
        except NativeUnavailable:
            kernels = _opened(build(march, rebuild=True))
        _kernels.update(kernels)


def _opened(path: Path) -> dict[str, Any]:
    """Load a library and check it; its functions by name."""
    kept_subnormals = _keeps_subnormals()
    try:
        library = ctypes.CDLL(str(path))
        functions = {name: getattr(library, f"verity_{name}") for name in _SIGNATURES}
        team = library.verity_team
    except (OSError, AttributeError) as error:
        raise NativeUnavailable(f"the library that was built does not load ({error})") from error
    finally:
        if kept_subnormals and not _keeps_subnormals():  # compilers add that to libraries of -ffast-math
            torch.set_flush_denormal(False)
    for name, function in functions.items():
        function.argtypes = _SIGNATURES[name]
        function.restype = ctypes.c_int
    team.argtypes = (_P,)
    team.restype = None
    team(openmp_team())
    if not _computes_rightly(functions["known"]):
        raise NativeUnavailable(f"the library that was built gives wrong values ({path})")
    return functions


def _keeps_subnormals() -> bool:
    return sys.float_info.min * 0.5 > 0


def openmp_team() -> int | None:
    """Return the address of the function by which torch's OpenMP runs work on its threads, if it has one."""
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    return None if parallel is None else ctypes.cast(parallel, _P).value


def _computes_rightly(known: Any) -> bool:
    """Say whether all is as torch has it: contraction, another order or reciprocals would change a value."""
    halves = torch.arange(-9, 0).double() * 0.5
    x = torch.cat([halves, torch.arange(-191, 0).double() * 0.37])
    out = torch.zeros(6, len(x), dtype=torch.float64)
    code = known(x.data_ptr(), len(x), out.data_ptr())
    by_sum = divided(x, tree_sum(x))
    expected = torch.stack([exp64(x), log64(-x), by_sum, sqrt64(-x), x * x + x, x.round()])
    return code == _DONE and torch.equal(out, expected)


def _call(name: str, *arguments: Any) -> None:
    """Call a kernel with numbers, None, and tensors, whose addresses it takes."""
    if not _kernels:
        load()
    plain = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    outcome = _kernels[name](*plain, torch.get_num_threads())
    if outcome == _NO_MEMORY:
        raise MemoryError(f"verity has no memory for a row in {name}")
    if outcome == _OUT_OF_RANGE:
        raise IndexError(f"{name}: an index is negative or too large")


def _in(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor, contiguous. TypeError for another dtype."""
    if x.dtype is not dtype:
        raise TypeError(f"a tensor of {dtype} is needed here, not one of {x.dtype}")
    return x if x.is_contiguous() else x.contiguous()


def _out(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x, which is to be changed in place. ValueError unless it is contiguous and of this dtype."""
    if x.dtype is not dtype or not x.is_contiguous():
        raise ValueError(f"a contiguous tensor of {dtype} is needed here")
    return x


# -- the functions of `eager` --------------------------------------------------------------------------------

_f32, _f64, _i64 = torch.float32, torch.float64, torch.int64


def _any_float(x: Tensor) -> tuple[Tensor, int]:
    """Return the tensor, contiguous, and whether it is float64."""
    wide = x.dtype is _f64
    return _in(x, _f64 if wide else _f32), int(wide)


def max_exponent(x: Tensor) -> int:
    x, wide = _any_float(x)
    e = ctypes.c_int64()
    _call("max_exponent", x, x.numel(), wide, ctypes.addressof(e))
    return e.value


def row_exponents(x: Tensor) -> Tensor:
    x = _in(x, _f32)
    e = torch.empty(len(x), dtype=_i64)
    _call("row_exponents", x, *x.shape, e)
    return e


def quantize_rows(x: Tensor, e: Tensor, bits: int) -> Tensor:
    q = torch.empty(x.shape, dtype=_f64)
    _call("quantize_rows", _in(x, _f32), *x.shape, _in(e, _i64), bits, q)
    return q


def scaled_rows(P: Tensor, e: Tensor, s: int, bias: Tensor | None) -> Tensor:
    y = torch.empty(P.shape, dtype=_f32)
    bias = None if bias is None else _in(bias, _f32)
    _call("scaled_rows", _in(P, _f64), *P.shape, _in(e, _i64), s, bias, y)
    return y


def add_integers(S: Tensor, P: Tensor) -> None:
    P = _in(P, _f64)
    _call("add_integers", _out(S, _i64), P, S.numel())


def sum_rows(terms: Tensor, shift: int, out: Tensor) -> None:
    terms, wide = _any_float(terms)
    _call("sum_rows", terms, *terms.shape, wide, shift, _out(out, _i64))


def sum_rows_by_id(terms: Tensor, ids: Tensor, shift: int, out: Tensor) -> None:
    terms, ids = _in(terms, _f32), _in(ids, _i64)
    _call("sum_rows_by_id", terms, *terms.shape, ids, len(out), shift, _out(out, _i64))


def layer_norm(
    x: Tensor, w: Tensor, bias: Tensor | None, eps: float, centred: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    if not centred:
        return eager.layer_norm(x, w, bias, eps, centred)
    y = torch.empty(x.shape, dtype=_f32)
    mean, rstd = torch.empty(2, len(x), dtype=_f64)
    bias = None if bias is None else _in(bias, _f32)
    _call("layer_norm", _in(x, _f32), *x.shape, _in(w, _f32), bias, eps, y, mean, rstd)
    return y, mean, rstd


def layer_norm_backward(
    dy: Tensor, x: Tensor, w: Tensor, mean: Tensor, rstd: Tensor, centred: bool = True
) -> tuple[Tensor, Tensor]:
    if not centred:
        return eager.layer_norm_backward(dy, x, w, mean, rstd, centred)
    dx = torch.empty(x.shape, dtype=_f32)
    terms = torch.empty(x.shape, dtype=_f64)
    rows = _in(dy, _f32), _in(x, _f32), *x.shape
    _call("layer_norm_backward", *rows, _in(w, _f32), _in(mean, _f64), _in(rstd, _f64), dx, terms)
    return dx, terms


def gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=_f32)
    slope = torch.empty(x.shape, dtype=_f32)
    _call("gelu", _in(x, _f32), x.numel(), y, slope)
    return y, slope


silu, rotated = eager.silu, eager.rotated


def heads(x: Tensor, B: int, n: int, H: int, bits: int) -> tuple[Tensor, Tensor]:
    N, width = x.shape
    T, D = N // B, width // (n * H)
    q = torch.empty(n, B * H, T, D, dtype=_f64)
    e = torch.empty(n, B * H, dtype=_i64)
    _call("heads", _in(x, _f32), B, T, n, H, D, bits, q, e)
    return q, e


def merged(P: Sequence[Tensor], s: Tensor, B: int, H: int) -> Tensor:
    P = [_in(part, _f64) for part in P]
    n = len(P)
    _, T, D = P[0].shape
    y = torch.empty(B * T, n * H * D, dtype=_f32)
    parts = (ctypes.c_void_p * n)(*[part.data_ptr() for part in P])
    _call("merged", ctypes.addressof(parts), _in(s, _i64), B, T, n, H, D, y)
    return y


def causal_softmax(Z: Tensor, s: Tensor, alpha: float, bits: int) -> tuple[Tensor, Tensor]:
    p = torch.empty(Z.shape, dtype=_f32)
    q = torch.empty(Z.shape, dtype=_f64)
    _call("causal_softmax", _in(Z, _f64), _in(s, _i64), *Z.shape[:2], alpha, bits, p, q)
    return p, q


def causal_softmax_backward(
    dP: Tensor, s: Tensor, p: Tensor, alpha: float, bits: int
) -> tuple[Tensor, Tensor]:
    q = torch.empty(dP.shape, dtype=_f64)
    e = torch.empty(len(dP), dtype=_i64)
    scores = _in(dP, _f64), _in(s, _i64), *dP.shape[:2]
    _call("causal_softmax_backward", *scores, _in(p, _f32), alpha, bits, q, e)
    return q, e


def softmax(x: Tensor) -> Tensor:
    V = x.shape[-1]
    p = torch.empty(x.shape, dtype=_f32)
    _call("softmax", _in(x, _f32), x.numel() // max(V, 1), V, p)
    return p


def cross_entropy(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    loss = torch.empty(len(z), dtype=_f64)
    dz = torch.empty(z.shape, dtype=_f32)
    _call("cross_entropy", _in(z, _f32), *z.shape, _in(y, _i64), loss, dz)
    return loss, dz


def adam(w: Tensor, g: Tensor, m: Tensor, v: Tensor, *settings: float) -> None:
    if not (w.is_contiguous() and m.is_contiguous() and v.is_contiguous()):
        return eager.adam(w, g, m, v, *settings)
    _call("adam", _out(w, _f32), _in(g, _f32), _out(m, _f32), _out(v, _f32), w.numel(), *settings)
    increment_version((w, m, v))

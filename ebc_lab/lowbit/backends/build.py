"""Libraries compiled from C and C++ at their first use, and where they are kept (docs/lowbit.md).

* A library's name holds the sha256 of all that made it, the CPU's features included: a home folder shared
  with another CPU, an edited source or a new compiler never meet a library of before. Beside it lies its own
  sha256, so that a damaged one is built again. It is built under another name and renamed.
* Whatever goes wrong (no compiler, a failing or hanging one, a folder that cannot be written, a library that
  does not load or counts wrongly) is a `BackendUnavailableError` with the reason; nothing else is affected.
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
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .formulas import Scale

FLAGS = (
    *("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-shared", "-fPIC"),
)
COMPILE_SECONDS = 60.0  # that a compiler may take
_HERE = Path(__file__).parent
SCALE_CODES: dict[Scale, int] = {"absmean": 0, "absmax": 1}  # as in the kernels


class BackendUnavailableError(ValueError):
    """A backend cannot be used here; the message says why and what to do."""


@dataclass(frozen=True)
class _Language:
    source: str
    variable: str  # of the environment, that names a compiler
    compiler: str  # without it
    flags: tuple[str, ...]


_LANGUAGES = {
    "c": _Language("kernels.c", "CC", "cc", ("-std=c11",)),
    "cpp": _Language("kernels.cpp", "CXX", "c++", ("-std=c++17", "-pthread")),
}
_HEADERS = ("operations.h", "blocks.h", "kmeans.h")

# What each function takes; all but ebc_decode return an int64. Addresses travel as plain integers.
_P, _L, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "ebc_quantize": (_P, _L, _L, _L, _I, _I, _P, _P, _P, _I),
    "ebc_decode": (_P, _L, _L, _L, _P, _P, _I),
    "ebc_stochastic": (_P, _L, _I, ctypes.c_float, ctypes.c_uint32, _P, _I),
    "ebc_pack": (_P, _L, _I, _P, _I),
    "ebc_unpack": (_P, _L, _I, _P, _I),
    "ebc_unpack_values": (_P, _L, _L, _L, _I, _P, _P, _I),
    "ebc_kmeans": (_P, _L, _L, _P, _L, _L, _P, _I),
}


def cache_folder() -> Path:
    """Return the folder of compiled libraries: $EBC_LAB_LOWBIT_CACHE, else one in the user's cache."""
    override = os.environ.get("EBC_LAB_LOWBIT_CACHE")
    if override:
        return Path(override)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "ebc-lab" / "lowbit"


_loaded: dict[tuple[object, ...], ctypes.CDLL | BackendUnavailableError] = {}
_one_at_a_time = threading.Lock()


def library(name: str) -> ctypes.CDLL:
    """Return the library "c" or "cpp", built if the cache does not hold it; the outcome is remembered.

    BackendUnavailableError where there is none, with the reason.
    """
    variables = (_LANGUAGES[name].variable, "PATH", "EBC_LAB_LOWBIT_CACHE", "XDG_CACHE_HOME", "HOME")
    setting = (name, FLAGS, *(os.environ.get(variable) for variable in variables))
    with _one_at_a_time:
        if setting not in _loaded:
            try:
                _loaded[setting] = _built_or_cached(name)
            except BackendUnavailableError as error:
                _loaded[setting] = error
    outcome = _loaded[setting]
    if isinstance(outcome, BackendUnavailableError):
        raise BackendUnavailableError(*outcome.args)
    return outcome


def _unavailable(name: str, reason: str) -> BackendUnavailableError:
    return BackendUnavailableError(f"the backend {name} is not available: {reason}")


def _built_or_cached(name: str) -> ctypes.CDLL:
    command = _compiler(name)
    try:
        folder = cache_folder()
    except RuntimeError as error:  # no home
        raise _unavailable(name, f"{error}; set EBC_LAB_LOWBIT_CACHE to a folder") from error
    path = folder / f"lowbit-{name}-{_fingerprint(name, command)}.so"
    if _is_whole(path):
        with contextlib.suppress(BackendUnavailableError):
            return _load(name, path)
    _build(name, command, path)
    return _load(name, path)


def _compiler(name: str) -> list[str]:
    language = _LANGUAGES[name]
    command = shlex.split(os.environ.get(language.variable, "")) or [language.compiler]
    compiler = shutil.which(command[0])
    if compiler is None:
        advice = f"install one (gcc or clang) or set {language.variable} to one"
        raise _unavailable(name, f"there is no compiler {command[0]!r}; {advice}")
    return [compiler, *command[1:]]


def _flags(name: str) -> tuple[str, ...]:
    return (*FLAGS, *_LANGUAGES[name].flags)


def _fingerprint(name: str, command: list[str]) -> str:
    """Return the sha256 of sources, flags, compiler and CPU features."""
    digest = hashlib.sha256()
    for source in (_LANGUAGES[name].source, *_HEADERS):
        digest.update((_HERE / source).read_bytes())
    with tempfile.TemporaryDirectory() as scratch:
        version = _run(name, [*command, "--version"], Path(scratch))
    for text in (*_flags(name), *command, version, _cpu_features()):
        digest.update(b"\0" + text.encode())
    return digest.hexdigest()


def _cpu_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.partition(":")[0].strip().lower() in ("flags", "features"):
            return line
    return f"{platform.machine()} {platform.processor()}"


def _run(name: str, command: list[str], scratch: Path) -> str:
    """Return what a compiler prints. After COMPILE_SECONDS it is ended, with all that it began."""
    with (scratch / "output").open("w+b") as output:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        except OSError as error:
            raise _unavailable(name, f"{command[0]} cannot be run: {error}") from error
        try:
            code = process.wait(COMPILE_SECONDS)
        except BaseException as error:  # Ctrl-C too: the compiler's own session does not hear it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            reason = f"{command[0]} did not end within {COMPILE_SECONDS:g} s and was stopped"
            raise _unavailable(name, f"{reason}; set another compiler") from error
        output.seek(0)
        printed = output.read().decode(errors="replace")
    if code != 0:
        last = " ".join(printed.split())[-400:] or "it printed nothing"
        reason = f"`{shlex.join(command)}` failed with code {code}: {last}"
        advice = f"set {_LANGUAGES[name].variable} to a working compiler"
        raise _unavailable(name, f"{reason}; {advice}")
    return printed


def _build(name: str, command: list[str], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=".build-", dir=path.parent, ignore_cleanup_errors=True
        ) as scratch:
            built = Path(scratch) / "library.so"
            source = str(_HERE / _LANGUAGES[name].source)
            _run(name, [*command, *_flags(name), source, "-o", str(built), "-lm"], Path(scratch))
            content = built.read_bytes()
            check = Path(scratch) / "checksum"
            check.write_text(hashlib.sha256(content).hexdigest())
            os.replace(built, path)
            os.replace(check, _checksum_of(path))
    except OSError as error:
        advice = "set EBC_LAB_LOWBIT_CACHE to a folder that can be written"
        raise _unavailable(name, f"{path.parent} cannot hold its library ({error}); {advice}") from error


def _checksum_of(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _is_whole(path: Path) -> bool:
    """Say whether the library is there, all of it: to load a truncated one could end the process."""
    try:
        expected = _checksum_of(path).read_text(encoding="utf-8", errors="replace")
        return hashlib.sha256(path.read_bytes()).hexdigest() == expected
    except OSError:
        return False


def _load(name: str, path: Path) -> ctypes.CDLL:
    try:
        loaded = ctypes.CDLL(str(path))
        for function, arguments in _SIGNATURES.items():
            entry = getattr(loaded, function)
            entry.argtypes = arguments
            entry.restype = None if function == "ebc_decode" else _L
    except (OSError, AttributeError) as error:
        reason = f"its library does not load ({error}); set {_LANGUAGES[name].variable} to another compiler"
        raise _unavailable(name, reason) from error
    if not _counts_rightly(loaded):
        advice = f"set {_LANGUAGES[name].variable} to another compiler than that of {path}"
        raise _unavailable(name, f"its library gives wrong codes; {advice}")
    return loaded


def _counts_rightly(loaded: ctypes.CDLL) -> bool:
    """Try values of mean 1 whose codes, with ties, are known: above 0.5 it is 1, from 1.5 on 2."""
    values = np.array([0.5, -0.5, 1.5, -1.5, 1.4999999, 0.5000001, -0.0, 2.0, 2.0, -0.0], dtype=np.float32)
    expected = np.array([0, 0, 2, -2, 1, 1, 0, 2, 2, 0], dtype=np.int8)
    step = np.zeros(1, dtype=np.float32)
    codes = np.empty_like(expected)
    data = np.empty(7, dtype=np.uint8)
    back = np.empty_like(expected)
    n = len(values)
    x, size, q, packed_at, again = (array.ctypes.data for array in (values, step, codes, data, back))
    made = loaded.ebc_quantize(x, 1, n, n, 2, SCALE_CODES["absmean"], size, q, None, 1)
    packed = loaded.ebc_pack(q, n, 2, packed_at, 1)
    unpacked = loaded.ebc_unpack(packed_at, n, 2, again, 1)
    right = np.array_equal(codes, expected) and np.array_equal(back, expected)
    return bool((made, packed, unpacked) == (0, -1, -1) and step[0] == np.float32(1.0) and right)

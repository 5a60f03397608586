"""The emulated device's library, compiled when it is first used, for the torch that is installed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

SOURCE = Path(__file__).with_name("device.cpp")
BUILD = Path(__file__).parents[3] / "build"


class NoCompiler(ImportError):
    """Why the device cannot be built here, in a sentence."""


def built() -> Path:
    """Return the compiled device, compiling it if need be (half a minute). Raises NoCompiler."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if sys.platform != "linux" or compiler is None:
        raise NoCompiler("the emulated CUDA device needs Linux and a C++ compiler: g++, clang++ or $CXX")
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise NoCompiler("the emulated CUDA device needs torch")
    torch = Path(spec.origin).parent
    if (torch / "lib" / "libtorch_cuda.so").exists():
        raise NoCompiler("the emulated CUDA device needs torch's CPU build: this one can have a real one")
    version = importlib.metadata.version("torch")
    name = hashlib.sha256(SOURCE.read_bytes() + version.encode()).hexdigest()[:16]
    library = BUILD / f"emulated-cuda-{name}.so"
    BUILD.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILD / "emulated-cuda.lock"):  # of all processes that run tests one compiles
        if not library.exists():
            _compile(compiler, torch, library)
    return library


def _compile(compiler: str, torch: Path, library: Path) -> None:
    part = library.with_suffix(".part")
    includes = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-w"]
    command = [compiler, *flags, *includes, str(SOURCE), "-o", str(part), *libraries]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoCompiler(f"the emulated CUDA device does not compile here:\n{done.stderr[-2000:]}")
    part.replace(library)

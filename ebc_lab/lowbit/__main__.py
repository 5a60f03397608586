"""`python -m ebc_lab.lowbit check|bench|pack|unpack|inspect`: the library on its own.

An error is one sentence on stderr and exit code 2; a file appears whole or not at all.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .backends.formulas import SCALES, TOP
from .container import PackedTensor, inspect_packed, read_packed, write_packed, written_whole
from .levels import entropy_bits, quantize, zero_share

_ERRORS = (
    *(ValueError, TypeError, OSError, EOFError, ImportError, MemoryError),
    *(zipfile.BadZipFile, pickle.UnpicklingError),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except KeyboardInterrupt:
        return 130
    except _ERRORS as error:
        print(_sentence(error), file=sys.stderr)
        return 2


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ebc_lab.lowbit", description="Low-bit tensors.")
    commands = parser.add_subparsers(required=True, metavar="check|bench|pack|unpack|inspect")

    check = commands.add_parser("check", help="ten checks of this installation")
    check.set_defaults(command=_check)

    bench = commands.add_parser("bench", help="time every backend beside numpy, torch and scikit-learn")
    bench.add_argument("--sizes", type=int, nargs="+", metavar="N", help="values of an array (1e6)")
    bench.add_argument("--iterations", type=int, metavar="N", help="times each candidate is timed")
    bench.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)  # of 1.0
    bench.add_argument("--full", action="store_true", help="1e6 and 1e7 values, torch.compile: minutes")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    bench.set_defaults(command=_bench)

    pack = commands.add_parser("pack", help="quantize and pack the arrays of a file")
    pack.add_argument("source", type=Path, metavar="IN", help=".npz, .npy, or .pt with a state dict")
    pack.add_argument("target", type=Path, metavar="OUT.ebcpack")
    pack.add_argument("--levels", choices=TOP, required=True)
    pack.add_argument("--group", type=_group, default="tensor", metavar="tensor|row|COUNT")
    pack.add_argument("--scale", choices=SCALES, default="absmean")
    pack.add_argument("--only", choices=("2-D", "all"), default="2-D", help="the rest stays float32")
    pack.set_defaults(command=_pack)

    unpack = commands.add_parser("unpack", help="the values of a packed file, as float32")
    unpack.add_argument("source", type=Path, metavar="IN.ebcpack")
    unpack.add_argument("target", type=Path, metavar="OUT.npz")
    unpack.set_defaults(command=_unpack)

    inspect = commands.add_parser("inspect", help="what a packed file holds")
    inspect.add_argument("source", type=Path, metavar="FILE")
    inspect.add_argument("--json", action="store_true")
    inspect.set_defaults(command=_inspect)
    return parser


def _group(text: str) -> str | int:
    return int(text) if text.lstrip("-").isdigit() else text


# -- commands ------------------------------------------------------------------------------------------------


def _check(options: argparse.Namespace) -> int:
    from .checks import CHECKS, run_checks

    passed = 0
    for outcome in run_checks():
        print(outcome, flush=True)
        passed += outcome.passed
    print(f"{passed}/{len(CHECKS)} passed")
    return 0 if passed == len(CHECKS) else 1


def _bench(options: argparse.Namespace) -> int:
    if options.quick:
        raise ValueError("--quick is no option any more: type --sizes 100000 --iterations 3")
    from .benchmark import load

    settings = {"sizes": options.sizes, "iterations": options.iterations}
    benchmark_of = load().PerformanceBenchmark
    config = benchmark_of.FULL if options.full else {}
    benchmark = benchmark_of(config | {name: value for name, value in settings.items() if value is not None})
    if options.json is not None:
        _refuse_unwritable(options.json)  # before minutes of work
    report = benchmark.run_all_benchmarks()
    print(report)
    if options.json is not None:
        with written_whole(options.json.resolve()) as file:
            file.write(report.to_json().encode() + b"\n")
    return 0


def _pack(options: argparse.Namespace) -> int:
    tensors: dict[str, Any] = {}
    for name, array in _arrays(options.source).items():
        if options.only == "all" or array.ndim == 2:
            try:
                codes = quantize(array, options.levels, group=options.group, scale=options.scale)
            except ValueError as error:
                raise ValueError(f"{options.source}: {name!r} cannot be quantized: {error}") from None
            tensors[name] = PackedTensor.of(codes)
        else:
            tensors[name] = array
    if not any(isinstance(tensor, PackedTensor) for tensor in tensors.values()):
        raise ValueError(
            f"{options.source} has no matrix to pack: with --only all, other arrays are packed too."
        )
    write_packed(options.target, tensors)
    content = inspect_packed(options.target)
    saved = f"{content['float32_bytes']} bytes as float32, {content['file_bytes']} now"
    print(
        f"{options.target}: {len(tensors)} tensors, {saved}, {content['compression']:.2f} times less packed"
    )
    return 0


def _unpack(options: argparse.Namespace) -> int:
    if options.target.suffix != ".npz":
        raise ValueError(f"{options.target} is no .npz: name the file to write so.")
    tensors = read_packed(options.source)
    _refuse_unwritable(options.target)
    # numpy.savez takes names as keywords, and so not every name
    with written_whole(options.target.resolve()) as file, zipfile.ZipFile(file, "w") as archive:
        for name, tensor in tensors.items():
            values = tensor.values() if isinstance(tensor, PackedTensor) else tensor
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(values), allow_pickle=False)
    print(f"{options.target}: {len(tensors)} arrays of float32")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    content = inspect_packed(options.source)
    tensors = read_packed(options.source)
    for entry in content["tensors"]:
        tensor = tensors[entry["name"]]
        if isinstance(tensor, PackedTensor):
            codes = tensor.quantized().codes
            entry["entropy_bits"] = entropy_bits(codes)
            entry["zero_share"] = zero_share(codes)
    print(json.dumps(content, indent=2) if options.json else _inspection(content))
    return 0


def _inspection(content: dict[str, Any]) -> str:
    """Draw a table of the tensors, and the totals."""
    rows = [("tensor", "kind", "group", "shape", "bytes", "bits", "entropy", "zeros")]
    for entry in content["tensors"]:
        packed = entry["kind"] == "packed"
        rows.append(
            (
                entry["name"],
                entry["levels"] if packed else entry["kind"],
                str(entry["group"]) if packed else "",
                " x ".join(map(str, entry["shape"])) or "scalar",
                str(entry["bytes"]),
                f"{entry['bits_per_value']:.3f}",
                f"{entry['entropy_bits']:.3f}" if packed else "",
                f"{entry['zero_share']:.1%}" if packed else "",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.append(
        f"{content['values']} values in {content['bytes']} bytes, {content['compression']:.2f} times less "
        f"than float32; {content['file_bytes']} bytes with header and checksum, which is right"
    )
    return "\n".join(lines)


# -- files ---------------------------------------------------------------------------------------------------


def _arrays(path: Path) -> dict[str, Any]:
    """Read the arrays of a file by name; none of its content is executed."""
    if path.suffix not in (".npz", ".npy", ".pt", ".pth"):
        raise ValueError(f"{path} is none of .npz, .npy and .pt: save the arrays as one of them.")
    try:
        content = _state_dict(path) if path.suffix in (".pt", ".pth") else np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            content = {path.stem: content}
        arrays = {name: content[name] for name in content}
    except FileNotFoundError:
        raise
    except Exception as error:  # numpy, zipfile and torch each have their own for a damaged file
        raise ValueError(f"{path} cannot be read as arrays: {_sentence(error)}") from None
    if not arrays:
        raise ValueError(f"{path} holds no arrays.")
    return arrays


def _state_dict(path: Path) -> dict[str, Any]:
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError("it is no state dict of tensors")
    return {str(name): value for name, value in state.items()}


def _refuse_unwritable(path: Path) -> None:
    folder = path.resolve().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{path} cannot be written: name a file in a folder that exists and can be.")


if __name__ == "__main__":
    sys.exit(main())

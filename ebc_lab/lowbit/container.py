"""Packed tensors in memory and in a file with a checksum (docs/lowbit.md).

The file, all integers little-endian: the eight bytes EBCPACK1, the header's length as uint64, the header, the
payload, the sha256 of all before it. The header is canonical JSON (sorted keys, no spaces, ASCII) with the
version, the payload's length and, for each tensor, its name, kind, levels, group and shape, and where in the
payload its parts lie: a packed tensor's codes and steps, or the float32 values of any other. Nothing in it is
ever executed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from .backends import get_backend
from .backends.formulas import Floats, Group, as_float32, check_group, check_levels, steps_shape
from .backends.planes import refuse_packed
from .levels import Quantized
from .packing import pack, packed_size

if TYPE_CHECKING:
    from torch import Tensor

MAGIC = b"EBCPACK1"
VERSION = 1
_ALIGNMENT = 4  # bytes: a float32 lies at a multiple of its size
_CHUNK = 1 << 20
_FRAME = len(MAGIC) + 8 + 32  # magic, header length, checksum


class DamagedFileError(ValueError):
    """A file that should hold packed tensors does not; the message names the file and what is wrong."""


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """Packed codes of a tensor and its steps.

    `data` is flat uint8 of `packed_size` bytes, `steps` float32 as in `Quantized`. ValueError where lengths,
    shapes and names do not fit together.
    """

    data: NDArray[np.uint8]
    steps: Floats
    shape: tuple[int, ...]
    levels: str
    group: Group

    def __post_init__(self) -> None:
        check_levels(self.levels)
        check_group(self.group, self.shape)
        size = packed_size(math.prod(self.shape), self.levels)
        if self.data.dtype != np.uint8 or self.data.shape != (size,):
            raise ValueError(
                f"{self.levels} codes of shape {self.shape} take {size} bytes of uint8, "
                f"not {self.data.dtype} of shape {self.data.shape}"
            )
        expected = steps_shape(self.shape, self.group)
        if self.steps.dtype != np.float32 or self.steps.shape != expected:
            raise ValueError(
                f"a tensor of shape {self.shape} in groups of {self.group} has float32 steps of shape "
                f"{expected}, not {self.steps.dtype} of shape {self.steps.shape}"
            )

    @classmethod
    def of(cls, quantized: Quantized, *, backend: str = "numpy") -> PackedTensor:
        """Return the packed form of codes and steps; ValueError where the codes are none of these levels."""
        data = pack(quantized.codes, quantized.levels, backend=backend)
        return cls(data, quantized.steps, quantized.shape, quantized.levels, quantized.group)

    @property
    def nbytes(self) -> int:
        """Count the bytes of the codes and the steps."""
        return self.data.nbytes + self.steps.nbytes

    @property
    def bits_per_value(self) -> float:
        """Return the bits per value, steps counted; 0 for a tensor without values."""
        values = math.prod(self.shape)
        return 8 * self.nbytes / values if values else 0.0

    def quantized(self, *, backend: str = "numpy") -> Quantized:
        """Return the codes and steps; ValueError where the bytes are no codes."""
        codes = get_backend(backend).unpack(self.data, math.prod(self.shape), self.levels)
        return Quantized(np.asarray(codes).reshape(self.shape), self.steps, self.levels, self.group)

    def values(self, *, backend: str = "numpy") -> Floats:
        """Return the float32 values step * code, of the tensor's shape."""
        parts = self.data, self.shape, self.steps, self.levels, self.group
        return cast(Floats, np.asarray(get_backend(backend).unpack_values(*parts)))


Packable: TypeAlias = "PackedTensor | NDArray[Any] | Tensor"
Entry: TypeAlias = dict[str, Any]


# -- writing -------------------------------------------------------------------------------------------------


def write_packed(path: str | os.PathLike[str], tensors: Mapping[str, Packable]) -> None:
    """Write packed tensors, and all else as float32, to one file.

    The file appears whole or not at all: it is written under a temporary name beside it, synced and renamed.
    A write that fails leaves nothing behind, and a file that was there before as it was. Integers that
    float32 cannot hold are refused.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise ValueError(f"{path} is {_sort(os.stat(target).st_mode)}: packed tensors need a file")
    entries, arrays, payload = _laid_out(tensors)
    header = _canonical({"version": VERSION, "payload": payload, "tensors": entries})
    with written_whole(target) as file:
        digest = hashlib.sha256()
        for piece in _pieces(header, arrays):
            digest.update(piece)
            file.write(piece)
        file.write(digest.digest())


def _laid_out(tensors: Mapping[str, Packable]) -> tuple[list[Entry], list[NDArray[Any]], int]:
    """Return the header's entries, the arrays in the payload's order, and the payload's length."""
    entries = []
    arrays: list[NDArray[Any]] = []
    end = 0
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"tensors are named by text, not by {name!r}")
        if isinstance(tensor, PackedTensor):
            parts: list[NDArray[Any]] = [tensor.data, tensor.steps.astype("<f4", copy=False)]
            entry: Entry = {"kind": "packed", "levels": tensor.levels, "group": tensor.group}
            entry["shape"] = list(tensor.shape)
        elif isinstance(tensor, Quantized):
            raise ValueError(
                f"the tensor {name!r} cannot be written as quantize returns it: pack it with PackedTensor.of"
            )
        else:
            values = _exact_float32(name, tensor)
            parts = [values.astype("<f4", copy=False)]
            entry = {"kind": "float32", "levels": None, "group": None, "shape": list(values.shape)}
        offsets = []
        for array in parts:
            offsets.append(end)
            end = _aligned(end + array.nbytes)
        sizes = [array.nbytes for array in parts]
        entries.append({"name": name, **entry, "offsets": offsets, "bytes": sizes})
        arrays += parts
    return entries, arrays, end


def _exact_float32(name: str, tensor: Any) -> Floats:
    try:
        values = as_float32(tensor)
    except ValueError as error:
        raise ValueError(f"the tensor {name!r} cannot be written: {error}") from error
    dtype = tensor.dtype if hasattr(tensor, "dtype") else np.asarray(tensor).dtype
    if "int" in str(dtype) and np.abs(values).max(initial=0) >= 2**24:
        integers = np.asarray(tensor.cpu() if hasattr(tensor, "cpu") else tensor)
        if not np.array_equal(values.astype(np.float64), integers):
            raise ValueError(f"the tensor {name!r} holds integers that float32 cannot hold")
    return values


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _pieces(header: bytes, arrays: list[NDArray[Any]]) -> Iterator[bytes | memoryview]:
    """Yield all bytes of the file before the checksum."""
    yield MAGIC + struct.pack("<Q", len(header)) + header
    for array in arrays:
        if array.nbytes:
            yield memoryview(cast(Any, np.ascontiguousarray(array).reshape(-1))).cast("B")
        yield bytes(_aligned(array.nbytes) - array.nbytes)


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


@contextmanager
def written_whole(target: Path) -> Iterator[BinaryIO]:
    """Open a file to write that takes the target's name only when all of it is on the disk."""
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# -- reading -------------------------------------------------------------------------------------------------


def read_packed(path: str | os.PathLike[str]) -> dict[str, PackedTensor | Floats]:
    """Read the tensors of a file that `write_packed` wrote: packed ones packed, all others float32 arrays.

    The arrays are views of one buffer that holds the payload. DamagedFileError, naming the file and what is
    wrong, for anything but a whole and consistent file.
    """
    entries, payload, _ = _read(path, keep=True)
    tensors: dict[str, PackedTensor | Floats] = {}
    for entry in entries:
        with damage_of(path, f"the tensor {entry['name']!r} is not what the header says"):
            tensors[entry["name"]] = _tensor_of(entry, payload)
    return tensors


def inspect_packed(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Tell what a file holds, its checksum verified, without keeping the payload in memory.

    `tensors` lists name, kind, levels, group, shape, values, bytes and bits_per_value of each; `values`,
    `bytes`, `float32_bytes` and `compression` (float32_bytes / bytes) are totals without header and checksum,
    `file_bytes` is the file's length. DamagedFileError as in `read_packed`, short of looking at the codes.
    """
    entries, _, checksum = _read(path, keep=False)
    tensors = []
    for entry in entries:
        values = math.prod(entry["shape"])
        size = sum(entry["bytes"])
        named = {key: entry[key] for key in ("name", "kind", "levels", "group", "shape")}
        bits = 8 * size / values if values else 0.0
        tensors.append({**named, "values": values, "bytes": size, "bits_per_value": bits})
    total = sum(tensor["values"] for tensor in tensors)
    size = sum(tensor["bytes"] for tensor in tensors)
    return {
        "path": str(path),
        "version": VERSION,
        "sha256": checksum,
        "tensors": tensors,
        "values": total,
        "bytes": size,
        "float32_bytes": 4 * total,
        "compression": 4 * total / size if size else 1.0,
        "file_bytes": os.stat(path).st_size,
    }


def _tensor_of(entry: Entry, payload: NDArray[np.uint8]) -> PackedTensor | Floats:
    shape = tuple(entry["shape"])
    parts = []
    for offset, size in zip(entry["offsets"], entry["bytes"], strict=True):
        parts.append(payload[offset : offset + size])
    if entry["kind"] == "float32":
        return parts[0].view("<f4").astype(np.float32, copy=False).reshape(shape)
    steps = parts[1].view("<f4").astype(np.float32, copy=False)
    steps = steps.reshape(steps_shape(shape, entry["group"]))
    packed = PackedTensor(parts[0], steps, shape, entry["levels"], entry["group"])
    refuse_packed(packed.data, math.prod(shape), packed.levels)
    return packed


@contextmanager
def damage_of(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Call whatever a file's content makes Python or torch raise damage of the file."""
    try:
        yield
    except DamagedFileError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())[:300]
        raise DamagedFileError(f"{path} is damaged: {what} ({why})") from error


def _read(path: str | os.PathLike[str], keep: bool) -> tuple[list[Entry], NDArray[np.uint8], str]:
    """Return (checked entries, payload or nothing, checksum) of a file."""
    mode = os.stat(path).st_mode  # before opening: to open a pipe would wait for its writer
    if not stat.S_ISREG(mode):
        raise DamagedFileError(f"{path} is {_sort(mode)}, not a file with packed tensors")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(len(MAGIC) + 8)
        if not start.startswith(MAGIC):
            cut = "truncated" if MAGIC.startswith(start[: len(MAGIC)]) else "foreign"
            raise DamagedFileError(f"{path} is {cut}: it does not begin with {MAGIC.decode()}")
        if size < _FRAME:
            raise DamagedFileError(f"{path} is truncated: {size} bytes, and {_FRAME} are the least")
        length = struct.unpack("<Q", start[len(MAGIC) :])[0]
        if length > size - _FRAME:
            raise DamagedFileError(
                f"{path} is truncated or damaged: a header of {length} bytes in a file of {size}"
            )
        header = file.read(length)
        digest = hashlib.sha256(start + header)
        payload = _payload(file, size - _FRAME - length, digest, keep)
        if payload is None or file.read(33) != digest.digest():
            raise DamagedFileError(f"{path} is damaged: {_mismatch(header, size)}")
    with damage_of(path, "its header is malformed"):
        return _entries(path, header, size - _FRAME - length), payload, digest.hexdigest()


def _payload(file: BinaryIO, size: int, digest: Any, keep: bool) -> NDArray[np.uint8] | None:
    """Read the next bytes of the file, hashed as they come; None where there are fewer."""
    buffer = np.empty(size if keep else min(size, _CHUNK), np.uint8)
    memory = memoryview(cast(Any, buffer))
    done = 0
    while done < size:
        count = min(_CHUNK, size - done)
        piece = memory[done : done + count] if keep else memory[:count]
        if cast(Any, file).readinto(piece) != count:
            return None
        digest.update(piece)
        done += count
    return buffer


def _mismatch(header: bytes, size: int) -> str:
    """Return why the checksum differs, as far as the header tells."""
    try:
        expected = json.loads(header)["payload"] + len(header) + _FRAME
    except (LookupError, RecursionError, TypeError, ValueError):
        expected = size
    if size < expected:
        return f"truncated to {size} of {expected} bytes"
    return "its checksum is not that of its content"


def _entries(path: str | os.PathLike[str], header: bytes, payload: int) -> list[Entry]:
    """Return the header's entries, each checked by itself and against the others."""
    content = json.loads(header)
    if content["version"] != VERSION:
        raise DamagedFileError(
            f"{path} has the unknown version {content['version']!r}: this program reads version {VERSION}"
        )
    if _canonical(content) != header:
        raise ValueError("not canonical JSON")
    if set(content) != {"version", "payload", "tensors"} or content["payload"] != payload:
        raise ValueError(f"{content.get('payload')!r} bytes of payload announced, {payload} found")
    entries = cast(list[Entry], content["tensors"])
    names = set()
    places = []
    for entry in entries:
        _check_entry(entry)
        if entry["name"] in names:
            raise ValueError(f"two tensors are called {entry['name']!r}")
        names.add(entry["name"])
        for offset, size in zip(entry["offsets"], entry["bytes"], strict=True):
            places.append((offset, offset + size, entry["name"]))
    end = 0
    for start, stop, name in sorted(places):
        if start < end and stop > start:
            raise ValueError(f"the bytes of {name!r} overlap those of another tensor")
        if stop > payload:
            raise ValueError(f"the bytes of {name!r} lie outside the payload")
        end = max(end, stop)
    return entries


def _check_entry(entry: Entry) -> None:
    """Raise where an entry's fields are of wrong types or do not fit together."""
    if set(entry) != {"name", "kind", "levels", "group", "shape", "offsets", "bytes"}:
        raise ValueError(f"an entry has the fields {', '.join(sorted(entry))}")
    name, kind, shape = entry["name"], entry["kind"], entry["shape"]
    if not isinstance(name, str):
        raise ValueError(f"a tensor is called {name!r}")
    for field in ("shape", "offsets", "bytes"):
        for number in entry[field]:
            if type(number) is not int or not 0 <= number < 2**63:
                raise ValueError(f"{name!r} has {number!r} among its {field}")
    if kind == "packed":
        group = check_group(entry["group"], tuple(shape))
        steps = math.prod(steps_shape(tuple(shape), group))
        expected = [packed_size(math.prod(shape), entry["levels"]), 4 * steps]
    elif kind == "float32" and entry["levels"] is None and entry["group"] is None:
        expected = [4 * math.prod(shape)]
    else:
        raise ValueError(f"{name!r} is of the unknown kind {kind!r}")
    if entry["bytes"] != expected or len(entry["offsets"]) != len(expected):
        raise ValueError(f"{name!r} of shape {shape} takes {expected} bytes, not {entry['bytes']}")
    if any(offset % _ALIGNMENT for offset in entry["offsets"]):
        raise ValueError(f"{name!r} does not lie at multiples of {_ALIGNMENT} bytes")


def _sort(mode: int) -> str:
    """Return what a path names, in words."""
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a pipe" if stat.S_ISFIFO(mode) else "no regular file"

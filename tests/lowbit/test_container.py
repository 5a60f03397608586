"""Packed tensors, the packed layer, and a file of which no damage goes unnoticed."""

import hashlib
import json
import os
import resource
import signal
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from support.low_bit import assert_same_bits, gaussian
from torch import nn

from ebc_lab.lowbit.backends.formulas import TOP
from ebc_lab.lowbit.container import (
    DamagedFileError,
    PackedTensor,
    inspect_packed,
    read_packed,
    write_packed,
)
from ebc_lab.lowbit.levels import quantize
from ebc_lab.lowbit.linear import PackedLinear

levels = pytest.mark.parametrize("levels", TOP)


def packed(*shape: int, levels: str = "ternary", group: str | int = "tensor") -> PackedTensor:
    return PackedTensor.of(quantize(gaussian(*shape), levels, group=group))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A small file with a tensor of each kind."""
    path = tmp_path / "small.ebcpack"
    write_packed(path, {"w": packed(3, 5, group=2), "v": packed(30, levels="five"), "bias": gaussian(3)})
    return path


def rewritten(path: Path, change) -> Path:
    """The file with another header and a checksum that fits it."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[8:16])[0]
    header, payload = content[16 : 16 + length], content[16 + length : -32]
    new = change(json.loads(header))
    if not isinstance(new, bytes):
        new = json.dumps(new, sort_keys=True, separators=(",", ":")).encode()
    whole = content[:8] + struct.pack("<Q", len(new)) + new + payload
    path.write_bytes(whole + hashlib.sha256(whole).digest())
    return path


# -- in memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (3, 6)},
        {"levels": "four"},
        {"group": 0},
        {"steps": np.ones((3, 3), np.float64)},
        {"data": np.zeros(3, np.int8)},
        {"data": np.zeros((1, 3), np.uint8)},
    ],
)
def test_parts_that_do_not_belong_together_are_refused(change):
    tensor = packed(3, 5, group=2)
    fields = ("data", "steps", "shape", "levels", "group")
    given = {field: getattr(tensor, field) for field in fields}
    with pytest.raises(ValueError, match="not "):
        PackedTensor(**{**given, **change})


# -- the layer -----------------------------------------------------------------------------------------------


@levels
@pytest.mark.parametrize("group", ["tensor", "row", 7])
def test_a_packed_layer_computes_with_the_quantized_weight(levels, group):
    torch.manual_seed(0)
    linear = nn.Linear(30, 20)
    layer = PackedLinear.of(linear, levels, group, "absmean")
    inputs = torch.randn(4, 30, requires_grad=True)
    values = torch.from_numpy(quantize(linear.weight, levels, group=group).values())
    outputs = layer(inputs)
    assert torch.equal(outputs, nn.functional.linear(inputs, values, linear.bias))
    outputs.sum().backward()
    torch.testing.assert_close(inputs.grad, values.sum(0).expand(4, 30))
    assert layer.bias.grad is not None
    assert (layer.in_features, layer.out_features) == (30, 20)
    assert "levels=" + levels in repr(layer)


def test_a_packed_layer_is_small_and_carries_its_weight_through_a_state_dict(tmp_path):
    torch.manual_seed(0)
    linear = nn.Linear(256, 256, bias=False)
    layer = PackedLinear.of(linear)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    assert (tmp_path / "layer.pt").stat().st_size < 4 * 256 * 256 / 10
    assert sum(t.nbytes for t in layer.state_dict().values()) == 13108 + 4
    assert list(layer.parameters()) == []
    other = PackedLinear.of(nn.Linear(256, 256, bias=False))
    inputs = torch.randn(3, 256)
    assert not torch.equal(other(inputs), layer(inputs))
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert torch.equal(other(inputs), layer(inputs))


def test_another_dtype_does_not_round_the_steps():
    layer = PackedLinear.of(nn.Linear(16, 8), "five", "row")
    weight = layer.weight.clone()
    inputs = torch.randn(2, 16, dtype=torch.bfloat16)
    outputs = layer.bfloat16()(inputs)
    assert outputs.dtype == torch.bfloat16
    assert torch.equal(layer.weight, weight)
    assert torch.equal(outputs, nn.functional.linear(inputs, weight.bfloat16(), layer.bias))


def test_a_layer_needs_a_matrix_of_codes():
    with pytest.raises(ValueError, match="needs a matrix"):
        PackedLinear(packed(30))
    bad = packed(5, 5)
    bad.data[0] = 255
    with pytest.raises(ValueError, match="hold no ternary codes"):
        PackedLinear(bad)


# -- the file ------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back(tmp_path):
    tensors = {
        "a.weight": packed(33, 47, levels="five", group="row"),
        "b": packed(1, levels="ternary"),
        "ragged": packed(3, 10, group=4),
        "none": packed(0, 7),
        "scalar": PackedTensor.of(quantize(-2.0)),
        "bias": gaussian(5),
        "matrix": gaussian(2, 3).T,
        "half": torch.arange(4, dtype=torch.bfloat16).requires_grad_(),
        "wide": gaussian(3).astype(np.float64),
        "step": torch.tensor(12),
        "mask": torch.tensor([0.0, -torch.inf, torch.nan]),
        "ünï": np.zeros((0, 4), np.float32),
    }
    write_packed(tmp_path / "all", tensors)
    found = read_packed(str(tmp_path / "all"))
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        if isinstance(tensor, PackedTensor):
            assert_same_bits(found[name].data, tensor.data)
            back, quantized = found[name].quantized(backend="torch"), tensor.quantized()
            assert (back.levels, back.group) == (quantized.levels, quantized.group)
            assert_same_bits(back.codes, quantized.codes)
            assert_same_bits(back.steps, quantized.steps)
            tensor, found[name] = quantized.values(), found[name].values()
        assert_same_bits(found[name], torch.as_tensor(tensor).float())
    write_packed(tmp_path / "again", tensors)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "all").read_bytes()
    write_packed(tmp_path / "nothing", {})
    assert read_packed(tmp_path / "nothing") == {}


def test_no_file_and_no_folder_stays_open(tmp_path):
    write_packed(tmp_path / "first", {"a": gaussian(2)})
    before = sorted(os.listdir("/dev/fd"))
    for _ in range(3):
        write_packed(tmp_path / "file", {"a": gaussian(2)})
        read_packed(tmp_path / "file")
    assert sorted(os.listdir("/dev/fd")) == before


def test_the_frame_is_the_documented_one(small):
    content = small.read_bytes()
    length = struct.unpack("<Q", content[8:16])[0]
    header = json.loads(content[16 : 16 + length])
    assert content[:8] == b"EBCPACK1"
    assert hashlib.sha256(content[:-32]).digest() == content[-32:]
    assert header["version"] == 1
    entry = header["tensors"][0]
    start = 16 + length + entry.pop("offsets")[0]
    expected = {"name": "w", "kind": "packed", "levels": "ternary", "group": 2, "shape": [3, 5]}
    assert entry == expected | {"bytes": [3, 36]}
    assert content[start : start + 3] == packed(3, 5, group=2).data.tobytes()


def test_inspection_names_what_is_there(small):
    found = inspect_packed(small)
    assert found["version"] == 1
    assert found["sha256"] == small.read_bytes()[-32:].hex()
    assert [t["name"] for t in found["tensors"]] == ["w", "v", "bias"]
    assert [t["kind"] for t in found["tensors"]] == ["packed", "packed", "float32"]
    assert [t["bytes"] for t in found["tensors"]] == [3 + 36, 14 + 4, 12]
    assert [t["values"] for t in found["tensors"]] == [15, 30, 3]
    assert found["tensors"][1]["bits_per_value"] == 8 * 18 / 30
    assert packed(0).bits_per_value == 0
    assert found["compression"] == 4 * 48 / (39 + 18 + 12)
    assert json.loads(json.dumps(found)) == found


@pytest.mark.thorough
def test_a_flip_in_any_byte_is_noticed(small):
    content = small.read_bytes()
    for place in range(len(content)):
        for flip, read in ((1, read_packed), (128, inspect_packed)):
            damaged = bytearray(content)
            damaged[place] ^= flip
            small.write_bytes(damaged)
            with pytest.raises(DamagedFileError, match=r"small\.ebcpack"):
                read(small)


def test_every_truncation_anything_appended_and_foreign_files_are_noticed(small):
    content = small.read_bytes()
    for length in range(len(content)):
        small.write_bytes(content[:length])
        with pytest.raises(DamagedFileError, match="truncated"):
            read_packed(small)
    for other, message in (
        (content + b"\0", "checksum"),
        (b"PK\3\4" + bytes(100), "foreign: it does not begin with EBCPACK1"),
        (content[:8] + struct.pack("<Q", 2**63) + content[16:], "a header of 9223372036854775808 bytes"),
    ):
        small.write_bytes(other)
        with pytest.raises(DamagedFileError, match=message):
            inspect_packed(small)


def _entry(place=0, **fields):
    def change(header):
        header["tensors"][place].update(fields)
        return header

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header | {"version": 2}, "unknown version 2: this program reads version 1"),
        (lambda header: header | {"payload": 10}, "10 bytes of payload announced"),
        (lambda header: header | {"more": 1}, "malformed"),
        (lambda header: header | {"tensors": 7}, "malformed"),
        (lambda header: header | {"tensors": [{"name": "w", "kind": "packed"}]}, "malformed"),
        (lambda header: b"not JSON", "malformed"),
        (lambda header: b"[1]", "malformed"),
        (lambda header: b"[" * 100_000, "malformed"),
        (lambda header: json.dumps(header).encode(), "not canonical JSON"),
        (lambda header: b'{"version":1' + b"0" * 5000 + b"}", "malformed"),
        (_entry(1, name="w"), "two tensors are called 'w'"),
        (_entry(2, offsets=[0]), "overlap"),
        (_entry(2, surprise=1), "surprise"),
        (_entry(offsets=[0, 10**6]), "outside the payload"),
        (_entry(offsets=[0, -4]), "offsets"),
        (_entry(offsets=[0, 5]), "multiples of 4"),
        (_entry(offsets=[0]), "malformed"),
        (_entry(offsets=[0, True]), "offsets"),
        (_entry(bytes=[3, 32]), "takes .* bytes"),
        (_entry(shape=[5, 5]), "takes .* bytes"),
        (_entry(shape=[3, -5]), "shape"),
        (_entry(shape=[2**40, 2**40]), "takes .* bytes"),
        (_entry(shape=[15]), "needs a matrix"),
        (_entry(group=0), "at least 1"),
        (_entry(group=None), "group must be"),
        (_entry(levels="five"), "takes .* bytes"),
        (_entry(levels="seven"), "levels must be"),
        (_entry(kind="float32"), "unknown kind"),
        (_entry(name=3), "called 3"),
    ],
)
def test_a_header_that_lies_is_refused_though_its_checksum_is_right(small, change, message):
    rewritten(small, change)
    with pytest.raises(DamagedFileError, match=message) as caught:
        read_packed(small)
    assert str(small) in str(caught.value)
    with pytest.raises(DamagedFileError, match=message):
        inspect_packed(small)


@pytest.mark.parametrize("shape", [[0, 2**62], [0] * 100])
def test_an_absurd_shape_without_values_is_refused(small, shape):
    rewritten(small, _entry(2, shape=shape, bytes=[0]))
    with pytest.raises(DamagedFileError, match="not what the header says"):
        read_packed(small)


def test_bytes_that_are_no_codes_are_refused_although_the_checksum_is_right(tmp_path):
    for name in TOP:
        tensor = packed(30, levels=name)
        tensor.data[0] = 255
        write_packed(tmp_path / "bad", {"w": tensor})
        with pytest.raises(DamagedFileError, match=f"'w' is not what .* hold no {name} codes"):
            read_packed(tmp_path / "bad")


def test_only_files_are_read_and_written(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, what in ((tmp_path, "a folder"), (tmp_path / "pipe", "a pipe"), ("/dev/null", "no regular")):
        for read in (read_packed, inspect_packed):
            with pytest.raises(DamagedFileError, match=f"is {what}"):
                read(path)
        with pytest.raises(ValueError, match=f"is {what}"):
            write_packed(path, {})
    with pytest.raises(FileNotFoundError):
        read_packed(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        write_packed(tmp_path / "no folder" / "file", {})
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_write_that_fails_leaves_the_last_file_and_nothing_else(small):
    content = small.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            write_packed(small, {"big": np.zeros(100_000, np.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    for wrong in (np.ones(2, complex), np.array([2**24 + 1]), torch.tensor([2**40 + 1])):
        with pytest.raises(ValueError, match="the tensor 'w'"):
            write_packed(small, {"w": wrong})
    with pytest.raises(ValueError, match=r"'w' .* as quantize returns it: .* PackedTensor\.of"):
        write_packed(small, {"w": quantize(gaussian(3, 5))})
    with pytest.raises(TypeError, match="not by 3"):
        write_packed(small, {3: gaussian(2)})  # type: ignore[dict-item]
    assert small.read_bytes() == content
    assert os.listdir(small.parent) == [small.name]


def test_a_link_is_followed_and_its_file_replaced(small):
    link = small.with_name("link")
    link.symlink_to(small.name)
    write_packed(link, {"only": gaussian(2)})
    assert link.is_symlink()
    assert list(read_packed(small)) == ["only"]

"""`python -m ebc_lab.lowbit`: checks, packing, looking; errors of one sentence, nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch

from ebc_lab.lowbit import benchmark, checks, quantize, read_packed, write_packed
from ebc_lab.lowbit.__main__ import main
from ebc_lab.lowbit.container import PackedTensor

Captured: TypeAlias = pytest.CaptureFixture[str]


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "model.npz"
    weights = rng.standard_normal((30, 40)).astype(np.float32)
    np.savez(path, weight=weights, bias=weights[0], wide=weights[:2])
    return path


def fails(arguments: list[object], capsys: Captured, folder: Path) -> str:
    """The one sentence of a command that must fail with code 2 and write nothing into a folder."""
    before = sorted(folder.iterdir())
    assert main([str(a) for a in arguments]) == 2
    assert sorted(folder.iterdir()) == before
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


# -- check ---------------------------------------------------------------------------------------------------


def test_all_ten_checks_pass(capsys: Captured):
    assert main(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11
    assert all(line.startswith("ok ") for line in lines[:10])
    assert lines[-1] == "10/10 passed"


def test_a_check_that_fails_is_told_and_the_others_run(monkeypatch: pytest.MonkeyPatch, capsys: Captured):
    def other(values: object, *rest: object, **settings: object) -> object:
        return quantize(np.zeros(np.shape(values)), *rest, **settings)

    monkeypatch.setattr(checks, "quantize", other)
    monkeypatch.setattr(checks, "CHECKS", (checks.known_codes, checks.packing))
    assert main(["check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("FAIL known codes: CheckError: ternary codes are [0, 0")
    assert lines[1].startswith("ok   packing")
    assert lines[-1] == "1/2 passed"


@pytest.mark.slow
def test_the_checks_pass_without_a_compiler(tmp_path: Path):
    environment = os.environ | {"PATH": "", "EBC_LAB_LOWBIT_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for name in ("CC", "CXX"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "ebc_lab.lowbit", "check"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "there is no compiler 'cc'" in done.stdout
    assert "10/10 passed" in done.stdout


def test_a_command_that_is_stopped_by_hand_ends_as_a_shell_expects(monkeypatch: pytest.MonkeyPatch):
    def stopped() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checks, "CHECKS", (stopped,))
    assert main(["check"]) == 130


# -- pack, unpack, inspect -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("levels", "group"), [("ternary", "tensor"), ("five", "row"), ("five", 7)])
def test_a_packed_file_comes_back_as_the_quantized_values(
    levels: str, group: Any, arrays: Path, tmp_path: Path
):
    packed = tmp_path / "model.ebcpack"
    back = tmp_path / "back.npz"
    assert main(["pack", str(arrays), str(packed), "--levels", levels, "--group", str(group)]) == 0
    assert main(["unpack", str(packed), str(back)]) == 0
    given = np.load(arrays)
    found = np.load(back)
    assert sorted(found) == ["bias", "weight", "wide"]
    for name in ("weight", "wide"):
        expected = quantize(given[name], levels, group=group).values()
        assert found[name].tobytes() == expected.tobytes()
    assert np.array_equal(found["bias"], given["bias"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back.npz", "model.ebcpack", "model.npz"]


def test_names_that_mean_something_to_numpy_are_only_names(tmp_path: Path):
    weights = np.ones((2, 3), np.float32)
    names = ["file", "allow_pickle", "blocks/0", "a b"]
    write_packed(tmp_path / "x", dict.fromkeys(names, weights))
    assert main(["unpack", str(tmp_path / "x"), str(tmp_path / "x.npz")]) == 0
    found = np.load(tmp_path / "x.npz", allow_pickle=False)
    assert list(found) == names
    assert all(np.array_equal(found[name], weights) for name in names)


def test_npy_and_state_dicts_are_read(tmp_path: Path):
    weights = np.random.default_rng(0).standard_normal((6, 9)).astype(np.float32)
    np.save(tmp_path / "w.npy", weights)
    torch.save({"w": torch.from_numpy(weights).bfloat16(), "b": torch.ones(2)}, tmp_path / "w.pt")
    expected = quantize(weights, "five").values()
    assert main(["pack", str(tmp_path / "w.npy"), str(tmp_path / "a"), "--levels", "five"]) == 0
    assert np.array_equal(read_packed(tmp_path / "a")["w"].values(), expected)
    assert main(["pack", str(tmp_path / "w.pt"), str(tmp_path / "b"), "--levels", "five"]) == 0
    assert list(read_packed(tmp_path / "b")) == ["w", "b"]


def test_inspect_tells_sizes_and_entropy(arrays: Path, tmp_path: Path, capsys: Captured):
    packed = tmp_path / "model.ebcpack"
    main(["pack", str(arrays), str(packed), "--levels", "ternary"])
    capsys.readouterr()
    assert main(["inspect", str(packed), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    weight = next(tensor for tensor in found["tensors"] if tensor["name"] == "weight")
    assert weight["bytes"] == 240 + 4
    assert weight["bits_per_value"] == 8 * 244 / 1200
    assert 1.4 < weight["entropy_bits"] < np.log2(3)
    assert found["file_bytes"] == packed.stat().st_size
    assert main(["inspect", str(packed)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("weight  ternary  tensor  30 x 40") for line in lines)
    assert lines[0].split() == ["tensor", "kind", "group", "shape", "bytes", "bits", "entropy", "zeros"]
    main(["pack", str(arrays), str(packed), "--levels", "ternary", "--only", "all"])
    assert all(isinstance(tensor, PackedTensor) for tensor in read_packed(packed).values())


def test_errors_are_one_sentence_and_write_nothing(arrays: Path, tmp_path: Path, capsys: Captured):
    out = tmp_path / "out.ebcpack"
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(arrays.read_bytes()[:500])
    objects = tmp_path / "objects.npy"
    np.save(objects, np.array([{}], dtype=object), allow_pickle=True)
    wrong = tmp_path / "nan.npy"
    np.save(wrong, np.full((2, 2), np.nan))
    vector = tmp_path / "vector.npy"
    np.save(vector, np.ones(3))
    foreign = tmp_path / "x.txt"
    foreign.write_text("words")
    old = tmp_path / "old.npz"
    old.write_bytes(b"as it was")
    pack = ["--levels", "five"]
    cases = [
        (["pack", tmp_path / "none.npz", out, *pack], "none.npz: No such file"),
        (["pack", damaged, out, *pack], "damaged.npz cannot be read as arrays"),
        (["pack", objects, out, *pack], "objects.npy cannot be read as arrays"),
        (["pack", wrong, out, *pack], "'nan' cannot be quantized: 4 of 4 values"),
        (["pack", vector, out, *pack], "has no matrix to pack"),
        (["pack", foreign, out, *pack], "none of .npz, .npy and .pt"),
        (["pack", arrays, tmp_path / "no" / "out", *pack], "No such file"),
        (["unpack", foreign, old], "x.txt is foreign"),
        (["unpack", foreign, tmp_path / "out.txt"], "is no .npz"),
        (["inspect", tmp_path / "none"], "none: No such file"),
        (["bench", "--sizes", "2"], "sizes is [2]"),
        (["bench", "--quick"], "type --sizes 100000 --iterations 3"),
        (["bench", "--json", tmp_path / "no" / "rows.json"], "cannot be written"),
    ]
    for arguments, message in cases:
        assert message in fails(arguments, capsys, tmp_path)
    assert old.read_bytes() == b"as it was"


def test_a_library_copied_without_the_benchmark_says_where_it_is(
    tmp_path: Path, monkeypatch, capsys: Captured
):
    benchmark.load.cache_clear()
    monkeypatch.setattr(benchmark, "FOLDERS", (tmp_path / "benchmarks",))
    assert "copy benchmarks/lowbit of the repository to" in fails(["bench"], capsys, tmp_path)
    from ebc_lab.lowbit import PerformanceBenchmark

    with pytest.raises(ImportError, match="benchmarks/lowbit"):
        PerformanceBenchmark()

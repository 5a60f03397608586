"""Runs in processes of their own: which instructions they use, how runs end there, and that none is left."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.runs import assert_over, killed_in_mid_run, plain

from ebc_lab.config.errors import UserError
from ebc_lab.records.streams import read_columns
from ebc_lab.training import apart
from ebc_lab.training.ends import Interrupted
from ebc_lab.training.outcome import run_and_record


@pytest.fixture
def there(run):
    """A run that cannot be trained in this process."""
    return replace(plain(run), capability="default")


@pytest.fixture(scope="module", autouse=True)
def none_left():
    yield
    apart._close_idle()
    apart._idle.clear()


@pytest.mark.thorough
def test_torch_has_the_instructions_asked_for_and_one_process_serves_several_runs(there, tmp_path):
    asked = [sys.executable, "-c", "import torch; print(torch.backends.cpu.get_cpu_capability())"]
    env = {**os.environ, apart.VARIABLE: there.capability}
    assert subprocess.run(asked, env=env, capture_output=True, text=True).stdout == "DEFAULT\n"
    steps = []
    result = run_and_record(there, tmp_path / "a", "a", on_progress=steps.append)
    assert (result["outcome"], result["run_id"], steps[-1]) == ("completed", "a", there.steps)
    [process] = apart._idle["default", 1, 1]
    environment = Path(f"/proc/{process.process.pid}/environ")
    if environment.exists():
        assert f"{apart.VARIABLE}=default".encode() in environment.read_bytes().split(b"\0")
    again = run_and_record(there, tmp_path / "b", "b")
    assert apart._idle["default", 1, 1] == [process]
    assert [again[k] for k in ("weights_checksum", "identity")] == [
        result[k] for k in ("weights_checksum", "identity")
    ]


def test_a_run_is_interrupted_there_and_resumed_to_the_same_bits(there, tmp_path):
    undisturbed = run_and_record(there, tmp_path / "whole", "x")
    with pytest.raises(Interrupted):
        run_and_record(there, tmp_path / "cut", "x", should_stop=lambda: True)
    assert (tmp_path / "cut" / "checkpoint.pt").exists()
    said = []
    resumed = run_and_record(there, tmp_path / "cut", "x", say=said.append)
    assert said == []
    assert resumed["weights_checksum"] == undisturbed["weights_checksum"]
    assert resumed["val_loss"] == undisturbed["val_loss"]


@pytest.mark.slow
def test_it_dies_with_the_process_that_started_it_and_the_run_goes_on_from_its_checkpoint(there, tmp_path):
    there = replace(there, steps=300)
    killed_in_mid_run(there, tmp_path / "killed", processes=1)
    assert_over(tmp_path)
    assert not (tmp_path / "killed" / "result.json").exists()
    resumed = run_and_record(there, tmp_path / "killed", "x")
    assert list(read_columns(tmp_path / "killed" / "steps.csv")["step"]) == list(range(300))
    assert resumed["weights_checksum"] == run_and_record(there, tmp_path / "whole", "x")["weights_checksum"]


@pytest.mark.thorough
def test_a_process_that_is_killed_leaves_a_failed_run_with_its_cause(there, tmp_path):
    run_and_record(there, tmp_path / "before", "x")
    [process] = apart._idle["default", 1, 1]
    killed = run_and_record(there, tmp_path / "killed", "x", on_progress=lambda step: process.process.kill())
    assert killed["outcome"] == "failed"
    assert "ended with code -9" in killed["cause"]
    assert apart._idle["default", 1, 1] == []
    (tmp_path / "killed" / "result.json").unlink()
    assert run_and_record(there, tmp_path / "killed", "x")["outcome"] == "completed"


@pytest.mark.thorough
def test_what_is_refused_there_and_what_this_cpu_lacks_is_said_here(there, tmp_path, monkeypatch):
    run_and_record(there, tmp_path / "a", "x")
    with pytest.raises(UserError, match="is another run's result"):
        run_and_record(replace(there, seed=9), tmp_path / "a", "x")
    monkeypatch.setattr(apart, "capabilities", lambda: ("default", "avx2"))
    with pytest.raises(UserError, match="capability=avx512: this CPU has default or avx2"):
        run_and_record(replace(there, capability="avx512"), tmp_path / "b", "x")

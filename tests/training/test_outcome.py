"""How a run ends, and what is done about it: diverged, crashed, finished before."""

import math
import re
import resource
from dataclasses import replace

import pytest
import torch
from support.runs import plain

from ebc_lab.components import optimizer as optimizers
from ebc_lab.components import stabilizers
from ebc_lab.config.choices import changed
from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import digest, identity
from ebc_lab.records.json_files import write_checksummed
from ebc_lab.training import outcome as outcome_module
from ebc_lab.training import run as run_module
from ebc_lab.training.ends import DeviceFailed
from ebc_lab.training.outcome import run_and_record


def test_an_edited_result_is_refused_with_the_remedy(run, tmp_path):
    write_checksummed(
        tmp_path / "result.json", {"identity": digest(identity(run)), "outcome": "completed", "val_loss": 2.0}
    )
    assert run_and_record(run, tmp_path, "x")["val_loss"] == 2.0
    (tmp_path / "result.json").write_text((tmp_path / "result.json").read_text().replace("2.0", "1.0"))
    with pytest.raises(
        UserError, match=rf"result\.json was edited.*delete {tmp_path}, and the same command trains the run"
    ):
        run_and_record(run, tmp_path, "x")


def test_a_loss_that_is_not_finite_or_ends_above_its_start_is_diverged(run, tmp_path):
    huge = {"optimizer": {"name": "sgd", "lr": 1e30, "momentum": 0.0}}
    ended = run_and_record(changed(plain(run), huge), tmp_path / "huge", "x")
    assert (ended["outcome"], ended["val_loss"]) == ("diverged", None)
    assert ended["steps"] < 30
    assert "step" in ended["cause"]
    above = run_and_record(changed(plain(run), {"optimizer": {"lr": 2.0}}), tmp_path / "above", "x")
    assert (above["outcome"], above["steps"]) == ("diverged", 30)
    assert "above the initial loss" in above["cause"]


def test_ten_skipped_steps_in_a_row_are_diverged(run, tmp_path, monkeypatch):
    original = stabilizers.build

    def poisoned(model, *others, **named):
        for p in model.parameters():
            p.register_hook(lambda grad: grad * math.nan)
        return original(model, *others, **named)

    monkeypatch.setattr(stabilizers, "build", poisoned)
    result = run_and_record(plain(run), tmp_path, "x")
    assert (result["outcome"], result["steps"], result["skipped_steps"]) == ("diverged", 10, 10)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (MemoryError("no"), "oom"),
        (torch.OutOfMemoryError("no"), "oom"),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might …"), "oom"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "oom"),
        (RuntimeError("a bug"), "failed"),
    ],
)
def test_a_crash_becomes_an_outcome_with_its_traceback(run, tmp_path, monkeypatch, error, outcome):
    def crash(*_, **named):
        raise error

    monkeypatch.setattr(optimizers, "build", crash)
    result = run_and_record(run, tmp_path, "x")
    assert result["outcome"] == outcome
    assert type(error).__name__ in result["cause"]
    assert "Traceback" in (tmp_path / "log.txt").read_text()


# as torch says it, from its c10/cuda and CUDA's own texts
OUT_OF_REACH = [
    "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
    "CUDA error: uncorrectable ECC error encountered",
    "No CUDA GPUs are available",
    "CUDA driver initialization failed, you might not have a CUDA gpu.",
    "CUDA unknown error - this may be due to an incorrectly set up environment, e.g. changing env variable "
    "CUDA_VISIBLE_DEVICES after program start. Setting the available devices to be zero.",
    "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling "
    "NumCudaDevices() that might have already set an error? Error 802: system not yet initialized",
]


@pytest.mark.parametrize("words", OUT_OF_REACH)
def test_a_gpu_that_cannot_be_used_is_no_outcome_of_the_run(run, tmp_path, monkeypatch, words):
    def fail(*_, **named):
        raise RuntimeError(f"{words}\nCUDA kernel errors might be asynchronously reported …")

    monkeypatch.setattr(optimizers, "build", fail)
    with pytest.raises(DeviceFailed, match=re.escape(words)):
        run_and_record(run, tmp_path, "x")
    assert not (tmp_path / "result.json").exists()


def test_a_run_that_evaluates_to_nan_is_diverged(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        run_module, "evaluate", lambda *_: {"loss": math.nan, "se": math.nan, "accuracy": 0.0, "tokens": 1.0}
    )
    result = run_and_record(plain(run), tmp_path, "x")
    assert (result["outcome"], result["val_loss"]) == ("diverged", None)


def test_a_finished_run_is_not_trained_again_nor_taken_for_another(run, tmp_path, monkeypatch):
    first = run_and_record(run, tmp_path, "x")
    monkeypatch.setattr(outcome_module, "Training", None)
    assert run_and_record(run, tmp_path, "x")["val_loss"] == first["val_loss"]
    with pytest.raises(UserError, match="another run's result"):
        run_and_record(replace(run, seed=run.seed + 1), tmp_path, "x")


def test_a_limit_on_the_size_of_files_stops_a_run_like_a_full_disk_and_it_is_resumable(run, tmp_path):
    """As `ulimit -f` sets it: EFBIG, because Python ignores SIGXFSZ."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            run_and_record(run, tmp_path, "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "result.json").exists()
    assert run_and_record(run, tmp_path, "x")["outcome"] == "completed"

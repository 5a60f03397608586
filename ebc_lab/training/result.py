"""How a run ended: every rule by which it has diverged or crashed, and the figures that result.json holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from ebc_lab.components import shocks
from ebc_lab.config.schema import RunConfig
from ebc_lab.records.figures import recovery, summarise
from ebc_lab.records.paths import RunFiles
from ebc_lab.records.streams import read_columns

SKIPS_TO_DIVERGE = 10  # skipped steps in a row
LAST_STEPS = 50  # whose mean loss must not exceed the initial loss
OOM = (MemoryError, torch.OutOfMemoryError)
OOM_WORDS = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
DEVICE_WORDS = ("CUDA error", "CUDNN_STATUS_INTERNAL_ERROR", "No CUDA GPUs are available")
OWN_FAULT = ("device-side assert", "illegal memory access", "misaligned address")

# -- diverged ------------------------------------------------------------------------------------------------


def fatal(step: int, found: Mapping[str, Any]) -> str | None:
    """Why a run cannot continue after a step with these values; None if it can."""
    if not math.isfinite(found["loss"]):
        return f"the loss is {found['loss']} at step {step}"
    if found.get("failed"):
        return f"step {step}: the optimizer proposed a non-finite update."
    return None


def stuck(skips: int, step: int) -> str | None:
    """Why a run whose last `skips` steps were all skipped is not continued; None if it is."""
    if skips < SKIPS_TO_DIVERGE:
        return None
    return f"{SKIPS_TO_DIVERGE} steps in a row were skipped, the last at step {step}"


def risen(figures: Mapping[str, Any], steps: int) -> str | None:
    """Why a run of `steps` steps that came to its end has diverged all the same; None if it has not."""
    initial = figures["initial_loss"]
    last = figures["last_loss"]
    if last is None or last <= initial:
        return None
    count = min(LAST_STEPS, steps)
    return f"the mean loss of the last {count} steps, {last:.3f}, is above the initial loss, {initial:.3f}"


# -- crashed -------------------------------------------------------------------------------------------------


def is_oom(error: BaseException) -> bool:
    """Whether memory ran out; torch's CPU allocator says so only in its message."""
    named = any(words in str(error) for words in OOM_WORDS)
    return isinstance(error, OOM) or (isinstance(error, RuntimeError | OSError) and named)


def is_device_failure(error: BaseException) -> bool:
    """Whether the GPU vanished or its context is broken, so that this process can do nothing more with it."""
    named = any(words in str(error) for words in DEVICE_WORDS)
    return isinstance(error, RuntimeError) and named and not is_oom(error)


def is_own_fault(cause: str) -> bool:
    """Whether the run's own code caused a device failure, going by the first line of its message.

    The lines after it advise on device-side assertions, whatever has happened.
    """
    return any(words in cause for words in OWN_FAULT)


# -- the figures ---------------------------------------------------------------------------------------------


def finished(
    run: RunConfig,
    files: RunFiles,
    cause: str | None,
    evaluate: Callable[[str], dict[str, float]],
    *,
    steps: int,
    guard_count: int,
    train_s: float,
    probe_s: float,
) -> dict[str, Any]:
    """The result of a run after its last step, without `wall_s`.

    Args:
        cause: why it has diverged, if that showed in its steps.
        evaluate: split -> loss, its standard error, accuracy and tokens; called unless the run has diverged.
        train_s: seconds of training, of which measurements took `probe_s`.
    """
    columns = read_columns(files.steps)
    figures = summarise(columns)
    cause = cause or risen(figures, run.steps)
    evaluated: dict[str, dict[str, float]] = {}
    if cause is None:
        evaluated = {split: evaluate(split) for split in run.evaluate}
        if not all(math.isfinite(e["loss"]) for e in evaluated.values()):
            cause = "the loss is not finite on held-out text"
            evaluated = {}
    result: dict[str, Any] = {"outcome": "diverged" if cause else "completed", "cause": cause, "steps": steps}
    result |= _held_out(evaluated) | figures | {"guard_count": guard_count}
    if run.shock.name != "none":
        result |= recovery(columns["loss"], shocks.step_of(run))
    curve = read_columns(files.evals)
    result["curve"] = np.stack([curve[k] for k in ("step", "val_loss", "train_s")], 1).tolist()
    tokens = steps * run.batch_size * run.model.context
    result["tokens_per_s"] = tokens / train_s if train_s else None
    result["probe_pct"] = 100 * probe_s / train_s if train_s else None
    result["train_s"] = train_s
    return result


def _held_out(evaluated: Mapping[str, Mapping[str, float]]) -> dict[str, float | None]:
    """The figures on held-out text, from what each split's evaluation found; None for a split without one."""
    figures: dict[str, float | None] = {}
    for split in ("val", "test"):
        found = evaluated.get(split)
        figures[f"{split}_loss"] = found["loss"] if found else None
        figures[f"{split}_se"] = found["se"] if found else None
    if {"val", "test"} <= set(evaluated):
        nats = sum(e["loss"] * e["tokens"] for e in evaluated.values())
        figures["heldout_loss"] = nats / sum(e["tokens"] for e in evaluated.values())
    test = evaluated.get("test")
    figures["test_bits_per_char"] = test["loss"] / math.log(2) if test else None
    figures["test_accuracy"] = test["accuracy"] if test else None
    return figures

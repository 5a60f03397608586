"""The result of a run after its last step: the figures that result.json holds."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ebc_lab.config.checks import precision
from ebc_lab.config.errors import UserError
from ebc_lab.config.parts.target import TargetConfig
from ebc_lab.config.schema import RunConfig
from ebc_lab.ebc.options import KL_FLOOR
from ebc_lab.records.figures import summarise
from ebc_lab.records.files import opened
from ebc_lab.records.paths import RunFiles
from ebc_lab.records.streams import Mark, holds, read_columns

from .divergence import risen


def finished(
    run: RunConfig,
    files: RunFiles,
    marks: Mapping[str, Mark],
    cause: str | None,
    ended: str | None,
    evaluate: Callable[[str], dict[str, float]],
    *,
    summary: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    packed: Callable[[], dict[str, Any]],
    characters: Mapping[str, float],
    steps: int,
    guard_count: int,
    train_s: float,
    probe_s: float,
) -> dict[str, Any]:
    """Return the result of a run after its last step, without `wall_s`.

    Args:
        marks: what was recorded in each stream; the figures are computed from the files.
        cause: why it has diverged, if that showed in its steps.
        ended: why it was raced: ended before its last step, since it could not win any more.
        evaluate: split -> loss, its standard error, accuracy and tokens; called of a run that completed.
        summary: columns of steps.csv -> further figures, also of a run that has diverged.
        packed: keeps the model -> figures of it; called of a run that completed.
        characters: of a token, by split; empty where there is no text.
        train_s: seconds of training, of which measurements took `probe_s`.
    Raises:
        UserError: somebody changed a stream while the run was training.
    """
    for name, mark in marks.items():
        path = files.directory / name
        if not holds(path, mark, to_the_end=True):
            again = f"delete {files.directory}, and the same command trains the run again"
            raise UserError(f"{path} was changed while the run was training: {again}.")
    columns = read_columns(files.steps)
    figures = summarise(columns, KL_FLOOR[precision(run)])
    cause = cause or ended or risen(figures, run.steps)
    evaluated = {} if cause else {split: evaluate(split) for split in run.evaluate}
    if not all(math.isfinite(e["loss"]) for e in evaluated.values()):
        cause = "the loss is not finite on held-out text"
        evaluated = {}
    outcome = "diverged" if cause else "completed"
    if ended:
        outcome = "raced"
    result: dict[str, Any] = {"outcome": outcome, "cause": cause, "steps": steps}
    result |= _held_out(evaluated, characters) | figures | {"guard_count": guard_count}
    result |= summary(columns)
    curve = read_columns(files.evals)
    result |= packed() if cause is None else {}
    result["curve"] = np.stack([curve[k] for k in ("step", "val_loss", "train_s")], 1).tolist()
    result |= TargetConfig.from_run(run).reached(result["curve"])
    result |= _speed(steps * run.tokens_per_step, train_s, probe_s)
    result["streams"] = {name: mark.sha256 for name, mark in marks.items()} | _models_of(files, result)
    return result


def _models_of(files: RunFiles, result: Mapping[str, Any]) -> dict[str, str]:
    """The checksums of the models that the run has kept."""
    paths = {"packed_bytes": files.packed, "workload": files.model, "weights_bytes": files.weights}
    sums = {}
    for path in (path for figure, path in paths.items() if figure in result):
        with opened(path) as f:
            sums[path.name] = hashlib.file_digest(f, "sha256").hexdigest()
    return sums


def _speed(tokens: int, train_s: float, probe_s: float) -> dict[str, float | None]:
    """The time that training on so many tokens took, of which measurements took `probe_s` seconds."""
    return {
        "tokens_per_s": tokens / train_s if train_s else None,
        "probe_pct": 100 * probe_s / train_s if train_s else None,
        "train_s": train_s,
    }


def _held_out(
    evaluated: Mapping[str, Mapping[str, float]], characters: Mapping[str, float]
) -> dict[str, float | None]:
    """The figures on held-out text, from what each split's evaluation found; None for a split without one."""
    figures: dict[str, float | None] = {}
    for split in ("val", "test"):
        of_split = evaluated.get(split)
        figures[f"{split}_loss"] = of_split["loss"] if of_split else None
        figures[f"{split}_se"] = of_split["se"] if of_split else None
    if {"val", "test"} <= set(evaluated):
        nats = sum(e["loss"] * e["tokens"] for e in evaluated.values())
        figures["heldout_loss"] = nats / sum(e["tokens"] for e in evaluated.values())
    test = evaluated.get("test")
    bits: float | None = None
    if test and characters:
        bits = test["loss"] / characters["test"] / math.log(2)
    figures["test_bits_per_char"] = bits
    figures["test_accuracy"] = test["accuracy"] if test else None
    return figures

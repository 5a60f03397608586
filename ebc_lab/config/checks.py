"""What is refused before anything is written: impossible or contradictory settings, each in one sentence."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from .choices import groups
from .errors import UserError, any_of, nearest
from .schema import SPLITS, RunConfig

CHOICES = {  # of a run's settings, where no folder of conf says it
    "dtype": ("auto", "float32", "bfloat16"),
    "param_dtype": ("float32", "bfloat16"),
    "device": ("auto", "cpu", "cuda"),
    "compile": ("auto", "on", "off"),
    "stabilizer.schedule": ("constant", "linear", "cosine", "lr_squared"),
    "budget.schedule": ("constant", "linear", "cosine", "lr_squared"),
    "budget.probe_tokens": ("train", "held"),
    "budget.aggregate": ("l1", "sqrtl_l2", "l2"),
    "budget.grouping": ("block", "tensor", "type", "matrices", "global"),
    "budget.guard": ("none", "shrink", "shrink_inflate"),
    "budget.probe": ("jvp", "fd"),
    "budget.cadence": ("warm", "published", "dense", "sweep"),
    "budget.beta_init": ("first", "zero"),
    "budget.units": ("logits", "per_lr"),
}
RUN_GROUPS = (
    "data",
    "model",
    "optimizer",
    "lr_schedule",
    "projection",
    "stabilizer",
    "budget",
    "controller",
    "shock",
)
LEAST_KL = {
    "float32": 1e-6,
    "bfloat16": 1e-4,
}  # nats per token: ten times the smallest KL `shadow` can see in it
LOWEST = {
    "linear": 0.05,
    "cosine": 0.05,
}  # of a schedule's multiplier on delta*, where it is known beforehand


def need(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


def choice(key: str, value: str, allowed: Sequence[str]) -> None:
    need(value in allowed, f"{key}={value} is unknown{nearest(value, allowed)}; it takes {any_of(allowed)}.")


def setting_at(config: Any, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), config)


def positive(key: str, value: float, *, zero: bool = False) -> None:
    ok = math.isfinite(value) and (value >= 0 if zero else value > 0)
    need(ok, f"{key} must be a finite number {'>= 0' if zero else '> 0'}, not {value}.")


def validate_run(run: RunConfig) -> None:
    """Refuse impossible or contradictory settings of one run. Raises UserError."""
    for group in RUN_GROUPS:
        choice(group, getattr(run, group).name, groups()[group])
    for key, allowed in CHOICES.items():
        choice(key, setting_at(run, key), allowed)
    for split in run.evaluate:
        choice("evaluate", split, SPLITS[1:])

    positive("threads_per_run", run.threads_per_run, zero=True)
    for key in ("steps", "batch_size", "eval_every", "eval_windows", "audit_every", "audit_tokens"):
        positive(key, getattr(run, key))
    for key in ("blocks", "width", "heads", "context"):
        positive(f"model.{key}", getattr(run.model, key))
    need(run.model.width % run.model.heads == 0, "model.width must be a multiple of model.heads.")
    need(0 <= run.model.dropout < 1, f"model.dropout must lie in [0, 1), not {run.model.dropout}.")
    positive("optimizer.lr", run.optimizer.lr)
    for key in ("weight_decay", "momentum", "eps"):
        positive(f"optimizer.{key}", getattr(run.optimizer, key), zero=True)
    for key in ("beta1", "beta2"):
        need(0 <= getattr(run.optimizer, key) < 1, f"optimizer.{key} must lie in [0, 1).")
    positive("lr_schedule.warmup_steps", run.lr_schedule.warmup_steps, zero=True)
    for key, kinds in (("kp", ("pi", "log_pi")), ("ki", ("pi", "log_pi")), ("a", ("energy",))):
        gain = getattr(run.controller, key)
        if gain is not None:
            positive(f"controller.{key}", gain, zero=True)
            need(run.controller.name in kinds, f"controller.{key} goes with controller={any_of(kinds)}.")
    if run.stabilizer.strength is not None:
        positive("stabilizer.strength", run.stabilizer.strength)
    need(
        run.budget.guard == "none" or run.budget.name == "surrogate",
        f"budget.guard={run.budget.guard} corrects a bound: it goes with budget=surrogate, not {run.budget.name}.",
    )
    need(
        run.param_dtype == "float32" or run.projection.name != "spectral",
        "param_dtype=bfloat16 does not go with projection=spectral: there is no singular value decomposition in bfloat16.",
    )
    positive("final_windows", run.final_windows, zero=True)
    positive("shock.step", run.shock.step or 0, zero=True)
    need(
        run.shock.name == "none" or run.shock.step is None or run.shock.step < run.steps,
        f"shock.step={run.shock.step} lies beyond the run's {run.steps} steps (counted from 0).",
    )
    positive("shock.size", run.shock.size)
    need(
        run.shock.name != "label_noise" or run.shock.size <= 1,
        f"shock.size is the share of wrong targets under shock=label_noise: at most 1, not {run.shock.size}.",
    )
    positive("projection.bound", run.projection.bound)
    positive("budget.target_kl", run.budget.target_kl)
    positive("budget.sensitivity_every", run.budget.sensitivity_every, zero=True)
    positive("budget.measure_every", run.budget.measure_every)
    need(
        0 < run.budget.probe_sequences < run.batch_size,
        f"budget.probe_sequences must leave rows of the batch for the audit: 1 to {run.batch_size - 1}.",
    )
    need(run.data.name != "path" or bool(run.data.file), "data=path needs data.file=FILE, a UTF-8 text.")
    need(
        run.data.name == "path" or not run.data.file,
        f"data.file goes with data=path, not data={run.data.name}.",
    )
    need(
        run.lr_schedule.name != "replay" or bool(run.lr_schedule.source),
        "lr_schedule=replay needs lr_schedule.source, the folder of the run whose learning rates it replays.",
    )
    check_run(run)


def need_gpu() -> None:
    """Refuse a GPU's work where none is. Raises UserError."""
    from .machine import visible_gpus

    need(
        bool(visible_gpus()),
        "device=cuda, but nvidia-smi shows no GPU here (or CUDA_VISIBLE_DEVICES hides it).",
    )


def check_run(run: RunConfig) -> None:
    """Refuse what only a resolved run shows: a KL target its precision cannot measure, an open gain. Raises UserError."""
    least = least_target_kl(run)
    if run.stabilizer.name == "ebc" and run.budget.target_kl < least:
        precision = "bfloat16" if "bfloat16" in (run.dtype, run.param_dtype) else "float32"
        raise UserError(
            f"budget.target_kl={run.budget.target_kl:g} is below {least:g} nats, where its schedule ends below ten times the "
            f"smallest KL that {precision} can show: raise it, or use budget=surrogate."
        )


def least_target_kl(run: RunConfig) -> float:
    """The smallest delta* that the run's budget can hold in its precision and on its schedule, nats per token; 0: any."""
    if run.budget.name != "shadow":
        return 0.0
    low = "bfloat16" in (run.dtype, run.param_dtype)
    return LEAST_KL["bfloat16" if low else "float32"] / LOWEST.get(run.budget.schedule, 1.0)

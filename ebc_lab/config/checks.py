"""What is refused of one run before anything is written, each mistake in one sentence."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from ebc_lab.ebc.options import LEAST_MULTIPLIER, LEAST_TARGET_KL, MEASURED

from .choices import groups
from .errors import HIDDEN, UserError, any_of, nearest
from .fields import Setting, default_of, setting_of
from .schema import RunConfig


def need(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


def choice(key: str, value: str, allowed: Iterable[str]) -> None:
    known = list(allowed)
    need(value in known, f"{key}={value} is unknown{nearest(value, known)}; it takes {any_of(known)}.")


def check_settings(config: Any, path: str = "") -> None:
    """Refuse what a field's metadata does not allow, here and in dataclasses inside. Raises UserError."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        key = path + field.name
        if dataclasses.is_dataclass(value):
            check_settings(value, f"{key}.")
            continue
        setting = setting_of(field)
        _check(key, value, setting)
        if setting.only and value != default_of(field):
            group = path.rstrip(".")
            need(
                config.name in setting.only,
                f"{key} goes with {group}={any_of(setting.only)}, not {group}={config.name}.",
            )


def _check(key: str, value: Any, setting: Setting) -> None:
    if isinstance(value, Mapping):
        for name, item in value.items():
            if setting.keys:
                choice(key, name, setting.keys)
            _check_text(key, name)
            _check(f"{key}.{name}", item, setting)
    elif isinstance(value, list):
        need(len(value) >= setting.least, f"{key} must not be empty.")
        for item in value:
            _check(key, item, setting)
        if setting.increasing:
            need(value == sorted(set(value)), f"{key} must be increasing, without repeats: {value}.")
        if setting.unique:
            need(len(set(value)) == len(value), f"{key} must not name anything twice: {value}.")
    elif dataclasses.is_dataclass(value):
        check_settings(value, f"{key}.")
    elif isinstance(value, str) and HIDDEN.search(value):
        _check_text(key, value)
    elif setting.group:
        choice(key.removesuffix(".name"), value, groups()[setting.group])
    elif setting.choices and value is not None:
        choice(key, value, setting.choices)
    elif setting.numeric and value is not None:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        need(
            number and math.isfinite(value) and setting.holds(value),
            f"{key} must be a finite number {setting.range()}, not {value}.",
        )


def _check_text(key: str, text: str) -> None:
    need(not HIDDEN.search(text), f"{key}={text} holds control characters: leave them out.")


def validate_run(run: RunConfig) -> None:
    """Refuse impossible or contradictory settings of one run. Raises UserError."""
    check_settings(run)
    shock = run.shock
    need(run.model.width % run.model.heads == 0, "model.width must be a multiple of model.heads.")
    need(
        run.param_dtype == "float32" or run.projection.name != "spectral",
        "param_dtype=bfloat16 does not go with projection=spectral: "
        "there is no singular value decomposition in bfloat16.",
    )
    need(
        shock.name == "none" or shock.step is None or shock.step < run.steps,
        f"shock.step={shock.step} lies beyond the run's {run.steps} steps (counted from 0).",
    )
    need(
        shock.name != "label_noise" or shock.size <= 1,
        f"shock.size is the share of wrong targets under shock=label_noise: at most 1, not {shock.size}.",
    )
    need(
        run.budget.probe_sequences < run.batch_size,
        f"budget.probe_sequences must leave rows of the batch for the audit: 1 to {run.batch_size - 1}.",
    )
    need(run.data.name != "path" or bool(run.data.file), "data=path needs data.file=FILE, a UTF-8 text.")
    need(
        run.lr_schedule.name != "replay" or bool(run.lr_schedule.source),
        "lr_schedule=replay needs lr_schedule.source, the folder of the run whose learning rates it replays.",
    )
    check_run(run)


def need_gpu() -> None:
    """Refuse work for a GPU where there is none. Raises UserError."""
    from .machine import visible_gpus

    need(
        bool(visible_gpus()),
        "device=cuda, but nvidia-smi shows no GPU here (or CUDA_VISIBLE_DEVICES hides it).",
    )


def check_run(run: RunConfig) -> None:
    """Refuse a target KL that a resolved run's precision cannot measure. Raises UserError."""
    least = least_target_kl(run)
    need(
        run.stabilizer.name != "ebc" or run.budget.target_kl >= least,
        f"budget.target_kl={run.budget.target_kl:g} is below {least:g} nats, where its schedule ends below "
        f"ten times the smallest KL that {_precision(run)} can show: raise it, or use budget=surrogate.",
    )


def least_target_kl(run: RunConfig) -> float:
    """The smallest target KL, nats per token, that a run's budget can hold in its precision; 0: any."""
    if run.budget.name not in MEASURED:
        return 0.0
    return LEAST_TARGET_KL[_precision(run)] / LEAST_MULTIPLIER.get(run.budget.schedule, 1.0)


def _precision(run: RunConfig) -> str:
    return "bfloat16" if "bfloat16" in (run.dtype, run.param_dtype) else "float32"

"""Checks of one run's settings before anything is written. Each mistake is refused in one sentence."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from ebc_lab.ebc.options import LEAST_MULTIPLIER, LEAST_TARGET_KL, MEASURING

from . import machine
from .choices import OWN_GROUPS, choice_for, choices_of, groups, is_read, kind_of, offered, values_in_conf
from .dicts import type_hints
from .errors import HIDDEN, UserError, any_of, refuse, require, shown
from .fields import CUSTOM, Setting, default_of, setting_of
from .hints import near_choice
from .modes import check_modes
from .own.files import own_choices
from .part import Need
from .parts import PART, parts_of
from .schema import RunConfig

MOST_MEMORY_GB = 1000  # more than any GPU has, and most machines
LABEL = re.compile(r"[A-Za-z0-9]\w{0,59}", re.ASCII)  # of a user's own part; names of runs contain it


def choice(key: str, value: Any, allowed: Iterable[str]) -> None:
    """Raise UserError, naming the nearest choices, if `value` is not among `allowed`."""
    known = list(allowed)
    if value not in known:  # the nearest is looked for only then: that takes longer than all checks
        near = near_choice(key, str(value), known)
        raise UserError(f"{key}={shown(value)} is unknown{near}; it takes {any_of(known)}.")


def check_settings(config: Any, path: str = "") -> None:
    """Raise UserError if a field of `config`, or of a dataclass nested in it, has an invalid value."""
    cls: Any = type(config)
    kinds = type_hints(cls)
    own = path.rstrip(".") in OWN_GROUPS and kind_of(config) == CUSTOM
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        key = path + field.name
        if dataclasses.is_dataclass(value):
            check_settings(value, f"{key}.")
            continue
        setting = setting_of(field)
        if own and field.name == "name":
            require(bool(LABEL.fullmatch(str(value))), f"{key}={shown(value)} must be letters, digits and _.")
            continue
        check_value(key, value, setting, kinds[field.name])


def set_in_vain(config: Any) -> dict[str, str]:
    """Return, by setting, a sentence for each setting of a group that is set but not read. The sentence says
    with which choice the setting goes. A value from a file of `conf/` does not count as set."""
    vain: dict[str, str] = {}
    values = [(field.name, getattr(config, field.name)) for field in dataclasses.fields(config)]
    for group, settings in values:
        if group not in groups() or not hasattr(settings, "name"):
            continue
        part = PART.get(group)
        reader, choices = (part.read_by if part else None) or ("", ())
        reading = getattr(config, reader).name if reader else ""
        elsewhere = bool(reader) and reading not in choices
        for field in dataclasses.fields(settings):
            setting = setting_of(field)
            # asked last whether it is set, which takes reading files of `conf/`
            if (is_read(setting, settings) and not elsewhere) or not _is_set(group, field, settings):
                continue
            key = group if field.name == "name" else f"{group}.{field.name}"
            if elsewhere:
                vain[key] = f"{key} goes with {reader}={any_of(choices)}, not {reader}={reading}."
            else:
                chooser, now = f"{group}.{setting.by}".removesuffix(".name"), choice_for(setting, settings)
                advice = f": write it as {group}.arguments" if now == CUSTOM else ""
                vain[key] = f"{key} goes with {chooser}={any_of(setting.only)}, not {chooser}={now}{advice}."
    return vain


def _is_set(group: str, field: dataclasses.Field[Any], settings: Any) -> bool:
    """Return whether the user gave a setting its value. Defaults and values from `conf/` do not count."""
    value = getattr(settings, field.name)
    if value in (default_of(field), setting_of(field).before_it_existed):
        return False
    # a choice's own file sets its name, so a name that matters was chosen unless it is the default
    named = field.name == "name" and setting_of(field).in_run_id
    return named or value not in values_in_conf(group, settings.name, field.name)


def check_read(config: Any, beside: Any = None) -> None:
    """Raise UserError for a setting that is set but not read. If `beside`, the configuration from which this
    one was derived, is given, a setting with the same value there is allowed, because the study's other runs
    may read it."""
    for key, sentence in set_in_vain(config).items():
        require(beside is not None and value_at(config, key) == value_at(beside, key), sentence)


def value_at(config: Any, key: str) -> Any:
    """Return the value of a dotted setting such as `optimizer.beta1`. A bare group such as `optimizer` gives
    the name of the choice made for that group."""
    group, _, name = key.partition(".")
    return getattr(getattr(config, group), name or "name")


def check_value(key: str, value: Any, setting: Setting, kind: Any) -> None:
    """Raise UserError for a value that a setting of type `kind` does not take."""
    inside = typing.get_args(kind)
    if value is None:
        require(kind is Any or types.NoneType in inside, f"{key} must have a value.")
    elif isinstance(value, Mapping):
        is_mapping = typing.get_origin(kind) is dict or (kind is Any and not setting.texts)
        require(is_mapping, f"{key} takes one value, not {shown(value)}.")
        require(len(value) <= setting.most, f"{key} takes at most {setting.most} entries, not {len(value)}.")
        for name, item in value.items():
            _check_text(f"the names in {key}", str(name), 100)
            if setting.keys:
                choice(key, name, setting.keys)
            check_value(f"{key}.{name}", item, setting, inside[1] if inside else Any)
    elif isinstance(value, list):
        is_list = kind is Any or typing.get_origin(kind) is list
        require(is_list, f"{key} is one value, not a list: {shown(value)}.")
        require(bool(value) or not setting.least, f"{key} must not be empty.")
        require(len(value) >= setting.least, f"{key} needs {setting.least} values, not {len(value)}.")
        require(len(value) <= setting.most, f"{key} takes at most {setting.most} items, not {len(value)}.")
        of_items = str if setting.texts else (inside or (Any,))[0]
        for item in value:
            check_value(key, item, setting, of_items)
        if setting.increasing:
            require(
                value == sorted(set(value)), f"{key} must be increasing, without repeats: {shown(value)}."
            )
        if setting.unique:
            require(len(set(value)) == len(value), f"{key} must not name anything twice: {shown(value)}.")
    elif dataclasses.is_dataclass(value):
        check_settings(value, f"{key}.")
    else:
        one = str if setting.texts else next(k for k in (inside or (kind,)) if k is not types.NoneType)
        if one in (int, float) or setting.numeric:
            number = isinstance(value, int if one is int else int | float) and not isinstance(value, bool)
            finite = number and (isinstance(value, int) or math.isfinite(value))
            if not (finite and setting.holds(value)):
                word = "a whole number" if one is int else "a finite number"
                needed = " ".join([f"{key} must be {word}", setting.range()])
                raise UserError(f"{needed}, not {shown(value)}.")
        elif one in (bool, str) and not isinstance(value, one):
            word = "true or false" if one is bool else "a text"
            raise UserError(f"{key} must be {word}, not {shown(value)}.")
        if isinstance(value, str):
            _check_text(key, value, setting.longest)
        if setting.group:
            known = choices_of(setting.group, value)
            if value not in known and value in own_choices(setting.group):
                raise UserError(f"{key}={value} is a choice of your own: give it as {setting.group}={value}.")
            choice(key.removesuffix(".name"), value, known)
        elif setting.choices:
            choice(key, value, setting.choices)


def _check_text(key: str, text: str, longest: int) -> None:
    require(len(text) <= longest, f"{key} takes at most {longest} characters, not {len(text)}.")
    require(not HIDDEN.search(text), f"{key} has control characters: {shown(text)}.")


def validate_run(run: RunConfig, beside: RunConfig | None = None) -> None:
    """Raise UserError for settings of a run that are impossible or contradict each other. `beside` is the run
    that this one began as; a setting that is unchanged since then may be unread."""
    check_settings(run)
    check_read(run, beside)
    accumulate, memory_gb = run.accumulate, least_memory_gb(run)
    rows = run.batch_size // accumulate
    batch = "the batch" if accumulate == 1 else "each part of the batch"
    mistakes = {
        "model.width must be a multiple of model.heads.": run.model.width % run.model.heads,
        f"this run needs at least {memory_gb:.0f} GB of memory, and {MOST_MEMORY_GB} GB is the most that is "
        "tried: make model.width, model.blocks, model.context or batch_size smaller.": (
            memory_gb > MOST_MEMORY_GB
        ),
        f"accumulate={accumulate} must divide batch_size={run.batch_size} into equal parts.": (
            run.batch_size % accumulate
        ),
        f"budget.probe_sequences must leave rows of {batch} for the audit: 1 to {rows - 1}.": (
            run.budget.probe_sequences >= max(rows, 1)
        ),
    }
    refuse(mistakes)
    for group in OWN_GROUPS:
        part = getattr(run, group)
        require(
            part.name != CUSTOM or part.target is not None,
            f"{group}=custom needs {group}.target=module:function (docs/extending.md).",
        )
        if part.target is None and part.name not in groups()[group]:
            targets = any_of(offered().get(group, {}).get(part.name, ("?",)))
            called = f"{group}={part.name} is what installed packages call {targets}"
            raise UserError(f"{called}: choose one with {group}=custom {group}.target=….")
        _check_finite(f"{group}.arguments", part.arguments)
    decay = run.optimizer.weight_decay
    require(
        kind_of(run.optimizer) != CUSTOM or decay == 0,
        "optimizer.weight_decay is not given to your own optimizer: write what it takes as "
        f"optimizer.arguments, for example 'optimizer.arguments={{weight_decay: {decay}}}'.",
    )
    for part in parts_of(run):
        for refusal in part.refuses(run) if part.is_read(run) else ():
            raise UserError(refusal)
    check_modes(run)
    check_run(run)


def lacking(run: RunConfig) -> list[Need]:
    """Return the libraries that training the run needs and that are not installed. The checks of settings do
    not ask for them, because reading a recorded run needs none of them."""
    needs = [need for part in parts_of(run) if part.is_read(run) for need in part.needs()]
    return [need for need in needs if not machine.installed(need.module)]


def _check_finite(key: str, value: Any) -> None:
    """Raise UserError for NaN or an infinite number at any depth, because no record can hold one."""
    if isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            _check_finite(key, item)
    require(not isinstance(value, float) or math.isfinite(value), f"{key} takes finite numbers, not {value}.")


def warnings_of(run: RunConfig) -> list[str]:
    """Return a sentence for each setting of the run that is allowed but does less than it seems to."""
    return [warning for part in parts_of(run) for warning in part.warnings(run)]


def least_memory_gb(run: RunConfig) -> float:
    """Return a lower bound on the memory of a step, in GB. It counts the weights, gradients and two moments
    of the blocks' matrices, and ten float32 activations for each token, feature and block."""
    model = run.model
    weights = 16 * 12 * model.blocks * model.width**2
    return (weights + 40 * run.batch_size * model.context * model.width * model.blocks) / 1e9


def require_gpu() -> None:
    """Raise UserError, with the reason, if no GPU is visible."""
    require(bool(machine.visible_gpus()), f"device=cuda, but {machine.why_no_gpu()}.")


def check_run(run: RunConfig) -> None:
    """Raise UserError if a run's target KL is too small to be measured in the run's precision."""
    least = least_target_kl(run)
    require(
        run.stabilizer.name != "ebc" or run.budget.target_kl >= least,
        f"budget.target_kl={run.budget.target_kl:g} is below {least:g} nats, where its schedule ends below "
        f"ten times the smallest KL that {precision(run)} can show: raise it, or use budget=surrogate.",
    )


def least_target_kl(run: RunConfig) -> float:
    """Return the smallest target KL (nats/token) that the budget can measure, or 0 if it measures none."""
    if run.budget.name not in MEASURING:
        return 0.0
    return LEAST_TARGET_KL[precision(run)] / LEAST_MULTIPLIER.get(run.budget.schedule, 1.0)


def precision(run: RunConfig) -> str:
    """Return the lower of the autocast and parameter precisions. It limits how small a measured KL can be."""
    return "bfloat16" if "bfloat16" in (run.dtype, run.param_dtype) else "float32"

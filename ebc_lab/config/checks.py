"""What is refused of one run before anything is written, each mistake in one sentence."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from ebc_lab.ebc.options import LEAST_MULTIPLIER, LEAST_TARGET_KL, MEASURING

from .choices import OWN, choices_of, groups, kind_of, values_in_conf
from .dicts import type_hints
from .errors import HIDDEN, UserError, any_of, require, shown
from .fields import CUSTOM, Setting, default_of, setting_of
from .hints import near_choice
from .machine import installed
from .modes import check_modes
from .own.entry_points import offered
from .part import Need, Part
from .parts import PART, PARTS
from .schema import RunConfig

MOST_MEMORY_GB = 1000  # no GPU has as much, and few machines
LABEL = re.compile(r"[A-Za-z0-9]\w{0,59}", re.ASCII)  # of a user's own part, in names of runs


def choice(key: str, value: Any, allowed: Iterable[str]) -> None:
    known = list(allowed)
    if value not in known:  # what it is near to is looked for then alone: that takes longer than all checks
        near = near_choice(key, str(value), known)
        raise UserError(f"{key}={shown(value)} is unknown{near}; it takes {any_of(known)}.")


def check_settings(config: Any, path: str = "") -> None:
    """Refuse what a field's type and metadata do not allow, here and in dataclasses inside. Raises
    UserError."""
    cls: Any = type(config)
    kinds = type_hints(cls)
    of_own_part = path.rstrip(".") in OWN and kind_of(path.rstrip("."), config) == CUSTOM
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        key = path + field.name
        if dataclasses.is_dataclass(value):
            check_settings(value, f"{key}.")
            continue
        setting = setting_of(field)
        if of_own_part and field.name == "name":
            require(bool(LABEL.fullmatch(str(value))), f"{key}={shown(value)} must be letters, digits and _.")
            continue
        check_value(key, value, setting, kinds[field.name])


def set_in_vain(config: Any) -> dict[str, str]:
    """Setting -> what it goes with, of those in groups that are set although nobody reads them. A value that
    a file of `conf/` gives is not taken for one that was set."""
    vain: dict[str, str] = {}
    for group, settings in _groups_of(config):
        part = PART.get(group)
        reader, choices = (part.read_by if part else None) or ("", ())
        reading = getattr(config, reader).name if reader else ""
        for field in dataclasses.fields(settings):
            if not _is_set(group, field, settings):
                continue
            key = group if field.name == "name" else f"{group}.{field.name}"
            setting = setting_of(field)
            of = group if setting.of == "name" else f"{group}.{setting.of}"
            now = kind_of(group, settings) if setting.of == "name" else getattr(settings, setting.of)
            if reading not in choices and reader:
                vain[key] = f"{key} goes with {reader}={any_of(choices)}, not {reader}={reading}."
            elif setting.only and now not in setting.only:
                advice = f": write it as {group}.arguments" if now == CUSTOM else ""
                vain[key] = f"{key} goes with {of}={any_of(setting.only)}, not {of}={now}{advice}."
    return vain


def _groups_of(config: Any) -> list[tuple[str, Any]]:
    values = [(field.name, getattr(config, field.name)) for field in dataclasses.fields(config)]
    return [(name, value) for name, value in values if name in groups() and hasattr(value, "name")]


def _is_set(group: str, field: dataclasses.Field[Any], settings: Any) -> bool:
    value = getattr(settings, field.name)
    if value in (default_of(field), setting_of(field).before_it_existed):
        return False
    # every choice is in some file; of those that matter, none but the default is unset
    named = field.name == "name" and setting_of(field).in_run_id
    return named or value not in values_in_conf(group, settings.name, field.name)


def check_read(config: Any, beside: Any = None) -> None:
    """Refuse settings that nobody reads, but for those that `beside` has, too: what this began as, of whose
    study others may read them. Raises UserError."""
    for key, sentence in set_in_vain(config).items():
        require(beside is not None and value_at(config, key) == value_at(beside, key), sentence)


def value_at(config: Any, key: str) -> Any:
    """The value of `optimizer.beta1`; of `optimizer`, its name."""
    group, _, name = key.partition(".")
    return getattr(getattr(config, group), name or "name")


def check_value(key: str, value: Any, setting: Setting, kind: Any) -> None:
    """Refuse a value that this setting does not take. Raises UserError."""
    inside = typing.get_args(kind)
    if value is None:
        require(kind is Any or types.NoneType in inside, f"{key} must have a value.")
    elif isinstance(value, Mapping):
        require(kind is Any or typing.get_origin(kind) is dict, f"{key} takes one value, not {shown(value)}.")
        require(len(value) <= setting.most, f"{key} takes at most {setting.most} entries, not {len(value)}.")
        for name, item in value.items():
            _check_text(f"the names in {key}", str(name), 100)
            if setting.keys:
                choice(key, name, setting.keys)
            check_value(f"{key}.{name}", item, setting, inside[1] if inside else Any)
    elif isinstance(value, list):
        _check_list(key, value, setting, kind)
    elif dataclasses.is_dataclass(value):
        check_settings(value, f"{key}.")
    else:
        of_type = [k for k in (inside or (kind,)) if k is not types.NoneType]
        _check_one(key, value, setting, of_type[0])


def _check_list(key: str, value: list[Any], setting: Setting, kind: Any) -> None:
    require(
        kind is Any or typing.get_origin(kind) is list, f"{key} is one value, not a list: {shown(value)}."
    )
    require(bool(value) or not setting.least, f"{key} must not be empty.")
    require(len(value) >= setting.least, f"{key} needs {setting.least} values, not {len(value)}.")
    require(len(value) <= setting.most, f"{key} takes at most {setting.most} items, not {len(value)}.")
    for item in value:
        check_value(key, item, setting, (typing.get_args(kind) or (Any,))[0])
    if setting.increasing:
        require(value == sorted(set(value)), f"{key} must be increasing, without repeats: {shown(value)}.")
    if setting.unique:
        require(len(set(value)) == len(value), f"{key} must not name anything twice: {shown(value)}.")


def _check_one(key: str, value: Any, setting: Setting, kind: Any) -> None:
    """A single value: no list, no mapping, and there is one."""
    if kind in (int, float) or setting.numeric:
        number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        finite = number and (isinstance(value, int) or math.isfinite(value))
        if not (finite and setting.holds(value)):
            word = "a whole number" if kind is int else "a finite number"
            raise UserError(" ".join([f"{key} must be {word}", setting.range()]) + f", not {shown(value)}.")
    elif kind in (bool, str) and not isinstance(value, kind):
        raise UserError(f"{key} must be {'true or false' if kind is bool else 'a text'}, not {shown(value)}.")
    if isinstance(value, str):
        _check_text(key, value, setting.longest)
    if setting.group:
        choice(key.removesuffix(".name"), value, choices_of(setting.group, value))
    elif setting.choices:
        choice(key, value, setting.choices)


def _check_text(key: str, text: str, longest: int) -> None:
    require(len(text) <= longest, f"{key} takes at most {longest} characters, not {len(text)}.")
    require(not HIDDEN.search(text), f"{key} has control characters: {shown(text)}.")


def validate_run(run: RunConfig, beside: RunConfig | None = None) -> None:
    """Refuse impossible or contradictory settings of one run. `beside`: the run whose settings it began as,
    which may have settings that only others of a study read. Raises UserError."""
    check_settings(run)
    check_read(run, beside)
    require(run.model.width % run.model.heads == 0, "model.width must be a multiple of model.heads.")
    require(
        least_memory_gb(run) <= MOST_MEMORY_GB,
        f"this run needs at least {least_memory_gb(run):.0f} GB of memory, and {MOST_MEMORY_GB} GB is the "
        "most that is tried: make model.width, model.blocks, model.context or batch_size smaller.",
    )
    _check_accumulation(run)
    part = run.batch_size // run.accumulate
    of = "of the batch" if run.accumulate == 1 else "of each part of the batch"
    require(
        run.budget.probe_sequences < max(part, 1),
        f"budget.probe_sequences must leave rows {of} for the audit: 1 to {part - 1}.",
    )
    _check_own_parts(run)
    read = _parts_of(run)
    of_groups = (refusal for one in read for refusal in one.refuses(one.of(run)))
    between_groups = (refusal for one in read for refusal in one.clashes(one.of(run), run))
    for refusal in itertools.chain(of_groups, between_groups):
        raise UserError(refusal)
    check_modes(run)
    check_run(run)


def _parts_of(run: RunConfig) -> list[Part[Any]]:
    """The parts that the run reads."""
    return [one for one in PARTS if not one.read_by or getattr(run, one.read_by[0]).name in one.read_by[1]]


def lacking(run: RunConfig) -> list[Need]:
    """The libraries without which this process cannot train the run. Whoever reads a recorded run needs none
    of them, so no check of settings asks for them."""
    needs = [need for part in _parts_of(run) for need in part.needs(part.of(run))]
    return [need for need in needs if not installed(need.module)]


def _check_accumulation(run: RunConfig) -> None:
    """Refuse parts of a batch that are no equal ones. Raises UserError."""
    require(
        run.batch_size % run.accumulate == 0,
        f"accumulate={run.accumulate} must divide batch_size={run.batch_size} into equal parts.",
    )


def _check_own_parts(run: RunConfig) -> None:
    """Refuse own parts without a target, and what a run says beside them that they are not given. Raises
    UserError."""
    for group in OWN:
        part = getattr(run, group)
        require(
            part.name != CUSTOM or part.target is not None,
            f"{group}=custom needs {group}.target=module:function (docs/extending.md).",
        )
        if part.target is None and part.name not in groups()[group]:
            targets = any_of(offered(group).get(part.name, ("?",)))
            raise UserError(
                f"{group}={part.name} is what installed packages call {targets}: choose one with "
                f"{group}=custom {group}.target=…."
            )
        _check_finite(f"{group}.arguments", part.arguments)
    if kind_of("optimizer", run.optimizer) == CUSTOM:
        decay = run.optimizer.weight_decay
        require(
            decay == 0,
            "optimizer.weight_decay is not given to your own optimizer: write what it takes as "
            f"optimizer.arguments, for example 'optimizer.arguments={{weight_decay: {decay}}}'.",
        )


def _check_finite(key: str, value: Any) -> None:
    """Refuse a number that no record can hold, at any depth. Raises UserError."""
    if isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            _check_finite(key, item)
    require(not isinstance(value, float) or math.isfinite(value), f"{key} takes finite numbers, not {value}.")


def warnings_of(run: RunConfig) -> list[str]:
    """What is allowed and means less than it seems, a sentence each, for whoever starts the run."""
    return [warning for part in PARTS for warning in part.warnings(part.of(run), run)]


def least_memory_gb(run: RunConfig) -> float:
    """What a step of the run holds at the very least: weights, gradients and two moments of the blocks'
    matrices, and ten float32 activations for each token, feature and block."""
    model = run.model
    weights = 16 * 12 * model.blocks * model.width**2
    return (weights + 40 * run.batch_size * model.context * model.width * model.blocks) / 1e9


def require_gpu() -> None:
    """Refuse work for a GPU where there is none. Raises UserError."""
    from .machine import visible_gpus, why_no_gpu

    require(bool(visible_gpus()), f"device=cuda, but {why_no_gpu()}.")


def check_run(run: RunConfig) -> None:
    """Refuse a target KL that a resolved run's precision cannot measure. Raises UserError."""
    least = least_target_kl(run)
    require(
        run.stabilizer.name != "ebc" or run.budget.target_kl >= least,
        f"budget.target_kl={run.budget.target_kl:g} is below {least:g} nats, where its schedule ends below "
        f"ten times the smallest KL that {precision(run)} can show: raise it, or use budget=surrogate.",
    )


def least_target_kl(run: RunConfig) -> float:
    """The smallest target KL, nats per token, that a run's budget can hold in its precision; 0: any."""
    if run.budget.name not in MEASURING:
        return 0.0
    return LEAST_TARGET_KL[precision(run)] / LEAST_MULTIPLIER.get(run.budget.schedule, 1.0)


def precision(run: RunConfig) -> str:
    """The lower precision of a resolved run, which says how small a KL it can show."""
    return "bfloat16" if "bfloat16" in (run.dtype, run.param_dtype) else "float32"

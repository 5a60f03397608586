"""Configurations to and from nested plain dicts."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import Any

from .errors import UserError
from .fields import UNSET, setting_of
from .kinds import misfit
from .schema import GONE, KEPT_ELSEWHERE, Config, RunConfig


def run_part(config: RunConfig) -> RunConfig:
    """The part of a study's configuration that one run needs."""
    return RunConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(RunConfig)})


def study_part(config: Config) -> dict[str, Any]:
    """The settings of `study` that make it what it is: without where its files are also kept."""
    return {k: v for k, v in to_dict(config.study).items() if k not in KEPT_ELSEWHERE}


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dicts, ready for JSON. Like `dataclasses.asdict`, in a third of the time."""
    cls: Any = type(config)
    return {name: _plain(getattr(config, name)) for name in type_hints(cls)}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if dataclasses.is_dataclass(value):  # before what takes longer to ask
        return to_dict(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, keys joined by dots; an empty one stays as it is."""
    out: dict[str, Any] = {}
    for k, v in values.items():
        out |= flat(v, f"{prefix}{k}.") if isinstance(v, Mapping) and v else {prefix + k: v}
    return out


@functools.cache
def type_hints(cls: Any) -> dict[str, Any]:
    """Field -> its type, looked up once: it is slow, and a study asks for every run."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """The inverse of `to_dict`, also of an earlier version's. Raises UserError on an unknown key or a
    wrong type."""
    if wrong := misfit(values, cls):
        raise UserError(f"{cls.__name__} takes no such value ({wrong}).")
    return _built(cls, values)


def _built(cls: type, values: dict[str, Any]) -> Any:
    hints = type_hints(cls)
    values = {key: value for key, value in values.items() if key not in GONE.get(cls, {})}
    unknown = set(values) - set(hints)
    if unknown:
        raise UserError(
            f"{cls.__name__} has no {', '.join(sorted(unknown))}: the file was written by another version."
        )
    made = dict(_settings_younger_than_records(cls))
    for key, value in values.items():
        made[key] = _of_kind(hints[key], value)
    return cls(**made)


@functools.cache
def _settings_younger_than_records(cls: Any) -> dict[str, Any]:
    """Field -> what a record that lacks it stands for, where that is not the default."""
    of = {field.name: setting_of(field).before_it_existed for field in dataclasses.fields(cls)}
    return {name: absent for name, absent in of.items() if absent is not UNSET}


def _of_kind(kind: Any, value: Any) -> Any:
    if isinstance(value, dict) and dataclasses.is_dataclass(kind):
        return _built(typing.cast(type, kind), value)
    if isinstance(value, dict) and typing.get_origin(kind) is dict:
        return {k: _of_kind(typing.get_args(kind)[1], v) for k, v in value.items()}
    return value

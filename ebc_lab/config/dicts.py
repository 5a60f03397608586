"""Conversion of configurations to nested plain dicts and back."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import Any

import msgspec

from .errors import UserError, require
from .fields import UNSET, setting_of
from .schema import GONE, Config, RunConfig


def run_part(config: RunConfig) -> RunConfig:
    """Return the settings of one run from a study's configuration."""
    if type(config) is RunConfig:
        return config
    return RunConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(RunConfig)})


def study_part(config: Config) -> dict[str, Any]:
    """Return the settings of the group `study` that define a study: all but `mirror` and `mirror_every_s`."""
    return {k: v for k, v in to_dict(config.study).items() if k not in ("mirror", "mirror_every_s")}


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as nested plain dicts, ready for JSON."""
    settings: dict[str, Any] = msgspec.to_builtins(config)
    return settings


def named(part: Any) -> Any:
    """Return a stage's settings as nested plain dicts, without those that a hash of them leaves out: settings
    that came later and have the value at which they change nothing."""
    if dataclasses.is_dataclass(part):
        fields = {f.name: (getattr(part, f.name), setting_of(f).unnamed_at) for f in dataclasses.fields(part)}
        return {name: named(value) for name, (value, unnamed) in fields.items() if value != unnamed}
    return {key: named(value) for key, value in part.items()} if isinstance(part, dict) else part


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as one dict whose keys are joined by dots. An empty dict is kept as a value."""
    out: dict[str, Any] = {}
    for k, v in values.items():
        out |= flat(v, f"{prefix}{k}.") if isinstance(v, Mapping) and v else {prefix + k: v}
    return out


@functools.cache
def type_hints(cls: Any) -> dict[str, Any]:
    """Return the type of each field of a dataclass, by name; cached, since every run needs the types."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def misfit(value: Any, kind: Any) -> str | None:
    """Return what is wrong with a value read from JSON (`steps: expected …, got …`), or None if it fits.

    `kind`: a type hint, whose TypedDicts allow further keys. Raises TypeError if msgspec cannot check it.
    """
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at ")  # `$.steps`
        what = what[0].lower() + what[1:]
        return f"{place.strip('`$.')}: {what}" if place else what
    return None


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """Return the object that `to_dict` turned into `values`, in this version or an earlier one. Raises
    UserError if the values do not fit `cls`."""
    if wrong := misfit(values, cls):
        raise UserError(f"{cls.__name__} takes no such value ({wrong}).")
    return _built(cls, values)


def _built(cls: type, values: dict[str, Any]) -> Any:
    hints = type_hints(cls)
    values = {key: value for key, value in values.items() if key not in GONE.get(cls, {})}
    unknown = ", ".join(sorted(set(values) - set(hints)))
    require(not unknown, f"{cls.__name__} has no {unknown}: the file was written by another version.")
    made = {key: _value(hints[key], value) for key, value in values.items()}
    return cls(**(_settings_younger_than_records(cls) | made))


@functools.cache
def _settings_younger_than_records(cls: Any) -> dict[str, Any]:
    """Return, by field, the value that a record without the field implies, if it is not the default."""
    implied = {field.name: setting_of(field).before_it_existed for field in dataclasses.fields(cls)}
    return {name: value for name, value in implied.items() if value is not UNSET}


def _value(kind: Any, value: Any) -> Any:
    if isinstance(value, dict) and dataclasses.is_dataclass(kind):
        return _built(typing.cast(type, kind), value)
    if isinstance(value, dict) and typing.get_origin(kind) is dict:
        return {k: _value(typing.get_args(kind)[1], v) for k, v in value.items()}
    return value

"""Hydra overrides as users write them: parsing, checks and expansion before Hydra composes anything."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from .choices import groups, overridable
from .dicts import type_hints
from .errors import UserError, any_of, require, shown
from .fields import CUSTOM
from .hints import OWN_CHOICES, near_choice, near_setting
from .own.files import GROUP, beside_us, own_file
from .parts.tokens import TokensConfig, renamed
from .schema import GONE, Config

LONGEST = 4000  # characters of an override; for longer ones Hydra's parser takes seconds
LONGEST_TOGETHER = 40_000
DEEPEST = 20  # levels of nested lists and mappings; the parser recurses
LONG_NUMBER = re.compile(r"""(?<![\w./'"-])[-+]?([1-9][0-9_]{30,})(?![\w./'"-])""")  # not in quotes
MOST_COMBINATIONS = 1000  # of a sweep
FROM = "from"  # names the record of a study or a run to begin from
ONE_OR_MORE = ("mine", "rivals", "data.files", "data.val_files")  # lists whose only value needs no []
ARM = re.compile(r"ablation\.arms\.([^.]+)")


def check_overrides(
    overrides: Sequence[str], *, hydra_keys: bool = False, sweeps: bool = False
) -> dict[str, Any]:
    """Return the parsed values of overrides by key. Raises UserError for unknown groups, choices and keys.

    `hydra_keys` skips `hydra.…` and `hydra/…`, for `train`; `sweeps` accepts several values of a key.
    """
    known_groups = groups()
    keys = schema_keys()
    parsed: dict[str, Any] = {}
    for text, override in zip(overrides, parse(overrides), strict=True):
        key = override.key_or_group
        require(key != "hydra.searchpath", f"hydra.searchpath: {OWN_CHOICES}.")
        if hydra_keys and (key == "hydra" or key.startswith(("hydra.", "hydra/"))):
            continue
        if override.is_sweep_override() and not sweeps:
            needs = "that needs -m, one study or run for each"
            if keys.get(key) in (Any, str, str | None):
                _, _, value = text.partition("=")
                needs += f"; a comma inside one value is written in quotes, '{key}=\"{value}\"'"
            raise UserError(f"{shown(text)} names several values: {needs}.")
        if override.is_delete():
            if ARM.fullmatch(key):  # an arm, which `compose` leaves out
                continue
            raise UserError(f"{shown(text)}: settings cannot be deleted; give {key} another value.")
        if key == FROM:
            require(isinstance(override.value(), str), f"{shown(text)} is not the name of one file.")
        elif key in known_groups:
            several = override.is_sweep_override()
            for value in list(override.sweep_string_iterator()) if several else [override.value()]:
                _check_choice(key, value)
        elif key not in keys and not in_mapping(key):
            group, _, name = key.partition(".")
            if instead := GONE.get(keys.get(group, Config), {}).get(name):
                raise UserError(f"{key} is no setting any more: {instead}.")
            written = key or text.partition("=")[0]  # nothing stands before the @ of a package
            raise UserError(f"{shown(written)} is not a setting{near_setting(key, [*keys, *known_groups])}.")
        parsed[key] = override.value()
    return parsed


def parse(overrides: Sequence[str]) -> list[Any]:
    """Return overrides as Hydra parses them. Raises UserError if Hydra cannot read one, or only slowly."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    for text in overrides:
        require(len(text) <= LONGEST, f"{_key(text)} is given in {len(text)} characters: {LONGEST} at most.")
    together = sum(map(len, overrides))
    if together > LONGEST_TOGETHER:
        raise UserError(f"the overrides have {together} characters: {LONGEST_TOGETHER} at most.")
    parser = OverridesParser.create()
    parsed = []
    for text in map(renamed, overrides):
        key = _key(text)
        steps = ((c in "[{(") - (c in "]})") for c in text)
        if (depth := max(itertools.accumulate(steps), default=0)) > DEEPEST:
            raise UserError(f"{key} is given in brackets {depth} deep: {DEEPEST} at most.")
        try:
            override = parser.parse_override(text)
        except HydraException:
            example = "KEY=VALUE, for example scale=smoke"
            if "=" in text:
                example = f"text with spaces, brackets or other signs in quotes, \"{key}='…'\""
            written = f"{key}=…" if "://" in text else shown(text)  # an address may hold a secret
            raise UserError(f"{written!r} is not an override: write {example}.") from None
        if number := LONG_NUMBER.search(text):
            digits = len(number[1].replace("_", ""))
            raise UserError(f"{key} is given a number of {digits} digits: no setting takes more than 9.")
        parsed.append(override)
    return parsed


def _key(text: str) -> str:
    """Return the key of an override as messages show it."""
    return shown(text.partition("=")[0].lstrip("+~"))


def _check_choice(group: str, value: Any) -> None:
    """Raise UserError if `value` is not a choice of the group."""
    choices = overridable(group, value)
    if value not in choices:
        length = ", or how many tokens to train on, as 2e6" if group == TokensConfig.group_name else ""
        beside = beside_us(value) if group == GROUP else None
        near = f" (did you mean {beside}?)" if beside else near_choice(group, str(value), choices)
        raise UserError(f"{group}={shown(value)} is unknown{near}; {group} takes {any_of(choices)}{length}.")


@functools.cache
def schema_keys(cls: Any = Config, prefix: str = "") -> dict[str, Any]:
    """Return the type of every setting of a configuration, by dotted path."""
    keys: dict[str, Any] = {}
    for name, kind in type_hints(cls).items():
        keys[prefix + name] = kind
        if dataclasses.is_dataclass(kind):
            keys |= schema_keys(typing.cast(type, kind), f"{prefix}{name}.")
    return keys


def in_mapping(key: str) -> bool:
    """Return whether a key lies inside a setting that is a mapping, at any depth."""
    keys = schema_keys()
    parents = itertools.accumulate(key.split(".")[:-1], lambda a, b: f"{a}.{b}")
    return any(typing.get_origin(keys.get(parent)) is dict for parent in parents)


def spelled(override: str) -> str:
    """Return the override in Hydra's spelling: a number of tokens under its setting's name, the user's file
    of a choice as its registered name, and a mapping or an entry of one, new or not, with `++`.

    Overrides of arms stay as they are: `compose` merges a whole arm as it merges one from a suite's file.
    """
    override = renamed(override)
    written, _, choices = override.partition("=")
    key = written.lstrip("+")
    if key in groups():
        names = [name.strip().strip("'\"") for name in choices.split(",")]
        files = [(name, own_file(key, name)) for name in names]
        if any(file for _, file in files):
            override = f"{written}={','.join(file.chosen_name if file else name for name, file in files)}"
    override = listed(override)
    kind: Any = Config
    for name in key.split(".")[:-1]:
        if dataclasses.is_dataclass(kind):
            kind = type_hints(typing.cast(type, kind)).get(name)
        elif kind is not Any:
            kind = (typing.get_args(kind) or (None, None))[1]
    mappings = [k for k in (kind, schema_keys().get(key)) if typing.get_origin(k) is dict]
    values = [typing.get_args(k)[1] for k in mappings]
    of_any = kind is Any or any(not dataclasses.is_dataclass(value) for value in values)
    return f"++{override.lstrip('+')}" if of_any else override


def listed(override: str) -> str:
    """Return `mine=[./a.py:A]` for `mine=./a.py:A`, and likewise for the other settings in ONE_OR_MORE.
    Return any other override, such as a sweep over several values, unchanged."""
    key, _, value = override.partition("=")
    alone = key.lstrip("+") in ONE_OR_MORE and value.strip() and not value.lstrip().startswith("[")
    return f"{key}=[{value}]" if alone and "," not in value else override


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """Return the combinations of a sweep such as `optimizer.lr=1e-3,2e-3`, each a list of plain overrides.
    Raises UserError if the values cannot be listed or the combinations are too many."""
    from hydra.errors import HydraException

    try:
        plain = [_without_glob(o) for o in parse(overrides)]
        values = dict(map(_values, parse(plain)))  # the last value of a repeated key counts
        if math.prod(map(len, values.values())) > MOST_COMBINATIONS:
            raise UserError(f"-m asks for too many studies or runs: at most {MOST_COMBINATIONS} at a time.")
        check_overrides(plain, hydra_keys=True, sweeps=True)
    except HydraException as error:
        raise UserError(f"this sweep cannot be expanded: {str(error).splitlines()[0]}") from None
    return [list(combination) for combination in itertools.product(*values.values())]


def _values(override: Any) -> tuple[str, list[str]]:
    """Return the key of an override, and a plain override for each of its values, at most one more than is
    allowed. Raises UserError for a sweep whose values cannot be listed."""
    from hydra.core.override_parser.types import RangeSweep

    key = override.get_key_element()
    if not override.is_sweep_override():
        return key, [f"{key}={override.get_value_element_as_str()}"]
    if not override.is_discrete_sweep():
        raise UserError(f"{shown(override.input_line)} is no list of values: write them as {key}=1e-3,2e-3.")
    sweep = override.value()
    if isinstance(sweep, RangeSweep):
        bounds = [math.nan if x is None else float(x) for x in (sweep.start, sweep.stop, sweep.step)]
        if not sweep.step or not all(map(math.isfinite, bounds)):
            raise UserError(f"{override.input_line}: a range needs an end, and a step other than 0.")
    some = itertools.islice(override.sweep_string_iterator(), MOST_COMBINATIONS + 1)
    return key, [f"{key}={value}" for value in some]


def _without_glob(override: Any) -> str:
    """Return an override as it was written, with a `glob(…)` over a group replaced by the choices that it
    matches. `custom` is never among them, since it needs a target."""
    from hydra.core.override_parser.types import Glob

    value = override.value()
    if not isinstance(value, Glob):
        return str(override.input_line)
    choices = [name for name in groups().get(override.key_or_group, []) if name != CUSTOM]
    return f"{override.key_or_group}={','.join(value.filter(choices))}"


REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*(?:\.\w+)*)\}")


def refuse_references(settings: Any, path: str = "") -> None:
    """Raise UserError for a `${…}` that names anything but a setting. The environment, Hydra's own settings
    and the tracker's address, which may contain a password, must not enter the study's records."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            refuse_references(value, f"{path}.{key}" if path else str(key))
    elif isinstance(settings, list):
        for value in settings:
            refuse_references(value, path)
    elif isinstance(settings, str) and "${" in REFERENCE.sub(_allowed, settings):
        raise UserError(
            f"{path}: {shown(settings)} is not allowed, since a study keeps its settings: "
            "${…} may name another setting, as in ${batch_size}, and nothing else."
        )


def _allowed(match: re.Match[str]) -> str:
    """Return an empty string for a reference that is allowed, and any other reference unchanged."""
    name = match[1]
    kind = schema_keys().get(name)
    single = (kind is not None and not dataclasses.is_dataclass(kind)) or in_mapping(name)
    return "" if single and not name.startswith("tracker.") else match[0]

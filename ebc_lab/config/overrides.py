"""Hydra overrides as they are written: what is refused of them before Hydra composes anything."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .choices import choices_of, groups, own_suite
from .errors import UserError, any_of, require, shown
from .fields import CUSTOM
from .hints import near_choice, near_setting
from .own.suites import GROUP, beside_us, chosen_name
from .parts.tokens import TOKENS, renamed
from .schema import Config

LONGEST = 4000  # characters of an override; longer ones take Hydra's parser seconds
LONGEST_TOGETHER = 40_000
DEEPEST = 20  # lists and mappings inside each other; its parser recurses
MOST_DIGITS = 30
MOST_COMBINATIONS = 1000  # of a sweep
MINE = "mine"
FROM = "from"  # the file of a study or a run that the settings begin with
ONE_OR_MORE = (MINE, "data.files", "data.val_files")  # lists of which a single value may stand alone
ARM = re.compile(r"ablation\.arms\.([^.]+)")


def check_overrides(
    overrides: Sequence[str], *, hydra_keys: bool = False, sweeps: bool = False
) -> dict[str, Any]:
    """Refuse unknown groups, choices and keys; return {key: value as written}.

    `hydra_keys` accepts `hydra.…` and `hydra/…`, for `train`; `sweeps` accepts several values of a key.
    Raises UserError.
    """
    known_groups = groups()
    keys = schema_keys()
    parsed: dict[str, Any] = {}
    for text, override in zip(overrides, parse(overrides), strict=True):
        key = override.key_or_group
        if hydra_keys and (key == "hydra" or key.startswith(("hydra.", "hydra/"))):
            continue
        if override.is_sweep_override() and not sweeps:
            raise UserError(f"{shown(text)} names several values: that needs -m, one study or run for each.")
        if override.is_delete() and ARM.fullmatch(key):
            continue  # an arm can be left out, which `compose` does
        if override.is_delete():
            raise UserError(f"{shown(text)}: settings cannot be deleted; give {key} another value.")
        if key == FROM:
            require(isinstance(override.value(), str), f"{shown(text)} is not the name of one file.")
        elif key in known_groups:
            _check_choices(override)
        elif key not in keys and not in_mapping(key):
            raise UserError(f"{shown(key)} is not a setting{near_setting(key, [*keys, *known_groups])}.")
        parsed[key] = override.value()
    return parsed


def parse(overrides: Sequence[str]) -> list[Any]:
    """Hydra's own objects for these overrides. Raises UserError for what its parser cannot take, or would
    take minutes for."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    for text in overrides:
        if len(text) > LONGEST:
            raise UserError(f"{_key(text)} is given in {len(text)} characters: {LONGEST} at most.")
    together = sum(map(len, overrides))
    if together > LONGEST_TOGETHER:
        raise UserError(f"the overrides have {together} characters: {LONGEST_TOGETHER} at most.")
    parser = OverridesParser.create()
    parsed = []
    for text in map(renamed, overrides):
        key = _key(text)
        if (depth := _depth(text)) > DEEPEST:
            raise UserError(f"{key} is given in brackets {depth} deep: {DEEPEST} at most.")
        try:
            override = parser.parse_override(text)
        except HydraException:
            example = "KEY=VALUE, for example scale=smoke"
            if "=" in text:
                example = f"text with spaces, brackets or other signs in quotes, \"{key}='…'\""
            said = f"{key}=…" if "://" in text else shown(text)  # an address may hold a secret
            raise UserError(f"{said!r} is not an override: write {example}.") from None
        digits = max((len(str(abs(x))) for x in _integers(override.value())), default=0)
        if digits > MOST_DIGITS:
            raise UserError(f"{key} is given a number of {digits} digits: no setting takes more than 9.")
        parsed.append(override)
    return parsed


def _key(text: str) -> str:
    return shown(text.partition("=")[0].lstrip("+~"))


def _depth(text: str) -> int:
    steps = ((c in "[{(") - (c in "]})") for c in text)
    return max(itertools.accumulate(steps), default=0)


def _integers(value: Any) -> Iterator[int]:
    """The whole numbers in a value, at any depth, and those of a sweep."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _integers(key)
            yield from _integers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _integers(inner)
    elif dataclasses.is_dataclass(value):
        yield from _integers(list(vars(value).values()))


def _check_choices(override: Any) -> None:
    group = override.key_or_group
    several = override.is_sweep_override()
    for value in list(override.sweep_string_iterator()) if several else [override.value()]:
        choices = choices_of(group, value)
        if value not in choices:
            length = ", or how many tokens to train on, as 2e6" if group == TOKENS.name else ""
            beside = beside_us(value) if group == GROUP else None
            near = f" (did you mean {beside}?)" if beside else near_choice(group, str(value), choices)
            raise UserError(
                f"{group}={shown(value)} is unknown{near}; {group} takes {any_of(choices)}{length}."
            )


@functools.cache
def schema_keys() -> dict[str, Any]:
    """Dotted path of every setting, and its type."""

    def walk(cls: type, prefix: str) -> Iterator[tuple[str, Any]]:
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            kind = hints[f.name]
            yield prefix + f.name, kind
            if dataclasses.is_dataclass(kind):
                yield from walk(typing.cast(type, kind), f"{prefix}{f.name}.")

    return dict(walk(Config, ""))


def in_mapping(key: str) -> bool:
    """Whether a key lies inside a setting that is a mapping, at any depth."""
    keys = schema_keys()
    parents = itertools.accumulate(key.split(".")[:-1], lambda a, b: f"{a}.{b}")
    return any(typing.get_origin(keys.get(parent)) is dict for parent in parents)


def spelled(override: str) -> str:
    """The override as Hydra wants it: a mapping, or an entry of one, there already or new, is set with `++`,
    and a number of tokens under the name of its setting.

    Arms are left alone: `compose` merges a whole one as a suite's file would be."""
    override = listed(_with_suites(renamed(override)))
    key = override.partition("=")[0].lstrip("+")
    kind: Any = Config
    for name in key.split(".")[:-1]:
        if dataclasses.is_dataclass(kind):
            kind = typing.get_type_hints(kind).get(name)
        elif kind is not Any:
            kind = (typing.get_args(kind) or (None, None))[1]
    mappings = [k for k in (kind, schema_keys().get(key)) if typing.get_origin(k) is dict]
    values = [typing.get_args(k)[1] for k in mappings]
    of_any = kind is Any or any(not dataclasses.is_dataclass(value) for value in values)
    return f"++{override.lstrip('+')}" if of_any else override


def listed(override: str) -> str:
    """The override as a list where it is a single `mine=./a.py:A` or `data.files=a/*.bin`; any other, a sweep
    over several among them, as it is."""
    key, _, value = override.partition("=")
    alone = key.lstrip("+") in ONE_OR_MORE and value.strip() and not value.lstrip().startswith("[")
    return f"{key}=[{value}]" if alone and "," not in value else override


def _with_suites(override: str) -> str:
    """The override with each file of a suite under the name that Hydra knows it by."""
    key, _, values = override.partition("=")
    if key.lstrip("+") != GROUP:
        return override
    names = [value.strip().strip("'\"") for value in values.split(",")]
    files = [(value, own_suite(value)) for value in names]
    return f"{key}={','.join(chosen_name(file) if file else value for value, file in files)}"


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """The combinations of a sweep (`optimizer.lr=1e-3,2e-3`), lists of plain overrides. Raises UserError."""
    from hydra.errors import HydraException

    try:
        plain = [_listed(o) for o in parse(overrides)]
        parsed = parse(plain)
        combinations = math.prod(map(_values, parsed))
        if combinations > MOST_COMBINATIONS:
            raise UserError(
                f"-m asks for {combinations} studies or runs: at most {MOST_COMBINATIONS} at a time."
            )
        check_overrides(plain, hydra_keys=True, sweeps=True)
        values = dict(map(_written, parsed))  # of a key given twice the last one counts
        return [list(combination) for combination in itertools.product(*values.values())]
    except HydraException as error:
        raise UserError(f"this sweep cannot be expanded: {str(error).splitlines()[0]}") from None


def _written(override: Any) -> tuple[str, list[str]]:
    """A key, and the override as written for each of its values. Raises UserError for a sweep that cannot be
    listed."""
    key = override.get_key_element()
    if not override.is_sweep_override():
        return key, [f"{key}={override.get_value_element_as_str()}"]
    if not override.is_discrete_sweep():
        raise UserError(f"{shown(override.input_line)} is no list of values: write them as {key}=1e-3,2e-3.")
    return key, [f"{key}={value}" for value in override.sweep_string_iterator()]


def _values(override: Any) -> int:
    """How many values a sweep gives a key, without listing them."""
    from hydra.core.override_parser.types import ChoiceSweep, RangeSweep

    sweep = override.value()
    if isinstance(sweep, ChoiceSweep):
        return len(sweep.list)
    if not isinstance(sweep, RangeSweep):
        return 1
    start, stop, step = (math.nan if x is None else float(x) for x in (sweep.start, sweep.stop, sweep.step))
    if not step or not math.isfinite(start + stop + step):
        raise UserError(f"{override.input_line}: a range needs an end, and a step other than 0.")
    return max(1, math.ceil((stop - start) / step))


def _listed(override: Any) -> str:
    """An override as it was written, `glob(…)` over a group replaced by the choices it matches, of which
    `custom` is none: it needs a target."""
    from hydra.core.override_parser.types import Glob

    value = override.value()
    if not isinstance(value, Glob):
        return str(override.input_line)
    choices = [name for name in groups().get(override.key_or_group, []) if name != CUSTOM]
    return f"{override.key_or_group}={','.join(value.filter(choices))}"


REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*(?:\.\w+)*)\}")


def refuse_references(settings: Any, path: str = "") -> None:
    """Refuse every `${…}` but those that name another setting: the environment, Hydra's own settings and the
    tracker, whose address may contain a password, would enter the study's records. Raises UserError."""
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
    name = match[1]
    kind = schema_keys().get(name)
    single = (kind is not None and not dataclasses.is_dataclass(kind)) or in_mapping(name)
    return "" if single and not name.startswith("tracker.") else match[0]

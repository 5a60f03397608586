"""The meaning, unit and allowed values of a setting, kept in the metadata of its dataclass field.

`checks.check_settings` enforces the allowed values, and docs/settings.md is generated from the metadata.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

T = TypeVar("T")
UNSET = object()
CUSTOM = "custom"  # the choice, in groups that have a `target`, that stands for a user's own part
OWN = (CUSTOM,)
OWN_TARGET = "of custom: module:function, which {} (docs/extending.md)"
OWN_ARGUMENTS = "of custom: what the function is also given"
OWN_CHECKSUM = "of custom: checksum of the module's file; filled in, then enforced"

# Limits that several settings share: far beyond any real study, but low enough that a typing error is refused
# at once instead of being planned for minutes.
STEPS = 10**8  # a run of a day at a thousand steps a second
SEED = 10**9  # accepted by every random number generator
LR: dict[str, Any] = {"low": 1e-12, "high": 1e6}  # grids that double or halve it stay finite and above 0
MULTIPLE: dict[str, Any] = {"low": 1e-4, "high": 1e4}  # of a measured best; an arm's name cannot spell less
LENGTH: dict[str, Any] = {"unit": "steps", "low": 1, "high": STEPS}
LENGTH_OR_0: dict[str, Any] = {**LENGTH, "low": 0}
EVEN_UNREAD: dict[str, Any] = {"in_run_id_even_unread": True}
GRID: dict[str, Any] = {"low": 1e-9, "high": 1e9, "increasing": True}


@dataclass(frozen=True)
class Setting:
    """The meaning of a field and its allowed values. In a list, range and choices apply to each item."""

    about: str = ""
    unit: str = ""
    choices: Sequence[str] = ()
    group: str = ""  # the folder of conf/ whose files are the choices
    low: float | None = None  # the smallest value allowed
    above: float | None = None  # values must be greater than this
    high: float | None = None
    below: float | None = None
    least: int = 0  # fewest items of a list
    most: int = 100  # most items of a list or entries of a mapping: more would train for months
    longest: int = 1000  # most characters of a text, such as a path: tables and pictures show it
    unique: bool = False
    increasing: bool = False
    texts: bool = False  # a text or a list of texts, whatever the field's type says
    keys: Sequence[str] = ()  # those that a mapping may have; empty: any
    only: Sequence[str] = ()  # the choices under which this setting is read; empty: all
    by: str = "name"  # the setting in the same group whose value `only` lists
    unnamed_at: Any = UNSET  # the value at which it changes nothing and is left out of a run's identity
    before_it_existed: Any = UNSET  # the value that a record without it implies, if not the default
    in_run_id: bool = True  # whether it can change a run's numbers, and is part of its identity
    in_run_id_even_unread: bool = False  # stays in the identity where it is not read, as it always has

    @property
    def numeric(self) -> bool:
        """Return whether the setting has a range; its field then holds numbers, whatever its type says."""
        return (self.low, self.above, self.high, self.below) != (None,) * 4

    def holds(self, number: float) -> bool:
        """Return whether a number lies in the range; NaN never does."""
        return (
            (self.low is None or number >= self.low)
            and (self.above is None or number > self.above)
            and (self.high is None or number <= self.high)
            and (self.below is None or number < self.below)
        )

    def range(self) -> str:
        """Return the range in words, such as `>= 0 and < 1`, or an empty string if there is none."""
        bounds = {">=": self.low, ">": self.above, "<=": self.high, "<": self.below}
        return " and ".join(f"{sign} {_bound(value)}" for sign, value in bounds.items() if value is not None)


def _bound(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def number(value: float, digits: int = 3) -> str:
    """Return a number as written in names, such as `1p5` or `1e-05`, with `digits` significant digits."""
    return f"{value:.{digits}g}".replace(".", "p").replace("+", "")


def setting(
    default: T, about: str, unit: str = "", low: float | None = None, high: float | None = None, **limits: Any
) -> T:
    """Return a dataclass field with this default. `limits` are the other fields of the field's `Setting`."""
    metadata = {"setting": Setting(about, unit, low=low, high=high, **limits)}
    if isinstance(default, list | dict):
        made: Any = dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    else:
        made = dataclasses.field(default=default, metadata=metadata)
    return cast(T, made)


ANYTHING = Setting()


def setting_of(field: dataclasses.Field[Any]) -> Setting:
    """Return the `Setting` of a field, or one that accepts any value if `setting` did not make the field."""
    return cast(Setting, field.metadata.get("setting", ANYTHING))


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return the default value of a field. A list or mapping is a fresh copy."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()

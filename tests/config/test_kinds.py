"""Values against type hints."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, TypedDict

import pytest

from ebc_lab.config.dicts import from_dict, to_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.kinds import check_form, misfit
from ebc_lab.config.schema import Config


class Named(TypedDict):
    name: str
    about: NotRequired[str | None]


class Loose(TypedDict, total=False):
    loss: float | None
    rows: list[Named]


@dataclass
class Settings:
    count: int = 1
    grids: dict[str, list[float]] = field(default_factory=dict)
    free: dict[str, Any] = field(default_factory=dict)


class Unchecked(TypedDict):
    rows: list[dict[str, set[int]]]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ({"name": "a"}, Named),
        ({"name": "a", "about": None, "more": 3}, Named),
        ({}, Loose),
        ({"loss": 1, "rows": [{"name": "a"}]}, Loose),
        ({"loss": None}, Loose),
        ({"count": 3, "grids": {"adam": [1, 2.5]}, "free": {"x": [None]}}, Settings),
        ({"code": -9}, dict[str, int]),
        ([1, "a"], tuple[int, str]),
        ([1, 2, 3], tuple[int, ...]),
        ([1, "a"], tuple),
        ({"a": [1.5, None]}, Mapping[str, Sequence[float | None]]),
        ({"a": [1.5, None]}, typing.Mapping[str, typing.Sequence[typing.Optional[float]]]),  # noqa: UP045
        ({"a": ["x"]}, Mapping),
        (["x", {}], Sequence),
        (["x", {}], typing.List),  # noqa: UP006
    ],
)
def test_what_fits(value, kind):
    assert misfit(value, kind) is None


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        ({}, Named, "name is missing"),
        ({"name": None}, Named, "name is null, not text"),
        ({"name": "a", "about": 3}, Named, "about is a whole number, not text"),
        ({"rows": [{"name": "a"}, {}]}, Loose, "rows[1].name is missing"),
        ({"loss": float("nan")}, Loose, "loss is a number out of range, not a finite number"),
        ({"grids": {"adam": [1, "x"]}}, Settings, "grids.adam[1] is text, not a finite number"),
        ({"count": False}, Settings, "count is true or false, not a whole number"),
        ("x", Settings, "it is text, not a mapping"),
        ([1], tuple[int, str], "it has 1 values, not 2"),
        ([1, 2], tuple[int, str], "[1] is a whole number, not text"),
        ([1, "a"], tuple[int, ...], "[1] is text, not a whole number"),
        ({"a": [1, "x"]}, Mapping[str, Sequence[float]], "a[1] is text, not a finite number"),
        ([], Mapping[str, float], "it is a list, not a mapping"),
        ("text", Sequence[str], "it is text, not a list"),
    ],
)
def test_what_does_not_fit_is_named_by_its_place(value, kind, words):
    assert misfit(value, kind) == words


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (set[int], r"^set\[int\] cannot be checked in a file"),
        (Unchecked, r"^Unchecked\.rows: set\[int\] cannot be checked"),
        (dict[str, Unchecked | None], r"^Unchecked\.rows: set\[int\] cannot be checked"),
        (Mapping[int, float], r"Mapping\[int, float\] cannot be checked"),  # keys of JSON are text
        (list["Named"], r"^'Named' cannot be checked"),
        (Literal["a"], r"^typing\.Literal\['a'\] cannot be checked"),
        (bytes, "bytes"),
        ({"rate": float}, "dict"),
    ],
)
def test_a_form_that_cannot_be_checked_is_refused_whatever_the_value(kind, words):
    with pytest.raises(TypeError, match=words):
        check_form(kind)
    for value in (None, {}, [], {"rows": []}):
        with pytest.raises(TypeError, match=words):
            misfit(value, kind)


def test_every_default_setting_is_of_its_own_kind_and_others_are_refused():
    settings = to_dict(Config())
    assert from_dict(Config, settings) == Config()
    with pytest.raises(UserError, match=r"Config takes no such value \(seeds\[0\] is text"):
        from_dict(Config, settings | {"seeds": ["x"]})

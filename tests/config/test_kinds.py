"""Values against type hints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict

import pytest

from ebc_lab.config.dicts import from_dict, to_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.kinds import misfit
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
    ],
)
def test_what_does_not_fit_is_named_by_its_place(value, kind, words):
    assert misfit(value, kind) == words


def test_every_default_setting_is_of_its_own_kind_and_others_are_refused():
    settings = to_dict(Config())
    assert from_dict(Config, settings) == Config()
    with pytest.raises(UserError, match=r"Config takes no such value \(seeds\[0\] is text"):
        from_dict(Config, settings | {"seeds": ["x"]})

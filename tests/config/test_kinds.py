"""Values against type hints."""

import importlib
import typing
from pathlib import Path

import house
import msgspec
import pytest

from ebc_lab.config.dicts import from_dict, to_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import Config

ROOT = Path(__file__).parent.parent.parent


def test_every_typed_dict_of_the_package_can_be_checked():
    sources = house.modules(ROOT)
    modules = [importlib.import_module(m) for m, path in sources.items() if "(TypedDict" in path.read_text()]
    kinds = {kind for m in modules for kind in vars(m).values() if typing.is_typeddict(kind)}
    for kind in kinds:
        msgspec.json.Decoder(kind)  # a TypeError where a hint of it cannot be checked
    assert len(kinds) > 50


def test_every_default_setting_is_of_its_own_kind_and_others_are_refused():
    settings = to_dict(Config())
    assert from_dict(Config, settings) == Config()
    with pytest.raises(
        UserError, match=r"Config takes no such value \(seeds\[0\]: expected `int`, got `str`"
    ):
        from_dict(Config, settings | {"seeds": ["x"]})


def test_a_setting_that_this_version_does_not_have_is_refused_wherever_it_stands():
    for settings in (
        {"surprise": 1},
        {"optimizer": {"surprise": 1}},
        {"ablation": {"arms": {"a": {"b": 1}}}},
    ):
        with pytest.raises(UserError, match="the file was written by another version"):
            from_dict(Config, settings)


def test_whole_numbers_stay_whole_where_any_number_goes():
    """A run's name is the digest of its settings, in which 1 and 1.0 differ."""
    rate = from_dict(Config, {"optimizer": {"lr": 1}}).optimizer.lr
    assert isinstance(rate, int)

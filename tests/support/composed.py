"""Configurations that tests compose again and again: Hydra makes each of them once in a process."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
from hydra._internal import config_loader_impl as loader
from hydra._internal.config_loader_impl import ConfigLoaderImpl as Loader
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource

from ebc_lab.config import compose as module
from ebc_lab.config.errors import UserError
from ebc_lab.config.own.files import conf_dir
from ebc_lab.config.schema import Config

# where a study lies and what it is called differs from test to test, and has no say in any other setting
PLACE = re.compile(r"(output_dir|study\.name)=([A-Za-z/][\w./-]*)")
CHANGING = r"\bgiven\b|\bown-"  # in what Hydra is told of a user's own files, and of given entries
WORDS_OF_YAML = {"true", "false", "yes", "no", "on", "off", "null", "nan", "inf"}


def refused(overrides: Sequence[str], **how: bool) -> str:
    """The one sentence with which overrides of the scale smoke are refused."""
    with pytest.raises(UserError) as caught:
        module.compose(["scale=smoke", *overrides], **how)
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 600, said
    return said


@contextmanager
def composed_once() -> Iterator[None]:
    """What Hydra makes of the same overrides is remembered, and every caller gets its own copy.

    Compositions that read a user's own files, entries given as overrides, or another folder than `conf` are
    made anew each time, and so is everything that is refused.
    """
    compose = module._composed
    usual = conf_dir()
    known: dict[tuple[str, ...], bytes] = {}

    def remembering(
        overrides: Sequence[str], own: Sequence[Any], values: Mapping[str, Any], recorded: Any
    ) -> Config:
        if own or recorded or conf_dir() != usual:
            return compose(overrides, own, values, recorded)
        places = {o: match for o in overrides if (match := _place(o))}
        rest = tuple(o for o in overrides if o not in places)
        if rest not in known:
            others = {k: v for k, v in values.items() if k not in [match[1] for match in places.values()]}
            known[rest] = pickle.dumps(compose(rest, own, others, None))
        config: Config = pickle.loads(known[rest])
        for match in places.values():
            key, value = match.groups()
            study = replace(config.study, name=value)
            config = (
                replace(config, study=study) if key == "study.name" else replace(config, output_dir=value)
            )
        return config

    with mock.patch.object(module, "_composed", remembering):
        yield


def _place(override: str) -> re.Match[str] | None:
    match = PLACE.fullmatch(override)
    return None if match is None or match[2].lower() in WORDS_OF_YAML else match


@contextmanager
def conf_read_once() -> Iterator[None]:
    """What Hydra makes of the same choices from `conf` is remembered: files are read and merged once, then
    only single settings are set, on a copy. Forgotten as soon as something else is stored for Hydra to find.

    A composition takes 27 ms so, and not 198; `composed_once` makes 11 of a repeated one.
    """
    folder = conf_dir().resolve()
    files: dict[str, bytes] = {}
    lists: dict[Any, DefaultsList] = {}
    merged: dict[Any, bytes] = {}
    list_of, store = loader.create_defaults_list, ConfigStore.store
    merge = Loader._compose_config_from_defaults_list
    Plugins.instance()  # fills the registry, with classes that are not those one would import
    reader = SourcesRegistry.instance().types["file"]
    read = reader.load_config

    def lasting(repo: Any, choices: Any) -> bool:
        """Whether these choices mean the same next time: they are of `conf`, not one's own files or arms."""
        from_conf = any(source.path == str(folder) for source in repo.get_sources())
        return from_conf and not re.search(CHANGING, str(choices))

    def remembered_file(self: ConfigSource, config_path: str) -> ConfigResult:
        if self.path != str(folder):
            return read(self, config_path)
        if config_path not in files:
            files[config_path] = pickle.dumps(read(self, config_path))
        result: ConfigResult = pickle.loads(files[config_path])
        return result

    def remembered_list(
        repo: Any, config_name: Any, overrides_list: Any, prepend_hydra: bool, skip_missing: bool
    ) -> DefaultsList:
        settings = Overrides(repo=repo, overrides_list=overrides_list).config_overrides
        choices = tuple(o.input_line for o in overrides_list if o not in settings)
        key = (config_name, choices, prepend_hydra, skip_missing)
        if key in lists and lasting(repo, choices):
            return replace(lists[key], config_overrides=settings)
        made = list_of(repo, config_name, overrides_list, prepend_hydra, skip_missing)
        if lasting(repo, choices):
            lists[key] = made
        return made

    def remembered_merge(self: Loader, defaults: Any, repo: Any) -> Any:
        key = tuple(map(repr, defaults))
        if not lasting(repo, key):
            return merge(self, defaults, repo)
        if key not in merged:
            merged[key] = pickle.dumps(merge(self, defaults, repo))
        return pickle.loads(merged[key])

    def stored(self: ConfigStore, name: str, node: Any, group: str | None = None, **more: Any) -> None:
        if not re.search(CHANGING, f"{group}/{name}"):
            lists.clear()
            merged.clear()
        store(self, name, node, group, **more)

    def light(self: CachingConfigRepository, delegate: Any) -> None:
        """Without a copy of all that is stored: nobody changes it."""
        self.delegate = copy.copy(delegate)
        self.cache = {}

    with (
        mock.patch.object(reader, "load_config", remembered_file),
        mock.patch.object(loader, "create_defaults_list", remembered_list),
        mock.patch.object(Loader, "_compose_config_from_defaults_list", remembered_merge),
        mock.patch.object(ConfigStore, "store", stored),
        mock.patch.object(CachingConfigRepository, "__init__", light),
    ):
        yield

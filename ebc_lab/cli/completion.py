"""What a shell offers behind <TAB>: settings and their values, stages, studies. No torch, no Hydra.

Every command imports this module: the settings are read only where something is to be completed.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

from .options import OUTPUT_DIR


def overrides(incomplete: str) -> list[str]:
    """Settings whose names begin like this, or the values that fit the one that is named."""
    from ebc_lab.config.choices import groups

    key, text = _split(incomplete)
    if key is not None:
        before = "" if incomplete == "=" else incomplete[: len(incomplete) - len(text)]
        return [before + value for value in _beginning(text, values(key.lstrip("+")))]
    near = _beginning(incomplete, groups())
    if len(near) == 1:  # nothing else can be meant before the sign: its choices are offered at once
        near = [f"{near[0]}={choice}" for choice in values(near[0])]
        return [*near, *(f"{key}=" for key in _settings(incomplete))]
    inside = "." in incomplete or not near
    tops = [key for key in _settings(incomplete) if inside or "." not in key]
    return [f"{name}=" for name in [*near, *tops]]


def stages() -> list[str]:
    """Names of stages, of which typer offers those that begin like the word."""
    from ebc_lab.config.schema import STAGES

    return [*STAGES]


def studies(ctx: typer.Context) -> list[str]:
    """Names of the studies in the output folder, and bundles in this one."""
    from ebc_lab.records.paths import HEADER

    folder = Path(str((ctx.params or {}).get("output_dir") or OUTPUT_DIR)).expanduser()
    names = sorted(path.parent.name for path in folder.glob(f"*/{HEADER}"))
    bundles = sorted(path.name for place in {folder, Path()} for path in place.glob("*.zip"))
    return [*names, *bundles]


def values(key: str) -> list[str]:
    """What a group or a setting takes, where that can be listed."""
    from ebc_lab.config.choices import groups, overridable
    from ebc_lab.config.fields import setting_of
    from ebc_lab.config.overrides import schema_keys
    from ebc_lab.config.schema import Config

    if key in groups():
        return overridable(key, None)
    parent, _, name = key.rpartition(".")
    owner = schema_keys().get(parent) if parent else Config
    fields: Any = getattr(owner, "__dataclass_fields__", {})
    if name not in fields:
        return []
    about = setting_of(fields[name])
    if about.choices or about.group:
        return [*(about.choices or groups()[about.group])]
    return ["true", "false"] if schema_keys()[key] is bool else []


def _split(incomplete: str) -> tuple[str | None, str]:
    """The setting whose value is being written, if there is one, and its last value so far.

    Bash takes `=` for the border of a word: `optimizer=ad` arrives as three, the last of which is asked for.
    """
    words = os.environ.get("COMP_WORDS", "").split()
    now = int(os.environ.get("COMP_CWORD") or 0)
    if "=" in incomplete and incomplete != "=":
        key, _, text = incomplete.partition("=")
        return key, text.rpartition(",")[2].lstrip("[")
    if incomplete == "=" and now >= 1 and words[now - 1 : now]:
        return words[now - 1], ""
    if now >= 2 and words[now - 1 : now] == ["="]:
        return words[now - 2], incomplete.rpartition(",")[2].lstrip("[")
    return None, ""


def _beginning(text: str, words: Iterable[str]) -> list[str]:
    return [word for word in words if word.startswith(text)]


def _settings(incomplete: str) -> list[str]:
    """Settings with a value of their own whose names begin like this; choices are given by their group."""
    from ebc_lab.config.choices import groups
    from ebc_lab.config.overrides import schema_keys

    known = groups()
    by_group = {*known, *(f"{group}.name" for group in known if group != "study")}
    named = [key for key, kind in schema_keys().items() if not dataclasses.is_dataclass(kind)]
    return [key for key in _beginning(incomplete, named) if key not in by_group]

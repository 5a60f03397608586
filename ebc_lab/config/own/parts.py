"""Parts defined by the user, which replace built-in choices: names, source files, checksums and functions.

The functions here that read or change the user-defined parts of a configuration use `with_own_parts`.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
import sys
import unicodedata
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..choices import OWN_GROUPS, groups, written_out
from ..errors import UserError, any_of, naming, require, shown
from ..fields import CUSTOM
from ..schema import STAGES, Config, EntryConfig, RunConfig
from . import sources

WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
LONGEST = 40  # characters in an own part's name, which names of arms and runs contain
KEEPS_NAMES = "carry."  # prefix of the paths of own parts that keep their given names, as in older runs

Settings = TypeVar("Settings", bound=RunConfig)


class OwnPart(NamedTuple):
    """A user-defined part in a configuration, and the path of the part's settings."""

    path: str  # `optimizer`, or `ablation.arms.hot: optimizer`
    group: str
    settings: Mapping[str, Any]

    @property
    def target(self) -> str:
        """Return the target, which names the part's function, as the user or a package wrote it."""
        return str(self.settings["target"])

    @property
    def name(self) -> str:
        """Return the part's name, or `custom` if none was given."""
        return str(self.settings.get("name", CUSTOM))


Change = Callable[[OwnPart], Mapping[str, Any]]  # returns the settings to change in a part


def with_own_parts(config: Settings, change: Change) -> Settings:
    """Return the configuration with `change` applied to every user-defined part: first the parts of the run,
    then those in a study's arms and other entries. Malformed entries are left for later checks."""
    changed: dict[str, Any] = {}
    for group in OWN_GROUPS:
        part = getattr(config, group)
        if part.target is not None:
            changed[group] = dataclasses.replace(part, **change(OwnPart(group, group, vars(part))))
    if isinstance(config, Config):
        for stage in STAGES:
            whole = getattr(config, stage)
            for key in [key for key, entries in vars(whole).items() if isinstance(entries, Mapping)]:
                entries = {
                    name: _with_entry(f"{stage}.{key}.{name}: ", entry, change)
                    for name, entry in getattr(whole, key).items()
                }
                whole = dataclasses.replace(whole, **{key: entries})
            changed[stage] = whole
    return dataclasses.replace(config, **changed)


def _with_entry(where: str, entry: Any, change: Change) -> Any:
    """Return an entry of a study or a candidate with its user-defined choices written out, and `change`
    applied to its own parts."""
    if isinstance(entry, EntryConfig):
        return dataclasses.replace(entry, settings=_with_entry(where, entry.settings, change))
    if not isinstance(entry, Mapping):
        return entry
    made = dict(entry)
    for group, given in entry.items():
        if group in groups() and isinstance(given, Mapping):
            with naming(where.rstrip(": ")):
                settings = made[group] = written_out(group, given)
            if group in OWN_GROUPS and isinstance(settings.get("target"), str):
                made[group] = {**settings, **change(OwnPart(where + group, group, settings))}
    return made


def own_parts(config: RunConfig) -> list[OwnPart]:
    """Return all user-defined parts in the configuration of a run or study."""
    found: list[OwnPart] = []

    def note(part: OwnPart) -> Mapping[str, Any]:
        found.append(part)
        return {}

    with_own_parts(config, note)
    return found


# -- names ---------------------------------------------------------------------------------------------------


def own_name(target: str, taken: Collection[str] = ()) -> str:
    """Return a name made from a target: cautious from `my_opt:Cautious`, my_adam_w2 from `lib.MyAdamW2`.

    `taken`: names of other things, such as choices in `conf`, which a suffix (`_2`, `_3` …) avoids.
    """
    plain = unicodedata.normalize("NFKD", re.split(r"[.:]", target)[-1]).encode("ascii", "ignore").decode()
    words = re.sub(r"\W+", "_", WORDS.sub("_", plain)).strip("_").lower()
    name = re.sub("_+", "_", words)[:LONGEST] or "own"
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    return next(one for one in itertools.chain([name], numbered) if one not in taken)


def with_names(config: Settings) -> Settings:
    """Return the configuration with the target of each user-defined part written as `module:function`, and
    each name `custom` replaced by one made from the target. Parts in `carry` are left as they are. Raises
    UserError if a source file is missing, or if two different files have the same name."""
    parts = [part for part in own_parts(config) if part.name != CUSTOM]
    given = {(part.group, part.name): _plain(part.target) for part in parts}  # names in use -> target
    files: dict[str, Path] = {}

    def placed(key: str, target: str) -> str:
        try:
            made = sources.placed(target)
        except LookupError as error:
            raise UserError(f"{key}={shown(target)}: {error.args[0]}.") from None
        if file := sources.file_of(target):
            known = files.setdefault(file.stem, file)
            require(known == file, f"{key}: {known} and {file} have the same name: rename one of them.")
        return made

    def called(part: OwnPart) -> dict[str, Any]:
        if part.path.startswith(KEEPS_NAMES):
            return {}
        target = placed(f"{part.path}.target", part.target)
        name = part.name
        if name == CUSTOM:
            others = [n for (g, n), t in given.items() if g == part.group and t != _plain(target)]
            name = own_name(target, [*groups()[part.group], *others])
            given[part.group, name] = _plain(target)
        return {"target": target, "name": name}

    made = with_own_parts(config, called)
    if not isinstance(made, Config):
        return made
    sweep, custom = made.lr_sweep, config.optimizer.name == CUSTOM and made.optimizer.name
    if custom:  # the sweep may still call the study's own optimizer `custom`
        swept = [custom if one == CUSTOM else one for one in sweep.optimizers]
        renames = CUSTOM in sweep.grids and custom not in sweep.grids
        grids = {custom if renames and one == CUSTOM else one: grid for one, grid in sweep.grids.items()}
        sweep = dataclasses.replace(sweep, optimizers=swept, grids=grids)
    mine = list(dict.fromkeys(placed("mine", target) for target in made.mine))
    return dataclasses.replace(made, lr_sweep=sweep, mine=mine)


def _plain(target: str) -> str:
    """Return a target as `module:function`. A malformed target is left for `find` to refuse."""
    if file := sources.file_of(target):
        return f"{file.stem}:{target.rpartition(':')[2]}"
    return target if ":" in target else ":".join(target.rsplit(".", 1))


# -- files ---------------------------------------------------------------------------------------------------


def with_sources(config: Settings) -> Settings:
    """Return the configuration with the checksum of each user-defined part filled in, and the target written
    as `module:function`. In a study, the source files of the parts are added to `own_files`.

    Raises UserError if a target is not found, if two different files have the same name, or if a source file
    does not have the checksum in the settings.
    """
    files: dict[str, str] = {}

    def sourced(part: OwnPart) -> dict[str, Any]:
        key = f"{part.path}.target={shown(part.target)}"
        try:
            source = sources.find(part.target)
        except LookupError as error:
            raise UserError(f"{key}: {error.args[0]}.") from None
        sha256 = part.settings.get("sha256")
        require(
            sha256 in (None, source.sha256),
            f"{part.path}.sha256={shown(sha256)} is not the checksum of {source.path}, {source.sha256}: put "
            f"that file back, or leave {part.path}.sha256 out.",
        )
        for name, path in source.files.items():
            known = Path(files.setdefault(name, str(path)))
            require(
                known == path or known.read_bytes() == path.read_bytes(),
                f"{key}: {known} and {path} have the same name: rename one of them.",
            )
        return {"target": source.target, "sha256": source.sha256}

    made = with_own_parts(config, sourced)
    if isinstance(made, Config):
        made = dataclasses.replace(made, own_files={**made.own_files, **files})
    return made


def refuse_edited(now: RunConfig, before: RunConfig, remedy: str) -> None:
    """Raise UserError if source files of a run's user-defined parts have changed since the run began.
    `before` is the run as it began, and `now` is the run as it is."""
    for group in OWN_GROUPS:
        part, old = getattr(now, group), getattr(before, group)
        if part.target is not None and part.target == old.target and part.sha256 != old.sha256:
            files = any_of([str(path) for path in sources.find(part.target).files.values()] or ["its file"])
            raise UserError(
                f"{group}.target={part.target}: {files} has changed since this run was begun: put the "
                f"old one back, or {remedy}."
            )


# -- the functions -------------------------------------------------------------------------------------------


def describe_own_part(part: Any) -> str:
    """Return a user-defined part as error messages name it, `optimizer.target=my_opt:Cautious
    (my_opt.py:12)`. The file and line are omitted for an installed package."""
    source = sources.find(part.target)
    return f"{part.group_name}.target={part.target}{f' ({source.place})' if source.files else ''}"


def own_part(part: Any) -> Callable[..., Any]:
    """Import the function of a part's target and return it, wrapped to add the part's `arguments`.

    Raises UserError if the function is not found, or if its source files have changed since the run was
    planned. The wrapper raises UserError if the function does not take what it is given or ignores an
    argument. Errors of the function itself are passed on.
    """
    group = part.group_name
    try:
        function = sources.load(part.target, part.sha256 or "")
    except LookupError as error:
        raise UserError(f"{group}.target={part.target}: {error.args[0]}.") from None
    key = describe_own_part(part)

    def called(*positional: Any, **named: Any) -> Any:
        twice = [name for name in part.arguments if name in named]
        require(not twice, f"{group}.arguments: {', '.join(twice)} is given by the run itself: leave it out.")
        try:
            inspect.signature(function).bind(*positional, **named, **part.arguments)
        except TypeError as error:
            words = ", ".join([f"{len(positional)} positional", *named, *part.arguments])
            raise UserError(f"{key} does not take what it is given ({words}): {error}.") from None
        except ValueError:  # a function without a signature, written in C
            pass
        made = function(*positional, **named, **part.arguments)
        ignored = [name for name in part.arguments if not _is_read(name, function, made)]
        require(
            not ignored,
            f"{group}.arguments: {part.target} takes {', '.join(ignored)} and does nothing with it: correct "
            "the name, or leave it out.",
        )
        return made

    return called


def _is_read(name: str, function: Any, made: Any) -> bool:
    """Return whether the function seems to read the argument `name`. Only a class that takes `**options` is
    examined, because it may silently ignore a misspelled argument, or merely store it in an optimizer's
    `defaults`."""
    init = getattr(function, "__init__", None)
    code = getattr(init, "__code__", None)
    if not inspect.isclass(function) or code is None or not code.co_flags & inspect.CO_VARKEYWORDS:
        return True
    modules = {sys.modules.get(one.__module__) for one in function.__mro__}
    if any(re.search(rf"\b{name}\b", _text(module)) for module in modules):
        return True
    options = inspect.getfullargspec(init).varkw or ""
    text = _text(code)
    passed_on = not text or len(re.findall(rf"\b{options}\b|\blocals\(", text)) > 1  # once: never used
    return passed_on and name not in getattr(made, "defaults", {})


def _text(code: Any) -> str:
    """Return the source text of a module or code object, or an empty string if there is none."""
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):
        return ""

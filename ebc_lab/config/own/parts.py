"""A user's own parts, each of which takes the place of a choice: named, found, hashed, and called.

Every function here that changes or looks at the own parts of a configuration walks it with `with_own_parts`.
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

from ..choices import OWN_GROUPS, choices_of, groups, offered_target
from ..errors import UserError, any_of, require, shown
from ..fields import CUSTOM
from ..schema import ArmConfig, CarrySettingConfig, Config, RunConfig, UnitConfig
from . import sources

# mappings of a study whose entries change settings of a run: their stage, and their key in it
ENTRIES = (
    ("ablation", "arms"),
    ("controller_search", "candidates"),
    ("carry", "arms"),
    ("carry", "settings"),
)
WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
LONGEST = 40  # characters: names of arms and runs are made of it
KEEPS_NAMES = "carry."  # an own part there is called as it is given: runs were named so

Settings = TypeVar("Settings", bound=RunConfig)


class OwnPart(NamedTuple):
    """A part of a user's own, and where it stands."""

    path: str  # `optimizer`, or `ablation.arms.hot: optimizer`
    group: str
    settings: Mapping[str, Any]

    @property
    def target(self) -> str:
        """Return the function that it is made of, as the user or a package wrote it."""
        return str(self.settings["target"])

    @property
    def name(self) -> str:
        """Return what it is called; `custom` where nobody has said."""
        return str(self.settings.get("name", CUSTOM))


Change = Callable[[OwnPart], Mapping[str, Any]]  # the settings of a part that become others


def with_own_parts(config: Settings, change: Change) -> Settings:
    """Return the configuration with every own part changed: those of the run, then those that the entries of
    a study bring. What is no part at all is left for the checks of its stage to refuse."""
    changed: dict[str, Any] = {}
    for group in OWN_GROUPS:
        part = getattr(config, group)
        if part.target is not None:
            changed[group] = dataclasses.replace(part, **change(OwnPart(group, group, vars(part))))
    if isinstance(config, Config):
        for stage, key in ENTRIES:
            whole = changed.get(stage, getattr(config, stage))
            entries = {
                name: _with_entry(f"{stage}.{key}.{name}: ", entry, change)
                for name, entry in getattr(whole, key).items()
            }
            changed[stage] = dataclasses.replace(whole, **{key: entries})
    return dataclasses.replace(config, **changed)


def _with_entry(where: str, entry: Any, change: Change) -> Any:
    """Return an arm, a setting of `carry` or a candidate with its own parts changed."""
    if isinstance(entry, ArmConfig | UnitConfig | CarrySettingConfig):
        return dataclasses.replace(entry, settings=_with_entry(where, entry.settings, change))
    if not isinstance(entry, Mapping):
        return entry
    made = dict(entry)
    for group in OWN_GROUPS:
        settings = entry.get(group)
        if not isinstance(settings, Mapping):
            continue
        name = settings.get("name")
        if name in choices_of(group, name) and name not in groups()[group]:
            settings = {"target": offered_target(group, str(name)), **settings}
        if isinstance(settings.get("target"), str):
            made[group] = {**settings, **change(OwnPart(where + group, group, settings))}
    return made


def own_parts(config: RunConfig) -> list[OwnPart]:
    """Return every own part of a run or a study."""
    found: list[OwnPart] = []

    def note(part: OwnPart) -> Mapping[str, Any]:
        found.append(part)
        return {}

    with_own_parts(config, note)
    return found


# -- names ---------------------------------------------------------------------------------------------------


def own_name(target: str, taken: Collection[str] = ()) -> str:
    """Return the name of a part with this target: cautious for `my_opt:Cautious`, my_adam_w2 for
    `lib.MyAdamW2`.

    `taken`: names that mean something else (choices of `conf`, other parts); instead of these it gets `_2` …
    """
    plain = unicodedata.normalize("NFKD", re.split(r"[.:]", target)[-1]).encode("ascii", "ignore").decode()
    words = re.sub(r"\W+", "_", WORDS.sub("_", plain)).strip("_").lower()
    name = re.sub("_+", "_", words)[:LONGEST] or "own"
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    return next(one for one in itertools.chain([name], numbered) if one not in taken)


def with_names(config: Settings) -> Settings:
    """Return the configuration whose own parts have `module:function` for a target, and a name that says what
    they are wherever it said `custom`. Raises UserError where there is no such file, or two of a name."""
    parts = [part for part in own_parts(config) if part.name != CUSTOM]
    given = {(part.group, part.name): _plain(part.target) for part in parts}  # so that one name means one
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
    if custom:  # a sweep calls the study's own optimizer `custom`
        swept = [custom if one == CUSTOM else one for one in sweep.optimizers]
        unsaid = CUSTOM in sweep.grids and custom not in sweep.grids
        grids = {custom if unsaid and one == CUSTOM else one: grid for one, grid in sweep.grids.items()}
        sweep = dataclasses.replace(sweep, optimizers=swept, grids=grids)
    mine = list(dict.fromkeys(placed("mine", target) for target in made.mine))
    return dataclasses.replace(made, lr_sweep=sweep, mine=mine)


def _plain(target: str) -> str:
    """Return a target as `module:function`; one that is written in no such way stays for `find` to refuse."""
    if file := sources.file_of(target):
        return f"{file.stem}:{target.rpartition(':')[2]}"
    return target if ":" in target else ":".join(target.rsplit(".", 1))


# -- files ---------------------------------------------------------------------------------------------------


def with_sources(config: Settings) -> Settings:
    """Return the configuration whose own parts have the checksum of their files, and their target as
    `module:function`. The files join the `own_files` of a study.

    Raises UserError where a target is not found, or its file is not the one whose checksum the settings name.
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
    """Raise UserError where a run was begun with other files of its own parts; `now` has their checksums."""
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
    """Return an own part as errors name it, `optimizer.target=my_opt:Cautious (my_opt.py:12)`: with the line
    of its function, unless that is of an installed package."""
    source = sources.find(part.target)
    return f"{part.group_name}.target={part.target}{f' ({source.place})' if source.files else ''}"


def own_part(part: Any) -> Callable[..., Any]:
    """Return the function of a part's target, imported. Call it with what the functions of the part's group
    take; it gets the part's `arguments` as well.

    Raises UserError where its file is no longer the one that the run was planned with, or, when it is called,
    where it does not take what it is given. What the function itself raises is passed on.
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
    """Return whether a class reads an argument. Some take any into `**options`, so that a misspelled one
    is lost, or is left in the `defaults` of an optimizer where nothing asks for it."""
    init = getattr(function, "__init__", None)
    code = getattr(init, "__code__", None)
    if not inspect.isclass(function) or code is None or not code.co_flags & inspect.CO_VARKEYWORDS:
        return True
    modules = {sys.modules.get(one.__module__) for one in function.__mro__}
    if any(re.search(rf"\b{name}\b", _text(module)) for module in modules):
        return True
    options = inspect.getfullargspec(init).varkw or ""
    text = _text(code)
    passed_on = not text or len(re.findall(rf"\b{options}\b|\blocals\(", text)) > 1  # once: only taken
    return passed_on and name not in getattr(made, "defaults", {})


def _text(code: Any) -> str:
    """Return the source of a module or a function; empty where there is none, as of one written in C."""
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):
        return ""

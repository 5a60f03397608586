"""The choices in `conf/`: where they are, what they set, and the error for an unknown one; and a user's own
parts, which take the place of one."""

from __future__ import annotations

import contextlib
import dataclasses
import dis
import functools
import inspect
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import CodeType
from typing import Any, TypeVar

from .dicts import type_hints
from .errors import UserError, any_of, nearest, require, shown
from .fields import CUSTOM
from .own import sources, suites
from .own.entry_points import offered
from .own.names import own_name
from .part import is_own
from .parts import PARTS
from .parts.controller import ControllerConfig
from .parts.determinism import DeterminismConfig
from .parts.optimizer import OptimizerConfig
from .parts.stabilizer import StabilizerConfig
from .schema import ArmConfig, CarrySettingConfig, Config, ProfiledWorkloadConfig, RunConfig

# groups whose settings mean nothing under another name
FRESH = {"controller": ControllerConfig, "optimizer": OptimizerConfig, "stabilizer": StabilizerConfig}
OWN = ("optimizer", "stabilizer", "lr_schedule", "model")  # groups that take a `target`
# stage and key of the entries of a study that may have such parts
TAKE_OWN = (("ablation", "arms"), ("carry", "arms"), ("carry", "settings"))


def conf_dir() -> Path:
    """Folder of the Hydra groups: inside the package in an installed wheel, at the root of a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


@functools.cache
def groups() -> dict[str, list[str]]:
    """Each configuration group and its choices, from the files in `conf`."""
    return {
        d.name: sorted(f.stem for f in d.glob("*.yaml")) for d in sorted(conf_dir().iterdir()) if d.is_dir()
    }


@functools.cache
def listed_choices() -> dict[str, str]:
    """Return the choices that conf/config.yaml names, by their groups."""
    from omegaconf import OmegaConf

    listed: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "config.yaml"))
    return {k: v for entry in listed["defaults"] if isinstance(entry, dict) for k, v in entry.items()}


def further_choices() -> dict[str, str]:
    """Return those of the parts that it does not name, as their dataclasses have them."""
    return {part.name: part.settings().name for part in PARTS if part.name not in listed_choices()}


@functools.cache
def read_choice(group: str, name: str) -> dict[str, Any]:
    """What a choice's file sets: `read_choice("optimizer", "adam")`; of one that an installed package offers,
    what that of `custom` sets, with its target. Raises UserError for an unknown one."""
    from omegaconf import OmegaConf

    known = choices_of(group, name)
    if name in known and name not in groups()[group]:
        return {**read_choice(group, CUSTOM), "name": name, "target": _offered_target(group, name)}
    if name not in known:
        raise UserError(
            f"{group}={shown(name)} is unknown{nearest(name, known)}; {group} takes {any_of(known)}."
        )
    loaded = OmegaConf.to_container(OmegaConf.load(conf_dir() / group / f"{name}.yaml"))
    return typing.cast(dict[str, Any], loaded)


@functools.cache
def values_in_conf(group: str, name: str, field: str) -> list[Any]:
    """The values that files of `conf` give a setting: that of its group's choice, and those of the scales."""
    files = [read_choice("scale", scale).get(group) for scale in groups()["scale"]]
    if name in groups()[group]:
        files.append(read_choice(group, name))
    return [settings[field] for settings in files if isinstance(settings, Mapping) and field in settings]


def optimizer_defaults(name: str) -> OptimizerConfig:
    """An optimizer's settings as its file in `conf/optimizer` gives them."""
    return typing.cast(
        OptimizerConfig, _changed(OptimizerConfig(), read_choice("optimizer", name), "optimizer.")
    )


def changed(run: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """A run with some settings changed, `{budget: {name: surrogate, aggregate: l2}, dtype: float32}`.

    A group's `name` brings what its file in `conf` sets. A controller, optimizer or stabilizer then has only
    that file's settings; other groups keep the run's own where the file sets nothing. The learning rate stays
    the run's.
    A part with a `target` of its own may have any name.
    Raises UserError for a setting that a run does not have.
    """
    whole: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and "name" in value and key in groups():
            if not isinstance(value["name"], str):
                raise UserError(f"{key}.name must be a text, not {shown(value['name'])}.")
            fresh = dataclasses.asdict(FRESH[key]()) if key in FRESH else {}
            labelled = value.get("target") is not None and value["name"] not in groups()[key]
            fresh |= read_choice(key, CUSTOM if labelled and key in OWN else value["name"])
            if key == "optimizer":
                del fresh["lr"]
            value = {**fresh, **value}
        whole[key] = value
    return typing.cast(RunConfig, _changed(run, whole, ""))


def with_size(run: RunConfig, arm: ArmConfig | CarrySettingConfig | ProfiledWorkloadConfig) -> RunConfig:
    """The run at the arm's length, batch and width, which stays a multiple of the heads."""
    heads = run.model.heads
    per_head = round(run.model.width * arm.width_scale / heads)
    return dataclasses.replace(
        run,
        steps=max(1, round(run.steps * arm.steps)),
        batch_size=max(1, round(run.batch_size * arm.batch_scale)),
        model=dataclasses.replace(run.model, width=heads * max(1, per_head)),
    )


def under(run: RunConfig, mode: str, parts: int) -> RunConfig:
    """The run under a mode of determinism, its batch in so many parts by that mode's own setting."""
    settings: dict[str, Any] = {"name": mode}
    exact = DeterminismConfig(mode).exact
    if exact:
        settings["micro_batches"] = parts
    return changed(run, {"determinism": settings, "accumulate": 1 if exact else parts})


def _changed(config: Any, settings: Mapping[str, Any], path: str) -> Any:
    kind: Any = type(config)
    hints = type_hints(kind)
    out = {}
    for key, value in settings.items():
        if key not in hints:
            raise UserError(f"{path}{key} is not a setting of a run{nearest(str(key), list(hints))}.")
        now = getattr(config, key)
        if dataclasses.is_dataclass(now):
            if not isinstance(value, Mapping):
                raise UserError(
                    f"{path}{key} holds several settings: write {{{key}: {{name: {shown(value)}}}}}."
                )
            out[key] = _changed(now, value, f"{path}{key}.")
        else:
            number = isinstance(value, int) and not isinstance(value, bool)
            out[key] = (
                float(value) if number and float in (hints[key], *typing.get_args(hints[key])) else value
            )
    return dataclasses.replace(config, **out)


# -- a user's own parts --------------------------------------------------------------------------------------


def choices_of(group: str, name: object) -> list[str]:
    """The choices of a group; where `name` is none in `conf`, also those that installed packages offer, which
    take a twentieth of a second to list. Of a study also those of the working folder, and a file's path."""
    known = groups()[group]
    if group == suites.GROUP:
        path = [name] if isinstance(name, str) and suites.is_path(name) and own_suite(name) else []
        return [*path, *dict.fromkeys([*suites.own_suites(conf_dir()), *known])]
    return known if name in known else [*known, *(n for n in offered(group) if n not in known)]


def own_suite(choice: object) -> Path | None:
    """The file of a choice of `study` that is the user's own; None for another. Raises UserError where it is
    given as a path and there is none."""
    try:
        return suites.suite_file(choice, conf_dir())
    except LookupError as error:
        raise UserError(f"study={shown(choice)} {error.args[0]}.") from None


def offered_parts(group: str) -> list[dict[str, Any]]:
    """What each choice sets that installed packages offer and `conf` does not have; of one that two packages
    offer, nothing but its name."""
    targets = {name: target for name, target in offered(group).items() if name not in groups()[group]}
    single = {name: {"target": target[0]} for name, target in targets.items() if len(target) == 1}
    return [{**read_choice(group, CUSTOM), "name": name, **single.get(name, {})} for name in targets]


def _offered_target(group: str, name: str) -> str:
    targets = offered(group)[name]
    require(
        len(targets) == 1,
        f"{group}={name} is offered by several installed packages ({any_of(targets)}): choose one with "
        f"{group}=custom {group}.target=….",
    )
    return targets[0]


def kind_of(group: str, part: Any) -> str:
    """Which choice of `conf` a part of a run is: its name, or `custom` where it has a target and a name of
    its own."""
    is_custom = getattr(part, "target", None) is not None and is_own(part, groups()[group])
    return CUSTOM if is_custom else str(part.name)


Settings = TypeVar("Settings", bound=RunConfig)


class _Names:
    """The names and files of all own parts of a configuration, so that one means one."""

    def __init__(self, config: RunConfig):
        self.given = {(group, name): _plain(t) for group, name, t in _named(config) if name != CUSTOM}
        self.files: dict[str, Path] = {}

    def target(self, key: str, target: Any) -> Any:
        """`my_opt:Cautious` for `./my_opt.py:Cautious`. Raises UserError: no such file, or two of a name."""
        if not isinstance(target, str):
            return target
        try:
            made = sources.placed(target)
        except LookupError as error:
            raise UserError(f"{key}={shown(target)}: {error.args[0]}.") from None
        if written := sources.BY_PATH.fullmatch(target):
            file = sources.file_of(written)
            known = self.files.setdefault(file.stem, file)
            require(known == file, f"{key}: {known} and {file} have the same name: rename one of them.")
        return made

    def name(self, group: str, name: Any, target: str) -> Any:
        """The part's name: as it is given, or after its function."""
        if name != CUSTOM:
            return name
        of_others = [n for (g, n), t in self.given.items() if g == group and t != _plain(target)]
        made = own_name(target, [*groups()[group], *of_others])
        self.given[group, made] = _plain(target)
        return made


def _plain(target: str) -> str:
    """The target as `module:function`, where it is one: a mistake in it is told where the part is."""
    with contextlib.suppress(LookupError):
        target = sources.placed(target)
    return target if ":" in target else ":".join(target.rsplit(".", 1))


def _named(config: RunConfig) -> Iterator[tuple[str, str, str]]:
    """(group, name, target) of every own part."""
    for group in OWN:
        part = getattr(config, group)
        if part.target is not None:
            yield group, part.name, part.target
    for settings in _arms(config).values():
        for group, part in settings.items():
            if group in OWN and isinstance(part, Mapping) and part.get("target") and "name" in part:
                yield group, str(part["name"]), str(part["target"])


def _arms(config: RunConfig) -> dict[str, Mapping[str, Any]]:
    """Where an arm or a candidate is set -> the settings that it changes."""
    if not isinstance(config, Config):
        return {}
    arms = {f"ablation.arms.{name}": arm.settings for name, arm in config.ablation.arms.items()}
    tried = config.controller_search.candidates
    candidates = {f"controller_search.candidates.{n}": s for n, s in tried.items() if isinstance(s, Mapping)}
    return {**arms, **candidates}


def with_names(config: Settings) -> Settings:
    """The configuration whose own parts have `module:function` for a target and a name that says what they
    are, wherever it said `custom`. Raises UserError."""
    names = _Names(config)
    parts: dict[str, Any] = {}
    for group in OWN:
        part = getattr(config, group)
        if part.target is not None:
            target = names.target(f"{group}.target", part.target)
            parts[group] = dataclasses.replace(part, target=target, name=names.name(group, part.name, target))
    if isinstance(config, Config):
        parts |= _of_study(config, names)
        if config.optimizer.name == CUSTOM and "optimizer" in parts:
            parts["lr_sweep"] = _swept(config, parts["optimizer"].name)
    return dataclasses.replace(config, **parts)


def _of_study(config: Config, names: _Names) -> dict[str, Any]:
    suite, search = config.ablation, config.controller_search
    arms: dict[str, ArmConfig] = {
        name: dataclasses.replace(arm, settings=_renamed(f"ablation.arms.{name}", arm.settings, names))
        for name, arm in suite.arms.items()
    }
    candidates = {
        name: _renamed(f"controller_search.candidates.{name}", candidate, names)
        if isinstance(candidate, Mapping)
        else candidate
        for name, candidate in search.candidates.items()
    }
    return {
        "ablation": dataclasses.replace(suite, arms=arms),
        "controller_search": dataclasses.replace(search, candidates=candidates),
        "mine": list(dict.fromkeys(names.target("mine", target) for target in config.mine)),
    }


def _renamed(where: str, settings: Mapping[str, Any], names: _Names) -> dict[str, Any]:
    """The settings by which an arm changes a run, likewise."""
    made = dict(settings)
    for group, part in settings.items():
        if group in OWN and isinstance(part, Mapping) and isinstance(part.get("target"), str):
            target = names.target(f"{where}: {group}.target", part["target"])
            name = names.name(group, part.get("name", CUSTOM), target)
            made[group] = {**part, "name": name, "target": target}
    return made


def _swept(config: Config, name: str) -> Any:
    """The sweep of a study whose own optimizer it calls `custom`."""
    sweep = config.lr_sweep
    return dataclasses.replace(
        sweep,
        optimizers=[name if one == CUSTOM else one for one in sweep.optimizers],
        grids={
            name if one == CUSTOM and name not in sweep.grids else one: g for one, g in sweep.grids.items()
        },
    )


def with_sources(settings: Settings) -> Settings:
    """Settings whose own parts have the checksum of their file and their target as `module:function`; of a
    study, those of its arms, of its carry's settings and of its controller search's candidates, too.

    The files that they are made of join `own_files`. Raises UserError where a target is not found, or its
    file is not the one whose checksum the settings name.
    """
    sourced = {group: getattr(settings, group) for group in OWN}
    files: dict[str, str] = {}
    parts: dict[str, Any] = {
        group: dataclasses.replace(part, **_sourced(group, part.target, part.sha256, files))
        for group, part in sourced.items()
        if part.target is not None
    }
    if isinstance(settings, Config):
        for stage, key in TAKE_OWN:
            whole = parts.get(stage, getattr(settings, stage))
            entries = {
                name: dataclasses.replace(
                    entry, settings=_with_sources(f"{stage}.{key}.{name}: ", entry.settings, files)
                )
                for name, entry in getattr(whole, key).items()
            }
            parts[stage] = dataclasses.replace(whole, **{key: entries})
        search = settings.controller_search
        candidates = {
            # what is no settings is refused, in its words, by what checks the stage
            name: _with_sources(f"controller_search.candidates.{name}: ", candidate, files)
            if isinstance(candidate, Mapping)
            else candidate
            for name, candidate in search.candidates.items()
        }
        parts["controller_search"] = dataclasses.replace(search, candidates=candidates)
        parts["own_files"] = {**settings.own_files, **files}
    return dataclasses.replace(settings, **parts)


def _with_sources(where: str, settings: Mapping[str, Any], files: dict[str, str]) -> dict[str, Any]:
    """The same of the settings by which an arm changes a run."""
    made = dict(settings)
    for group, value in settings.items():
        if group not in OWN or not isinstance(value, Mapping):
            continue
        name = value.get("name")
        if name in choices_of(group, name) and name not in groups()[group]:
            value = {"target": _offered_target(group, str(name)), **value}
        if value.get("target") is not None:
            made[group] = {**value, **_sourced(where + group, value["target"], value.get("sha256"), files)}
    return made


def _sourced(key: str, target: str, sha256: str | None, files: dict[str, str]) -> dict[str, Any]:
    """What is found out about a target; its files join `files`, name -> path."""
    try:
        source = sources.find(target)
    except LookupError as error:
        raise UserError(f"{key}.target={shown(target)}: {error.args[0]}.") from None
    require(
        sha256 in (None, source.sha256),
        f"{key}.sha256={shown(sha256)} is not the checksum of {source.path}, {source.sha256}: put that file "
        f"back, or leave {key}.sha256 out.",
    )
    for name, path in source.files.items():
        known = Path(files.setdefault(name, str(path)))
        require(
            known == path or known.read_bytes() == path.read_bytes(),
            f"{key}.target={shown(target)}: {known} and {path} have the same name: rename one of them.",
        )
    return {"target": source.target, "sha256": source.sha256}


def refuse_edited(now: RunConfig, before: RunConfig, remedy: str) -> None:
    """Refuse a run that was begun with other files of its own parts; `now` has their checksums. Raises
    UserError."""
    for group in OWN:
        part, old = getattr(now, group), getattr(before, group)
        if part.target is not None and part.target == old.target and part.sha256 != old.sha256:
            files = any_of([str(path) for path in sources.find(part.target).files.values()] or ["its file"])
            raise UserError(
                f"{group}.target={part.target}: {files} has changed since this run was begun: put the "
                f"old one back, or {remedy}."
            )


def describe_own_part(group: str, part: Any) -> str:
    """An own part as errors name it, `optimizer.target=my_opt:Cautious (my_opt.py:12)`: with the line of its
    function, unless it is of an installed package."""
    source = sources.find(part.target)
    return f"{group}.target={part.target}{f' ({source.place})' if source.files else ''}"


def own_part(group: str, part: Any) -> Callable[..., Any]:
    """The function of a part's target, imported: call it with what the group's functions take, and it gets
    the part's `arguments` as well.

    Raises UserError where its file is no longer the one that the run was planned with, or, when it is called,
    where it does not take what it is given. What the function itself raises is passed on.
    """
    try:
        function = sources.load(part.target, part.sha256 or "")
    except LookupError as error:
        raise UserError(f"{group}.target={part.target}: {error.args[0]}.") from None
    key = describe_own_part(group, part)

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
    """Whether a class reads an argument. Some take any into their `**options`, so that a misspelled one is
    lost, or is left in the `defaults` of an optimizer where nothing asks for it."""
    code = getattr(function.__init__, "__code__", None) if inspect.isclass(function) else None
    if code is None or not code.co_flags & inspect.CO_VARKEYWORDS:
        return True
    if any(name in _words(one) for one in _codes(function)):
        return True
    if name in getattr(made, "defaults", {}):
        return False
    positional = bool(code.co_flags & inspect.CO_VARARGS)
    options = code.co_varnames[code.co_argcount + code.co_kwonlyargcount + positional]
    loaded = [step.argval for step in dis.get_instructions(code) if step.opname.startswith("LOAD")]
    passed_on = any(options in (one if isinstance(one, tuple) else (one,)) for one in loaded)
    return passed_on or "locals" in code.co_names


def _codes(cls: type) -> Iterator[CodeType]:
    """What the methods of a class and of those that it inherits from are compiled to, and the functions
    beside them."""
    for one in cls.__mro__:
        for member in [*vars(one).values(), *vars(sys.modules.get(one.__module__, one)).values()]:
            code = getattr(inspect.unwrap(member) if callable(member) else member, "__code__", None)
            if isinstance(code, CodeType):
                yield code


def _words(code: CodeType) -> set[str]:
    """The names of a function's arguments, and the texts in it and in those inside it."""
    words = set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            words |= _words(constant)
        else:  # a tuple: the names under which a call gives arguments
            of_one = constant if isinstance(constant, tuple) else (constant,)
            words.update(text for text in of_one if isinstance(text, str))
    return words

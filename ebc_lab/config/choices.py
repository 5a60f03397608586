"""The choices in `conf/`: where they are, what they set, and the error for an unknown one; and a user's own
parts, which take the place of one."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from .dicts import type_hints
from .errors import UserError, any_of, nearest, need, shown
from .own import sources
from .own.entry_points import offered
from .schema import (
    CUSTOM,
    ArmConfig,
    Config,
    ControllerConfig,
    DeterminismConfig,
    OptimizerConfig,
    RunConfig,
    StabilizerConfig,
)

# groups whose settings mean nothing under another name
FRESH = {"controller": ControllerConfig, "optimizer": OptimizerConfig, "stabilizer": StabilizerConfig}
OWN = ("optimizer", "stabilizer", "lr_schedule", "model")  # groups that take a `target`


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
def settings_of(group: str, name: str) -> dict[str, Any]:
    """What a choice's file sets: `settings_of("optimizer", "adam")`; of one that an installed package offers,
    what that of `custom` sets, with its target. Raises UserError for an unknown one."""
    from omegaconf import OmegaConf

    known = choices_of(group, name)
    if name in known and name not in groups()[group]:
        return {**settings_of(group, CUSTOM), "name": name, "target": _offered_target(group, name)}
    if name not in known:
        raise UserError(
            f"{group}={shown(name)} is unknown{nearest(name, known)}; {group} takes {any_of(known)}."
        )
    loaded = OmegaConf.to_container(OmegaConf.load(conf_dir() / group / f"{name}.yaml"))
    return typing.cast(dict[str, Any], loaded)


def optimizer_defaults(name: str) -> OptimizerConfig:
    """An optimizer's settings as its file in `conf/optimizer` gives them."""
    return typing.cast(
        OptimizerConfig, _changed(OptimizerConfig(), settings_of("optimizer", name), "optimizer.")
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
            fresh |= settings_of(key, CUSTOM if labelled and key in OWN else value["name"])
            if key == "optimizer":
                del fresh["lr"]
            value = {**fresh, **value}
        whole[key] = value
    return typing.cast(RunConfig, _changed(run, whole, ""))


def shaped(run: RunConfig, arm: ArmConfig) -> RunConfig:
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
    take a twentieth of a second to list."""
    known = groups()[group]
    return known if name in known else [*known, *(n for n in offered(group) if n not in known)]


def offered_parts(group: str) -> list[dict[str, Any]]:
    """What each choice sets that installed packages offer and `conf` does not have; of one that two packages
    offer, nothing but its name."""
    targets = {name: found for name, found in offered(group).items() if name not in groups()[group]}
    single = {name: {"target": found[0]} for name, found in targets.items() if len(found) == 1}
    return [{**settings_of(group, CUSTOM), "name": name, **single.get(name, {})} for name in targets]


def _offered_target(group: str, name: str) -> str:
    found = offered(group)[name]
    need(
        len(found) == 1,
        f"{group}={name} is offered by several installed packages ({any_of(found)}): choose one with "
        f"{group}=custom {group}.target=….",
    )
    return found[0]


def kind_of(group: str, part: Any) -> str:
    """Which choice of `conf` a part of a run is: its name, or `custom` where it has a target and a name of
    its own."""
    own = part.target is not None and part.name not in groups()[group]
    return CUSTOM if own else str(part.name)


Settings = TypeVar("Settings", bound=RunConfig)


def with_sources(settings: Settings) -> Settings:
    """Settings whose own parts have the checksum of their file and their target as `module:function`; of a
    study, those of its arms and of the candidates of its controller search, too.

    Raises UserError where a target is not found, or its file is not the one whose checksum the settings name.
    """
    found = {group: getattr(settings, group) for group in OWN}
    parts: dict[str, Any] = {
        group: dataclasses.replace(part, **_sourced(group, part.target, part.sha256))
        for group, part in found.items()
        if part.target is not None
    }
    if isinstance(settings, Config):
        arms = {
            name: dataclasses.replace(arm, settings=_with_sources(f"ablation.arms.{name}: ", arm.settings))
            for name, arm in settings.ablation.arms.items()
        }
        parts["ablation"] = dataclasses.replace(settings.ablation, arms=arms)
        search = settings.controller_search
        candidates = {
            # what is no settings is refused, in its words, by what checks the stage
            name: _with_sources(f"controller_search.candidates.{name}: ", own)
            if isinstance(own, Mapping)
            else own
            for name, own in search.candidates.items()
        }
        parts["controller_search"] = dataclasses.replace(search, candidates=candidates)
    return dataclasses.replace(settings, **parts)


def _with_sources(where: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same of the settings by which an arm changes a run."""
    made = dict(settings)
    for group, value in settings.items():
        if group not in OWN or not isinstance(value, Mapping):
            continue
        name = value.get("name")
        if name in choices_of(group, name) and name not in groups()[group]:
            value = {"target": _offered_target(group, str(name)), **value}
        if value.get("target") is not None:
            made[group] = {**value, **_sourced(where + group, value["target"], value.get("sha256"))}
    return made


def _sourced(key: str, target: str, sha256: str | None) -> dict[str, Any]:
    try:
        found = sources.find(target)
    except LookupError as error:
        raise UserError(f"{key}.target={shown(target)}: {error.args[0]}.") from None
    need(
        sha256 in (None, found.sha256),
        f"{key}.sha256={shown(sha256)} is not the checksum of {found.path}, {found.sha256}: put that file "
        f"back, or leave {key}.sha256 out.",
    )
    return {"target": found.target, "sha256": found.sha256}


def refuse_edited(now: RunConfig, before: RunConfig, remedy: str) -> None:
    """Refuse a run that was begun with other files of its own parts; `now` has their checksums. Raises
    UserError."""
    for group in OWN:
        part, old = getattr(now, group), getattr(before, group)
        need(
            part.target is None or part.target != old.target or part.sha256 == old.sha256,
            f"{group}.target={part.target}: its file has changed since this run was begun: put the old one "
            f"back, or {remedy}.",
        )


def own_part(group: str, part: Any) -> Callable[..., Any]:
    """The function of a part's target, imported: call it with what the group's functions take, and it gets
    the part's `arguments` as well.

    Raises UserError where its file is no longer the one that the run was planned with, or, when it is called,
    where it does not take what it is given. What the function itself raises is passed on.
    """
    key = f"{group}.target={part.target}"
    try:
        function = sources.load(part.target, part.sha256 or "")
    except LookupError as error:
        raise UserError(f"{key}: {error.args[0]}.") from None

    def called(*positional: Any, **given: Any) -> Any:
        twice = [name for name in part.arguments if name in given]
        need(not twice, f"{group}.arguments: {', '.join(twice)} is given by the run itself: leave it out.")
        try:
            inspect.signature(function).bind(*positional, **given, **part.arguments)
        except TypeError as error:
            words = ", ".join([f"{len(positional)} positional", *given, *part.arguments])
            raise UserError(f"{key} does not take what it is given ({words}): {error}.") from None
        except ValueError:  # a function without a signature, written in C
            pass
        return function(*positional, **given, **part.arguments)

    return called

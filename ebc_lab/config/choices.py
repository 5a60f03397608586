"""The choices in `conf/` and in installed packages: names, settings, and which settings are read."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import typing
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from .dicts import type_hints
from .errors import UserError, any_of, naming, nearest, require, shown
from .fields import CUSTOM, Setting
from .own.files import ENDINGS, GROUP, WHOLE, OwnFile, conf_dir, is_path, own_choices, own_file, read
from .parts import PART, PARTS
from .parts.determinism import DeterminismConfig
from .parts.optimizer import OptimizerConfig
from .schema import RunConfig, SizedConfig

UNNAMED = (GROUP, "check", "tracker")  # groups whose files are settings of no one choice
OWN_GROUPS = ("optimizer", "stabilizer", "lr_schedule", "model")  # groups that take a `target`
EXPONENT = re.compile(r"[-+]?[0-9]+\.?[0-9]*[eE][-+]?[0-9]+$")  # which YAML 1.1 takes for a text
OFFERED = {"optimizer": "ebc_lab.optimizers", "stabilizer": "ebc_lab.stabilizers"}  # -> entry points


@functools.cache
def groups() -> dict[str, list[str]]:
    """Return the choices of each group, by group: the names of the group's files in `conf/`."""
    return {
        d.name: sorted(f.stem for f in d.glob("*.yaml")) for d in sorted(conf_dir().iterdir()) if d.is_dir()
    }


@functools.cache
def listed_choices() -> dict[str, str]:
    """Return the default choice of each group that conf/config.yaml lists, by group."""
    listed = _read("config.yaml")["defaults"]
    return {k: v for entry in listed if isinstance(entry, dict) for k, v in entry.items()}


def further_choices() -> dict[str, str]:
    """Return the default choice of each part that conf/config.yaml does not list, by group."""
    return {part.group_name: part().name for part in PARTS if part.group_name not in listed_choices()}


@functools.cache
def read_choice(group: str, name: str) -> dict[str, Any]:
    """Return the settings in the file of a choice, as in `read_choice("optimizer", "adam")`. A choice offered
    by an installed package has the settings of `custom`, with its own name and target. Raises UserError for a
    choice that is unknown or that several packages offer."""
    known = choices_of(group, name)
    if name in known and name not in groups()[group]:
        return {**read_choice(group, CUSTOM), "name": name, "target": offered_target(group, name)}
    if name not in known:
        raise UserError(
            f"{group}={shown(name)} is unknown{nearest(name, known)}; {group} takes {any_of(known)}."
        )
    return _read(f"{group}/{name}.yaml")


def _read(file: str) -> dict[str, Any]:
    """Return the settings in a file of `conf/` as Hydra reads them, but at a tenth of the time."""
    import yaml

    return dict(yaml.load((conf_dir() / file).read_text(encoding="utf-8"), _loader()))


@functools.cache
def _loader() -> Any:
    """Return a loader to which 1e-3 is a number, as it is to Hydra's."""
    import yaml

    loader: Any = type("Loader", (getattr(yaml, "CSafeLoader", yaml.SafeLoader),), {})
    loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, [*"-+0123456789"])
    return loader


@functools.cache
def values_in_conf(group: str, name: str, field: str) -> list[Any]:
    """Return the values of a group's setting `field` in the files of its choice `name` and of the scales."""
    files = [read_choice("scale", scale).get(group) for scale in groups()["scale"]]
    if name in groups()[group]:
        files.append(read_choice(group, name))
    return [settings[field] for settings in files if isinstance(settings, Mapping) and field in settings]


def optimizer_defaults(name: str) -> OptimizerConfig:
    """Return the default settings of an optimizer, from its file in `conf/optimizer`."""
    made: OptimizerConfig = _changed(OptimizerConfig(), read_choice("optimizer", name), "optimizer.")
    return made


def changed(run: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """Return a run changed by settings such as `{budget: {name: surrogate, aggregate: l2}, dtype: float32}`.

    Giving a group a `name` loads that choice's file. In a controller, optimizer or stabilizer, settings that
    neither the file nor `settings` gives return to their defaults; in other groups, they keep their values.
    The learning rate changes only if it is given explicitly. A part with a `target` may have any name.

    Raises UserError for an unknown setting or choice.
    """
    whole: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and "name" in value and key in groups():
            require(isinstance(value["name"], str), f"{key}.name must be a text, not {shown(value['name'])}.")
            fresh = dict(vars(PART[key]())) if key in ("controller", "optimizer", "stabilizer") else {}
            labelled = value.get("target") is not None and value["name"] not in groups()[key]
            fresh |= read_choice(key, CUSTOM if labelled and key in OWN_GROUPS else value["name"])
            if key == "optimizer":
                del fresh["lr"]
            value = {**fresh, **value}
        whole[key] = value
    return typing.cast(RunConfig, _changed(run, whole, ""))


def with_setting(run: RunConfig, key: str, value: Any) -> RunConfig:
    """Return the run with one setting changed, given by its dotted key: `optimizer.arguments.beta`. Raises
    UserError for an unknown one."""
    group, *inside = key.split(".")
    for name in reversed(inside[1:]):
        value = {name: value}
    if len(inside) > 1:  # an argument of a part of the user's own, beside its other arguments
        value = {**getattr(getattr(run, group), inside[0]), **value}
    return changed(run, {group: {inside[0]: value}})


def with_size(run: RunConfig, arm: SizedConfig) -> RunConfig:
    """Return the run with its length, batch size and width scaled as `arm` says. The width stays a multiple
    of the number of heads."""
    heads = run.model.heads
    per_head = round(run.model.width * arm.width_scale / heads)
    return dataclasses.replace(
        run,
        steps=max(1, round(run.steps * arm.steps)),
        batch_size=max(1, round(run.batch_size * arm.batch_scale)),
        model=dataclasses.replace(run.model, width=heads * max(1, per_head)),
    )


def under(run: RunConfig, mode: str, parts: int) -> RunConfig:
    """Return the run under a determinism mode, with its batch split into `parts`: by `micro_batches` if the
    mode is exact, and otherwise by `accumulate`."""
    exact = DeterminismConfig(mode).exact
    settings = {"name": mode, "micro_batches": parts} if exact else {"name": mode}
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
            example = f"{{{key}: {{name: {shown(value)}}}}}"
            require(isinstance(value, Mapping), f"{path}{key} holds several settings: write {example}.")
            out[key] = _changed(now, value, f"{path}{key}.")
        else:
            takes_float = float in (hints[key], *typing.get_args(hints[key]))
            out[key] = float(value) if takes_float and type(value) is int else value
    return dataclasses.replace(config, **out)


# -- which choices there are ---------------------------------------------------------------------------------


def choices_of(group: str, name: object) -> list[str]:
    """Return the choices of a group. If `name` is not in `conf/`, include the choices that installed packages
    offer; looking them up takes 50 ms."""
    known = groups()[group]
    return known if name in known else [*known, *(n for n in offered().get(group, ()) if n not in known)]


def overridable(group: str, name: object) -> list[str]:
    """Return the choices of a group that an override may name: those in conf/ of the working folder as well,
    and `name` itself if it is the path of one."""
    path = [name] if isinstance(name, str) and is_path(name) and own_file(group, name) else []
    return [*path, *dict.fromkeys([*own_choices(group), *choices_of(group, name)])]


def meant(overrides: Mapping[str, Any]) -> tuple[dict[str, Any], dict[OwnFile, dict[str, Any]]]:
    """Return overrides (key -> value) in which a user-defined choice is the built-in one that it sets, and
    the settings in the user's files, by file. The file of each choice comes before those it builds on."""
    files: dict[OwnFile, dict[str, Any]] = {}
    names: dict[str, Any] = {}
    for group in groups():
        if file := own_file(group, overrides.get(group)):
            files |= read_own(file)
            names |= {group: files[file]["name"]} if group not in (*WHOLE, *UNNAMED) else {}
    return {**overrides, **names}, files


def read_own(own: OwnFile, above: Sequence[OwnFile] = ()) -> dict[OwnFile, dict[str, Any]]:
    """Return the settings in the file of a user-defined choice, followed by those in the user's files on
    which it builds, by file. Most groups' say of which choice they are: by `name`, a scale's by `scale`, or
    by the choice on which `defaults` builds. `above`: the files that build on this one.

    Raises UserError if a file cannot be read, does not say so, or builds on itself.
    """
    circle = " → ".join(str(file.path) for file in (*above, own))
    require(own not in above, f"{circle}: `defaults` go in a circle; name another choice in one of them.")
    files = {own: (settings := read(own))}
    key, known = "scale" if own.group == "scale" else "name", groups()[own.group]
    named = own.group not in UNNAMED
    for place, one in enumerate(settings.get("defaults", ())):
        if not isinstance(one, str) or one == "_self_":
            continue
        with naming(str(own.path)):
            paths = (str(own.path.parent / f"{one}{ending}") for ending in ("", *ENDINGS))
            beside = next(filter(os.path.isfile, paths), one)
            base = None if one in known else own_file(own.group, beside)
            built_on = {} if base else read_choice(own.group, one)
        if base:
            files |= read_own(base, (*above, own))
            built_on = files[base]
            settings["defaults"][place] = base.chosen_name
        if named:
            settings.setdefault(key, built_on[key])
    of_its_own = own.group in OWN_GROUPS and settings.get("target") is not None
    require(
        not named or of_its_own or settings.get(key) in known,
        f"{own.path}: a line `{key}: …` must say of which {own.group} these are settings: {any_of(known)}.",
    )
    return files


def written_out(group: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a group in an arm. Where `name` is a user-defined choice, its files' settings
    are added, and where an installed package offers it, the target. Raises UserError as `read_own` does."""
    name = settings.get("name")
    if name in groups()[group] or "target" in settings:
        return dict(settings)
    own = own_file(group, name)
    if own is None:
        is_offered = group in OFFERED and name in choices_of(group, name)
        return {**settings, "target": offered_target(group, str(name))} if is_offered else dict(settings)
    from omegaconf import OmegaConf

    given = {key: value for key, value in settings.items() if key != "name"}
    whole: Any = OmegaConf.to_container(OmegaConf.merge(*reversed(read_own(own).values()), given))
    return {key: value for key, value in whole.items() if key != "defaults"}


@functools.cache
def offered() -> dict[str, dict[str, tuple[str, ...]]]:
    """Return the targets, `module:function`, that installed packages offer, by group and name. A name that
    several packages use may have several targets."""
    found, by_group = metadata.entry_points(), {}
    for group, place in OFFERED.items():
        by_name: dict[str, set[str]] = {}
        for entry in found.select(group=place):
            by_name.setdefault(entry.name, set()).add(f"{entry.module}:{entry.attr}")
        by_group[group] = {name: tuple(sorted(targets)) for name, targets in sorted(by_name.items())}
    return by_group


def offered_target(group: str, name: str) -> str:
    """Return the target that an installed package offers under a name. Raises UserError if packages offer
    several targets under that name."""
    targets = offered()[group][name]
    require(
        len(targets) == 1,
        f"{group}={name} is offered by several installed packages ({any_of(targets)}): choose one with "
        f"{group}=custom {group}.target=….",
    )
    return targets[0]


def kind_of(part: Any) -> str:
    """Return a part's choice in `conf/`: its name, or `custom` for a part that has a target and whose name is
    not in `conf/`."""
    is_custom = getattr(part, "target", None) is not None and part.name not in groups()[part.group_name]
    return CUSTOM if is_custom else str(part.name)


def choice_for(setting: Setting, settings: Any) -> str:
    """Return the choice, made in a group's `settings`, that decides whether `setting` is read."""
    return kind_of(settings) if setting.by == "name" else str(getattr(settings, setting.by))


def is_read(setting: Setting, settings: Any) -> bool:
    """Return whether a setting is read under the choices made in its group's `settings`."""
    return not setting.only or choice_for(setting, settings) in setting.only

"""From Hydra overrides to a validated `Config`; the choices themselves are the files in `conf/`.

Mistakes are refused in one sentence, with the nearest valid spelling, before anything is written.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import typing
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .choices import conf_dir, groups
from .errors import UserError, any_of, nearest
from .schema import STAGES, Config
from .study_checks import validate


def compose(overrides: Sequence[str], *, study: bool = True, here: bool = True) -> Config:
    """Compose and validate the configuration.

    Args:
        overrides: Hydra overrides, e.g. `["scale=smoke", "seeds=[0,1]"]`.
        study: the overrides are a study's, not a run's: `optimizer=`, `projection=` and `budget=` choose
            what the sweep covers, and settings that a stage decides are refused.
        here: this machine trains, so that it must have the device asked for.
    Raises:
        UserError: an unknown key or choice (with the nearest valid ones), a wrong type, a value out of range.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    overrides = list(overrides)
    parsed = check_overrides(overrides)
    if study:
        overrides += _narrow(parsed)
    if "scale" not in parsed:
        overrides.append(default_scale())
    register_schema()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir().resolve())):
            composed = hydra_compose("config", overrides)
        config: Config = OmegaConf.to_object(composed)  # type: ignore[assignment]
    except (HydraException, OmegaConfBaseException) as error:
        lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()] or [
            repr(error)
        ]
        first = " ".join(lines[:2]) if lines[0].endswith("composing config:") else lines[0]
        key = getattr(error, "full_key", None) or getattr(error.__cause__, "full_key", None)
        if any(o.lstrip("+").startswith("ablation.arms.") for o in overrides) and (
            "struct" in first or "subclass" in first
        ):
            first = "a new arm goes into a file of conf/study; overrides change those that the suite has"
            key = "ablation.arms"
        raise UserError(f"{key + ': ' if key else ''}{first}") from None
    validate(config, study=study, here=here)
    return config


def default_scale() -> str:
    """The override for the scale that suits this machine: `paper` where there is a GPU, else `laptop`."""
    from .machine import visible_gpus

    return "scale=paper" if visible_gpus() else "scale=laptop"


def register_schema() -> None:
    """Make the schema known to Hydra, so that types are enforced however the program is entered."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)


def check_overrides(
    overrides: Sequence[str], *, hydra_keys: bool = False, sweeps: bool = False
) -> dict[str, Any]:
    """Refuse unknown groups, choices and keys; return {key: value as written}.

    `hydra_keys` accepts `hydra.…` and `hydra/…`, for `train`; `sweeps` accepts several values of a key.
    Raises UserError.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    known_groups = groups()
    keys = schema_keys()
    parsed: dict[str, Any] = {}
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            raise UserError(
                f"{text!r} is not an override: write KEY=VALUE, for example scale=smoke."
            ) from None
        key = override.key_or_group
        if hydra_keys and (key == "hydra" or key.startswith(("hydra.", "hydra/"))):
            continue
        if override.is_sweep_override() and not sweeps:
            raise UserError(f"{text!r} names several values: that needs -m, one study or run for each.")
        if override.is_delete():
            raise UserError(f"{text!r}: settings cannot be deleted; give {key} another value.")
        if key in known_groups:
            choices = known_groups[key]
            values = (
                [override.value()]
                if not override.is_sweep_override()
                else list(override.sweep_string_iterator())
            )
            for value in values:
                if value not in choices:
                    raise UserError(
                        f"{key}={value} is unknown{nearest(str(value), choices)}; "
                        f"{key} takes {any_of(choices)}."
                    )
        elif key not in keys and not _in_mapping(key, keys):
            raise UserError(f"{key} is not a setting{nearest(key, [*keys, *known_groups])}.")
        parsed[key] = override.value()
    return parsed


def schema_keys() -> dict[str, Any]:
    """Dotted path of every setting, and its type."""

    def walk(cls: type, prefix: str) -> typing.Iterator[tuple[str, Any]]:
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            kind = hints[f.name]
            yield prefix + f.name, kind
            if dataclasses.is_dataclass(kind):
                yield from walk(typing.cast(type, kind), f"{prefix}{f.name}.")

    return dict(walk(Config, ""))


def _in_mapping(key: str, keys: dict[str, Any]) -> bool:
    """Whether a key lies inside a setting that is a mapping, at any depth."""
    parents = itertools.accumulate(key.split(".")[:-1], lambda a, b: f"{a}.{b}")
    return any(typing.get_origin(keys.get(parent)) is dict for parent in parents)


STUDY_DECIDES = {  # a run's setting that a study chooses itself -> the study's setting that governs it
    "optimizer.lr": "lr_sweep.grids",
    "optimizer.name": "optimizer=NAME or lr_sweep.optimizers",
    "budget.target_kl": "calibrate.multiples",
    "budget.name": "budget=NAME or calibrate.budgets",
    "budget.schedule": "study.kl_schedule",
    "lr_schedule": "study.lr_schedule and lr_sweep.control_shapes",
    "lr_schedule.name": "study.lr_schedule and lr_sweep.control_shapes",
    "lr_schedule.warmup_steps": "lr_sweep.control_warmups",
    "lr_schedule.warmup_share": "lr_sweep.control_warmups",
    "lr_schedule.decay_share": "the stages",
    "projection.name": "projection=NAME or lr_sweep.projections",
    "stabilizer.name": "the stages",
    "stabilizer.strength": "the arms of a suite",
    "stabilizer.schedule": "the arms of a suite",
    "seed": "seeds and study.stage_seed",
    "steps": "lr_sweep.steps, calibrate.steps, lr_scale.steps and finals.steps",
    "evaluate": "the stages: val decides, test judges",
}


def _narrow(parsed: dict[str, Any]) -> list[str]:
    for key, governor in STUDY_DECIDES.items():
        if key in parsed:
            raise UserError(f"{key} is decided by the study itself: it follows {governor}.")
    if parsed.get("stabilizer", "ebc") != "ebc":
        raise UserError(
            f"stabilizer={parsed['stabilizer']} cannot be chosen for a study: the stages run EBC and the "
            "plain optimizer, study=stabilizers the rivals, `ebc-lab train` any one of them."
        )
    covers = {
        "optimizer": "lr_sweep.optimizers",
        "projection": "lr_sweep.projections",
        "budget": "calibrate.budgets",
    }
    return [
        f"{field_}=[{parsed[group]}]"
        for group, field_ in covers.items()
        if group in parsed and field_ not in parsed
    ]


def configurations(
    overrides: Sequence[str], *, multirun: bool = False, stage: str | None = None
) -> list[Config]:
    """The studies asked for: one, or with `multirun` one per combination, named after what varies.

    Raises UserError for anything that is wrong with any of them.
    """
    if stage is not None and stage not in STAGES:
        raise UserError(f"{stage} is not a stage; the stages are {', '.join(STAGES)}.")
    if not multirun:
        return [compose(overrides)]

    combinations = expand(overrides)
    varying = [o for i, o in enumerate(combinations[0]) if any(c[i] != o for c in combinations)]
    keys = [o.partition("=")[0] for o in varying]
    made = []
    for combination in combinations:
        config = compose(combination)
        own = [o.replace("=", "_") for o in combination if o.partition("=")[0] in keys]
        if own and "study.name" not in keys:
            slug = re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(own)).strip("-")
            config = replace(config, study=replace(config.study, name=f"{config.study.name}_{slug}"[:80]))
        made.append(config)
    names = [c.study.name for c in made]
    if len(set(names)) < len(names):
        raise UserError("two combinations would share a study's name: vary study.name as well.")
    return made


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """The combinations of a sweep (`optimizer.lr=1e-3,2e-3`), lists of plain overrides. Raises UserError."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        plain = [_listed(o) for o in OverridesParser.create().parse_overrides(list(overrides))]
        check_overrides(plain, hydra_keys=True, sweeps=True)
        parsed = OverridesParser.create().parse_overrides(plain)
        return [list(combination) for combination in BasicSweeper.split_arguments(parsed, None)[0]]
    except HydraException as error:
        raise UserError(f"this sweep cannot be expanded: {str(error).splitlines()[0]}") from None


def _listed(override: Any) -> str:
    """An override as it was written, `glob(…)` over a group replaced by the choices it matches."""
    from hydra.core.override_parser.types import Glob

    value = override.value()
    if not isinstance(value, Glob):
        return str(override.input_line)
    return f"{override.key_or_group}={','.join(value.filter(groups().get(override.key_or_group, [])))}"

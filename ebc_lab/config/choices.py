"""The choices in `conf/`: where they are, what they set, and the error for an unknown one."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .dicts import type_hints
from .errors import UserError, any_of, nearest, shown
from .schema import (
    ArmConfig,
    ControllerConfig,
    DeterminismConfig,
    OptimizerConfig,
    RunConfig,
    StabilizerConfig,
)

# groups whose settings mean nothing under another name
FRESH = {"controller": ControllerConfig, "optimizer": OptimizerConfig, "stabilizer": StabilizerConfig}


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
    """What a choice's file sets: `settings_of("optimizer", "adam")`. Raises UserError for an unknown one."""
    from omegaconf import OmegaConf

    if name not in groups()[group]:
        known = groups()[group]
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
    Raises UserError for a setting that a run does not have.
    """
    whole: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and "name" in value and key in groups():
            if not isinstance(value["name"], str):
                raise UserError(f"{key}.name must be a text, not {shown(value['name'])}.")
            fresh = dataclasses.asdict(FRESH[key]()) if key in FRESH else {}
            fresh |= settings_of(key, value["name"])
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

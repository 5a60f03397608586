"""From Hydra overrides to a validated `Config`; the choices themselves are the files in `conf/`.

What is wrong is refused in one sentence, with the nearest valid spelling, before anything is written.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config import SPLITS, Config, OptimizerConfig, RunConfig, UserError

STAGES_WITH_STEPS = ("lr_sweep", "calibrate", "lr_scale", "finals")


def conf_dir() -> Path:
    """Folder of the Hydra groups: beside this file in an installed wheel, at the root of a checkout."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "conf"


def groups() -> dict[str, list[str]]:
    """Each configuration group and its choices, from the files in `conf`."""
    return {d.name: sorted(f.stem for f in d.glob("*.yaml")) for d in sorted(conf_dir().iterdir()) if d.is_dir()}


def compose(overrides: Sequence[str], *, study: bool = True) -> Config:
    """Compose and validate the configuration.

    Args:
        overrides: Hydra overrides, e.g. `["scale=smoke", "seeds=[0,1]"]`.
        study: the overrides are a study's, not one run's: `optimizer=`, `projection=` and `budget=` then choose what
            the sweep covers, and settings that a stage decides are refused.
    Raises:
        UserError: an unknown key or choice (with the nearest valid ones), a value of the wrong type or out of range.
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
        first = next((line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()), repr(error))
        key = getattr(error, "full_key", None) or getattr(error.__cause__, "full_key", None)
        raise UserError(f"{key + ': ' if key else ''}{first}") from None
    validate(config)
    return config


def default_scale() -> str:
    """The override for the scale that suits this machine: `paper` where there is a GPU, else `laptop`."""
    from .doctor import visible_gpus

    return "scale=paper" if visible_gpus() else "scale=laptop"


def register_schema() -> None:
    """Make the schema known to Hydra, so that types are enforced however the program is entered."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)


def check_overrides(overrides: Sequence[str], *, hydra_keys: bool = False, sweeps: bool = False) -> dict[str, Any]:
    """Refuse unknown groups, choices and keys; return {key: value as written}.

    `hydra_keys` lets `hydra.…` and `hydra/…` pass, for `train`; `sweeps` lets several values a key pass. Raises UserError.
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
            raise UserError(f"{text!r} is not an override: write KEY=VALUE, for example scale=smoke.") from None
        key = override.key_or_group
        if hydra_keys and (key == "hydra" or key.startswith(("hydra.", "hydra/"))):
            continue
        if override.is_sweep_override() and not sweeps:
            raise UserError(f"{text!r} names several values: that needs -m, one study or run for each.")
        if override.is_delete():
            raise UserError(f"{text!r}: settings cannot be deleted; give {key} another value.")
        if key in known_groups:
            choices = known_groups[key]
            values = [override.value()] if not override.is_sweep_override() else list(override.sweep_string_iterator())
            for value in values:
                if value not in choices:
                    raise UserError(f"{key}={value} is unknown{_nearest(str(value), choices)}; {key} takes {_or(choices)}.")
        elif key not in keys and not _in_mapping(key, keys):
            raise UserError(f"{key} is not a setting{_nearest(key, [*keys, *known_groups])}.")
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
    parent = key.rpartition(".")[0]
    return typing.get_origin(keys.get(parent)) is dict


def _or(choices: Sequence[str]) -> str:
    return " or ".join([", ".join(choices[:-1]), choices[-1]]) if len(choices) > 1 else choices[0]


def _nearest(word: str, choices: Sequence[str]) -> str:
    """` (did you mean …?)`, or nothing when nothing is near; a dotted path is also matched by its last part."""
    tails = {c.rpartition(".")[2]: c for c in reversed(choices)}
    by_tail = [tails[t] for t in difflib.get_close_matches(word.rpartition(".")[2], list(tails), 3, 0.6)]
    near = list(dict.fromkeys(difflib.get_close_matches(word, choices, 3, 0.6) or by_tail))
    return f" (did you mean {_or(near)}?)" if near else ""


STUDY_DECIDES = {  # a run's setting that a study chooses itself -> the study's setting that governs it
    "optimizer.lr": "lr_sweep.grids",
    "optimizer.name": "optimizer=NAME or lr_sweep.optimizers",
    "budget.target_kl": "calibrate.multiples",
    "budget.name": "budget=NAME or calibrate.budgets",
    "budget.schedule": "the finals' linear arms",
    "lr_schedule": "lr_sweep.control_scales",
    "lr_schedule.name": "lr_sweep.control_scales",
    "lr_schedule.warmup_steps": "lr_sweep.control_warmup",
    "projection.name": "projection=NAME or lr_sweep.projections",
    "stabilizer.name": "the stages",
    "seed": "seeds and study.stage_seed",
    "steps": "lr_sweep.steps, calibrate.steps, lr_scale.steps and finals.steps",
    "evaluate": "the stages: val decides, test judges",
}


def _narrow(parsed: dict[str, Any]) -> list[str]:
    for key, governor in STUDY_DECIDES.items():
        if key in parsed:
            raise UserError(f"{key} is decided by the study itself: it follows {governor}.")
    if parsed.get("stabilizer", "ebc") == "none":
        raise UserError("stabilizer=none leaves nothing to study: the plain optimizer is always run beside it.")
    covers = {"optimizer": "lr_sweep.optimizers", "projection": "lr_sweep.projections", "budget": "calibrate.budgets"}
    return [f"{field_}=[{parsed[group]}]" for group, field_ in covers.items() if group in parsed and field_ not in parsed]


def validate(config: Config) -> None:
    """Refuse impossible or contradictory settings, each in one sentence. Raises UserError."""

    def need(ok: bool, message: str) -> None:
        if not ok:
            raise UserError(message)

    def choice(key: str, value: str, allowed: Sequence[str]) -> None:
        need(value in allowed, f"{key}={value} is unknown{_nearest(value, allowed)}; it takes {_or(allowed)}.")

    def positive(key: str, value: float, *, zero: bool = False) -> None:
        ok = math.isfinite(value) and (value >= 0 if zero else value > 0)
        need(ok, f"{key} must be a finite number {'>= 0' if zero else '> 0'}, not {value}.")

    available = groups()
    for group, named in (
        ("data", config.data.name),
        ("model", config.model.name),
        ("optimizer", config.optimizer.name),
        ("lr_schedule", config.lr_schedule.name),
        ("projection", config.projection.name),
        ("stabilizer", config.stabilizer.name),
        ("budget", config.budget.name),
        ("controller", config.controller.name),
        ("launcher", config.launcher.name),
        ("scale", config.scale),
    ):
        choice(group, named, available[group])
    for key, names, group in (
        ("lr_sweep.optimizers", config.lr_sweep.optimizers, "optimizer"),
        ("lr_sweep.projections", config.lr_sweep.projections, "projection"),
        ("calibrate.budgets", config.calibrate.budgets, "budget"),
    ):
        need(bool(names), f"{key} must name at least one {group}.")
        need(len(set(names)) == len(names), f"{key} names one {group} twice: {names}.")
        for name in names:
            choice(key, name, available[group])
    choice("dtype", config.dtype, ("auto", "float32", "bfloat16"))
    choice("device", config.device, ("auto", "cpu", "cuda"))
    choice("budget.schedule", config.budget.schedule, ("constant", "linear"))
    choice("budget.aggregate", config.budget.aggregate, ("l1", "sqrtl_l2", "l2"))
    choice("budget.grouping", config.budget.grouping, ("block",))
    choice("budget.probe", config.budget.probe, ("jvp", "fd"))
    choice("budget.cadence", config.budget.cadence, ("warm", "published"))
    choice("budget.beta_init", config.budget.beta_init, ("first", "zero"))
    choice("lr_sweep.keep", config.lr_sweep.keep, ("best", "all"))
    choice("calibrate.delta_grid", config.calibrate.delta_grid, ("natural", "published"))
    for split in config.evaluate:
        choice("evaluate", split, SPLITS[1:])

    for key in ("steps", "batch_size", "threads_per_run", "eval_every", "eval_windows", "audit_every", "audit_tokens"):
        positive(key, getattr(config, key))
    for key in ("blocks", "width", "heads", "context"):
        positive(f"model.{key}", getattr(config.model, key))
    need(config.model.width % config.model.heads == 0, "model.width must be a multiple of model.heads.")
    need(0 <= config.model.dropout < 1, f"model.dropout must lie in [0, 1), not {config.model.dropout}.")
    positive("optimizer.lr", config.optimizer.lr)
    for key in ("weight_decay", "momentum", "eps"):
        positive(f"optimizer.{key}", getattr(config.optimizer, key), zero=True)
    for key in ("beta1", "beta2"):
        need(0 <= getattr(config.optimizer, key) < 1, f"optimizer.{key} must lie in [0, 1).")
    positive("lr_schedule.warmup_steps", config.lr_schedule.warmup_steps, zero=True)
    positive("lr_sweep.control_warmup", config.lr_sweep.control_warmup, zero=True)
    for key in ("kp", "ki"):
        gain = getattr(config.controller, key)
        if gain is not None:
            positive(f"controller.{key}", gain, zero=True)
            need(config.controller.name in ("pi", "log_pi"), f"controller.{key} goes with controller=pi or log_pi.")
    positive("projection.bound", config.projection.bound)
    positive("budget.target_kl", config.budget.target_kl)
    positive("budget.sensitivity_every", config.budget.sensitivity_every, zero=True)
    need(
        0 < config.budget.probe_sequences < config.batch_size,
        f"budget.probe_sequences must leave rows of the batch for the audit: 1 to {config.batch_size - 1}.",
    )
    need(config.data.name != "path" or bool(config.data.file), "data=path needs data.file=FILE, a UTF-8 text.")
    need(
        config.data.name == "path" or not config.data.file,
        f"data.file goes with data=path, not data={config.data.name}.",
    )

    if config.device == "cuda":
        from .doctor import visible_gpus

        need(bool(visible_gpus()), "device=cuda, but nvidia-smi shows no GPU here (or CUDA_VISIBLE_DEVICES hides it).")
    check_run(config)

    need(bool(config.output_dir.strip()), "output_dir must name a folder.")
    name = config.study.name
    need(
        bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", name)),
        f"study.name={name!r} must be one plain folder name: letters, digits, '.', '_' and '-', at most 80.",
    )
    need(bool(config.seeds), "seeds must name at least one seed.")
    need(len(set(config.seeds)) == len(config.seeds), f"seeds names a seed twice: {config.seeds}.")
    need(all(s >= 0 for s in [*config.seeds, config.seed, config.study.stage_seed]), "a seed must be >= 0.")
    for stage in STAGES_WITH_STEPS:
        positive(f"{stage}.steps", getattr(config, stage).steps)
    low, high = config.study.band if len(config.study.band) == 2 else (1.0, 0.0)
    need(0 < low < high <= 1, f"study.band must be two numbers 0 < low < high <= 1, not {config.study.band}.")
    for optimizer in config.lr_sweep.optimizers:
        need(
            bool(config.lr_sweep.grids.get(optimizer)),
            f"lr_sweep.grids.{optimizer} is missing: give its learning rates.",
        )
    for optimizer, grid in config.lr_sweep.grids.items():
        for lr in grid:
            positive(f"lr_sweep.grids.{optimizer}", lr)
        need(sorted(set(grid)) == grid, f"lr_sweep.grids.{optimizer} must be increasing, without repeats: {grid}.")
    for key, values in (
        ("lr_sweep.control_scales", config.lr_sweep.control_scales),
        ("calibrate.multiples", config.calibrate.multiples),
        ("lr_scale.scales", config.lr_scale.scales),
    ):
        need(bool(values), f"{key} must not be empty.")
        for value in values:
            positive(key, value)
        need(sorted(set(values)) == values, f"{key} must be increasing, without repeats: {values}.")
    positive("calibrate.lr_scale", config.calibrate.lr_scale)
    need(1.0 in config.lr_scale.scales, "lr_scale.scales must contain 1: it is what the others are compared with.")
    need(config.lr_sweep.replicates >= 2, "lr_sweep.replicates must be at least 2: they measure the noise.")
    for key in ("lr_sweep.max_extensions", "calibrate.max_extra"):
        stage, _, attribute = key.partition(".")
        positive(key, getattr(getattr(config, stage), attribute), zero=True)
    positive("lr_sweep.skip_threshold", config.lr_sweep.skip_threshold)
    positive("finals.margin", config.finals.margin, zero=True)
    positive("launcher.slots", config.launcher.slots, zero=True)
    positive("launcher.checkpoint_every_s", config.launcher.checkpoint_every_s, zero=True)
    positive("launcher.max_lost", config.launcher.max_lost, zero=True)


LEAST_KL = {"float32": 1e-6, "bfloat16": 1e-4}  # nats per token: ten times the smallest KL `shadow` can see in it


def check_run(run: RunConfig) -> None:
    """Refuse a KL target that the run's precision cannot measure. Raises UserError."""
    least = LEAST_KL.get(run.dtype, min(LEAST_KL.values()))
    if run.stabilizer.name == "ebc" and run.budget.name == "shadow" and run.budget.target_kl < least:
        raise UserError(
            f"budget.target_kl={run.budget.target_kl:g} is below {least:g} nats, ten times the smallest KL that "
            f"dtype={run.dtype} can show: raise it, or use budget=surrogate."
        )


@functools.cache
def optimizer_defaults(name: str) -> OptimizerConfig:
    """An optimizer's settings as its file in `conf/optimizer` gives them."""
    from omegaconf import OmegaConf

    loaded = OmegaConf.merge(OmegaConf.structured(OptimizerConfig), OmegaConf.load(conf_dir() / "optimizer" / f"{name}.yaml"))
    return typing.cast(OptimizerConfig, OmegaConf.to_object(loaded))

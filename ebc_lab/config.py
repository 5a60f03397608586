"""The schema of everything a user may set, and the identity that names a run (DESIGN: house, command line, files).

`compose(overrides)` turns Hydra overrides into a validated `Config`; what is wrong is refused in one sentence, with the
nearest valid spelling, before anything is written. `identity(run)` keeps exactly what can change a run's numbers.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

NUMERICS_VERSION = 1  # bump by hand when a change of code changes a run's numbers
SPLITS = ("train", "val", "test")


class UserError(Exception):
    """A mistake the user can mend: what was wrong, where, and what to do next, in one sentence. Exit code 2."""


@dataclass
class DataConfig:
    name: str = "auto"  # auto | shakespeare | pydoc | path
    file: str | None = None  # the text, for data=path
    sha256: str | None = None  # checksum of the text; filled when the study is resolved, then enforced


@dataclass
class ModelConfig:
    name: str = "gpt"
    blocks: int = 3
    width: int = 128  # d, features
    heads: int = 4
    context: int = 64  # T, tokens
    dropout: float = 0.0


@dataclass
class OptimizerConfig:
    name: str = "adam"
    lr: float = 4e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0  # SGD and Muon


@dataclass
class LRScheduleConfig:
    name: str = "constant"  # constant | warmup_linear
    warmup_steps: int = 20


@dataclass
class ProjectionConfig:
    name: str = "none"  # none | spectral
    bound: float = 2.0  # times the largest initial singular value


@dataclass
class StabilizerConfig:
    name: str = "none"  # none | ebc


@dataclass
class BudgetConfig:
    name: str = "shadow"  # shadow | surrogate
    target_kl: float = 0.01  # delta*, nats per token
    schedule: str = "constant"  # of delta*: constant | linear
    probe_sequences: int = 2  # rows of the batch that choose c
    aggregate: str = "l1"  # l1 | sqrtl_l2 | l2 (l2 is not a bound)
    grouping: str = "block"
    probe: str = "jvp"  # how beta is measured: jvp | fd
    cadence: str = "warm"  # warm | published
    beta_init: str = "first"  # first | zero
    sensitivity_every: int = 0  # steps between recordings of S under shadow; 0 never


@dataclass
class ControllerConfig:
    name: str = "auto"  # auto | fixed | pi | log_pi
    kp: float | None = None  # None: the kind's own gain
    ki: float | None = None


@dataclass
class RunConfig:
    """All of one training run. Everything here, and nothing else, enters `identity`."""

    seed: int = 0
    steps: int = 600
    batch_size: int = 16  # B, sequences
    dtype: str = "auto"  # of the autocast: auto | float32 | bfloat16; parameters are always float32
    device: str = "auto"  # auto | cpu | cuda
    threads_per_run: int = 1  # CPU threads; changes bits
    eval_every: int = 40  # steps between evaluations on the fixed windows
    eval_windows: int = 64
    evaluate: list[str] = field(default_factory=lambda: ["val", "test"])  # splits evaluated whole at the end
    audit_every: int = 10  # steps between measurements of the applied KL
    audit_tokens: int = 512
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_schedule: LRScheduleConfig = field(default_factory=LRScheduleConfig)
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    stabilizer: StabilizerConfig = field(default_factory=StabilizerConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    controller: ControllerConfig = field(default_factory=ControllerConfig)


@dataclass
class StudyConfig:
    name: str = "${scale}"
    kind: str = "default"
    stage_seed: int = 100  # of the stage runs; replicates follow it; the finals have seeds of their own
    band: list[float] = field(default_factory=lambda: [0.5, 0.7])  # where the median c should lie


@dataclass
class LRSweepConfig:
    steps: int = 200
    optimizers: list[str] = field(default_factory=lambda: ["adam", "muon"])
    projections: list[str] = field(default_factory=lambda: ["none"])
    grids: dict[str, list[float]] = field(default_factory=dict)  # learning rates by optimizer
    max_extensions: int = 2  # of a grid whose winner lies on its edge, by a factor 2
    skip_threshold: float = 0.2  # a pair this much (relative) behind the best is triaged
    keep: str = "best"  # best | all: which (optimizer, projection) go on
    replicates: int = 3  # seeds of the winner: the noise sigma and the natural KL
    control_scales: list[float] = field(default_factory=lambda: [1.0, 2.0, 4.0])
    control_warmup: int = 20  # steps


@dataclass
class CalibrateConfig:
    steps: int = 200
    lr_scale: float = 2.0
    delta_grid: str = "natural"  # natural: multiples of the natural KL | published: 0.03, 0.05, 0.07
    multiples: list[float] = field(default_factory=lambda: [0.75, 1.0, 1.25, 1.5, 2.0])
    budgets: list[str] = field(default_factory=lambda: ["shadow"])
    max_extra: int = 3


@dataclass
class LRScaleConfig:
    steps: int = 200
    scales: list[float] = field(default_factory=lambda: [1.0, 1.5, 2.0, 3.0, 4.0])


@dataclass
class FinalsConfig:
    steps: int = 600
    margin: float = 0.01  # nats: how much worse than the baseline still counts as no worse


@dataclass
class LauncherConfig:
    name: str = "local"  # local: one worker process per slot | inline: this process
    slots: int = 0  # workers at a time; 0: one per GPU, or per core group
    checkpoint_every_s: float = 20.0  # seconds
    max_lost: int = 2  # times a run may lose its worker before it is given up


@dataclass
class Config(RunConfig):
    """A whole study: the run's settings, the stages' settings, and where and how to run them."""

    scale: str = "laptop"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    output_dir: str = "outputs/ebc_ablation"
    study: StudyConfig = field(default_factory=StudyConfig)
    lr_sweep: LRSweepConfig = field(default_factory=LRSweepConfig)
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    lr_scale: LRScaleConfig = field(default_factory=LRScaleConfig)
    finals: FinalsConfig = field(default_factory=FinalsConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)


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
        from .doctor import visible_gpus

        overrides.append("scale=paper" if visible_gpus() else "scale=laptop")
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


def register_schema() -> None:
    """Make the schema known to Hydra, so that types are enforced however the program is entered."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)


def check_overrides(overrides: Sequence[str], *, hydra_keys: bool = False) -> dict[str, Any]:
    """Refuse unknown groups, choices and keys; return {key: value as written}.

    `hydra_keys` lets `hydra.…` and `hydra/…` pass, for `train`. Raises UserError.
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

    name = config.study.name
    need(
        bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", name)),
        f"study.name={name!r} must be one plain folder name: letters, digits, '.', '_' and '-', at most 80.",
    )
    need(bool(config.seeds), "seeds must name at least one seed.")
    need(len(set(config.seeds)) == len(config.seeds), f"seeds names a seed twice: {config.seeds}.")
    need(all(s >= 0 for s in [*config.seeds, config.seed, config.study.stage_seed]), "a seed must be >= 0.")
    for stage in ("lr_sweep", "calibrate", "lr_scale", "finals"):
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


@functools.cache
def optimizer_defaults(name: str) -> OptimizerConfig:
    """An optimizer's settings as its file in `conf/optimizer` gives them."""
    from omegaconf import OmegaConf

    loaded = OmegaConf.merge(OmegaConf.structured(OptimizerConfig), OmegaConf.load(conf_dir() / "optimizer" / f"{name}.yaml"))
    return typing.cast(OptimizerConfig, OmegaConf.to_object(loaded))


def run_part(config: RunConfig) -> RunConfig:
    """The part of a study's configuration that one run needs."""
    return RunConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(RunConfig)})


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dicts, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """The inverse of `to_dict`, types enforced. Raises UserError on an unknown key or a wrong type."""
    hints = typing.get_type_hints(cls)
    unknown = set(values) - set(hints)
    if unknown:
        raise UserError(f"{cls.__name__} has no {_or(sorted(unknown))}: the file was written by another version.")
    made = {}
    for key, value in values.items():
        kind = hints[key]
        nested = dataclasses.is_dataclass(kind) and isinstance(value, dict)
        made[key] = from_dict(typing.cast(type, kind), value) if nested else value
    return cls(**made)


def resolve_controller(run: RunConfig) -> RunConfig:
    """Replace what depends on another choice: `controller=auto`, and the audit interval that `pi` sets."""
    name = run.controller.name
    if name == "auto":
        name = "log_pi" if run.budget.name == "surrogate" else "fixed"
    every = 20 if name == "pi" and run.stabilizer.name == "ebc" else run.audit_every
    return dataclasses.replace(run, controller=dataclasses.replace(run.controller, name=name), audit_every=every)


def identity(run: RunConfig) -> dict[str, Any]:
    """All that can change a run's numbers, and nothing that cannot.

    Settings without effect are left out (the budget of a run without EBC, the warm-up of a constant schedule), so that
    equal computations get equal names. Raises UserError if something is still to be resolved.
    """
    run = resolve_controller(run_part(run))
    if run.dtype == "auto" or run.device == "auto" or not run.data.sha256:
        raise UserError("dtype, device and corpus must be resolved before a run can be named.")
    kept = to_dict(run)
    kept["data"] = {"sha256": run.data.sha256}
    if run.stabilizer.name == "none":
        kept.pop("controller")
        kept["budget"] = {"probe_sequences": run.budget.probe_sequences}  # the audit leaves these rows out
    if run.lr_schedule.name == "constant":
        kept["lr_schedule"] = {"name": "constant"}
    if run.projection.name == "none":
        kept["projection"] = {"name": "none"}
    kept["torch"] = ".".join(metadata.version("torch").split(".")[:2])
    kept["numerics_version"] = NUMERICS_VERSION
    return kept


def canonical_json(value: Any) -> str:
    """One spelling for equal values: sorted keys, no spaces, NaN refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """sha256 of the canonical JSON, 64 hex digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()

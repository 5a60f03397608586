"""The schema of everything a user may set, and the identity that names a run.

`overrides.compose` fills it from the command line. `identity(run)` keeps exactly what can change a run's numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import typing
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

NUMERICS_VERSION = 1  # bump by hand when a change of code changes a run's numbers
SPLITS = ("train", "val", "test")
OPTIMIZER_SETTINGS = {  # beside lr and weight_decay
    "adam": ("beta1", "beta2", "eps"),
    "adamw": ("beta1", "beta2", "eps"),
    "sgd": ("momentum",),
    "muon": ("beta1", "beta2", "eps", "momentum"),
}


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
    checkpoint_every_s: float = 10.0  # seconds
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
        raise UserError(f"{cls.__name__} has no {', '.join(sorted(unknown))}: the file was written by another version.")
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
    unused = set(kept["optimizer"]) - {
        "name",
        "lr",
        "weight_decay",
        *OPTIMIZER_SETTINGS.get(run.optimizer.name, kept["optimizer"]),
    }
    for key in unused:
        del kept["optimizer"][key]
    if run.stabilizer.name == "none":
        kept.pop("controller")
        kept["budget"] = {"probe_sequences": run.budget.probe_sequences}  # the audit leaves these rows out
    elif run.budget.name == "shadow" and not run.budget.sensitivity_every:
        for key in ("aggregate", "grouping", "probe", "cadence", "beta_init"):
            del kept["budget"][key]
    if run.lr_schedule.name == "constant":
        kept["lr_schedule"] = {"name": "constant"}
    if run.projection.name == "none":
        kept["projection"] = {"name": "none"}
    kept["torch"] = _torch_version()
    kept["numerics_version"] = NUMERICS_VERSION
    return kept


@functools.cache
def _torch_version() -> str:
    """major.minor of the installed torch, without importing it."""
    return ".".join(metadata.version("torch").split(".")[:2])


def canonical_json(value: Any) -> str:
    """One spelling for equal values: sorted keys, no spaces, NaN refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """sha256 of the canonical JSON, 64 hex digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()

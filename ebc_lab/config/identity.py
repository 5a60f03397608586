"""What names a run: exactly the settings and versions that can change its numbers."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import metadata
from typing import Any

from ebc_lab.ebc.options import BOUNDED, MEASURED

from .dicts import run_part, to_dict
from .errors import UserError
from .fields import number as number
from .schema import LRScheduleConfig, RunConfig

_RECORDED: ContextVar[dict[str, Any]] = ContextVar("recorded environment")
NAMED_BY = 10  # hex digits of a run's identity at the end of its name
NUMERICS_VERSION = 4  # bump by hand when a change of code changes a run's numbers
OPTIMIZER_SETTINGS = {  # beside lr and weight_decay
    "adam": ("beta1", "beta2", "eps"),
    "adamw": ("beta1", "beta2", "eps"),
    "sgd": ("momentum",),
    "muon": ("beta1", "beta2", "eps", "momentum"),
    "lion": ("beta1", "beta2"),
    "adafactor": (),
    "soap": ("beta1", "beta2", "eps"),
    "schedule_free": ("beta1", "beta2", "eps"),
    "adam_uncorrected": ("beta1", "beta2", "eps"),
}
LR_SCHEDULE_SETTINGS: dict[str, tuple[str, ...]] = {  # beside the record of a replay
    "constant": (),
    "warmup_linear": ("warmup_steps",),
    "cosine": ("warmup_steps",),
    "trapezoid": ("warmup_steps", "decay_share"),
    "inverse_sqrt": ("warmup_steps",),
    "replay": (),
}
DELTA_TAILS = {  # a schedule of delta* -> how it shows in a run's name
    "constant": "",
    "linear": "_lindelta",
    "cosine": "_cosdelta",
    "hold_decay": "_holddelta",
    "lr_squared": "_lrdelta",
}
LR_TAILS = {
    "constant": "",
    "warmup_linear": "_lrdecay",
    "cosine": "_cosine",
    "trapezoid": "_trapezoid",
    "inverse_sqrt": "_invsqrt",
    "replay": "_replay",
}


def resolved(run: RunConfig) -> RunConfig:
    """Replace what depends on another choice: `controller=auto`, the audit interval that `pi` sets, and a
    warm-up given as a share of the run."""
    name = run.controller.name
    if name == "auto":
        name = "log_pi" if run.budget.name == "surrogate" else "fixed"
    every = 20 if name == "pi" and run.stabilizer.name == "ebc" else run.audit_every
    schedule = run.lr_schedule
    if schedule.warmup_share is not None:
        warmup = share_in_steps(schedule.warmup_share, run.steps)
        schedule = dataclasses.replace(schedule, warmup_steps=warmup, warmup_share=None)
    return dataclasses.replace(
        run,
        controller=dataclasses.replace(run.controller, name=name),
        audit_every=every,
        lr_schedule=schedule,
    )


def share_in_steps(share: float, steps: int) -> int:
    """A share of a run of `steps`, in whole steps."""
    return round(share * steps)


def identity(run: RunConfig) -> dict[str, Any]:
    """All that can change a run's numbers, and nothing that cannot.

    Settings without effect are left out (the budget of a run without EBC, the warm-up of a constant schedule,
    compiling that is off), so that equal computations get equal names. Raises UserError while `auto` is left.
    """
    run = resolved(run_part(run))
    if "auto" in (run.dtype, run.device, run.compile) or not run.threads_per_run or not run.data.sha256:
        raise UserError(
            "dtype, threads_per_run, compile, device and corpus must be resolved before a run can be named."
        )
    kept = to_dict(run)
    if run.compile == "off":
        del kept["compile"]
    kept["data"] = {"sha256": run.data.sha256}
    unused = set(kept["optimizer"]) - {
        "name",
        "lr",
        "weight_decay",
        *OPTIMIZER_SETTINGS.get(run.optimizer.name, kept["optimizer"]),
    }
    for key in unused:
        del kept["optimizer"][key]
    if run.stabilizer.name != "ebc":
        kept.pop("controller")
        kept["budget"] = {"probe_sequences": run.budget.probe_sequences}  # the audit leaves these rows out
    elif run.budget.name not in BOUNDED and not run.budget.sensitivity_every:
        without = ("aggregate", "guard", "probe", "cadence", "beta_init", "units")
        for key in without if run.budget.grouping == "matrices" else (*without, "grouping"):
            del kept["budget"][key]
    if run.stabilizer.name in ("none", "ebc"):
        kept["stabilizer"] = {"name": run.stabilizer.name}
    elif run.stabilizer.name != "trust_region":
        del kept["stabilizer"]["schedule"]
    if run.stabilizer.name == "ebc" and run.budget.until == 1:
        del kept["budget"]["until"]
    if run.stabilizer.name == "ebc" and run.budget.name not in MEASURED:
        del kept["budget"]["measure_every"]
    if run.stabilizer.name == "ebc" and run.budget.name in BOUNDED:
        del kept["budget"]["sensitivity_every"]  # they record S at every step
    if run.shock.name == "none":
        del kept["shock"]
    record = "sha256" if run.lr_schedule.sha256 else "source"
    needed = (record,) if run.lr_schedule.name == "replay" else LR_SCHEDULE_SETTINGS[run.lr_schedule.name]
    kept["lr_schedule"] = {k: kept["lr_schedule"][k] for k in ("name", *needed)}
    if run.projection.name != "spectral":
        kept["projection"] = {"name": run.projection.name}
    kept["torch"] = _torch_version()
    kept["numerics_version"] = NUMERICS_VERSION
    return kept


def round3(value: float) -> float:
    """Three significant digits, so that equal names mean equal numbers."""
    return float(f"{value:.3g}")


def stem_of(run: RunConfig) -> str:
    """How the names of runs and arms begin: optimizer, projection, stabilizer and its strength or budget."""
    name = run.stabilizer.name
    strength = run.stabilizer.strength
    stem = f"{run.optimizer.name}_{run.projection.name}_{'baseline' if name == 'none' else name}"
    if name == "ebc":
        return f"{stem}_d{number(run.budget.target_kl)}_{run.budget.name}"
    return stem if name == "none" or strength is None else f"{stem}_{number(strength)}"


def tail_of(run: RunConfig) -> str:
    """How they end: the schedules of the target KL (or of a trust region) and of the learning rate, with
    what sets the latter apart from its default: `_w100` for 100 steps of warm-up, `_e0p6` for a decay_share
    of 0.6."""
    run = resolved(run)
    of_delta = {"ebc": run.budget.schedule, "trust_region": run.stabilizer.schedule}
    schedule, usual = run.lr_schedule, LRScheduleConfig()
    read = LR_SCHEDULE_SETTINGS[schedule.name]
    tail = DELTA_TAILS[of_delta.get(run.stabilizer.name, "constant")] + LR_TAILS[schedule.name]
    if "warmup_steps" in read and schedule.warmup_steps != usual.warmup_steps:
        tail += f"_w{schedule.warmup_steps}"
    if "decay_share" in read and schedule.decay_share != usual.decay_share:
        tail += f"_e{number(schedule.decay_share)}"
    return tail


def run_id(kind: str, run: RunConfig) -> str:
    """The name of a run: a slug that a person can read, and the start of its identity's hash."""
    lead = "" if kind == "train" else f"{kind}_"
    slug = f"{lead}{stem_of(run)}_lr{number(run.optimizer.lr)}{tail_of(run)}_n{run.steps}_s{run.seed}"
    return f"{slug}-{digest(identity_of(kind, run))[:NAMED_BY]}"


def identity_of(kind: str, run: RunConfig) -> dict[str, Any]:
    """A training run's identity, or that of a measurement made at a run's shape."""
    own = identity(run) | _RECORDED.get({})
    return own if kind == "train" else {"kind": kind, "run": own}


def matches_run_id(kind: str, run: RunConfig, run_id: str) -> bool:
    """Whether a run's name is the one that its settings give it."""
    return run_id.endswith(f"-{digest(identity_of(kind, run))[:NAMED_BY]}")


def environment(whole: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a run's identity that is not a setting: the versions of torch and of our numerics."""
    return {k: v for k, v in whole.items() if k not in RunConfig.__dataclass_fields__}


@contextmanager
def recorded_environment(found: Mapping[str, Any]) -> Iterator[None]:
    """Name runs as in a recorded `environment`, so that a study can be read under another torch."""
    token = _RECORDED.set(dict(found))
    try:
        yield
    finally:
        _RECORDED.reset(token)


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

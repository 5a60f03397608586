"""What names a run: exactly the settings and versions that can change its numbers."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import metadata
from typing import Any

from ebc_lab.ebc.options import BOUNDED, MEASURED

from .choices import OWN, kind_of
from .dicts import run_part, to_dict
from .errors import UserError
from .fields import number as number
from .schema import CUSTOM, Config, LRScheduleConfig, RunConfig

_RECORDED: ContextVar[dict[str, Any]] = ContextVar("recorded environment")
NAMED_BY = 10  # hex digits of a run's identity at the end of its name
NUMERICS_VERSION = 4  # bump by hand when a change of code changes a run's numbers
OWN_SETTINGS = ("target", "arguments", "sha256")  # of a user's own part
OPTIMIZER_SETTINGS: dict[str, tuple[str, ...]] = {  # beside lr and weight_decay
    "adam": ("beta1", "beta2", "eps"),
    "adamw": ("beta1", "beta2", "eps"),
    "sgd": ("momentum",),
    "muon": ("beta1", "beta2", "eps", "momentum"),
    "lion": ("beta1", "beta2"),
    "adafactor": (),
    "soap": ("beta1", "beta2", "eps"),
    "schedule_free": ("beta1", "beta2", "eps"),
    "adam_uncorrected": ("beta1", "beta2", "eps"),
    "axiom": ("relative", "rank"),  # and with a rank those of its momentum
    "galore": ("beta1", "beta2", "eps", "rank"),
    "adam8bit": ("beta1", "beta2", "eps"),
    "adam4bit": ("beta1", "beta2", "eps"),
    CUSTOM: OWN_SETTINGS,
}
LIBRARIES = {  # (group, choice) -> the distribution whose code computes it; torch is named for every run
    ("optimizer", "lion"): "pytorch-optimizer",
    ("optimizer", "soap"): "pytorch-optimizer",
    ("optimizer", "schedule_free"): "pytorch-optimizer",
    ("optimizer", "galore"): "pytorch-optimizer",
    ("optimizer", "adam8bit"): "torchao",
    ("optimizer", "adam4bit"): "torchao",
    ("stabilizer", "agc"): "pytorch-optimizer",
}
MOMENTUM_SETTINGS = ("beta1", "momentum_weight", "streak_boost", "snr_floor")  # of axiom
LR_SCHEDULE_SETTINGS: dict[str, tuple[str, ...]] = {  # beside the record of a replay
    "constant": (),
    "warmup_linear": ("warmup_steps",),
    "cosine": ("warmup_steps",),
    "trapezoid": ("warmup_steps", "decay_share"),
    "inverse_sqrt": ("warmup_steps",),
    "replay": (),
    CUSTOM: OWN_SETTINGS,
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
    CUSTOM: "_customlr",
}


TOKENS_SETTINGS = {"characters": ("name",), "bpe": ("name", "size", "sha256"), "gpt2": ("name", "sha256")}
EBM_GROUPS = ("encoder", "decoder", "index", "sampler", "ebm")  # which gpt does not read
MODEL_SETTINGS = ("blocks", "width", "heads", "context", "dropout")  # of blocks in an ebm


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
    corpus_known = run.data.sha256 and (run.tokens.name == "characters" or run.tokens.sha256)
    if "auto" in (run.dtype, run.device, run.compile) or not run.threads_per_run or not corpus_known:
        raise UserError(
            "dtype, threads_per_run, compile, device and corpus must be resolved before a run can be named."
        )
    kept = to_dict(run)
    _refer_to_own_parts(kept, run)
    if run.compile == "off":
        del kept["compile"]
    kept["data"] = {"sha256": run.data.sha256}
    used = _used_of_optimizer(run)
    kept["optimizer"] = {key: value for key, value in kept["optimizer"].items() if key in used}
    _leave_out_unused_of_stabilizer(kept, run)
    if run.shock.name == "none":
        del kept["shock"]
    _leave_out_unused_low_bit(kept, run)
    _leave_out_unused_memory(kept, run)
    _leave_out_unused_of_workload(kept, run)
    if run.capability == "auto":  # else the run is there to show what its circumstances change
        del kept["capability"]
        _leave_out_of_determinism(kept, run)
    record = "sha256" if run.lr_schedule.sha256 else "source"
    needed = (record,) if run.lr_schedule.name == "replay" else LR_SCHEDULE_SETTINGS[_shape_of(run)]
    kept["lr_schedule"] = {k: kept["lr_schedule"][k] for k in ("name", *needed)}
    if run.projection.name != "spectral":
        kept["projection"] = {"name": run.projection.name}
    kept["torch"] = _torch_version()
    kept["numerics_version"] = NUMERICS_VERSION
    used_here = ((group, kind_of(group, getattr(run, group))) for group in ("optimizer", "stabilizer"))
    kept |= _versions_of({LIBRARIES[choice] for choice in used_here if choice in LIBRARIES})
    return kept


def _refer_to_own_parts(kept: dict[str, Any], run: RunConfig) -> None:
    """An own part is named by its target, arguments and file, whatever it is called; others have none of
    these. Raises UserError where a part's file has not been looked at."""
    for group in OWN:
        part = getattr(run, group)
        if kind_of(group, part) == CUSTOM:
            if not part.sha256:
                raise UserError(f"{group}.target must be found before a run can be named.")
            kept[group]["name"] = CUSTOM
        elif group != "lr_schedule":  # a replay has a checksum, too
            for key in OWN_SETTINGS:
                del kept[group][key]
    if run.model.target is not None:
        kept["model"] = {key: kept["model"][key] for key in ("name", "context", *OWN_SETTINGS)}


def _shape_of(run: RunConfig) -> str:
    return kind_of("lr_schedule", run.lr_schedule)


def _used_of_optimizer(run: RunConfig) -> set[str]:
    """The settings that the run's optimizer reads."""
    chosen = run.optimizer
    all_of_them = to_dict(chosen)
    momentum = MOMENTUM_SETTINGS if chosen.name == "axiom" and chosen.rank else ()
    used = OPTIMIZER_SETTINGS.get(kind_of("optimizer", chosen), all_of_them)
    return {"name", "lr", "weight_decay", *used, *momentum}


def _leave_out_unused_of_stabilizer(kept: dict[str, Any], run: RunConfig) -> None:
    """Keep of stabilizer, controller and budget what this stabilizer reads."""
    name = run.stabilizer.name
    budget = run.budget
    without: set[str] = set()  # settings of the budget
    if name != "ebc":
        kept.pop("controller")
        kept["budget"] = {"probe_sequences": budget.probe_sequences}  # the audit leaves these rows out
    elif budget.name not in BOUNDED and not budget.sensitivity_every:
        without |= {"aggregate", "guard", "probe", "cadence", "beta_init", "units"}
        if budget.grouping != "matrices":
            without.add("grouping")
    if name == "ebc" and budget.until == 1:
        without.add("until")
    if name == "ebc" and budget.name not in MEASURED:
        without.add("measure_every")
    if name == "ebc" and budget.name in BOUNDED:
        without.add("sensitivity_every")  # they record S at every step
    if budget.exponent == "square":
        without.add("exponent")
    if name in ("none", "ebc"):
        kept["stabilizer"] = {"name": name}
    elif name != "trust_region":
        del kept["stabilizer"]["schedule"]
    if name == "trust_region" and run.stabilizer.per == "group":
        kept["budget"]["grouping"] = budget.grouping
        kept["budget"]["clusters"] = budget.clusters
    if name != "trust_region" or (run.stabilizer.per, run.stabilizer.norm) == ("all", "latent"):
        kept["stabilizer"].pop("per", None)
        kept["stabilizer"].pop("norm", None)
    if budget.grouping != "kmeans" or "grouping" in without:
        without.add("clusters")
    for key in without:
        kept["budget"].pop(key, None)


def _leave_out_unused_memory(kept: dict[str, Any], run: RunConfig) -> None:
    """Keep what is no default. Hooks change no bit until a gradient is not finite: then a part has moved."""
    memory = run.memory
    chosen = {"hooks": memory.hooks, "activations": memory.activations}
    if memory.activations != "none":
        chosen["seed"] = memory.seed
    kept["memory"] = chosen
    if not memory.hooks and memory.activations == "none":
        del kept["memory"]


def _leave_out_of_determinism(kept: dict[str, Any], run: RunConfig) -> None:
    """Keep the mode that is no default. Under verity neither threads nor the engine nor the split of a batch
    changes a bit."""
    kept["determinism"] = {"name": run.determinism.name}
    if run.determinism.name == "none":
        del kept["determinism"]
    if run.determinism.exact:
        del kept["threads_per_run"]


def _leave_out_unused_low_bit(kept: dict[str, Any], run: RunConfig) -> None:
    """Drop what low-bit settings at their defaults, or without effect, leave as it was."""
    quantizer = run.quantizer
    if quantizer.name == "none":
        del kept["quantizer"]["group"], kept["quantizer"]["scale"]
    if quantizer.gradients == "none":
        del kept["quantizer"]["rounding"], kept["quantizer"]["error_feedback"]
    if kept["quantizer"] == {"name": "none", "gradients": "none", "state": "none"}:
        del kept["quantizer"]
    if run.partition.name == "uniform":
        del kept["partition"]
    if run.policy.name == "constant":
        del kept["policy"]
    if not run.curve_every:
        del kept["curve_every"]


def _leave_out_unused_of_workload(kept: dict[str, Any], run: RunConfig) -> None:
    """Keep of workload and tokens what is no default, and of the model's settings what the workload reads."""
    kept["tokens"] = {k: kept["tokens"][k] for k in TOKENS_SETTINGS[run.tokens.name]}
    if run.tokens.name == "characters":
        del kept["tokens"]
    if run.accumulate == 1:
        del kept["accumulate"]
    if run.workload.name == "gpt":
        for key in ("workload", *EBM_GROUPS):
            del kept[key]
        return
    blocks = "transformer" in (run.encoder.name, run.decoder.name)
    kept["model"] = {k: kept["model"][k] for k in MODEL_SETTINGS if blocks or k == "context"}
    if run.decoder.name != "moe":
        kept["decoder"] = {"name": run.decoder.name}
    if run.index.name == "exact":
        kept["index"] = {"name": "exact"}
    del kept["ebm"]["name"]
    if run.ebm.embeddings != "gpt2":
        del kept["ebm"]["gpt2"]


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


def delta_schedule(run: RunConfig) -> str | None:
    """The schedule of the target KL, or of a trust region; None where there is neither."""
    return {"ebc": run.budget.schedule, "trust_region": run.stabilizer.schedule}.get(run.stabilizer.name)


def warmup_steps(run: RunConfig) -> int | None:
    """The steps over which the learning rate rises; None on a schedule that does not read them."""
    reads = "warmup_steps" in LR_SCHEDULE_SETTINGS[_shape_of(run)]
    return run.lr_schedule.warmup_steps if reads else None


def tail_of(run: RunConfig) -> str:
    """How they end: the schedules of the target KL (or of a trust region) and of the learning rate, with
    what sets the latter apart from its default: `_w100` for 100 steps of warm-up, `_e0p6` for a decay_share
    of 0.6. Then what is no default of low-bit training, of the workload and of determinism."""
    run = resolved(run)
    schedule, usual = run.lr_schedule, LRScheduleConfig()
    read = LR_SCHEDULE_SETTINGS[_shape_of(run)]
    tail = DELTA_TAILS[delta_schedule(run) or "constant"] + _lr_tail(run)
    if "warmup_steps" in read and schedule.warmup_steps != usual.warmup_steps:
        tail += f"_w{schedule.warmup_steps}"
    if "decay_share" in read and schedule.decay_share != usual.decay_share:
        tail += f"_e{number(schedule.decay_share)}"
    exact = "" if run.determinism.name == "none" else f"_{run.determinism.name}"
    tail += "" if run.model.name == "gpt" else f"_{run.model.name}"
    return tail + _low_bit_tail(run) + _workload_tail(run) + exact


def _lr_tail(run: RunConfig) -> str:
    """The learning-rate schedule; one's own by its name."""
    shape = _shape_of(run)
    return f"_{run.lr_schedule.name}" if shape == CUSTOM != run.lr_schedule.name else LR_TAILS[shape]


def _low_bit_tail(run: RunConfig) -> str:
    """`_ternary` for the weights, `_gfive` for gradients, `_mint8` for Adam's moments, `_aint4` for
    activations, and what is no default of batches and policies."""
    quantizer = run.quantizer
    chosen = (
        ("", quantizer.name, "none"),
        ("g", quantizer.gradients, "none"),
        ("m", quantizer.state, "none"),
        ("a", run.memory.activations, "none"),
        ("", run.partition.name, "uniform"),
        ("", run.policy.name, "constant"),
    )
    return "".join(f"_{lead}{name}" for lead, name, default in chosen if name != default)


def _workload_tail(run: RunConfig) -> str:
    """`_ebm` and `_bpe` for what is no default."""
    chosen = ((run.workload.name, "gpt"), (run.tokens.name, "characters"))
    return "".join(f"_{name}" for name, default in chosen if name != default)


def run_id(kind: str, run: RunConfig) -> str:
    """The name of a run: a slug that a person can read, and the start of its identity's hash."""
    lead = "" if kind == "train" else f"{kind}_"
    slug = f"{lead}{stem_of(run)}_lr{number(run.optimizer.lr)}{tail_of(run)}_n{run.steps}_s{run.seed}"
    return f"{slug}-{digest(identity_of(kind, run))[:NAMED_BY]}"


def identity_of(kind: str, run: RunConfig) -> dict[str, Any]:
    """A training run's identity, or that of a measurement made at a run's shape."""
    own = identity(run)
    libraries = own.pop("libraries", {})
    own |= {k: v for k, v in _RECORDED.get({}).items() if k != "libraries"}
    own |= _versions_of(libraries)
    return own if kind == "train" else {"kind": kind, "run": own}


def matches_run_id(kind: str, run: RunConfig, run_id: str) -> bool:
    """Whether a run's name is the one that its settings give it."""
    return run_id.endswith(f"-{digest(identity_of(kind, run))[:NAMED_BY]}")


def environment(whole: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a run's identity that is not a setting: the versions of torch, of our numerics, and of the
    libraries that its optimizer and its stabilizer come from."""
    return {k: v for k, v in whole.items() if k not in RunConfig.__dataclass_fields__}


def study_environment(config: Config) -> dict[str, Any]:
    """The same for all the runs that a study may plan: its libraries are those of every optimizer and
    stabilizer that its settings name."""
    found = environment(identity_of("train", config))
    found.pop("libraries", None)
    named = {LIBRARIES[choice] for choice in _named_in(to_dict(config)) if choice in LIBRARIES}
    return found | _versions_of(named)


def _versions_of(libraries: Iterable[str]) -> dict[str, dict[str, str | None]]:
    """`{"libraries": {name: version}}`, as recorded or as installed; empty for none, and where the record was
    made before libraries were recorded."""
    recorded = _RECORDED.get({})
    versions = recorded.get("libraries", {}) if recorded else {n: library_version(n) for n in libraries}
    found = {name: versions[name] for name in sorted(libraries) if name in versions}
    return {"libraries": found} if found else {}


def by_name(environment: Mapping[str, Any]) -> dict[str, Any]:
    """An environment with its libraries beside the rest: `torch`, `numerics_version`, `torchao`."""
    own = {k: v for k, v in environment.items() if k != "libraries"}
    return {**own, **environment.get("libraries", {})}


def _named_in(settings: Any) -> Iterator[tuple[str, str]]:
    """(group, choice) of every `optimizer: {name: …}`, `optimizers: […]` and `stabilizer: {name: …}`."""
    if not isinstance(settings, Mapping):
        return
    for key, value in settings.items():
        if key in ("optimizer", "stabilizer") and isinstance(value, Mapping):
            yield key, str(value.get("name"))
        elif key == "optimizers":
            yield from (("optimizer", str(name)) for name in value)
        yield from _named_in(value)


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


@functools.cache
def library_version(name: str) -> str | None:
    """The whole public version of an installed library, without importing it; None where it is not there."""
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def canonical_json(value: Any) -> str:
    """One spelling for equal values: sorted keys, no spaces, NaN refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """sha256 of the canonical JSON, 64 hex digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()

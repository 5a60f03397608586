"""A run's identity (the settings and versions that can change its numbers), and names made from it."""

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

import msgspec

from ebc_lab.ebc.options import GUARDED

from .choices import groups, is_read, kind_of
from .dicts import run_part, to_dict
from .errors import UserError
from .fields import CUSTOM, UNSET, Setting, number, setting_of
from .part import Tail
from .parts import PART, PARTS, parts_of
from .parts.init import InitConfig
from .parts.lr_schedule import WARMED
from .schema import Config, RunConfig

_RECORDED: ContextVar[dict[str, Any]] = ContextVar("recorded environment")
_NAMES: dict[bytes, tuple[str, str]] = {}  # what `names_of` has returned, by a digest of its arguments
NAMED_BY = 10  # hex digits of the identity's hash at the end of a run's name
NUMERICS_VERSION = 7  # bump by hand when a change of code changes a run's numbers


def with_derived_settings(run: RunConfig) -> RunConfig:
    """Return the run with the settings filled in that follow from others: the controller if it is `auto`, the
    audit interval under the controller `pi`, and the steps of a warm-up given as a share of the run."""
    name = run.controller.name
    if name not in ("auto", "pi") and run.lr_schedule.warmup_share is None:
        return run  # a shortcut, since this is called for thousands of runs
    if name == "auto":
        name = "log_pi" if run.budget.name in GUARDED else "fixed"
    every = 20 if name == "pi" and run.stabilizer.name == "ebc" else run.audit_every
    schedule = run.lr_schedule
    if schedule.warmup_share is not None:
        warmup = share_in_steps(schedule.warmup_share, run.steps)
        schedule = dataclasses.replace(schedule, warmup_steps=warmup, warmup_share=None)
    controller = dataclasses.replace(run.controller, name=name)
    return dataclasses.replace(run, controller=controller, audit_every=every, lr_schedule=schedule)


def share_in_steps(share: float, steps: int) -> int:
    """Return how many whole steps a share of a run's length is."""
    return round(share * steps)


def identity(run: RunConfig) -> dict[str, Any]:
    """Return everything that can change a training run's numbers, and nothing else.

    Settings that are not read are left out, such as the budget of a run without EBC or the warm-up of a
    constant schedule. So are parts and settings that change nothing. Equal computations therefore get equal
    names. Raises UserError while a setting is still `auto` or a checksum is missing.
    """
    run = with_derived_settings(run_part(run))
    corpus_known = run.data.sha256 and (run.tokens.name == "characters" or run.tokens.sha256)
    if "auto" in (run.dtype, run.device, run.compile) or not run.threads_per_run or not corpus_known:
        raise UserError(
            "dtype, threads_per_run, compile, device and corpus must be resolved before a run can be named."
        )
    if not InitConfig.from_run(run).is_pinned():
        raise UserError("the weights of init.run must be looked at before a run can be named.")
    named: dict[str, Any] = {key: getattr(run, key) for key in read_settings(run) if key not in PART}
    for part in parts_of(run):
        if part.is_read(run) and not part.changes_nothing():
            unread = set(part.unread())
            keys = [key for key in read_settings(part) if key not in unread]
            read = named[part.group_name] = {key: getattr(part, key) for key in keys}
            if kind_of(part) == CUSTOM:  # named by its target, arguments and file, whatever it is called
                if not read["sha256"]:
                    raise UserError(f"{part.group_name}.target must be found before a run can be named.")
                read["name"] = CUSTOM
    _name_parts_that_belong_together(named, run)
    parts = [part for part in parts_of(run) if part.libraries]
    libraries = {part.libraries[kind] for part in parts if (kind := kind_of(part)) in part.libraries}
    return named | _environment(libraries)


def read_settings(settings: Any) -> list[str]:
    """Return the names of those settings, of a part or of a run outside its parts, that enter an identity."""
    cls: Any = type(settings)
    return [
        name
        for name, setting in _named_settings(cls)
        if (setting.in_run_id_even_unread or is_read(setting, settings))
        and (setting.unnamed_at is UNSET or getattr(settings, name) != setting.unnamed_at)
    ]


@functools.cache
def _named_settings(cls: Any) -> list[tuple[str, Setting]]:
    every = [(field.name, setting_of(field)) for field in dataclasses.fields(cls)]
    return [(name, setting) for name, setting in every if setting.in_run_id]


def _name_parts_that_belong_together(named: dict[str, Any], run: RunConfig) -> None:
    """Reduce parts in `named` to the settings that are read through other parts. A budget without EBC keeps
    the rows that an audit leaves out and the groups of a trust region. The model of an energy-based run keeps
    the sizes of its blocks. Exact sums omit the threads, unless `capability` is set."""
    if run.stabilizer.name != "ebc":
        del named["controller"]
        read = ["probe_sequences"]
        if run.stabilizer.name == "trust_region" and run.stabilizer.per == "group":
            read += ["grouping", "clusters"] if run.budget.grouping == "kmeans" else ["grouping"]
        named["budget"] = {key: getattr(run.budget, key) for key in read}
    if run.workload.name == "ebm":
        blocks = "transformer" in (run.encoder.name, run.decoder.name)
        sizes = ("context", "blocks", "width", "heads", "dropout") if blocks else ("context",)
        named["model"] = {key: getattr(run.model, key) for key in sizes}
    if run.capability != "auto":
        named["determinism"] = to_dict(run.determinism)
    elif run.determinism.exact:
        del named["threads_per_run"]


def round3(value: float) -> float:
    """Return a number rounded to three significant digits, so that equal names mean equal numbers."""
    return float(f"{value:.3g}")


def stem_of(run: RunConfig) -> str:
    """Return the start of a run's or arm's name: optimizer, projection, stabilizer, strength or budget."""
    name = run.stabilizer.name
    strength = run.stabilizer.strength
    stem = f"{run.optimizer.name}_{run.projection.name}_{'baseline' if name == 'none' else name}"
    if name == "ebc":
        return f"{stem}_d{number(run.budget.target_kl)}_{run.budget.name}"
    return stem if name == "none" or strength is None else f"{stem}_{number(strength)}"


def delta_schedule(run: RunConfig) -> str | None:
    """Return the schedule of EBC's target KL or of a trust region's squared radius, or None if unused."""
    return {"ebc": run.budget.schedule, "trust_region": run.stabilizer.schedule}.get(run.stabilizer.name)


def warmup_steps(run: RunConfig) -> int | None:
    """Return the number of steps over which the learning rate rises, or None if there is no warm-up."""
    return run.lr_schedule.warmup_steps if kind_of(run.lr_schedule) in WARMED else None


def tail_of(run: RunConfig) -> str:
    """Return the end of a run's or an arm's name, such as `_holddelta_trapezoid_w100_ternary`."""
    run = with_derived_settings(run)
    unread = () if run.stabilizer.name == "ebc" else ("budget", "controller")
    parts = [part for part in parts_of(run) if part.group_name not in unread]
    return "".join(tail.name for part in parts for tail in part.tail())


def tails_of_choices() -> dict[str, Tail]:
    """Return the `Tail` of each suffix that one choice adds to a name, such as `_ternary`, by suffix."""
    tails: dict[str, Tail] = {}
    for part in PARTS:
        usual: Any = part()
        for field in dataclasses.fields(usual):
            values = groups().get(part.group_name, ()) if field.name == "name" else setting_of(field).choices
            for value in values:
                part_tails = dataclasses.replace(usual, **{field.name: value}).tail()
                tails |= {tail.name: tail for tail in part_tails if tail.name}
    return tails


def run_id(kind: str, run: RunConfig) -> str:
    """Return the name of a run: a readable slug, and the first digits of the hash of its identity."""
    return names_of(kind, run)[0]


def names_of(kind: str, run: RunConfig) -> tuple[str, str]:
    """Return the name of a run and the sha256 of its identity. Both are cached, because a study plans each
    run a dozen times, and making them takes ten times as long as hashing the settings."""
    given = msgspec.msgpack.encode((kind, run, _RECORDED.get({}), NUMERICS_VERSION))
    asked = hashlib.sha256(given).digest()
    if asked not in _NAMES:
        lead = "" if kind == "train" else f"{kind}_"
        slug = f"{lead}{stem_of(run)}_lr{number(run.optimizer.lr)}{tail_of(run)}_n{run.steps}_s{run.seed}"
        sha256 = digest(identity_of(kind, run))
        _NAMES[asked] = f"{slug}-{sha256[:NAMED_BY]}", sha256
    return _NAMES[asked]


def identity_of(kind: str, run: RunConfig) -> dict[str, Any]:
    """Return the identity of a run. For `train`, it is the identity of the settings; for a measurement, it
    consists of `kind` and the identity that a training run with these settings has."""
    named = identity(run)
    return named if kind == "train" else {"kind": kind, "run": named}


def matches_run_id(kind: str, run: RunConfig, run_id: str) -> bool:
    """Return whether `run_id` ends in the hash of the identity of `run`."""
    return run_id.endswith(f"-{digest(identity_of(kind, run))[:NAMED_BY]}")


# -- versions ------------------------------------------------------------------------------------------------


def environment(whole: Mapping[str, Any]) -> dict[str, Any]:
    """Return the versions in an identity: those of torch, of this package's numerics, and of libraries."""
    return {k: v for k, v in whole.items() if k not in RunConfig.__dataclass_fields__}


def study_environment(config: Config) -> dict[str, Any]:
    """Return the versions in the identities of a study's runs, including the libraries of all its parts."""
    choices = _named_in(to_dict(config))
    return _environment({PART[group].libraries.get(choice, "") for group, choice in choices} - {""})


def _environment(libraries: Iterable[str]) -> dict[str, Any]:
    """Return the versions in the identity of a run with these libraries: inside `recorded_environment`, the
    recorded ones, and otherwise the installed ones. An old record may lack libraries."""
    recorded = _RECORDED.get({})
    versions = recorded.get("libraries", {}) if recorded else {n: library_version(n) for n in libraries}
    used = {name: versions[name] for name in sorted(libraries) if name in versions}
    now = {"torch": _torch_version(), "numerics_version": NUMERICS_VERSION, **recorded, "libraries": used}
    return now if used else {k: v for k, v in now.items() if k != "libraries"}


def by_name(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Return an environment as one flat mapping from name to version, including the libraries."""
    others = {k: v for k, v in environment.items() if k != "libraries"}
    return {**others, **environment.get("libraries", {})}


def _named_in(settings: Any) -> Iterator[tuple[str, str]]:
    """Yield (group, choice) for each choice made in `settings`, at any depth, in a group with choices that
    external libraries implement. Names in a list of `optimizers` are included."""
    if not isinstance(settings, Mapping):
        return
    for key, value in settings.items():
        if key in PART and PART[key].libraries and isinstance(value, Mapping):
            yield key, str(value.get("name"))
        elif key == "optimizers":
            yield from (("optimizer", str(name)) for name in value)
        yield from _named_in(value)


@contextmanager
def recorded_environment(environment: Mapping[str, Any]) -> Iterator[None]:
    """Name the runs in the block by a recorded `environment`, as a study made with another torch needs."""
    token = _RECORDED.set(dict(environment))
    try:
        yield
    finally:
        _RECORDED.reset(token)


@functools.cache
def _torch_version() -> str:
    """Return major.minor of the installed torch, without importing it."""
    return ".".join(metadata.version("torch").split(".")[:2])


@functools.cache
def library_version(name: str) -> str | None:
    """Return the public version of a library without importing it, or None if it is not installed."""
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def canonical_json(value: Any) -> str:
    """Return JSON that is the same for equal values: sorted keys, no spaces. Raises ValueError for NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """Return the sha256 of a value's canonical JSON, as 64 hex digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()

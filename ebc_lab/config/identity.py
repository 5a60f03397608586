"""What names a run: exactly the settings and versions that can change its numbers."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import metadata
from typing import Any

from .choices import OWN, groups, kind_of
from .dicts import run_part, to_dict
from .errors import UserError
from .fields import CUSTOM, UNSET, Setting, setting_of
from .fields import number as number
from .part import Tail
from .parts import PART, PARTS
from .parts.init import INIT, is_named
from .parts.lr_schedule import WARMED
from .schema import Config, RunConfig

_RECORDED: ContextVar[dict[str, Any]] = ContextVar("recorded environment")
NAMED_BY = 10  # hex digits of a run's identity at the end of its name
NUMERICS_VERSION = 6  # bump by hand when a change of code changes a run's numbers
OF_BLOCKS = ("blocks", "width", "heads", "dropout")  # of the model, in an ebm made of them


def with_derived_settings(run: RunConfig) -> RunConfig:
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

    What nobody reads is left out (the budget of a run without EBC, the warm-up of a constant schedule), as
    are parts and settings at their neutral choice, so that equal computations get equal names. Raises
    UserError while `auto` is left.
    """
    run = with_derived_settings(run_part(run))
    corpus_known = run.data.sha256 and (run.tokens.name == "characters" or run.tokens.sha256)
    if "auto" in (run.dtype, run.device, run.compile) or not run.threads_per_run or not corpus_known:
        raise UserError(
            "dtype, threads_per_run, compile, device and corpus must be resolved before a run can be named."
        )
    if not is_named(INIT.of(run)):
        raise UserError("the weights of init.run must be looked at before a run can be named.")
    whole = to_dict(run)
    named = {key: whole[key] for key in read_settings(run, "name") if key not in PART}
    for part in PARTS:
        settings = getattr(run, part.name)
        group, choices = part.read_by or ("", ())
        read = not group or kind_of(group, getattr(run, group)) in choices
        if read and not part.neutral(settings):
            kind = kind_of(part.name, settings)
            idle = part.idle(settings)
            keys = [key for key in read_settings(settings, kind) if key not in idle]
            named[part.name] = {key: whole[part.name][key] for key in keys}
    _name_own_parts(named, run)
    _name_parts_that_belong_together(named, run, whole)
    named["torch"] = _torch_version()
    named["numerics_version"] = NUMERICS_VERSION
    return named | _versions_of(_libraries_of(run))


def read_settings(settings: Any, kind: str) -> list[str]:
    """The settings of a group, whose choice is `kind`, that are part of a run's identity."""
    read = []
    cls: Any = type(settings)
    for name, setting in _named_settings(cls):
        if setting.only and not setting.in_run_id_even_unread:
            at = kind if setting.of == "name" else getattr(settings, setting.of)
            if at not in setting.only:
                continue
        if setting.unnamed_at is UNSET or getattr(settings, name) != setting.unnamed_at:
            read.append(name)
    return read


@functools.cache
def _named_settings(cls: Any) -> list[tuple[str, Setting]]:
    every = [(field.name, setting_of(field)) for field in dataclasses.fields(cls)]
    return [(name, setting) for name, setting in every if setting.in_run_id]


def _name_own_parts(named: dict[str, Any], run: RunConfig) -> None:
    """A user's own part is named by its target, arguments and file, whatever it is called. Raises UserError
    where a part's file has not been looked at."""
    for group in OWN:
        part = getattr(run, group)
        if kind_of(group, part) == CUSTOM:
            if not part.sha256:
                raise UserError(f"{group}.target must be found before a run can be named.")
            named[group]["name"] = CUSTOM


def _name_parts_that_belong_together(named: dict[str, Any], run: RunConfig, whole: Mapping[str, Any]) -> None:
    """What one part reads of another: without EBC only the rows that an audit leaves out matter of a budget,
    with a radius for each group its groups too; an ebm reads the sizes of its blocks alone; exact sums depend
    on no thread, unless the run is there to show what its circumstances change."""
    if run.stabilizer.name != "ebc":
        del named["controller"]
        grouped = run.stabilizer.name == "trust_region" and run.stabilizer.per == "group"
        clustered = ("clusters",) if run.budget.grouping == "kmeans" else ()
        of_groups = ("grouping", *clustered) if grouped else ()
        named["budget"] = {key: whole["budget"][key] for key in ("probe_sequences", *of_groups)}
    if run.workload.name == "ebm":
        blocks = "transformer" in (run.encoder.name, run.decoder.name)
        sizes = ("context", *OF_BLOCKS) if blocks else ("context",)
        named["model"] = {key: whole["model"][key] for key in sizes}
    if run.capability != "auto":
        named["determinism"] = whole["determinism"]
    elif run.determinism.exact:
        del named["threads_per_run"]


def _libraries_of(run: RunConfig) -> set[str]:
    """The distributions whose code computes a run, torch aside."""
    chosen = [(part.libraries, kind_of(part.name, getattr(run, part.name))) for part in PARTS]
    return {libraries[kind] for libraries, kind in chosen if kind in libraries}


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
    reads = kind_of("lr_schedule", run.lr_schedule) in WARMED
    return run.lr_schedule.warmup_steps if reads else None


def tails_of(run: RunConfig) -> list[Tail]:
    """What is no default of a run's parts, in the order in which names and labels have it: the schedules of
    the target KL (or of a trust region) and of the learning rate, model, levels, workload, determinism."""
    run = with_derived_settings(run)
    unread = () if run.stabilizer.name == "ebc" else ("budget", "controller")
    parts = [part for part in PARTS if part.name not in unread]
    tails = [tail for part in parts for tail in part.tail(getattr(run, part.name))]
    return [tail for tail in tails if tail.name]


def tail_of(run: RunConfig) -> str:
    """How the names of runs and arms end: `_holddelta_trapezoid_w100_ternary`."""
    return "".join(tail.name for tail in tails_of(run))


def tails_of_choices() -> dict[str, Tail]:
    """Every tail that a single choice of a part gives a name: `_ternary`, `_lrdecay`."""
    tails: dict[str, Tail] = {}
    for part in PARTS:
        usual = part.settings()
        for field in dataclasses.fields(usual):
            values = groups().get(part.name, ()) if field.name == "name" else setting_of(field).choices
            for value in values:
                changed = dataclasses.replace(usual, **{field.name: value})
                tails |= {tail.name: tail for tail in part.tail(changed) if tail.name}
    return tails


def run_id(kind: str, run: RunConfig) -> str:
    """The name of a run: a slug that a person can read, and the start of its identity's hash."""
    return _names_of(kind, run)[0]


def _names_of(kind: str, run: RunConfig) -> tuple[str, str]:
    lead = "" if kind == "train" else f"{kind}_"
    slug = f"{lead}{stem_of(run)}_lr{number(run.optimizer.lr)}{tail_of(run)}_n{run.steps}_s{run.seed}"
    sha256 = digest(identity_of(kind, run))
    return f"{slug}-{sha256[:NAMED_BY]}", sha256


_NAMES: dict[bytes, tuple[str, str]] = {}  # digest of a run and of what else its name depends on -> its names
MOST_NAMES = 200_000


def names_of(kind: str, run: RunConfig) -> tuple[str, str]:
    """`run_id`, and the sha256 of the identity; remembered, because a plan of thousands of runs asks for the
    names of all of them again and again."""
    versions = [library_version(name) for name in sorted(_libraries_of(run))]
    around = (kind, _RECORDED.get({}), _torch_version(), NUMERICS_VERSION, versions)
    try:
        key = hashlib.blake2b(pickle.dumps((run_part(run), around)), digest_size=16).digest()
    except (pickle.PicklingError, TypeError, AttributeError):  # a setting that is no plain value
        return _names_of(kind, run)
    if key not in _NAMES:
        if len(_NAMES) >= MOST_NAMES:
            _NAMES.clear()
        _NAMES[key] = _names_of(kind, run)
    return _NAMES[key]


def identity_of(kind: str, run: RunConfig) -> dict[str, Any]:
    """A training run's identity, or that of a measurement made at a run's shape."""
    named = identity(run)
    libraries = named.pop("libraries", {})
    named |= {k: v for k, v in _RECORDED.get({}).items() if k != "libraries"}
    named |= _versions_of(libraries)
    return named if kind == "train" else {"kind": kind, "run": named}


def matches_run_id(kind: str, run: RunConfig, run_id: str) -> bool:
    """Whether a run's name is the one that its settings give it."""
    return run_id.endswith(f"-{digest(identity_of(kind, run))[:NAMED_BY]}")


def environment(whole: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a run's identity that is not a setting: the versions of torch, of our numerics, and of the
    libraries that its parts come from."""
    return {k: v for k, v in whole.items() if k not in RunConfig.__dataclass_fields__}


def study_environment(config: Config) -> dict[str, Any]:
    """The same for all the runs that a study may plan: its libraries are those of every part that its
    settings name."""
    recorded = environment(identity_of("train", config))
    recorded.pop("libraries", None)
    choices = _named_in(to_dict(config))
    named = {PART[group].libraries[choice] for group, choice in choices if choice in PART[group].libraries}
    return recorded | _versions_of(named)


def _versions_of(libraries: Iterable[str]) -> dict[str, dict[str, str | None]]:
    """`{"libraries": {name: version}}`, as recorded or as installed; empty for none, and where the record was
    made before libraries were recorded."""
    recorded = _RECORDED.get({})
    versions = recorded.get("libraries", {}) if recorded else {n: library_version(n) for n in libraries}
    used = {name: versions[name] for name in sorted(libraries) if name in versions}
    return {"libraries": used} if used else {}


def by_name(environment: Mapping[str, Any]) -> dict[str, Any]:
    """An environment with its libraries beside the rest: `torch`, `numerics_version`, `torchao`."""
    others = {k: v for k, v in environment.items() if k != "libraries"}
    return {**others, **environment.get("libraries", {})}


def _named_in(settings: Any) -> Iterator[tuple[str, str]]:
    """(group, choice) of every `optimizer: {name: …}` and `optimizers: […]`, and of every other part some of
    whose choices a library computes."""
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
    """Name runs as in a recorded `environment`, so that a study can be read under another torch."""
    token = _RECORDED.set(dict(environment))
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

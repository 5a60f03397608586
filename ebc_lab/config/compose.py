"""Composition of Hydra overrides and the files of `conf/` into a validated `Config`.

A mistake is refused in one sentence, with the nearest valid spelling, before anything is written.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from . import overrides as written
from . import schema
from .choices import choices_of, further_choices, groups, meant, offered, read_choice
from .dicts import from_dict, to_dict
from .errors import UserError, any_of, nearest, require, shown
from .fields import CUSTOM
from .hints import STUDY_DECIDES, near_setting
from .identity import digest
from .machine import visible_gpus
from .overrides import ARM, FROM, check_overrides, in_mapping, schema_keys
from .own.files import ENDINGS, GROUP, WHOLE, OwnFile, conf_dir, with_places
from .own.parts import own_name, with_names, with_sources
from .parts.init import InitConfig
from .parts.tokens import refuse_two_lengths, set_steps
from .parts.workload import fit_to_images
from .schema import STAGES, ArmConfig, Config, MethodConfig, RunConfig
from .study_checks import lacking_for, validate

ENTRIES = {  # setting of a study that maps names to entries -> what an entry is, and how one is written
    "ablation.arms": ("arm", "{lr_scale: 2, settings: {…}}"),
    "ladder.rungs": ("rung", "{width_scale: 2, steps: 4}"),
    "carry.arms": ("arm", "{unit: …, over: optimizer.lr, grid: […], settings: {…}}"),
    "carry.settings": ("setting", "{about: …, settings: {…}}"),
    "profiles.methods": ("method", "{about: …, settings: {…}, grid: {optimizer.lr: […]}}"),
    "profiles.workloads": ("workload", "{about: …, settings: {…}}"),
}
ENTRY = re.compile(rf"({'|'.join(map(re.escape, ENTRIES))})\.([^.]+)(\..+)?")  # or a setting inside an entry
OF_GRID = re.compile(  # a grid's setting
    r"(ablation\.(?:arms\.[^.]+|mine\.template)\.(?:tune|grows)"
    r"|profiles\.(?:methods\.[^.]+|mine\.template)\.grid)\.(.+)"
)
NUMBERS = {"Float": "a number", "Integer": "a whole number", "Boolean": "true or false"}
SUITES_FOR_MINE = "study=optimizers, study=ladder, study=stabilizers, study=schedules or study=calibrated"


def compose(
    overrides: Sequence[str],
    *,
    study: bool = True,
    here: bool = True,
    sources: bool = True,
    trains: bool = True,
) -> Config:
    """Return the validated configuration that overrides ask for.

    `overrides` are as on the command line; `from=FILE` among them starts from the settings that a study or a
    run recorded. `study`: they configure a study, not a run. Then `optimizer=`, `projection=` and `budget=`
    choose what the study covers, and settings that a stage decides are refused. `here`: this machine trains,
    so it must have the device. `sources`: read the source files of user-defined parts and fill in their
    checksums. `trains`: the libraries that training needs must be installed.

    Raises UserError for an unknown key or choice, with the nearest valid ones, a wrong type, or a bad value.
    """
    overrides = [written.listed(o) for o in overrides]
    given = check_overrides(overrides)
    parsed, own = meant(given)
    refuse_two_lengths(parsed)
    if study:
        overrides += (narrowed := _narrow(parsed))
        parsed |= check_overrides(narrowed)
    recorded = begun_from(parsed, study=study)
    if not (recorded or "scale" in parsed):
        overrides.append(default_scale())
    _register_own(own)
    left_out = [o[1:].partition("=")[0] for o in overrides if o.startswith("~")]  # arms: nothing else can be
    config = _composed([o for o in overrides if not o.startswith("~")], own, parsed, recorded)
    parsed |= dict.fromkeys(left_out)
    try:
        for target in config.mine:
            written_so = isinstance(target, str) and (":" in target or target.endswith(".py"))
            require(written_so, f"mine={shown(target)}: yours is written ./file.py:Class or module:function.")
        config = _with_rivals(_leaving_out(config, left_out))
        config = _with_mine(with_names(config), study=study)
        config = _by_their_targets(with_sources(config)) if sources else config
        beside = replace(config, **vars(recorded.run)) if recorded and recorded.run else None
        validate(config, study=study, here=here, beside=beside)
        for sentence in lacking_for(config, study=study) if trains else ():
            raise UserError(sentence)
    except UserError as error:  # the line of the user's own file goes first, if it sets what is refused
        key = re.match(r"[a-z_]+(\.\w+)*", str(error))
        raise UserError(f"{_place(own, key[0], parsed) if key else ''}{error}") from None
    suites = [file.path for file in own if file.group == GROUP] or (recorded.suites if recorded else [])
    # the chosen one comes first, before those it builds on, and keeps its name from another of that name
    named = {path.name: str(path) for path in [*suites, *suites[:1]]}
    return replace(config, own_files={**named, **config.own_files})


def _leaving_out(config: Config, keys: Sequence[str]) -> Config:
    """Return the configuration without the arms that `keys` name. Raises UserError for an unknown arm."""
    arms = dict(config.ablation.arms)
    for key in keys:
        name = key.rpartition(".")[2]
        require(
            name in config.ablation.arms,
            f"~ablation.arms.{shown(name)}: the suite has no such arm{nearest(name, list(arms))}; leave out "
            f"{any_of([*arms]) if arms else 'one that it has'}.",
        )
        arms.pop(name, None)
    return replace(config, ablation=replace(config.ablation, arms=arms))


def _composed(
    overrides: Sequence[str], own: Collection[OwnFile], values: Mapping[str, Any], recorded: Recorded | None
) -> Config:
    """Compose the configuration with Hydra from those overrides that choose a group's option, then apply the
    settings in `values`, and return it."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException

    register_schema()
    GlobalHydra.instance().clear()
    try:
        keys = {o.partition("=")[0] for o in overrides}
        choices = [o for o in overrides if o.partition("=")[0].lstrip("+") in groups()]
        with hydra.initialize_config_dir(**hydra_base(), config_dir=str(conf_dir().resolve())):
            composed = hydra.compose(*hydra_words(choices, recorded))
        with open_dict(composed):
            for key in [key for key in values if key != FROM and key not in groups()]:
                _set(composed, key, values, new=f"+{key}" in keys)
        if not recorded:
            fit_to_images(composed, values)
        set_steps(composed, values)
        written.refuse_references(OmegaConf.to_container(composed, resolve=False))
        config: Config = OmegaConf.to_object(composed)  # type: ignore[assignment]
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_refusal(error, own, values)) from None
    except (RecursionError, OverflowError):
        raise UserError("a setting refers to itself, or holds a number that is too large.") from None
    return config


def _register_own(own: Mapping[OwnFile, Mapping[str, Any]]) -> None:
    """Register with Hydra the settings in the user's files. Raises UserError for an unknown setting."""
    for file, settings in own.items():
        _register(file.chosen_name, settings, file.group)
        if file.group == "scale":  # conf/config.yaml chooses `ebm` by the name of the scale
            _register(file._replace(group="ebm").chosen_name, {"defaults": [settings["scale"]]}, "ebm")
        prefix = "" if file.group in WHOLE else f"{file.group}."
        for key in _keys({name: inner for name, inner in settings.items() if name != "defaults"}, prefix):
            if key not in schema_keys() and not in_mapping(key):
                near = near_setting(key, [*schema_keys(), *groups()])
                raise UserError(f"{_line(file, key)}: {key} is not a setting{near}.")


def _register(name: str, settings: Any, group: str | None = None) -> None:
    """Register settings with Hydra under a name, in the place of those of an earlier call, if any."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    known = store.repo.get(group, {}) if group else store.repo
    known.pop(f"{name}.yaml", None)  # Hydra 1.4 warns of a name that is taken
    store.store(name, settings, group, package="_global_" if group in WHOLE else None)


def _keys(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted path of every setting and of every mapping that contains settings."""
    for name, value in settings.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{name}.")


def _line(file: OwnFile, key: str) -> str:
    """Return where a file sets a key, such as `mine.yaml:12`, or `mine.yaml` if the line is unknown."""
    line = file.line_of(key)
    return file.path.name if line is None else f"{file.path.name}:{line}"


def _place(own: Collection[OwnFile], key: str, values: Mapping[str, Any]) -> str:
    """Return where one of the user's files sets a key, such as `mine.yaml:12: `. Return an empty string if
    none does, or an override does as well."""
    others = values.keys() - {file.group for file in own}
    if any(key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.") for other in others):
        return ""
    arm = ARM.match(key)
    files = (f for f in own if f.line_of(key) is not None and (arm is None or f.sets(arm[0])))
    return next((f"{_line(file, key)}: " for file in files), "")


def _set(composed: Any, key: str, values: Mapping[str, Any], *, new: bool) -> None:
    """Set a dotted key of the configuration. With `new`, a setting inside a missing entry begins that entry.
    Raises UserError if an entry is not a mapping or, without `new`, is missing."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if (match := ENTRY.fullmatch(key)) and match[3] is None:
        require(isinstance(values[key], Mapping), f"{key}: {_an_entry(key)}")
    elif match and not new:
        entry = f"{match[1]}.{match[2]}"
        what, whole = ENTRIES[match[1]]
        targets = values.get("mine", composed.mine) or ()
        mine = [own_name(str(target)) for target in targets] if what in ("arm", "method") else []
        some = "lr_scale=2" if ARM.fullmatch(entry) else "about=…"
        require(
            match[2] in [*OmegaConf.select(composed, match[1]), *mine] or entry in values,
            f"{entry}: the suite has no such {what}{nearest(match[2], mine)}; a new one is begun with a +, "
            f"+{entry}.{some}, or written whole, {entry}={whole}",
        )
    setting: Any = values[key]
    for name in reversed(_names(key)):
        setting = {name: setting}
    try:
        composed.merge_with(setting)
    except OmegaConfBaseException as error:
        error.full_key = error.full_key or key  # some errors do not name the key
        raise


def _names(key: str) -> list[str]:
    """Return the names of which a key is made: of a grid's setting, such as optimizer.beta2, a single one."""
    in_grid = OF_GRID.fullmatch(key)
    return [*in_grid[1].split("."), in_grid[2]] if in_grid else key.split(".")


def _an_entry(key: str) -> str:
    """Return how to write an entry, as a message for an entry that is not a mapping."""
    what, whole = ENTRIES[key.rpartition(".")[0]]
    leave = f"; '~{key}' leaves it out" if ARM.fullmatch(key) else ""
    return f"{'an' if what == 'arm' else 'a'} {what} is a mapping, {whole}{leave}"


def implied(overrides: Sequence[str]) -> list[str]:
    """Return the overrides of one run, followed by those that they imply: stabilizer=none for updates inside
    backward, unless a stabilizer or budget is chosen, and budget=shadow for EBC under determinism=verity,
    unless a budget is chosen."""
    parsed, _ = meant(check_overrides(overrides, hydra_keys=True, sweeps=True))
    if FROM in parsed:  # a record leaves nothing open
        return list(overrides)
    by_group = parsed.get("memory") in ("hooks", "all")
    hooked = str(parsed.get("memory.hooks", by_group)).lower() in ("true", "yes", "on", "1")
    asked = any(key.partition(".")[0] in ("stabilizer", "budget") for key in parsed)
    exact = parsed.get("determinism", parsed.get("determinism.name")) == "verity"
    with_ebc = parsed.get("stabilizer", "ebc") == "ebc" and "budget" not in parsed
    return [
        *overrides,
        *["stabilizer=none"] * (hooked and not asked),
        *["budget=shadow"] * (exact and with_ebc),
    ]


def _refusal(error: Exception, own: Collection[OwnFile], values: Mapping[str, Any]) -> str:
    """Return an error of Hydra or OmegaConf as one sentence, with the line at fault in a user's file."""
    text = str(error.__cause__ or error)
    lines = [line for line_text in text.splitlines() if (line := line_text.strip())] or [repr(error)]
    if re.match(r"In '\w+/own-", lines[0]):  # it adds nothing to the next line
        lines = lines[1:]
    first = " ".join(lines[:2]) if lines[0].endswith("composing config:") else lines[0]
    named = re.search(r"^\s*full_key: (\S+)$", text, re.MULTILINE)
    key = getattr(error, "full_key", None) or (named and named[1])
    if re.search(r"is not a ListConfig|DictConfig with ListConfig|type hint 'typing\.List", first) and key:
        first = f"it is a list, {key}=[…]"
    if re.search(r"Cannot assign \w+ to Dict|type hint 'typing\.Dict", first) and key:
        first = f"it is a mapping, '{key}={{NAME: …}}'"
    if key and re.search("is not a subclass of|is not Optional", first) and ENTRY.fullmatch(key):
        first = _an_entry(key)
    if match := re.match(r"Key '(\w+)' not in '(\w+)'", first):
        kind = getattr(schema, match[2], None)
        known = [field.name for field in fields(kind)] if kind else []
        first = f"there is no such setting{nearest(match[1], known)}"
    if match := re.match(r"Value '(.*)' of type '\w+' could not be converted to (\w+)", first):
        first = f"{shown(match[1])} is not {NUMBERS.get(match[2], match[2])}"
    where = _place(own, key, values) if key else ""
    return f"{where}{key + ': ' if key else ''}{first[:300]}"


def default_scale() -> str:
    """Return the override for the scale that suits this machine: `paper` with a GPU, otherwise `laptop`."""
    return "scale=paper" if visible_gpus() else "scale=laptop"


def hydra_base() -> dict[str, Any]:
    """Return the argument `version_base` for Hydra 1.3, or none for Hydra 1.4, which warns about it."""
    from hydra import __version__

    return {"version_base": "1.3"} if __version__.startswith("1.3.") else {}


@functools.cache
def register_schema() -> None:
    """Register with Hydra the schema, so that types are enforced, and the choices of installed packages."""
    _register("schema", Config)
    _register("parts", {"defaults": [{group: choice} for group, choice in further_choices().items()]})
    for group, targets in offered().items():
        for name in sorted(targets.keys() - set(groups()[group])):
            several = len(targets[name]) > 1  # refused once it is chosen
            node = {**read_choice(group, CUSTOM), "name": name} if several else read_choice(group, name)
            _register(name, node, group)


def _narrow(parsed: Mapping[str, Any]) -> list[str]:
    """Return overrides that limit a study to the chosen optimizer, projection and budget. Raises UserError
    for a setting that the study decides by itself."""
    for key, governor in STUDY_DECIDES.items():
        require(key not in parsed, f"{key} is decided by the study itself: it follows {governor}.")
    if parsed.get("stabilizer", "ebc") != "ebc":
        raise UserError(
            f"stabilizer={parsed['stabilizer']} cannot be chosen for a study: the stages run EBC and the "
            "plain optimizer, study=stabilizers the rivals, `ebc-lab train` any one of them."
        )
    lists = {
        "lr_sweep.optimizers": "optimizer",
        "lr_sweep.projections": "projection",
        "calibrate.budgets": "budget",
    }
    return [
        f"{key}=[{parsed[group]}]" for key, group in lists.items() if group in parsed and key not in parsed
    ]


def configurations(
    overrides: Sequence[str], *, multirun: bool = False, stage: str | None = None, trains: bool = True
) -> list[Config]:
    """Return the studies' configurations: one or, with `multirun`, one for each combination of values, named
    after what varies. `trains`: as in `compose`, for one study. Raises UserError for any mistake."""
    require(stage in (None, *STAGES), f"{stage} is not a stage; the stages are {', '.join(STAGES)}.")
    if not multirun:
        return [compose(overrides, trains=trains)]
    combinations = written.expand(overrides)
    varying = [o for i, o in enumerate(combinations[0]) if any(c[i] != o for c in combinations)]
    keys = [o.partition("=")[0] for o in varying]
    made = []
    for combination in combinations:
        config = compose(combination)
        varied = [o.replace("=", "_") for o in combination if o.partition("=")[0] in keys]
        if varied and "study.name" not in keys:
            slug = re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(varied)).strip("-")
            config = replace(config, study=replace(config.study, name=f"{config.study.name}_{slug}"[:80]))
        made.append(config)
    for config in made:
        validate(config, study=True, here=True)  # a name made from values may be invalid
    names = [c.study.name for c in made]
    unique = len(set(names)) == len(names)
    require(unique, "two combinations would share a study's name: vary study.name as well.")
    return made


# -- from=: the settings that a study or a run recorded ------------------------------------------------------

PRIMARY = "recorded"  # Hydra's name for the settings that replace conf/config.yaml
OWN_FOLDER = "own"  # in a study's folder: its copies of the user's own files
MOST_BYTES = 64 << 20


class Recorded(NamedTuple):
    """The settings that a study or a run recorded."""

    settings: dict[str, Any]
    suites: Sequence[Path] = ()  # a study's copies of a suite of the user's own, and of those it builds on
    run: RunConfig | None = None  # only other runs of its study may have read some of its settings


def begun_from(parsed: Mapping[str, Any], *, study: bool) -> Recorded | None:
    """Register the settings recorded in the file of `from=` with Hydra and return them; None without `from=`.

    If an override chooses a group, the recorded settings of that group are dropped. Raises UserError if this
    version cannot read the file as a study.json (for a study) or a spec.json (for a run).
    """
    from omegaconf import OmegaConf

    if FROM not in parsed:
        return None
    file = f"{FROM}={shown(parsed[FROM])}"
    for key in ("scale", GROUP):
        require(
            key not in parsed,
            f"{file} has a scale and a suite already: leave {key}={shown(parsed.get(key))} out, and set what "
            "is to be different.",
        )
    path = Path(str(parsed[FROM])).expanduser()
    record = _record(path, file)
    other, command = ("a run", "train") if study else ("a study", "autopilot")
    require(
        ("requested" in record) == study,
        f"{file} is {other}'s: `ebc-lab {command} {file}` begins from it.",
    )
    try:
        recorded = _recorded_study(path, record) if study else _recorded_run(path, record)
    except UserError as error:
        raise UserError(f"{file}: {str(error).rstrip('.')}.") from None
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error!r}): get the file again.") from None
    # these settings replace conf/config.yaml as Hydra's primary configuration, which leaves the groups open,
    # so that overrides can choose them
    usual: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "config.yaml"))
    chosen: dict[str, str | None] = dict.fromkeys(group for group in groups() if group != "scale")
    chosen |= {"launcher": "local", "tracker": "none"}
    base = [] if study else [{"scale": "laptop"}]  # a run's record lacks the settings of stages
    defaults = ["schema", *base, "_self_", *({group: choice} for group, choice in chosen.items())]
    kept = {k: v for k, v in recorded.settings.items() if k not in parsed or k not in groups()}
    _register(PRIMARY, {"defaults": defaults, "hydra": usual["hydra"], **kept})
    return recorded


def _record(path: Path, file: str) -> dict[str, Any]:
    """Return the contents of a study.json or spec.json, without its checksum. Raises UserError if the file is
    anything else, is unreadable, or does not match the checksum that it carries."""
    require(path.exists(), f"{file} is not there: give the study.json of a study, or the spec.json of a run.")
    require(not path.is_dir(), f"{file} is a folder: give the study.json, or the spec.json of a run, in it.")
    require(path.is_file(), f"{file} is not a file but a pipe or a device: give a study.json or a spec.json.")
    require(
        path.suffix != ".zip" and not zipfile.is_zipfile(path),
        f"{file} is a bundle: unpack it with `ebc-lab report`, and give the study.json in its folder.",
    )
    try:
        require(path.stat().st_size <= MOST_BYTES, f"{file} is larger than any file that ebc-lab writes.")
        record = json.loads(path.read_text(encoding="utf-8"))
        checksum = record.pop("checksum", None) if isinstance(record, dict) else None
        edited = checksum is not None and checksum != digest(record)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({error}): get the file again.") from None
    require(
        not edited, f"{file} was edited after it was written: undo that, and set what is to be different."
    )
    require(
        isinstance(record, dict) and isinstance(record.get("config"), dict),
        f"{file} holds no settings of a study or a run: give a study.json or a spec.json.",
    )
    return dict(record)


def _recorded_study(path: Path, record: Mapping[str, Any]) -> Recorded:
    """Return the settings that a study was asked for, with the checksum of the text that the study found."""
    config: Config = from_dict(Config, record["requested"])
    text = {key: record["config"]["data"].get(key) for key in ("name", "sha256")}
    settings = to_dict(replace(config, data=replace(config.data, **text)))
    own = path.parent / OWN_FOLDER
    copies = [own / name for name in (record.get("own") or {}).get("files", ()) if name.endswith(ENDINGS)]
    kept = {key: value for key, value in settings.items() if key not in schema.NOT_THE_STUDY}
    return Recorded(with_places(kept, own), [copy for copy in copies if copy.is_file()])


def _recorded_run(path: Path, record: Mapping[str, Any]) -> Recorded:
    """Return the settings of a run. The runs that it starts from or replays are looked for beside it."""
    require(record.get("kind") == "train", "it is a measurement's, which its study makes again by itself")
    run: RunConfig = from_dict(RunConfig, record["config"])
    runs = path.absolute().parent.parent
    for part, name in ((run.lr_schedule, "source"), (InitConfig.from_run(run), "run")):
        other = getattr(part, name)
        if other and (runs / other).is_dir():
            setattr(part, name, str(runs / other))
    return Recorded(with_places(to_dict(run), runs.parent / OWN_FOLDER), run=run)


def hydra_words(overrides: Sequence[str], recorded: Recorded | None = None) -> tuple[str, list[str]]:
    """Return the name of the primary configuration, and the overrides as Hydra spells them, leaving out any
    `from=`."""
    others = [written.spelled(o) for o in overrides if not o.startswith(f"{FROM}=")]
    return PRIMARY if recorded else "config", others


def hydra_settings(name: str, overrides: Sequence[str]) -> Any:
    """Return Hydra's own part of the configuration that `name` and the overrides compose. Hydra then resolves
    `${hydra:…}` from it. Raises UserError."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException

    try:
        with initialize_config_dir(**hydra_base(), config_dir=str(conf_dir().resolve())):
            composed = hydra_compose(name, list(overrides), return_hydra_config=True)
    except HydraException as error:
        message = f"{error}\n{error.__cause__ or ''}".partition("Config search path")[0]
        lines = [line.strip() for line in message.splitlines() if not line.startswith(("To append", " "))]
        raise UserError(" ".join(filter(None, lines))) from None
    HydraConfig.instance().set_config(composed)  # for ${hydra:…}
    return composed.hydra


# -- rivals= and mine=: further arms of a suite, and own parts as arms and methods ---------------------------

Entry = TypeVar("Entry", bound=ArmConfig | MethodConfig)


def _with_rivals(config: Config) -> Config:
    """Return the configuration with the further arms of the suite that `rivals` names, and no others. Raises
    UserError for a name that the suite does not know."""
    suite = config.ablation
    known = suite.arms | suite.further
    for name in config.rivals:
        offered = any_of([*known]) if known else "none: it goes with study=optimizers or study=ladder"
        require(name in known, f"rivals={shown(name)}: this study takes {offered}{nearest(name, [*known])}.")
    arms = suite.arms | {name: known[name] for name in config.rivals}
    return replace(config, ablation=replace(suite, arms=arms, further={}))


def _with_mine(config: Config, *, study: bool) -> Config:
    """Return the configuration with an arm of the suite, or a method of `profiles`, for each part that `mine`
    names; the part's function names it. The study's answer is about these. Raises UserError if there is no
    place for them."""
    if not config.mine:
        return config
    suite, profiles, first = config.ablation, config.profiles, shown(config.mine[0])
    require(study, f"mine={first} goes with a study: `ebc-lab autopilot {SUITES_FOR_MINE} mine=…`.")
    require(
        bool(suite.mine.group or profiles.mine.group),
        f"mine={first}: this study has no place for it; add {SUITES_FOR_MINE}.",
    )
    if suite.mine.group:
        arms, made = _entries_of_mine(config.mine, suite.mine.group, suite.mine.template, suite.arms)
        mine = replace(suite.mine, arms=list(dict.fromkeys([*suite.mine.arms, *made])))
        suite = replace(suite, arms=arms, mine=mine)
    if profiles.mine.group:
        methods, made = _entries_of_mine(
            config.mine, profiles.mine.group, profiles.mine.template, profiles.methods
        )
        asked_about = list(dict.fromkeys([*made, *profiles.asked_about]))
        profiles = replace(profiles, methods=methods, asked_about=asked_about)
    return replace(config, ablation=suite, profiles=profiles)


def _entries_of_mine(
    targets: Sequence[str], group: str, template: Entry, entries: Mapping[str, Entry]
) -> tuple[dict[str, Entry], list[str]]:
    """Return the entries with one for each target, made by the template, and the names of those."""
    entries = dict(entries)
    tuned_alone = {n: entry for n, entry in entries.items() if not getattr(entry, "tuned_as", None)}
    known = _names_by_target(group, tuned_alone)
    made = []
    for target in dict.fromkeys(targets):
        name = known.get(target)
        if name is None:
            without_part = {n for n, entry in entries.items() if group not in entry.settings}
            name = own_name(target, [*(set(entries) - without_part), *choices_of(group, None)])
            like = _merged(template, entries[name]) if name in without_part else template
            entry = copy.deepcopy(like)
            part = {**entry.settings.get(group, {}), "name": name, "target": target}
            settings = {**entry.settings, group: part}
            entries[name] = replace(entry, about=entry.about or target, settings=settings)
        made.append(name)
    return entries, made


def _names_by_target(group: str, entries: Mapping[str, ArmConfig | MethodConfig]) -> dict[str, str]:
    """Return the name of each arm or method whose part in `group` has a target, by target."""
    parts = {name: entry.settings.get(group) for name, entry in entries.items()}
    return {p["target"]: name for name, p in parts.items() if isinstance(p, Mapping) and p.get("target")}


def _merged(template: Entry, entry: Entry) -> Entry:
    """Return the template overlaid with the settings of `entry` that differ from the defaults."""
    usual = type(entry)()
    settings = {key: value for key, value in vars(entry).items() if value != getattr(usual, key)}
    for key in settings.keys() & {"settings", "tune", "grid"}:
        settings[key] = {**getattr(template, key), **settings[key]}
    return replace(template, **settings)


def _by_their_targets(config: Config) -> Config:
    """Return the configuration with `mine`, unless it is empty, set to the resolved targets of the arms and
    methods that the study's answer is about."""
    if not config.mine:
        return config
    suite, profiles = config.ablation, config.profiles
    arms = {name: suite.arms[name] for name in suite.mine.arms}
    methods = {name: of for name, of in profiles.methods.items() if name in profiles.asked_about}
    known = _names_by_target(suite.mine.group, arms) | _names_by_target(profiles.mine.group, methods)
    return replace(config, mine=list(known))

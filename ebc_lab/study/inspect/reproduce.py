"""The commands that run something again: one run exactly, or a study with the settings it was asked for."""

from __future__ import annotations

import functools
import itertools
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebc_lab.config.choices import OWN_GROUPS, groups, read_choice
from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import flat, run_part, to_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.fields import CUSTOM
from ebc_lab.config.hints import STUDY_DECIDES
from ebc_lab.config.overrides import in_mapping
from ebc_lab.config.own.entry_points import offered
from ebc_lab.config.own.names import own_name
from ebc_lab.config.schema import GONE, ArmConfig, Config, LauncherConfig, RunConfig

from ..store.changes import requested as asked_for
from ..store.neighbours import seeds_taken
from ..store.own import Copies, copies
from ..store.study import Study, StudyHeader, recorded_config

PLAIN = re.compile(
    r"[\w-]+|[\w./-]*/[\w./-]*|[\w./-]*[A-Za-z_]\w*(\.py)?:[A-Za-z_][\w.]*"
)  # that needs no quotes
CONFIRMS = re.compile(r"_seeds_\d+_to_\d+$")  # how the name of a study of fresh seeds ends
MOST_NAMED = 80  # characters of a study's name
NONE = Copies(Path(), "", None, frozenset())


@dataclass(frozen=True)
class StudyCommand:
    """`command` begins the study again. `changed`: (setting, its default, its value here) of the settings
    that differ from those of the scale and the suite. `unsaid`: those of them that only a
    suite's file can say."""

    command: str
    changed: list[tuple[str, Any, Any]]
    unsaid: list[str]


def reproduce(config: Config, run: RunConfig, copies: Copies = NONE) -> str:
    """Return a command line that trains exactly this run. `own`: the study's copies of the user's own
    files."""
    base = _defaults((f"scale={config.scale}",), study=False)
    changed = {k: v for k, v in flat(to_dict(run)).items() if k not in base or base[k] != v}
    for group in OWN_GROUPS:
        if (target := changed.get(f"{group}.target")) is not None:
            changed[f"{group}.target"] = copies.to_show(copies.path_of(target))
            changed.pop(f"{group}.sha256", None)  # the copy's, which the study's manifest holds
    if run.data.name == "shakespeare":
        changed.pop("data.sha256", None)  # there is one of that name, and it is checked wherever it is read
    words = [f"{k}={override_value(v)}" for k, v in changed.items()]
    return shlex.join(["ebc-lab", "train", f"scale={config.scale}", *words])


def study_command(requested: Mapping[str, Any], copies: Copies = NONE) -> StudyCommand:
    """Return the `ebc-lab autopilot` that asks for these settings, `requested` of a study.json. `own`: the
    study's copies of the user's own files."""
    asked = flat(requested)
    try:
        chosen = _chosen(requested, asked, copies)
        base = _defaults(tuple(chosen), study=True)
    except UserError:  # another version's suite, or one that was changed
        copies = NONE
        chosen = _chosen({**requested, "mine": []}, asked, copies)
        base = _defaults(tuple(chosen), study=True)
    name = "study.name"
    both = {k: (base.get(k), asked.get(k)) for k in (*asked, *base)}
    # an empty mapping is not said where its entries are, nor by a version that did not have it
    filled = {k for k, value in base.items() if value == {} and k not in asked}
    arms, left_out = _new_arms(requested, base, copies), _left_out(requested, base)
    of_arms = tuple(f"ablation.arms.{arm}." for arm in arms)
    entries = {k for k in asked if in_mapping(k) and not k.startswith("ablation.arms.")}
    differing = {k for k, (old, new) in both.items() if old != new} | (entries - base.keys())
    changed = [(k, *both[k]) for k in both if k in differing - filled]
    settable = (asked.keys() & base.keys() | entries) - STUDY_DECIDES.keys()
    gone = tuple(f"ablation.arms.{arm}." for arm in left_out)
    unsaid = [k for k, _, _ in changed if k not in settable and not k.startswith((*of_arms, *gone))]
    sayable = settable - {name} - {k for k in asked if k.startswith(of_arms)}
    sayable_changes = [(k, v) for k, _, v in changed if k in sayable]
    words = [f"{k}={override_value(v)}" for k, v in sayable_changes]
    words += [f"ablation.arms.{arm}={override_value(settings)}" for arm, settings in arms.items()]
    words += [f"~ablation.arms.{arm}" for arm in left_out]
    named = [f"{name}={override_value(v)}" for k, _, v in changed if k == name]
    return StudyCommand(
        copies.to_show(shlex.join(["ebc-lab", "autopilot", *chosen, *words, *named])),
        [c for c in changed if c[0] != name and not (c[0].startswith(of_arms) and _is_usual(*c))],
        unsaid,
    )


def _chosen(requested: Mapping[str, Any], asked: Mapping[str, Any], copies: Copies) -> list[str]:
    """Return the choices that the rest is told from: scale, suite, and the parts of the user's own."""
    chosen = [f"scale={requested['scale']}"]
    suite = copies.suite_path or _suite(asked)
    chosen += [f"study={override_value(suite)}"] if suite != "default" else []
    mine = requested.get("mine") or []
    if mine and _defaults(tuple(chosen), study=True)["mine"] != mine:
        paths = [copies.path_of(target) for target in mine]
        chosen.append(f"mine={override_value(paths)}")
    optimizer = requested["optimizer"]
    if optimizer.get("target") is None:
        return chosen
    # said by `optimizer=`, without which a target has no meaning, and with the grid that it cannot do without
    name = optimizer["name"]
    grid = requested["lr_sweep"]["grids"].get(name)
    grids = [f"lr_sweep.grids.{name}={override_value(grid)}"] if grid else []
    if name in offered("optimizer"):
        return [*chosen, f"optimizer={name}", *grids]
    target = override_value(copies.path_of(optimizer["target"]))
    return [*chosen, f"optimizer={CUSTOM}", f"optimizer.target={target}", *grids]


def _new_arms(
    requested: Mapping[str, Any], base: Mapping[str, Any], copies: Copies
) -> dict[str, dict[str, Any]]:
    """Name -> the settings, as far as they are no defaults, of the arms that the suite does not have."""
    usual = to_dict(ArmConfig())
    known = _arms_of(base)
    arms = {}
    for name, arm in requested["ablation"]["arms"].items():
        if name in known:
            continue
        made = {key: value for key, value in arm.items() if value != usual.get(key)}
        if settings := made.get("settings"):
            made["settings"] = {group: _by_path(group, part, copies) for group, part in settings.items()}
        arms[name] = made
    return arms


def _is_usual(key: str, _: Any, value: Any) -> bool:
    """Tell whether a setting of a new arm says nothing: a default, or a checksum that was found out."""
    usual = flat(to_dict(ArmConfig()))
    return key.endswith(".sha256") or usual.get(key.split(".", 3)[3]) == value


def _left_out(requested: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    """Return the arms that the suite has and the study does not."""
    return [name for name in _arms_of(base) if name not in requested["ablation"]["arms"]]


def _arms_of(base: Mapping[str, Any]) -> dict[str, None]:
    """Return the names of a suite's arms, in its order."""
    return dict.fromkeys(key.split(".")[2] for key in base if key.startswith("ablation.arms."))


def _by_path(group: str, part: Any, copies: Copies) -> Any:
    """Return a part of an arm as a user writes it: the target of a copy by its path, without what is found
    out."""
    if not isinstance(part, Mapping) or not part.get("target"):
        return part
    made = {key: value for key, value in part.items() if key != "sha256"}
    if part.get("name") == own_name(part["target"], groups()[group]):
        made["name"] = CUSTOM
    return {**made, "target": copies.path_of(part["target"])}


def continuing(study: Study, header: StudyHeader) -> str | None:
    """Return the command line that continues a study: the one that ran it last, or else one that asks for the
    same.

    None where only a file that is not in study.json could say it.
    """
    noted = study.noted_command()
    if noted is not None:
        return noted
    requested = header["requested"]
    here = {**requested, "study": {**requested["study"], "name": study.root.name}}  # it may have been moved
    return _here(study, header, here)


def deciding(study: Study, header: StudyHeader, decision: Mapping[str, Any] | None) -> str | None:
    """Return the command line of another study in the same place that would decide what is undecided, from
    fresh seeds alone; what tuned the arms is copied. None where nothing is, or no number of seeds is known to
    decide it."""
    wanted = with_seeds_wanted(study, header, decision)
    return _here(study, header, wanted) if wanted else None


def with_seeds_wanted(
    study: Study, header: StudyHeader, decision: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Return the settings of the study that `deciding` asks for, under a name of its own: as many seeds as
    would decide it, of which none has been judged, tuned or trained with here. None where there is none."""
    tracks = decision["tracks"].values() if decision else ()
    answers = [answer for track in tracks for answer in (track.get("answers") or {}).values()]
    undecided = [a["seeds_needed"] for a in answers if a["verdict"] == "undecided" and a["seeds"]]
    if not undecided:
        return None
    taken = seeds_taken(study, recorded_config(header, checked=False))
    fresh = list(itertools.islice((s for s in itertools.count() if s not in taken), max(undecided)))
    requested = header["requested"]
    tail = f"_seeds_{fresh[0]}_to_{fresh[-1]}"
    name = CONFIRMS.sub("", requested["study"]["name"])[: MOST_NAMED - len(tail)] + tail
    return {**requested, "seeds": fresh, "study": {**requested["study"], "name": name}}


def _here(study: Study, header: StudyHeader, requested: Mapping[str, Any]) -> str | None:
    """Return the command line that asks for these settings with the study's launcher, in its folder of
    studies."""
    command = study_command(requested, copies(study, header))
    if command.unsaid:
        return None
    launcher = flat({"launcher": header["config"]["launcher"]})
    default = flat({"launcher": to_dict(LauncherConfig())})
    gone = {f"launcher.{name}" for name in GONE[LauncherConfig]}
    settings = {k: v for k, v in launcher.items() if default.get(k) != v and k not in gone}
    words = [f"{k.removesuffix('.name')}={override_value(v)}" for k, v in settings.items()]
    if str(study.root.parent) != Config.output_dir:
        words.append(f"output_dir={override_value(str(study.root.parent.resolve()))}")
    return shlex.join([*shlex.split(command.command), *words])


@functools.cache
def _defaults(chosen: tuple[str, ...], *, study: bool) -> dict[str, Any]:
    """Return every setting that these choices give. Cached: composing is slow, and a page asks for each
    failed run."""
    try:
        config = compose(chosen, study=study, here=False, trains=False)
    except UserError:  # a suite with parts of the user's own may be read where they are not
        config = compose(chosen, study=study, here=False, sources=False, trains=False)
    return flat(asked_for(config) if study else to_dict(run_part(config)))


def _suite(asked: Mapping[str, Any]) -> str:
    """Return the choice of `conf/study` that agrees with most of these settings, those of a run aside."""

    def agreement(choice: str) -> int:
        try:
            whole = read_choice("study", choice)
            settings = flat({k: v for k, v in whole.items() if k not in RunConfig.__dataclass_fields__})
            settings.pop("study.name", None)
        except UserError:
            return 0
        return sum(1 if _same(asked.get(k), v) else -1 for k, v in settings.items() if v != {})

    return max(["default", *groups()["study"]], key=agreement)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, int | float) and isinstance(b, int | float):
        return float(a) == float(b)
    return bool(a == b)


def override_value(value: Any) -> str:
    """Return a value as Hydra's command line takes it."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{','.join(map(override_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}: {override_value(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, str) and not PLAIN.fullmatch(value):
        # not the quotes that a shell's words are put in; a backslash is more than itself before a quote alone
        escaped = re.sub(r'(\\*)("|\Z)', lambda m: m[1] * 2 + ('\\"' if m[2] else ""), value)
        return f'"{escaped}"'
    return str(value)

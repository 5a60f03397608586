"""The commands that run something again: one run exactly, or a study with the settings it was asked for."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ebc_lab.config.choices import groups, settings_of
from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import flat, run_part, to_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.hints import STUDY_DECIDES
from ebc_lab.config.overrides import in_mapping
from ebc_lab.config.schema import NOT_THE_STUDY, Config, LauncherConfig, RunConfig

from ..store.study import Study, StudyHeader


@dataclass(frozen=True)
class StudyCommand:
    """`command` begins the study again. `changed`: (setting, its default, its value here) of the settings
    that differ from those of the scale and the suite. `unsaid`: those of them that need a file in
    `conf/study`."""

    command: str
    changed: list[tuple[str, Any, Any]]
    unsaid: list[str]


def reproduce(config: Config, run: RunConfig) -> str:
    """A command line that trains exactly this run."""
    base = _defaults((f"scale={config.scale}",), study=False)
    changed = {k: v for k, v in flat(to_dict(run)).items() if k not in base or base[k] != v}
    words = [f"{k}={override_value(v)}" for k, v in changed.items()]
    return shlex.join(["ebc-lab", "train", f"scale={config.scale}", *words])


def study_command(requested: Mapping[str, Any]) -> StudyCommand:
    """The `ebc-lab autopilot` that asks for these settings, `requested` of a study.json."""
    asked = flat(requested)
    chosen = [f"scale={requested['scale']}"]
    suite = _suite(asked)
    chosen += [f"study={suite}"] if suite != "default" else []
    base = _defaults(tuple(chosen), study=True)
    name = "study.name"
    both = {k: (base.get(k), asked.get(k)) for k in (*asked, *base)}
    # an empty mapping is not said where its entries are, nor by a version that did not have it
    filled = {k for k, value in base.items() if value == {} and k not in asked}
    entries = {k for k in asked if in_mapping(k) and not k.startswith("ablation.arms.")}
    differing = {k for k, (old, new) in both.items() if old != new} | (entries - base.keys())
    changed = [(k, *both[k]) for k in both if k in differing - filled]
    settable = (asked.keys() & base.keys() | entries) - STUDY_DECIDES.keys()
    # said by `optimizer=`, without which a target has no meaning
    by_name = ("optimizer.name", "optimizer.lr") if asked.get("optimizer.target") is not None else ()
    chosen += [f"optimizer={asked[k]}" for k in by_name[:1]]
    unsaid = [k for k, _, _ in changed if k not in settable and k not in by_name]
    said = [(k, v) for k, _, v in changed if k not in unsaid and k not in (name, *by_name)]
    words = [f"{k}={override_value(v)}" for k, v in said]
    named = [f"{name}={override_value(v)}" for k, _, v in changed if k == name]
    return StudyCommand(
        shlex.join(["ebc-lab", "autopilot", *chosen, *words, *named]),
        [c for c in changed if c[0] != name],
        unsaid,
    )


def continuing(study: Study, header: StudyHeader) -> str | None:
    """The command line that continues a study: the one that ran it last, or else one that asks for the same.

    None where only a file that is not in study.json could say it.
    """
    noted = study.noted_command()
    if noted is not None:
        return noted
    requested = header["requested"]
    here = {**requested, "study": {**requested["study"], "name": study.root.name}}  # it may have been moved
    found = study_command(here)
    if found.unsaid:
        return None
    launcher = flat({"launcher": header["config"]["launcher"]})
    default = flat({"launcher": to_dict(LauncherConfig())})
    own = {k: v for k, v in launcher.items() if default.get(k) != v and k != "launcher.runs_per_worker"}
    words = [f"{k.removesuffix('.name')}={override_value(v)}" for k, v in own.items()]
    if str(study.root.parent) != Config.output_dir:
        words.append(f"output_dir={override_value(str(study.root.parent.resolve()))}")
    return shlex.join([*shlex.split(found.command), *words])


@functools.cache
def _defaults(chosen: tuple[str, ...], *, study: bool) -> dict[str, Any]:
    """Every setting that these choices give. Cached: composing is slow, and a page asks for each failed
    run."""
    try:
        config = compose(chosen, study=study, here=False)
    except UserError:  # a suite with parts of the user's own may be read where they are not
        config = compose(chosen, study=study, here=False, sources=False)
    return flat(
        {k: v for k, v in to_dict(config if study else run_part(config)).items() if k not in NOT_THE_STUDY}
    )


def _suite(asked: Mapping[str, Any]) -> str:
    """The choice of `conf/study` that agrees with most of these settings, those of a run aside."""

    def agreement(choice: str) -> int:
        try:
            whole = settings_of("study", choice)
            own = flat({k: v for k, v in whole.items() if k not in RunConfig.__dataclass_fields__})
            own.pop("study.name", None)
        except UserError:
            return 0
        return sum(1 if _same(asked.get(k), v) else -1 for k, v in own.items() if v != {})

    return max(["default", *groups()["study"]], key=agreement)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, int | float) and isinstance(b, int | float):
        return float(a) == float(b)
    return bool(a == b)


def override_value(value: Any) -> str:
    """A value as Hydra's command line takes it."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{','.join(map(override_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}: {override_value(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, str) and not re.fullmatch(r"[\w-]+|[\w./-]*/[\w./-]*", value):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return str(value)

"""JSON schemas: of settings, by which an editor completes and checks them, and of results_final.json.

usage: python scripts/json_schemas.py [--write]    names the files that are out of date, or writes them

The former are made from the settings themselves, one for each kind of file (a suite, a scale, each group of
`conf/`, and `conf/config.yaml`), in draft 7, which yaml-language-server knows best. What they cannot say, the
program does when it composes: whether a list increases, which settings a choice reads, what contradicts what.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NotRequired

import msgspec
from settings_page import NAMED, read_with

from ebc_lab.config.checks import LABEL
from ebc_lab.config.choices import OWN_GROUPS, groups
from ebc_lab.config.compose import compose
from ebc_lab.config.fields import ANYTHING, Setting, setting_of
from ebc_lab.config.overrides import REFERENCE
from ebc_lab.config.own.editor import FOLDER, NAMES_OF
from ebc_lab.config.schema import (
    STAGES,
    TUNABLE,
    ArmConfig,
    Config,
    MineConfig,
    MineMethodConfig,
    RunConfig,
)
from ebc_lab.records import decisions
from ebc_lab.study.stages.rules import FORM

Schema = dict[str, Any]

DRAFT = "http://json-schema.org/draft-07/schema#"
ROOT = Path(__file__).parent.parent
EDITOR = ROOT / ".vscode" / "settings.json"
RESULTS = ROOT / "ebc_lab" / "records" / "results_final.schema.json"
SUITE = "suite.json"
NAMES = {int: "integer", float: "number", str: "string", bool: "boolean", NoneType: "null"}
ANOTHER_SETTING = {
    "pattern": f"^{REFERENCE.pattern}$",
    "patternErrorMessage": "This takes another kind of value, or another setting as ${batch_size}.",
}


def definition(name: str) -> Schema:
    return {"$ref": f"#/definitions/{name}"}


# of settings whose type says less than it might
RUN = definition(RunConfig.__name__)
NARROWER: dict[str, Schema] = {
    "study.stages": {"items": {"enum": [*STAGES]}},
    "ablation.arms.NAME.settings": {"allOf": [RUN]},
    "ablation.further.NAME.settings": {"allOf": [RUN]},
    "ladder.rungs.NAME.settings": {"allOf": [RUN]},
    "carry.arms.NAME.settings": {"allOf": [RUN]},
    "carry.settings.NAME.settings": {"allOf": [RUN]},
    "profiles.workloads.NAME.settings": {"allOf": [RUN]},
    "profiles.methods.NAME.settings": {"allOf": [RUN]},
    "controller_search.candidates": {"additionalProperties": RUN},
}


# -- results_final.json --------------------------------------------------------------------------------------


def results_final() -> Schema:
    """The schema of the last decision of a study, which may have stopped at any stage."""
    classes = {name: c for name, c in vars(decisions).items() if typing.is_typeddict(c)}
    _, definitions = msgspec.json.schema_components([decisions.Decision, *decisions.TRACKS.values()])
    comments = field_comments(ast.parse(source := Path(decisions.__file__).read_text()), source.splitlines())
    for name, made in definitions.items():
        hints = typing.get_type_hints(classes[name], include_extras=True)
        optional = [key for key in hints if typing.get_origin(hints[key]) is NotRequired]
        made |= {"required": sorted(hints.keys() - optional), "additionalProperties": False}
        for key, comment in comments[name].items():
            made["properties"][key] = {**made["properties"][key], "description": comment}
    decision = definitions.pop("Decision")
    about = {
        "study": {"type": "string"},
        "corpus": {"type": "string"},
        "warning": {"type": ["string", "null"]},
    }
    stages = []
    for stage, track in decisions.TRACKS.items():
        tracks = {"type": "object", "additionalProperties": {"$ref": f"#/$defs/{track.__name__}"}}
        own = {"stage": {"const": stage}, "form": {"const": FORM}, "tracks": tracks}
        properties = {**decision["properties"], **about, **own}
        stages.append({**decision, "title": stage, "properties": properties})
        stages[-1]["required"] = sorted({*decision["required"], *about})
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": RESULTS.name.removesuffix(".schema.json"),
        "description": "The last decision of a study. Losses are in nats per token.",
        "oneOf": stages,
        "$defs": definitions,
    }


def field_comments(module: ast.Module, lines: Sequence[str]) -> dict[str, dict[str, str]]:
    """Class -> field, its bases' fields too -> the comment on the field's line."""
    found: dict[str, dict[str, str]] = {}
    for node in module.body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = {}
            for base in node.bases:
                found[node.name] |= found.get(ast.unparse(base), {})
            for field in node.body:
                _, mark, comment = lines[field.lineno - 1].partition("  # ")
                if isinstance(field, ast.AnnAssign) and mark:
                    found[node.name][ast.unparse(field.target)] = comment
    return found


# -- one value -----------------------------------------------------------------------------------------------


def value(setting: Setting, kind: Any) -> Schema:
    """The schema of what a setting of this type takes; limits of a list or mapping are those of its items."""
    inside = typing.get_args(kind)
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return definition(typing.cast(type, kind).__name__)
    if origin is list:
        return _list(setting, inside[0])
    if origin is dict:
        return _mapping(setting, inside[1])
    if setting.texts:
        one = _plain(setting, ["string"])
        return {**one, "type": ["array", "string", "null"], "items": one, "maxItems": setting.most}
    if kind is Any and not setting.numeric:
        return {}
    if setting.group or setting.choices:
        return _one_of_names(setting)
    kinds = [k for k in inside or (float if kind is Any else kind,) if k in NAMES]
    return _plain(setting, [NAMES[k] for k in kinds])


def _plain(setting: Setting, names: list[str]) -> Schema:
    """A number, a truth value or a text; in place of the first two, the name of another setting."""
    limits = {
        "minimum": setting.low,
        "exclusiveMinimum": setting.above,
        "maximum": setting.high,
        "exclusiveMaximum": setting.below,
    }
    made: Schema = {word: limit for word, limit in limits.items() if limit is not None}
    if "string" in names:
        made["maxLength"] = setting.longest
    else:
        names = [*names, "string"]
        made |= ANOTHER_SETTING
    return {"type": names[0] if len(names) == 1 else names, **made}


def _one_of_names(setting: Setting) -> Schema:
    names = definition(NAMES_OF.format(setting.group)) if setting.group else {"enum": [*setting.choices]}
    return {"anyOf": [names, {"type": "string", **ANOTHER_SETTING}]}


def _list(setting: Setting, item: Any) -> Schema:
    made: Schema = {"type": ["array", "string"], **ANOTHER_SETTING, "items": value(setting, item)}
    made |= {"minItems": setting.least} if setting.least else {}
    made |= {"uniqueItems": True} if setting.unique or setting.increasing else {}
    return {**made, "maxItems": setting.most}


def _mapping(setting: Setting, item: Any) -> Schema:
    made: Schema = {"type": "object", "maxProperties": setting.most}
    if setting.keys:  # of `tune` alone: each has limits of its own
        made["properties"] = {key: _list(TUNABLE[key], Any) for key in setting.keys}
        return {**made, "additionalProperties": False}
    return {**made, "additionalProperties": value(dataclasses.replace(setting, most=ANYTHING.most), item)}


# -- several settings ----------------------------------------------------------------------------------------


def several(cls: Any, path: str = "", now: Any = None) -> Schema:
    """A mapping with the settings of a dataclass, each with its meaning and, of `now`, its default."""
    hints = typing.get_type_hints(cls)
    properties = {}
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        key = f"{path}.{field.name}" if path else field.name
        made = value(setting_of(field), kind)
        made |= NARROWER.get(key, {})
        if not dataclasses.is_dataclass(kind):
            made = {"description": _meaning(path, setting_of(field)), **made}
            if now is not None:
                made["default"] = getattr(now, field.name)
        properties[field.name] = made
    about = " ".join((cls.__doc__ or "").split())
    schema = {"description": about, "type": "object", "additionalProperties": False, "properties": properties}
    return {**schema, **_own(path, properties)} if path in OWN_GROUPS else schema


def _meaning(group: str, setting: Setting) -> str:
    unit = f" [{setting.unit}]" if setting.unit else ""
    return "; ".join([f"{setting.about}{unit}", *read_with(group, setting)])


def _own(group: str, properties: dict[str, Schema]) -> Schema:
    """A part with a target has any name; the choices are still offered. Changes `name` in `properties`."""
    names = definition(NAMES_OF.format(group))
    free = {"type": "string", "pattern": f"^(?:{LABEL.pattern})$"}
    properties["name"]["anyOf"] = [names, free]
    return {"if": {"not": {"required": ["target"]}}, "then": {"properties": {"name": names}}}


# -- files ---------------------------------------------------------------------------------------------------


@functools.cache
def by_default() -> Config:
    """What docs/settings.md gives as defaults, too."""
    return compose(["scale=laptop"])


def definitions() -> dict[str, Schema]:
    """Everything that a study sets, by the name of its dataclass, and the choices of each group."""
    hints = typing.get_type_hints(Config)
    made = {NAMES_OF.format(group): {"enum": names} for group, names in groups().items()}
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(hints[field.name]):
            cls = type(getattr(by_default(), field.name))
            made[cls.__name__] = several(cls, field.name, getattr(by_default(), field.name))
    made[MineConfig.__name__] = several(MineConfig, "ablation.mine", MineConfig())
    made[MineMethodConfig.__name__] = several(MineMethodConfig, "profiles.mine", MineMethodConfig())
    made[ArmConfig.__name__] = several(ArmConfig, "ablation.arms.NAME", ArmConfig())
    for stage, kinds in NAMED.items():
        for name, kind in kinds.items():
            made[kind.__name__] = several(kind, f"{stage}.{name}.NAME", kind())
    made[RunConfig.__name__] = several(RunConfig)
    return made


def suite() -> Schema:
    """The schema of a suite, with the definitions that the others refer to."""
    made = several(Config, "", by_default())
    made["description"] = "A suite: settings of a study."
    made["properties"]["defaults"] = _defaults()
    return {**made, "definitions": definitions()}


def scale(name: str = "scale") -> Schema:
    """The schema of a scale: of the same settings, by reference."""
    made = several(Config)
    made["properties"] = {name: {"$ref": f"{SUITE}#/properties/{name}"} for name in made["properties"]}
    made["properties"]["defaults"] = {"$ref": f"{SUITE}#/properties/defaults"}
    return {**made, "description": f"A {name}: settings of a study.", **_says(name)}


def _says(name: str) -> Schema:
    """That a file says whose settings it has, by itself or by the choice that it builds on."""
    return {"anyOf": [{"required": [name]}, {"required": ["defaults"]}]}


def config() -> Schema:
    """The schema of `conf/config.yaml`, likewise."""
    made = {**scale(), "description": "The defaults of everything.", "required": ["defaults"]}
    made["properties"]["hydra"] = {"description": "settings of Hydra itself", "type": "object"}
    return made


def _defaults() -> Schema:
    """What a file builds on: other suites, or a choice of each group."""
    text = {"type": "string"}
    choice = {"type": "object", "minProperties": 1, "maxProperties": 1, "additionalProperties": text}
    about = "the files that this one changes: other suites, by their names"
    items = [definition(NAMES_OF.format("study")), text, choice]
    return {"description": about, "type": "array", "items": {"anyOf": items}}


def of_group(group: str) -> Schema:
    """The schema of a file of a group, `conf/optimizer/adam.yaml`."""
    cls = type(getattr(by_default(), group))
    text = json.dumps(several(cls, group, cls())).replace('"#/', f'"{SUITE}#/')
    made: Schema = json.loads(text)
    made["properties"]["defaults"] = {"$ref": f"{SUITE}#/properties/defaults"}
    return {**made, **_says("name")} if "name" in made["properties"] else made


def schemas() -> dict[str, Schema]:
    """Name of the file -> schema."""
    made = {SUITE: suite(), "config.json": config()}
    whole = ("scale", "check")  # whose files set anything of a study
    made |= {f"{group}.json": scale(group) for group in whole}
    made |= {f"{group}.json": of_group(group) for group in groups() if group not in (*whole, "study")}
    return {name: {"$schema": DRAFT, "title": f"ebc-lab: {Path(name).stem}", **made[name]} for name in made}


def written(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def of_the_editor() -> dict[str, dict[str, str]]:
    """The settings of this repository in VS Code: which schema is whose."""
    files = {"config": "conf/config.yaml", "suite": "conf/study/*.yaml"}
    kinds = [Path(name).stem for name in schemas()]
    folder = FOLDER.relative_to(ROOT)
    return {"yaml.schemas": {f"./{folder}/{k}.json": files.get(k, f"conf/{k}/*.yaml") for k in kinds}}


def files() -> dict[Path, str]:
    """All that this script makes."""
    made = {FOLDER / name: written(schema) for name, schema in schemas().items()}
    return {**made, RESULTS: written(results_final()), EDITOR: written(of_the_editor())}


def out_of_date() -> list[Path]:
    """The files that are not what this script makes; missing ones and those too many are among them."""
    made = files()
    there = {path: path.read_text(encoding="utf-8") for path in (*FOLDER.glob("*.json"), RESULTS, EDITOR)}
    return sorted(path for path in made.keys() | there.keys() if made.get(path) != there.get(path))


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        for folder in (FOLDER, EDITOR.parent):
            folder.mkdir(exist_ok=True)
        for path in FOLDER.glob("*.json"):
            path.unlink()
        for path, text in files().items():
            path.write_text(text, encoding="utf-8")
    elif wrong := out_of_date():
        sys.exit("\n".join(["out of date (--write writes them):", *map(str, wrong)]))

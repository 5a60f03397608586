"""docs/settings.md, printed from the settings themselves.

usage: python scripts/settings_page.py [--write]    prints the page, or writes it
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ebc_lab.config.choices import groups
from ebc_lab.config.compose import compose
from ebc_lab.config.errors import any_of
from ebc_lab.config.fields import setting_of
from ebc_lab.config.parts import PARTS
from ebc_lab.config.schema import (
    ArmConfig,
    CarrySettingConfig,
    MethodConfig,
    MineConfig,
    MineMethodConfig,
    ProfiledWorkloadConfig,
    RungConfig,
    UnitConfig,
)

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"
TOP = r"""# The settings

`scripts/settings_page.py` prints this page from [`ebc_lab/config/parts`](../ebc_lab/config/parts), a file for
each group of a run's settings, and [`ebc_lab/config/schema.py`](../ebc_lab/config/schema.py).

Write settings as Hydra overrides, for example `budget.target_kl=0.02`. A group such as `optimizer=muon` sets
everything in that choice's file. A setting *with optimizer=muon* is read under that choice alone, and refused
under others. *Default* is what `ebc-lab autopilot scale=laptop` uses; empty means none.
A study decides some of a run's settings itself and refuses overrides of them. δ\* is the target KL.

A list or mapping takes at most 100 items (500 arms), a text 1,000 characters, an override 4,000, and a
study 50,000 runs. `${batch_size}` in a value is the value of that setting; other `${…}` are refused. A new
entry of a mapping needs no `+`: `lr_sweep.grids.NAME=[…]`, `ablation.arms.NAME={lr_scale: 4, settings: {…}}`.
"""
READ_BY = {part.group_name: part.read_by for part in PARTS}
NAMED: dict[str, dict[str, type]] = {  # stage -> its mappings from a name to settings
    "ladder": {"rungs": RungConfig},
    "carry": {"arms": UnitConfig, "settings": CarrySettingConfig},
    "profiles": {"workloads": ProfiledWorkloadConfig, "methods": MethodConfig},
}
NUMBERS = {int: "integer", float: "number", str: "text"}


def takes(group: str, setting: Any, kind: Any) -> str:
    """The values that a setting takes, in words."""
    if setting.group:
        words = f"[{', '.join(groups()[setting.group])}](../conf/{setting.group})"
    elif setting.choices or setting.keys:
        words = ", ".join(f"`{c}`" for c in setting.choices or setting.keys)
    else:
        inside = [str if setting.texts else kind, *typing.get_args(kind)]
        inside += [inner for k in typing.get_args(kind) for inner in typing.get_args(k)]
        named = [
            name for plain, name in NUMBERS.items() if plain in inside and typing.get_origin(kind) is not dict
        ]
        words = " ".join([*named[:1], span(setting)]).strip()
    return "; ".join([*filter(None, [words]), *read_with(group, setting)])


def span(setting: Any) -> str:
    """The range of a setting, in words: `0 to 65,536` where it has two ends that it may take."""
    if setting.low is None or setting.high is None:
        return str(setting.range())
    return " to ".join(
        f"{end:,}" if isinstance(end, int) else f"{end:g}" for end in (setting.low, setting.high)
    )


def read_with(group: str, setting: Any) -> Iterator[str]:
    """The choices without which a setting is not read, `with optimizer=axiom`."""
    reader, choices = READ_BY.get(group) or ("", ())
    if reader:
        yield f"with {reader}={any_of(choices)}"
    if setting.only:
        of = group if setting.by == "name" else f"{group}.{setting.by}"
        yield f"with {of}={any_of(setting.only)}"


def default(value: Any) -> str:
    if value is None or value in ([], {}, ""):
        return ""
    if isinstance(value, dict):
        return f"{', '.join(value)}: …"
    if isinstance(value, list):
        return f"`[{','.join(map(str, value))}]`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def table(config: Any, group: str) -> Iterator[str]:
    """The rows of one dataclass, without the dataclasses inside it."""
    yield "| setting | default | unit | takes | meaning |"
    yield "|---|---|---|---|---|"
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            continue
        setting = setting_of(field)
        name = (
            f"{group}.{field.name}"
            if group and not (setting.group and field.name == "name")
            else group or field.name
        )
        cells = (
            f"`{name}`",
            default(value),
            setting.unit,
            takes(group, setting, hints[field.name]),
            setting.about,
        )
        yield f"| {' | '.join(cells)} |"


def page() -> str:
    config = compose(["scale=laptop"])
    parts = [TOP, "## A run and a study", "", *table(config, "")]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not dataclasses.is_dataclass(value):
            continue
        about = type(value).__doc__ or ""
        parts += ["", f"## {field.name}", "", about, "", *table(value, field.name)]
        if field.name == "ablation":
            mine = f"{MineConfig.__doc__} `template` has the settings of an arm, below."
            parts += ["", "## ablation.mine", "", mine, "", *table(MineConfig(), "ablation.mine")]
            parts += ["", "## ablation.arms.NAME", "", ArmConfig.__doc__ or "", ""]
            parts += table(ArmConfig(), "ablation.arms.NAME")
        if field.name == "profiles":
            mine = f"{MineMethodConfig.__doc__} `template` has the settings of a method, below."
            parts += ["", "## profiles.mine", "", mine, "", *table(MineMethodConfig(), "profiles.mine")]
        for name, kind in NAMED.get(field.name, {}).items():
            parts += ["", f"## {field.name}.{name}.NAME", "", kind.__doc__ or "", ""]
            parts += table(kind(), f"{field.name}.{name}.NAME")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page())
    else:
        print(page(), end="")

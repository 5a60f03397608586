"""Job folders of Hydra, of single runs and of sweeps: what was overridden, and the metrics beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from ebc_lab.config.errors import UserError, require, shown
from ebc_lab.config.own.files import check_yaml

from ..asked import Asked
from .reader import NothingKnown, Source, cell

BEGUN = re.compile(r"(\d{4}-\d\d-\d\d)[/_](\d\d)-(\d\d)-(\d\d)")  # Hydra's own names of folders


TITLE = "Hydra's job folders"


def claims(path: Path) -> bool:
    return (path / ".hydra" / "overrides.yaml").is_file()


def read(path: Path, asked: Asked) -> Source:
    return read_jobs([path], path.parent, asked)


def read_jobs(paths: Sequence[Path], root: Path, asked: Asked) -> Source:
    """Return the runs of jobs. A setting that one of them overrides is read from all configurations.

    Raises UserError: no job left metrics in a format that is known.
    """
    from . import read_inside

    overrides = [_overrides(job) for job in paths]
    swept = list(dict.fromkeys(key for each in overrides for key in each))
    frames, empty, sources = [], [], []
    for job, own in zip(paths, overrides, strict=True):
        place = job.relative_to(root).as_posix()
        try:
            source = read_inside(job, asked)
        except NothingKnown:
            empty.append(place)
            continue
        config = _yaml(job / ".hydra" / "config.yaml")
        frame = source.frame.assign(**{key: cell(_value(config, own, key)) for key in swept})
        run = source.roles.get("run", "")
        frame["run"] = place + " " + source.frame[run].astype(str) if run else place
        if begun := BEGUN.search(job.resolve().as_posix()):
            frame["started"] = f"{begun[1]} {begun[2]}:{begun[3]}:{begun[4]}"
        frames.append(frame)
        sources.append(source)
    require(
        bool(frames),
        f"{root}: {len(paths)} job folders of Hydra, and none of the formats that are known lies in one: "
        "let jobs write their metrics there, or give --pattern for their logs",
    )
    seed = next((key for key in swept if key.rpartition(".")[2] in ("seed", "random_seed")), "")
    notes = [f"{len(empty)} jobs left no metrics, such as {shown(empty[0])}: not read."] if empty else []
    frame = pd.concat(frames, ignore_index=True)
    roles = {role: name for role, name in sources[0].roles.items() if role != "arm"} | {"run": "run"}
    roles |= {"seed": seed} if seed else {}
    roles |= {"started": "started"} if "started" in frame else {}
    return replace(
        sources[0],
        frame=frame,
        what=f"{len(frames)} jobs of Hydra ({sources[0].what})",
        roles=roles,
        settings=[key for key in swept if key != seed],
        notes=[*notes, *dict.fromkeys(note for source in sources for note in source.notes)],
    )


def _yaml(path: Path) -> Any:
    """Return a YAML file's content, None where there is none. Raises UserError: it is damaged."""
    import yaml

    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        check_yaml(text)
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from error


def _overrides(job: Path) -> dict[str, str]:
    """Return a job's overrides, key -> value; what is removed (`~key`) is `removed`."""
    listed = _yaml(job / ".hydra" / "overrides.yaml") or []
    require(
        isinstance(listed, list) and all(isinstance(each, str) for each in listed),
        f"{job / '.hydra' / 'overrides.yaml'} is no list of overrides, as Hydra writes it",
    )
    overrides = {}
    for each in listed:
        key, _, value = each.partition("=")
        overrides[key.lstrip("+~").partition("@")[0]] = "removed" if key.startswith("~") else value
    return overrides


def _value(config: Any, overrides: Mapping[str, str], key: str) -> Any:
    """Return what a job's configuration holds for a key; where that is a group or nothing, the override."""
    for part in re.split(r"[./]", key):
        config = config.get(part) if isinstance(config, Mapping) else None
    return overrides.get(key) if isinstance(config, dict | None) else config

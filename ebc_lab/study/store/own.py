"""<study>/own: copies of the user's suite and parts, so that the study can be repeated anywhere."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ebc_lab.config.own.files import ENDINGS
from ebc_lab.config.schema import Config
from ebc_lab.records.files import write_atomic

from . import manifest
from .study import OwnRecord, Study


def lacking(study: Study, header: Mapping[str, Any], config: Config) -> bool:
    """Return whether the study needs one of the user's files but has no copy of it, because the copy was
    deleted or an older version made none."""
    recorded = header.get("own", {"files": {}})["files"]
    return any(name not in recorded or not (study.own / name).is_file() for name in config.own_files)


def edited(config: Config, header: Mapping[str, Any]) -> list[str]:
    """Return the names of the user's files that have changed since the study copied them."""
    recorded = header.get("own", {"files": {}})["files"]
    now = {name: manifest.sha256_of(Path(path)) for name, path in config.own_files.items()}
    return [name for name, sha256 in now.items() if recorded.get(name, sha256) != sha256]


def keep(study: Study, config: Config) -> OwnRecord:
    """Replace the study's copies with the user's files as they are now. Return their entry for study.json."""
    for name, source in config.own_files.items():
        content, path = Path(source).read_bytes(), study.own / name
        if path.is_file() and path.read_bytes() == content:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        manifest.remove_entries(study.root, f"{study.own.name}/{name}")
        write_atomic(path, content)
    for path in [*study.own.rglob("*")]:
        name = path.relative_to(study.own).as_posix()
        if path.is_file() and name not in config.own_files:
            manifest.remove_entries(study.root, f"{study.own.name}/{name}")
            path.unlink()
    if not config.own_files:
        shutil.rmtree(study.own, ignore_errors=True)
    suite = next((name for name in config.own_files if name.endswith(ENDINGS)), None)
    files = {name: manifest.sha256_of(study.own / name) for name in config.own_files}
    return {"suite": suite, "files": files}

"""<study>/own: copies of the study's suite and of its own parts, so that it can be done again anywhere."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ebc_lab.config.own.suites import ENDINGS
from ebc_lab.config.schema import Config
from ebc_lab.records.files import atomic_writer

from . import manifest
from .study import OwnRecord, Study


def lacking(study: Study, header: Mapping[str, Any], config: Config) -> bool:
    """Return whether the study lacks a copy of a file that it needs: one that was deleted, or that an older
    version never made."""
    recorded = header.get("own", {"files": {}})["files"]
    return any(name not in recorded or not (study.own / name).is_file() for name in config.own_files)


def edited(config: Config, header: Mapping[str, Any]) -> list[str]:
    """Return the files of one's own that are not as they were when the study copied them."""
    recorded = header.get("own", {"files": {}})["files"]
    now = {name: manifest.sha256_of(Path(path)) for name, path in config.own_files.items()}
    return [name for name, sha256 in now.items() if recorded.get(name, sha256) != sha256]


def keep(study: Study, config: Config) -> OwnRecord:
    """Copy the files of one's own into the study in the place of those that it had. Return their record."""
    for name, source in config.own_files.items():
        content, path = Path(source).read_bytes(), study.own / name
        if path.is_file() and path.read_bytes() == content:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        manifest.remove_entries(study.root, f"{study.own.name}/{name}")
        with atomic_writer(path) as out:
            out.write(content)
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

"""A study by name, folder or bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ebc_lab.config.errors import UserError

from .bundle import Bundled, is_bundle, unpack, verify
from .study import Study, studies_in
from .verify import verify as verify_study


def find(name: str | None, output_dir: str) -> Study:
    """A study by name or path, or a bundle of one; without a name, the newest one. Raises UserError."""
    base = Path(output_dir).expanduser()
    if name:
        path = Path(name).expanduser()
        if is_bundle(path):
            return Bundled(path)
        inside = path.parent == Path(".")
        return Study(base / name) if inside and not Study(path).exists() else Study(path)
    studies = studies_in(base)
    if not studies:
        raise UserError(f"there is no study in {base}: start one with `ebc-lab autopilot`.")
    return studies[0]


def to_rebuild(name: str | None, output_dir: str, output: Path | None) -> Study:
    """The study for `report`; a bundle is unpacked into `output`, or next to it. Raises UserError."""
    path = Path(name or "").expanduser()
    if is_bundle(path):
        return unpack(path, output.expanduser() if output else path.with_suffix(""))
    if output:
        raise UserError(
            "--output is for bundles: a study's tables and pictures are rebuilt in its own folder."
        )
    return find(name, output_dir)


def verify_named(name: str | None, output_dir: str, sha256: str | None) -> dict[str, Any]:
    """`verify` of a bundle or of a study, by name. Raises UserError."""
    path = Path(name or "").expanduser()
    if is_bundle(path):
        return verify(path, sha256)
    if sha256:
        raise UserError("--sha256 is for bundles: a study's manifest.json has those of its files.")
    return verify_study(find(name, output_dir))

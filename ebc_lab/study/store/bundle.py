"""A study as one .zip: everything that its manifest records, to be checked and read on another machine.

`export` packs a study that is as recorded; `verify` checks a bundle byte by byte, as a container and as a study; `opened` gives
a bundle as a study to read, in a folder that vanishes, and `unpack` in one that stays. Reads and writes no torch, no corpus.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from ebc_lab.config.errors import UserError
from ebc_lab.records.files import atomic_writer, refuse_unwritable

from . import container, manifest
from .study import Study
from .verify import MISSING, UNKNOWN
from .verify import verify as verify_study

SUFFIX = ".zip"
REMEDY = "get the bundle anew from whoever exported it"


# -- export ---------------------------------------------------------------------------------------------------------------


def export(study: Study, output: Path | None = None) -> dict[str, Any]:
    """Pack a study that nobody is on and whose files are all as recorded -> `bundle`, its `sha256`, `bytes` and `files`.

    What runs without a result have left, and checkpoints, are not in it. `output`: `<study>.zip` here, if left out.
    Raises UserError.
    """
    path = Path(f"{study.name}{SUFFIX}") if output is None else output.expanduser()
    _refuse_to_overwrite(path)
    recorded = _exportable(study)
    refuse_unwritable(path.resolve().parent)
    names = [manifest.NAME, *sorted(recorded)]
    own = {manifest.NAME: manifest.sha256_of(study.root / manifest.NAME), **recorded}
    try:
        with atomic_writer(path) as out:
            container.write(out, ((name, partial(_chunks, study.root / name, own[name])) for name in names))
    except ValueError as error:
        raise UserError(f"{study.root}: {error} for a bundle.") from None
    return {
        "study": study.name,
        "bundle": str(path),
        "sha256": manifest.sha256_of(path),
        "bytes": path.stat().st_size,
        "files": len(names),
    }


def _refuse_to_overwrite(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the bundle's own name, --output {path / 'NAME.zip'}.")
    if path.suffix != SUFFIX:
        raise UserError(f"{path}: a bundle's name ends in {SUFFIX}, by which the other commands know it.")
    if path.exists() and not container.looks_like_one(path):
        raise UserError(f"{path} is there already and is no bundle: choose another --output, or delete it.")


def _exportable(study: Study) -> dict[str, str]:
    """Path -> sha256 of what goes into the bundle. Raises UserError."""
    study.must_exist()
    recorded = manifest.read(study.root)
    study.header()
    if study.holder() is not None:
        raise UserError(
            f"study {study.name} is being run: `ebc-lab status {study.name}` says how far it is; export it after."
        )
    found = verify_study(study)
    if found["bad"]:
        first = found["bad"][0]
        more = f" and {len(found['bad']) - 1} more" if len(found["bad"]) > 1 else ""
        raise UserError(
            f"study {study.name} is not as recorded ({first['file']}: {first['what']}{more}): {first['remedy']}."
        )
    if not recorded["complete"] or found["unrecorded"]:
        raise UserError(
            f"study {study.name} was cut off, and not all of its files are recorded: give its command again, or "
            f"`ebc-lab report {study.name}`, which records what is there."
        )
    return dict(recorded["files"])


def _chunks(path: Path, sha256: str) -> Iterator[bytes]:
    """A file in pieces. Raises UserError when it is not, or no longer, the one that was recorded."""
    import hashlib

    seen = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(container.CHUNK):
            seen.update(chunk)
            yield chunk
    if seen.hexdigest() != sha256:
        raise UserError(
            f"{path} changed while it was being exported: see that nobody is on the study, and export it again."
        )


# -- reading a bundle -------------------------------------------------------------------------------------------------------


def is_bundle(path: Path) -> bool:
    """Whether a name means a bundle and no study's folder."""
    return path.suffix == SUFFIX and not path.is_dir()


def verify(path: Path, sha256: str | None = None) -> dict[str, Any]:
    """What `verify` says of a study, and the bundle's own `sha256`, which may be expected to be a certain one.

    Every byte counts: each file against the manifest and each run against its name, and the container against the only way in
    which `export` writes it. Raises UserError when there is no such file, or it cannot be unpacked to be looked at.
    """
    if sha256 is not None and (len(sha256) != 64 or set(sha256.lower()) - set("0123456789abcdef")):
        raise UserError("--sha256 takes the 64 hex digits that `ebc-lab export` printed.")
    own = _own_sha256(path)
    with tempfile.TemporaryDirectory(prefix="ebc-lab-") as folder:
        study = Study(Path(folder) / path.stem)
        wrong, whole = _unpacked(path, study.root)
        names = list(_names(study.root))
        found = _as_study(study, wrong) if whole else {"study": study.name, "files": len(names), "growing": 0}
    if sha256 is not None and sha256.lower() != own:
        wrong[container.WHOLE] = f"its sha256 is {own}, and {sha256} was expected"
    bad = [
        {"file": name, "what": what, "remedy": _remedy(name, path)} for name, what in sorted(wrong.items())
    ]
    about = {"root": str(path), "sha256": own, "under_way": False, "unrecorded": 0}
    return {**found, **about, "bad": bad, "ok": not bad}


def _own_sha256(path: Path) -> str:
    try:
        return manifest.sha256_of(path)
    except FileNotFoundError:
        raise UserError(f"there is no bundle at {path}: `ebc-lab export STUDY` makes one.") from None


def _as_study(study: Study, wrong: dict[str, str]) -> dict[str, Any]:
    """Check what was unpacked as a study, add what is wrong to what the container said -> the rest of what there is to say."""
    there, recorded = set(_names(study.root)), _recorded(study.root)
    if recorded is None:
        wrong.setdefault(
            manifest.NAME, MISSING if manifest.NAME not in there else "edited: its checksum does not hold"
        )
        return {"study": study.name, "files": len(there), "growing": 0}
    wrong |= {n: UNKNOWN for n in there - {manifest.NAME, *recorded} if n not in wrong}
    if study.exists():
        found = verify_study(study)
        wrong |= {b["file"]: b["what"] for b in found["bad"] if b["file"] not in wrong}
    else:
        found = {"files": len(recorded), "growing": 0}
        wrong |= {n: MISSING for n in set(recorded) - there if n not in wrong}
    return {"study": study.name, "files": found["files"], "growing": found["growing"]}


def _remedy(name: str, path: Path) -> str:
    if name == container.WHOLE:
        return f"if somebody has packed a study with another program: unpack it, and `ebc-lab verify FOLDER`; if not, {REMEDY}"
    return REMEDY


def unpack(path: Path, into: Path) -> Study:
    """Unpack a bundle into a new folder, an ordinary study from then on. Raises UserError: a damaged one, a folder in use."""
    if into.exists():
        raise UserError(
            f"{into} is there already: give it to the command instead of {path}, or choose another --output."
        )
    refuse_unwritable(into.resolve().parent)
    _own_sha256(path)
    study = Study(into)
    temporary = into.with_name(f".{into.name}.{os.getpid()}.tmp")
    try:
        _refuse_damaged(path, _unpacked(path, temporary)[0])
        os.replace(temporary, into)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return study


class Bundled(Study):
    """A bundle as a study to read, in a folder that vanishes with this."""

    goes_on = False

    def __init__(self, path: Path):
        _own_sha256(path)
        self.folder = tempfile.TemporaryDirectory(prefix="ebc-lab-")
        super().__init__(Path(self.folder.name) / path.stem)
        _refuse_damaged(path, _unpacked(path, self.root)[0])


def _refuse_damaged(path: Path, wrong: dict[str, str]) -> None:
    for name, what in sorted(wrong.items()):
        raise UserError(
            f"{path} is damaged ({name}: {what}): {REMEDY}; `ebc-lab verify {path}` lists all that is wrong."
        )


# -- unpacking ------------------------------------------------------------------------------------------------------------


def _unpacked(path: Path, into: Path) -> tuple[dict[str, str], bool]:
    """Unpack what can be into a new folder -> file or part of the container -> what is wrong; and whether all was gone through.

    Nothing is written outside the folder, and no more than the disk has room for. Raises UserError.
    """
    into.mkdir(parents=True)
    wrong: dict[str, str] = {}
    room = [shutil.disk_usage(into).free]
    opened: list[BinaryIO] = []

    def close() -> None:
        while opened:
            opened.pop().close()

    def recorded() -> list[str]:
        close()  # the manifest itself
        return sorted(_recorded(into) or ())

    def sink(name: str) -> Callable[[bytes], object] | None:
        close()
        if not _safe(name):
            wrong[name] = "such a name does not belong into a bundle: nothing was written for it"
            return None
        target = into / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            opened.append(open(target, "xb"))  # noqa: SIM115 - closed before the next, or below
        except (FileExistsError, NotADirectoryError):
            wrong[name] = "it is there twice"
            return None
        return partial(_put, opened[0], room)

    try:
        for name, what in container.read(path, sink, recorded):
            wrong.setdefault(name, what)
    except container.Unreadable as error:
        more = "" if error.part == container.WHOLE else "; what follows could not be checked"
        wrong.setdefault(error.part, error.what + more)
        return wrong, False
    finally:
        close()
    return wrong, True


def _put(out: BinaryIO, room: list[int], chunk: bytes) -> None:
    room[0] -= len(chunk)
    if room[0] < 0:
        raise UserError(
            f"there is no room for the bundle's contents in {tempfile.gettempdir()}: set TMPDIR to another folder."
        )
    out.write(chunk)


def _safe(name: str) -> bool:
    """A plain path inside the bundle, on any system."""
    parts = name.split("/")
    return all(
        p not in ("", ".", "..") and p.isprintable() and not set(p) & set('\\:*?"<>|') for p in parts
    ) and (str(PurePosixPath(name)) == name)


def _recorded(root: Path) -> dict[str, str] | None:
    """The manifest's files; None where there is none that can be trusted."""
    try:
        found = dict(manifest.read(root)["files"])
    except (UserError, OSError, KeyError, AttributeError):
        return None
    return found if all(map(_safe, found)) else None


def _names(root: Path) -> Iterator[str]:
    """Every file that was unpacked, hidden ones too."""
    for folder, _, names in os.walk(root):
        inside = os.path.relpath(folder, root)
        yield from (name if inside == "." else f"{inside}/{name}" for name in names)

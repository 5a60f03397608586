"""A bundle: a study as one .zip, which holds manifest.json and the files listed there, for use elsewhere.

* Order, dates and permissions in the archive are fixed: the same study gives the same bytes.
* A bundle is intact if it holds exactly what its manifest lists, even if another program has repacked it.
* Reading a bundle needs neither torch nor the corpus. It writes nothing outside the folder of unpacked files.
* A brief bundle has only the spec, the result and the log of attempts of each run. One file holds these for
  all runs, and takes a quarter of the space of separate files. Unpacking restores the original files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from ebc_lab.config.errors import UserError, visible
from ebc_lab.records.files import NO_SOUND_ZIP, atomic_writer, opened, read_regular, refuse_unwritable
from ebc_lab.records.paths import RUNS

from . import crate, manifest
from .study import Study
from .verify import EDITED, MISSING, UNKNOWN, faults, mismatches
from .verify import verify as verify_study

SUFFIX = ".zip"
JOINED = "runs.jsonl"  # in a brief bundle: one run a line, as file name -> text of the file
KEPT_OF_RUNS = (manifest.SPEC, manifest.RESULT, crate.ATTEMPTS)  # in a brief bundle; up to 1.0 no attempts
PICTURES = (".png", ".svg", ".pdf", ".html")  # `ebc-lab report` draws these again
ARCHIVE = "the archive"  # stands in place of a file's name for a fault of the whole bundle
REGULAR_FILE = 0o100644 << 16
ENCRYPTED = 1  # bit in the flags of an archive's member
LARGEST = (1 << 31) - 1  # bytes in a file; larger ones need the ZIP64 format
MOST_TIMES = 200  # largest ratio of unpacked to packed size accepted; tables of numbers reach about ten
SMALL = 1 << 20  # bytes; the ratio of smaller files is not checked
REMEDY = "get the bundle again from the person who exported it"


def export(study: Study, output: Path | None = None, *, brief: bool = False) -> dict[str, Any]:
    """Pack a study (docs/beyond.md). No command may be running it, and all its files must be as recorded.

    `brief`: of each run, pack only the spec and the result, from which decisions are made, and the log of
    attempts, which tells by what software; leave out pictures, which `ebc-lab report` draws again. `output`:
    the path; by default `<study>.zip` beside the study. Return `study`, `bundle` (the path), `sha256`,
    `bytes`, `files` (their number, without the manifest) and `replaced` (the sha256 of a different bundle
    that was overwritten, or None). Raises UserError if the study is not ready.
    """
    if output is None and isinstance(study, Bundled):
        raise UserError(f"{study.name}{SUFFIX} is a bundle already: copy it, or give --output FILE.zip.")
    path = output.expanduser() if output else study.root.with_name(f"{study.name}{SUFFIX}")
    _refuse_to_overwrite(path)
    entries = _exportable(study)
    refuse_unwritable(path.resolve().parent)
    before = manifest.sha256_of(path) if path.exists() else None
    made: dict[str, bytes] = {}
    if brief:
        entries, made = _abridged(study, entries)

    def contents() -> Iterator[tuple[str, bytes]]:
        for name in (manifest.NAME, *sorted(entries)):
            content = made[name] if name in made else read_regular(study.root / name, LARGEST)
            if name != manifest.NAME and hashlib.sha256(content).hexdigest() != entries[name]:
                raise UserError(
                    f"{study.root / name} changed while it was being exported: export the study again when "
                    "nobody is on it."
                )
            yield name, content

    with atomic_writer(path) as out:
        pack(out, _joined(contents()) if brief else contents())
    sha256 = manifest.sha256_of(path)
    return {
        "study": study.name,
        "bundle": visible(str(path)),
        "sha256": sha256,
        "replaced": before if before != sha256 else None,
        "bytes": path.stat().st_size,
        "files": len(entries),
    }


def _abridged(study: Study, entries: Mapping[str, str]) -> tuple[dict[str, str], dict[str, bytes]]:
    """Return the manifest entries of a brief bundle, and the new contents of the manifest and of
    ro-crate-metadata.json. In these two files the bundle differs from the study."""
    own = study.crate_file.name
    kept = {}
    for name, sha256 in entries.items():
        path = Path(name)
        in_brief = path.name in KEPT_OF_RUNS if manifest.owning_run(name) else path.suffix not in PICTURES
        if in_brief and name != own:
            kept[name] = sha256
    description = crate.text_for(study, kept).encode()
    kept[own] = hashlib.sha256(description).hexdigest()
    return kept, {own: description, manifest.NAME: manifest.content_for(kept)}


def _joined(contents: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the study's own files unchanged, then of one file with all runs' files."""
    runs: dict[str, dict[str, str]] = {}
    for name, content in contents:
        if run := manifest.owning_run(name):
            runs.setdefault(run, {})[Path(name).name] = content.decode()
        else:
            yield name, content
    yield JOINED, "".join(f"{json.dumps({'run': run, **files})}\n" for run, files in runs.items()).encode()


def pack(out: BinaryIO, contents: Iterable[tuple[str, bytes]]) -> None:
    """Write the (name, content) pairs to `out` as a zip, in the given order."""
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in contents:
            about = zipfile.ZipInfo(name)  # dated 1980-01-01 by default
            about.compress_type = zipfile.ZIP_DEFLATED
            about.create_system = 3  # Unix, whatever this system is
            about.external_attr = REGULAR_FILE
            archive.writestr(about, content, compresslevel=6)


def _refuse_to_overwrite(path: Path) -> None:
    """Raise UserError if this is no name for a bundle, or if the file exists and is not a bundle."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the bundle's own name, --output {path / 'NAME.zip'}.")
    if path.suffix != SUFFIX:
        raise UserError(
            f"{path}: a bundle's name ends in {SUFFIX}, by which the other commands recognise it."
        )
    if not path.exists():
        return
    with suppress(*NO_SOUND_ZIP, UserError), opened(path) as f, zipfile.ZipFile(f) as archive:
        if manifest.NAME in archive.namelist():
            return
    raise UserError(f"{path} exists and is not a bundle: choose another --output, or delete it.")


def _exportable(study: Study) -> dict[str, str]:
    """Return path -> sha256 of the files to pack. Raises UserError if any file is not final or intact."""
    study.must_exist()
    recorded = manifest.read(study.root)
    study.header()
    if not all(map(manifest.is_safe, recorded["files"])):
        raise UserError(
            f"{study.manifest_file} lists a file outside the study: restore a copy, or delete it."
        )
    if study.holder() is not None:
        raise UserError(f"study {study.name} is being run: export it when it has finished.")
    found = verify_study(study, recorded)
    if bad := found["bad"]:
        what = f"{bad[0]['file']}: {bad[0]['what']}" + (f" and {len(bad) - 1} more" if len(bad) > 1 else "")
        raise UserError(f"study {study.name} is not as recorded ({what}): {bad[0]['remedy']}.")
    if not recorded["complete"] or found["unrecorded"]:
        raise UserError(
            f"study {study.name} was cut off, and not all of its files are recorded: run its command again, "
            f"or `ebc-lab report {study.name}`, which records what is there."
        )
    return dict(recorded["files"])


def is_bundle(path: Path) -> bool:
    """Return whether a path stands for a bundle rather than a study's folder. The path need not exist."""
    return path.suffix == SUFFIX and not path.is_dir()


def verify(path: Path, sha256: str | None = None) -> dict[str, Any]:
    """Return what `verify_study` returns for a study, with the bundle's `sha256` added. If `sha256` is given
    and differs from the bundle's, the difference is listed among the faults. Raises UserError if `sha256` is
    not 64 hex digits, the bundle does not exist, or there is no room to unpack it."""
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise UserError("--sha256 takes the 64 hex digits that `ebc-lab export` printed.")
    with tempfile.TemporaryDirectory(prefix="ebc-lab-") as folder:
        study = Study(Path(folder) / path.stem)
        digests, wrong = _unpack(path, study.root)
        if study.exists() and manifest.NAME not in wrong:
            wrong = faults(study, digests, digests) | wrong
    checksum = manifest.sha256_of(path)
    if sha256 is not None and sha256.lower() != checksum:
        wrong[ARCHIVE] = f"its sha256 is {checksum}, and {sha256} was expected"
    return {
        "study": study.name,
        "root": str(path),
        "sha256": checksum,
        "under_way": False,
        "files": len(digests.keys() - {manifest.NAME}),
        "unrecorded": 0,
        "growing": 0,
        "bad": [
            {"file": _readable(name), "what": visible(what), "remedy": REMEDY}
            for name, what in sorted(wrong.items())
        ],
        "ok": not wrong,
    }


def _readable(name: str) -> str:
    return visible(name if len(name) <= manifest.LONGEST else name[:80] + "…")


def unpack(path: Path, into: Path) -> Study:
    """Unpack a bundle into a new folder and return the study there. Raises UserError if the folder already
    exists or the bundle is damaged."""
    if into.exists():
        raise UserError(
            f"{into} exists already: give it to the command instead of {path}, or choose another --output."
        )
    refuse_unwritable(into.resolve().parent)
    temporary = into.with_name(f".{into.name}.{os.getpid()}.tmp")
    try:
        _unpack_intact(path, temporary)
        os.replace(temporary, into)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Study(into)


class Bundled(Study):
    """A bundle as a read-only study, unpacked in a temporary folder that is removed with this object."""

    resumable = False

    def __init__(self, path: Path):
        self.folder = tempfile.TemporaryDirectory(prefix="ebc-lab-")
        super().__init__(Path(self.folder.name) / path.stem)
        self.place = path
        _unpack_intact(path, self.root)


def _unpack_intact(path: Path, into: Path) -> None:
    """Unpack a bundle into a new folder. Raises UserError if the bundle has any fault."""
    for name, what in sorted(_unpack(path, into)[1].items()):
        remedy = f"{REMEDY}; `ebc-lab verify {shlex.quote(str(path))}` lists it all"
        raise UserError(f"{path} is damaged ({_readable(name)}: {what}): {remedy}.")


def _unpack(path: Path, into: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Unpack every file that can be unpacked into a new folder. Return (file -> sha256) of these, and (file
    -> fault) of each file that differs from the manifest, with `ARCHIVE` for the whole bundle. Raises
    UserError if the bundle does not exist, or the disk has no room for the size that the archive declares."""
    try:
        opened(path).close()
    except FileNotFoundError:
        raise UserError(f"there is no bundle at {path}: `ebc-lab export STUDY` makes one.") from None
    into.mkdir(parents=True)
    try:
        archive = zipfile.ZipFile(path)
    except NO_SOUND_ZIP as error:
        return {}, {ARCHIVE: f"it is not a zip, or its directory is damaged or cut off ({error})"}
    digests: dict[str, str] = {}
    wrong: dict[str, str] = {}
    with archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        if sum(member.file_size for member in members) > shutil.disk_usage(into).free:
            raise UserError(
                f"{into.parent} has no room for what {path} holds: choose another --output, or set TMPDIR."
            )
        for member in members:
            try:
                for name, content in _files_in(archive, member).items():
                    (into / name).parent.mkdir(parents=True, exist_ok=True)
                    with open(into / name, "xb") as out:
                        out.write(content)
                    digests[name] = hashlib.sha256(content).hexdigest()
            except UserError as error:
                wrong[member.orig_filename] = str(error)
            except (FileExistsError, NotADirectoryError):
                wrong[member.orig_filename] = "it is there twice"
    return digests, _unlisted(into, digests) | wrong


def _files_in(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> dict[str, bytes]:
    """Return path -> content of the files in one member of the archive: a single file or, for the joined
    member of a brief bundle, the files of all runs. Raises UserError if the member cannot be unpacked."""
    name = member.orig_filename
    if not manifest.is_safe(name):
        raise UserError("not unpacked: its name is not a plain path inside the study")
    if member.file_size > max(SMALL, MOST_TIMES * member.compress_size):
        raise UserError(
            f"not unpacked: {member.file_size} bytes are more than {MOST_TIMES} times its packed size"
        )
    if member.flag_bits & ENCRYPTED or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError("not unpacked: it is encrypted, or packed in a way that is not read here")
    try:
        content = archive.read(member)
    except NO_SOUND_ZIP:
        raise UserError("its contents are not those that were packed") from None
    if name != JOINED:
        return {name: content}
    try:
        runs = [json.loads(line) for line in content.decode().splitlines()]
        files = {
            f"{RUNS}/{run['run']}/{one}": run[one].encode()
            for run in runs
            for one in KEPT_OF_RUNS
            if one in run or one != crate.ATTEMPTS
        }
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise UserError("it is not the list of runs that was packed") from None
    if unsafe := [path for path in files if not manifest.is_safe(path)]:
        raise UserError(f"it names a file outside the study, {_readable(unsafe[0])}")
    return files


def _unlisted(root: Path, digests: Mapping[str, str]) -> dict[str, str]:
    """Return file -> how it differs from the manifest; if the manifest is unusable, only the reason why."""
    try:
        recorded = manifest.read(root)["files"]
    except UserError:
        return {manifest.NAME: EDITED if manifest.NAME in digests else MISSING}
    if not all(map(manifest.is_safe, recorded)):
        return {manifest.NAME: "it lists a file outside the study"}
    unknown = digests.keys() - {manifest.NAME, *recorded}
    return mismatches(recorded, digests) | dict.fromkeys(unknown, UNKNOWN)

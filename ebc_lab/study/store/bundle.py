"""A study as one .zip: everything that its manifest records, to be checked and read on another machine.

* The archive is written in one way only (order, dates, permissions): the same study gives the same bytes.
* Its comment ends in the sha256 of all bytes before it, so any change is noticed. The checksum of each file
  in it, and the manifest, tell a change of contents from one of the archive's structure.
* Reading a bundle needs neither torch nor the corpus; it writes nothing outside the folder it unpacks to.
* A brief one has of each run its spec and its result, all of them in one file, which packs four times as
  small as they would one by one; unpacked they are the files that they were.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from ebc_lab.config.errors import UserError, visible
from ebc_lab.records.files import atomic_writer, opened, read_regular, refuse_unwritable
from ebc_lab.records.paths import RUNS

from . import crate, manifest
from .study import Study
from .verify import MISSING, UNKNOWN
from .verify import verify as verify_study

SUFFIX = ".zip"
JOINED = "runs.jsonl"  # of a brief bundle: the files of a run in each line, as texts by their names
DRAWN = (".png", ".svg", ".html")  # what `ebc-lab report` makes again
OF_A_RUN = (manifest.SPEC, manifest.RESULT)
ARCHIVE = "the archive"  # what is wrong where no file in it is
COMMENT = b"ebc-lab bundle; sha256 of all bytes before this one: "
DIGEST = 64  # hex digits at the end of the comment
DATE = (1980, 1, 1, 0, 0, 0)
REGULAR_FILE = 0o100644 << 16
LARGEST = (1 << 31) - 1  # bytes of a file; beyond that a header has another form
MOST_TIMES = 200  # its packed size that a file may unpack to; tables of numbers reach about ten
SMALL = 1 << 20  # bytes, up to which a file may unpack to any multiple
CHUNK = 1 << 20
LONGEST_PART = 200  # characters of a file's or a folder's own name
LONGEST = 512  # characters of a path; the runs' own have about 150
UNREADABLE = (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error)  # as a zip
REMEDY = "get the bundle again from the person who exported it"
FOREIGN = (
    "it is not as `ebc-lab export` writes it: packed again by another program, exported by an earlier "
    "version, or damaged at its end"
)


def export(study: Study, output: Path | None = None, *, brief: bool = False) -> dict[str, Any]:
    """Pack a study that nobody is running and whose files are all as recorded (docs/bundle.md).

    `brief`: of each run only its spec and its result, from which all decisions are made, and no pictures,
    which `ebc-lab report` draws again. `output`: by default `<study>.zip` beside the study. Returns `bundle`
    (its path), `sha256`, `bytes`, `files` (how many, beside the manifest that lists them) and `replaced`: the
    sha256 of another bundle that was there, else None. Raises UserError.
    """
    if output is None and isinstance(study, Bundled):
        raise UserError(f"{study.name}{SUFFIX} is a bundle already: copy it, or give --output FILE.zip.")
    path = study.root.with_name(f"{study.name}{SUFFIX}") if output is None else output.expanduser()
    _refuse_to_overwrite(path)
    recorded = _exportable(study)
    refuse_unwritable(path.resolve().parent)
    before = manifest.sha256_of(path) if path.exists() else None
    with atomic_writer(path) as out, _abridged(study, recorded) if brief else nullcontext(study) as packed:
        recorded = manifest.read(packed.root)["files"]
        checksums = {
            manifest.NAME: manifest.sha256_of(packed.manifest_file),
            **dict(sorted(recorded.items())),
        }
        contents = ((name, _content(packed.root / name, sha256)) for name, sha256 in checksums.items())
        pack(out, _joined(contents) if brief else contents)
    made = manifest.sha256_of(path)
    return {
        "study": study.name,
        "bundle": visible(str(path)),
        "sha256": made,
        "replaced": before if before != made else None,
        "bytes": path.stat().st_size,
        "files": len(recorded),
    }


@contextmanager
def _abridged(study: Study, recorded: Mapping[str, str]) -> Iterator[Study]:
    """Yield a copy of a study without pictures and what its runs logged, recorded and described as that."""
    with tempfile.TemporaryDirectory(prefix="ebc-lab-") as folder:
        brief = Study(Path(folder) / study.root.name)
        for name, sha256 in recorded.items():
            path = Path(name)
            if path.name in OF_A_RUN if manifest.run_of(name) else path.suffix not in DRAWN:
                (brief.root / name).parent.mkdir(parents=True, exist_ok=True)
                (brief.root / name).write_bytes(_content(study.root / name, sha256))
        crate.complete(brief)
        yield brief


def _joined(contents: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
    """Yield the study's own files, and those of all runs as one."""
    runs: dict[str, dict[str, str]] = {}
    for name, content in contents:
        if run := manifest.run_of(name):
            runs.setdefault(run, {})[Path(name).name] = content.decode()
        else:
            yield name, content
    yield JOINED, "".join(f"{json.dumps({'run': run, **files})}\n" for run, files in runs.items()).encode()


def _part(root: Path) -> dict[str, str]:
    """Make the files of runs of an unpacked `JOINED`, if it is there. -> what is wrong with it."""
    joined = root / JOINED
    if not joined.exists():
        return {}
    try:
        for line in joined.read_text(encoding="utf-8").splitlines():
            about = json.loads(line)
            for name in OF_A_RUN:
                path = f"{RUNS}/{about['run']}/{name}"
                if not safe(path):
                    return {JOINED: f"it names a file outside the study, {_told(path)}"}
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                with open(root / path, "x", encoding="utf-8", newline="") as out:
                    out.write(about[name])
    except (ValueError, TypeError, LookupError, FileExistsError):
        return {JOINED: "it is not the list of runs that was packed"}
    joined.unlink()
    return {}


def pack(out: BinaryIO, contents: Iterable[tuple[str, bytes]]) -> None:
    """Write (name, content) in this order to an empty file, and the digest of all that at its end."""
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in contents:
            archive.writestr(_member(name), content, compresslevel=6)
        archive.comment = COMMENT + b"0" * DIGEST
    out.flush()
    digest, _ = _digests(Path(out.name))
    out.seek(-DIGEST, os.SEEK_END)
    out.write(digest)


def _member(name: str) -> zipfile.ZipInfo:
    """Return the description of a file that every bundle has."""
    info = zipfile.ZipInfo(name, DATE)
    info.compress_type = zipfile.ZIP_DEFLATED
    info.create_system = 3  # Unix, on any system
    info.external_attr = REGULAR_FILE
    return info


def _digests(path: Path) -> tuple[bytes, bytes]:
    """Return the sha256 (hex) of all but the last `DIGEST` bytes of a file, and those bytes: equal if
    intact."""
    sha256 = hashlib.sha256()
    left = path.stat().st_size - DIGEST
    with open(path, "rb") as f:
        while left > 0 and (chunk := f.read(min(CHUNK, left))):
            sha256.update(chunk)
            left -= len(chunk)
        return sha256.hexdigest().encode(), f.read()


def _refuse_to_overwrite(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the bundle's own name, --output {path / 'NAME.zip'}.")
    if path.suffix != SUFFIX:
        raise UserError(
            f"{path}: a bundle's name ends in {SUFFIX}, by which the other commands recognise it."
        )
    if not path.exists():
        return
    try:
        with opened(path) as f, zipfile.ZipFile(f) as archive:
            known = archive.comment.startswith(COMMENT)
    except (*UNREADABLE, UserError):
        known = False
    if not known:
        raise UserError(f"{path} exists and is not a bundle: choose another --output, or delete it.")


def _exportable(study: Study) -> dict[str, str]:
    """Return path -> sha256 of what goes into the bundle. Raises UserError."""
    study.must_exist()
    recorded = manifest.read(study.root)
    study.header()
    if not all(map(safe, recorded["files"])):
        raise UserError(
            f"{study.manifest_file} lists a file outside the study: restore a copy, or delete it."
        )
    if study.holder() is not None:
        raise UserError(f"study {study.name} is being run: export it when it has finished.")
    findings = verify_study(study)
    if findings["bad"]:
        first = findings["bad"][0]
        what = f"{first['file']}: {first['what']}"
        if len(findings["bad"]) > 1:
            what += f" and {len(findings['bad']) - 1} more"
        raise UserError(f"study {study.name} is not as recorded ({what}): {first['remedy']}.")
    if not recorded["complete"] or findings["unrecorded"]:
        raise UserError(
            f"study {study.name} was cut off, and not all of its files are recorded: run its command again, "
            f"or `ebc-lab report {study.name}`, which records what is there."
        )
    return dict(recorded["files"])


def _content(path: Path, sha256: str) -> bytes:
    """Return a file as it was recorded. Raises UserError when it has changed, or is larger than a bundle
    takes."""
    content = read_regular(path, LARGEST)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(
            f"{path} changed while it was being exported: export the study again when nobody is on it."
        )
    return content


def is_bundle(path: Path) -> bool:
    """Tell whether a name means a bundle and not a study's folder."""
    return path.suffix == SUFFIX and not path.is_dir()


def verify(path: Path, sha256: str | None = None) -> dict[str, Any]:
    """Return what `verify_study` returns, for a bundle, and its own `sha256`, which is compared with the
    given one.

    `bad` names the files whose contents are not those that were packed, or the archive if only its structure
    was changed. Raises UserError when there is no such file, or no room to unpack it.
    """
    if sha256 is not None and (len(sha256) != 64 or set(sha256.lower()) - set("0123456789abcdef")):
        raise UserError("--sha256 takes the 64 hex digits that `ebc-lab export` printed.")
    checksum = _own_sha256(path)
    with tempfile.TemporaryDirectory(prefix="ebc-lab-") as folder:
        study = Study(Path(folder) / path.stem)
        wrong = _unpack(path, study.root)
        there = set(_names(study.root))
        findings: dict[str, Any] = {"study": study.name, "files": len(there), "growing": 0}
        if _intact(path):  # otherwise files may be missing because the directory was damaged
            findings |= _check_contents(study, there, wrong)
    if sha256 is not None and sha256.lower() != checksum:
        wrong[ARCHIVE] = f"its sha256 is {checksum}, and {sha256} was expected"
    bad = [
        {"file": _told(name), "what": visible(what), "remedy": _remedy(name)}
        for name, what in sorted(wrong.items())
    ]
    about = {"root": str(path), "sha256": checksum, "under_way": False, "unrecorded": 0}
    return {**findings, **about, "bad": bad, "ok": not bad}


def _told(name: str) -> str:
    """Return a name from an archive, in a length that can be read."""
    return visible(name if len(name) <= LONGEST else name[:80] + "…")


def _own_sha256(path: Path) -> str:
    try:
        return manifest.sha256_of(path)
    except FileNotFoundError:
        raise UserError(f"there is no bundle at {path}: `ebc-lab export STUDY` makes one.") from None


def _intact(path: Path) -> bool:
    digest, recorded = _digests(path)
    return digest == recorded


def _remedy(name: str) -> str:
    return (
        f"{REMEDY}, or unpack it, and `ebc-lab verify FOLDER` checks its files" if name == ARCHIVE else REMEDY
    )


def _check_contents(study: Study, there: set[str], wrong: dict[str, str]) -> dict[str, Any]:
    """Check the unpacked files as a study and add to `wrong`. -> the counts that `verify` returns."""
    try:
        recorded = manifest.read(study.root)["files"]
    except UserError:
        damaged = "edited: its checksum does not match"
        wrong.setdefault(manifest.NAME, damaged if manifest.NAME in there else MISSING)
        return {}
    if not all(map(safe, recorded)):
        wrong[manifest.NAME] = "it lists a file outside the study"
        return {}
    findings: dict[str, Any] = {"files": len(recorded), "growing": 0}
    bad = dict.fromkeys(there - {manifest.NAME, *recorded}, UNKNOWN)
    if study.exists():
        checked = verify_study(study)
        findings["growing"] = checked["growing"]
        bad |= {b["file"]: b["what"] for b in checked["bad"]}
    else:
        bad |= dict.fromkeys(set(recorded) - there, MISSING)
    for name, what in bad.items():
        wrong.setdefault(name, what)
    return findings


def unpack(path: Path, into: Path) -> Study:
    """Unpack a bundle into a new folder. -> an ordinary study. Raises UserError: damaged, a folder in use."""
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
    """A bundle as a study to read, in a folder that exists as long as this object."""

    resumable = False

    def __init__(self, path: Path):
        self.folder = tempfile.TemporaryDirectory(prefix="ebc-lab-")
        super().__init__(Path(self.folder.name) / path.stem)
        self.path = path
        _unpack_intact(path, self.root)

    @property
    def place(self) -> Path:
        return self.path


def _unpack_intact(path: Path, into: Path) -> None:
    """Raise UserError when anything is wrong with the bundle."""
    _own_sha256(path)
    for name, what in sorted(_unpack(path, into).items()):
        remedy = f"{_remedy(name)}; `ebc-lab verify {shlex.quote(str(path))}` lists it all"
        raise UserError(f"{path} is damaged ({_told(name)}: {what}): {remedy}.")


def _unpack(path: Path, into: Path) -> dict[str, str]:
    """Unpack what can be unpacked into a new folder. -> file, or `ARCHIVE`, -> what is wrong with it.

    Raises UserError when the disk has no room for what the archive says it holds.
    """
    into.mkdir(parents=True)
    try:
        archive = zipfile.ZipFile(path)
    except UNREADABLE as error:
        return {ARCHIVE: f"it is not a zip, or its directory is damaged or cut off ({error})"}
    with archive:
        if not archive.comment.startswith(COMMENT):
            return {ARCHIVE: FOREIGN}
        members = archive.infolist()
        if sum(member.file_size for member in members) > shutil.disk_usage(into).free:
            raise UserError(
                f"{into.parent} has no room for what {path} holds: choose another --output, or set TMPDIR."
            )
        wrong: dict[str, str] = {}
        for member in members:
            if not _header_matches(path, member):
                which = _told(member.filename)
                return {ARCHIVE: f"its structure was changed: it does not describe {which} consistently"}
            if what := _unpack_member(archive, member, into):
                wrong[member.orig_filename] = what
        wrong |= _part(into)
    if not wrong and not _intact(path):
        wrong[ARCHIVE] = "its structure was changed; the contents of its files were not"
    return wrong


def _header_matches(path: Path, member: zipfile.ZipInfo) -> bool:
    """Tell whether the header of a file is the one that `pack` writes for what the directory says of it."""
    expected = _member(member.orig_filename)
    for field in ("CRC", "compress_size", "file_size", "compress_type", "flag_bits"):
        setattr(expected, field, getattr(member, field))
    header = expected.FileHeader()
    with open(path, "rb") as f:
        if member.header_offset < 0:
            return False
        f.seek(member.header_offset)
        return f.read(len(header)) == header


def _unpack_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, into: Path) -> str | None:
    """Unpack one file. -> what is wrong with it, if anything; then it is not there."""
    name = member.orig_filename
    target = into / name
    if not safe(name):
        return "not unpacked: its name is not a plain path inside the study"
    if member.file_size > max(SMALL, MOST_TIMES * member.compress_size):
        return f"not unpacked: {member.file_size} bytes are more than {MOST_TIMES} times its packed size"
    try:
        content = archive.read(member)
    except (zipfile.BadZipFile, zlib.error, EOFError):
        return "its contents are not those that were packed"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "xb") as out:
            out.write(content)
    except (FileExistsError, NotADirectoryError):
        return "it is there twice"
    return None


def safe(name: str) -> bool:
    """Return a plain path inside the bundle, on any system."""
    return len(name) <= LONGEST and all(_safe_part(part) for part in name.split("/"))


def _safe_part(part: str) -> bool:
    return (
        part not in ("", ".", "..")
        and len(part) <= LONGEST_PART
        and part.isprintable()
        and not set(part) & set('\\:*?"<>|')
    )


def _names(root: Path) -> Iterator[str]:
    """Return every file below a folder, hidden ones too."""
    return (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())

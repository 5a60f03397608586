"""An index of a study's runs, so that a question need not be answered from thousands of files.

* The index is a cache. A row is used only while the run's spec, result and log of attempts are the files from
  which the row was made, by inode, size and times. Other runs, and faulty ones, are read from their files.
* It is one file with a checksum. A command that reads the study replaces the whole file, if the user owns the
  folder and can write there. If two commands do so at once, one index is lost and is computed again later.
* It also keeps facts computed from the study, each under a key that identifies all inputs of the fact.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import msgspec

from ebc_lab import __version__
from ebc_lab.config.errors import UserError
from ebc_lab.records.files import read_regular, stamp_of, write_atomic
from ebc_lab.records.json_files import MOST_BYTES
from ebc_lab.records.paths import RunFiles

from . import manifest
from .study import Brief, Record, Study

VERSION = f"4 {__version__}"  # the 4 is raised by hand when the file's format, or a check of runs, changes
LEAST = 200  # smaller studies get no index
SETTLED_S = 2.0  # a younger file may still change within one tick of the disk's clock, so it is read again
DIGEST_BYTES = 16
MADE_OF = (manifest.SPEC, manifest.RESULT, RunFiles(Path()).attempts.name)
PACKED = struct.Struct("=QqqQ")
Rows = dict[str, tuple[bytes, Brief]]  # run id -> the stamp of its files, and the run in brief
ROWS = msgspec.msgpack.Decoder(Rows)


class Kept(msgspec.Struct, array_like=True):
    """The contents of an index file after its checksum."""

    version: str = VERSION
    facts: dict[str, tuple[str, str]] = {}  # name -> (key, fact)
    rows: msgspec.Raw = msgspec.Raw(msgspec.msgpack.encode({}))  # `Rows`, decoded when they are asked for


class Index:
    """The runs of a study at one moment, and facts that earlier commands computed from them.

    Attributes:
        state: a hash of the stamps of all runs' files. It is empty if a file is so young that it may change
            unnoticed, if the study is too small for an index, or if the study comes from a bundle.
    """

    def __init__(self, study: Study):
        self.study = study
        self.run_ids = study.run_ids()
        self.used = len(self.run_ids) >= LEAST and study.resumable
        self.state = ""
        self.stamps: dict[str, bytes] = {}  # of the runs whose files have settled
        self.kept = Kept()
        if not self.used:
            return
        settled, young = time.time() - SETTLED_S, False
        state = blake2b(digest_size=DIGEST_BYTES)
        # looking up names in an open folder is quicker than looking up whole paths
        runs = os.open(study.runs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for run_id in self.run_ids:
                stamp, changed = _stamp(runs, run_id)
                if changed >= settled:
                    young = True
                elif stamp:
                    self.stamps[run_id] = stamp
                    state.update(f"{run_id}\n".encode() + stamp)
        finally:
            os.close(runs)
        self.state = "" if young else state.hexdigest()
        self.kept = _read(study)

    @cached_property
    def records(self) -> list[Record]:
        """Return every planned run. Files are read only for runs that differ from the index. A fault in a
        run's files raises no error; the record's `problem` describes it."""
        study = self.study
        known = ROWS.decode(self.kept.rows)
        rows: Rows = {}
        records: list[Record] = []
        for run_id in self.run_ids:
            stamp = self.stamps.get(run_id)
            if stamp and run_id in known and known[run_id][0] == stamp:
                record: Record | None = Record(study, known[run_id][1])
            else:
                record = study.record(run_id)
            if record is None:
                continue
            if stamp and not record.problem:
                record = Record(study, msgspec.structs.replace(record.brief, history=record.history))
                rows[run_id] = stamp, record.brief
            records.append(record)
        if rows != known:
            self.kept.rows = msgspec.Raw(msgspec.msgpack.encode(rows))
            _write(study, self.kept)
        return records

    @property
    def problems(self) -> list[str]:
        """Return a sentence for each run whose files have a fault."""
        return [record.problem for record in self.records if record.problem]

    def remembered(self, name: str, key: str, make: Callable[[], str]) -> str:
        """Return the fact kept under this name and key. If there is none, call `make` and keep its result."""
        known = self.recall(name, key)
        if known is None:
            known = make()
            self.remember(name, key, known)
        return known

    def recall(self, name: str, key: str) -> str | None:
        """Return the fact of this name; None if no fact is kept, or it is kept under another key."""
        known_key, fact = self.kept.facts.get(name, ("", ""))
        return fact if key and key == known_key else None

    def remember(self, name: str, key: str, fact: str) -> None:
        """Store a fact under a name for later commands, replacing any earlier one. Does nothing if the key is
        empty or no index is used for this study."""
        if self.used and key:
            self.kept.facts[name] = key, fact
            _write(self.study, self.kept)


def _stamp(runs: int, run_id: str) -> tuple[bytes, float]:
    """Return a stamp that changes with a run's spec, result or log of attempts (empty without a readable
    spec), and the time of the last change (s since the epoch). `runs`: descriptor of the folder runs/."""
    parts, changed = [], 0.0
    for name in MADE_OF:
        try:
            about = os.stat(f"{run_id}/{name}", dir_fd=runs)
        except OSError as error:
            if name == manifest.SPEC or not isinstance(error, FileNotFoundError):
                return b"", 0.0
            parts.append(b"-")
        else:
            parts.append(PACKED.pack(*stamp_of(about)))
            changed = max(changed, about.st_ctime)
    return b"".join(parts), changed


def _read(study: Study) -> Kept:
    """Return the contents of the index; empty if the file is missing, damaged or of another version."""
    with suppress(OSError, UserError, msgspec.DecodeError):
        content = read_regular(study.index_file, MOST_BYTES)
        checksum, body = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
        if checksum == blake2b(body, digest_size=DIGEST_BYTES).digest():
            kept = msgspec.msgpack.decode(body, type=Kept)
            return kept if kept.version == VERSION else Kept()
    return Kept()


def _write(study: Study, kept: Kept) -> None:
    """Replace the index file, if the study's folder belongs to this user and is writable."""
    with suppress(OSError):
        if os.stat(study.root).st_uid == os.geteuid() and os.access(study.root, os.W_OK | os.X_OK):
            body = msgspec.msgpack.encode(kept)
            checksum = blake2b(body, digest_size=DIGEST_BYTES).digest()
            write_atomic(study.index_file, checksum + body, durable=False)
            (study.root / ".index.sqlite").unlink(missing_ok=True)  # what 1.0 wrote in its place

"""An index of a study's runs: what is asked of each again and again, so that thousands of files need not be
read for it every time.

* It is never the truth. A row holds for a run whose spec and result are the very files that it was made of,
  by inode, size and times; any other run is read from its files, and so is one that cannot be used. A row's
  own checksum keeps what is left of a damaged index from being believed.
* It is made, and made again, by whoever reads the study: by its owner, where the folder can be written. All
  others, and a reader who finds it locked, do without what they cannot have.
* SQLite's transactions keep a writer that is killed from leaving half of anything behind.
* `remembered` keeps what was computed of these files, with a digest of all that it depends on.
"""

from __future__ import annotations

import json
import os
import stat
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import astuple, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ebc_lab import __version__
from ebc_lab.config.identity import digest
from ebc_lab.records.figures import RunResult
from ebc_lab.records.files import stamp_of
from ebc_lab.records.paths import RunFiles, SpecRecord

from ..stages.rules import untimed
from . import attempts
from .study import Brief, Record, Study

if TYPE_CHECKING:
    import sqlite3

FORM = 1  # of the tables and their rows; raised by hand when what they hold, or what a run must be, changes
VERSION = zlib.crc32(f"{FORM} {__version__}".encode()) & 0x7FFFFFFF
LEAST = 200  # runs from which on an index is worth its file
SETTLED_S = 2.0  # a younger file may yet change within the same tick of the disk's clock: it is read again
WAIT_S = 1.0  # for another process that reads or writes the index
TABLES = ("runs", "facts")
COLUMNS = "name TEXT PRIMARY KEY, key BLOB, value TEXT, seal BLOB"
_FILES = RunFiles(Path())
MADE_OF = (_FILES.spec.name, _FILES.result.name, _FILES.attempts.name)
PACKED = struct.Struct("=QqqQ")
Row = tuple[str, bytes, str]  # a run, its stamp, it in brief; or a fact's name, what it depends on, the fact
Pair = tuple[bytes, str]
NOTHING: Pair = (b"", "")
Made = TypeVar("Made")


class Stamp(NamedTuple):
    """Which files a run's row is made of."""

    bytes: bytes
    newest: float  # seconds since the epoch, when one of them last changed


class KnownRecord(Record):
    """A run that the index knows; its files are read anew whenever they are asked for, and not held."""

    study: Study

    def __init__(self, study: Study, brief: Brief):
        self.__dict__.update(run_id=brief.run_id, problem=None, study=study, brief=brief)

    @property
    def spec(self) -> SpecRecord | None:
        with suppress(FileNotFoundError):  # somebody has removed it since
            return self.study.spec(self.run_id)
        return None

    @property
    def result(self) -> RunResult | None:
        return self.study.result(self.run_id) if self.outcome else None

    @property
    def outcome(self) -> str | None:
        return self.brief.outcome


class Index:
    """The runs of a study as one look found them, and facts that were computed of them before.

    Attributes:
        state: names all the files that it is made of; empty while some of them may still change unseen, or
            where a study is too small for an index.
    """

    def __init__(self, study: Study):
        self.study = study
        self.run_ids = study.run_ids()
        self.used = len(self.run_ids) >= LEAST and study.resumable
        self.state = ""
        self.stamps: dict[str, Stamp] = {}
        self.facts: dict[str, Pair] = {}  # name -> what it depends on, and it
        if not self.used:
            return
        self.settled = time.time() - SETTLED_S
        with _folder(study.runs) as runs:
            for run_id in self.run_ids:
                if (stamp := _stamp(runs, run_id)) is not None:
                    self.stamps[run_id] = stamp
        if all(stamp.newest < self.settled for stamp in self.stamps.values()):
            state = blake2b(digest_size=16)
            for run_id, stamp in self.stamps.items():
                state.update(f"{run_id}\n".encode() + stamp.bytes)
            self.state = state.hexdigest()
        self.facts = _read(study, "facts")

    @cached_property
    def records(self) -> list[Record]:
        """Return every planned run, of which only those are read that are not as the index has them. What is
        wrong with a run is in its `problem`, and not raised."""
        study = self.study
        if not self.used:
            return study.records()
        rows = _read(study, "runs")
        records: list[Record] = []
        fresh: list[Row] = []
        for run_id in self.run_ids:
            stamp = self.stamps.get(run_id)
            stamped, text = rows.pop(run_id, NOTHING)
            if stamp is not None and stamp.bytes == stamped:
                records.append(KnownRecord(study, _brief(run_id, text)))
                continue
            record = study.record(run_id)
            if record is None:
                continue
            if record.spec is None or record.problem or stamp is None:
                records.append(record)
                continue
            spans = tuple((s.begin, s.end, s.host, s.pid) for s in attempts.spans(study.run_dir(run_id)))
            rest = digest(untimed(record.result)) if record.result is not None else ""
            brief = replace(record.brief, untimed=rest, spans=spans)
            records.append(KnownRecord(study, brief))
            if stamp.newest < self.settled:
                fresh.append((run_id, stamp.bytes, _text(brief)))
        if fresh or rows:
            _write(study, "runs", fresh, gone=rows)
        return records

    @cached_property
    def problems(self) -> list[str]:
        """Return what is wrong with the files of runs, a sentence each."""

        def find() -> str:
            return json.dumps([record.problem for record in self.records if record.problem])

        found: list[str] = json.loads(self.remembered("problems", find))
        return found

    def remembered(self, name: str, make: Callable[[], str], of: str = "", *, runs: bool = True) -> str:
        """Return what `make()` returned when it was last called under this name for the same `of` and, with
        `runs`, the same files of runs: with these two it says all that it depends on."""
        known = self.recall(name, of, runs=runs)
        if known is None:
            known = make()
            self.remember(name, known, of, runs=runs)
        return known

    def recall(self, name: str, of: str = "", *, runs: bool = True) -> str | None:
        """Return a fact; None where it was never told, or of something else."""
        key, value = self.facts.get(name, NOTHING)
        return value if key and key == self._key(of, runs=runs) else None

    def remember(self, name: str, value: str, of: str = "", *, runs: bool = True) -> None:
        """Keep a fact for those who look later, in the place of the last one of this name."""
        if self.used and (key := self._key(of, runs=runs)):
            self.facts[name] = key, value
            _write(self.study, "facts", [(name, key, value)])

    def _key(self, of: str, *, runs: bool) -> bytes:
        if not runs:
            return of.encode()
        return f"{of} {self.state}".encode() if self.state else b""


def look(study: Study) -> Index:
    """Return what is known of a study's runs."""
    return Index(study)


@contextmanager
def _folder(path: Path) -> Iterator[int]:
    """Yield a folder to look up names in, which is quicker than looking up whole paths."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _stamp(runs: int, run_id: str) -> Stamp | None:
    """Say which spec, result and attempts a run has now; None where its spec cannot be looked at."""
    parts, newest = [], 0.0
    for name in MADE_OF:
        try:
            about = os.stat(f"{run_id}/{name}", dir_fd=runs)
        except FileNotFoundError:
            if name == MADE_OF[0]:
                return None
            parts.append(b"-")
        except OSError:
            return None
        else:
            parts.append(PACKED.pack(*stamp_of(about)))
            newest = max(newest, about.st_ctime)
    return Stamp(b"".join(parts), newest)


def _text(brief: Brief) -> str:
    return json.dumps(astuple(brief)[1:], allow_nan=False)


def _brief(run_id: str, text: str) -> Brief:
    *values, spans = json.loads(text)
    shared: list[Any] = [sys.intern(value) if isinstance(value, str) else value for value in values]
    return Brief(*[run_id, *shared, tuple(map(tuple, spans))])


def _seal(name: str, key: bytes, value: str) -> bytes:
    return blake2b(b"\0".join((name.encode(), key, value.encode())), digest_size=12).digest()


def _read(study: Study, table: str) -> dict[str, Pair]:
    """Return the rows of a table that are as they were written, by their names; none without an index that
    can be used."""

    def work(database: sqlite3.Connection) -> dict[str, Pair]:
        if _version_of(database) != VERSION:
            return {}
        rows = database.execute(f"SELECT name, key, value, seal FROM {table}").fetchall()
        return {name: (key, value) for name, key, value, seal in rows if seal == _seal(name, key, value)}

    return (_with_index(study, "rw", work) if study.index_file.exists() else None) or {}


def _write(study: Study, table: str, rows: Iterable[Row], gone: Iterable[str] = ()) -> None:
    """Put rows into a table, and take those of runs that are `gone` out, where that can be done."""

    def work(database: sqlite3.Connection) -> None:
        with database:
            database.execute("BEGIN IMMEDIATE")
            if _version_of(database) != VERSION:
                for one in TABLES:
                    database.execute(f"DROP TABLE IF EXISTS {one}")
                    database.execute(f"CREATE TABLE {one} ({COLUMNS}) WITHOUT ROWID")
                database.execute(f"PRAGMA user_version = {VERSION}")
            database.executemany(f"DELETE FROM {table} WHERE name = ?", ((name,) for name in gone))
            sealed = ((*row, _seal(*row)) for row in rows)
            database.executemany(f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?, ?)", sealed)

    if _is_ours(study):
        _with_index(study, "rwc", work)


def _version_of(database: sqlite3.Connection) -> int:
    return int(database.execute("PRAGMA user_version").fetchone()[0])


def _is_ours(study: Study) -> bool:
    """Tell whether this user may leave files in the study's folder, and it is his own."""
    with suppress(OSError):
        return os.stat(study.root).st_uid == os.geteuid() and os.access(study.root, os.W_OK | os.X_OK)
    return False


def _with_index(study: Study, mode: str, work: Callable[[sqlite3.Connection], Made]) -> Made | None:
    """Return what `work` returned; None where the index is locked or cannot be had. One that is damaged is
    removed: it is made again."""
    try:
        import sqlite3
    except ImportError:  # a Python that was built without it
        return None
    path = study.index_file
    try:
        if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
            return None
        address = f"{path.absolute().as_uri()}?mode={mode}"
        with closing(sqlite3.connect(address, uri=True, timeout=WAIT_S, isolation_level=None)) as database:
            return work(database)
    except sqlite3.DatabaseError as error:
        passing = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM}
        passing |= {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_NOMEM}
        if getattr(error, "sqlite_errorcode", 0) & 0xFF not in passing and _is_ours(study):
            with suppress(OSError):  # the journal first: it is of this very file
                path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
                path.unlink(missing_ok=True)
        return None
    except OSError:
        return None

"""Mirror a study while it runs: a thread of the driver looks for new files, and writes them to a `Place`.

Once a run has ended, its files no longer change, and all of them are mirrored. Before that, the run's
checkpoint is mirrored first, and then the files that grow. These may be longer than the checkpoint says,
since a resumed run drops the rest. A run that another worker claims during a pass waits for the next pass.

Failures never stop a study. Each is reported once, and the next pass tries again.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shlex
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypedDict

from ebc_lab.config.errors import UserError, visible
from ebc_lab.config.schema import Config
from ebc_lab.records.files import Stamp, opened, stamp, stamp_of
from ebc_lab.records.json_files import read_json, write_json
from ebc_lab.records.paths import RUNS, RunFiles

from ..store import manifest
from ..store.study import Study
from .place import Entry, File, Index, Overtaken, Place, parts, why

Say = Callable[[str], None]
Read = dict[str, tuple[Stamp, Entry]]  # path -> stamp and content of a file when it was read last

IN_MEMORY = 32 << 20  # bytes of a batch, after which it is written; a larger file is written in parts
AT_A_TIME = 200  # files in a batch
PAUSE = 10  # ratio of a pause to the pass before it
LONGEST_PAUSE_S = 60.0  # while the mirror does not answer
PATIENCE_S = 120.0  # without a write, after which `finish` no longer waits
REMEDY = "make it reachable, or leave the setting out"


class MirrorRecord(TypedDict):
    """The content of .mirror.json."""

    address: str
    writer: str  # the token under which this folder writes
    since: list[Any]  # number and writer of the index that this folder was pulled from, or 0 and ""


def place_of(config: Config, study: Study) -> Place:
    """Return a study's mirror. Raises UserError if the address is unusable or overlaps the study's folder."""
    assert config.study.mirror is not None
    try:
        place = Place(f"{config.study.mirror.rstrip('/')}/{study.name}")
    except (ImportError, ValueError, OSError) as error:
        raise UserError(f"study.mirror={config.study.mirror} cannot be used ({why(error)}).") from None
    if place.local:
        target, own = Path(place.root).resolve(), study.root.resolve()
        if target == own or own in target.parents or target in own.parents:
            raise UserError(f"study.mirror={config.study.mirror} is the study's own folder: choose another.")
    return place


def refuse_unusable(config: Config, study: Study) -> None:
    """Raise UserError if a new study cannot be mirrored. Nothing is written to the study's folder."""
    if config.study.mirror is None:
        return
    place = place_of(config, study)
    try:
        _refuse_another(place.latest(), place, None)
        place.probe(secrets.token_hex(8))
    except UserError:
        raise
    except Exception as error:
        what = f"study.mirror={config.study.mirror} cannot be written ({why(error)})"
        raise UserError(f"{what}: {REMEDY}; nothing was trained.") from None


def _refuse_another(latest: Index | None, place: Place, note: MirrorRecord | None) -> None:
    """Raise UserError if the place holds anything that this folder neither wrote nor was pulled from."""
    if latest is None:
        if note is None and place.holds_others():
            raise UserError(f"{place.address} holds files of something else: choose another study.mirror.")
        return
    if note and (latest.writer == note["writer"] or [latest.number, latest.writer] == note["since"]):
        return
    what = "has gone on elsewhere since" if note else "is mirrored there already"
    raise UserError(
        f"{place.address}: a study of this name {what}: `ebc-lab pull {shlex.quote(place.address)} FOLDER` "
        "fetches it into another output_dir, or choose another study.name or study.mirror."
    )


@contextmanager
def mirroring(config: Config, study: Study, say: Say) -> Iterator[None]:
    """Mirror a study that this process holds while the block runs, if `study.mirror` is set. At the end, wait
    until all files are mirrored, and report any that are not. Raises UserError only at the beginning."""
    if config.study.mirror is None:
        yield
        return
    mirror = _Mirror(place_of(config, study), study, config.study.mirror_every_s, say)
    mirror.begin()
    try:
        yield
    finally:
        mirror.finish()


class _Mirror:
    """The thread that mirrors a study, with what is known of the mirror's content."""

    def __init__(self, place: Place, study: Study, every_s: float, say: Say):
        self.place = place
        self.study = study
        self.every_s = every_s
        self.say = say
        self.index: Index | None = None  # the latest one, None until it is known
        self.read: dict[str, Read] = {}  # by run id, and "" for the study's own files
        self.batch: dict[File, bytes] = {}  # read, but not yet written
        self.mirrored: set[File] = set()  # written completely, whether in an index or not
        self.complete: dict[str, Stamp] = {}  # run id -> stamp of its result, once all is mirrored
        self.waiting: set[str] = set()  # files whose present version is not mirrored yet
        self.failing = False
        self.moved = 0  # number of writes, by which `finish` sees progress
        self.stop = threading.Event()
        self.over = False  # this folder is not mirrored any more
        self.thread = threading.Thread(target=self._work, daemon=True, name="mirror")

    # -- the driver's side -----------------------------------------------------------------------------------

    def begin(self) -> None:
        """Claim the place, and start the thread. Raises UserError if the place holds anything of another
        folder, or if a new mirror cannot be written."""
        try:
            self._take()
        except UserError:
            raise
        except Exception as error:
            if self._note() is None:
                what = f"study.mirror: {self.place.address} cannot be written ({why(error)})"
                raise UserError(f"{what}: {REMEDY}.") from None
            self._fail(error)
        self.thread.start()

    def finish(self) -> None:
        """Have the thread make a last pass, wait while the thread makes progress, and report the result."""
        self.stop.set()
        seen, since = -1, time.monotonic()
        while self.thread.is_alive() and time.monotonic() - since < PATIENCE_S:
            if seen != self.moved:
                seen, since = self.moved, time.monotonic()
            self.thread.join(timeout=0.2)
        if self.over:
            return
        if self.thread.is_alive() or self.waiting or self.index is None:
            some = ", ".join(sorted(self.waiting)[:3])
            count = f"{len(self.waiting)} file(s) are not mirrored ({some}{', …' * (len(self.waiting) > 3)})"
            what = count if self.waiting else "the latest files are not mirrored"
            self.say(f"warning: {what}: the same command mirrors them")
        else:
            self.say(f"mirrored: {len(self.index.files)} files, at {self.place.address}")

    # -- the thread's side -----------------------------------------------------------------------------------

    def _work(self) -> None:
        pause_s = self.every_s
        while True:
            last = self.stop.wait(pause_s)
            began = time.monotonic()
            try:
                while not self._look(whole=last) and last:
                    self._has_moved()
                if self.failing:
                    self.failing = False
                    self.say(f"{self.place.address} answers again")
                pause_s = max(self.every_s, PAUSE * (time.monotonic() - began))
            except UserError as error:
                self.over = True
                more = "" if isinstance(error, Overtaken) else f" ({error})"
                what = f"{self.place.address} is written by another folder now{more}"
                self.say(f"warning: {what}: not mirrored from here")
                return
            except Exception as error:
                self._fail(error)
                pause_s = min(max(2 * pause_s, self.every_s), max(LONGEST_PAUSE_S, self.every_s))
            if last:
                return

    def _fail(self, error: Exception) -> None:
        if not self.failing:
            self.failing = True
            what = f"{self.place.address} cannot be written ({visible(why(error))})"
            self.say(f"warning: {what}: the runs continue, and what is not there is tried again")

    def _note(self) -> MirrorRecord | None:
        try:
            note: MirrorRecord = read_json(self.study.mirror_file, MirrorRecord)
        except FileNotFoundError:
            return None
        return note if note["address"] == self.place.address else None

    def _take(self) -> Index:
        """Claim the place by writing the next index, and return this index. Raises UserError if the place
        holds anything of another folder, and whatever `Place` raises."""
        latest = self.place.latest()
        note = self._note()
        _refuse_another(latest, self.place, note)
        if note is None:
            note = {"address": self.place.address, "writer": secrets.token_hex(8), "since": [0, ""]}
            write_json(self.study.mirror_file, note)
        number, files = (latest.number, latest.files) if latest else (0, {})
        self.index = self.place.publish(self.study.name, note["writer"], number, files)
        self.mirrored = set(files.items())
        self.place.sweep(self.mirrored, number)
        return self.index

    def _look(self, *, whole: bool) -> bool:
        """Mirror what is new, and return True. If files that decide which runs count change meanwhile, write
        no index and return False. `whole`: whether to check completely mirrored runs too."""
        latest = self.index or self._take()
        self.batch, self.waiting = {}, set()
        study = self.study
        # these decide which runs are planned or valid: read before the runs, they must not change meanwhile
        decisive = [study.header_file, study.decisions_file, study.manifest_file]
        stamps = [stamp(path) for path in decisive]
        read = {"": self._read_all(kept_elsewhere(study.root, runs=False), self.read.get("", {}))}
        for run_id in study.run_ids():
            read[run_id] = self._read_run(run_id, whole=whole)
        self._flush()
        if stamps != [stamp(path) for path in decisive]:
            return False
        self.read = read
        files = {path: entry for known in read.values() for path, (_, entry) in known.items()}
        if files != latest.files:
            self.index = self.place.publish(study.name, latest.writer, latest.number, files)
            self._has_moved()
            written, self.mirrored = self.mirrored, {*files.items(), *latest.files.items()}
            with suppress(OSError):  # the next command sweeps, too
                self.place.sweep(self.mirrored, latest.number, written)
        self.waiting = set()
        return True

    def _read_run(self, run_id: str, *, whole: bool) -> Read:
        """Read a run's files, and return what the next index lists of them. If the run ends or changes hands
        meanwhile, return what the last pass returned."""
        files = self.study.run_files(run_id)
        before = self.read.get(run_id, {})
        ended, claimed = stamp(files.result), stamp(files.attempts)
        if ended is not None and ended == self.complete.get(run_id) and not whole:
            return before
        first = files.result if ended else files.checkpoint
        kept = kept_elsewhere(self.study.root, f"{RUNS}/{run_id}")
        paths = [path for path in kept if ended or os.path.basename(path) != files.result.name]
        now = self._read_all(sorted(paths, key=lambda path: os.path.basename(path) != first.name), before)
        if (stamp(files.result), stamp(files.attempts)) != (ended, claimed):
            return before
        if ended is not None and now == before:
            self.complete[run_id] = ended
        return now

    def _read_all(self, paths: Iterable[str], before: Read) -> Read:
        """Read those of these files that have changed, in this order, and return the stamps and contents of
        all, by path. Files that were removed, or are not regular files, are left out."""
        now = {}
        for path in paths:
            known = before.get(path)
            with suppress(FileNotFoundError, UserError):  # removed meanwhile, or not a regular file
                if known is None or known[0] != stamp(self.study.root / path):
                    known = self._read(path)
                now[path] = known
        return now

    def _read(self, path: str) -> tuple[Stamp, Entry]:
        """Read a file up to its present size, and return the stamp and the content. Content that the mirror
        lacks is written at once if the file is large, and otherwise added to the batch."""
        with opened(self.study.root / path) as file:
            about = os.fstat(file.fileno())
            large = about.st_size > IN_MEMORY
            content = b"" if large else file.read(about.st_size)
            sha256 = hashlib.sha256(content)
            for part in parts(file, about.st_size) if large else ():
                sha256.update(part)
            entry = Entry(sha256.hexdigest(), about.st_size if large else len(content))
            if (path, entry) not in self.mirrored:
                self.waiting.add(path)
                if large:
                    self.place.write_large(path, entry, file, self._has_moved)
                    self.mirrored.add((path, entry))
                else:
                    self.batch[path, entry] = content
        if len(self.batch) >= AT_A_TIME or sum(map(len, self.batch.values())) > IN_MEMORY:
            self._flush()
        return stamp_of(about), entry

    def _flush(self) -> None:
        """Write the batch to the mirror."""
        if self.batch:
            self.place.write(self.batch)
            self._has_moved()
            self.mirrored |= self.batch.keys()
            self.batch = {}

    def _has_moved(self) -> None:
        self.moved += 1


def kept_elsewhere(root: Path, folder: str = "", *, runs: bool = True) -> Iterator[str]:
    """Return the files that a mirror takes: those of `manifest.walk` except the runs' progress files."""
    progress = RunFiles(root).progress.name
    paths = manifest.walk(root, folder, runs=runs)
    return (path for path in paths if os.path.basename(path) != progress)

"""A study's folder: where things lie, who holds it, and what is in it already. Reading never writes."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from filelock import FileLock, Timeout

from ebc_lab.config.dicts import from_dict, to_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import STAGES, RunConfig
from ebc_lab.records.figures import RunResult
from ebc_lab.records.json_files import as_json, read_checksummed, read_json, write_json
from ebc_lab.records.locks import locked
from ebc_lab.records.paths import SpecRecord, StudyFiles

from ..stages.rules import fault
from ..stages.spec import RunSpec, describes
from . import manifest

FINISHED = ("completed", "diverged")  # outcomes that are results
RETRIED = ("lost", "cancelled")  # outcomes that say nothing about the run itself
RETRIED_UNFINISHED = (*RETRIED, "failed", "oom")  # by a study that has not come to its end


@dataclass(frozen=True)
class Record:
    """A planned run as its files tell it. `problem`: why its spec or its result cannot be believed, which is then None."""

    run_id: str
    spec: dict[str, Any] | None
    result: RunResult | None
    problem: str | None = None


class Study(StudyFiles):
    """The files of one study under `output_dir/name`."""

    goes_on = True  # a call may train in it; a bundle is only read

    @property
    def name(self) -> str:
        return self.root.name

    # -- reading -------------------------------------------------------------------------------------------------------

    def exists(self) -> bool:
        return self.header_file.exists()

    def must_exist(self) -> None:
        """Raises UserError when there is no study here."""
        if not self.exists():
            raise UserError(
                f"there is no study at {self.root}: start one with `ebc-lab autopilot study.name={self.name}`."
            )

    def header(self, *, checked: bool = True) -> dict[str, Any]:
        """study.json. Raises UserError when there is no study here, or the file was truncated or (`checked`) edited."""
        self.must_exist()
        if not checked:
            return dict(read_json(self.header_file))
        remedy = (
            "undo that (settings are changed on the command line, with --force), or delete it: the study's command writes it "
            "anew, and keeps the runs that are still the same"
        )
        return read_checksummed(self.header_file, remedy)

    def decisions(self) -> dict[str, Any]:
        """Stage -> decision, in the order of the stages; empty before the first. A call of the study makes each anew.

        Raises UserError when the file was truncated.
        """
        path = self.decisions_file
        found = read_json(path) if path.exists() else {}
        if not isinstance(found, dict):
            raise UserError(
                f"{path} was edited: delete it, and the study's command decides anew from the runs."
            )
        return found

    def true_decisions(self) -> dict[str, Any]:
        """`decisions`, for those who do not make them anew. Raises UserError when one was edited, or is another version's."""
        found = self.decisions()
        faults = {stage: why for stage, decision in found.items() if (why := fault(decision))}
        if faults:
            what = "; ".join(f"{stage}: {why}" for stage, why in faults.items())
            raise UserError(
                f"{self.root / 'auto_decisions.json'} cannot be used ({what}): give the study's command again, which decides "
                "anew from the runs."
            )
        return found

    def result(self, run_id: str) -> RunResult | None:
        """A run's result, if it has one. Raises UserError when it was truncated or edited."""
        files = self.run_files(run_id)
        try:
            remedy = f"delete {files.directory}, and the study's command trains the run again"
            return cast(RunResult, read_checksummed(files.result, remedy))
        except FileNotFoundError:
            return None

    def has_result(self, run_id: str) -> bool:
        return self.run_files(run_id).result.exists()

    def results(self, specs: Iterable[RunSpec]) -> dict[str, RunResult]:
        """The results that exist among `specs`, by run id. Raises UserError when one was edited or belongs to another run."""
        found = {}
        for spec in specs:
            result = self.result(spec.run_id)
            if result is None:
                continue
            if result.get("identity") != spec.identity_sha256:
                files = self.run_files(spec.run_id)
                raise UserError(
                    f"{files.result} was not written by this run: delete {files.directory} to train it again."
                )
            found[spec.run_id] = result
        return found

    def records(self) -> list[Record]:
        """Every planned run, each file read once; what is wrong with one is said in it, not raised."""
        found = []
        for run_id in self.run_ids():
            files = self.run_files(run_id)
            directory, problem = files.directory, None
            try:
                spec = json.loads(files.spec.read_bytes())
                (
                    spec["config"]["seed"],
                    spec["stage"],
                    spec["role"],
                    spec["arm"],
                    spec["kind"],
                    spec["identity"],
                )
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (ValueError, KeyError, TypeError) as error:
                spec, problem = None, f"{files.spec} is damaged ({error}): delete {directory}"
            try:
                result = self.result(run_id)
            except UserError as error:
                result, problem = None, str(error)
            if result is not None and spec is not None and result.get("run_id", run_id) != run_id:
                result, problem = (
                    None,
                    f"{files.result} is another run's: delete {directory} to train it again.",
                )
            found.append(Record(run_id, spec, result, problem))
        return found

    def read_spec(self, run_id: str) -> tuple[str, RunConfig]:
        """(kind, configuration) of a planned run. Raises UserError when spec.json does not match the run's name."""
        path = self.run_files(run_id).spec
        spec = read_json(path)
        run: RunConfig = from_dict(RunConfig, spec["config"])
        if not describes(spec["kind"], run, run_id):
            raise UserError(f"{path} does not describe {run_id}: delete the folder, and it is planned again.")
        return spec["kind"], run

    def progress(self, run_id: str) -> dict[str, Any] | None:
        path = self.run_files(run_id).progress
        try:
            return dict(read_json(path))
        except (OSError, UserError):  # none, or being replaced; on NFS also stale for a moment
            return None

    def holder(self) -> dict[str, Any] | None:
        """Who drives the study now, or None. A look at the lock, which takes and writes nothing."""
        if not locked(self.driver_lock):
            return None
        try:
            return dict(read_json(self.driver_file))
        except (OSError, UserError):
            return {}

    # -- writing -------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make the folder and prove that it can be written. Raises UserError."""
        try:
            self.runs.mkdir(parents=True, exist_ok=True)
            probe = self.root / f".probe.{os.getpid()}"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"{self.root} cannot be written ({error.strerror}): choose another output_dir."
            ) from None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Be the only driver of this study. Raises UserError, naming the holder, when somebody else is."""
        lock = FileLock(self.driver_lock, fallback_to_soft=False)
        try:
            lock.acquire(timeout=2)  # a reader's look may hold it for a moment
        except Timeout:
            who = self.holder() or {}
            raise UserError(
                f"study {self.name} is being run by process {who.get('pid', '?')} on {who.get('host', '?')} since "
                f"{who.get('since', '?')}: wait for it, or stop it."
            ) from None
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        try:
            write_json(self.driver_file, {"pid": os.getpid(), "host": socket.gethostname(), "since": since})
            yield
        except OSError as error:
            error.filename = error.filename or str(
                self.root
            )  # a full disk says no name where it strikes in mid-file
            raise
        finally:
            self.driver_file.unlink(missing_ok=True)
            lock.release()

    def write_spec(self, spec: RunSpec) -> None:
        """Make a run's folder and spec.json, once."""
        files = self.run_files(spec.run_id)
        files.directory.mkdir(parents=True, exist_ok=True)
        if files.spec.exists():
            return
        record: SpecRecord = {
            "run_id": spec.run_id,
            "kind": spec.kind,
            "stage": spec.stage,
            "role": spec.role,
            "arm": spec.arm,
            "lr_scale": spec.lr_scale,
            "identity": spec.identity,
            "config": to_dict(spec.run),
        }
        write_json(files.spec, record)

    def write_decision(self, stage: str, decision: Mapping[str, Any]) -> bool:
        """Record a decision. Another one than before takes with it what was built on the old one. -> whether there was one."""
        known = self.decisions()
        before = known.get(stage)
        if before is not None and before == as_json(decision):
            return False
        if before is not None:
            self.drop_conclusions()
        kept = {s: known[s] for s in STAGES[: STAGES.index(stage)] if s in known}
        manifest.strike(self.root, self.decisions_file.name)
        write_json(self.decisions_file, {**kept, stage: decision})
        return before is not None

    def drop_conclusions(self) -> None:
        """Remove decisions, verdict, tables and plots: they are made again from the runs, which stay."""
        manifest.strike(self.root, *self.conclusions())
        for pattern in (*self.conclusions(), self.plotted_file.name):
            for path in self.root.glob(pattern):
                path.unlink()

    def forget(self, outcomes: Iterable[str], stages: Iterable[str]) -> list[str]:
        """Remove the results with one of `outcomes` among the runs of `stages`, so that they are made again. -> their ids."""
        asked, meant = set(outcomes), set(stages)
        gone = [
            r.run_id
            for r in self.records()
            if r.result is not None
            and r.result["outcome"] in asked
            and r.spec is not None
            and r.spec["stage"] in meant
        ]
        manifest.strike(self.root, runs=gone)
        for run_id in gone:
            self.run_files(run_id).result.unlink()
        return gone


class Cancelled(Exception):
    """Somebody asked for an end with `ebc-lab cancel`."""

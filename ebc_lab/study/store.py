"""A study's folder: where things lie, who holds it, and what is in it already. Reading never writes."""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..config import STAGES, RunConfig, UserError, digest, from_dict, to_dict
from ..telemetry import read_json, write_json
from .signature import RunSpec, identity_of

FINISHED = ("completed", "diverged")  # outcomes that are results
CONCLUSIONS = (
    "auto_decisions.json",
    "acceptance.json",
    "results_final.json",
    "summary_*.csv",
    "ablation.csv",
    "*.png",
    "manifest.json",
    ".plotted",
)
RETRIED = ("lost", "cancelled")  # outcomes that say nothing about the run itself


class Study:
    """The files of one study under `output_dir/name`."""

    def __init__(self, root: Path):
        self.root = root
        self.runs = root / "runs"

    @property
    def name(self) -> str:
        return self.root.name

    # -- reading -------------------------------------------------------------------------------------------------------

    def exists(self) -> bool:
        return (self.root / "study.json").exists()

    def header(self) -> dict[str, Any]:
        """study.json. Raises UserError when there is no study here."""
        if not self.exists():
            raise UserError(f"there is no study at {self.root}: start one with `ebc-lab autopilot study.name={self.name}`.")
        return dict(read_json(self.root / "study.json"))

    def decisions(self) -> dict[str, Any]:
        """Stage -> decision, in the order of the stages; empty before the first."""
        path = self.root / "auto_decisions.json"
        return dict(read_json(path)) if path.exists() else {}

    def run_dir(self, run_id: str) -> Path:
        return self.runs / run_id

    def result(self, run_id: str) -> dict[str, Any] | None:
        path = self.run_dir(run_id) / "result.json"
        return dict(read_json(path)) if path.exists() else None

    def results(self, specs: Iterable[RunSpec]) -> dict[str, dict[str, Any]]:
        """The results that exist among `specs`, by run id. Raises UserError when one belongs to another run."""
        found = {}
        for spec in specs:
            result = self.result(spec.run_id)
            if result is None:
                continue
            if result.get("identity") != digest(spec.identity):
                path = self.run_dir(spec.run_id)
                raise UserError(f"{path / 'result.json'} was not written by this run: delete {path} to train it again.")
            found[spec.run_id] = result
        return found

    def read_spec(self, run_id: str) -> tuple[str, RunConfig]:
        """(kind, configuration) of a planned run. Raises UserError when spec.json does not match the run's name."""
        path = self.run_dir(run_id) / "spec.json"
        spec = read_json(path)
        run: RunConfig = from_dict(RunConfig, spec["config"])
        if not run_id.endswith(digest(identity_of(spec["kind"], run))[:10]):
            raise UserError(f"{path} does not describe {run_id}: delete the folder, and it is planned again.")
        return spec["kind"], run

    def progress(self, run_id: str) -> dict[str, Any] | None:
        path = self.run_dir(run_id) / "progress.json"
        try:
            return dict(read_json(path))
        except (FileNotFoundError, UserError):
            return None

    def holder(self) -> dict[str, Any] | None:
        """Who drives the study now, or None. A look at the lock, which takes and writes nothing."""
        try:
            with open(self.root / ".lock", "rb") as f:
                fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return None
        except OSError:
            who = self.root / ".driver.json"
            return dict(read_json(who)) if who.exists() else {}
        return None

    # -- writing -------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make the folder and prove that it can be written. Raises UserError."""
        try:
            self.runs.mkdir(parents=True, exist_ok=True)
            probe = self.root / f".probe.{os.getpid()}"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise UserError(f"{self.root} cannot be written ({error.strerror}): choose another output_dir.") from None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Be the only driver of this study. Raises UserError, naming the holder, when somebody else is."""
        lock = FileLock(self.root / ".lock")
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
            write_json(self.root / ".driver.json", {"pid": os.getpid(), "host": socket.gethostname(), "since": since})
            yield
        finally:
            (self.root / ".driver.json").unlink(missing_ok=True)
            lock.release()

    def write_spec(self, spec: RunSpec) -> None:
        """Make a run's folder and spec.json, once."""
        directory = self.run_dir(spec.run_id)
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / "spec.json").exists():
            config = to_dict(spec.run)
            about = {"run_id": spec.run_id, "kind": spec.kind, "stage": spec.stage, "role": spec.role, "arm": spec.arm}
            write_json(
                directory / "spec.json",
                {**about, "lr_scale": spec.lr_scale, "identity": spec.identity, "config": config},
            )

    def write_decision(self, stage: str, decision: dict[str, Any]) -> None:
        """Record a decision. One made from other inputs than before takes with it what was built on the old one."""
        known = self.decisions()
        before = known.get(stage)
        if before is not None and before["inputs_sha256"] == decision["inputs_sha256"]:
            return
        if before is not None:
            self.drop_conclusions()
        kept = {s: known[s] for s in STAGES[: STAGES.index(stage)] if s in known}
        write_json(self.root / "auto_decisions.json", {**kept, stage: decision})

    def drop_conclusions(self) -> None:
        """Remove decisions, verdict, tables and plots: they are made again from the runs, which stay."""
        for pattern in CONCLUSIONS:
            for path in self.root.glob(pattern):
                path.unlink()

    def forget(self, outcomes: Iterable[str], stages: Iterable[str]) -> list[str]:
        """Remove the results with one of `outcomes` among the runs of `stages`, so that they are made again. -> their ids."""
        gone = []
        for path in sorted(self.runs.glob("*/result.json")):
            spec = path.with_name("spec.json")
            stage = read_json(spec)["stage"] if spec.exists() else None
            if stage in set(stages) and read_json(path).get("outcome") in set(outcomes):
                path.unlink()
                gone.append(path.parent.name)
        return gone

    def write_manifest(self) -> None:
        """sha256 of every file of the study but the manifest itself and hidden ones."""
        hashes = {}
        for path in sorted(self.root.rglob("*")):
            hidden = any(part.startswith(".") for part in path.relative_to(self.root).parts)
            if path.is_file() and not hidden and path.name != "manifest.json":
                hashes[str(path.relative_to(self.root))] = hashlib.sha256(path.read_bytes()).hexdigest()
        write_json(self.root / "manifest.json", hashes)


def refuse_unwritable(path: Path) -> None:
    """Refuse a folder that cannot be made or written, before anything is. Raises UserError."""
    existing = next(p for p in [path, *path.resolve().parents] if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written ({existing} does not allow it): choose another output folder.")


@contextmanager
def claimed(directory: Path) -> Iterator[bool]:
    """Try to be the only one who trains in this run's folder; yields whether it worked. Freed by the kernel on death."""
    lock = FileLock(directory / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()

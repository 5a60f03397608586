"""A study on the four Slurm nodes of scripts/test_slurm.sh, what can go wrong there, and what must not."""

import contextlib
import itertools
import os
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import pandas as pd

from ebc_lab.study.store import attempts
from ebc_lab.study.store.study import Study

from .called import CLI
from .drivers import sessions, shell, until_true, without_timing

SCRIPT = Path(__file__).parents[2] / "scripts" / "test_slurm.sh"
NAMES = ("n1", "n2", "n3", "n4")
LOOK_S = 0.2  # between two looks at who is alive
CLOSED = ("end", "stopped", "lost", "cancelled")  # events after which an attempt writes no more
SLURM = [
    *("launcher=slurm", "launcher.slots=4", "launcher.partition=main", "launcher.cpus_per_task=2"),
    *("launcher.queue_every_s=1", "launcher.checkpoint_every_s=0.1", "launcher.heartbeat_s=30"),
    *("launcher.start_s=60", "launcher.max_lost=9", "dtype=float32", "threads_per_run=1", "compile=off"),
]


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def state_of(pid: int) -> str | None:
    """What a process is doing, as /proc has it: R, S, T (stopped) …; None where there is none that lives."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else state


@dataclass(frozen=True)
class At:
    """A worker on a node, and the runs that it is on."""

    node: str
    name: str
    pid: int
    runs: tuple[str, ...]


@dataclass
class Node:
    """One of the nodes: what can happen to it."""

    name: str

    def cut_off(self) -> None:
        """Its slurmd is killed: Slurm hears nothing of it any more, and its jobs go on unseen."""
        kill(int(Path(f"/run/test-slurm/slurmd-{self.name}.pid").read_text()))

    def state(self) -> str:
        return shell("sinfo", "-h", "-p", "main", "-n", self.name, "-o", "%T")

    def set(self, state: str) -> None:
        shell("scontrol", "update", f"nodename={self.name}", f"state={state}", "reason=test")

    def restore(self) -> None:
        """Have it up again, its slurmd running."""
        shell(str(SCRIPT), "node", self.name)
        with contextlib.suppress(subprocess.CalledProcessError):  # it is up as it is
            self.set("resume")
        until_true(lambda: self.state() in ("idle", "mixed", "allocated"))


@dataclass
class Witness:
    """Sees when the processes of all attempts at the runs of a study end."""

    study: Study
    died: dict[int, float] = field(default_factory=dict)
    over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Witness":
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *about: object) -> None:
        self.over.set()
        self.thread.join()
        self._look()

    def _watch(self) -> None:
        while not self.over.wait(LOOK_S):
            self._look()

    def _look(self) -> None:
        for events in logs(self.study).values():
            for event in events:
                pid = event.get("pid")
                if pid and pid not in self.died and state_of(pid) is None:
                    self.died[pid] = time.time()

    def two_at_once(self) -> list[str]:
        """Attempts that began while the one before had neither ended nor been declared lost, and its process
        was alive; and results or refusals that should not be."""
        wrong = []
        for run_id, events in logs(self.study).items():
            begins = [event for event in events if event["event"] == "begin"]
            ends = [event for event in events if event["event"] == "end"]
            if begins and (len(ends) != 1 or ends[0].get("attempt") != begins[-1].get("attempt")):
                wrong.append(f"{run_id}: ended {len(ends)} times, or not by its last attempt")
            for before, after in itertools.pairwise(begins):
                until = events.index(after)
                closed = any(
                    event["event"] in CLOSED
                    and event.get("attempt", before.get("attempt")) == before.get("attempt")
                    for event in events[events.index(before) : until]
                )
                at = datetime.fromisoformat(after["at"]).timestamp()
                if not closed and self.died.get(before["pid"], float("inf")) > at + 5 * LOOK_S:
                    wrong.append(f"{run_id}: {after['attempt']} began while {before['attempt']} went on")
        return wrong


def logs(study: Study) -> dict[str, list[dict]]:
    return {run_id: attempts.log(study.run_dir(run_id)) for run_id in study.run_ids()}


class NodesStudy:
    """A study on the nodes."""

    def __init__(self, overrides: list[str], out: Path):
        self.out = out
        self.command = [*CLI, "autopilot", *SLURM, *overrides, f"output_dir={out}", "study.name=s"]
        self.study = Study(out / "s")
        self.log = out / "driver.log"
        out.mkdir(parents=True, exist_ok=True)

    def start(self) -> subprocess.Popen:
        with open(self.log, "a", encoding="utf-8") as log:
            return subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def workers(self) -> list[At]:
        """Those that are on a run now."""
        found = []
        for session in sessions(self.study, "slurm"):
            for name, note in session.notes().items():
                if note.get("run_id") and state_of(note["pid"]) not in (None, "T"):
                    found.append(At(note["host"], name, note["pid"], (note["run_id"],)))
        return sorted(found, key=lambda at: at.node)

    def on_all(self) -> list[At] | None:
        """A worker on each node, with a checkpoint of each run."""
        found = self.workers()
        saved = all(self.study.run_files(run).checkpoint.exists() for at in found for run in at.runs)
        return found if saved and {at.node for at in found} == set(NAMES) else None

    def said(self) -> str:
        """What the workers have said."""
        logs = (log for s in sessions(self.study, "slurm") for log in s.root.glob("submitit/*_log.out"))
        return "".join(log.read_text() for log in logs)

    def events(self, run_id: str) -> list[str]:
        return [event["event"] for event in attempts.log(self.study.run_dir(run_id))]


def bytes_of(root: Path) -> dict[str, bytes]:
    """What a study has recorded, without what is a matter of time."""
    recorded = {}
    for table in sorted(root.glob("summary_*.csv")):
        recorded[table.name] = without_timing(table).encode()
    for steps in sorted(root.glob("runs/*/steps.csv")):
        if not steps.parent.name.startswith("overhead_"):
            recorded[f"{steps.parent.name}/steps"] = steps.read_bytes()
            evals = pd.read_csv(steps.with_name("evals.csv"))
            recorded[f"{steps.parent.name}/evals"] = evals.drop(columns=["train_s"]).to_csv().encode()
    return recorded

"""A study on the four Slurm nodes of scripts/test_slurm.sh, what can go wrong there, and what must not."""

import contextlib
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from ebc_lab.study.store import attempts
from ebc_lab.study.store.study import Study

from .called import CLI
from .drivers import sessions, shell, until_true, without_timing

SCRIPT = Path(__file__).parents[2] / "scripts" / "test_slurm.sh"
NAMES = ("n1", "n2", "n3", "n4")
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


class At(NamedTuple):
    """A worker on a node, and the run that it is on."""

    node: str
    pid: int
    run_id: str


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
        notes = [note for session in sessions(self.study, "slurm") for note in session.notes().values()]
        found = (At(n["host"], n["pid"], n["run_id"]) for n in notes if n.get("run_id"))
        return sorted(at for at in found if state_of(at.pid))

    def on_all(self) -> list[At] | None:
        """A worker on each node, with a checkpoint of its run."""
        found = self.workers()
        saved = all(self.study.run_files(at.run_id).checkpoint.exists() for at in found)
        return found if saved and {at.node for at in found} == set(NAMES) else None

    def said(self) -> str:
        """What the workers have said."""
        logs = (log for s in sessions(self.study, "slurm") for log in s.root.glob("submitit/*_log.out"))
        return "".join(log.read_text() for log in logs)

    def begun(self) -> int:
        """How many runs have begun."""
        return sum("begin" in self.events(run_id) for run_id in self.study.run_ids())

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

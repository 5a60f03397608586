"""One run whose processes are spread over the nodes of a Slurm job: torchrun on each of them.

The first node has the worker. It says in a file where its torchrun waits for the others (`invite`), and each
other node starts its own, which joins (`serve`). Ranks go by node, so the first node has rank 0, and what is
said to that and by it goes through the pipes of `apart.py`. Which nodes they are changes no number.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from ebc_lab.records.json_files import try_read, write_json

POLL_S = 0.5  # between two looks at the file, which lies on a file server
PATIENCE_S = 60.0  # for Slurm's answer
CHILD = "ebc_lab.training.child"
# for the worker, which says what is to be done; torchrun would end a run's processes without a checkpoint
NOT_FOR_TORCHRUN = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


class Invitation(TypedDict):
    """What the file holds."""

    id: str  # another one for each torchrun
    attempt: str  # of Slurm at the job
    address: str  # of the first node
    port: int
    nodes: int
    processes: int  # on each of them
    over: bool  # nothing more will come


@dataclass(frozen=True)
class Nodes:
    """How many nodes train a run together, and the file that the others read."""

    count: int
    file: Path


def attempt() -> str:
    """Return which start of its Slurm job this is: a file of an earlier one means nothing."""
    return os.environ.get("SLURM_RESTART_COUNT", "0")


def invite(nodes: Nodes, processes: int) -> list[str]:
    """Invite the other nodes to train with so many processes in all. -> torchrun's arguments here"""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    invitation = Invitation(
        id=uuid.uuid4().hex,
        attempt=attempt(),
        address=_address(),
        port=port,
        nodes=nodes.count,
        processes=processes // nodes.count,
        over=False,
    )
    write_json(nodes.file, invitation, durable=False)
    return _torchrun(invitation, 0)


def dismiss(file: Path) -> None:
    """Tell the other nodes that nothing more will come."""
    last = Invitation(id="", attempt=attempt(), address="", port=0, nodes=0, processes=0, over=True)
    write_json(file, last, durable=False)


def serve(file: Path, node: int, env: dict[str, str]) -> None:
    """Join whatever the first node invites this one to, as its `node`-th, until it is dismissed."""
    joined: str | None = None
    process: subprocess.Popen[bytes] | None = None
    while True:
        invitation = _invitation(file)
        if invitation is not None and invitation["id"] != joined:
            if process is not None:
                process.kill()  # its ranks notice, and end
                process.wait()
            if invitation["over"]:
                return
            joined = invitation["id"]
            passive = {"OMP_WAIT_POLICY": "passive", **env}
            process = started(_torchrun(invitation, node), env=passive, stdin=subprocess.DEVNULL)
        time.sleep(POLL_S)


def started(arguments: Sequence[str], **how: Any) -> subprocess.Popen[bytes]:
    """Start torchrun so that no signal to all processes of a job ends it: it inherits what is blocked."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_TORCHRUN)
    try:
        return subprocess.Popen([sys.executable, *arguments, "-m", CHILD], **how)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _invitation(file: Path) -> Invitation | None:
    invitation: Invitation | None = try_read(file, Invitation)
    return invitation if invitation and invitation["attempt"] == attempt() else None


def _torchrun(invitation: Invitation, node: int) -> list[str]:
    return [
        *("-m", "torch.distributed.run", f"--nnodes={invitation['nodes']}", f"--node-rank={node}"),
        f"--nproc-per-node={invitation['processes']}",
        *(f"--master-addr={invitation['address']}", f"--master-port={invitation['port']}"),
    ]


def _address() -> str:
    """Return how the other nodes reach this one: as Slurm itself does."""
    name = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
    with suppress(OSError, subprocess.SubprocessError):
        command = ["scontrol", "show", "node", name, "--oneliner"]
        shown = subprocess.check_output(command, text=True, errors="replace", timeout=PATIENCE_S)
        if found := re.search(r"\bNodeAddr=(\S+)", shown):
            return found[1]
    return name

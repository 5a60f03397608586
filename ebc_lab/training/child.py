"""The process that `apart.py` starts: it trains the runs that it is told to, a line of JSON each, and says in
such lines how far they are and how they end. A signal is for the process that started it, which passes it on.

Where several train a run together, the first of them is told, and tells the others.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ebc_lab.config.dicts import from_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import RunConfig
from ebc_lab.records import fence
from ebc_lab.records.fence import Superseded

from .apart import DEVICE, DONE, FAILED, INTERRUPTED, REFUSED, SUPERSEDED, UNWRITABLE
from .ends import DeviceFailed, Interrupted
from .outcome import cause_of, is_device_failure, outcome_of, run_and_record
from .ranks import Ranks, count_here, joined, lost_another
from .run import Training

IGNORED = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Child:
    """The runs that this process is told to train, one after another."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
        os.dup2(2, 1)  # what a library prints is no answer
        self.stop = threading.Event()
        self.training = False
        self.asked: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        if ranks.first:
            threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin:
            asked = json.loads(line)
            if "stop" in asked:
                self.stop.set()
            else:
                self.stop.clear()
                self.training = True
                self.asked.put(asked)
        if self.training or self.ranks.count == 1:
            # the process that started this one is gone: another may train the run at once
            os._exit(int(self.ranks.count > 1))
        self.asked.put(None)

    def say(self, **what: Any) -> None:
        self.answers.write(json.dumps(what) + "\n")

    def work(self) -> None:
        """Train what is asked for until nothing more can be."""
        while (asked := self._next()) is not None:
            end, why = self._trained(asked)
            if self.ranks.first:
                self.training = False
                self.say(end=end, why=why)
            elif end not in (DONE, INTERRUPTED):
                # the process that hears it ends them all; on another node than the first nobody hears it
                self.say(rank=self.ranks.rank, end=end, why=why)
                if os.environ.get("GROUP_RANK", "0") != "0":
                    os._exit(1)

    def _next(self) -> dict[str, Any] | None:
        """Wait for what is asked next, which the first of several processes passes on; None: no more."""
        asked = [self.asked.get() if self.ranks.first else None]
        if self.ranks.count > 1:
            dist.broadcast_object_list(asked, 0)
        return asked[0]

    def _require_gpus(self, run: RunConfig) -> None:
        """Refuse to have two processes of a run on one GPU. Raises UserError, and DeviceFailed where CUDA
        shows fewer GPUs than this worker was given."""
        count, shown = count_here(self.ranks.count), torch.cuda.device_count()
        if run.device != "cuda" or shown >= count:
            return
        given = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if len(given) >= count:
            raise DeviceFailed(f"CUDA shows {shown} of the {len(given)} GPUs of this worker")
        raise UserError(
            f"launcher.processes_per_run={self.ranks.count} takes a GPU for each process, and CUDA shows "
            f"{shown} to this worker: give it as many, or choose fewer processes."
        )

    def _trained(self, asked: dict[str, Any]) -> tuple[str, Any]:
        """Train a run to its result, or take part in one that the first process records -> how that ended,
        and why."""
        try:
            run = from_dict(RunConfig, asked["run"])
            self._require_gpus(run)
            return self._recorded(run, asked) if self.ranks.first else self._followed(run, asked)
        except Interrupted:
            return INTERRUPTED, None
        except Superseded:
            return SUPERSEDED, None
        except UserError as error:
            return REFUSED, str(error)
        except DeviceFailed as error:
            return DEVICE, str(error)
        except OSError as error:
            return UNWRITABLE, [error.errno, error.strerror, error.filename]

    def _recorded(self, run: RunConfig, asked: dict[str, Any]) -> tuple[str, Any]:
        directory = Path(asked["directory"])
        with fence.within(directory, asked["attempt"]) if asked["attempt"] else nullcontext():
            result = run_and_record(
                run,
                directory,
                asked["run_id"],
                checkpoint_every_s=asked["checkpoint_every_s"],
                corpus_warning=asked["corpus_warning"],
                should_stop=self.stop.is_set,
                on_progress=lambda step: self.say(step=step),
                say=lambda text: self.say(say=text),
                ranks=self.ranks,
            )
        return DONE, result["outcome"]

    def _followed(self, run: RunConfig, asked: dict[str, Any]) -> tuple[str, Any]:
        try:
            Training(run, Path(asked["directory"]), ranks=self.ranks).run()
        except (Interrupted, UserError):
            raise
        except Exception as error:
            if lost_another(error):
                os._exit(1)
            return FAILED, outcome_of(error)
        return DONE, None


def _joined() -> Ranks:
    """`joined`; where the GPU of this process fails on the way, that is said, and it ends."""
    try:
        return joined()
    except RuntimeError as error:
        if not is_device_failure(error):
            raise
        traceback.print_exc()
        said = {"rank": int(os.environ["RANK"]), "end": DEVICE, "why": cause_of(error)}
        print(json.dumps(said), flush=True)
        os._exit(1)


if __name__ == "__main__":
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    ranks = _joined()
    if ranks.count == 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Child(ranks).work()
    dist.destroy_process_group()
    os._exit(0)  # without waiting for the threads that listen, which would abort the interpreter

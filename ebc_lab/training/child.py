"""The process that `apart.py` starts: it trains the runs that it is told to, a line of JSON each, and says in
such lines how far they are and how they end. A signal is for the process that started it, which passes it on.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from ebc_lab.config.dicts import from_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import RunConfig

from .apart import DEVICE, DONE, INTERRUPTED, REFUSED, UNWRITABLE
from .outcome import run_and_record
from .turns import DeviceFailed, Interrupted

IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Child:
    """The runs that this process is told to train, one after another."""

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
        os.dup2(2, 1)  # what a library prints is no answer
        self.stop = threading.Event()
        self.asked: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin:
            asked = json.loads(line)
            if "stop" in asked:
                self.stop.set()
            else:
                self.stop.clear()
                self.asked.put(asked)
        os._exit(0)  # the process that started this one is gone: another may train the run at once

    def say(self, **what: Any) -> None:
        self.answers.write(json.dumps(what) + "\n")

    def work(self) -> None:
        while True:
            asked = self.asked.get()
            end, why = self._trained(asked)
            self.say(end=end, why=why)

    def _trained(self, asked: dict[str, Any]) -> tuple[str, Any]:
        """Train a run to its result -> how it ended, and why."""
        try:
            run_and_record(
                from_dict(RunConfig, asked["run"]),
                Path(asked["directory"]),
                asked["run_id"],
                checkpoint_every_s=asked["checkpoint_every_s"],
                should_stop=self.stop.is_set,
                on_progress=lambda step: self.say(step=step),
                say=lambda text: self.say(say=text),
            )
        except Interrupted:
            return INTERRUPTED, None
        except UserError as error:
            return REFUSED, str(error)
        except DeviceFailed as error:
            return DEVICE, str(error)
        except OSError as error:
            return UNWRITABLE, [error.errno, error.strerror, error.filename]
        return DONE, None


if __name__ == "__main__":
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    Child().work()

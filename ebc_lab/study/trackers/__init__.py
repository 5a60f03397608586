"""The driver's side of trackers: start their processes, print their messages, and kill any that hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

from ebc_lab.config.schema import TrackerConfig

from .backends import FOLDER, MLFLOW_ENV


@contextmanager
def following(config: TrackerConfig, root: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Have trackers follow the study or run in `root` while the block runs. At the end of the block, wait
    until the trackers have shown everything, for at most `config.wait_s` seconds."""
    followers = [_Follower(name, config, root, say) for name in config.names]
    try:
        yield
    finally:
        for follower in followers:
            if follower.process and follower.process.stdin:
                with suppress(OSError):
                    follower.process.stdin.close()  # the process then shows the rest, and ends
    deadline = time.monotonic() + config.wait_s
    for follower in followers:
        follower.finish(deadline)


class _Follower:
    """The process of one tracker, as the driver sees it."""

    def __init__(self, name: str, config: TrackerConfig, root: Path, say: Callable[[str], None]):
        self.name = name
        self.config = config
        self.say = say
        self.warned = False
        self.process: subprocess.Popen[str] | None = None
        self.log = root.resolve() / FOLDER / f"{name}.log"
        self.reader = threading.Thread(target=self._listen, daemon=True)
        folder = Path(config.folder).expanduser().resolve() if config.folder else self.log.parent
        here = replace(config, folder=str(folder), mlflow_uri=absolute(config.mlflow_uri))
        about = {"name": name, "root": str(root.resolve()), "config": asdict(here)}
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with open(self.log, "a", encoding="utf-8") as log:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "ebc_lab.study.trackers.process"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env={**MLFLOW_ENV, **os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
                    start_new_session=True,  # Ctrl-C is for the driver
                )
            assert self.process.stdin is not None
            # not as an argument: `ps` would show the store's address, and the password in it
            self.process.stdin.write(json.dumps(about) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the process has ended already: `finish` says with which exit code
        except OSError as error:
            self.warn(f"cannot be started ({error.strerror})")
        if self.process is not None:
            self.reader.start()

    def _listen(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        with suppress(ValueError, OSError):
            for line in self.process.stdout:
                kind, _, what = line.strip().partition(": ")
                if kind == "warning":
                    self.warn(what)
                elif kind == "note":
                    self.say(f"tracker {self.name}: {what}")

    def warn(self, what: str) -> None:
        """Print this tracker's first warning, and ignore all later ones."""
        if not self.warned:
            self.warned = True
            self.say(f"warning: tracker {self.name}: {what}; the runs continue without it")

    def finish(self, deadline: float) -> None:
        """Wait until `deadline` (on the monotonic clock) for the process to end, then kill it."""
        if self.process is None:
            return
        try:
            code = self.process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            late = f"not done {self.config.wait_s:g} s (tracker.wait_s) after the last run"
            self.warn(f"{late}, and stopped: the same command shows the rest")
            return
        self.reader.join(timeout=1.0)
        if code:
            self.warn(f"ended with exit code {code}, see {self.log}")


def absolute(uri: str | None) -> str | None:
    """Return a store's address with a relative path made absolute, for a process in another folder."""
    for scheme in ("sqlite:///", "file:"):
        if uri and uri.startswith(scheme) and not uri.removeprefix(scheme).startswith("/"):
            return scheme + str(Path(uri.removeprefix(scheme)).resolve())
    return uri

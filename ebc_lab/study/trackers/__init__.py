"""Trackers as the driver sees them: started, watched, and left behind when they hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ebc_lab.config.schema import TrackerConfig

from .backends import PLACE, QUIET

# -- the driver's side -----------------------------------------------------------------------------


@contextmanager
def following(config: TrackerConfig, root: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Have the trackers follow the study, or the single run, in `root` meanwhile. Never raises by itself."""
    followers = [_Follower(name, config, root, say) for name in config.names]
    try:
        yield
    except BaseException:
        for follower in followers:
            follower.dismiss()  # it ends by itself, in its own time
        raise
    deadline = time.monotonic() + config.wait_s
    for follower in followers:
        follower.dismiss()
    for follower in followers:
        follower.finish(deadline)


class _Follower:
    """One tracker's process, as its driver sees it."""

    def __init__(self, name: str, config: TrackerConfig, root: Path, say: Callable[[str], None]):
        self.name, self.config, self.say = name, config, say
        self.said = False
        self.process: subprocess.Popen[str] | None = None
        root = root.resolve()
        folder = Path(config.folder).expanduser().resolve() if config.folder else root / PLACE
        self.log = root / PLACE / f"{name}.log"
        about = {"name": name, "root": str(root), "folder": str(folder), "uri": absolute(config.mlflow_uri)}
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with open(self.log, "a") as log:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "ebc_lab.study.trackers.process"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env={**QUIET, **os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
                    start_new_session=True,  # Ctrl-C is the driver's
                )
            assert self.process.stdin is not None
            self.process.stdin.write(
                json.dumps({**about, "wait_s": config.wait_s}) + "\n"
            )  # an address is nothing for `ps`
            self.process.stdin.flush()
        except OSError as error:
            self.warn(f"cannot be started ({error.strerror})")
        if self.process is None:
            return
        self.reader = threading.Thread(target=self._listen, daemon=True)
        self.reader.start()

    def _listen(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        with suppress(ValueError, OSError):
            for line in self.process.stdout:
                if line.startswith("warning: "):
                    self.warn(line.removeprefix("warning: ").strip())

    def warn(self, what: str) -> None:
        """Say it, if it is the first complaint."""
        if not self.said:
            self.said = True
            self.say(f"warning: tracker {self.name}: {what}; the runs go on without it")

    def dismiss(self) -> None:
        if self.process and self.process.stdin:
            with suppress(OSError):
                self.process.stdin.close()

    def finish(self, deadline: float) -> None:
        if self.process is None:
            return
        try:
            code = self.process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.warn(
                f"not done {self.config.wait_s:g} s (tracker.wait_s) after the last run, and stopped: the same command again "
                "lets it carry on"
            )
            return
        self.reader.join(timeout=1.0)
        if code:
            self.warn(f"ended with exit code {code}, see {self.log}")


def absolute(uri: str | None) -> str | None:
    """A store's address that means the same in any working directory."""
    for lead in ("sqlite:///", "file:"):
        if uri and uri.startswith(lead) and not uri.removeprefix(lead).startswith("/"):
            return lead + str(Path(uri.removeprefix(lead)).resolve())
    return uri

"""Signs of life: for how long a worker, or the process that holds a run, has shown none."""

from __future__ import annotations

import time
from typing import Any

from ebc_lab.config.schema import LauncherConfig
from ebc_lab.records.fence import attempt_at
from ebc_lab.records.locks import is_locked, take_run_lock_away
from ebc_lab.records.paths import RunFiles

from ..store import attempts
from ..store.study import Study


class Signs:
    """The last sign of life of each of several things, and since when it has been the same, on this process's
    own clock, which cannot jump."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[Any, float]] = {}  # what it is of -> the sign, and when it was first seen

    def unchanged_s(self, key: str, sign: Any) -> float:
        """Note the sign that is seen now, and return for how many seconds it has been the same."""
        now = time.monotonic()
        if key not in self.known or self.known[key][0] != sign:
            self.known[key] = sign, now
        return now - self.known[key][1]

    def forget(self, key: str) -> None:
        """Drop what is known of one thing, so that its next sign counts as its first."""
        self.known.pop(key, None)


def release_if_silent(study: Study, run_id: str, launcher: LauncherConfig, signs: Signs) -> str | None:
    """Take the lock of a run away from a process that has shown no sign of life for `heartbeat_s`, or
    `start_s` while it has taken no step; another may claim the run then, and the first can write no more.

    Returns why, in words; None where the run is left as it is. `signs`: those of the runs seen so far.
    """
    directory = study.run_dir(run_id)
    if not is_locked(RunFiles(directory).lock):
        signs.forget(run_id)
        return None
    attempt = attempt_at(directory)
    progress = study.progress(run_id) or {}
    patience_s = launcher.heartbeat_s
    if not progress.get("step"):
        patience_s = max(patience_s, launcher.start_s)
    if signs.unchanged_s(run_id, (attempt, progress)) <= patience_s:
        return None
    begun = attempts.last_begin(directory)
    who = f"process {begun.get('pid', '?')} on {begun.get('host', '?')}"
    why = f"no sign of life for {patience_s:g} s of {who}, which holds it: it is given to another"
    attempts.note(directory, "lost", attempt=attempt, cause=why)
    take_run_lock_away(directory)
    signs.forget(run_id)
    return why

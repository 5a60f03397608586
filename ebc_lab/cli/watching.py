"""`ebc-lab watch` of several studies: a line each, until none of them is running any more."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from ebc_lab.config.errors import UserError, clock, visible
from ebc_lab.report.text.words import plural, tracks_in_words
from ebc_lab.study.inspect.status import status
from ebc_lab.study.launch.pool import PAUSE
from ebc_lab.study.store.study import Study

from .options import live
from .screen import LINE_EVERY_S, STATE_STYLE, plain_table

LOOK_S = 2.0  # between two looks at a study, and PAUSE times what a look takes
UNREADABLE = "unreadable"
EXIT_CODES = {"finished": 0, "finished_with_failures": 4}  # 3: it stopped undecided, or cannot be read


class Watched:
    """A study, and what was last seen and said of it."""

    def __init__(self, study: Study):
        self.study = study
        self.state = ""
        self.stage = ""
        self.progress = ""
        self.printed: tuple[str, str] = ("", "")
        self.printed_at = 0.0

    @property
    def running(self) -> bool:
        return self.state == "running"

    def look(self) -> None:
        """Read what the study is at; one that has ended is read again once a command holds it."""
        try:
            if self.state and not self.running and self.study.holder() is None:
                return
            now = status(self.study)
        except (UserError, OSError) as error:
            self.state, self.stage, self.progress = UNREADABLE, "", visible(str(error))
            return
        self.state = "running" if now["queue"] else now["state"]
        self.stage = next((s["stage"] for s in now["stages"] if s["state"] in ("open", "stale")), "")
        self.progress = _progress(now)

    def news(self) -> str | None:
        """Return its line where its state or stage has changed, or where the last one was a minute ago."""
        seen = self.state, self.stage
        due = self.running and time.monotonic() - self.printed_at >= LINE_EVERY_S
        if seen == self.printed and not due:
            return None
        self.printed, self.printed_at = seen, time.monotonic()
        parts = (f"{self.study.name}: {self.state.replace('_', ' ')}", self.stage, self.progress)
        return ", ".join(part for part in parts if part)


def _progress(now: dict[str, Any]) -> str:
    """Return how far a study is, or what came of it, in a line."""
    outcomes = [count for stage in now["stages"] for count in stage["outcomes"].items()]
    runs = f"{plural(sum(n for outcome, n in outcomes if outcome != 'open'), 'run')} done"
    failed = sum(len(failure["runs"]) for failure in now["failures"])
    parts = [runs, *([f"{failed} failed ({now['failures'][0]['cause']})"] if failed else [])]
    if now["state"] == "running" and now["eta_s"]:
        parts.append(f"{clock(now['eta_s'])} left")
    if now["state"].startswith("finished"):
        parts += map(tracks_in_words, now["stages"][-1]["decided"][:1])
    elif now["so_far"]:
        parts.append(tracks_in_words(now["so_far"]["line"]))
    return visible("; ".join(parts))


def watch_all(studies: Sequence[Study], console: Console) -> int:
    """Show the studies until none is running. -> exit code: the highest of what their commands would give."""
    watched = [Watched(study) for study in studies]
    with live(console, auto_refresh=False) as display:
        while True:
            began = time.monotonic()
            for one in watched:
                one.look()
                if display is None and (line := one.news()) is not None:
                    console.print(Text(line), soft_wrap=True)
            if display is not None:
                display.update(_table(watched), refresh=True)
            if not any(one.running for one in watched):
                break
            time.sleep(max(LOOK_S, PAUSE * (time.monotonic() - began)))
    return max(EXIT_CODES.get(one.state, 3) for one in watched)


def _table(watched: Sequence[Watched]) -> Any:
    table = plain_table("study", "state", "stage", "~")
    for one in watched:
        state = Text(one.state.replace("_", " "), style=STATE_STYLE.get(one.state, ""))
        table.add_row(one.study.name, state, one.stage, one.progress)
    return table

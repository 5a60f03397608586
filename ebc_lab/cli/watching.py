"""`ebc-lab watch` of several studies: a line each, until none of them is running any more."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

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
EXIT_CODES = {"finished": 0, "finished_with_failures": 4}  # 3: it stopped undecided, or cannot be read


class Look(NamedTuple):
    """What is seen of a study: its state, the stage that it is at, and how far it is or what came of it."""

    state: str
    stage: str
    progress: str


def look_at(study: Study, before: Look | None) -> Look:
    """Look at a study; one that has ended is read again once a command holds it."""
    try:
        if before and before.state != "running" and study.holder() is None:
            return before
        now = status(study)
    except (UserError, OSError) as error:
        return Look("unreadable", "", visible(str(error)))
    stage = next((s["stage"] for s in now["stages"] if s["state"] in ("open", "stale")), "")
    return Look("running" if now["queue"] else now["state"], stage, _progress(now))


def _progress(now: dict[str, Any]) -> str:
    outcomes = [count for stage in now["stages"] for count in stage["outcomes"].items()]
    parts = [f"{plural(sum(n for outcome, n in outcomes if outcome != 'open'), 'run')} done"]
    if failed := sum(len(failure["runs"]) for failure in now["failures"]):
        parts.append(f"{failed} failed ({now['failures'][0]['cause']})")
    if now["state"] == "running" and now["eta_s"]:
        parts.append(f"{clock(now['eta_s'])} left")
    if now["state"].startswith("finished"):
        parts += map(tracks_in_words, now["stages"][-1]["decided"][:1])
    elif now["so_far"]:
        parts.append(tracks_in_words(now["so_far"]["line"]))
    return visible("; ".join(parts))


def watch_all(studies: Sequence[Study], console: Console) -> int:
    """Show the studies until none is running. -> exit code: the highest of what their commands would give.

    Off a terminal a study's line is printed where its state or stage has changed, and once a minute.
    """
    looks: list[Look | None] = [None] * len(studies)
    printed_at = [0.0] * len(studies)
    with live(console, auto_refresh=False) as display:
        while True:
            began = time.monotonic()
            for i, study in enumerate(studies):
                before, now = looks[i], look_at(study, looks[i])
                looks[i] = now
                changed = before is None or before[:2] != now[:2]
                due = now.state == "running" and time.monotonic() - printed_at[i] >= LINE_EVERY_S
                if display is None and (changed or due):
                    printed_at[i] = time.monotonic()
                    parts = (f"{study.name}: {now.state.replace('_', ' ')}", now.stage, now.progress)
                    console.print(Text(", ".join(filter(None, parts))), soft_wrap=True)
            seen = [look for look in looks if look is not None]
            if display is not None:
                display.update(_table(studies, seen), refresh=True)
            if not any(look.state == "running" for look in seen):
                break
            time.sleep(max(LOOK_S, PAUSE * (time.monotonic() - began)))
    return max(EXIT_CODES.get(look.state, 3) for look in seen)


def _table(studies: Sequence[Study], looks: Sequence[Look]) -> Any:
    table = plain_table("study", "state", "stage", "~")
    for study, look in zip(studies, looks, strict=True):
        state = Text(look.state.replace("_", " "), style=STATE_STYLE.get(look.state, ""))
        table.add_row(study.name, state, look.stage, look.progress)
    return table

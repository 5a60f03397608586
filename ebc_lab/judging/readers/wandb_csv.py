"""What the site of Weights & Biases exports as CSV: a chart, with columns a run, or the table of runs."""

from __future__ import annotations

import re
from pathlib import Path

from ebc_lab.config.errors import UserError, any_of, require, shown

from ..asked import Asked
from .delimited import ENDING, first_rows, long_table, read_table
from .names import ARM_NAMES, split_names
from .reader import Source

SPREAD = re.compile(r"(.*)__(MIN|MAX)", re.DOTALL)
# columns that the table of runs has whatever was logged, besides Name
OF_TABLE = {"State", "Notes", "User", "Tags", "Created", "Runtime", "Sweep", "ID"}
UNFINISHED = ("running", "crashed", "failed", "killed")


TITLE = "W&B's CSV exports"


def claims(path: Path) -> bool:
    if not path.is_file() or not ENDING.search(path.name):
        return False
    try:
        header = first_rows(path)[0][0]
    except UserError:  # the reader of CSV files says what is wrong
        return False
    return _is_chart(header) or ("Name" in header and len(OF_TABLE & set(header)) >= 2)


def read(path: Path, asked: Asked) -> Source:
    header = first_rows(path)[0][0]
    return _chart(path, asked) if _is_chart(header) else _table(path)


def _is_chart(header: list[str]) -> bool:
    """Return whether all columns but the first are called `RUN - METRIC`, or that with `__MIN` or `__MAX`."""
    return len(header) > 1 and " - " not in header[0] and all(" - " in name for name in header[1:])


def _chart(path: Path, asked: Asked) -> Source:
    """Return a chart's runs. A point is the mean of a bin where its least and greatest value differ."""
    frame, notes = read_table(path)
    step = str(frame.columns[0])
    runs: dict[str, dict[str, str]] = {}  # run -> metric -> column
    binned = 0
    for column in frame.columns[1:]:
        if not SPREAD.fullmatch(column):
            run, _, metric = column.rpartition(" - ")
            runs.setdefault(run, {})[metric] = column
            if {f"{column}__MIN", f"{column}__MAX"} <= set(frame):
                binned += int((frame[f"{column}__MIN"] < frame[f"{column}__MAX"]).sum())
    metrics = list(dict.fromkeys(metric for columns in runs.values() for metric in columns))
    drawn = [metric for metric in metrics if metric != "_step" or step == "_step"]
    require(
        not asked.loss or asked.loss in metrics or asked.loss == step,
        f"{path} is a chart of {any_of(drawn or metrics)}: it has no {shown(asked.loss)}",
    )
    if binned:
        notes.append(
            f"{path.name}: {binned:,} points are means of several values (their __MIN and __MAX differ): W&B "
            "drew bins or groups of runs, and not what was logged; export single runs, or their history."
        )
    long = long_table(frame, step, list(runs.items()))
    roles = {"run": "run", "arm": "arm", "step": step} | ({"seed": "seed"} if "seed" in long else {})
    if asked.loss or len(drawn) == 1:  # among several their names decide
        roles["loss"] = asked.loss or drawn[0]
    known = {step, *roles.values(), *metrics}
    settings = [name for name in map(str, long) if name not in known]
    return Source(
        long, f"W&B chart of {any_of(drawn or metrics)} with {len(runs)} runs", roles, settings, notes=notes
    )


def _table(path: Path) -> Source:
    """Return the table of runs. Runs of one name are told apart by a number behind it."""
    frame, notes = read_table(path)
    names = frame["Name"].astype(str)
    again = names.groupby(names).cumcount()
    if (again > 0).any():
        notes.append(
            f"{path.name}: runs of one name get a number behind it, such as {names[again > 0].iloc[0]} (2)."
        )
    frame["Name"] = names.where(again == 0, names + " (" + (again + 1).astype(str) + ")")
    roles = {"run": "Name"} | ({"started": "Created"} if "Created" in frame else {})
    if "State" in frame and (ended_badly := int(frame["State"].isin(UNFINISHED).sum())):
        notes.append(f"{path.name}: {ended_badly} runs are crashed, failed, killed or running, and are kept.")
    lower = {str(name).lower() for name in frame}
    split = split_names(list(names))
    if "seed" not in lower and all("seed" in settings for _, settings in split):
        frame["seed"] = [settings["seed"] for _, settings in split]
        roles["seed"] = "seed"
        if not lower & ARM_NAMES and all(arm for arm, _ in split):
            frame["arm"] = [arm for arm, _ in split]
            roles["arm"] = "arm"
    return Source(frame, f"W&B table of {len(frame)} runs", roles=roles, notes=notes)

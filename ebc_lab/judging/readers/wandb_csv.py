"""What the site of Weights & Biases exports as CSV: a chart, with columns a run, or the table of runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ebc_lab.config.errors import UserError, any_of, require, shown

from ..asked import Asked
from .delimited import ENDING, first_rows, logged, read_table
from .names import split_names
from .reader import Reader, Source

if TYPE_CHECKING:
    pass

SPREAD = re.compile(r"(.*)__(MIN|MAX)", re.DOTALL)
# columns that the table of runs has whatever was logged, besides Name
OF_TABLE = {"State", "Notes", "User", "Tags", "Created", "Runtime", "Sweep", "ID"}


class WandbCsv(Reader):
    """CSV files exported from a chart or from the table of runs."""

    title = "W&B's CSV exports"

    def claims(self, path: Path) -> bool:
        if not path.is_file() or not ENDING.search(path.name):
            return False
        try:
            header = first_rows(path)[0][0]
        except UserError:  # the reader of CSV files says what is wrong
            return False
        return _is_chart(header) or ("Name" in header and len(OF_TABLE & set(header)) >= 2)

    def read(self, path: Path, asked: Asked) -> Source:
        header = first_rows(path)[0][0]
        return _chart(path, asked) if _is_chart(header) else _table(path)


READER = WandbCsv()


def _is_chart(header: list[str]) -> bool:
    """Return whether all columns but the first are called `RUN - METRIC`, or that with `__MIN` or `__MAX`."""
    return len(header) > 1 and " - " not in header[0] and all(" - " in name for name in header[1:])


def _chart(path: Path, asked: Asked) -> Source:
    """Return a chart's runs. A point is the mean of a bin where its least and greatest value differ."""
    import numpy as np
    import pandas as pd

    frame, notes = read_table(path)
    frame = logged(frame)
    step = str(frame.columns[0])
    values: dict[str, dict[str, str]] = {}  # run -> metric -> column
    for column in frame.columns[1:]:
        if not SPREAD.fullmatch(column):
            run, _, metric = column.rpartition(" - ")
            values.setdefault(run, {})[metric] = column
    metrics = list(dict.fromkeys(metric for columns in values.values() for metric in columns))
    drawn = [metric for metric in metrics if metric != "_step" or step == "_step"]
    require(
        not asked.loss or asked.loss in metrics or asked.loss == step,
        f"{path} is a chart of {any_of(drawn or metrics)}: it has no {shown(asked.loss)}",
    )
    parts, names = [], list(values)
    for run, columns in values.items():
        part = pd.DataFrame(
            {step: frame[step], **{metric: frame[column] for metric, column in columns.items()}}
        )
        kept = part[list(set(columns) - {"_step"}) or list(columns)].notna().any(axis=1)
        parts.append(part[kept].assign(run=run))
    long = pd.concat(parts, ignore_index=True)
    split = dict(zip(names, split_names(names), strict=True))
    long["arm"] = long["run"].map({run: arm or "all runs" for run, (arm, _) in split.items()})
    for key in dict.fromkeys(key for _, told in split.values() for key in told if key != "run"):
        long[key] = long["run"].map({run: told.get(key) for run, (_, told) in split.items()})
    binned = 0
    for columns in values.values():
        for column in columns.values():
            if f"{column}__MIN" in frame and f"{column}__MAX" in frame:
                binned += int(np.sum((frame[f"{column}__MIN"] < frame[f"{column}__MAX"]).to_numpy()))
    if binned:
        notes.append(
            f"{path.name}: {binned:,} points are means of several values (their __MIN and __MAX differ): W&B "
            "drew bins or groups of runs, and not what was logged; export single runs, or their history."
        )
    return Source(
        long,
        f"W&B chart of {any_of(drawn or metrics)} with {len(values)} runs",
        roles={"run": "run", "arm": "arm", "step": step} | _seed(split) | _loss(drawn, asked),
        settings=[key for key in map(str, long) if key not in {step, "run", "arm", "seed", *metrics}],
        notes=notes,
    )


def _table(path: Path) -> Source:
    """Return the table of runs. Runs of one name are told apart by a number behind it."""
    frame, notes = read_table(path)
    frame = logged(frame)
    names = frame["Name"].astype(str)
    again = names.groupby(names).cumcount()
    if (again > 0).any():
        notes.append(
            f"{path.name}: runs of one name get a number behind it, such as {names[again > 0].iloc[0]} (2)."
        )
    frame["Name"] = names.where(again == 0, names + " (" + (again + 1).astype(str) + ")")
    roles = {"run": "Name"} | ({"started": "Created"} if "Created" in frame else {})
    unfinished = (
        int(frame["State"].isin(["running", "crashed", "failed", "killed"]).sum()) if "State" in frame else 0
    )
    if unfinished:
        notes.append(f"{path.name}: {unfinished} runs are crashed, failed, killed or running, and are kept.")
    lower = {str(name).lower() for name in frame}
    split = dict(zip(names, split_names(list(names)), strict=True))
    if "seed" not in lower and all("seed" in told for _, told in split.values()):
        frame["seed"] = [split[name][1]["seed"] for name in names]
        roles["seed"] = "seed"
        if not lower & {"arm", "optimizer", "method", "group"} and all(arm for arm, _ in split.values()):
            frame["arm"] = [split[name][0] for name in names]
            roles["arm"] = "arm"
    return Source(frame, f"W&B table of {len(frame)} runs", roles=roles, notes=notes)


def _seed(split: Mapping[str, tuple[str, Mapping[str, str]]]) -> dict[str, str]:
    return {"seed": "seed"} if any("seed" in told for _, told in split.values()) else {}


def _loss(metrics: list[str], asked: Asked) -> dict[str, str]:
    """Return the role of a chart's only metric; among several the caller or their names decide."""
    if asked.loss:
        return {"loss": asked.loss}
    return {"loss": metrics[0]} if len(metrics) == 1 else {}

"""The table at the end of `ebc-lab train -m`: a row for each run of the sweep, from the results on disk."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

from ebc_lab.config.compose import hydra_words
from ebc_lab.config.errors import UserError, clock, shown
from ebc_lab.config.schema import RunConfig
from ebc_lab.records.figures import FINISHED
from ebc_lab.records.json_files import read_checksummed
from ebc_lab.records.paths import RunFiles
from ebc_lab.report.text.words import NOTHING, fixed, format_share

from .screen import plain_table

ESCAPED = re.compile(r"\\([\\()\[\]{}:=, \t])")  # as Hydra writes the values of a sweep


@dataclass(frozen=True)
class Job:
    """A run of a sweep: its number, its value of each key that varies, its folder and its result, if any."""

    number: int
    values: Mapping[str, str]
    run: RunConfig
    directory: Path | None
    result: Mapping[str, Any]

    @property
    def with_ebc(self) -> bool:
        return self.run.stabilizer.name == "ebc"

    @property
    def never_clipped(self) -> bool:
        return self.with_ebc and self.result.get("clip_rate") == 0


def jobs(combinations: Sequence[Sequence[str]], runs: Sequence[RunConfig], folder: Path) -> list[Job]:
    """Return the runs of a sweep in a folder, with their results. `combinations`: the overrides of each."""
    from omegaconf import OmegaConf

    records = sorted(folder.glob("**/.hydra/overrides.yaml"))  # in each job's own folder
    where = {tuple(OmegaConf.load(record)): record.parent.parent for record in records}
    first = combinations[0]
    varying = [i for i, value in enumerate(first) if any(c[i] != value for c in combinations)]
    made = []
    for number, (overrides, run) in enumerate(zip(combinations, runs, strict=True)):
        directory = where.get(tuple(hydra_words(overrides)[1]))
        values = {}
        for i in varying:
            key, _, value = overrides[i].partition("=")
            values[key.lstrip("+")] = shown(ESCAPED.sub(r"\1", value))
        made.append(Job(number, values, run, directory, result_of(directory)))
    return made


def result_of(directory: Path | None) -> dict[str, Any]:
    """result.json of a run, empty where there is none that can be read."""
    if directory is not None:
        with suppress(FileNotFoundError, UserError):
            return read_checksummed(RunFiles(directory).result, "")
    return {}


def show(console: Console, table_jobs: Sequence[Job], folder: Path) -> None:
    """Print the table of a sweep, its lowest validation loss marked; none of one run, or without a result."""
    if len(table_jobs) < 2 or not any(job.result for job in table_jobs):
        return
    keys = list(table_jobs[0].values)
    ebc = any(job.with_ebc for job in table_jobs)
    budget = (">c", ">KL/δ*") if ebc else ()
    table = plain_table("job", *(f"~{_short(key, keys)}" for key in keys), ">val loss", *budget, ">time", "~")
    losses = [job.result["val_loss"] for job in table_jobs if job.result.get("val_loss") is not None]
    best = next((job for job in table_jobs if losses and job.result.get("val_loss") == min(losses)), None)
    for job in table_jobs:
        table.add_row(*_cells(job, ebc, job is best), style="bold" if job is best else "")
    console.print(Text(f"\n{len(table_jobs)} runs in {folder}", style="bold"))
    console.print(table)
    if any(job.never_clipped for job in table_jobs):
        console.print(Text("c = 1: the budget never limited an update", style="dim"))


def _short(key: str, keys: Sequence[str]) -> str:
    """The last part of a key, or all of it where another ends alike."""
    tail = key.rpartition(".")[2]
    return tail if sum(other.rpartition(".")[2] == tail for other in keys) == 1 else key


def _cells(job: Job, ebc: bool, best: bool) -> list[RenderableType]:
    result = job.result
    took = clock(result["wall_s"]) if "wall_s" in result else NOTHING
    cells: list[RenderableType] = [str(job.number), *job.values.values(), fixed(result.get("val_loss"), 4)]
    if ebc:
        c = "1" if job.never_clipped else format_share(result.get("c_median"))
        cells += [c if job.with_ebc else NOTHING, fixed(result.get("kl_ratio_median"), 2)]
    return [*cells, took, _ended(job, best)]


def _ended(job: Job, best: bool) -> Text:
    outcome = job.result.get("outcome")
    if outcome is None:
        return Text("not finished" if job.directory else "not begun", style="yellow")
    if outcome == "completed":
        return Text("completed, best" if best else "completed", style="green")
    return Text(f"{outcome}: {job.result.get('cause')}", style="yellow" if outcome in FINISHED else "red")

"""Energy-based models on a screen: the evaluations of a run that trains, and the tables of `ebc-lab ebm`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import RenderableType
from rich.text import Text

from ebc_lab.config.errors import visible
from ebc_lab.config.schema import RunConfig
from ebc_lab.ebm.diagnose import COMPARED, COMPARED_WITH, Diagnosis, alert_in_words, number
from ebc_lab.ebm.evaluate import TREND_OVER
from ebc_lab.records.paths import RunFiles
from ebc_lab.report.text.words import NOTHING, fixed, percent
from ebc_lab.workloads.text import checked_text, tokenised_of

from .options import console as made_console
from .screen import plain_table

Row = Mapping[str, float]  # of a stream, by column; NaN where empty
PARTS = {  # column of steps.csv -> its name among the parts of the loss
    "loss_total": "total",
    "loss": "ce",
    "loss_mle": "mle",
    "loss_dsm": "dsm",
    "loss_noised": "noised",
    "balance": "balance",
    "router_z": "z",
}
LEVEL = re.compile(r"r2_(\d+(?:p\d+)?)")
LOAD = re.compile(r"load_\d+")
BATCH_COLUMNS = {  # of diagnose --batch: figure -> the words over its column
    "val_loss": ">val loss",
    "energy": ">energy",
    "state_spread": ">spread",
    "splat_coverage": ">coverage",
    "kappa_median": ">κ",
    "soc_rate": ">soc_rate",
}
EVALUATIONS = 10  # of the live table
ALERTS = 5  # the latest ones


class Evaluations:
    """The evaluations of a run in its folder, each once it is flushed, for the view of the run."""

    def __init__(self, run: RunConfig, files: RunFiles):
        self.files = files
        self.run = run
        self.characters = 1.0  # a token, of the validation split
        if run.tokens.name != "characters":
            corpus, _ = checked_text(run, quiet=True)
            self.characters = tokenised_of(run, corpus).characters_per_token()["val"]
        self.steps = CsvTail(files.steps)
        self.evals = CsvTail(files.evals)
        self.previous: Row | None = None  # of evals.csv
        self.seen: list[Evaluation] = []
        self.alerts: list[dict[str, Any]] = []

    def read(self, step: int) -> list[str]:
        """Read what has been flushed at this step. -> a line for an evaluation at it, and for its alerts."""
        lines = []
        for row in self.evals.rows():
            if row["step"] == step:
                begun = self.previous["step"] if self.previous else 0.0
                since = [r for r in self.steps.rows() if begun <= r["step"] < step]
                self.seen.append(Evaluation(row, since, self.previous, self.characters))
                self.alerts = alerts_in(self.files.alerts)
                lines.append(in_a_line(self.seen[-1], self.run.steps))
                lines += [alert_in_words(alert) for alert in self.alerts if alert["step"] == step]
            self.previous = row  # another step's is an earlier attempt's
        return lines

    def drawn(self) -> list[RenderableType]:
        """Draw the latest evaluation in full, and those before it as rows."""
        if not self.seen:
            return []
        latest = self.seen[-1]
        parts: list[RenderableType] = [_table(self.seen[-EVALUATIONS:])]
        parts.append(Text(f"loss parts  {_parts(latest)}"))
        if latest.scores:
            table = plain_table("R² at, radians", *(f">{_radians(level)}" for level in latest.scores))
            table.add_row("found", *(short(r2) for r2, _ in latest.scores.values()))
            table.add_row("matched", *(short(matched) for _, matched in latest.scores.values()))
            parts.append(table)
        if latest.loads:
            parts.append(Text(f"experts     {', '.join(map(percent, latest.loads))}"))
        return [*parts, *(Text(alert_in_words(a), style="yellow") for a in self.alerts[-ALERTS:])]


# -- what is read --------------------------------------------------------------------------------------------


class CsvTail:
    """The rows that a growing CSV has since they were last asked for; one that was replaced begins anew."""

    def __init__(self, path: Path):
        self.path = path
        self.file = -1  # its inode
        self.read = 0  # bytes
        self.columns: Sequence[str] = ()

    def grown(self) -> bool:
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return False
        if status.st_ino != self.file:  # written anew for another attempt
            self.file, self.read = status.st_ino, 0
        return status.st_size > self.read

    def rows(self) -> list[Row]:
        if not self.grown():
            return []
        with open(self.path, "rb") as file:
            file.seek(self.read)
            whole, end, _ = file.read().rpartition(b"\n")
        lines = whole.decode().split("\n") if end else []
        if not self.read and lines:
            self.columns = lines.pop(0).split(",")
        self.read += len(whole) + len(end)
        rows: list[Row] = []
        for line in lines:
            values = [float(cell) if cell else math.nan for cell in line.split(",")]
            rows.append(dict(zip(self.columns, values, strict=True)))
        return rows


def alerts_in(path: Path) -> list[dict[str, Any]]:
    """Read the alerts of a run so far, one for each cause."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []


class Evaluation:
    """A row of evals.csv with what the steps since the evaluation before it recorded."""

    def __init__(self, row: Row, since: Sequence[Row], previous: Row | None, characters: float):
        self.row = row
        steps, seconds = (row[k] - (previous[k] if previous else 0.0) for k in ("step", "train_s"))
        self.rate = steps / seconds if seconds > 0 else math.nan
        self.bits = row["val_loss"] / math.log(2) / characters
        self.parts = {name: _mean(since, column) for column, name in PARTS.items()}
        columns = filter(LOAD.fullmatch, since[-1] if since else ())
        self.loads = [_mean(since, column) for column in columns]
        self.soc_rate = row.get("soc_rate", math.nan)
        levels = [match[1] for column in row if (match := LEVEL.fullmatch(column))]
        self.scores = {level: (row[f"r2_{level}"], row.get(f"matched_{level}", math.nan)) for level in levels}

    def figure(self, name: str) -> float:
        return self.row.get(name, math.nan)


def _mean(rows: Sequence[Row], column: str) -> float:
    values = [row[column] for row in rows if math.isfinite(row.get(column, math.nan))]
    return sum(values) / len(values) if values else math.nan


# -- how it is shown -----------------------------------------------------------------------------------------


def short(value: float) -> str:
    """Write a number in three significant digits."""
    return f"{value:.3g}".replace("-", "−") if math.isfinite(value) else NOTHING


def in_a_line(e: Evaluation, steps: int) -> str:
    """Write an evaluation in a line, where no table can be drawn again, without what was not measured."""
    words = [
        f"step {e.row['step']:.0f}/{steps}",
        f"{fixed(e.rate, 1)} steps/s",
        f"val {fixed(e.figure('val_loss'))} ({fixed(e.bits, 3)} bits/char)",
        f"loss {_parts(e)}",
    ]
    if math.isfinite(e.figure("energy")):
        words.append(f"energy {short(e.figure('energy'))} nats")
    if e.scores:
        pairs = (
            f"{_radians(level)}: {short(r2)}/{short(matched)}" for level, (r2, matched) in e.scores.items()
        )
        words.append(f"R²/matched {', '.join(pairs)}")
        words.append(f"κ {short(e.figure('kappa_median'))}")
        shares = percent(e.figure("splat_coverage")), percent(e.figure("state_coverage"))
        words.append(f"coverage {shares[0]} of splats, {shares[1]} of states")
    if math.isfinite(e.soc_rate):
        words.append(f"soc_rate {short(e.soc_rate)}")
    if e.loads:
        words.append(f"experts {', '.join(map(percent, e.loads))}")
    return "  ".join(words)


def _parts(e: Evaluation) -> str:
    return ", ".join(f"{name} {short(value)}" for name, value in e.parts.items() if math.isfinite(value))


def _radians(level: str) -> str:
    return level.replace("p", ".")


def _table(evaluations: Sequence[Evaluation]) -> RenderableType:
    titles = ("step", "steps/s", "val loss", "bits/char", "energy", "κ", "splats won", "covered", "soc_rate")
    table = plain_table(*(f">{title}" for title in titles))
    for e in evaluations:
        speed_and_loss = (fixed(e.rate, 1), fixed(e.figure("val_loss")), fixed(e.bits, 3))
        splats = (short(e.figure("energy")), short(e.figure("kappa_median")))
        shares = (percent(e.figure("splat_coverage")), percent(e.figure("state_coverage")))
        table.add_row(f"{e.row['step']:.0f}", *speed_and_loss, *splats, *shares, short(e.soc_rate))
    return table


# -- one model, or all in a folder ---------------------------------------------------------------------------


def show_diagnosis(path: Path, diagnosis: Diagnosis) -> None:
    """Print each figure of a model beside its threshold, and what its avalanches show."""
    figures = diagnosis.figures
    step = number(figures.get("step", math.nan))
    typer.echo(visible(f"{path}: " + (f"step {step}" if figures else "no evaluation in it")))
    table = plain_table("figure", ">value", ">threshold", "verdict", "~recommendation")
    for finding in diagnosis.findings:
        shown = (number(finding.figure), number(finding.threshold))
        table.add_row(finding.cause, *shown, finding.verdict, finding.recommendation or "–")
    made_console().print(table)
    if any(finding.cause in COMPARED for finding in diagnosis.findings):
        typer.echo(COMPARED_WITH)
    if "energy" in diagnosis.trends:
        spread = number(figures.get("state_spread", math.nan))
        trend = diagnosis.trends["energy"]
        typer.echo(f"energy trend: {trend}; state spread {spread}, 0 where states collapse")
    typer.echo(f"avalanches: {diagnosis.criticality}")


def show_batch(
    folder: Path, rows: Sequence[Mapping[str, Any]], trends: Mapping[str, Mapping[str, str]]
) -> None:
    """Print a row for each model of a folder, and the trends of each run."""

    def name_of(path: str) -> str:
        return visible(str(Path(path).relative_to(folder)))

    table = plain_table("model", ">step", *BATCH_COLUMNS.values(), "~alerts")
    for row in rows:
        if "problem" in row:
            cells, last = ["–"] * (1 + len(BATCH_COLUMNS)), row["problem"]
        else:
            cells = [number(row.get(name, math.nan)) for name in ("step", *BATCH_COLUMNS)]
            last = ", ".join(row["alerts"]) or "none"
        table.add_row(name_of(row["model"]), *cells, last)
    screen = made_console()
    screen.print(table)
    typer.echo(f"\ntrends of each run over its last {TREND_OVER} evaluations:")
    table = plain_table("~run", *(heading.lstrip(">") for heading in BATCH_COLUMNS.values()))
    for run, words in trends.items():
        table.add_row(name_of(run), *(words.get(name, "–") for name in BATCH_COLUMNS))
    screen.print(table)


def show_measured(measured: Mapping[str, Any]) -> None:
    """Print the losses of a split beside the baselines, then coverage and the score at each noise level."""

    def nats(name: str, loss: float, more: str = "") -> None:
        bits = loss / measured["characters_per_token"] / math.log(2)
        table.add_row(name, f"{loss:.4f}", f"{math.exp(loss):.2f}", f"{bits:.3f}", more)

    sampled = measured["sampled_loss"]
    some = f"on {sampled['tokens']} tokens"
    screen = made_console()
    place = f"{measured['split']}, {measured['tokens']:,} tokens"
    typer.echo(visible(f"{measured['model']}, step {measured['step']}: {place}"))
    table = plain_table("", ">nats/token", ">perplexity", ">bits/character", "~")
    nats("loss", measured["loss"], f"± {measured['loss_se']:.4f}")
    if sampled["sampled"] is None:
        table.add_row("sampled loss", "–", "–", "–", sampled["problem"])
    else:
        nats("sampled loss", sampled["sampled"], f"an upper bound, {sampled['samples']} samples {some}")
        nats("settled", sampled["settled"], f"{some}, without chance")
    for name, loss in measured["baselines"].items():
        nats(name, loss, "counted on the training split")
    screen.print(table)
    if not measured["levels"]:
        typer.echo("no splats: no energy, no score")
        return
    spread = measured["state_spread"]
    typer.echo(f"\nenergy {measured['energy']:.3f} nats from the uniform law's; state spread {spread:.3f}")
    won = f"{measured['splat_coverage']:.0%} of the splats won lately, {measured['winners']:.0%} win here"
    typer.echo(f"coverage: {won}; {measured['state_coverage']:.0%} of the states lie within their splat")
    table = plain_table(">σ, radians", ">R²", ">s.e.", ">matched")
    for level in measured["levels"]:
        table.add_row(f"{level['sigma']:g}", *(f"{level[kind]:.4f}" for kind in ("r2", "r2_se", "matched")))
    screen.print(table)

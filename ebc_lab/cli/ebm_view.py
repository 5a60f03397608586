"""Energy-based models on a screen: the evaluations of a run that trains, and the tables of `ebc-lab ebm`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any

import typer

from ebc_lab.config.errors import visible
from ebc_lab.config.schema import RunConfig
from ebc_lab.ebm.diagnose import COMPARED, COMPARED_WITH, Diagnosis, alert_in_words, levels_of, number
from ebc_lab.ebm.evaluate import TREND_OVER
from ebc_lab.records.paths import RunFiles
from ebc_lab.records.streams import NewRows
from ebc_lab.report.text.words import brief, fixed, percent
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
BATCH_COLUMNS = {  # of diagnose --batch: figure -> the words over its column
    "val_loss": ">val loss",
    "energy": ">energy",
    "state_spread": ">spread",
    "splat_coverage": ">coverage",
    "kappa_median": ">κ",
    "soc_rate": ">soc_rate",
}


class Evaluations:
    """The evaluations of a run in its folder, each once it is flushed, for the view of the run."""

    def __init__(self, run: RunConfig, files: RunFiles):
        self.files = files
        self.run = run
        self.characters = 1.0  # a token, of the validation split
        if run.tokens.name != "characters":
            corpus, _ = checked_text(run, quiet=True)
            self.characters = tokenised_of(run, corpus).characters_per_token()["val"]
        self.steps = NewRows(files.steps)
        self.evals = NewRows(files.evals)
        self.previous: Row = {"step": 0.0, "train_s": 0.0}  # of evals.csv

    def read(self, step: int) -> list[str]:
        """Read what has been flushed at this step. -> a line for an evaluation at it, and for its alerts."""
        lines = []
        for row in self.evals.read():
            if row["step"] == step:
                since = [r for r in self.steps.read() if self.previous["step"] <= r["step"] < step]
                lines.append("  ".join([f"step {step}/{self.run.steps}", *self._figures(row, since)]))
                with suppress(FileNotFoundError):  # while nothing is wrong
                    written = self.files.alerts.read_text(encoding="utf-8")
                    alerts = [json.loads(line) for line in written.splitlines()]
                    lines += [alert_in_words(alert) for alert in alerts if alert["step"] == step]
            self.previous = row  # another step's is an earlier attempt's
        return lines

    def _figures(self, row: Row, since: Sequence[Row]) -> Iterator[str]:
        """Write what an evaluation and the steps since the one before it measured."""
        steps, seconds = (row[k] - self.previous[k] for k in ("step", "train_s"))
        yield f"steps/s {fixed(steps / seconds if seconds > 0 else math.nan, 1)}"
        yield f"val loss {fixed(row['val_loss'])}"
        yield f"bits/char {fixed(row['val_loss'] / math.log(2) / self.characters, 3)}"
        for column, (name, write) in COLUMNS.items():
            if math.isfinite(row.get(column, math.nan)):
                yield f"{name} {write(row[column])}"
        parts = [f"{name} {brief(mean)}" for name, mean in _means(since, PARTS).items()]
        loads = {column: column for column in (since[-1] if since else ()) if column.startswith("load_")}
        details = {
            "loss parts": parts,
            "R²/matched at radians": _scores(row),
            "experts": map(percent, _means(since, loads).values()),
        }
        for name, values in details.items():
            if text := ", ".join(values):
                yield f"{name} {text}"


def _means(rows: Sequence[Row], columns: Mapping[str, str]) -> dict[str, float]:
    """The mean of each column over its finite values in these rows, by the column's name in `columns`."""
    means = {}
    for column, name in columns.items():
        values = [row[column] for row in rows if math.isfinite(row.get(column, math.nan))]
        if values:
            means[name] = fmean(values)
    return means


def _scores(row: Row) -> Iterator[str]:
    """`0.05: 0.12/0.15`: at each noise level R², and what it is where the score is matched exactly."""
    for level in levels_of(row):
        figures = (brief(row.get(f"{kind}_{level}")) for kind in ("r2", "matched"))
        yield f"{level.replace('p', '.')}: {'/'.join(figures)}"


COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {  # of evals.csv -> name, and how to write it
    "energy": ("energy", brief),
    "kappa_median": ("κ", brief),
    "splat_coverage": ("splats won", percent),
    "state_coverage": ("covered", percent),
    "soc_rate": ("soc_rate", brief),
}


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

"""`judge`: an answer from runs that somebody else trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Json, console, optional, print_json

MOST_ROWS = 40  # of a table on the terminal
if TYPE_CHECKING:
    from ebc_lab.judging.record import Record

FLAGS: dict[str, str] = {
    "arm": "names the arm: optimizer, method …",
    "seed": "holds the seed, which pairs runs where all arms have the same.",
    "lr": "holds the learning rate.",
    "step": "counts steps, epochs or tokens.",
    "loss": "is judged.",
    "run": "tells runs apart where arm and seed do not.",
    "planned": "holds the length that a run was to have.",
    "choose": "chooses an arm's configuration, where another one judges it.",
}


def column(name: str) -> Any:
    return optional(f"--{name}", metavar="COLUMN", help=f"Column that {FLAGS[name]}", rich_help_panel="Columns")


def judge(
    paths: Annotated[
        list[Path],
        typer.Argument(help="Files or folders: CSV, Parquet, JSON lines, W&B, MLflow, TensorBoard …"),
    ],
    arm: Annotated[str, column("arm")] = "",
    seed: Annotated[str, column("seed")] = "",
    lr: Annotated[str, column("lr")] = "",
    step: Annotated[str, column("step")] = "",
    loss: Annotated[str, column("loss")] = "",
    run: Annotated[str, column("run")] = "",
    planned: Annotated[str, column("planned")] = "",
    choose: Annotated[str, column("choose")] = "",
    setting: Annotated[
        list[str] | None,
        optional(
            "--setting", metavar="COLUMN", help="A setting that is tuned; repeatable.", rich_help_panel="Columns"
        ),
    ] = None,
    pattern: Annotated[
        str,
        optional(
            "--pattern",
            metavar="REGEX",
            help=r"Of text logs, a row a matching line: 'step:(?P<step>\d+) loss:(?P<loss>\S+)'.",
            rich_help_panel="Columns",
        ),
    ] = "",
    reference: Annotated[str, optional("--reference", help="The arm that the others are compared with.")] = "",
    better: Annotated[str, optional("--better", metavar="lower|higher", help="Which loss is better.")] = "",
    outcome: Annotated[
        str,
        typer.Option(
            "--outcome",
            metavar="last|target|best",
            help="What of a curve: its last value, the steps to --target, its best value.",
        ),
    ] = "last",
    target: Annotated[
        float | None, optional("--target", help="A loss; steps to it are reported and compared.")
    ] = None,
    at: Annotated[
        list[str] | None,
        optional("--at", metavar="[ARM=]STEP", help="Judge an arm, or all, at this step; repeatable."),
    ] = None,
    pairs: Annotated[bool, typer.Option("--pairs", help="Compare all pairs of arms.")] = False,
    paired: Annotated[
        bool | None,
        optional("--paired/--unpaired", help="Whether seeds pair runs; by themselves if all arms have the same."),
    ] = None,
    margin: Annotated[float, typer.Option("--margin", help="So much worse still counts as level.")] = 0.0,
    sigma: Annotated[
        str,
        optional("--sigma", metavar="pooled|NUMBER", help="Of a run, assumed for arms that have one run."),
    ] = "",
    exchange: Annotated[
        str, optional("--exchange", metavar="LOSS/STEPS", help="What steps are worth: 0.0045/100.")
    ] = "",
    rule: Annotated[str, optional("--rule", metavar="track3", help="Another benchmark's rule, beside.")] = "",
    output: Annotated[
        Path | None, optional("--output", "-o", help="Folder for page, tables and pictures; ./judgement.")
    ] = None,
    no_page: Annotated[bool, typer.Option("--no-page", help="Answer on the terminal only.")] = False,
    as_json: Json = False,
) -> None:
    """Judge runs that you have already, of any trainer: which arm is better, and is it sure?"""
    from ebc_lab.judging.asked import exchange_of, steps_at
    from ebc_lab.judging.judgement import judge as judged

    judgement = judged(
        paths,
        arm=arm,
        seed=seed,
        lr=lr,
        step=step,
        loss=loss,
        run=run,
        planned=planned,
        choose=choose,
        settings=tuple(setting or ()),
        pattern=pattern,
        reference=reference,
        better=better,
        outcome=outcome,
        target=target,
        at=steps_at(at or ()),
        pairs=pairs,
        paired=paired,
        margin=margin,
        sigma=sigma,
        exchange=exchange_of(exchange),
        rule=rule,
    )
    if as_json:
        print_json(judgement.record)
    else:
        _print(judgement.record)
    if output or not (no_page or as_json):
        from ebc_lab.report.page.judged import write

        files = write(judgement, output or Path("judgement"))
        typer.echo(f"page {files[0]}", err=as_json)


def _print(record: Record) -> None:
    """Print what was taken for what, the answer, what to know of it, and the tables."""
    from ebc_lab.report.kinds.judged import tables
    from ebc_lab.report.text.table import TERMINAL

    from .screen import draw_table

    screen = console()
    for line in record["sources"]:
        screen.print(f"read: {line}")
    for one in record["taken"]:
        screen.print(one["sentence"])
    screen.print("")
    for line in record["answer"]:
        screen.print(line, style="bold")
    for caution in record["cautions"]:
        screen.print(f"caution: {caution['sentence']}")
    for table in tables(record):
        if TERMINAL in table.places and table.name not in ("columns", "cautions"):
            short = table.shortened(MOST_ROWS, "the page and its CSV files have all")
            screen.print("")
            screen.print(draw_table(short))
            if short is not table:
                screen.print(short.note.rpartition("; ")[2])
    screen.print(f"{record['pairing']} {record['method']}")

"""`judge`: an answer from runs that somebody else trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Json, console, optional, print_json

if TYPE_CHECKING:
    from ebc_lab.judging.record import Record

MOST_ROWS = 40  # of a table on the terminal
PATTERN = r"'step:(?P<step>\d+) val_loss:(?P<val_loss>\S+)'"


def _column(name: str, what: str) -> Any:
    help_text = f"Column that {what}."
    return optional(f"--{name}", metavar="COLUMN", help=help_text, rich_help_panel="Columns")


Paths = Annotated[
    list[Path],
    typer.Argument(
        help="Files and folders: CSV, Parquet, JSON lines, W&B, MLflow, TensorBoard, Trainer, Lightning, "
        "Optuna, Hydra, text logs, studies of ebc-lab.",
        show_default=False,
    ),
]
Arm = Annotated[str, _column("arm", "names the arm: optimizer, method …")]
Seed = Annotated[str, _column("seed", "holds the seed")]
Rate = Annotated[str, _column("lr", "holds the learning rate")]
Step = Annotated[str, _column("step", "counts steps, epochs or tokens")]
Loss = Annotated[str, _column("loss", "is judged")]
Run = Annotated[str, _column("run", "tells runs apart where arm and seed do not")]
Planned = Annotated[str, _column("planned", "holds the length that a run was to have")]
Choose = Annotated[str, _column("choose", "chooses an arm's configuration, where another one judges it")]
Setting = Annotated[list[str] | None, _column("setting", "holds a setting that is tuned; repeatable")]
Where = Annotated[
    list[str] | None,
    optional(
        "--where",
        metavar="COLUMN=VALUE",
        help="Take only rows with this value: stage=final; repeatable.",
        rich_help_panel="Columns",
    ),
]
Pattern = Annotated[
    str, optional("--pattern", metavar="REGEX", help=f"Of text logs: {PATTERN}.", rich_help_panel="Columns")
]
Reference = Annotated[str, optional("--reference", metavar="ARM", help="What the others are compared with.")]
Better = Annotated[
    str, optional("--better", metavar="lower|higher", help="Which value of the loss is better.")
]
Outcome = Annotated[
    str,
    typer.Option(
        "--outcome",
        metavar="last|target|best",
        help="Of a curve: its last value, the steps to --target, its best.",
    ),
]
Target = Annotated[float | None, optional("--target", help="A loss; the steps to it are reported.")]
At = Annotated[
    list[str] | None,
    optional("--at", metavar="[ARM=]STEP", help="Judge an arm, or all, at this step; repeatable."),
]
Chain = Annotated[
    str, optional("--chain", metavar="ARM,ARM,…", help="Compare each of these with the one before it.")
]
Distinct = Annotated[bool, typer.Option("--distinct", help="Count runs with equal curves once.")]
Pairs = Annotated[bool, typer.Option("--pairs", help="Compare all pairs, as without a reference.")]
Paired = Annotated[
    bool | None,
    optional(
        "--paired/--unpaired", help="Whether seeds pair runs; if left out, where all arms have the same."
    ),
]
Margin = Annotated[
    float, typer.Option("--margin", help="An undecided difference whose interval lies within it is level.")
]
Sigma = Annotated[
    str, optional("--sigma", metavar="pooled|NUMBER", help="Deviation of a run, for arms that have one run.")
]
Exchange = Annotated[
    str, optional("--exchange", metavar="LOSS/STEPS", help="What steps are worth: 0.0045/100.")
]
Rule = Annotated[
    str, optional("--rule", metavar="track3", help="The rule of another benchmark, beside ours.")
]
Output = Annotated[
    Path | None,
    optional("--output", "-o", metavar="FOLDER", help="Where page, tables and pictures go; ./judgement."),
]
NoPage = Annotated[bool, typer.Option("--no-page", help="Answer on the terminal, and write nothing.")]


def judge(
    paths: Paths,
    arm: Arm = "",
    seed: Seed = "",
    lr: Rate = "",
    step: Step = "",
    loss: Loss = "",
    run: Run = "",
    planned: Planned = "",
    choose: Choose = "",
    setting: Setting = None,
    where: Where = None,
    pattern: Pattern = "",
    reference: Reference = "",
    better: Better = "",
    outcome: Outcome = "last",
    target: Target = None,
    at: At = None,
    chain: Chain = "",
    pairs: Pairs = False,
    distinct: Distinct = False,
    paired: Paired = None,
    margin: Margin = 0.0,
    sigma: Sigma = "",
    exchange: Exchange = "",
    rule: Rule = "",
    output: Output = None,
    no_page: NoPage = False,
    as_json: Json = False,
) -> None:
    """Judge runs that you have already, of any trainer: which arm is better, how sure is that, and what is in
    the way of an answer?"""
    from ebc_lab.judging.asked import Asked, chain_of, exchange_of, steps_at
    from ebc_lab.judging.judgement import judged

    columns = (arm, seed, lr, step, loss, run, planned, choose)
    asked = Asked(
        *columns,
        settings=tuple(setting or ()),
        where=tuple(where or ()),
        pattern=pattern,
        reference=reference,
        better=better,
        outcome=outcome,
        target=target,
        at=steps_at(at or ()),
        chain=chain_of(chain),
        pairs=pairs,
        distinct=distinct,
        paired=paired,
        margin=margin,
        sigma=sigma,
        exchange=exchange_of(exchange),
        rule=rule,
    )
    judgement = judged(paths, asked)
    if as_json:
        print_json(judgement.record)
    else:
        _print(judgement.record)
    if output or not (no_page or as_json):
        from ebc_lab.report.page.judged import write

        page = write(judgement, output or Path("judgement"))[0]
        typer.echo(f"page {page}", err=as_json)


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
            if short.note:
                screen.print(short.note, style="dim")
    screen.print(f"{record['pairing']} {record['method']}")

"""`list` and `board`, many studies and bundles at once, and `columns`, what their tables hold."""

import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from .options import OUTPUT_DIR, Json, console, print_json

NOTE = (
    "test loss: nats per token, mean over the seeds ± its 95% interval; from the best: paired by the seeds "
    "that both have, (n) where they are fewer. Each interval is by itself and "
    "without the luck of a tuning, which a study's own has: the first of many owes a part to luck."
)


def list_studies(
    folder: Annotated[Path, typer.Argument(help="Folder of studies and bundles.")] = Path(OUTPUT_DIR),
    as_json: Json = False,
) -> None:
    """The studies and bundles in a folder, the newest first: state, runs, age, size, what each found."""
    from ebc_lab.config.errors import UserError
    from ebc_lab.results.catalogue import catalogue
    from ebc_lab.study.store.find import no_study_in

    folder = folder.expanduser()
    if folder.is_file():
        say_of_it = f"`ebc-lab status {shlex.quote(str(folder))}` shows one study or bundle"
        raise UserError(f"{folder} is no folder: {say_of_it}, and `ebc-lab list` those in a folder.")
    if folder != Path(OUTPUT_DIR) and not folder.is_dir():
        raise UserError(f"{folder} is no folder: give one that holds studies or bundles.")
    studies = catalogue(folder)
    if as_json:
        return print_json(studies)
    if not studies:
        return typer.echo(no_study_in(folder))
    from rich.text import Text

    from ebc_lab.report.text import words

    from .screen import STATE_STYLE, plain_table

    table = plain_table("~study", "state", "scale", ">runs", ">age", ">size", "~found")
    for one in studies:
        name = f"{one['name']}.zip" if one["bundle"] else one["name"]
        state = Text(one["state"], STATE_STYLE.get(one["state"], ""))
        size = "–" if one["bytes"] is None else words.size(one["bytes"])
        about = one["headline"] or f"stages: {', '.join(one['stages'])}"
        table.add_row(name, state, one["scale"] or "–", str(one["runs"]), _age(one["written"]), size, about)
    console().print(table)


def board(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of studies, or studies and bundles.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Rank arms over many studies and bundles, where corpus, model, batch and length are the same."""
    from ebc_lab.results.ranking import board as ranked

    ranking = ranked(*(folders or [Path(OUTPUT_DIR)]))
    board_json = ranking.as_json()
    if as_json:
        return print_json(board_json)
    from .screen import plain_table

    screen = console()
    for group, about in ranking.groups.items():
        screen.print(f"{group}: {about}")
        table = plain_table(">#", "~arm", "~study", ">test loss", ">seeds", ">lr", ">from the best")
        for row in (row for row in board_json["arms"] if row["group"] == group):
            loss = _with_interval(row["test_loss"], row["low"], row["high"], "")
            if row["diverged"]:
                loss = f"{row['diverged']} of {row['seeds']} diverged"
            apart = _with_interval(row["difference"], row["difference_low"], row["difference_high"], "+")
            if row["shared_seeds"] != row["seeds"]:
                apart += f" ({row['shared_seeds']})"
            seeds, lr = str(row["seeds"]), f"{row['lr']:g}"
            table.add_row(str(row["rank"]), row["arm"], row["study"], loss, seeds, lr, apart)
        screen.print(table, "")
    if ranking.groups:
        screen.print(NOTE)
    for note in ranking.notes:
        screen.print(note)


def columns(
    table: Annotated[str, typer.Argument(help="A CSV file or a table; all are listed without one.")] = "",
    as_json: Json = False,
) -> None:
    """The columns of a study's CSV files and of `ebc_lab.load`'s tables: name, unit, meaning."""
    from ebc_lab.config.errors import UserError
    from ebc_lab.records.columns import TABLES

    from .screen import plain_table

    name = table.removesuffix(".csv")
    name = "summary" if name.startswith("summary_") else name
    found = {key: meanings for key, meanings in TABLES.items() if not name or key.removesuffix("()") == name}
    if not found:
        raise UserError(f"{table} is no table: choose among {', '.join(TABLES)}.")
    if as_json:
        rows: dict[str, list[dict[str, str]]] = {key: [] for key in found}
        for key, meanings in found.items():
            rows[key] += ({"column": c, "unit": u, "meaning": m} for c, (u, m) in meanings.items())
        return print_json(rows)
    screen = plain_table("column", "unit", "~meaning") if name else plain_table("table", "~columns")
    for key, meanings in found.items():
        if not name:
            screen.add_row(key, ", ".join(meanings))
            continue
        for column, (unit, meaning) in meanings.items():
            screen.add_row(column, unit, meaning)
    console().print(screen)


def _with_interval(mean: float | None, low: float | None, high: float | None, sign: str) -> str:
    """`2.466 ±0.027`."""
    if mean is None:
        return "–"
    around = "" if low is None or high is None else f" ±{(high - low) / 2:.3f}"
    return f"{mean:{sign}.3f}{around}"


def _age(written: str | None) -> str:
    """How long ago, in the largest unit that fits: `3 h`."""
    if written is None:
        return "–"
    seconds = max(0.0, (datetime.now(UTC) - datetime.fromisoformat(written)).total_seconds())
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"

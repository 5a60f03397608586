"""What several commands take, and where they print."""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

OUTPUT_DIR = "outputs/ebc_ablation"
HELP_NAMES = {"help_option_names": ["-h", "--help"]}
PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True}
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Place = Annotated[str, typer.Option("--output-dir", help="Folder that holds the studies.")]
optional = functools.partial(typer.Option, show_default=False)
Port = Annotated[int, optional("--port", help="Port on 127.0.0.1; a free one if left out.")]
PIPE_WIDTH = 100  # characters of a line where no terminal says how many it has, unless COLUMNS does
LEAST_WIDTH = 40  # below this, rich leaves whole columns out of our tables


def print_json(value: Any) -> None:
    """Print what `--json` asks for, strict JSON: what is not finite is null."""
    from ebc_lab.records.json_files import as_json

    typer.echo(json.dumps(as_json(value), indent=1))


def tell_aside(text: str) -> None:
    """Tell something beside the answer, which may be JSON."""
    typer.echo(text, err=True)


def mend_size() -> None:
    """Drop COLUMNS and LINES from the environment where they are not a size, and raise a tiny COLUMNS.

    Some terminals and CI machines set 0, a width at which rich prints nothing. typer's help reads them, too.
    """
    for name, least in (("COLUMNS", LEAST_WIDTH), ("LINES", 1)):
        said = os.environ.pop(name, "")
        if re.fullmatch("[0-9]{1,4}", said) and int(said) > 0:
            os.environ[name] = str(max(least, int(said)))


def console(*, aside: bool = False) -> Any:
    """rich's console for an answer: nothing in it is markup or an emoji's name, since it is from files.

    `aside`: beside the answer, on the stream of errors.
    """
    from rich.console import Console

    class Unbroken(Console):
        """A console that leaves a text with a command in it to the terminal, which copies it whole."""

        def print(self, *objects: Any, **how: Any) -> None:
            commands = any("`ebc-lab" in str(text) for text in objects)
            super().print(*objects, **({"soft_wrap": True} | how if commands else how))

    mend_size()
    terminal = (sys.stderr if aside else sys.stdout).isatty()  # a notebook's FORCE_COLOR does not make it one
    width = None if terminal or "COLUMNS" in os.environ else PIPE_WIDTH
    plain: Any = {"highlight": False, "markup": False, "emoji": False}
    return Unbroken(stderr=aside, force_terminal=terminal, width=width, **plain)


@contextmanager
def live(console: Any, **how: Any) -> Iterator[Any]:
    """rich's live display on a terminal, None where lines are printed instead. `how`: as its Live takes."""
    if not console.is_terminal:
        yield None
        return
    from rich.live import Live

    with Live(console=console, **how) as display:
        yield display

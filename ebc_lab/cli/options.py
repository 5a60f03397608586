"""What several commands take, and where they print."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

OUTPUT_DIR = "outputs/ebc_ablation"
INTERRUPTED = 130  # the exit code
HELP_NAMES = {"help_option_names": ["-h", "--help"]}
PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True}
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Place = Annotated[str, typer.Option("--output-dir", help="Folder that holds the studies.")]


PIPE_WIDTH = 100  # characters of a line where no terminal says how many it has, unless COLUMNS does


def console(*, aside: bool = False) -> Any:
    """rich's console for an answer: nothing in it is markup or an emoji's name, since it is from files.

    `aside`: beside the answer, on the stream of errors.
    """
    from rich.console import Console

    stream = sys.stderr if aside else sys.stdout
    columns = os.environ.get("COLUMNS", "")
    width = None if stream.isatty() or columns.isdigit() else PIPE_WIDTH
    return Console(stderr=aside, highlight=False, markup=False, emoji=False, width=width)

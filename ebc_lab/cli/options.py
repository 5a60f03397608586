"""What several commands take, and where they print."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

OUTPUT_DIR = "outputs/ebc_ablation"
PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True}
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Place = Annotated[str, typer.Option("--output-dir", help="Folder that holds the studies.")]


def console() -> Any:
    """rich's console for an answer: nothing in it is markup or an emoji's name, since it is from files."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 160)

"""What several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

OUTPUT_DIR = "outputs/ebc_ablation"
PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True}
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Place = Annotated[str, typer.Option("--output-dir", help="Folder that holds the studies.")]

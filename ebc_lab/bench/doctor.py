"""What `ebc-lab doctor` reports about this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ebc_lab.config.dicts import run_part
from ebc_lab.config.errors import UserError
from ebc_lab.config.machine import chosen_device, hardware, versions
from ebc_lab.config.schema import Config


def examine(config: Config, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Everything `ebc-lab doctor` reports. Problems are listed, not raised. `say`: told what takes time."""
    from ebc_lab.components.determinism import engine_in_words
    from ebc_lab.workloads.corpus import locate

    from .speeds import report

    problems: list[str] = []
    facts: dict[str, Any] = {"versions": versions(), "hardware": hardware()}
    try:
        say("looking for the corpus …")
        corpus = locate(config.data, quiet=True)
        about = {k: getattr(corpus, k) for k in ("name", "source", "sha256")}
        facts["corpus"] = {**about, **({"characters": len(corpus.text)} if corpus.text else {})}
        if corpus.warning:
            problems.append(corpus.warning)
    except UserError as error:
        problems.append(str(error))
    run = run_part(config)
    run.device = chosen_device(run.device)
    try:
        facts["speed"] = report(config, run, say)
    except UserError as error:
        problems.append(str(error))
    say("compiling verity's engine, unless it is there …")
    facts["verity"] = engine_in_words(run.device)
    output = Path(config.output_dir)
    existing = next(p for p in [output, *output.resolve().parents] if p.exists())
    writable = existing.is_dir() and os.access(existing, os.W_OK)
    free_gb = round(shutil.disk_usage(existing).free / 1e9, 1)
    facts["output"] = {"path": str(output), "writable": writable, "free_gb": free_gb}
    if not writable:
        problems.append(f"{output} cannot be written: choose another output_dir.")
    facts["slurm"] = shutil.which("sbatch") is not None
    facts["problems"] = problems
    return facts

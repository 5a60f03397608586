"""What `ebc-lab doctor` reports about this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ebc_lab.config import machine
from ebc_lab.config.dicts import run_part
from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import Config, RunConfig

from . import speeds

MEASURING_S = 15  # what `measured_rates` takes where a step takes milliseconds, start-up included
RULES = {  # as `ebc-lab doctor` prints them
    "dtype": "bfloat16 autocast where it is more than 5% faster than float32; float32 under "
    "determinism=verity",
    "threads_per_run": "for a study, the number with the most steps/s on the whole machine, where parallel "
    "runs have threads_per_run cores each; for a single run, the number that makes one process fastest; "
    "fewer threads where more would gain less than 5%; 1 on a GPU; with launcher=slurm, "
    "launcher.cpus_per_task, or 1",
    "compile": "off where all runs of a study together take less than 20 minutes; else on where the time it "
    "saves, less a reload from the disk cache in every run, is more than twice the time of compiling; off on "
    "a GPU, whose steps come from CUDA graphs, on Slurm nodes and under determinism=verity; compile=on "
    "overrides the GPU's and Slurm's default",
    "optimizers": "adam, adamw and sgd are torch's fused kernels (fused=True); Muon's and EBC's own "
    "arithmetic is batched over all tensors (foreach)",
}


def examine(config: Config, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Return all that `ebc-lab doctor` reports. Problems are listed, not raised. `say` is called with what
    takes time."""
    from ebc_lab.components.determinism import engine_in_words
    from ebc_lab.workloads.corpus import locate

    problems: list[str] = []
    facts: dict[str, Any] = {"versions": machine.versions(), "hardware": machine.hardware()}
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
    run.device = machine.chosen_device(run.device)
    try:
        facts["speed"] = speed(config, run, say)
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


def speed(config: Config, run: RunConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the rates at this shape for both dtypes, what a study and a single run would choose, and why.

    Measures what is not known, and says so first; `cached`: the rates were known. Raises UserError.
    """
    cores = machine.cores()
    shape, _ = speeds.chosen_by_rule(run, cores, speeds.job_cores(config.launcher))
    if not run.determinism.exact:
        shape = replace(shape, dtype="auto")
    alone = speeds.cases_of(shape, cores, 1)
    in_parallel = speeds.cases_of(shape, cores, speeds.parallel_limit(config.launcher))
    cases = list(dict.fromkeys([*alone, *in_parallel]))
    rates = speeds.known_rates(shape, cases)
    cached = bool(rates)
    if not cached:
        say(f"measuring the speed of {len(cases)} settings at this shape: some {MEASURING_S} s …")
        rates = speeds.measured_rates(shape, cases)
    study = speeds.choose_for_study(replace(config, device=run.device), say=say)
    single = speeds.choose(run, work=speeds.one_run, limit=1, say=say)
    rows: list[dict[str, Any]] = []
    by_dtype: dict[str, float] = {}  # of one process with a study's threads
    compiling: dict[tuple[int, str], Any] = {}
    for (threads, processes, dtype), rate in sorted(rates.items()):
        rows.append({"threads": threads, "processes": processes, "dtype": dtype, "steps_per_s": rate})
        if (threads, processes) == (study.threads_per_run, 1):
            by_dtype[dtype] = rate
        compiled = replace(run, threads_per_run=threads, dtype=dtype)
        compiling[threads, dtype] = speeds.compile_cache(compiled).read()
    return {
        "scale": config.scale,
        "device": run.device,
        "cached": cached,
        "rates": rows,
        "steps_per_s": by_dtype,
        "study": _without_rate(study),
        "single_run": _without_rate(single),
        "compile": [{"threads": t, "dtype": d, **cost} for (t, d), cost in compiling.items() if cost],
        "rules": RULES,
    }


def _without_rate(choice: speeds.Choice) -> dict[str, Any]:
    return {k: v for k, v in asdict(choice).items() if k != "rate"}

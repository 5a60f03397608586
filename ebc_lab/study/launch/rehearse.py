"""Parts of one's own are tried before a study trains anything, one step each, in a process apart: a part that
cannot work is met in seconds, and not after a sweep."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

from ebc_lab.config.choices import OWN, changed, optimizer_defaults, with_size
from ebc_lab.config.dicts import run_part, to_dict
from ebc_lab.config.errors import UserError, visible
from ebc_lab.config.machine import chosen_device, visible_gpus
from ebc_lab.config.schema import Config, RunConfig
from ebc_lab.records.cache import MeasurementCache
from ebc_lab.records.decisions import BestRate, NaturalSteps
from ebc_lab.workloads.starts import pinned
from ebc_lab.workloads.text import checked_text

from ..stages.runs import fill_from_baseline, plain_run
from ..store.study import Study
from .command import worker_env

TOGETHER_S = 60.0  # for all of them; what is not known by then shows when it is trained
MODULE = "ebc_lab.training.rehearsal"
# of a baseline, in place of what a sweep would measure
UNIT: NaturalSteps = {"natural_kl": 1.0, "descent_median": 1.0}


def rehearse(config: Config, study: Study, say: Callable[[str], None]) -> None:
    """Try each part of one's own that the study's arms have, once for a study and each of its versions.

    Raises UserError, in a sentence with the arm and the file's line, where one cannot work.
    """
    asked = _with_new_parts(config)
    placed = _placed(config) if asked else None
    if placed is None:
        return
    runs = {name: _at(placed, run) for name, run in asked.items()}
    key = [str(study.root.resolve()), *([name, run.steps, *_targets(run)] for name, run in runs.items())]
    rehearsals = MeasurementCache("rehearsal", key, form=list[str])
    if rehearsals.read() is not None:
        return
    warnings = _tried(runs, study, config)
    for warning in warnings:
        say(f"warning: {warning}")
    rehearsals.write(warnings)


def _targets(settings: RunConfig) -> Iterator[tuple[str, str, str]]:
    """Yield (group, target with its checksum, arguments) of the own parts of a run."""
    for group in OWN:
        part = getattr(settings, group)
        if part.target is not None:
            yield group, f"{part.target} {part.sha256}", repr(sorted(part.arguments.items()))


def _with_new_parts(config: Config) -> dict[str, RunConfig]:
    """Return what is tried -> its run: of the arms, the controller search's candidates and the study's own
    settings, those with a part that none before has."""
    rehearsed: dict[str, RunConfig] = {}
    known: set[tuple[str, str, str]] = set()
    for name, run in _runs(config):
        targets = set(_targets(run))
        if targets - known:
            known |= targets
            rehearsed[name] = run
    return rehearsed


def _runs(config: Config) -> Iterator[tuple[str, RunConfig]]:
    """Yield everything that the study may train, at its own length: arms first, because they have names."""
    optimizer = config.lr_sweep.optimizers[0] if config.lr_sweep.optimizers else config.optimizer.name
    rate = config.optimizer.lr
    if config.optimizer.name != optimizer:
        rate = optimizer_defaults(optimizer).lr
    track: BestRate = {"optimizer": optimizer, "lr": rate, "projection": config.projection.name}
    base = run_part(config)
    seed = config.seeds[0] if config.seeds else base.seed
    for name, arm in config.ablation.all_arms().items():
        run = with_size(plain_run(config, track, base.steps, seed, arm.lr_scale), arm)
        yield f"arm {name}", fill_from_baseline(changed(run, arm.settings), UNIT)
    for name, settings in config.controller_search.candidates.items():
        if isinstance(settings, dict):
            yield f"candidate {name}", fill_from_baseline(changed(base, settings), UNIT)
    if base.stabilizer.target is None:  # it must not refuse what is the study's to find: a target KL, say
        base = replace(base, stabilizer=replace(base.stabilizer, name="none"))
    yield "the study's settings", base


def _placed(config: Config) -> Config | None:
    """Return the configuration with its text and device; None where this machine lacks the device."""
    device = chosen_device(config.device)
    if device == "cuda" and not visible_gpus():
        return None
    corpus, tokenizer_sha256 = checked_text(config)
    return replace(pinned(config, corpus, tokenizer_sha256), device=device)


def _at(placed: Config, run: RunConfig) -> RunConfig:
    """Return the run on that text and device, with nothing left open."""
    dtype = run.dtype if run.dtype != "auto" else "float32"
    there = replace(run, data=placed.data, tokens=placed.tokens, device=placed.device)
    return replace(there, compile="off", threads_per_run=1, dtype=dtype)


def _tried(runs: dict[str, RunConfig], study: Study, config: Config) -> list[str]:
    """Try them. -> warnings. Raises UserError."""
    folder = str(study.own.resolve()) if study.own.is_dir() else None
    asked = json.dumps({"own": folder, "runs": [to_dict(run) for run in runs.values()]})
    env = {**os.environ, **worker_env(config), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", MODULE],
            input=asked,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=TOGETHER_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return ["parts of your own were not tried to the end: their first steps took over a minute"]
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for name, problem in zip(runs, answers, strict=False):
        if "refused" in problem:
            why = visible(problem["refused"])
            raise UserError(f"{name}: {why}: mend it, and give the same command again; nothing was trained.")
    if len(answers) < len(runs):
        name = list(runs)[len(answers)]
        raise UserError(
            f"{name}: the process that tried its parts for one step ended with code {done.returncode}: try "
            "it alone with `ebc-lab train`, and give the same command again."
        )
    return [f"{name}: {problem['warned']}" for name, problem in zip(runs, answers, strict=True) if problem]

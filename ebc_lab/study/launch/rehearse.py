"""A rehearsal of the parts defined by the user. Before a study trains anything, each of these parts is tried
for one training step in a separate process. A part that cannot work fails then, and not after a sweep."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ebc_lab.config.choices import changed, optimizer_defaults, with_size
from ebc_lab.config.dicts import run_part, to_dict
from ebc_lab.config.errors import UserError, visible
from ebc_lab.config.machine import chosen_device, visible_gpus
from ebc_lab.config.own.parts import own_parts
from ebc_lab.config.schema import Config, RunConfig
from ebc_lab.records.cache import MeasurementCache
from ebc_lab.records.decisions import BestRate, NaturalSteps
from ebc_lab.workloads.starts import pinned
from ebc_lab.workloads.text import checked_text

from ..stages.runs import fill_from_baseline, plain_run
from ..store.study import Study
from .local import worker_env

TOGETHER_S = 60.0  # time limit for all runs together; later faults show when the study trains
# stands in for the figures of the baseline that a sweep would measure
UNIT: NaturalSteps = {"natural_kl": 1.0, "descent_median": 1.0}


def rehearse(config: Config, study: Study, say: Callable[[str], None]) -> None:
    """Train one step with each user-defined part of the study, under each set of arguments that the part is
    given. Nothing is trained if these parts passed before, or if a GPU is needed and missing. Warnings go to
    `say`. Raises UserError, naming the arm and the line of the part's file, if a part fails."""
    asked: dict[str, RunConfig] = {}
    known: set[tuple[str, str, str]] = set()
    for name, run in _runs(config):  # keep a run only if it has a part that no earlier run has
        targets = set(_targets(run))
        if targets - known:
            known |= targets
            asked[name] = run
    if not asked:
        return
    device = chosen_device(config.device)
    if device == "cuda" and not visible_gpus():
        return
    text = pinned(config, *checked_text(config))
    for name, run in asked.items():  # fill in the settings that a study resolves later
        dtype = run.dtype if run.dtype != "auto" else "float32"
        asked[name] = replace(run, data=text.data, tokens=text.tokens, device=device, dtype=dtype)
    key = [str(study.root.resolve()), *([name, run.steps, *_targets(run)] for name, run in asked.items())]
    rehearsals = MeasurementCache("rehearsal", key, form=list[str])
    if rehearsals.read() is None:
        warnings = _tried(asked, study, config)
        for warning in warnings:
            say(f"warning: {warning}")
        rehearsals.write(warnings)


def _targets(run: RunConfig) -> Iterator[tuple[str, str, str]]:
    """Yield (group, target and its checksum, arguments) for each user-defined part of a run."""
    for part in own_parts(run):
        arguments = repr(sorted(part.settings["arguments"].items()))
        yield part.group, f"{part.target} {part.settings['sha256']}", arguments


def _runs(config: Config) -> Iterator[tuple[str, RunConfig]]:
    """Yield (name for messages, run) for each configuration that the study may train. Arms come first,
    because users know the names of arms; then candidates, and last the study's own settings."""
    optimizer, seed = config.lr_sweep.optimizers[0], config.seeds[0]  # neither list may be empty
    chosen = config.optimizer if config.optimizer.name == optimizer else optimizer_defaults(optimizer)
    track: BestRate = {"optimizer": optimizer, "lr": chosen.lr, "projection": config.projection.name}
    base = run_part(config)
    for name, arm in config.ablation.all_arms().items():
        run = with_size(plain_run(config, track, base.steps, seed, arm.lr_scale), arm)
        yield f"arm {name}", fill_from_baseline(changed(run, arm.settings), UNIT)
    for name, settings in config.controller_search.candidates.items():
        if isinstance(settings, dict):
            yield f"candidate {name}", fill_from_baseline(changed(base, settings), UNIT)
    plain = replace(base, stabilizer=replace(base.stabilizer, name="none"))
    for name, method in config.profiles.methods.items():
        point = {key: values[0] for key, values in method.grid.items()}
        yield f"method {name}", changed(plain, method.settings_at(point))
    # EBC would refuse a run whose target KL the study has yet to find
    yield "the study's settings", plain if base.stabilizer.target is None else base


def _tried(runs: dict[str, RunConfig], study: Study, config: Config) -> list[str]:
    """Train one step of each run, all in one separate process, and return the warnings. Raises UserError for
    the first run that fails."""
    folder = str(study.own.resolve()) if study.own.is_dir() else None
    asked = json.dumps({"own": folder, "runs": [to_dict(run) for run in runs.values()]})
    env = {**os.environ, **worker_env(config), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ebc_lab.training.rehearsal"]
    pipes: dict[str, Any] = {"input": asked, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    try:
        done = subprocess.run(command, **pipes, env=env, text=True, timeout=TOGETHER_S, check=False)
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

"""`ebc-lab bench`: everything measured about one run's settings."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ebc_lab.config.checks import check_run
from ebc_lab.config.compose import compose, implied
from ebc_lab.config.dicts import run_part, to_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.machine import chosen_device, git_revision, hardware
from ebc_lab.config.part import Part
from ebc_lab.config.parts import PARTS
from ebc_lab.config.schema import Config, RunConfig
from ebc_lab.workloads.starts import pinned
from ebc_lab.workloads.text import checked_text

from .compared import beside_weights, energy_steps, exact_steps, low_bit
from .costs import compute, fixed_costs
from .memory import memory
from .pairs import Effort, overheads, throughput
from .shares import shares
from .speeds import choose_for_study

FORMAT = 1  # of the record: raised when a figure changes its meaning or its place


class Section(NamedTuple):
    """What is measured under one key of the record, and how much of it."""

    measure: Callable[[RunConfig, Effort], Any]
    about: str  # what is said when it begins
    effort: Effort
    workload: str = ""  # the only one that it is about, if any


PAIRS = Effort(rounds=7, quick_rounds=2, limit_s=25.0)
VARIANTS = Effort(rounds=21, quick_rounds=6, limit_s=25.0)  # shorter blocks, of more sides
SECTIONS = {  # in the order of the record
    "throughput": Section(throughput, "tokens/s against a plain loop", PAIRS, "gpt"),
    "overhead": Section(overheads, "what each stabilizer adds to a step", replace(PAIRS, limit_s=5.0)),
    "low_bit": Section(low_bit, "low-bit training against the plain step", VARIANTS, "gpt"),
    "ebm": Section(energy_steps, "the energy-based model's step, and what its parts take", PAIRS, "ebm"),
    "shares": Section(shares, "where a step's time goes", Effort(rounds=3)),
    "fixed": Section(fixed_costs, "what a run costs in addition to its steps", Effort(rounds=3)),
    "compute": Section(compute, "FLOP/s against matrix products", Effort(rounds=40, quick_rounds=3), "gpt"),
    "memory": Section(memory, "what is held in memory", Effort(rounds=1)),
    "beside_weights": Section(beside_weights, "what optimizers keep beside the weights", VARIANTS, "gpt"),
    "exact": Section(exact_steps, "exact training against the plain step", VARIANTS, "gpt"),
}
LONGER = 3  # times as many rounds, and seconds, where only some sections are measured


def refuse_own_sections(run: RunConfig) -> None:
    """Raises UserError for a run whose steps most sections, which take them apart, would not measure."""
    if run.model.name != "gpt" or run.workload.name == "images":
        raise UserError("`ebc-lab bench` counts what a step of the GPT computes: leave model=gpt.")
    if run.data.name == "bin":
        raise UserError(
            "`ebc-lab bench` takes turns with a loop that has the whole text: choose another data."
        )
    apart: dict[str, list[type[Part]]] = {}
    for part in PARTS:
        if part.measured:
            apart.setdefault(part.measured, []).append(part)
    for what, parts in apart.items():
        if any(part.from_run(run) != part() for part in parts):
            raise UserError(
                f"`ebc-lab bench` measures {what} beside the plain step, in a section of its own: leave "
                f"{' and '.join(part.group_name for part in parts)} out."
            )


def resolve(config: Config) -> RunConfig:
    """The run of the overrides, with device, precision and corpus as a study of such runs would have them.

    Raises UserError: no corpus, one that is too short, settings that cannot be trained, lr_schedule=replay.
    """
    run = run_part(config)
    refuse_own_sections(run)
    run = pinned(run, *checked_text(run, quiet=True))
    run.device = chosen_device(run.device)
    if run.lr_schedule.name == "replay":
        raise UserError("lr_schedule=replay has a fixed length and costs as much as any other: leave it out.")
    choice = choose_for_study(replace(config, device=run.device, data=run.data))
    run = choice.apply_to(run)
    check_run(run)
    return run


def bench(
    overrides: Sequence[str],
    *,
    only: Sequence[str] = (),
    quick: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Everything that `ebc-lab bench` reports about the run of these overrides (docs/running.md).

    Args:
        only: sections, by their keys in what is returned; each is given three times as long. All, if empty.
        quick: seconds instead of minutes; the figures then show that it works, not how fast.
        say: called with what is measured, as it begins.
    Raises:
        UserError: settings or sections that are refused, before anything is measured.
    """
    config = compose(implied(overrides), study=False)
    run = resolve(config)
    sections = {name: found for name, found in SECTIONS.items() if found.workload in ("", run.workload.name)}
    if unknown := sorted(set(only) - set(sections)):
        raise UserError(f"`--only {unknown[0]}` is no section here: choose among {', '.join(sections)}.")
    begun = time.perf_counter()
    threads = torch.get_num_threads()
    figures: dict[str, Any] = {"about": about(config, run, quick, list(overrides))}
    try:
        for name, section in sections.items():
            if only and name not in only:
                continue
            say(section.about)
            effort = replace(section.effort, say=say)
            if quick:
                effort = replace(effort, rounds=effort.quick_rounds, quick=True)
            elif only:
                effort = replace(effort, rounds=LONGER * effort.rounds, limit_s=LONGER * effort.limit_s)
            figures[name] = section.measure(run, effort)
    finally:
        torch.set_num_threads(threads)
    figures["about"]["took_s"] = time.perf_counter() - begun
    return figures


def about(config: Config, run: RunConfig, quick: bool, overrides: list[str]) -> dict[str, Any]:
    """When, on which machine and for which run, without the name of a host, a user or a path."""
    machine = {k: v for k, v in hardware().items() if k in ("cpu", "cores", "gpus")}
    machine["load_before"] = list(os.getloadavg())
    settings = to_dict(run)
    settings["data"] = {"name": run.data.name, "sha256": run.data.sha256}
    return {
        "format": FORMAT,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "quick": quick,
        "scale": config.scale,
        "overrides": [o for o in overrides if not o.lstrip("+").startswith("data.file=")],
        "machine": machine,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "git": git_revision(),
        "run": settings,
    }

"""A run that a stage needs, the name of the arm that it belongs to, and the names of tracks in words."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ebc_lab.config import identity as naming
from ebc_lab.config.choices import groups
from ebc_lab.config.parts.optimizer import OptimizerConfig
from ebc_lab.config.parts.projection import ProjectionConfig
from ebc_lab.config.schema import RunConfig

from .decisions import Schedules

GRID = "grid"  # the role of the runs by which the first best rate is found
DIGITS = 6  # of a learning rate, and of its scale: as many as `plain_run` keeps


def arm_name(run: RunConfig, lr_scale: float | None, note: str = "") -> str:
    """Return a run's arm, `<optimizer>_<projection>_<stabilizer>[_d<target KL>_<budget>]_x<scale><schedules>`
    with the schedules as `tail_of` spells them: `_lindelta_lrdecay`, `_holddelta_trapezoid_w0`.

    `_x2` is twice the track's best constant rate. Before that is known, `lr_scale` None, the learning rate
    itself is named, `_lr0p004`: an arm's name means one rate wherever it is read.
    """
    number = naming.number
    rate = f"lr{number(run.optimizer.lr, DIGITS)}" if lr_scale is None else f"x{number(lr_scale, DIGITS)}"
    return f"{naming.stem_of(run)}_{rate}{naming.tail_of(run)}{note}"


def setting_columns(run: RunConfig) -> dict[str, Any]:
    """Return a run's settings by the columns of its tables; None for those that have no effect in it."""
    run = naming.with_derived_settings(run)
    ebc = run.stabilizer.name == "ebc"
    bound = ebc and (run.budget.name in ("surrogate", "calibrated") or run.budget.sensitivity_every > 0)
    return {
        "seed": run.seed,
        "lr": run.optimizer.lr,
        "optimizer": run.optimizer.name,
        "projection": run.projection.name,
        "stabilizer": run.stabilizer.name,
        "budget": run.budget.name if ebc else None,
        "aggregate": run.budget.aggregate if bound else None,
        "controller": run.controller.name if ebc else None,
        "delta_star": run.budget.target_kl if ebc else None,
        **schedules_of(run),
    }


def schedules_of(run: RunConfig) -> Schedules:
    """Return the schedules of the learning rate and of the target KL by the columns of tables."""
    run = naming.with_derived_settings(run)  # a warm-up may be given as a share
    return {
        "lr_schedule": run.lr_schedule.name,
        "warmup_steps": naming.warmup_steps(run),
        "delta_schedule": naming.delta_schedule(run),
    }


def track_of(run: RunConfig) -> str:
    """Return the track of a run, `<optimizer>_<projection>`."""
    return f"{run.optimizer.name}_{run.projection.name}"


@dataclass(frozen=True)
class RunSpec:
    """A run that a stage needs. `kind` and `run` alone decide what it computes; the others say what for."""

    stage: str
    role: str  # grid | replicate | control | ebc | none | fixed_tau | overhead | a final's role
    arm: str
    lr_scale: float  # times the track's best baseline learning rate
    run: RunConfig
    kind: str = "train"  # train | overhead | step
    of_track: str = ""  # the track it belongs to, where that is not the one of its own settings

    @property
    def track(self) -> str:
        """Return the track it belongs to, `<optimizer>_<projection>`."""
        return self.of_track or track_of(self.run)

    @property
    def shown_lr_scale(self) -> float | None:
        """Return its LR scale for tables: None in the grid, before whose end there is no best rate."""
        return None if self.role == GRID else self.lr_scale

    @cached_property
    def identity(self) -> dict[str, Any]:
        return naming.identity_of(self.kind, self.run)

    @cached_property
    def names(self) -> tuple[str, str]:
        return naming.names_of(self.kind, self.run)

    @property
    def run_id(self) -> str:
        return self.names[0]

    @property
    def identity_sha256(self) -> str:
        return self.names[1]

    @property
    def cost(self) -> float:
        """Return how much work the run is, see `cost_of`."""
        run = self.run
        return cost_of(run.steps, run.batch_size * run.model.context, run.optimizer.name, run.stabilizer.name)


def cost_of(steps: int, tokens_per_step: int, optimizer: str, stabilizer: str) -> float:
    """Return how much work a run is, to balance workers by: its tokens, with something on top for what EBC
    and Muon add to a step."""
    cost = steps * tokens_per_step * (1.1 if stabilizer != "none" else 1.0)
    return cost * (1.4 if optimizer == "muon" else 1.0)


# -- a track in words ----------------------------------------------------------------------------------------


CHOICES = (groups()["optimizer"], groups()["projection"])
TRACK = re.compile(r"\b(?:{})_(?:{})\b".format(*("|".join(names) for names in CHOICES)))


def optimizer(track: str) -> str:
    """Return a track, `<optimizer>_<projection>`, in words."""
    name, _, projection = track.rpartition("_")
    words = OptimizerConfig.words.get(name, name)
    if projection in ("", "none"):
        return words
    return f"{words} + {ProjectionConfig.words.get(projection, projection)}"


def tracks_in_words(text: str, tracks: Iterable[str] = ()) -> str:
    """Return a sentence with its tracks in words: `Adam: …` for `adam_none: …`. Names of arms and runs, which
    go on behind the track, stay as they are. `tracks`: those of optimizers that are not ours."""
    others = [re.escape(track) for track in tracks]
    text = re.sub(rf"\b(?:{'|'.join(others)})\b", lambda match: optimizer(match[0]), text) if others else text
    return TRACK.sub(lambda match: optimizer(match[0]), text)


def track_prefix(track: str, tracks: Collection[str]) -> str:
    """Return how a sentence about a track begins: with its name in words where there are several."""
    return f"{optimizer(track)}: " if len(tracks) > 1 else ""

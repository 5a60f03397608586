"""What a run is called: a readable slug with its identity's hash, and the name of the arm it belongs to; and
what a track is called in words."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ebc_lab.config.choices import groups
from ebc_lab.config.identity import (
    delta_schedule,
    identity_of,
    names_of,
    number,
    resolved,
    stem_of,
    tail_of,
    warmup_steps,
)
from ebc_lab.config.parts.optimizer import OPTIMIZER
from ebc_lab.config.parts.projection import PROJECTION
from ebc_lab.config.schema import RunConfig

from .decisions import Schedules

GRID = "grid"  # the role of the runs by which the first best rate is found
DIGITS = 6  # of a learning rate, and of its scale: as many as `track_optimizer` keeps


def arm_name(run: RunConfig, lr_scale: float | None, note: str = "") -> str:
    """Return `<optimizer>_<projection>_<stabilizer>[_d<target KL>_<budget>]_x<scale><schedules>`, the
    schedules as `tail_of` spells them: `_lindelta_lrdecay`, `_holddelta_trapezoid_w0`.

    `_x2` is twice the track's best constant rate. Before that is known, `lr_scale` None, the learning rate
    itself is named, `_lr0p004`: an arm's name means one rate wherever it is read.
    """
    rate = f"lr{number(run.optimizer.lr, DIGITS)}" if lr_scale is None else f"x{number(lr_scale, DIGITS)}"
    return f"{stem_of(run)}_{rate}{tail_of(run)}{note}"


def setting_columns(run: RunConfig) -> dict[str, Any]:
    """Name a run's settings as `records.columns` does; None for what has no effect."""
    run = resolved(run)
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
    """Name the learning rate's schedule with its warm-up, and that of the target KL, as tables do."""
    run = resolved(run)  # a warm-up may be given as a share
    return {
        "lr_schedule": run.lr_schedule.name,
        "warmup_steps": warmup_steps(run),
        "delta_schedule": delta_schedule(run),
    }


def track_of(run: RunConfig) -> str:
    """Name the (optimizer, projection) of a run, as `<optimizer>_<projection>`."""
    return f"{run.optimizer.name}_{run.projection.name}"


@dataclass(frozen=True)
class RunSpec:
    """One run that a stage needs. Only `kind` and `run` decide what it computes; the rest says why it is
    there."""

    stage: str
    role: str  # grid | replicate | control | ebc | none | fixed_tau | overhead | a final's role
    arm: str
    lr_scale: float  # times the track's best baseline learning rate
    run: RunConfig
    kind: str = "train"  # train | overhead | step
    of_track: str = ""  # the track it belongs to, where its own settings do not say

    @property
    def track(self) -> str:
        """The (optimizer, projection) it belongs to, as `<optimizer>_<projection>`."""
        return self.of_track or track_of(self.run)

    @property
    def shown_lr_scale(self) -> float | None:
        """Return its LR scale as tables show it: none in a grid, whose rates no best one is known for yet."""
        return None if self.role == GRID else self.lr_scale

    @cached_property
    def identity(self) -> dict[str, Any]:
        return identity_of(self.kind, self.run)

    @cached_property
    def names(self) -> tuple[str, str]:
        return names_of(self.kind, self.run)

    @property
    def run_id(self) -> str:
        return self.names[0]

    @property
    def identity_sha256(self) -> str:
        return self.names[1]

    @property
    def cost(self) -> float:
        """Return relative work of the run, see `cost_of`."""
        run = self.run
        return cost_of(run.steps, run.batch_size * run.model.context, run.optimizer.name, run.stabilizer.name)


def cost_of(steps: int, tokens_per_step: int, optimizer: str, stabilizer: str) -> float:
    """Return relative work, for balancing workers: tokens, with a little more for what EBC and Muon add to a
    step."""
    cost = steps * tokens_per_step * (1.1 if stabilizer != "none" else 1.0)
    return cost * (1.4 if optimizer == "muon" else 1.0)


# -- a track in words ----------------------------------------------------------------------------------------


CHOICES = (groups()["optimizer"], groups()["projection"])
TRACK = re.compile(r"\b(?:{})_(?:{})\b".format(*("|".join(names) for names in CHOICES)))


def optimizer(track: str) -> str:
    """Name a track (optimizer_projection) in words."""
    name, _, projection = track.rpartition("_")
    bound = f" + {PROJECTION.words.get(projection, projection)}" if projection not in ("", "none") else ""
    return OPTIMIZER.words.get(name, name) + bound


def tracks_in_words(text: str, tracks: Iterable[str] = ()) -> str:
    """The tracks that a sentence names in words: `Adam: …` of `adam_none: …`. Names of arms and runs, which
    go on after the track, stay as they are recorded. `tracks`: those of optimizers that are not ours."""
    others = [re.escape(track) for track in tracks]
    text = re.sub(rf"\b(?:{'|'.join(others)})\b", lambda match: optimizer(match[0]), text) if others else text
    return TRACK.sub(lambda match: optimizer(match[0]), text)


def track_prefix(track: str, tracks: Collection[str]) -> str:
    """How a sentence about a track of a suite begins: with its name in words where there are several."""
    return f"{optimizer(track)}: " if len(tracks) > 1 else ""

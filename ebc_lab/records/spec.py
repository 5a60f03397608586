"""A run that a stage needs, the name of the run's arm, and the names of tracks in words."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ebc_lab.config import identity as naming
from ebc_lab.config.choices import groups
from ebc_lab.config.fields import number
from ebc_lab.config.parts.optimizer import OptimizerConfig
from ebc_lab.config.parts.projection import ProjectionConfig
from ebc_lab.config.schema import RunConfig
from ebc_lab.ebc.options import BOUNDED

from .decisions import Schedules

GRID = "grid"  # role of the runs of the initial search for the best learning rate
DIGITS = 6  # significant digits of a learning rate and its scale, as many as `plain_run` keeps


def arm_name(run: RunConfig, lr_scale: float | None, note: str = "") -> str:
    """Return an arm's name, `<optimizer>_<projection>_<stabilizer>[_d<target KL>_<budget>]_x<scale><tail>`,
    followed by `note`. The tail comes from `tail_of`, as in `_lindelta_lrdecay` or `_holddelta_trapezoid_w0`.

    `_x2` means twice the track's best constant rate. Before that rate is known, `lr_scale` is None, and the
    name has the learning rate itself, as in `_lr0p004`. A name therefore always stands for one rate.
    """
    rate = f"lr{number(run.optimizer.lr, DIGITS)}" if lr_scale is None else f"x{number(lr_scale, DIGITS)}"
    return f"{naming.stem_of(run)}_{rate}{naming.tail_of(run)}{note}"


def setting_columns(run: RunConfig) -> dict[str, Any]:
    """Return the values of the settings shown in run tables, by column. A setting that has no effect on this
    run is None."""
    run = naming.with_derived_settings(run)
    ebc = run.stabilizer.name == "ebc"
    bound = ebc and (run.budget.name in BOUNDED or run.budget.sensitivity_every > 0)
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
    """Return the schedules of a run's learning rate and target KL, keyed by the names of table columns."""
    run = naming.with_derived_settings(run)  # a warm-up may be given as a share of the run
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
    """A run that a stage needs. `kind` and `run` say what it computes, the other fields what it is for."""

    stage: str
    role: str  # grid | replicate | control | ebc | none | fixed_tau | overhead | a final's role
    arm: str
    lr_scale: float  # learning rate in units of the track's best baseline rate
    run: RunConfig
    kind: str = "train"  # train | overhead | step
    of_track: str = ""  # its track, if its own settings would give another one

    @property
    def track(self) -> str:
        """Return the track that the run belongs to, `<optimizer>_<projection>`."""
        return self.of_track or track_of(self.run)

    @property
    def shown_lr_scale(self) -> float | None:
        """Return the LR scale for tables; None for runs of the grid, before which no best rate is known."""
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
        """Return an estimate of the run's work (`cost_of`)."""
        run = self.run
        return cost_of(run.steps, run.tokens_per_step, run.optimizer.name, run.stabilizer.name)


def cost_of(steps: int, tokens_per_step: int, optimizer: str, stabilizer: str) -> float:
    """Return an estimate of a run's work, for balancing workers. It is the number of tokens, times a factor
    for the time that EBC and Muon add to a step."""
    cost = steps * tokens_per_step * (1.1 if stabilizer != "none" else 1.0)
    return cost * (1.4 if optimizer == "muon" else 1.0)


# -- a track in words ----------------------------------------------------------------------------------------


CHOICES = (groups()["optimizer"], groups()["projection"])
TRACK = re.compile(r"\b(?:{})_(?:{})\b".format(*("|".join(names) for names in CHOICES)))


def optimizer(track: str) -> str:
    """Return a track, `<optimizer>_<projection>`, in words, such as `Adam + spectral projection`."""
    name, _, projection = track.rpartition("_")
    words = OptimizerConfig.words.get(name, name)
    if projection in ("", "none"):
        return words
    return f"{words} + {ProjectionConfig.words.get(projection, projection)}"


def tracks_in_words(text: str, tracks: Iterable[str] = ()) -> str:
    """Return a sentence with the names of tracks put in words: `Adam: …` for `adam_none: …`. Names of arms
    and runs, which begin with a track, are unchanged. `tracks`: tracks of the user's own optimizers."""
    others = [re.escape(track) for track in tracks]
    text = re.sub(rf"\b(?:{'|'.join(others)})\b", lambda match: optimizer(match[0]), text) if others else text
    return TRACK.sub(lambda match: optimizer(match[0]), text)


def track_prefix(track: str, tracks: Collection[str]) -> str:
    """Return the prefix of a sentence about a track: the track in words, or nothing if it is the only one."""
    return f"{optimizer(track)}: " if len(tracks) > 1 else ""

"""What a run is called: a readable slug with its identity's hash, and the name of the arm it belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ebc_lab.config.identity import digest, identity_of, number, run_id, stem_of, tail_of
from ebc_lab.config.schema import RunConfig


def arm_name(run: RunConfig, lr_scale: float, note: str = "") -> str:
    """`<optimizer>_<projection>_<stabilizer>[_d<target KL>_<budget>]_x<scale><schedules>`, the schedules as
    `tail_of` spells them: `_lindelta_lrdecay`, `_holddelta_trapezoid_w0`."""
    return f"{stem_of(run)}_x{number(lr_scale)}{tail_of(run)}{note}"


@dataclass(frozen=True)
class RunSpec:
    """One run that a stage needs. Only `kind` and `run` decide what it computes; the rest says why it is
    there."""

    stage: str
    role: str  # grid | replicate | control | ebc | none | fixed_tau | overhead | a final's role
    arm: str
    lr_scale: float  # times the track's best baseline learning rate
    run: RunConfig
    kind: str = "train"  # train | overhead
    of_track: str = ""  # the track it belongs to, where its own settings do not say

    @property
    def track(self) -> str:
        """The (optimizer, projection) it belongs to, as `<optimizer>_<projection>`."""
        return self.of_track or f"{self.run.optimizer.name}_{self.run.projection.name}"

    @cached_property
    def identity(self) -> dict[str, Any]:
        return identity_of(self.kind, self.run)

    @cached_property
    def run_id(self) -> str:
        return run_id(self.kind, self.run)

    @cached_property
    def identity_sha256(self) -> str:
        return digest(self.identity)

    @property
    def cost(self) -> float:
        """Relative work of the run, see `cost_of`."""
        run = self.run
        return cost_of(run.steps, run.batch_size * run.model.context, run.optimizer.name, run.stabilizer.name)


def cost_of(steps: int, tokens_per_step: int, optimizer: str, stabilizer: str) -> float:
    """Relative work, for balancing workers: tokens, with a little more for what EBC and Muon add to a
    step."""
    cost = steps * tokens_per_step * (1.1 if stabilizer != "none" else 1.0)
    return cost * (1.4 if optimizer == "muon" else 1.0)

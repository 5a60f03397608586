"""The lab's own loops as the benchmark drives them; all that it uses of `Training`'s internals is here."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import RunConfig
from ebc_lab.ebc import StepInputs, StepStats
from ebc_lab.ebc.options import BOUNDED
from ebc_lab.training.recording import recorded
from ebc_lab.training.run import Training

WARM_STEPS = 20  # EBC may measure three times a step in its first 20
SURROGATE_WARM_STEPS = 101  # past the early sweeps of all groups
PROBE_INTERVAL = 20  # steps between the surrogate's probes


@contextlib.contextmanager
def opened(run: RunConfig, *, bare: bool = False) -> Iterator[Loop]:
    """Open the loop of a run at its first step, in a temporary folder, without what only looks at it. Raise
    what building it raises. `bare`: see `Loop`."""
    run = dataclasses.replace(run, sharpness_every=0)
    with tempfile.TemporaryDirectory(prefix="ebc-lab-bench-") as folder:
        training = Training(run, Path(folder))
        try:
            yield Loop(training, bare=bare)
        finally:
            training.recording.close()


def record_step(training: Training, loss: Tensor, stats: Any) -> None:
    """Record one step: `stats` is what `optimizer.step` returned."""
    lr = float(training.optimizer.param_groups[0]["lr"])
    training.pending.add(lr, {"loss": loss, **recorded(stats)})
    training.record_steps()


def probes(run: RunConfig) -> bool:
    """Whether the run's stabilizer measures sensitivities at some steps, which then cost more than others."""
    return run.stabilizer.name == "ebc" and run.budget.name in BOUNDED


def warm_steps(run: RunConfig) -> int:
    """Return the warm-up steps that timing leaves out."""
    return SURROGATE_WARM_STEPS if probes(run) else WARM_STEPS


def interval(run: RunConfig) -> int:
    """Steps in a whole number of audit and of probe intervals, so that any two such blocks cost alike."""
    return math.lcm(run.audit_every, PROBE_INTERVAL) if probes(run) else run.audit_every


def synchronise(run: RunConfig) -> None:
    """Wait for the GPU, so that a clock read now includes its work."""
    if run.device == "cuda":
        torch.cuda.synchronize()


class Loop:
    """A loop over a Training's model, batches, hooks and optimizer that records nothing.

    `bare` leaves the stabilizer out and steps the base optimizers themselves: no audit, no check.
    """

    def __init__(self, training: Training, *, bare: bool = False):
        self.training = training
        self.bare = bare
        self.run = training.run_config
        self.step_index = 0

    def steps(self, count: int) -> float:
        """Return the seconds for the next `count` steps."""
        start = time.perf_counter()
        for _ in range(count):
            last, _ = self.forward_backward(*self.batch())
            self.update(last)
            self.zero_grad()
        synchronise(self.run)
        return time.perf_counter() - start

    def recorded_steps(self, count: int) -> float:
        """Return the seconds for the next `count` steps as a run takes them: checked, audited and recorded.
        Raise UserError when the run diverges."""
        start = time.perf_counter()
        cause = self.training.advance(count)
        if cause:
            remedy = "choose a smaller optimizer.lr"
            raise UserError(f"the run diverged while it was measured ({cause}): {remedy}.")
        synchronise(self.run)
        return time.perf_counter() - start

    def batch(self) -> tuple[Tensor, Tensor]:
        self.step_index += 1
        return self.training.batches.at(self.step_index - 1)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss whose gradients a step takes, 0-dim."""
        workload = self.training.workload
        with self.training.saving():
            logits, states = workload.forward(self.training.forward, inputs)
            return workload.loss(logits, targets, states, self.step_index - 1)[0]

    def forward_backward(self, inputs: Tensor, targets: Tensor) -> tuple[StepInputs, Tensor]:
        """Return the inputs of `update` and the mean loss, nats per token; the gradients are in place, as the
        run's hooks change them, or with updates inside backward the weights have moved."""
        t = self.step_index - 1 if self.bare else self.training.optimizer.begin_step()
        values, last, _ = self.training.forward_backward(t, inputs, targets, self.run.optimizer.lr)
        return last, values["loss"]

    def update(self, last: StepInputs) -> StepStats | None:
        if not self.bare:
            return self.training.optimizer.take_step(last)
        for base in self.training.optimizer.bases:
            base.step()
        return None

    def zero_grad(self) -> None:
        for base in self.training.optimizer.bases:
            base.zero_grad()

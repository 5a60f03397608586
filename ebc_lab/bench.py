"""Speed and overhead, as paired ratios in one process: the two sides take turns, so a drifting machine hurts both."""

from __future__ import annotations

import math
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import model as models
from . import optimizers, projections, stabilizers
from .config import RunConfig, resolve_controller
from .data import Batches, locate
from .telemetry import write_sealed
from .training import autocast, forward_of, set_up_torch, token_losses

WARM_STEPS = 20  # EBC may measure three times a step in its first 20
SURROGATE_WARM_STEPS = 101  # past the early sweeps of all groups
PROBE_INTERVAL = 20  # steps between the surrogate's probes


class _Side:
    """One of the two loops: the same model, data and base optimizer, with the run's stabilizer or with nothing at all."""

    def __init__(self, run: RunConfig, stabilized: bool, tokens: torch.Tensor, vocabulary: int):
        self.run = run
        self.model = models.build(run.model, vocabulary, run.seed).to(run.device)
        projection = projections.build(self.model, run.projection)
        self.bases = optimizers.build(self.model, run.optimizer)
        self.forward = forward_of(self.model, run)
        self.stabilizer = stabilizers.build(self.model, self.bases, projection, run, self.forward) if stabilized else None
        self.batches = Batches(tokens, run.batch_size, run.model.context, run.seed)
        self.step_index = 0

    def steps(self, count: int) -> float:
        """Seconds for the next `count` steps."""
        start = time.perf_counter()
        for _ in range(count):
            inputs, targets = self.batches.at(self.step_index)
            self.step_index += 1
            with autocast(self.run):
                logits = self.forward(inputs)
            token_losses(logits, targets).mean().backward()
            if self.stabilizer is not None:
                self.stabilizer.step(inputs, logits, targets=targets)
            else:
                for base in self.bases:
                    base.step()
            for base in self.bases:
                base.zero_grad()
        if self.run.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def paired_overhead(run: RunConfig, on_progress: Callable[[int], None] = lambda step: None) -> dict[str, Any]:
    """What the run's stabilizer adds to a step, in per cent of the plain step, audits included.

    Blocks of whole audit and probe intervals, plain and stabilized in turn, the order swapped each time; `run.steps` steps a
    side, the warm-up's many measurements left out. The median over block pairs and its quartiles.
    """
    run = resolve_controller(run)
    set_up_torch(run)
    corpus = locate(run.data, quiet=True)
    tokens = torch.from_numpy(corpus.tokens()["train"]).to(run.device)
    sides = [_Side(run, stabilized, tokens, len(corpus.vocabulary)) for stabilized in (False, True)]
    probing = run.budget.name in ("surrogate", "calibrated")
    warm = SURROGATE_WARM_STEPS if probing else WARM_STEPS
    block = math.lcm(run.audit_every, PROBE_INTERVAL) if probing else run.audit_every
    for side in sides:
        side.steps(warm)
    ratios, rates = [], []
    for i in range(max(2, (run.steps - WARM_STEPS) // block)):
        on_progress(i * block)
        order = (0, 1) if i % 2 else (1, 0)
        took = {k: sides[k].steps(block) for k in order}
        ratios.append(100 * (took[1] / took[0] - 1))
        rates.append(block / took[0])
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "overhead_pct": statistics.median(ratios),
        "overhead_iqr_pct": [low, high],
        "pairs": len(ratios),
        "plain_steps_per_s": statistics.median(rates),
    }


def overhead_and_record(
    run: RunConfig,
    directory: Path,
    run_id: str,
    identity: str,
    on_progress: Callable[[int], None] = lambda step: None,
) -> None:
    """Measure and write `result.json` under the measurement's identity; a failure is recorded as one."""
    started = time.perf_counter()
    try:
        result: dict[str, Any] = {"outcome": "completed", "cause": None, **paired_overhead(run, on_progress)}
    except Exception as error:
        with open(directory / "log.txt", "a") as f:
            f.write(traceback.format_exc())
        result = {"outcome": "failed", "cause": f"{type(error).__name__}: {error}"}
    about = {"run_id": run_id, "identity": identity, "steps": run.steps, "wall_s": time.perf_counter() - started}
    write_sealed(directory / "result.json", {**about, **result})

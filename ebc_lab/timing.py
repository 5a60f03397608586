"""What a training step takes, in a process made for it: `python -m ebc_lab.timing`, as `speeds.py` starts it (DESIGN: speed).

Random tokens of a vocabulary of 65; the plain optimizer. The first line of the standard input is the run. Then, for each
measurement, a line with threads and dtype, answered with `ready` after a step that is not counted, and a line with how long,
answered with the median seconds of a step: so that several such processes can be let off together. With the argument
`compile` there is one answer, what `torch.compile` costs and gains.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from contextlib import nullcontext
from typing import Any

import torch

from . import model as models
from . import optimizers
from .config import RunConfig, from_dict
from .training import autocast, forward_of, set_up_torch, token_losses

VOCABULARY = 65
MOST_STEPS = 40  # of a measurement, however short a step is
COMPILED_PAIRS = 12  # steps each way, in turn


class Stand:
    """A model and its optimizer at the run's shape; `step` trains once and says how long it took."""

    def __init__(self, run: RunConfig):
        self.run = run
        self.device = torch.device(run.device)
        set_up_torch(run)
        self.tokens = torch.randint(0, VOCABULARY, (run.batch_size, run.model.context + 1), device=self.device)
        self.model = models.build(run.model, VOCABULARY, 0).to(self.device, getattr(torch, run.param_dtype))
        self.forward: torch.nn.Module = self.model
        self.bases = optimizers.build(self.model, run.optimizer)

    def step(self) -> float:
        """Seconds of one training step."""
        start = time.perf_counter()
        with autocast(self.run):
            logits = self.forward(self.tokens[:, :-1])
        token_losses(logits, self.tokens[:, 1:]).mean().backward()
        for base in self.bases:
            base.step()
            base.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def block(self, seconds: float) -> float:
        """Median seconds of a step over about so many seconds."""
        end = time.perf_counter() + seconds
        taken: list[float] = []
        while not taken or (time.perf_counter() < end and len(taken) < MOST_STEPS):
            taken.append(self.step())
        return statistics.median(taken)


def serve(run: RunConfig) -> None:
    """Measure as the lines of the standard input ask, until it closes."""
    stands: dict[str, Stand] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if "threads" in asked:
            shape = dataclasses.replace(run, threads_per_run=asked["threads"], dtype=asked["dtype"])
            if shape.dtype not in stands:
                stands[shape.dtype] = Stand(shape)
            stand = stands[shape.dtype]
            set_up_torch(shape)
            stand.step()
            print("ready", flush=True)
        else:
            print(json.dumps(stand.block(asked["seconds"])), flush=True)


def compiling(run: RunConfig) -> dict[str, Any]:
    """Seconds until a run's three compiled shapes (step, probe rows, audited rows) are there, and a step's ms either way."""
    stand = Stand(run)
    for _ in range(2):
        stand.step()
    compiled = forward_of(stand.model, dataclasses.replace(run, compile="on"))
    start = time.perf_counter()
    stand.forward = compiled
    stand.step()
    stand.model.eval()
    audited = -(-run.audit_tokens // run.model.context)
    low = run.dtype == "bfloat16"
    for rows in {run.budget.probe_sequences, min(run.batch_size - run.budget.probe_sequences, audited)}:
        context = torch.autocast(run.device, torch.bfloat16, cache_enabled=False) if low else nullcontext()
        with torch.no_grad(), context:
            compiled(stand.tokens[:rows, :-1])
    stand.model.train()
    seconds = time.perf_counter() - start
    taken: dict[str, list[float]] = {"eager": [], "compiled": []}
    for _ in range(COMPILED_PAIRS):
        for how, forward in (("eager", stand.model), ("compiled", compiled)):
            stand.forward = forward
            taken[how].append(stand.step())
    ms = {f"{how}_ms": 1e3 * statistics.median(t) for how, t in taken.items()}
    return {"compile_s": seconds, **ms}


if __name__ == "__main__":
    asked_run: RunConfig = from_dict(RunConfig, json.loads(sys.stdin.readline()))
    if sys.argv[1:] == ["compile"]:
        print(json.dumps(compiling(asked_run)))
    else:
        serve(asked_run)

"""What a training step takes, measured in a process made for it: `python -m ebc_lab.bench.step_timer`, for `speeds.py` (DESIGN: speed).

Random tokens of a vocabulary of 65; the plain optimizer. The standard input holds `run` and either `cases`, answered with the
steps/s of each, or nothing else, answered with what `torch.compile` costs and gains.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from multiprocessing.connection import Connection
from typing import Any

import torch

from ebc_lab.components import optimizers
from ebc_lab.config.dicts import from_dict
from ebc_lab.config.schema import RunConfig
from ebc_lab.training.process import forward_of, set_up_torch
from ebc_lab.workloads import gpt
from ebc_lab.workloads.losses import autocast, token_losses

Case = tuple[int, int, str]  # threads of each process, processes at once, dtype
VOCABULARY = 65
BLOCK_S = 0.3  # of one measurement
MOST_STEPS = 40  # of one measurement, however short a step is
ROUNDS = 3  # measurements of each case
ENOUGH_S = 8.0  # after which no further round is begun
COMPILED_PAIRS = 12  # steps each way, in turn


class Stand:
    """A model and its optimizer at the run's shape; `step` trains once and says how long it took."""

    def __init__(self, run: RunConfig):
        self.run = run
        self.device = torch.device(run.device)
        set_up_torch(run)
        self.tokens = torch.randint(
            0, VOCABULARY, (run.batch_size, run.model.context + 1), device=self.device
        )
        self.model = gpt.build(run.model, VOCABULARY, 0).to(self.device, getattr(torch, run.param_dtype))
        self.forward: torch.nn.Module = self.model
        self.bases = optimizers.build(self.model, run.optimizer, gpt.hidden_matrices(self.model))

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


def rates(run: RunConfig, cases: Sequence[Case]) -> list[float]:
    """Steps/s of each case, its processes together: medians of rounds in which all cases take turns.

    The processes are forks of this one, which has imported torch and computed nothing. Raises EOFError when one dies.
    """
    forks = multiprocessing.get_context("fork" if hasattr(os, "fork") else None)
    count = max(processes for _, processes, _ in cases)
    pipes = [forks.Pipe() for _ in range(count)]
    children = [forks.Process(target=_serve, args=(pipe[1], run, os.getpid()), daemon=True) for pipe in pipes]
    for child, pipe in zip(children, pipes, strict=True):
        child.start()
        pipe[1].close()
    taken: list[list[float]] = [[] for _ in cases]
    begun = time.perf_counter()
    for nth in range(ROUNDS):
        if nth and time.perf_counter() - begun > ENOUGH_S:
            break
        for case, found in zip(cases, taken, strict=True):
            asked = [pipe[0] for pipe in pipes[: case[1]]]
            for order in (
                (case[0], case[2]),
                BLOCK_S,
            ):  # a step that is not counted, then all let off together
                for connection in asked:
                    connection.send(order)
                answers = [connection.recv() for connection in asked]
            found.append(sum(1 / seconds for seconds in answers))
    return [statistics.median(found) for found in taken]


def _serve(connection: Connection, run: RunConfig, parent: int) -> None:
    """Measure as asked, while the process that asks lives."""
    stands: dict[str, Stand] = {}
    stand: Stand | None = None
    while True:
        while not connection.poll(1.0):
            if os.getppid() != parent:
                return
        order = connection.recv()
        if isinstance(order, tuple):
            shape = dataclasses.replace(run, threads_per_run=order[0], dtype=order[1])
            stand = stands[shape.dtype] = stands.get(shape.dtype) or Stand(shape)
            set_up_torch(shape)
            stand.step()
            connection.send(None)
        else:
            assert stand is not None
            connection.send(stand.block(order))


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
    asked = json.load(sys.stdin)
    shape: RunConfig = from_dict(RunConfig, asked["run"])
    try:
        print(json.dumps(rates(shape, asked["cases"]) if "cases" in asked else compiling(shape)))
    except EOFError:
        sys.exit(1)  # the process that died has said why

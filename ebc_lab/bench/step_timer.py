"""What a training step takes, measured for `speeds` as `python -m ebc_lab.bench.step_timer`.

Trains on random tokens with the plain optimizer. The standard input holds `run`, and either `cases`, which
are answered with the steps/s of each, or nothing else, which is answered with what `torch.compile` costs and
gains.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ebc_lab.components import numerics_of
from ebc_lab.config.dicts import from_dict
from ebc_lab.config.parts import PARTS
from ebc_lab.config.schema import RunConfig
from ebc_lab.training.process import forward_of, set_up_torch
from ebc_lab.training.run import Training
from ebc_lab.workloads.corpus import Corpus

from .loops import Loop, synchronise
from .speeds import Case

VOCABULARY = 65  # characters; other tokens are taken for as many
TEXT = 200_000  # characters, at least
BLOCK_S = 0.3  # of one measurement
MAX_STEPS = 40  # of one measurement, however short a step is
ROUNDS = 3  # measurements of each case
GRAPHED_STEPS = 50  # between two looks at the clock, where steps come from CUDA graphs: as in a run
ENOUGH_S = 8.0  # after which no further round begins
COMPILED_PAIRS = 12  # steps each way, in turns
# settings of a run that a rate is not kept by
LEFT_OUT = (
    *(
        "accumulate",
        "sharpness_every",
        "tokens",
        "lr_schedule",
        "projection",
        "stabilizer",
        "budget",
        "controller",
    ),
    *(part.group_name for part in PARTS if not part.timed),
)


def random_text(run: RunConfig) -> Corpus:
    """Characters that say nothing, enough for the run's windows."""
    length = max(TEXT, 100 * run.model.context, 40 * run.ebm.splats)
    drawn = torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(0))
    text = "".join(map(chr, (drawn + ord(" ")).tolist()))
    return Corpus("random", "random characters", "", text, "0" * 64)


class StepTimer:
    """A run's step at its shape, with the plain optimizer; `step` trains once and returns how long that took.

    What says when a step does something, as a schedule does, is left out. On a GPU `block` times the steps
    as a run takes them, from CUDA graphs where it does: eagerly it would time the host, which launches every
    kernel, and of two precisions choose the one with fewer kernels.
    """

    def __init__(self, run: RunConfig, folder: Path):
        plain = {name: getattr(RunConfig(), name) for name in LEFT_OUT}
        corpus = random_text(run)
        data = dataclasses.replace(run.data, sha256=corpus.sha256)
        run = dataclasses.replace(run, compile="off", data=data, **plain)
        if run.device == "cuda":
            enough = (1 + MAX_STEPS) * (1 + ROUNDS) * GRAPHED_STEPS
            run = dataclasses.replace(run, audit_every=0, steps=max(run.steps, enough))
        self.run = run
        make = numerics_of(run).workloads[run.workload.name]
        folder.mkdir(parents=True, exist_ok=True)
        workload = make(run, corpus, torch.device(run.device))
        self.training = Training(run, folder, workload=workload)
        self.loop = Loop(self.training, bare=True)
        synchronise(run)

    def step(self) -> float:
        """Return the seconds of one training step."""
        return self.loop.steps(1)

    def block(self) -> float:
        """Return the median seconds of a step over about BLOCK_S seconds."""
        step = self.step
        if self.training.graphs is not None:
            self._graphed()  # the graph is captured
            step = self._graphed
        end = time.perf_counter() + BLOCK_S
        taken: list[float] = []
        while not taken or (time.perf_counter() < end and len(taken) < MAX_STEPS):
            taken.append(step())
        return statistics.median(taken)

    def _graphed(self) -> float:
        """Return the seconds of one of GRAPHED_STEPS recorded steps."""
        return self.loop.recorded_steps(GRAPHED_STEPS) / GRAPHED_STEPS


def rates(run: RunConfig, cases: Sequence[Case]) -> list[float]:
    """Steps/s of each case, its processes together: medians of rounds in which all cases take turns.

    The processes are forks of this one, which has computed nothing yet. Raises EOFError when one dies.
    """
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else None)
    connections: list[Connection] = []
    measured: list[list[float]] = [[] for _ in cases]
    with tempfile.TemporaryDirectory(prefix="ebc-lab-bench-") as folder:
        for nth in range(max(processes for _, processes, _ in cases)):
            ours, theirs = context.Pipe()
            arguments = (theirs, run, os.getpid(), Path(folder) / str(nth))
            context.Process(target=_serve, args=arguments, daemon=True).start()
            theirs.close()
            connections.append(ours)
        begun = time.perf_counter()
        for nth in range(ROUNDS):
            if nth and time.perf_counter() - begun > ENOUGH_S:
                break
            for (threads, processes, dtype), of_case in zip(cases, measured, strict=True):
                used = connections[:processes]
                _ask(used, (threads, dtype))  # every process is ready before any is timed
                of_case.append(sum(1 / seconds for seconds in _ask(used, None)))
    return [statistics.median(of_case) for of_case in measured]


def _ask(connections: Sequence[Connection], order: tuple[int, str] | None) -> list[float]:
    for connection in connections:
        connection.send(order)
    return [connection.recv() for connection in connections]


def _serve(connection: Connection, run: RunConfig, parent: int, folder: Path) -> None:
    """Answer the parent while it lives: (threads, dtype) sets up and takes a step, None times a block."""
    timers: dict[str, StepTimer] = {}
    dtype = ""
    while os.getppid() == parent:
        if not connection.poll(1.0):
            continue
        order = connection.recv()
        if order is None:
            connection.send(timers[dtype].block())
            continue
        threads, dtype = order
        shape = dataclasses.replace(run, threads_per_run=threads, dtype=dtype)
        if dtype not in timers:
            timers[dtype] = StepTimer(shape, folder / dtype)
        set_up_torch(shape)
        connection.send(timers[dtype].step())


def compiling(run: RunConfig) -> dict[str, Any]:
    """Return the seconds to compile a run's three shapes (step, probe, audit), anew and from the cache on
    disk, and the ms of a step either way."""
    with tempfile.TemporaryDirectory(prefix="ebc-lab-bench-") as folder:
        timer = StepTimer(run, Path(folder))
    training = timer.training
    for _ in range(2):
        timer.step()
    compiled, first_s = _compiled(run, timer)
    torch._dynamo.reset()  # as in another process: nothing but the cache on disk is left
    compiled, again_s = _compiled(run, timer)
    took: dict[str, list[float]] = {"eager": [], "compiled": []}
    for _ in range(COMPILED_PAIRS):
        for how, forward in (("eager", training.model), ("compiled", compiled)):
            training.trained = forward
            took[how].append(timer.step())
    ms = {f"{how}_ms": 1e3 * statistics.median(seconds) for how, seconds in took.items()}
    return {"compile_s": first_s, "again_s": again_s, **ms}


def _compiled(run: RunConfig, timer: StepTimer) -> tuple[nn.Module, float]:
    """Return the compiled model, called once with each of its shapes, and the seconds that took."""
    training = timer.training
    compiled = forward_of(training.model, dataclasses.replace(run, compile="on"))
    start = time.perf_counter()
    training.trained = compiled
    timer.step()
    training.model.eval()
    tokens, _ = timer.loop.batch()
    audited = -(-run.audit_tokens // run.model.context)
    low = run.dtype == "bfloat16"
    for rows in {run.budget.probe_sequences, min(run.batch_size - run.budget.probe_sequences, audited)}:
        context = torch.autocast(run.device, torch.bfloat16, cache_enabled=False) if low else nullcontext()
        with torch.no_grad(), context:
            compiled(tokens[:rows])
    training.model.train()
    return compiled, time.perf_counter() - start


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    shape: RunConfig = from_dict(RunConfig, asked["run"])
    try:
        print(json.dumps(rates(shape, asked["cases"]) if "cases" in asked else compiling(shape)))
    except EOFError:
        sys.exit(1)  # the process that died has printed why

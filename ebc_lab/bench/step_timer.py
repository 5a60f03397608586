"""What a training step takes, measured for `speeds` in a process of its own (`child.Child`).

Trains on random tokens with the plain optimizer. A request has the `run` and `what` is wanted: `step`, the
seconds of one step, for which everything is built if necessary; `block`, the median seconds of a step; or
`compiling`, what `torch.compile` costs and gains.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
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
from .speeds import ROUNDS

VOCABULARY = 65  # characters; other tokens are taken for as many
TEXT = 200_000  # characters, at least
BLOCK_S = 0.3  # of one measurement
MAX_STEPS = 40  # of one measurement, however short a step is
GRAPHED_STEPS = 50  # between two looks at the clock, where steps come from CUDA graphs: as in a run
COMPILED_PAIRS = 12  # steps each way, in turns
# settings of a run that a rate does not depend on
LEFT_OUT = ["accumulate", "sharpness_every", "tokens", "lr_schedule", "projection"]
LEFT_OUT += ["stabilizer", "budget", "controller"]
LEFT_OUT += [part.group_name for part in PARTS if not part.timed]


def random_text(run: RunConfig) -> Corpus:
    """Return a text of random characters, long enough for the run's windows."""
    length = max(TEXT, 100 * run.model.context, 40 * run.ebm.splats)
    characters = torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(0))
    text = "".join(map(chr, (characters + ord(" ")).tolist()))
    return Corpus("random", "random characters", "", text, "0" * 64)


class StepTimer:
    """A run's step at its shape, with the plain optimizer; `step` trains once and returns how long that took.

    What says when a step does something, as a schedule does, is left out. On a GPU `block` times the steps
    as a run takes them, from CUDA graphs where it does: eagerly it would time the host, which launches every
    kernel, and of two precisions choose the one with fewer kernels.
    """

    def __init__(self, run: RunConfig):
        plain = {name: getattr(RunConfig(), name) for name in LEFT_OUT}
        corpus = random_text(run)
        data = dataclasses.replace(run.data, sha256=corpus.sha256)
        run = dataclasses.replace(run, compile="off", data=data, **plain)
        if run.device == "cuda":
            enough = (1 + MAX_STEPS) * (1 + ROUNDS) * GRAPHED_STEPS
            run = dataclasses.replace(run, audit_every=0, steps=max(run.steps, enough))
        self.run = run
        make = numerics_of(run).workloads[run.workload.name]
        workload = make(run, corpus, torch.device(run.device))
        self.folder = tempfile.TemporaryDirectory(prefix="ebc-lab-bench-")
        self.training = Training(run, Path(self.folder.name), workload=workload)
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


def compiling(run: RunConfig) -> dict[str, Any]:
    """Return the seconds to compile a run's three shapes, anew and from disk, and a step's ms either way."""
    timer = StepTimer(run)
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


def main() -> None:
    """Greet with `null`; answer each line of standard input on standard output, where nothing else goes."""
    timers: dict[str, StepTimer] = {}
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        print(json.dumps(None), file=answers, flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            run: RunConfig = from_dict(RunConfig, request["run"])
            if request["what"] == "compiling":
                answer: Any = compiling(run)
            else:
                if run.dtype not in timers:
                    timers[run.dtype] = StepTimer(run)
                set_up_torch(run)
                timer = timers[run.dtype]
                answer = timer.step() if request["what"] == "step" else timer.block()
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

"""What a run costs in addition to its steps, and how close a step comes to the machine's peak FLOP/s."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ebc_lab.config.errors import UserError
from ebc_lab.config.parts.memory import MemoryConfig
from ebc_lab.config.parts.stabilizer import StabilizerConfig
from ebc_lab.config.schema import RunConfig
from ebc_lab.records.paths import RunFiles
from ebc_lab.workloads.losses import evaluate

from . import flops
from .loops import WARM_STEPS, Loop, opened, synchronise
from .pairs import Effort, spread

COMMANDS = {
    "help_s": ("from ebc_lab.cli import main; main()", "--help"),
    # what a worker imports before its first run
    "worker_import_s": ("import ebc_lab.study.launch.worker, ebc_lab.training.run",),
}
SIZES = {"cpu": (256, 512, 1024), "cuda": (2048, 4096, 8192)}  # of square matrices
QUICK_SIZES = (64, 128)
STEPS, QUICK_STEPS = 40, 3  # of the run whose fixed costs are measured


def seconds_of(run: RunConfig, call: Callable[..., object], *arguments: object) -> float:
    """Seconds that a call takes, the GPU's part included."""
    synchronise(run)
    start = time.perf_counter()
    call(*arguments)
    synchronise(run)
    return time.perf_counter() - start


# -- fixed costs ---------------------------------------------------------------------------------------------


def start_up(repeats: int) -> dict[str, Any]:
    """Seconds of complete processes, from start to exit. Raises UserError when one fails."""
    seconds = {}
    for name, (program, *arguments) in COMMANDS.items():
        command = [sys.executable, "-c", program, *arguments]
        taken = []
        for _ in range(repeats):
            start = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            taken.append(time.perf_counter() - start)
            if done.returncode:
                message = done.stderr.strip().splitlines() or ["no message"]
                raise UserError(f"{name} cannot be measured: {message[-1]}")
        seconds[name] = spread(taken)
    return seconds


def fixed_costs(run: RunConfig, effort: Effort) -> dict[str, Any]:
    """Return the seconds, as spreads of `effort.rounds` measurements, of what starting the lab costs and what
    a short run without stabilizer costs in addition to its steps.

    `finish_s` is the end of a run without its evaluation: reading and summarising the rows of its steps.
    """
    steps, repeats = QUICK_STEPS if effort.quick else STEPS, effort.rounds
    short = dataclasses.replace(run, steps=steps, evaluate=[], stabilizer=StabilizerConfig())
    names = ("build_s", "evaluate_val_s", "evaluate_test_s", "checkpoint_s", "finish_s")
    taken: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats):
        start = time.perf_counter()
        with opened(short) as loop:
            training = loop.training
            synchronise(run)
            taken["build_s"].append(time.perf_counter() - start)
            loop.recorded_steps(steps)
            for split in ("val", "test"):
                batches = training.workload.held_out(split)
                seconds = seconds_of(run, evaluate, training.model, run, batches)
                taken[f"evaluate_{split}_s"].append(seconds)
            taken["checkpoint_s"].append(seconds_of(run, training.save_checkpoint))
            taken["finish_s"].append(seconds_of(run, training.run))
            checkpoint = RunFiles(training.directory).checkpoint.stat().st_size
    costs: dict[str, Any] = {name: spread(values) for name, values in taken.items()}
    return {**start_up(repeats), **costs, "steps": steps, "checkpoint_bytes": checkpoint, "repeats": repeats}


# -- arithmetic ----------------------------------------------------------------------------------------------


def step_flops(model: nn.Module, run: RunConfig) -> dict[str, float]:
    """Return `flops.step_flops` of the elements of a model's `nn.Linear` weights and of a run's shape."""
    shape = run.model
    elements = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    tokens = run.batch_size * shape.context
    return flops.step_flops(elements, shape.blocks, shape.context, shape.width, tokens)


def matmul_peak(run: RunConfig, sizes: Sequence[int], repeats: int) -> dict[str, float]:
    """FLOP/s of the best square product (2·n³ operations) by size n, in the run's precision."""
    rates = {}
    for n in sizes:
        a, b = (torch.randn(n, n, device=run.device).to(getattr(torch, run.dtype)) for _ in range(2))
        torch.mm(a, b)
        best = min(seconds_of(run, torch.mm, a, b) for _ in range(repeats))
        rates[str(n)] = 2.0 * n**3 / best
    return rates


def passes(loop: Loop, count: int) -> list[float]:
    """Return the seconds of each of `count` forward and backward passes.

    Where the run's steps come from CUDA graphs they are replays of one: eagerly the clock would show how fast
    the host launches kernels.
    """
    if loop.training.graphs is not None:
        synchronise(loop.run)
        with torch.cuda.stream(loop.training.stream):
            batch = loop.batch()
            loop.forward_backward(*batch)  # what is initialised on this stream, before the capture
            loop.zero_grad()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=loop.training.stream):
                loop.forward_backward(*batch)
        return [seconds_of(loop.run, graph.replay) for _ in range(count)]
    taken = []
    for _ in range(count):
        taken.append(seconds_of(loop.run, loop.forward_backward, *loop.batch()))
        loop.zero_grad()
    return taken


def compute(run: RunConfig, effort: Effort) -> dict[str, Any]:
    """Return the FLOP/s of `effort.rounds` forward and backward passes, the machine's peak, and the ratio."""
    sizes = QUICK_SIZES if effort.quick else SIZES[run.device]
    repeats = 2 if effort.quick else 5
    plain = dataclasses.replace(run, stabilizer=StabilizerConfig(), memory=MemoryConfig())
    with opened(plain, bare=True) as loop:
        loop.steps(min(WARM_STEPS, effort.rounds))
        # before and after the passes, so that a machine that is busy for a while does not lower the peak
        before = matmul_peak(run, sizes, repeats)
        taken = passes(loop, effort.rounds)
        after = matmul_peak(run, sizes, repeats)
        of_step = step_flops(loop.training.model, run)
    peaks = {n: max(before[n], after[n]) for n in before}
    achieved = spread([of_step["total"] / s for s in taken])
    peak = max(peaks.values())
    return {
        "dtype": run.dtype,
        "threads": run.threads_per_run,
        "flops_per_step": of_step,
        "forward_backward_ms": spread([1e3 * s for s in taken]),
        "achieved_flops_per_s": achieved,
        "matmul_flops_per_s": peaks,
        "peak_flops_per_s": peak,
        "share_of_peak_pct": 100 * achieved["median"] / peak,
    }

"""What is paid once a command or once a run, beside its steps: start-up, building, evaluating, checkpoint, finishing."""

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
from ebc_lab.config.schema import RunConfig, StabilizerConfig
from ebc_lab.records.paths import RunFiles
from ebc_lab.workloads.batches import windows
from ebc_lab.workloads.losses import evaluate

from .loops import WARM_STEPS, Loop, opened, synchronise, take_steps
from .pairs import spread

COMMANDS = {
    "help_s": ("from ebc_lab.cli import main; main()", "--help"),  # `ebc-lab --help`
    "worker_import_s": (
        "import ebc_lab.study.launch.worker, ebc_lab.training.run",
    ),  # what a worker waits for before its first run
}


def timed(run: RunConfig, call: Callable[[], Any]) -> float:
    """Seconds that a call takes, the GPU's part included."""
    synchronise(run)
    start = time.perf_counter()
    call()
    synchronise(run)
    return time.perf_counter() - start


def start_up(repeats: int) -> dict[str, Any]:
    """Seconds of whole processes of this Python, from nothing to their end. Raises UserError when one fails."""
    found = {}
    for name, (program, *arguments) in COMMANDS.items():
        taken = []
        for _ in range(repeats):
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
            )
            taken.append(time.perf_counter() - start)
            if done.returncode:
                raise UserError(
                    f"{name} cannot be measured: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
                )
        found[name] = spread(taken)
    return found


def fixed_costs(run: RunConfig, steps: int, repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Seconds, each the median of `repeats`, of what a run without stabilizer does beside its `steps` steps.

    `finish_s` is the end of a run with its evaluation left out: reading back the steps' rows and summing them up.
    """
    say("start-up and what a run costs beside its steps")
    short = dataclasses.replace(run, steps=steps, evaluate=[], stabilizer=StabilizerConfig())
    taken: dict[str, list[float]] = {
        k: [] for k in ("build_s", "evaluate_val_s", "evaluate_test_s", "checkpoint_s", "finish_s")
    }
    for _ in range(repeats):
        start = time.perf_counter()
        with opened(short) as training:
            synchronise(run)
            taken["build_s"].append(time.perf_counter() - start)
            take_steps(training, steps)
            for split in ("val", "test"):
                whole = windows(training.tokens[split], run.model.context)
                seconds = timed(run, lambda whole=whole: evaluate(training.model, run, whole))  # type: ignore[misc]
                taken[f"evaluate_{split}_s"].append(seconds)
            taken["checkpoint_s"].append(timed(run, training.save_checkpoint))
            taken["finish_s"].append(timed(run, training.run))
            checkpoint = RunFiles(training.directory).checkpoint.stat().st_size
    costs: dict[str, Any] = {name: spread(values) for name, values in taken.items()}
    return {**start_up(repeats), **costs, "steps": steps, "checkpoint_bytes": checkpoint, "repeats": repeats}


SIZES = {"cpu": (256, 512, 1024), "cuda": (2048, 4096, 8192)}
QUICK_SIZES = (64, 128)


def step_flops(model: nn.Module, run: RunConfig) -> dict[str, float]:
    """Floating-point operations of one forward and backward on B sequences of T tokens, counted from the shapes.

    * matrices: 6·P·B·T. P are the elements of the `nn.Linear` weights; each token costs 2 operations an element forwards and 4
      backwards. Embeddings are look-ups and cost none; norms, GELU, softmax and the loss are left out.
    * attention: 12·L·T·d·B·T. In each of L layers the scores and their product with the values are 2·T·d operations a token
      each, 4·T·d forwards, twice that backwards. The whole T × T square is counted, as is usual; a kernel that skips
      the masked half does half of it.
    """
    tokens = run.batch_size * run.model.context
    elements = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    matrices = 6.0 * elements * tokens
    attention = 12.0 * run.model.blocks * run.model.context * run.model.width * tokens
    return {"matrices": matrices, "attention": attention, "total": matrices + attention}


def matmul_peak(run: RunConfig, sizes: Sequence[int], repeats: int) -> dict[str, float]:
    """FLOP/s of the best square product A·B (2·n³ operations) by size n, in the run's precision, on its threads."""
    found = {}
    for n in sizes:
        a, b = (torch.randn(n, n, device=run.device).to(getattr(torch, run.dtype)) for _ in range(2))
        torch.mm(a, b)
        best = float("inf")
        for _ in range(repeats):
            synchronise(run)
            start = time.perf_counter()
            torch.mm(a, b)
            synchronise(run)
            best = min(best, time.perf_counter() - start)
        found[str(n)] = 2.0 * n**3 / best
    return found


def compute(run: RunConfig, steps: int, quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """FLOP/s over `steps` forward and backward passes (median and quartiles), the machine's peak, and the share of it."""
    say("FLOP/s against the machine's matrix products")
    sizes, repeats = (QUICK_SIZES, 2) if quick else (SIZES[run.device], 5)
    with opened(dataclasses.replace(run, stabilizer=StabilizerConfig())) as training:
        loop = Loop(training, bare=True)
        loop.steps(min(WARM_STEPS, steps))
        before = matmul_peak(run, sizes, repeats)
        taken = []
        for _ in range(steps):
            batch = loop.batch()
            synchronise(run)
            start = time.perf_counter()
            loop.forward_backward(*batch)
            synchronise(run)
            taken.append(time.perf_counter() - start)
            loop.zero_grad()
        after = matmul_peak(
            run, sizes, repeats
        )  # around the passes: a machine that was busy for either shows
        flops = step_flops(training.model, run)
    peaks = {n: max(before[n], after[n]) for n in before}
    achieved = spread([flops["total"] / s for s in taken])
    peak = max(peaks.values())
    return {
        "dtype": run.dtype,
        "threads": run.threads_per_run,
        "flops_per_step": flops,
        "forward_backward_ms": spread([1e3 * s for s in taken]),
        "achieved_flops_per_s": achieved,
        "matmul_flops_per_s": peaks,
        "peak_flops_per_s": peak,
        "share_of_peak_pct": 100 * achieved["median"] / peak,
    }

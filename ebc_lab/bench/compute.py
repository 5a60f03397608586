"""Achieved FLOP/s of forward and backward, against the matrix products that this machine can do at best."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ebc_lab.config.schema import RunConfig, StabilizerConfig

from .loops import WARM_STEPS, Loop, opened, synchronise
from .pairs import spread

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
        after = matmul_peak(run, sizes, repeats)  # around the passes: a machine that was busy for either shows
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

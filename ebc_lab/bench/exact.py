"""What exact training costs: paired ratios of steps as a run takes them, in one process, and memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ebc_lab.components.determinism import Verity
from ebc_lab.config.choices import changed
from ebc_lab.config.parts.determinism import DeterminismConfig
from ebc_lab.config.parts.lr_schedule import LRScheduleConfig
from ebc_lab.config.parts.memory import MemoryConfig
from ebc_lab.config.parts.optimizer import OptimizerConfig
from ebc_lab.config.parts.projection import ProjectionConfig
from ebc_lab.config.parts.stabilizer import StabilizerConfig
from ebc_lab.config.schema import RunConfig
from ebc_lab.verity.engine import engine_name

from .loops import Loop, opened
from .pairs import steps_compared

PLAIN = "float32"


def exact_steps(run: RunConfig, rounds: int, limit_s: float, say: Callable[[str], None]) -> dict[str, Any]:
    """`compared`: seconds of a step under determinism=verity over those of a plain float32 step, all taking
    turns, `rounds` each or fewer in `limit_s` seconds. `bytes_per_weight`: what is held beside those of plain
    training while a step is under way."""
    say("exact training against the plain step")
    plain = dataclasses.replace(
        run,
        dtype="float32",
        compile="off",
        accumulate=1,
        optimizer=OptimizerConfig(
            lr=run.optimizer.lr if run.optimizer.name == "adam" else OptimizerConfig.lr
        ),
        lr_schedule=LRScheduleConfig(),
        projection=ProjectionConfig(),
        stabilizer=StabilizerConfig(),
        memory=MemoryConfig(),
        determinism=DeterminismConfig(),
    )
    engines = ("c", "eager") if engine_name(run.device) == "c" else ("eager",)
    runs = {PLAIN: plain}
    for engine in engines:
        runs[f"verity, {engine}"] = changed(plain, {"determinism": {"name": "verity", "engine": engine}})
    against = {name: PLAIN for name in runs if name != PLAIN}
    compared = steps_compared(runs, against, rounds, limit_s)
    return {"compared": compared, "bytes_per_weight": _held(runs[f"verity, {engines[0]}"])}


def _held(run: RunConfig) -> dict[str, float]:
    """Bytes a weight: exact sums at the end of backward, quantized weights kept from forward to backward."""
    with opened(dataclasses.replace(run, steps=3)) as training:
        loop = Loop(training)
        loop.recorded_steps(1)
        count = sum(p.numel() for p in training.model.parameters())
        quantized: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.dtype == torch.float64 and tensor.ndim == 2:  # nothing else that is saved is
                quantized[tensor.data_ptr()] = tensor.numel()
            return tensor

        numerics = training.numerics
        assert isinstance(numerics, Verity)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            numerics.summed(training.forward, *loop.batch())
        sums = [s.total for s in numerics.grids.sums if s.total is not None]
        numerics.grids.reset()
    return {
        "sums": sum(t.numel() * t.element_size() for t in sums) / count,
        "quantized": 8 * sum(quantized.values()) / count,
    }

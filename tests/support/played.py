"""Stages played with invented results: what they ask for, wave after wave, and what they decide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ebc_lab.config.compose import compose
from ebc_lab.config.schema import Config
from ebc_lab.records.spec import RunSpec
from ebc_lab.study.stages.runs import distinct
from ebc_lab.study.stages.stage import stage_of

Answer = Callable[[RunSpec], Mapping[str, Any]]
DIVERGED = {"outcome": "diverged", "val_loss": None, "c_median": None, "kl_median": 5.0}
FAILED = {"outcome": "failed", "cause": "a bug", "val_loss": None}


CARRY = Path(__file__).with_name("carry.yaml")  # the small suite of the stage carry
# what the sweep decides of a track, and its decision
SWEPT = {
    "lr": 1e-3,
    "optimizer": "adam",
    "projection": "none",
    "natural_kl": 0.02,
    "sigma": 0.01,
    "descent_median": 0.1,
    "replicate_losses": [2.0, 2.01, 2.02],
}
DECIDED = {"lr_sweep": {"tracks": {"adam_none": SWEPT}, "inputs_sha256": "x"}}
GRIDS = ("calibrate.multiples=[1,1.25,1.6,2]", "lr_sweep.control_scales=[1,2]")


def config_of(*overrides: str, scale: str = "laptop") -> Config:
    """A study's settings with nothing left to be measured, and grids that no scale's file changes."""
    named = [f"scale={scale}", "dtype=float32", "threads_per_run=1", "compile=off", "device=cpu"]
    suite = any(o.startswith("study=") for o in overrides)  # which may have its own
    grids = GRIDS if scale == "laptop" and not suite else ()
    config = compose([*named, *grids, *overrides])
    return replace(config, data=replace(config.data, sha256="0" * 64))


def done(loss: float, c: float = 0.6, **more: Any) -> dict[str, Any]:
    """A completed run."""
    figures = {"val_loss": loss, "test_loss": loss, "c_median": c, "kl_median": 0.01, "clip_rate": 0.5}
    return {"outcome": "completed", **figures, **more}


def by_lr(best: float) -> Answer:
    """The nearer to this learning rate, the better; replicates spread by 0.01."""
    return lambda s: done(2 + abs(s.run.optimizer.lr - best) + 0.01 * (s.run.seed % 100))


def played(stage: str, config: Config, decisions: Mapping[str, Any], answer: Answer):
    """Invent results until the stage asks for no more runs. -> its waves, its last list, the results."""
    results: dict[str, Any] = {}
    waves = []
    while True:
        specs = stage_of(stage).runs(config, decisions, results)
        new = [s for s in distinct(specs) if s.run_id not in results]
        if not new:
            return waves, specs, results
        assert len(waves) < 20, f"{stage} does not end"
        waves.append(new)
        results |= {s.run_id: dict(answer(s)) for s in new}


def decided(stage: str, config: Config, decisions: Mapping[str, Any], answer: Answer) -> dict[str, Any]:
    """The stage's decision from such results."""
    _, specs, results = played(stage, config, decisions, answer)
    return stage_of(stage).decide(config, specs, results, decisions)


def decided_through(last: str, config: Config, answer: Answer) -> dict[str, Any]:
    """The decisions of the study's stages up to `last`."""
    decisions: dict[str, Any] = {}
    for stage in config.study.stages[: config.study.stages.index(last) + 1]:
        decisions[stage] = decided(stage, config, decisions, answer)
    return decisions


def check_passed_over(stage: str, decision: Mapping[str, Any], said: str) -> None:
    """The tile, the headline and `why` say which lower loss of the only track was passed over, and why."""
    asked = stage_of(stage)
    [track] = decision["tracks"]
    tiles = {label: remark for label, _, remark in asked.rows(track, decision)}
    assert tiles["validation loss"] == f"nats per token; lower, but passed over: {said}"
    assert f"; lower, but passed over: {said}" in asked.headlines(decision)[0]
    assert said.partition(";")[0] in asked.would_change(decision)[0]


def rates(specs: list[RunSpec], role: str) -> list[float]:
    """The learning rates of the runs of this role, in the order they were asked for."""
    return [s.run.optimizer.lr for s in specs if s.role == role]

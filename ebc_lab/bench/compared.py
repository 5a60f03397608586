"""Sections of paired ratios: seconds of a step, as a run takes it, over those of another, in turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ebc_lab.components.determinism import Verity
from ebc_lab.config.choices import changed, optimizer_defaults
from ebc_lab.config.parts.determinism import DeterminismConfig
from ebc_lab.config.parts.lr_schedule import LRScheduleConfig
from ebc_lab.config.parts.memory import MemoryConfig
from ebc_lab.config.parts.optimizer import OptimizerConfig
from ebc_lab.config.parts.projection import ProjectionConfig
from ebc_lab.config.parts.quantizer import WITH_LOW_BIT_STATE
from ebc_lab.config.parts.stabilizer import StabilizerConfig
from ebc_lab.config.schema import RunConfig
from ebc_lab.verity.engine import engine_name

from .loops import WARM_STEPS, opened
from .memory import held_bytes
from .pairs import Effort, recorded_turns, spread
from .shares import Clock

# by name: settings, and the run with whose step its own is compared
Variants = Mapping[str, tuple[dict[str, Any], str]]

PLAIN = "float32"
TERNARY_GRADIENTS = {"gradients": "ternary", "error_feedback": True}
LOW_BIT: Variants = {
    "ternary": ({"quantizer": {"name": "ternary"}}, PLAIN),
    "five": ({"quantizer": {"name": "five"}}, PLAIN),
    "ternary, ternary gradients with error feedback": (
        {"quantizer": {"name": "ternary", **TERNARY_GRADIENTS}},
        "ternary",
    ),
    "gradients ternary with error feedback": ({"quantizer": TERNARY_GRADIENTS}, PLAIN),
    "state int8": ({"quantizer": {"state": "int8"}}, PLAIN),
    "state ternary": ({"quantizer": {"state": "ternary"}}, PLAIN),
}
EBM: Variants = {
    "ebm": ({}, "gpt"),
    "without denoising score matching": ({"ebm": {"score": 0.0}}, "ebm"),
    "without revival and toppling": ({"ebm": {"revive": False, "soc": False}}, "ebm"),
    "without splats": ({"ebm": {"splats": 0}}, "ebm"),
}
ADAM = {"optimizer": {"name": "adam"}}
AXIOM = {"optimizer": {"name": "axiom", "rank": 4}}
HOOKS = {"memory": {"name": "hooks"}}
EBC = {"stabilizer": {"name": "ebc"}}
BESIDE_WEIGHTS: Variants = {
    "adam, 4-bit activations": ({**ADAM, "memory": {"name": "int4"}}, "adam"),
    "adafactor": ({"optimizer": {"name": "adafactor"}}, "adam"),
    "axiom, rank 0": ({"optimizer": {"name": "axiom"}}, "adam"),
    "axiom, rank 4": (AXIOM, "adam"),
    "axiom, rank 4, hooks": ({**AXIOM, **HOOKS}, "adam"),
    "axiom, rank 4, hooks, 4-bit activations": ({**AXIOM, "memory": {"name": "all"}}, "adam"),
    "axiom, rank 4, ebc shadow": ({**AXIOM, **EBC, "budget": {"name": "shadow"}}, "axiom, rank 4"),
    "axiom, rank 4, hooks, ebc lagged": (
        {**AXIOM, **HOOKS, **EBC, "budget": {"name": "lagged"}},
        "axiom, rank 4, hooks",
    ),
}


def with_settings(run: RunConfig, variants: Variants) -> dict[str, RunConfig]:
    """Return the run with the settings of each variant, by name."""
    return {name: changed(run, settings) for name, (settings, _) in variants.items()}


def compare(runs: Mapping[str, RunConfig], variants: Variants, effort: Effort) -> list[dict[str, Any]]:
    """Return a row for each variant: the ms of a step of the run of its name, and the ratio to a step of the
    run that the variant names. All `runs` take turns, in blocks of two audit intervals."""
    block = 2 * next(iter(runs.values())).audit_every
    turns = recorded_turns(runs, block, effort.rounds, limit_s=effort.limit_s)
    rows = []
    for name, (_, other) in variants.items():
        times = spread(turns.ratios(name, other))
        rows.append({"what": name, "against": other, "times": times, "step_ms": turns.step_ms(name)})
    return rows


def low_bit(run: RunConfig, effort: Effort) -> list[dict[str, Any]]:
    """Return what low-bit training adds to a step without a stabilizer, as rows of `compare`."""
    plain = dataclasses.replace(run, stabilizer=StabilizerConfig(), memory=MemoryConfig())
    stateful = run.optimizer.name in WITH_LOW_BIT_STATE
    variants = {
        name: found for name, found in LOW_BIT.items() if stateful or "state" not in found[0]["quantizer"]
    }
    return compare({PLAIN: plain, **with_settings(plain, variants)}, variants, effort)


# -- the energy-based model ----------------------------------------------------------------------------------


def energy_steps(run: RunConfig, effort: Effort) -> dict[str, Any]:
    """Return what the parts of an energy-based model's step take.

    `compared`: a step against that of the GPT of this scale, and a step without a part against the whole.
    `after_step_pct`: the share of statistics, revival and toppling in a step, per cent.
    """
    whole = dataclasses.replace(run, stabilizer=StabilizerConfig())
    gpt = changed(whole, {"workload": {"name": "gpt"}})
    compared = compare({"gpt": gpt, **with_settings(whole, EBM)}, EBM, effort)
    return {"compared": compared, "after_step_pct": _after_step(whole)}


def _after_step(run: RunConfig) -> dict[str, Any]:
    """Return the share of `after_step` in steps without audits, per cent, over three parts of a short run.

    Each part has a revival and a look at the pile; the step that adds splats comes between the parts.
    """
    block = max(run.ebm.revive_every, run.ebm.soc_every)
    third = WARM_STEPS + block + 1
    run = dataclasses.replace(run, audit_every=30 * third, steps=3 * third)
    clock = Clock(run)
    with opened(run) as loop:
        workload = loop.training.workload
        workload.after_step = clock.around("after", workload.after_step)  # type: ignore[method-assign]
        shares = []
        for _ in range(3):
            loop.recorded_steps(WARM_STEPS)
            clock.seconds.clear()
            seconds = loop.recorded_steps(block)
            shares.append(100 * clock.seconds["after"] / seconds)
            loop.recorded_steps(1)
    return spread(shares)


# -- what is kept beside the weights -------------------------------------------------------------------------


def beside_weights(run: RunConfig, effort: Effort) -> dict[str, list[dict[str, Any]]]:
    """Return what optimizers and memory settings keep beside the weights, and what that costs in time.

    `bytes`: of the weights and of what is beside them, by purpose, counted in tensors, and the peak of a
    step, with how many times less than Adam's they are. `times`: of a step against Adam's, and of a step
    with EBC against the one that EBC limits. Each optimizer has its own default rate.
    """
    plain = dataclasses.replace(run, stabilizer=StabilizerConfig(), memory=MemoryConfig())
    runs = {"adam": changed(plain, ADAM), **with_settings(plain, BESIDE_WEIGHTS)}
    bytes_of = {}
    for name, variant in runs.items():
        variant.optimizer.lr = optimizer_defaults(variant.optimizer.name).lr
        if variant.stabilizer.name == "none":
            bytes_of[name] = held_bytes(variant, bare=True)
    rows = [{"what": name, **held, **_ratios(bytes_of["adam"], held)} for name, held in bytes_of.items()]
    effort.say("what that costs in time")
    return {"bytes": rows, "times": compare(runs, BESIDE_WEIGHTS, effort)}


def _ratios(plain: Mapping[str, int], compressed: Mapping[str, int]) -> dict[str, float]:
    """Return how many times less than the plain step's, and how many per cent lower the peak of a step is."""
    both = ("optimizer_state", "gradients")
    return {
        "state_ratio": plain["optimizer_state"] / compressed["optimizer_state"],
        "gradient_ratio": plain["gradients"] / compressed["gradients"],
        "total_ratio": sum(plain[k] for k in both) / sum(compressed[k] for k in both),
        "activation_ratio": plain["activations"] / compressed["activations"],
        "peak_saved_pct": 100 * (1 - compressed["peak"] / plain["peak"]),
    }


# -- exact training ------------------------------------------------------------------------------------------


def exact_steps(run: RunConfig, effort: Effort) -> dict[str, Any]:
    """Return what a step costs under determinism=verity, `compared` with a plain float32 step.

    `bytes_per_weight`: what is held beside those of plain training while a step is under way.
    """
    adam = OptimizerConfig(lr=run.optimizer.lr) if run.optimizer.name == "adam" else OptimizerConfig()
    plain = dataclasses.replace(run, dtype="float32", compile="off", accumulate=1, optimizer=adam)
    plain.lr_schedule, plain.projection = LRScheduleConfig(), ProjectionConfig()
    plain.stabilizer, plain.memory = StabilizerConfig(), MemoryConfig()
    plain.determinism = DeterminismConfig()
    engines = ("c", "eager") if engine_name(run.device) == "c" else ("eager",)
    verity = {engine: {"determinism": {"name": "verity", "engine": engine}} for engine in engines}
    variants = {f"verity, {engine}": (settings, PLAIN) for engine, settings in verity.items()}
    compared = compare({PLAIN: plain, **with_settings(plain, variants)}, variants, effort)
    return {"compared": compared, "bytes_per_weight": _held(changed(plain, verity[engines[0]]))}


def _held(run: RunConfig) -> dict[str, float]:
    """Return bytes a weight of exact sums at the end of backward, and of quantized weights kept for it."""
    with opened(dataclasses.replace(run, steps=3)) as loop:
        training = loop.training
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

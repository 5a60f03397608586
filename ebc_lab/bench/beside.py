"""What a step keeps beside the weights, by optimizer and memory setting, and what that costs in time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ebc_lab.config.choices import changed, optimizer_defaults
from ebc_lab.config.parts.memory import MemoryConfig
from ebc_lab.config.parts.stabilizer import StabilizerConfig
from ebc_lab.config.schema import RunConfig

from .memory import of_run
from .pairs import steps_compared

PLAIN = "adam"
AXIOM: dict[str, Any] = {"name": "axiom", "rank": 4}
LAGGED = {"stabilizer": {"name": "ebc"}, "budget": {"name": "lagged"}}
SHADOW = {"stabilizer": {"name": "ebc"}, "budget": {"name": "shadow"}}
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {  # name -> settings, and what its time is compared with
    PLAIN: ({"optimizer": {"name": "adam"}}, ""),
    "adam, 4-bit activations": ({"optimizer": {"name": "adam"}, "memory": {"name": "int4"}}, PLAIN),
    "adafactor": ({"optimizer": {"name": "adafactor"}}, PLAIN),
    "axiom, rank 0": ({"optimizer": {"name": "axiom"}}, PLAIN),
    "axiom, rank 4": ({"optimizer": AXIOM}, PLAIN),
    "axiom, rank 4, hooks": ({"optimizer": AXIOM, "memory": {"name": "hooks"}}, PLAIN),
    "axiom, rank 4, hooks, 4-bit activations": ({"optimizer": AXIOM, "memory": {"name": "all"}}, PLAIN),
    "axiom, rank 4, ebc shadow": ({"optimizer": AXIOM, **SHADOW}, "axiom, rank 4"),
    "axiom, rank 4, hooks, ebc lagged": (
        {"optimizer": AXIOM, "memory": {"name": "hooks"}, **LAGGED},
        "axiom, rank 4, hooks",
    ),
}


def beside_weights(
    run: RunConfig, rounds: int, limit_s: float, say: Callable[[str], None]
) -> dict[str, list[dict[str, Any]]]:
    """`bytes`: of the weights, and of what is beside them, by purpose, counted in tensors, and the peak of a
    step; with how many times less than Adam's state, gradients and their sum are. `times`: seconds of a step
    as runs take it over those of Adam's, of EBC's over those of the step that it limits."""
    say("what optimizers keep beside the weights")
    plain = dataclasses.replace(run, stabilizer=StabilizerConfig(), memory=MemoryConfig())
    runs = {name: _with(plain, settings) for name, (settings, _) in VARIANTS.items()}
    against = {name: other for name, (_, other) in VARIANTS.items() if other}
    bare = [name for name, run in runs.items() if run.stabilizer.name == "none"]
    measured_of = {name: of_run(runs[name], bare=True) for name in bare}
    rows = [
        {"what": name, **bytes_, **_ratios(measured_of[PLAIN], bytes_)}
        for name, bytes_ in measured_of.items()
    ]
    say("what that costs in time")
    return {"bytes": rows, "times": steps_compared(runs, against, rounds, limit_s)}


def _with(run: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """The run with these settings, at its optimizer's own default rate."""
    variant = changed(run, settings)
    variant.optimizer.lr = optimizer_defaults(variant.optimizer.name).lr
    return variant


def _ratios(plain: Mapping[str, int], compressed: Mapping[str, int]) -> dict[str, float]:
    """How many times less than the plain step's, and by how much lower the peak of a step is, in per cent."""
    both = ("optimizer_state", "gradients")
    return {
        "state_ratio": plain["optimizer_state"] / compressed["optimizer_state"],
        "gradient_ratio": plain["gradients"] / compressed["gradients"],
        "total_ratio": sum(plain[k] for k in both) / sum(compressed[k] for k in both),
        "activation_ratio": plain["activations"] / compressed["activations"],
        "peak_saved_pct": 100 * (1 - compressed["peak"] / plain["peak"]),
    }

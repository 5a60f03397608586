"""What a step keeps beside the weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ebc_lab.ebc.options import LAGGED

from ..fields import setting
from ..limits import SEED
from ..part import Figure, Mode, Part, Tail, Unfit


@dataclass
class MemoryConfig:
    """What a step keeps beside the weights (docs/axiom.md)."""

    name: str = setting(
        "none", "gradients, or activations, or both in little memory", group="memory", in_run_id=False
    )
    hooks: bool = setting(False, "the update is made inside backward, tensor by tensor; of optimizer=axiom")
    activations: str = setting(
        "none", "activations kept for backward: as they are, or in 4 bits", choices=("none", "int4")
    )
    seed: int = setting(
        0,
        "of their stochastic rounding, beside the run's",
        low=0,
        high=SEED,
        of="activations",
        only=("int4",),
    )


def _neutral(memory: MemoryConfig) -> bool:
    """Hooks change no bit until a gradient is not finite: then a part has moved."""
    return not memory.hooks and memory.activations == "none"


def _unfit(memory: MemoryConfig, mode: Mode) -> Unfit | None:
    whole = {
        Mode.EXACT: "it needs a batch's whole gradients, and activations as they are; choose memory=none",
        Mode.SEVERAL_PROCESSES: "it works on one process's gradients and activations; choose memory=none",
    }
    return None if _neutral(memory) or mode not in whole else Unfit(f"memory={memory.name}", whole[mode])


def _tail(memory: MemoryConfig) -> Iterator[Tail]:
    if memory.activations != "none":
        yield Tail(f"_a{memory.activations}", "4-bit activations")


def _clashes(memory: MemoryConfig, run: Any) -> Iterator[str]:
    if memory.activations != "none" and run.compile == "on":
        yield (
            f"memory.activations={memory.activations} packs what an uncompiled forward saves: leave compile "
            "at off."
        )
    if run.stabilizer.name == "ebc" and run.budget.name == LAGGED and not memory.hooks:
        yield (
            "budget=lagged looks at earlier steps because hooks leave it no choice: choose budget=shadow, "
            "which measures the step itself, or memory=hooks with optimizer=axiom."
        )


def _warnings(memory: MemoryConfig, run: Any) -> Iterator[str]:
    if memory.hooks and run.stabilizer.name == "none":
        yield "memory.hooks: the plain optimizer; EBC inside backward is stabilizer=ebc budget=lagged."


MEMORY = Part(
    "memory",
    MemoryConfig,
    place=110,
    neutral=_neutral,
    unfit=_unfit,
    tail=_tail,
    clashes=_clashes,
    warnings=_warnings,
    figures=(
        Figure("state_bytes", "bytes", "of the optimizer's state", averaged=False),
        Figure(
            "gradient_bytes",
            "bytes",
            "of gradients at their height: all of them, or with hooks the largest tensor's",
            averaged=False,
        ),
        Figure(
            "activation_bytes",
            "bytes",
            "of activations that a forward saves for backward, packed",
            averaged=False,
        ),
    ),
)

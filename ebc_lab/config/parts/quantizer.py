"""Low-bit training: hidden matrices, their gradients and the optimizer's state in few levels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import shown
from ..fields import setting
from ..part import Mode, Part, Tail, Unfit

LEVELS = ("ternary", "five")
WORDS = {
    "ternary": "ternary",
    "five": "five-level",
    "int8": "int8",
    "int8_linear": "int8, linear",
}


@dataclass
class QuantizerConfig:
    """Low-bit training: hidden matrices, their gradients and the optimizer's state in few levels
    (docs/lowbit.md)."""

    name: str = setting("none", "levels of the hidden matrices in the forward", group="quantizer")
    group: str = setting(
        "tensor", "weights that share a step: tensor, row, or so many neighbours in a row", only=LEVELS
    )
    scale: str = setting("absmean", "a group's step: absmean, absmax, or a number", only=LEVELS)
    gradients: str = setting("none", "levels of the hidden matrices' gradients", choices=("none", *LEVELS))
    rounding: str = setting(
        "nearest", "of the gradients", choices=("nearest", "stochastic"), of="gradients", only=LEVELS
    )
    error_feedback: bool = setting(
        False,
        "what rounding took from a gradient is added to the next step's gradient",
        of="gradients",
        only=LEVELS,
    )
    state: str = setting(
        "none",
        "levels of Adam's moments of the hidden matrices; int8_linear: forensic",
        choices=("none", "int8", "int8_linear", "ternary", "five"),
    )


def unused(quantizer: QuantizerConfig) -> bool:
    """Whether nothing is quantized at all."""
    return (quantizer.name, quantizer.gradients, quantizer.state) == ("none", "none", "none")


def _refuses(quantizer: QuantizerConfig) -> Iterator[str]:
    group = quantizer.group
    if not (group in ("tensor", "row") or (group.isdecimal() and int(group) >= 1)):
        yield f"quantizer.group={shown(group)} is unknown; it takes tensor, row, or a count of weights >= 1."
    if not (quantizer.scale in ("absmean", "absmax") or _is_positive(quantizer.scale)):
        yield (
            f"quantizer.scale={shown(quantizer.scale)} is unknown; it takes absmean, absmax, or a step > 0."
        )


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def _unfit(quantizer: QuantizerConfig, mode: Mode) -> Unfit | None:
    if mode is Mode.EXACT and not unused(quantizer):
        return Unfit("a quantizer", "choose quantizer=none")
    if mode is Mode.EBM and not unused(quantizer):
        return Unfit("a quantizer", "only a GPT's hidden matrices are quantized")
    if mode is Mode.SEVERAL_PROCESSES and (quantizer.gradients, quantizer.state) != ("none", "none"):
        why = "their levels turn a rounding into a step; leave them at none"
        return Unfit("quantizer.gradients or quantizer.state", why)
    if mode is Mode.IN_BACKWARD and quantizer.gradients != "none":
        return Unfit("quantizer.gradients", "no gradient is left once backward has ended; leave it at none")
    return None


def _tail(quantizer: QuantizerConfig) -> Iterator[Tail]:
    if quantizer.name != "none":
        yield Tail(f"_{quantizer.name}", f"{WORDS[quantizer.name]} weights")
    if quantizer.gradients != "none":
        yield Tail(f"_g{quantizer.gradients}", f"{WORDS[quantizer.gradients]} gradients")
    if quantizer.state == "int8_linear":
        yield Tail("_mint8_linear", "int8 moments, linear")
    elif quantizer.state != "none":
        yield Tail(f"_m{quantizer.state}", f"{WORDS[quantizer.state]} moments")


QUANTIZER = Part("quantizer", QuantizerConfig, neutral=unused, refuses=_refuses, unfit=_unfit, tail=_tail)

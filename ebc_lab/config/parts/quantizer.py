import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ebc_lab.ebc.options import MEASURING

from ..errors import shown
from ..fields import setting
from ..part import Figure, Head, Mode, Part, Run, Tail

WITH_LOW_BIT_STATE = ("adam", "adamw")  # optimizers whose moments can be stored in few bits
LEVELS = ("ternary", "five")
WORDS = {"ternary": "ternary", "five": "five-level", "int8": "int8"}
FLIPS = "codes of the hidden matrices that differ from those ten steps before; at audits"
GRAD_ERROR = "squared error of the quantized gradients, over the square of what was quantized"


def _compression(result: Mapping[str, Any]) -> float | None:
    packed = result.get("packed_bytes")
    return result["model_bytes_float32"] / packed if packed else None


@dataclass
class QuantizerConfig(Part):
    """Low-bit training: hidden matrices, their gradients and the optimizer's state in few levels
    (docs/lowbit.md)."""

    name: str = setting("none", "levels of the hidden matrices in the forward", group="quantizer")
    group: str = setting(
        "tensor", "weights that share a step: tensor, row, or so many neighbours in a row", only=LEVELS
    )
    scale: str = setting("absmean", "a group's step: absmean, absmax, or a number", only=LEVELS)
    gradients: str = setting("none", "levels of the hidden matrices' gradients", choices=("none", *LEVELS))
    rounding: str = setting(
        "nearest", "of the gradients", choices=("nearest", "stochastic"), by="gradients", only=LEVELS
    )
    error_feedback: bool = setting(
        False,
        "what rounding took from a gradient is added to the next step's gradient",
        by="gradients",
        only=LEVELS,
    )
    state: str = setting(
        "none",
        "levels of Adam's moments of the hidden matrices; int8_linear: forensic",
        choices=("none", "int8", "int8_linear", "ternary", "five"),
    )

    place = 100
    measured = "low-bit training"
    columns = {"flip_share": ("0–1", FLIPS), "grad_error": ("", GRAD_ERROR)}
    figures = (
        Figure(
            "bits_per_weight",
            "bits",
            "of the hidden matrices in model.ebcpack, their steps included",
            Head(
                "Bits per weight",
                "bits",
                "two_digits",
                "loss",
                note="bits per weight: of the hidden matrices, packed",
            ),
        ),
        Figure(
            "compression",
            "×",
            "size of the whole model in float32 over that of model.ebcpack",
            Head(
                "Smaller by",
                "smaller",
                "times",
                "loss",
                ("paper",),
                "smaller: the whole model, packed, against float32",
            ),
            of_run=_compression,
        ),
        Figure(
            "entropy_bits",
            "bits",
            "entropy of the codes at the end: what a weight could take at the least",
            Head("Entropy, bits", "entropy", "two_digits", note="entropy: of the codes at the end"),
        ),
        Figure(
            "zero_share",
            "0–1",
            "codes that are 0 at the end",
            Head("Zeros", "zeros", "percent", note="zeros: of the codes at the end"),
        ),
        Figure(
            "flip_share",
            "0–1",
            "codes that differ from those ten steps before, median of the audits",
            Head(
                "Flips in ten steps",
                "flips",
                "tenths_of_percent",
                note="flips: codes that changed, median of a run",
            ),
            of_steps=True,
        ),
        Figure(
            "grad_bits",
            "bits",
            "what one worker would send of an element of a gradient",
            Head("Gradient bits", "grad. bits", "two_digits"),
        ),
        Figure(
            "grad_error",
            "",
            "squared error of the quantized gradients, over the square, median of the steps",
            Head(
                "Gradient error",
                "grad. error",
                "percent",
                note="gradient error: squared, over the square, median of a run",
            ),
            of_steps=True,
        ),
        Figure(
            "state_bits",
            "bits",
            "both moments of a hidden weight",
            Head("State bits", "state bits", "two_digits", note="state bits: both moments"),
        ),
    )
    table = "Few levels"

    def changes_nothing(self) -> bool:
        return (self.name, self.gradients, self.state) == ("none", "none", "none")

    def refuses(self, run: Run) -> Iterator[str]:
        group = self.group
        if not (group in ("tensor", "row") or (group.isdecimal() and int(group) >= 1)):
            known = "tensor, row, or a count of weights >= 1"
            yield f"quantizer.group={shown(group)} is unknown; it takes {known}."
        if not (self.scale in ("absmean", "absmax") or _is_positive(self.scale)):
            known = "absmean, absmax, or a step > 0"
            yield f"quantizer.scale={shown(self.scale)} is unknown; it takes {known}."
        quantized = self.name != "none"
        if run.model.target is not None and not self.changes_nothing():
            yield (
                "a quantizer goes with model=gpt, whose hidden matrices it knows, not with a model of your "
                "own."
            )
        if self.state != "none" and run.optimizer.name not in WITH_LOW_BIT_STATE:
            yield (
                f"quantizer.state={self.state} keeps Adam's moments: it goes with optimizer=adam or adamw, "
                f"not {run.optimizer.name}."
            )
        if (self.name, self.state) != ("none", "none") and run.param_dtype != "float32":
            yield (
                f"a quantizer needs float32 weights beneath its levels: leave param_dtype=float32, not "
                f"{run.param_dtype}."
            )
        if quantized and run.projection.name != "none":
            yield (
                f"quantizer={self.name} does not go with projection={run.projection.name}, which would bind "
                "the weights beneath and not those that the forward uses: choose projection=none."
            )
        ebc = run.stabilizer.name == "ebc"
        if quantized and ebc and run.budget.name == "shadow" and run.budget.measure_every != 1:
            yield (
                f"budget.measure_every={run.budget.measure_every} takes KL to grow as the squared size of "
                f"the step, which it does not under quantizer={self.name}: leave it at 1, or use "
                "budget=tracked."
            )
        if run.stabilizer.norm != "latent" and not quantized:
            yield (
                "stabilizer.norm=effective is the norm of quantized weights: choose quantizer=ternary or "
                "five."
            )

    def unfit(self, mode: Mode) -> Iterator[str]:
        if mode is Mode.EXACT and not self.changes_nothing():
            yield "a quantizer: choose quantizer=none"
        if mode is Mode.EBM and not self.changes_nothing():
            yield "a quantizer: only a GPT's hidden matrices are quantized"
        if mode is Mode.SEVERAL_PROCESSES and (self.gradients, self.state) != ("none", "none"):
            why = "their levels turn a rounding into a step; leave them at none"
            yield f"quantizer.gradients or quantizer.state: {why}"
        if mode is Mode.IN_BACKWARD and self.gradients != "none":
            yield "quantizer.gradients: no gradient is left once backward has ended; leave it at none"

    def tail(self) -> Iterator[Tail]:
        if self.name != "none":
            yield Tail(f"_{self.name}", f"{WORDS[self.name]} weights")
        if self.gradients != "none":
            yield Tail(f"_g{self.gradients}", f"{WORDS[self.gradients]} gradients")
        if self.state == "int8_linear":
            yield Tail("_mint8_linear", "int8 moments, linear")
        elif self.state != "none":
            yield Tail(f"_m{self.state}", f"{WORDS[self.state]} moments")

    def warnings(self, run: Run) -> Iterator[str]:
        if self.name != "none" and run.stabilizer.name == "ebc" and run.budget.name not in MEASURING:
            yield (
                f"budget={run.budget.name} differentiates through the quantizer as if it were not there, so "
                "that it sees no code flip: a forensic arm (docs/lowbit.md)."
            )


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False

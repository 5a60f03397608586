"""Low-bit training in a run: hidden matrices and their gradients in few levels, and what is recorded of it.

The maths is in `ebc_lab.lowbit` (docs/lowbit.md).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ebc_lab.config.parts.quantizer import QuantizerConfig
from ebc_lab.config.schema import RunConfig
from ebc_lab.ebc import StepInputs, StepStats
from ebc_lab.lowbit.container import PackedTensor, write_packed
from ebc_lab.lowbit.gradients import GradientQuantizer
from ebc_lab.lowbit.levels import entropy_bits, quantize, zero_share
from ebc_lab.lowbit.state import QuantizedAdam
from ebc_lab.lowbit.ste import codes_of, flip_share, straight_through
from ebc_lab.records.files import replacing
from ebc_lab.records.paths import RunFiles
from ebc_lab.workloads.gpt import HiddenLinear, hidden

from .hook import Built, Hook

FLIPS_OVER = 10  # steps between the two sets of codes that are compared


def grouping_of(config: QuantizerConfig) -> dict[str, Any]:
    """Return levels, group and scale as `ebc_lab.lowbit` takes them: a count and a step as numbers."""
    group = int(config.group) if config.group.isdecimal() else config.group
    scale = config.scale if config.scale in ("absmean", "absmax") else float(config.scale)
    return {"levels": config.name, "group": group, "scale": scale}


class Flips:
    """The share of codes that differ from those ten steps before, at every audit that has such a step."""

    def __init__(self, matrices: Sequence[Tensor], config: QuantizerConfig, audit_every: int):
        self.matrices = matrices
        self.grouping = grouping_of(config)
        self.audit_every = audit_every
        self.codes: dict[int, Tensor] = {}  # of all matrices, (n,) int8, by the step that they were seen at

    def at(self, t: int) -> Tensor | None:
        """Before step `t` (0-based) moves the weights: 0-dim, or None where nothing is compared."""
        audited = t % self.audit_every == 0
        if not audited and (t + FLIPS_OVER) % self.audit_every:
            return None
        now = torch.cat([codes_of(p, **self.grouping).flatten() for p in self.matrices])
        before = self.codes.pop(t - FLIPS_OVER, None)
        self.codes[t] = now
        return flip_share(before, now) if audited and before is not None else None

    def restore(self, codes: Mapping[int, Tensor]) -> None:
        """Put back the `codes` of a checkpoint, which lie on the CPU."""
        self.codes = {t: kept.to(self.matrices[0].device) for t, kept in codes.items()}


class LowBit(Hook):
    """What a run quantizes, weights, gradients or its optimizer's state, and what it records of that."""

    part = QuantizerConfig
    name = "low_bit"
    graphed = False

    def __init__(self, run: RunConfig, built: Built):
        self.config = config = QuantizerConfig.from_run(run)
        self.matrices = built.matrices
        self.flips = Flips(self.matrices, config, run.audit_every) if config.name != "none" else None
        self.quantizer: GradientQuantizer | None = None
        if config.gradients != "none":
            self.quantizer = GradientQuantizer(
                config.gradients,
                rounding=config.rounding,
                error_feedback=config.error_feedback,
                seed=run.seed,
            )
        flips = ("flip_share",) if self.flips else ()
        self.columns = (*flips, "grad_error") if self.quantizer else flips

    @classmethod
    def install(cls, run: RunConfig, model: nn.Module) -> None:
        """Have every hidden matrix of the model used through its levels, if the run asks for any."""
        quantizer = QuantizerConfig.from_run(run)
        if quantizer.name != "none":
            for module in hidden(model):
                module.quantize = functools.partial(straight_through, **grouping_of(quantizer))

    @classmethod
    def make_bases(
        cls, run: RunConfig, model: nn.Module, matrices: Sequence[nn.Parameter]
    ) -> list[Optimizer] | None:
        """Return Adam whose moments are kept in few levels, if the run asks for that."""
        if QuantizerConfig.from_run(run).state == "none":
            return None
        c = run.optimizer
        adam = QuantizedAdam(
            model.parameters(),
            c.lr,
            (c.beta1, c.beta2),
            c.eps,
            state=QuantizerConfig.from_run(run).state,
            quantized=matrices,
            seed=run.seed,
            weight_decay=c.weight_decay,
            decoupled=c.name == "adamw",
        )
        return [adam]

    def before(self, t: int, batch: StepInputs) -> dict[str, Tensor]:
        """Compare the codes with those of ten steps ago."""
        share = self.flips.at(t) if self.flips else None
        return {} if share is None else {"flip_share": share}

    def gradients(self, t: int, loss: Tensor, lr: float) -> dict[str, Tensor]:
        """Put the quantized gradients of step `t` in the place of the matrices' own."""
        if self.quantizer is None:
            return {}
        moved = [p for p in self.matrices if p.grad is not None]
        gradients = [p.grad for p in moved if p.grad is not None]
        for p, quantized in zip(moved, self.quantizer.compress(gradients, t), strict=True):
            p.grad = quantized
        return {"grad_error": self.quantizer.last_error}

    def after(self, t: int, stats: StepStats) -> dict[str, Tensor]:
        """Keep the residuals of the gradients, unless the step was skipped."""
        if self.quantizer is not None:
            self.quantizer.commit(~stats.skipped)
        return {}

    def figures(self, bases: Sequence[Optimizer]) -> dict[str, float]:
        """Return what the quantized gradients and the optimizer's quantized state take, in bits a weight."""
        figures = {}
        if self.quantizer:
            figures["grad_bits"] = self.quantizer.grad_bits
        for base in bases:
            if isinstance(base, QuantizedAdam):
                figures["state_bits"] = base.bits_per_weight
        return figures

    def finished(self, model: nn.Module, files: RunFiles) -> Mapping[str, float]:
        """Write the model packed, where its weights are quantized."""
        if self.config.name == "none":
            return {}
        with replacing(files.packed) as path:
            return write_model(path, model, self.config)

    def state_dict(self) -> dict[str, Any]:
        return {
            "codes": dict(self.flips.codes) if self.flips else {},
            "gradients": self.quantizer.state_dict() if self.quantizer else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.flips:
            self.flips.restore(state["codes"])
        if self.quantizer:
            self.quantizer.load_state_dict(state["gradients"])


# -- the file that a run leaves ------------------------------------------------------------------------------


HOOK = LowBit


def write_model(path: Path, model: nn.Module, config: QuantizerConfig) -> dict[str, float]:
    """Write the model with its hidden matrices packed and all else in float32 -> the figures of result.json.

    Sizes in bytes: `packed_bytes` is the whole file, steps, embeddings and header included.
    """
    grouping = grouping_of(config)
    codes = {}
    for name, module in model.named_modules():
        if isinstance(module, HiddenLinear):
            codes[f"{name}.weight"] = quantize(module.weight, **grouping)
    packed = {name: PackedTensor.of(quantized) for name, quantized in codes.items()}
    whole = {name: packed.get(name, p.detach().float().cpu()) for name, p in model.named_parameters()}
    write_packed(path, whole)
    flat = np.concatenate([quantized.codes.ravel() for quantized in codes.values()])
    return {
        "packed_bytes": path.stat().st_size,
        "model_bytes_float32": sum(4 * p.numel() for p in model.parameters()),
        "bits_per_weight": 8 * sum(tensor.nbytes for tensor in packed.values()) / flat.size,
        "entropy_bits": entropy_bits(flat),
        "zero_share": zero_share(flat),
    }

"""Low-bit training in a run: hidden matrices and their gradients in few levels, and what is recorded of it.

The maths is in `ebc_lab.lowbit` (docs/lowbit.md); the optimizer's state is `optimizers.build`'s part.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ebc_lab.config.parts.quantizer import QuantizerConfig
from ebc_lab.config.schema import RunConfig
from ebc_lab.ebc import StepStats
from ebc_lab.lowbit.clustering import ParameterClustering
from ebc_lab.lowbit.container import PackedTensor, read_packed, write_packed
from ebc_lab.lowbit.gradients import GradientQuantizer
from ebc_lab.lowbit.levels import entropy_bits, quantize, zero_share
from ebc_lab.lowbit.state import QuantizedAdam
from ebc_lab.lowbit.ste import codes_of, flip_share, straight_through
from ebc_lab.workloads.gpt import HiddenLinear

FLIPS_OVER = 10  # steps between the two sets of codes that are compared


def grouping_of(config: QuantizerConfig) -> dict[str, Any]:
    """Levels, group and scale as `ebc_lab.lowbit` takes them: a count and a step as numbers."""
    group = int(config.group) if config.group.isdecimal() else config.group
    scale = config.scale if config.scale in ("absmean", "absmax") else float(config.scale)
    return {"levels": config.name, "group": group, "scale": scale}


def unused(config: QuantizerConfig) -> bool:
    """Whether nothing is quantized at all."""
    return (config.name, config.gradients, config.state) == ("none", "none", "none")


def install(model: nn.Module, config: QuantizerConfig) -> None:
    """Have every hidden matrix of the model used through its levels, if the run asks for any."""
    if config.name == "none":
        return
    for module in hidden(model):
        module.quantize = functools.partial(straight_through, **grouping_of(config))


def hidden(model: nn.Module) -> list[HiddenLinear]:
    """The layers that hold the hidden matrices, in the model's order."""
    return [module for module in model.modules() if isinstance(module, HiddenLinear)]


def effective_weights(model: nn.Module) -> list[Tensor]:
    """What the forward uses of each trained parameter, in the model's order."""
    quantized = {id(module.weight): module for module in hidden(model)}
    trained = [p for p in model.parameters() if p.requires_grad]
    return [quantized[id(p)].effective() if id(p) in quantized else p for p in trained]


def clustered_groups(model: nn.Module, run: RunConfig) -> dict[str, list[str]] | None:
    """The groups of budget.grouping=kmeans, from the initial weights: group -> names; None for others."""
    if run.budget.grouping != "kmeans":
        return None
    clusters = ParameterClustering(run.budget.clusters, seed=run.seed)
    return clusters.groups({name: p.detach().cpu().numpy() for name, p in model.named_parameters()})


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


class LowBit:
    """What a run quantizes beside its optimizer's state, and what it records of that."""

    def __init__(self, run: RunConfig, matrices: Sequence[nn.Parameter]):
        config = run.quantizer
        self.matrices = matrices
        self.flips = Flips(matrices, config, run.audit_every) if config.name != "none" else None
        self.gradients: GradientQuantizer | None = None
        if config.gradients != "none":
            self.gradients = GradientQuantizer(
                config.gradients,
                rounding=config.rounding,
                error_feedback=config.error_feedback,
                seed=run.seed,
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """What it adds to steps.csv."""
        flips = ("flip_share",) if self.flips else ()
        return (*flips, "grad_error") if self.gradients else flips

    def weights_before(self, t: int) -> dict[str, Tensor]:
        """What is recorded of the weights before step `t` moves them."""
        share = self.flips.at(t) if self.flips else None
        return {} if share is None else {"flip_share": share}

    def compress(self, t: int) -> dict[str, Tensor]:
        """Put the quantized gradients of step `t` in the place of the matrices' own."""
        if self.gradients is None:
            return {}
        held = [p for p in self.matrices if p.grad is not None]
        own = [p.grad for p in held if p.grad is not None]
        for p, quantized in zip(held, self.gradients.compress(own, t), strict=True):
            p.grad = quantized
        error = self.gradients.last_error
        return {} if error is None else {"grad_error": error}

    def commit(self, stats: StepStats) -> None:
        """Keep the residuals of the gradients, unless the step was skipped."""
        if self.gradients is not None:
            self.gradients.commit(~stats.skipped)

    def figures(self, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, float]:
        """What the quantized gradients and the optimizer's quantized state take, in bits a weight."""
        found = {}
        if self.gradients:
            found["grad_bits"] = self.gradients.grad_bits
        for optimizer in optimizers:
            if isinstance(optimizer, QuantizedAdam):
                found["state_bits"] = optimizer.bits_per_weight
        return found

    def state_dict(self) -> dict[str, Any]:
        return {
            "codes": dict(self.flips.codes) if self.flips else {},
            "gradients": self.gradients.state_dict() if self.gradients else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.flips:
            self.flips.codes = dict(state["codes"])
        if self.gradients:
            self.gradients.load_state_dict(state["gradients"])


# -- the file that a run leaves ------------------------------------------------------------------------------


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


@torch.no_grad()
def read_model(path: Path, model: nn.Module) -> None:
    """Put the weights of a file that `write_model` wrote into `model`, which then uses them as they are.

    Raises DamagedFileError; ValueError where the file holds another model.
    """
    tensors = read_packed(path)
    parameters = dict(model.named_parameters())
    if set(tensors) != set(parameters):
        odd = sorted(set(tensors) ^ set(parameters))[0]
        raise ValueError(f"{path} holds another model: {odd} is in one of the two only.")
    for module in hidden(model):
        module.quantize = None
    for name, p in parameters.items():
        found = tensors[name]
        values = found.values() if isinstance(found, PackedTensor) else found
        p.copy_(torch.as_tensor(values).to(p.device))

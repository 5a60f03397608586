"""Low-rank adaptation: the hidden matrices stay as they are, and W + alpha/rank·B·A is used of each.

LoRA: Hu et al., arXiv:2106.09685; the matrices A and B are those of the library peft, which is imported where
it is used: it takes seconds. B starts at zero, so that the model is what it was. Nothing else is trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ebc_lab.config.parts.adapter import TARGETS, AdapterConfig
from ebc_lab.config.schema import RunConfig
from ebc_lab.workloads.gpt import HiddenLinear

from .hook import Hook

NAME = "default"  # of the adapter in peft
OWN = "lora_"  # how the names of its weights begin
BASE = "base_layer."  # what peft puts in front of the name of a weight that it stands beside


class Adapter(Hook):
    """Has low-rank matrices trained in the place of the model's own weights."""

    part = AdapterConfig

    @classmethod
    def install(cls, run: RunConfig, model: nn.Module) -> None:
        """Add the matrices, drawn from the run's seed alone, and freeze everything else."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            _inject(model, AdapterConfig.from_run(run))


HOOK = Adapter


def _inject(model: nn.Module, settings: AdapterConfig) -> None:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear

    class HiddenLora(Linear):
        """A hidden matrix with its low-rank addition."""

        def effective(self) -> Any:
            """The matrix that the forward uses."""
            base: Any = self.base_layer
            return base.effective() + self.get_delta_weight(NAME)

    device = next(model.parameters()).device
    alpha: Any = settings.alpha  # the library asks for a whole number, and divides
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=alpha,
        target_modules=list(TARGETS[settings.targets]),
        bias="none",
    )
    config._register_custom_module({HiddenLinear: HiddenLora})
    inject_adapter_in_model(config, model, NAME)
    model.to(device)


def merged(model: nn.Module) -> dict[str, Tensor]:
    """Return name -> weight of the model without adapters that computes the same, detached."""
    weights = {name: w.detach() for name, w in model.state_dict().items()}
    plain = {name.replace(BASE, ""): w for name, w in weights.items() if f".{OWN}" not in name}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            key = f"{name}.weight"
            plain[key] = plain[key] + module.get_delta_weight(NAME).detach()
    return plain

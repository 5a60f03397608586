"""A model of the user's own in the workload gpt: tokens (B, T) -> logits (B, T, V)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ebc_lab.config.errors import UserError, require
from ebc_lab.config.own.parts import describe_own_part, own_part
from ebc_lab.ebc.grouping import group_parameters

from .gpt import GPTWorkload

# optimizers that treat the hidden matrices apart
OF_MATRICES = ("muon", "galore", "hyperball", "lionar", "scion", "normuon", "muonclip")


class OwnModelWorkload(GPTWorkload):
    """A model that predicts the next token of a text, made by the function of `model.target`."""

    capturable = False  # it may look at values on the host

    def build(self) -> nn.Module:
        """The model, after one look at what it makes of tokens. Raises UserError where that is no logits."""
        function = own_part(self.run.model)
        context = self.run.model.context
        key = describe_own_part(self.run.model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.run.seed)
            model = function(self.vocabulary, context)
            require(
                isinstance(model, nn.Module), f"{key} returned {type(model).__name__}, not a torch module."
            )
            model.eval()
            with torch.no_grad():
                logits = model(torch.zeros(2, context, dtype=torch.int64))
            model.train()
        wanted = (2, context, self.vocabulary)
        is_tensor = isinstance(logits, Tensor)
        output = str(tuple(logits.shape)) if is_tensor else type(logits).__name__
        require(
            is_tensor and tuple(logits.shape) == wanted,
            f"{key}: its model makes {output} of tokens {wanted[:2]}, not logits {wanted}.",
        )
        made: nn.Module = model
        require(any(p.requires_grad for p in made.parameters()), f"{key}: its model has nothing to train.")
        return made

    def matrices(self, model: nn.Module) -> list[nn.Parameter]:
        """The matrices that `grouping="matrices"` finds by name. Raises UserError where it finds none and the
        run's optimizer or projection needs some."""
        named = dict(model.named_parameters())
        shapes = {name: tuple(p.shape) for name, p in named.items()}
        try:
            groups = group_parameters(named, "matrices", shapes)
        except ValueError:
            groups = {}
        optimizer, projection = self.run.optimizer.name, self.run.projection.name
        needs = f"optimizer={optimizer}" if optimizer in OF_MATRICES else f"projection={projection}"
        if not groups and (optimizer in OF_MATRICES or projection != "none"):
            raise UserError(
                f"model.target={self.run.model.target}: {needs} needs hidden matrices, and none has a usual "
                "name, as q_proj, o_proj, fc1 and fc2 are: name them so, or choose another."
            )
        return [named[name] for names in groups.values() for name in names]

"""Small energy-based models with splats in place, without the lab around them."""

import torch
from torch import nn

from ebc_lab.ebm.model import EnergyModel, ModelSettings

VOCABULARY = 11
SIZES = {"n": 6, "splats": 20, "neighbours": 5, "hidden": 12, "window": 3, "width": 10, "context": 12}


class Mixing(nn.Module):
    """In place of a transformer's blocks: each token and the mean of those up to it."""

    def __init__(self, width: int):
        super().__init__()
        self.mix = nn.Linear(width, width, bias=False)

    def forward(self, x, B):
        rows = x.view(B, -1, x.shape[-1])
        counts = torch.arange(1, rows.shape[1] + 1, dtype=x.dtype)[:, None]
        return x + torch.tanh(self.mix(rows.cumsum(1) / counts)).flatten(0, 1)


def energy_model(dtype=torch.float64, seed=0, in_use=16, **settings) -> EnergyModel:
    """At random weights, `in_use` places of its store filled with splats of different weights and widths."""
    chosen = ModelSettings(**({"vocabulary": VOCABULARY} | SIZES | settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = EnergyModel(chosen, blocks=lambda: Mixing(chosen.width))
        if model.store is not None:
            alpha, kappa = 0.5 + torch.rand(in_use), 2 + 20 * torch.rand(in_use)
            model.store.add(torch.randn(in_use, chosen.n), alpha, kappa)
        with torch.no_grad():
            for p in [model.decoder.head.weight] if model.pointwise else []:
                p.mul_(8)  # logits that differ
    return model.to(dtype)


def some_tokens(rows=3, length=12, seed=1):
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))

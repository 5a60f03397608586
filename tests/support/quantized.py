"""Models whose forward rounds their matrices to three levels, for the tests of the method."""

import torch
import torch.nn.functional as F
from torch import nn


class Ternary(torch.autograd.Function):
    """W -> γ·{−1, 0, 1} with γ = mean|W|; the gradient passes through."""

    @staticmethod
    def forward(ctx, weight):
        step = weight.abs().mean()
        return step * (weight / step).round().clamp(-1, 1)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class TernaryLinear(nn.Linear):
    def effective(self):
        return Ternary.apply(self.weight)

    def forward(self, x):
        return F.linear(x, self.effective(), self.bias)


def ternary_model(width=128, vocabulary=16, seed=0):
    """Tokens -> logits; the two ternary matrices alone are trained."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Embedding(vocabulary, width),
        TernaryLinear(width, width, bias=False),
        nn.GELU(),
        TernaryLinear(width, width, bias=False),
        nn.LayerNorm(width),
        nn.Linear(width, vocabulary),
    )
    for frozen in (model[0], model[4], model[5]):
        frozen.requires_grad_(False)
    return model


class Wander(torch.optim.Optimizer):
    """Proposes noise whose size is `lr`, whatever the gradient."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})
        self.draw = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p += group["lr"] * torch.randn(p.shape, generator=self.draw)

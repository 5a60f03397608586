"""What is trained: a perceptron for rows; for text the GPT that another package offers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Perceptron(nn.Module):
    """Rows (n, inputs) -> (n, outputs) through hidden layers with GELU between them.

    Inputs are divided by one number, outputs multiplied by another (the rms of the training rows and of their
    targets), so that the learning rate means the same whatever the data's unit is.
    """

    scales: Tensor

    def __init__(self, widths: list[int], scales: tuple[float, float], seed: int):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        pairs = list(itertools.pairwise(widths))
        self.layers = nn.ModuleList(nn.Linear(i, o, device="meta") for i, o in pairs)  # which draw nothing
        for layer, (i, o) in zip(self.layers, pairs, strict=True):
            layer.weight = nn.Parameter(torch.randn(o, i, generator=draw) / math.sqrt(i))
            layer.bias = nn.Parameter(torch.zeros(o))
        self.register_buffer("scales", torch.tensor(scales))

    def forward(self, x: Tensor) -> Tensor:
        x = x / self.scales[0]
        for index, layer in enumerate(self.layers):
            x = layer(F.gelu(x) if index else x)
        return x * self.scales[1]


def text_model() -> Callable[..., nn.Module]:
    """Return what builds a GPT: the entry point `gpt` of the group `ebc_lab.lowbit.text_model`."""
    for entry in entry_points(group="ebc_lab.lowbit.text_model", name="gpt"):
        return cast(Callable[..., nn.Module], entry.load())
    raise ImportError(
        "no text model is installed: install ebc-lab (pip install ebc-lab), whose GPT is trained on text."
    )

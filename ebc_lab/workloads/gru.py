"""A recurrent language model: gated recurrent units, one layer upon the other.

* torch's GRU (Cho et al., arXiv:1406.1078), a module for each layer, so that a budget can tell them apart
* no residual stream and no norm: it is here because its curvature is not that of a transformer
* each layer has two matrices for its three gates, of inputs and of states, (3C, C) each, with biases
* weights ~ U(-1/sqrt(C), 1/sqrt(C)), torch's own; embedding ~ N(0, 1), torch's too, head ~ N(0, 0.02²)
"""

from __future__ import annotations

from torch import Tensor, nn

from ebc_lab.config.parts.model import ModelConfig

from .gpt import GPTWorkload


class GRU(nn.Module):
    """Tokens (B, T) of integers -> logits (B, T, V); every sequence begins at state 0."""

    def __init__(self, config: ModelConfig, vocabulary: int):
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, config.width)
        layers = (nn.GRU(config.width, config.width, batch_first=True) for _ in range(config.blocks))
        self.blocks = nn.ModuleList(layers)
        self.head = nn.Linear(config.width, vocabulary, bias=False)
        nn.init.normal_(self.head.weight, 0.0, 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens)  # (B, T, C)
        for layer in self.blocks:
            x, _ = layer(x)
        logits: Tensor = self.head(x)
        return logits


class GRUWorkload(GPTWorkload):
    """A GRU in the place of the GPT."""

    capturable = False  # cuDNN's recurrent kernels allocate as they run

    def make(self) -> nn.Module:
        return GRU(self.run.model, self.vocabulary)

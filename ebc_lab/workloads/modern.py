"""The GPT as it is built today: rotary positions, normalised queries and keys, RMSNorm, no biases.

* in all else the GPT of `gpt.py`, of which it has the matrices, their names and initial weights, so that a
  difference between the two comes from what is listed here
* positions turn queries and keys (Su et al., arXiv:2104.09864) instead of being learned and added
* an RMS norm with a gain of its own on the queries and on the keys of each head bounds the logits of
  attention: Henry et al., arXiv:2010.04245; Dehghani et al., arXiv:2302.05442
* torch's RMSNorm in the place of LayerNorm: Zhang & Sennrich, arXiv:1910.07467
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebc_lab.config.parts.model import ModelConfig

from .gpt import GPTWorkload, HiddenLinear, attend, draw_weights

BASE = 10000.0  # of the wavelengths of the positions, in tokens
EPS = torch.finfo(torch.float32).eps  # torch's own, which depends on the dtype otherwise than its docs say


def rotations(context: int, D: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles by which each position turns each pair of features, (T, D/2) each."""
    frequencies = BASE ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angles = torch.outer(torch.arange(context, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of features of each token by its angles; (…, T, D) -> the same shape."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        d = config.width
        self.heads = config.heads
        self.attention_norm = nn.RMSNorm(d, eps=EPS)
        self.q = HiddenLinear(d, d)
        self.k = HiddenLinear(d, d)
        self.v = HiddenLinear(d, d)
        self.q_norm = nn.RMSNorm(d // config.heads, eps=EPS)
        self.k_norm = nn.RMSNorm(d // config.heads, eps=EPS)
        self.o = HiddenLinear(d, d)
        self.mlp_norm = nn.RMSNorm(d, eps=EPS)
        self.mlp_in = HiddenLinear(d, 4 * d)
        self.mlp_out = HiddenLinear(4 * d, d)

    def forward(self, x: Tensor, B: int, cos: Tensor, sin: Tensor) -> Tensor:  # x: (B·T, C)
        weights = torch.cat([self.q.effective(), self.k.effective(), self.v.effective()])
        qkv = F.linear(self.attention_norm(x), weights)  # (B·T, 3C)
        parted = qkv.view(B, len(x) // B, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = parted  # (B, heads, T, D) each
        # norms and angles in float32, whatever the products are in
        q = rotated(self.q_norm(q.float()), cos, sin).to(v.dtype)
        k = rotated(self.k_norm(k.float()), cos, sin).to(v.dtype)
        x = x + self.o(attend(torch.stack([q, k, v])))
        x = x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return x


class ModernGPT(nn.Module):
    """Tokens (B, T) of integers -> logits (B, T, V)."""

    def __init__(self, config: ModelConfig, vocabulary: int):
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.norm = nn.RMSNorm(config.width, eps=EPS)
        self.head = nn.Linear(config.width, vocabulary, bias=False)
        self.cos: Tensor
        self.sin: Tensor
        cos, sin = rotations(config.context, config.width // config.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        draw_weights(self, config.blocks)

    def forward(self, tokens: Tensor) -> Tensor:
        B, T = tokens.shape
        x = self.token_embedding(tokens).view(B * T, -1)  # (B·T, C)
        for block in self.blocks:
            x = block(x, B, self.cos[:T], self.sin[:T])
        logits: Tensor = self.head(self.norm(x))
        return logits.view(B, T, -1)


class ModernGPTWorkload(GPTWorkload):
    """Such a GPT in the place of the other."""

    def make(self) -> nn.Module:
        return ModernGPT(self.run.model, self.vocabulary)

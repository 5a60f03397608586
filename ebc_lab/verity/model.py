"""A GPT of exact layers: pre-norm, learned positions, no biases, untied head."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .functions import normal_
from .ops import VLAEmbedding, VLALayerNorm, VLALinear, VLAStack, attention, gelu

STD = 0.02  # of the initial weights


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm = VLALayerNorm(width, bias=False)
        self.q = VLALinear(width, width, bias=False)
        self.k = VLALinear(width, width, bias=False)
        self.v = VLALinear(width, width, bias=False)
        self.o = VLALinear(width, width, bias=False)
        self.mlp_norm = VLALayerNorm(width, bias=False)
        self.mlp_in = VLALinear(width, 4 * width, bias=False)
        self.mlp_out = VLALinear(4 * width, width, bias=False)
        self.qkv = VLAStack(self.q, self.k, self.v)

    def forward(self, x: Tensor, B: int) -> Tensor:  # x: (B·T, C)
        x = x + self.o(attention(self.qkv(self.attention_norm(x)), B, self.heads))
        x = x + self.mlp_out(gelu(self.mlp_in(self.mlp_norm(x))))
        return x


class VerityGPT(nn.Module):
    """Tokens (B, T) of integers -> logits (B, T, V) float32; initial weights from `generator`, on the CPU.

    Matrices ~ N(0, 0.02²), those that write into the residual stream divided by sqrt(2·blocks).
    """

    def __init__(
        self,
        vocabulary: int,
        context: int,
        width: int,
        blocks: int,
        heads: int,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} must be a multiple of heads={heads}.")
        self.token_embedding = VLAEmbedding(vocabulary, width)
        self.position_embedding = VLAEmbedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm = VLALayerNorm(width, bias=False)
        self.head = VLALinear(width, vocabulary, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                writes = name.endswith((".o.weight", ".mlp_out.weight"))
                normal_(p, STD / math.sqrt(2 * blocks) if writes else STD, generator)

    def forward(self, tokens: Tensor) -> Tensor:
        B, T = tokens.shape
        places = torch.arange(T, device=tokens.device).expand(B, T).reshape(-1)
        x = self.token_embedding(tokens.reshape(-1)) + self.position_embedding(places)  # (B·T, C)
        for block in self.blocks:
            x = block(x, B)
        logits: Tensor = self.head(self.norm(x))
        return logits.view(B, T, -1)

"""The GPT that every run trains: pre-norm, learned positions, no biases, untied head.

* x + attention(norm(x)), then x + mlp(norm(x)); a last norm before the head
* q, k, v and o are matrices of their own, so that each can be budgeted or projected by itself
* weights ~ N(0, 0.02²), those that write into the residual stream divided by sqrt(2·blocks)
* attention runs in float32 on a CPU even under bfloat16 autocast: the fused CPU kernel's bfloat16 backward is slower
  than its float32 one by several times
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        d = config.width
        self.heads, self.dropout = config.heads, config.dropout
        self.attention_norm = nn.LayerNorm(d, bias=False)
        self.q = nn.Linear(d, d, bias=False)
        self.k = nn.Linear(d, d, bias=False)
        self.v = nn.Linear(d, d, bias=False)
        self.o = nn.Linear(d, d, bias=False)
        self.mlp_norm = nn.LayerNorm(d, bias=False)
        self.mlp_in = nn.Linear(d, 4 * d, bias=False)
        self.mlp_out = nn.Linear(4 * d, d, bias=False)
        self.drop = nn.Dropout(config.dropout)

    def attend(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (m(x).view(B, T, self.heads, C // self.heads).transpose(1, 2) for m in (self.q, self.k, self.v))
        p = self.dropout if self.training else 0.0
        if x.device.type == "cpu" and q.dtype == torch.bfloat16:
            with torch.autocast("cpu", enabled=False):
                y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), dropout_p=p, is_causal=True).to(q.dtype)
        else:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)  # (B, heads, T, C/heads)
        return self.o(y.transpose(1, 2).reshape(B, T, C))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attend(self.attention_norm(x)))
        return x + self.drop(self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x)))))


class GPT(nn.Module):
    """Tokens (B, T) of integers -> logits (B, T, V)."""

    def __init__(self, config: ModelConfig, vocabulary: int):
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, config.width)
        self.position_embedding = nn.Embedding(config.context, config.width)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.width, bias=False)
        self.head = nn.Linear(config.width, vocabulary, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                writes = name.endswith((".o.weight", ".mlp_out.weight"))
                nn.init.normal_(p, 0.0, 0.02 / math.sqrt(2 * config.blocks) if writes else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.drop(self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]])  # (B, T, C)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


MODELS = {"gpt": GPT}


def build(config: ModelConfig, vocabulary: int, seed: int) -> nn.Module:
    """The named model with its initial weights drawn from `seed` alone, on the CPU, float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[config.name](config, vocabulary)


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The matrices inside the blocks: q, k, v, o, mlp-in and mlp-out, in the model's order."""
    return [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]

"""The GPT that every run trains: pre-norm, learned positions, no biases, untied head.

* x + attention(norm(x)), then x + mlp(norm(x)); a last norm before the head
* q, k, v and o are matrices of their own, so that each can be budgeted or projected by itself
* weights ~ N(0, 0.02²), those that write into the residual stream divided by sqrt(2·blocks)
* q, k and v are applied as one matrix product
* the fused CPU kernel's bfloat16 backward is several times slower than its float32 one, so bfloat16 attention on a CPU is
  written out for short contexts and runs in float32 for long ones
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig

PLAIN_UP_TO = 128  # tokens


def attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Causal attention, (B, heads, T, D) -> the same shape and dtype."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    B, H, T, D = q.shape
    with torch.autocast("cpu", enabled=False):
        if dropout or T > PLAIN_UP_TO:
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), dropout_p=dropout, is_causal=True).to(
                q.dtype
            )
        future = torch.full((T, T), -torch.inf, dtype=q.dtype).triu_(1)
        q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
        scores = torch.baddbmm(future.expand(B * H, T, T), q, k.mT, alpha=D**-0.5)
        return torch.bmm(scores.softmax(-1), v).view(B, H, T, D)


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
        qkv = F.linear(x, torch.cat([self.q.weight, self.k.weight, self.v.weight]))  # (B, T, 3C)
        q, k, v = qkv.view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # (B, heads, T, C/heads) each
        y = attention(q, k, v, self.dropout if self.training else 0.0)
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

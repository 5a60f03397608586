"""What several of the loops' models are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, *, causal: bool = True, bias: bool = True):
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C); `mask` (B, T) is true where a key may be looked at."""
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        keys = None if mask is None else mask.bool()[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=keys, is_causal=self.causal)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, *, dropout: float = 0.0, causal: bool = True):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal=causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x), mask))
        return x + self.drop(self.mlp(self.norm2(x)))


def seeded(make: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return make(*args, **kwargs)


def adam(model: nn.Module, lr: float = 1e-2) -> list[Optimizer]:
    return [torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)]


def token_step(model: nn.Module, optimizers: list[Optimizer], batch: Any, carried: dict[str, Any]) -> None:
    """The plainest loop over tokens: what the model takes, and then the targets (B, T)."""
    *given, y = batch
    (optimizer,) = optimizers
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(*given).flatten(0, 1), y.flatten())
    loss.backward()
    optimizer.step()


def class_step(model: nn.Module, optimizers: list[Optimizer], batch: Any, carried: dict[str, Any]) -> None:
    """The plainest classifier: classes (B,), or probabilities of them (B, V)."""
    x, y = batch
    (optimizer,) = optimizers
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

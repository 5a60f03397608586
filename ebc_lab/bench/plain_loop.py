"""The loop that the lab is compared with: a character GPT in plain PyTorch, eager, float32, default Adam.

Uses torch and nothing of the lab: it is what one would write without it. No dropout.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        y = self.attention_norm(x)
        q, k, v = (
            f(y).view(B, T, self.heads, C // self.heads).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(B, T, C))
        mlp: Tensor = self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return x + mlp


class GPT(nn.Module):
    """Tokens (B, T) -> logits (B, T, V). Takes the weights of the lab's GPT, by the same names."""

    def __init__(self, vocabulary: int, *, blocks: int, width: int, heads: int, context: int):
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                writes = name.endswith(("o.weight", "mlp_out.weight"))
                nn.init.normal_(p, 0.0, 0.02 / (2 * blocks) ** 0.5 if writes else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


class PlainLoop:
    """Trains a GPT of `shape` (blocks, width, heads, context) on random windows of `data`, tokens."""

    def __init__(
        self,
        data: Sequence[int],
        vocabulary: int,
        *,
        batch: int,
        lr: float,
        seed: int,
        device: str,
        **shape: int,
    ):
        torch.manual_seed(seed)
        self.data = torch.tensor(data)
        self.batch = batch
        self.context = shape["context"]
        self.device = device
        self.model = GPT(vocabulary, **shape).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=lr)

    def step(self) -> Tensor:
        """-> the loss before the update, nats per token, not yet read from the device."""
        starts = torch.randint(len(self.data) - self.context, (self.batch,)).tolist()
        inputs = torch.stack([self.data[i : i + self.context] for i in starts]).to(self.device)
        targets = torch.stack([self.data[i + 1 : i + 1 + self.context] for i in starts]).to(self.device)
        logits = self.model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def steps(self, count: int) -> float:
        """Seconds for the next `count` steps."""
        start = time.perf_counter()
        for _ in range(count):
            self.step()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def main() -> None:
    """Build the loop of the first line of input and print its threads; then the seconds of as many steps as
    each further line says."""
    loop = PlainLoop(**json.loads(sys.stdin.readline()))
    print(torch.get_num_threads(), flush=True)
    for line in sys.stdin:
        print(loop.steps(int(line)), flush=True)


if __name__ == "__main__":
    main()

"""Language models on (B, T) tokens, in the shapes of the repositories that people start from."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from .data import V, log_softmax, shifted
from .loop import Loop
from .parts import Attention, Block, seeded

# -- nanoGPT -------------------------------------------------------------------------------------------------


class GPT(nn.Module):
    """`forward(idx, targets)` is (logits, loss)."""

    def __init__(self, width: int = 64, depth: int = 2, dropout: float = 0.1):
        super().__init__()
        self.wte = nn.Embedding(V, width)
        self.wpe = nn.Embedding(32, width)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList(Block(width, 4, dropout=dropout) for _ in range(depth))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, V, bias=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.drop(self.wte(idx) + self.wpe(torch.arange(idx.shape[1])))
        for block in self.h:
            x = block(x)
        x = self.ln_f(x)
        if targets is None:  # to generate, it needs the last position alone
            return self.lm_head(x[:, [-1]]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.view(-1, V), targets.view(-1), ignore_index=-1)


def decayed_groups(model: nn.Module, lr: float) -> list[Optimizer]:
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))]


def rate_at(step: int, peak: float = 1e-2, warmup: int = 5, length: int = 200) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, step / length))))


def nanogpt_step(model: nn.Module, optimizers: list[Optimizer], batch: Any, carried: dict[str, Any]) -> None:
    x, y = batch
    (optimizer,) = optimizers
    step = carried.get("step", 0)
    for group in optimizer.param_groups:
        group["lr"] = rate_at(step)
    _, loss = model(x, y)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    carried["step"] = step + 1


NANOGPT = Loop(
    name="nanoGPT",
    like="(logits, loss), targets positional, dropout, tied weights, clipped gradient, cosine rate",
    build=partial(seeded, GPT),
    optimizers=partial(decayed_groups, lr=1e-2),
    batch=shifted,
    step=nanogpt_step,
    log_p=lambda model, batch: log_softmax(model(*batch)[0]),
    options={"logits_of": lambda output: output[0]},
    target_kl=0.001,
    refused=r"output\[0\]",
    quick=True,
)

# -- nanochat ------------------------------------------------------------------------------------------------


class Nanochat(nn.Module):
    """Return the loss alone where targets are given; the head begins at zero, as each residual branch."""

    def __init__(self, width: int = 64, depth: int = 2):
        super().__init__()
        self.wte = nn.Embedding(V, width)
        self.attention = nn.ModuleList(Attention(width, 4, bias=False) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(width, 4 * width, bias=False) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(4 * width, width, bias=False) for _ in range(depth))
        self.lm_head = nn.Linear(width, V, bias=False)
        for zero in (self.lm_head, *self.down, *(a.proj for a in self.attention)):
            nn.init.zeros_(zero.weight)

    def logits(self, idx: Tensor) -> Tensor:
        x = F.rms_norm(self.wte(idx), (self.wte.embedding_dim,))
        for attend, up, down in zip(self.attention, self.up, self.down, strict=True):
            x = x + attend(F.rms_norm(x, x.shape[-1:]))
            x = x + down(up(F.rms_norm(x, x.shape[-1:])).relu().square())
        logits = self.lm_head(F.rms_norm(x, x.shape[-1:]))
        return 15 * torch.tanh(logits / 15)

    def forward(self, idx: Tensor, targets: Tensor | None = None, loss_reduction: str = "mean") -> Tensor:
        logits = self.logits(idx)
        if targets is None:
            return logits
        return F.cross_entropy(
            logits.view(-1, V), targets.view(-1), ignore_index=-1, reduction=loss_reduction
        )


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    hidden = [p for name, p in model.named_parameters() if not name.startswith(("wte", "lm_head"))]
    others = [p for name, p in model.named_parameters() if name.startswith(("wte", "lm_head"))]
    return [torch.optim.Muon(hidden, lr=0.02), torch.optim.AdamW(others, lr=1e-2, weight_decay=0.0)]


def loss_step(model: nn.Module, optimizers: list[Optimizer], batch: Any, carried: dict[str, Any]) -> None:
    x, y = batch
    loss = model(x, y)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad(set_to_none=True)


NANOCHAT = Loop(
    name="nanochat",
    like="the loss alone where targets are given, Muon and AdamW, softcap, zero-init head",
    build=partial(seeded, Nanochat),
    optimizers=muon_and_adamw,
    batch=shifted,
    step=loss_step,
    log_p=lambda model, batch: log_softmax(model(batch[0])),
    options={"drop": ("targets",)},
    target_kl=0.001,
    refused="looks like a loss.*drop=",
    quick=True,
)

LOOPS = [NANOGPT, NANOCHAT]

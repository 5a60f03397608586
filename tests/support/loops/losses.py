"""Causal models with other losses, other forwards, or other arithmetic around them."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from .data import V, log_softmax, shifted, text
from .loop import Loop
from .parts import Attention, Causal, adam, seeded

# -- a wrapper that returns its loss -------------------------------------------------------------------------


class Autoregressive(nn.Module):
    """As in x-transformers: shifts the rows that it is given and returns the loss of its `net`."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x[:, :-1])
        return F.cross_entropy(logits.transpose(1, 2), x[:, 1:])


def wrapper() -> nn.Module:
    return Autoregressive(Causal(V))


def wrapper_step(model: nn.Module, optimizers: list[Optimizer], batch: Any, carried: dict[str, Any]) -> None:
    (optimizer,) = optimizers
    model.train()
    loss = model(batch)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()


WRAPPER = Loop(
    name="x-transformers",
    like="a wrapper whose forward returns the loss alone",
    build=partial(seeded, wrapper),
    optimizers=adam,
    batch=text,
    step=wrapper_step,
    log_p=lambda model, batch: log_softmax(model.net(batch[:, :-1])),
    target_kl=0.001,
    attach_to=lambda model: model.net,
)

# -- label smoothing and a z-loss ----------------------------------------------------------------------------


def smoothed_step(model: nn.Module, optimizers: list[Optimizer], batch: Any, carried: dict[str, Any]) -> None:
    x, y = batch
    (optimizer,) = optimizers
    optimizer.zero_grad(set_to_none=True)
    logits = model(x)
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), label_smoothing=0.1)
    loss = loss + 1e-4 * logits.logsumexp(-1).square().mean()
    loss.backward()
    optimizer.step()


SMOOTHED = Loop(
    name="label smoothing and z-loss",
    like="label_smoothing=0.1, and the squared logsumexp beside it",
    build=partial(seeded, Causal, V),
    optimizers=adam,
    batch=shifted,
    step=smoothed_step,
    log_p=lambda model, batch: log_softmax(model(batch[0])),
    target_kl=0.001,
)

# -- mixture of experts --------------------------------------------------------------------------------------


class Switch(nn.Module):
    """One expert for each token; in training the router sees its input multiplied by noise."""

    def __init__(self, width: int = 64, experts: int = 4, jitter: float = 0.1):
        super().__init__()
        self.jitter = jitter
        self.tokens = nn.Embedding(V, width)
        self.attention = Attention(width, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(experts)
        )
        self.head = nn.Linear(width, V)
        self.balance: Tensor | None = None

    def forward(self, idx: Tensor) -> Tensor:
        x = self.tokens(idx)
        x = x + self.attention(self.norms[0](x))
        h = self.norms[1](x)
        noisy = h
        if self.training and self.jitter:
            noisy = h * torch.empty_like(h).uniform_(1 - self.jitter, 1 + self.jitter)
        gates = self.router(noisy).softmax(-1)
        weight, chosen = gates.max(-1)
        out = torch.zeros_like(h)
        for i, expert in enumerate(self.experts):
            taken = chosen == i
            out[taken] = expert(h[taken])
        share = F.one_hot(chosen, len(self.experts)).float().mean((0, 1))
        self.balance = len(self.experts) * (share * gates.mean((0, 1))).sum()
        return self.head(self.norms[2](x + weight[..., None] * out))


def switch_step(model: nn.Module, optimizers: list[Optimizer], batch: Any, carried: dict[str, Any]) -> None:
    x, y = batch
    (optimizer,) = optimizers
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten()) + 0.01 * model.balance
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


SWITCH = Loop(
    name="Switch",
    like="mixture of experts with jitter noise in training, and a balancing loss kept by the model",
    build=partial(seeded, Switch),
    optimizers=adam,
    batch=shifted,
    step=switch_step,
    log_p=lambda model, batch: log_softmax(model(batch[0])),
    target_kl=0.001,
)

# -- accumulation with a GradScaler --------------------------------------------------------------------------


def accumulated_step(
    model: nn.Module, optimizers: list[Optimizer], batch: Any, carried: dict[str, Any]
) -> None:
    (optimizer,) = optimizers
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=10)
    if "scaler" in carried:
        scaler.load_state_dict(carried["scaler"])
    parts = list(zip(*(t.chunk(4) for t in batch), strict=True))
    for x, y in parts:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten()) / len(parts)
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    carried["scaler"] = scaler.state_dict()


ACCUMULATED = Loop(
    name="accumulation with a GradScaler",
    like="four micro-batches for each step, autocast, scaled losses",
    build=partial(seeded, Causal, V),
    optimizers=adam,
    batch=partial(shifted, rows=32),
    step=accumulated_step,
    log_p=lambda model, batch: log_softmax(model(batch[0])),
    target_kl=0.002,
)

# -- preferences ---------------------------------------------------------------------------------------------


def pairs(number: int, rows: int = 16) -> tuple[Tensor, Tensor]:
    """What was preferred, and what was not: the same beginning, and another text behind it."""
    chosen = text(number, rows, 24)
    rejected = torch.cat([chosen[:, :8], (chosen[:, 8:] * 7 + 5) % V], 1)
    return chosen, rejected


def answer_log_p(logits: Tensor, rows: Tensor) -> Tensor:
    """Of what stands behind the beginning, (rows,)."""
    log_p = logits[:, :-1].log_softmax(-1).gather(-1, rows[:, 1:, None])[..., 0]
    return log_p[:, 7:].sum(-1)


def dpo_step(model: nn.Module, optimizers: list[Optimizer], batch: Any, carried: dict[str, Any]) -> None:
    (optimizer,) = optimizers
    if "reference" not in carried:
        carried["reference"] = copy.deepcopy(model).eval().requires_grad_(False)
    rows = torch.cat(batch)
    with torch.no_grad():
        known = answer_log_p(carried["reference"](rows), rows)
    chosen, rejected = (answer_log_p(model(rows), rows) - known).chunk(2)
    loss = -F.logsigmoid(0.1 * (chosen - rejected)).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


DPO = Loop(
    name="DPO",
    like="chosen and rejected rows in one forward, a frozen copy of the model as reference",
    build=partial(seeded, Causal, V),
    optimizers=partial(adam, lr=3e-3),
    batch=pairs,
    step=dpo_step,
    log_p=lambda model, batch: log_softmax(model(torch.cat(batch))),
    target_kl=0.0002,
)

LOOPS = [WRAPPER, SMOOTHED, SWITCH, ACCUMULATED, DPO]

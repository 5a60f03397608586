"""Loops whose batches are (T, B), or whose classes are on the second axis."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import V, log_softmax, shifted
from .loop import Loop
from .parts import adam, class_step, seeded, token_step

ROWS = 24


def columns(number: int, length: int = 48) -> tuple[Tensor, Tensor]:
    """(length, ROWS) each."""
    x, y = shifted(number, ROWS, length)
    return x.t().contiguous(), y.t().contiguous()


# -- a recurrent network over characters ---------------------------------------------------------------------


class Characters(nn.Module):
    """(T, B) -> (T, B, V)."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.embedding = nn.Embedding(V, width)
        self.rnn = nn.LSTM(width, width, num_layers=2)
        self.out = nn.Linear(width, V)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.rnn(self.embedding(x))
        return self.out(h)


CHARACTERS = Loop(
    name="char-rnn",
    like="(T, B) -> (T, B, V)",
    build=partial(seeded, Characters),
    optimizers=adam,
    batch=columns,
    step=token_step,
    log_p=lambda model, batch: log_softmax(model(batch[0])),
    options={"batch_dim": 1},
    target_kl=0.0005,
    quick=True,
)

# -- classes on the second axis ------------------------------------------------------------------------------


class WaveNet(nn.Module):
    """Dilated causal convolutions, (B, T) -> (B, V, T), as `nn.CrossEntropyLoss` takes it."""

    def __init__(self, channels: int = 48, depth: int = 4):
        super().__init__()
        self.embedding = nn.Embedding(V, channels)
        self.layers = nn.ModuleList(nn.Conv1d(channels, 2 * channels, 2, dilation=2**i) for i in range(depth))
        self.skips = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in range(depth))
        self.out = nn.Conv1d(channels, V, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x).transpose(1, 2)
        total = torch.zeros_like(h)
        for layer, skip in zip(self.layers, self.skips, strict=True):
            signal, gate = layer(F.pad(h, (layer.dilation[0], 0))).chunk(2, 1)
            h = h + signal.tanh() * gate.sigmoid()
            total = total + skip(h)
        return self.out(total.relu())


WAVENET = Loop(
    name="WaveNet",
    like="logits (B, V, T), the classes on the second axis",
    build=partial(seeded, WaveNet),
    optimizers=adam,
    batch=partial(shifted, rows=8, length=96),
    step=class_step,
    log_p=lambda model, batch: log_softmax(model(batch[0]).movedim(1, -1)),
    options={"logits_of": lambda z: z.movedim(1, -1)},
    target_kl=0.001,
    refused=r"axis 1 .*movedim\(1, -1\)",
    quick=True,
)

LOOPS = [CHARACTERS, WAVENET]

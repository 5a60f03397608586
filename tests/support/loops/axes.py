"""Loops whose batches are (T, B), or whose classes are on the second axis."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from .data import V, log_softmax, padding, shifted, text
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

# -- translation with nn.Transformer -------------------------------------------------------------------------


class Translator(nn.Module):
    """Sentences (S, B) and (T, B), masks of both (B, S) and (B, T) that are true at padding -> (T, B, V)."""

    def __init__(self, width: int = 48):
        super().__init__()
        self.source = nn.Embedding(V + 1, width)
        self.target = nn.Embedding(V + 1, width)
        self.positions = nn.Parameter(0.1 * torch.randn(32, 1, width))
        self.transformer = nn.Transformer(width, 4, 1, 1, 2 * width, dropout=0.1)
        self.generator = nn.Linear(width, V)

    def forward(
        self,
        src: Tensor,
        trg: Tensor,
        src_mask: Tensor,
        tgt_mask: Tensor,
        src_padding_mask: Tensor,
        tgt_padding_mask: Tensor,
        memory_key_padding_mask: Tensor,
    ) -> Tensor:
        out = self.transformer(
            self.source(src) + self.positions[: len(src)],
            self.target(trg) + self.positions[: len(trg)],
            src_mask,
            tgt_mask,
            None,
            src_padding_mask,
            tgt_padding_mask,
            memory_key_padding_mask,
        )
        return self.generator(out)


def sentences(number: int, rows: int = 48) -> tuple[Tensor, Tensor]:
    """(14, rows) and its translation (13, rows), padded by V."""
    source = text(number, rows, 14)
    kept = padding(number, rows, 14, longest=14, shortest=5)
    target = ((source + 1) % V).masked_fill(~kept, V)
    return source.masked_fill(~kept, V).t(), target[:, 1:].t()


def translator_arguments(src: Tensor, trg: Tensor) -> tuple[Tensor, ...]:
    given = trg[:-1]
    ahead = nn.Transformer.generate_square_subsequent_mask(len(given)).isinf()
    everything = torch.zeros(len(src), len(src), dtype=torch.bool)
    src_padding, trg_padding = (src == V).t(), (given == V).t()
    return src, given, everything, ahead, src_padding, trg_padding, src_padding


def translator_step(
    model: nn.Module, optimizers: list[Optimizer], batch: Any, carried: dict[str, Any]
) -> None:
    (optimizer,) = optimizers
    logits = model(*translator_arguments(*batch))
    optimizer.zero_grad()
    wanted = batch[1][1:]
    loss = F.cross_entropy(logits.reshape(-1, V), wanted.reshape(-1), ignore_index=V)
    loss.backward()
    optimizer.step()


def translator_log_p(model: nn.Module, batch: Any) -> Tensor:
    return log_softmax(model(*translator_arguments(*batch)))[(batch[1][:-1] != V).flatten()]


TRANSLATOR = Loop(
    name="translation with nn.Transformer",
    like="(T, B), four masks by their places, those of padding (B, T) and true where there is none",
    build=partial(seeded, Translator),
    optimizers=partial(adam, lr=3e-3),
    batch=sentences,
    step=translator_step,
    log_p=translator_log_p,
    options={"batch_dim": 1, "mask_of": lambda given: ~given["tgt_padding_mask"].t()},
    target_kl=0.0005,
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

LOOPS = [CHARACTERS, TRANSLATOR, WAVENET]

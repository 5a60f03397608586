"""Loops whose outputs are not logits (B, ..., V): classes on another axis, probabilities, labels, values."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from .data import V, drawn, features, log_bernoulli, log_softmax, shifted
from .loop import Loop
from .parts import adam, perceptron, seeded

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


def wavenet_step(model: nn.Module, optimizers: list[Optimizer], batch: Any, carried: dict[str, Any]) -> None:
    x, y = batch
    (optimizer,) = optimizers
    optimizer.zero_grad()
    loss = nn.CrossEntropyLoss()(model(x), y)
    loss.backward()
    optimizer.step()


WAVENET = Loop(
    name="WaveNet",
    like="logits (B, V, T), the classes on the second axis",
    build=partial(seeded, WaveNet),
    optimizers=adam,
    batch=partial(shifted, rows=8, length=96),
    step=wavenet_step,
    log_p=lambda model, batch: log_softmax(model(batch[0]).movedim(1, -1)),
    options={"logits_of": lambda z: z.movedim(1, -1)},
    target_kl=0.001,
    refused=r"axis 1 .*movedim\(1, -1\)",
    quick=True,
)

# -- probabilities -------------------------------------------------------------------------------------------


class Ngram(nn.Module):
    """The words before are embedded side by side; the output layer is a softmax."""

    def __init__(self, width: int = 32, hidden: int = 128):
        super().__init__()
        self.embedding = nn.Embedding(V, width)
        self.hidden = nn.Linear(3 * width, hidden)
        self.out = nn.Linear(hidden, V)

    def forward(self, context: Tensor) -> Tensor:
        h = torch.tanh(self.hidden(self.embedding(context).flatten(1)))
        return F.softmax(self.out(h), dim=-1)


def contexts(number: int) -> tuple[Tensor, Tensor]:
    """Three words (512, 3) and those after them."""
    x, y = shifted(number, 16, 34)
    return x.unfold(1, 3, 1).reshape(-1, 3), y[:, 2:].flatten()


def ngram_step(model: nn.Module, optimizers: list[Optimizer], batch: Any, carried: dict[str, Any]) -> None:
    context, word = batch
    (optimizer,) = optimizers
    probabilities = model(context)
    loss = F.nll_loss(torch.log(probabilities), word)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


PROBABILITIES = Loop(
    name="neural n-gram",
    like="returns probabilities, and the loss takes their log",
    build=partial(seeded, Ngram),
    optimizers=partial(adam, lr=2e-2),
    batch=contexts,
    step=ngram_step,
    log_p=lambda model, batch: log_softmax(model(batch[0]).double().log()),
    options={"logits_of": torch.log},
    target_kl=0.001,
    refused=r"probabilities.*torch\.log",
    quick=True,
)

# -- a Bernoulli for each label ------------------------------------------------------------------------------


def two_logits(z: Tensor) -> Tensor:
    return torch.stack([torch.zeros_like(z), z], -1)


def many_labels(number: int) -> tuple[Tensor, Tensor]:
    """(256, 32) features, (256, 80) labels, one in five true."""
    x, logits = features(number, 256, 32, 80)
    return x, (torch.rand(logits.shape, generator=drawn(number + 1)) < (logits - 2).sigmoid()).float()


def one_label(number: int) -> tuple[Tensor, Tensor]:
    """(512, 32) features, (512, 1) labels."""
    x, logits = features(number, 512, 32, 1)
    return x, (torch.rand(logits.shape, generator=drawn(number + 1)) < logits.sigmoid()).float()


def label_step(model: nn.Module, optimizers: list[Optimizer], batch: Any, carried: dict[str, Any]) -> None:
    x, y = batch
    (optimizer,) = optimizers
    loss = F.binary_cross_entropy_with_logits(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


MULTI_LABEL = Loop(
    name="multi-label tagger",
    like="(B, labels), a binary cross-entropy for each label",
    build=partial(seeded, perceptron, 32, 80),
    optimizers=adam,
    batch=many_labels,
    step=label_step,
    log_p=lambda model, batch: log_bernoulli(model(batch[0])),
    options={"logits_of": two_logits},
    target_kl=0.0005,
    refused=r"torch\.stack\(\[torch\.zeros_like\(z\), z\], -1\)",
)

BINARY = Loop(
    name="binary classifier",
    like="one logit, (B, 1)",
    build=partial(seeded, perceptron, 32, 1),
    optimizers=adam,
    batch=one_label,
    step=label_step,
    log_p=lambda model, batch: log_bernoulli(model(batch[0])),
    options={"logits_of": two_logits},
    target_kl=0.0005,
    refused="one class",
)

# -- values --------------------------------------------------------------------------------------------------


def value_step(model: nn.Module, optimizers: list[Optimizer], batch: Any, carried: dict[str, Any]) -> None:
    x, y = batch
    (optimizer,) = optimizers
    loss = F.mse_loss(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


REGRESSION = Loop(
    name="regression",
    like="several values with a squared error: EBC takes them for classes, cannot help, and says so",
    build=partial(seeded, perceptron, 32, 8),
    optimizers=partial(adam, lr=3e-3),
    batch=partial(features, rows=512, inputs=32, outputs=8),
    step=value_step,
    log_p=lambda model, batch: log_softmax(model(batch[0])),
    target_kl=0.0005,
    warned="a regression has no such KL",
)

LOOPS = [WAVENET, PROBABILITIES, MULTI_LABEL, BINARY, REGRESSION]

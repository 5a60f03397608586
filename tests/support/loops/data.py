"""What the loops train on: text of a Markov chain, noisy images, labels of a teacher. All from a number."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

V = 64  # symbols of the text
CLASSES = 10
IGNORED = -100


def generator(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


@functools.cache
def _chain() -> Tensor:
    """(V, V), the cumulative probabilities of the next symbol; some symbols are frequent after any other."""
    g = generator(7)
    return (2 * torch.randn(V, V, generator=g) + 2 * torch.randn(V, generator=g)).softmax(-1).cumsum(-1)


def text(number: int, rows: int = 16, length: int = 33) -> Tensor:
    """(rows, length) symbols."""
    chain = _chain()
    u = torch.rand(length, rows, generator=generator(number))
    symbols = [(u[0] * V).long()]
    for t in range(1, length):
        symbols.append((chain[symbols[-1]] < u[t, :, None]).sum(-1).clamp(max=V - 1))
    return torch.stack(symbols, 1)


def shifted(number: int, rows: int = 16, length: int = 32) -> tuple[Tensor, Tensor]:
    """Inputs and next symbols, (rows, length) each."""
    symbols = text(number, rows, length + 1)
    return symbols[:, :-1].contiguous(), symbols[:, 1:].contiguous()


def padding(number: int, rows: int, length: int, longest: int, shortest: int = 3) -> Tensor:
    """(rows, length) bools, true where a row still has text; most rows are short."""
    share = torch.rand(rows, generator=generator(number + 1)).square()
    lengths = (shortest + share * (longest + 1 - shortest)).long()
    return torch.arange(length) < lengths[:, None]


@functools.cache
def prototypes(size: int) -> Tensor:
    return torch.randn(CLASSES, 3, size, size, generator=generator(8))


def images(number: int, rows: int = 256, size: int = 8) -> tuple[Tensor, Tensor]:
    """(rows, 3, size, size) and classes (rows,)."""
    g = generator(number)
    labels = torch.randint(CLASSES, (rows,), generator=g)
    return prototypes(size)[labels] + 2 * torch.randn(rows, 3, size, size, generator=g), labels


@functools.cache
def _teacher(inputs: int, outputs: int) -> Tensor:
    return torch.randn(inputs, outputs, generator=generator(9)) / inputs**0.5


def features(number: int, rows: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """(rows, inputs), and what a teacher says of them: logits (rows, outputs)."""
    x = torch.randn(rows, inputs, generator=generator(number))
    return x, 2 * x @ _teacher(inputs, outputs)


def log_softmax(logits: Tensor) -> Tensor:
    """(..., V) -> (N, V), float64."""
    return logits.detach().double().flatten(0, -2).log_softmax(-1)

"""What the tests of the trainer train: a tiny model, a text it can learn, a trainer that says nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebc_lab.axiom.trainer import AXIOM_Trainer

WORDS = 12


class Tiny(nn.Module):
    """An embedding and a linear map: the next word from this one."""

    def __init__(self, width: int = 6, dropout: float = 0.0):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(width, WORDS)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        logits = self.out(self.dropout(self.embedding(input_ids)))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def tiny(width: int = 6, dropout: float = 0.0) -> Tiny:
    torch.manual_seed(1)
    return Tiny(width, dropout)


def batches(count: int = 4, rows: int = 3, length: int = 5) -> list[tuple[Tensor, Tensor]]:
    """Batches of a text in which every word is followed by the one three further on."""
    draw = torch.Generator().manual_seed(2)
    starts = torch.randint(WORDS, (count, rows, 1), generator=draw)
    text = (starts + 3 * torch.arange(length + 1)) % WORDS
    return [(rows[:, :-1], rows[:, 1:]) for rows in text]


def quiet(model: nn.Module, loader: Any, val_loader: Any = None, **settings: Any) -> AXIOM_Trainer:
    given = {"lr": 0.05, "log_interval": 0, "save_results": False, "warmup_steps": 3}
    return AXIOM_Trainer(model, loader, val_loader, **(given | settings))


def bits(x: Any) -> Any:
    """Something to compare to the bit: tensors as bytes, whatever holds them."""
    if isinstance(x, Tensor):
        return (str(x.dtype), tuple(x.shape), x.detach().reshape(-1).view(torch.uint8).tolist())
    if isinstance(x, dict):
        return {name: bits(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [bits(value) for value in x]
    return x


def everything(trainer: AXIOM_Trainer) -> Any:
    """Whatever a failed load must leave as it is."""
    return bits(
        {
            "model": trainer.model.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "results": trainer.results(),
            "hooked": trainer.optimizer.hooked,
            "rng": torch.get_rng_state(),
        }
    )


class From:
    """The batches of a list, from one of them on in the first pass: a loader that a test positions."""

    def __init__(self, pairs: list[Any], start: int):
        self.pairs = pairs
        self.start = start

    def __iter__(self) -> Iterator[Any]:
        start, self.start = self.start, 0
        return iter(self.pairs[start:])

"""Loops whose batches are (T, B): recurrent networks, and torch's own transformer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from .data import V, log_softmax, padding, shifted, text
from .loop import Loop
from .parts import adam, seeded

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


def characters_step(
    model: nn.Module, optimizers: list[Optimizer], batch: Any, carried: dict[str, Any]
) -> None:
    x, y = batch
    (optimizer,) = optimizers
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x).view(-1, V), y.view(-1))
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()


CHARACTERS = Loop(
    name="char-rnn",
    like="(T, B) -> (T, B, V)",
    build=partial(seeded, Characters),
    optimizers=adam,
    batch=columns,
    step=characters_step,
    log_p=lambda model, batch: log_softmax(model(batch[0])),
    options={"batch_dim": 1},
    target_kl=0.0005,
    quick=True,
)

# -- word_language_model -------------------------------------------------------------------------------------

State = tuple[Tensor, Tensor]
BPTT = 20


class Words(nn.Module):
    """(T, B) and a state -> log-probabilities (T·B, V) and the state after them."""

    def __init__(self, width: int = 64, dropout: float = 0.2):
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(V, width)
        self.rnn = nn.LSTM(width, width, 2, dropout=dropout)
        self.decoder = nn.Linear(width, V)
        self.decoder.weight = self.encoder.weight
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def first(self, rows: int) -> State:
        zeros = self.decoder.weight.new_zeros(2, rows, self.rnn.hidden_size)
        return zeros, zeros

    def forward(self, x: Tensor, hidden: State) -> tuple[Tensor, State]:
        h, hidden = self.rnn(self.drop(self.encoder(x)), hidden)
        decoded = self.decoder(self.drop(h)).view(-1, V)
        return F.log_softmax(decoded, dim=1), hidden


def words_step(model: nn.Module, optimizers: list[Optimizer], batch: Any, carried: dict[str, Any]) -> None:
    x, y = batch
    (optimizer,) = optimizers
    hidden = carried.get("hidden") or model.first(ROWS)
    model.zero_grad()
    output, hidden = model(x, hidden)
    loss = nn.NLLLoss()(output, y.view(-1))
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.25)
    optimizer.step()
    carried["hidden"] = tuple(h.detach() for h in hidden)


def words_log_p(model: nn.Module, batch: Any) -> Tensor:
    """From a state that has seen as many words, as in training."""
    x, _ = batch
    _, hidden = model(x, model.first(ROWS))
    return log_softmax(model(x, hidden)[0])


WORDS = Loop(
    name="word_language_model",
    like="(T, B), a state that is handed on, log-probabilities flattened to (T·B, V)",
    build=partial(seeded, Words),
    optimizers=lambda model: [torch.optim.SGD(model.parameters(), lr=5.0)],
    batch=partial(columns, length=BPTT),
    step=words_step,
    log_p=words_log_p,
    options={"logits_of": lambda output: output[0].unflatten(0, (BPTT, -1)), "batch_dim": 1},
    target_kl=0.0005,
    refused=r"output\[0\]",
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

LOOPS = [CHARACTERS, WORDS, TRANSLATOR]

"""Models that cannot take a part of their batch, masks by their place, and adapters on a frozen base."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from .data import CLASSES, V, images, log_softmax, padding, shifted
from .loop import Loop
from .parts import Block, Causal, adam, class_step, seeded, token_step

# -- the batch's size is baked in ----------------------------------------------------------------------------


class ClassToken(nn.Module):
    """A vision transformer whose class token was made for one size of batch."""

    def __init__(self, rows: int, width: int = 32, size: int = 8, patch: int = 4):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.register_buffer("first", torch.randn(rows, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (size // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, 2, causal=False) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.first, h], 1) + self.positions
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h[:, 0]))


CLASS_TOKEN = Loop(
    name="ViT of one batch size",
    like="a class token of the shape (batch, 1, width)",
    build=partial(seeded, ClassToken, 256),
    optimizers=adam,
    batch=images,
    step=class_step,
    log_p=lambda model, batch: log_softmax(model(batch[0])),
    target_kl=0.0005,
    warned="all 256 rows",
    quick=True,
)


class BufferedMask(nn.Module):
    """Its causal mask is a buffer (batch · heads, T, T), as `nn.MultiheadAttention` takes one."""

    def __init__(self, rows: int, length: int, width: int = 64, heads: int = 4):
        super().__init__()
        self.tokens = nn.Embedding(V, width)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, V))
        ahead = torch.ones(length, length).triu(1).bool()
        self.register_buffer("mask", ahead.repeat(rows * heads, 1, 1))

    def forward(self, idx: Tensor) -> Tensor:
        x = self.tokens(idx)
        h = self.norm(x)
        return self.head(x + self.attention(h, h, h, attn_mask=self.mask, need_weights=False)[0])


BUFFERED_MASK = Loop(
    name="attention mask of one batch size",
    like="a causal mask of the shape (batch · heads, T, T), as a buffer",
    build=partial(seeded, BufferedMask, 16, 32),
    optimizers=adam,
    batch=shifted,
    step=token_step,
    log_p=lambda model, batch: log_softmax(model(batch[0])),
    target_kl=0.0005,
    warned="all 16 rows",
)


class Places(nn.Module):
    """A state for each place in the batch; `rows` says which."""

    def __init__(self, rows: int, width: int = 64):
        super().__init__()
        self.tokens = nn.Embedding(V, width)
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.states = nn.Parameter(0.1 * torch.randn(rows, width))
        self.head = nn.Linear(width, V)

    def forward(self, idx: Tensor, rows: list[int]) -> Tensor:
        h, _ = self.rnn(self.tokens(idx), self.states[rows][None])
        return self.head(h)


def placed(number: int) -> tuple[Tensor, list[int], Tensor]:
    x, y = shifted(number)
    return x, list(range(len(x))), y


PLACES = Loop(
    name="a state for each place in the batch",
    like="a list of the batch's row numbers among the arguments",
    build=partial(seeded, Places, 16),
    optimizers=adam,
    batch=placed,
    step=token_step,
    log_p=lambda model, batch: log_softmax(model(*batch[:-1])),
    target_kl=0.0005,
    warned="all 16 rows",
)

# -- a mask by its place -------------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self, width: int = 32):
        super().__init__()
        self.tokens = nn.Embedding(V + 1, width)
        self.positions = nn.Embedding(64, width)
        self.blocks = nn.ModuleList(Block(width, 4, dropout=0.1, causal=False) for _ in range(2))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, CLASSES))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        for block in self.blocks:
            x = block(x, attention_mask)
        return self.head(x)


def tagged(number: int, rows: int = 40, length: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and tags, (rows, length) each; most of it is padding."""
    ids, _ = shifted(number, rows, length)
    mask = padding(number, rows, length, longest=14)
    return ids.masked_fill(~mask, V), mask.long(), (ids % CLASSES).masked_fill(~mask, -100)


def tagged_log_p(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    ids, mask, _ = batch
    return log_softmax(model(ids, mask))[mask.flatten().bool()]


ENCODER = Loop(
    name="encoder of padded rows",
    like="the attention mask is given by its place, and most positions are padding",
    build=partial(seeded, Encoder),
    optimizers=adam,
    batch=tagged,
    step=token_step,
    log_p=tagged_log_p,
    target_kl=0.0002,
    quick=True,
)

# -- LoRA ----------------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A frozen linear layer and what two thin matrices add to it, nothing at first."""

    def __init__(self, base: nn.Linear, rank: int = 8, alpha: float = 16.0, dropout: float = 0.05):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / rank)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))
        self.drop = nn.Dropout(dropout)
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * (self.drop(x) @ self.a.t() @ self.b.t())


def adapted() -> nn.Module:
    model = Causal(V).requires_grad_(False)
    for block in model.blocks:
        block.attention.qkv = Adapted(block.attention.qkv)
        block.attention.proj = Adapted(block.attention.proj)
        block.mlp[0] = Adapted(block.mlp[0])
        block.mlp[2] = Adapted(block.mlp[2])
    return model


LORA = Loop(
    name="LoRA",
    like="adapters on a frozen base; only they are in the optimizer",
    build=partial(seeded, adapted),
    optimizers=adam,
    batch=shifted,
    step=token_step,
    log_p=lambda model, batch: log_softmax(model(batch[0])),
    target_kl=0.0005,
)

LOOPS = [CLASS_TOKEN, BUFFERED_MASK, PLACES, ENCODER, LORA]

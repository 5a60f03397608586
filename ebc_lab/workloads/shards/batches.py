"""Training batches of shards, whose tokens stay on disk but for those of a step."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import RunConfig

from .. import BatchSource
from ..batches import BLOCK, brought, drawn_starts
from . import Shard, batches_in, too_short

MAPPED = 32  # shards at a time, each of which holds a file descriptor


class ShardBatches(BatchSource):
    """Training batches by step, the same for every arm and after every resume: a function of the step under
    `data.order=in_order`, of (seed, step) under `random`.

    * in order, a batch is B·T tokens in a row, and the next one follows it; a shard's last tokens, too few
      for a batch, are left out, and every token is trained on once at most
    * at random, each window that lies within a shard is as likely as any other; of a single shard they are
      the windows that `Batches` draws of the same tokens

    What a step is made from is its tokens, (B, T + 1): they come from files mapped into memory and are copied
    to the device, where a text's would all be already.
    """

    def __init__(self, shards: Sequence[Shard], run: RunConfig, device: torch.device):
        self.shards = shards
        self.tokens_of = functools.lru_cache(MAPPED)(lambda shard: shards[shard].tokens())
        self.batch_size = run.batch_size
        self.context = run.model.context
        self.seed = run.seed
        self.device = device
        self.in_order = run.data.order == "in_order"
        # the number of batches, or of windows, that begin before each shard's end
        batches = batches_in(shards, self.batch_size * self.context)
        places = [max(0, shard.count - self.context) for shard in shards]
        self.ends = np.cumsum(batches if self.in_order else places)
        self.block = -1
        self.drawn = np.empty(0)  # of the block, (BLOCK, B)

    def source_at(self, step: int) -> Tensor:
        """The tokens of `step`, (B, T + 1) int64, on the run's device. Raises UserError where the shards end
        before."""
        tokens = np.empty((self.batch_size, self.context + 1), dtype=np.int64)
        for row, (shard, start) in enumerate(self._places(step)):
            tokens[row] = self.tokens_of(shard)[start : start + self.context + 1]
        return brought(tokens, self.device)

    def _places(self, step: int) -> list[tuple[int, int]]:
        """The shard of each row of `step`, and its first token there."""
        if self.in_order:
            if step >= self.ends[-1]:
                raise UserError(too_short(self.ends[-1], self.batch_size * self.context))
            shard = int(np.searchsorted(self.ends, step, side="right"))
            nth = step - (int(self.ends[shard - 1]) if shard else 0)
            first = nth * self.batch_size * self.context
            return [(shard, first + row * self.context) for row in range(self.batch_size)]
        block, nth = divmod(step, BLOCK)
        if block != self.block:
            self.drawn = drawn_starts(self.seed, block, int(self.ends[-1]), self.batch_size)
            self.block = block
        starts = self.drawn[nth]
        shards = np.searchsorted(self.ends, starts, side="right")
        before = np.concatenate([[0], self.ends[:-1]])[shards]
        return list(zip(shards.tolist(), (starts - before).tolist(), strict=True))

    def rows(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """The windows of tokens (B, T + 1) as (inputs, next-token targets), (B, T) int64 each."""
        return source[:, :-1], source[:, 1:]

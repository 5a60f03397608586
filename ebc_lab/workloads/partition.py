"""From which parts of a text a run draws its batches, all of it, or clusters of its windows (docs/lowbit.md),
and what it is evaluated on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ebc_lab.config.errors import UserError
from ebc_lab.config.parts.partition import PartitionConfig
from ebc_lab.config.schema import RunConfig
from ebc_lab.lowbit.clustering import DataClustering, suggest_k, window_features

from . import BatchSource
from .batches import Batches, brought, windows
from .corpus import Corpus
from .shards.batches import ShardBatches
from .text import tokenised_of

HELD_SHARE = 0.02  # of the training text, its end, where the budget is measured on held-back text
SUGGESTED = range(2, 13)  # numbers of clusters that are compared where none is asked for
OFFSETS = 1  # which numbers of a step say where in their windows its rows begin


class PartitionedBatches(Batches):
    """Batches whose rows begin in windows of one cluster (`clustered`), or spread over all (`stratified`).

    The text is cut into windows of `context` tokens, described by the square roots of their character
    frequencies. A row begins anywhere in its window. Clusters and batches are functions of the text, the seed
    and the step. Raises UserError for a text with fewer windows than clusters.
    """

    def __init__(self, tokens: Tensor, batch_size: int, context: int, seed: int, partition: PartitionConfig):
        super().__init__(tokens, batch_size, context, seed)
        self.context = context
        self.how = partition.name
        ids = tokens.cpu().numpy()
        count = (len(ids) - 1) // context  # a row may begin at each one's first token
        least = max(partition.clusters, SUGGESTED[-1] + 1 if not partition.clusters else 1)
        if count < least:
            raise UserError(
                f"the training text has {count} windows of {context} characters, too few for {least} "
                "clusters: use a longer text, or a smaller partition.clusters."
            )
        features = window_features(ids[: count * context], context, int(ids.max()) + 1)
        clusters = partition.clusters or suggest_k(features, SUGGESTED, seed=seed).k
        self.clusters = DataClustering(clusters, seed=seed).fit(features)

    def source_at(self, step: int) -> Tensor:
        windows = self.clusters.rows(step, self.batch_size, self.how)
        draw = np.random.Generator(np.random.Philox(key=[self.seed, step], counter=[0, 0, 0, OFFSETS]))
        starts = windows * self.context + draw.integers(0, self.context, self.batch_size)
        last = len(self.tokens) - len(self.window)
        return brought(np.minimum(starts, last), self.tokens.device)


class TextSplits:
    """The tokens, batches and evaluation windows of a workload that is trained on a text."""

    def __init__(self, run: RunConfig, corpus: Corpus, device: torch.device):
        text = tokenised_of(run, corpus)
        self.run = run
        self.device = device
        self.shards = corpus.shards  # in the place of the training split, of data=bin
        self.tokens = {split: torch.from_numpy(ids).to(device) for split, ids in text.splits.items()}
        self.vocabulary = text.vocabulary
        self.characters_per_token = text.characters_per_token()

    def batches(self) -> tuple[BatchSource, BatchSource | None]:
        """Return the training batches, and with budget.probe_tokens=held those that choose c.

        Raises UserError where the text is too short to hold any of it back, or for the run's clusters.
        """
        run = self.run
        context = run.model.context
        if self.shards is not None:
            return ShardBatches(self.shards.train, run, self.device), None
        text = self.tokens["train"]
        partition = PartitionConfig.from_run(run)
        if not partition.changes_nothing():
            return PartitionedBatches(text, run.batch_size, context, run.seed, partition), None
        if run.stabilizer.name != "ebc" or run.budget.probe_tokens != "held":
            return Batches(text, run.batch_size, context, run.seed), None
        cut = round((1 - HELD_SHARE) * len(text))
        held_back = text[cut:]
        if len(held_back) < context + 1:
            raise UserError(
                f"the corpus is too short for budget.probe_tokens=held: {len(held_back)} characters would be "
                f"held back and a window takes {context + 1}; use a longer text, or probe_tokens=train."
            )
        trained = Batches(text[:cut], run.batch_size, context, run.seed, of=len(text))
        return trained, Batches(held_back, run.budget.probe_sequences, context, run.seed)

    def held_out(
        self, split: str, count: int | None = None, *, exact: bool = False
    ) -> list[tuple[Tensor, Tensor]]:
        """Return a split's disjoint windows, or so many full ones spread over it."""
        return windows(self.tokens[split], self.run.model.context, count, exact=exact)

"""Batches from clusters of the text's windows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ebc_lab.config.errors import UserError
from ebc_lab.config.parts.partition import PartitionConfig
from ebc_lab.workloads.partition import PartitionedBatches

CONTEXT = 16


def text(windows: int = 120) -> torch.Tensor:
    """Windows of three kinds that no clustering can mistake, in an order of their own."""
    draw = np.random.default_rng(0)
    kinds = draw.integers(0, 3, windows)
    ids = [draw.integers(4 * kind, 4 * kind + 4, CONTEXT) for kind in kinds]
    return torch.from_numpy(np.concatenate(ids))


def batches(how: str, seed: int = 0, clusters: int = 3) -> PartitionedBatches:
    return PartitionedBatches(text(), 12, CONTEXT, seed, PartitionConfig(how, clusters))


def kinds_of(found: PartitionedBatches, step: int) -> np.ndarray:
    """The cluster of the window in which each row of a step begins."""
    return found.clusters.labels[found.source_at(step).numpy() // CONTEXT]


@pytest.mark.parametrize("how", ["clustered", "stratified"])
def test_batches_are_a_function_of_seed_and_step(how):
    one = batches(how)
    later = [one.source_at(step) for step in (3, 0, 7)]
    again = batches(how)
    assert all(torch.equal(a, again.source_at(s)) for a, s in zip(later, (3, 0, 7), strict=True))
    assert not torch.equal(later[0], later[1])
    assert not torch.equal(later[0], batches(how, seed=1).source_at(3))
    assert np.array_equal(one.clusters.labels, batches("stratified").clusters.labels)  # of every arm


def test_clustered_rows_come_from_one_cluster_in_proportion_to_its_size():
    found = batches("clustered")
    seen = [set(kinds_of(found, step)) for step in range(300)]
    assert all(len(kinds) == 1 for kinds in seen)
    drawn = np.bincount([kinds.pop() for kinds in seen], minlength=3) / 300
    assert drawn == pytest.approx(found.clusters.sizes / found.clusters.sizes.sum(), abs=0.08)


def test_rows_begin_anywhere_in_their_windows_and_never_run_over():
    found = batches("stratified")
    starts = torch.cat([found.source_at(step) for step in range(200)])
    assert len(starts.unique()) > 1000
    assert starts.max() <= len(text()) - CONTEXT - 1
    inputs, targets = found.at(0)
    assert inputs.shape == targets.shape == (12, CONTEXT)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_no_number_of_clusters_is_taken_from_the_silhouette():
    assert len(batches("clustered", clusters=0).clusters.sizes) == 3


def test_a_text_shorter_than_the_clusters_need_is_refused():
    with pytest.raises(UserError, match="has 4 windows of 16 characters, too few for 6 clusters"):
        PartitionedBatches(text(5), 4, CONTEXT, 0, PartitionConfig("clustered", 6))

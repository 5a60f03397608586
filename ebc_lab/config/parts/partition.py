"""From which parts of the training text a batch is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..fields import setting
from ..part import Mode, Need, Part, Tail, Unfit

WORDS = {"clustered": "batches from one cluster", "stratified": "batches over all clusters"}


@dataclass
class PartitionConfig:
    """From which parts of the training text a batch is drawn (docs/lowbit.md)."""

    name: str = setting(
        "uniform", "anywhere; all rows from one cluster of windows; or spread over all", group="partition"
    )
    clusters: int = setting(
        8,
        "clusters of windows; 0: as the silhouette suggests",
        "clusters",
        low=0,
        high=1000,
        only=tuple(WORDS),
    )


def _neutral(partition: PartitionConfig) -> bool:
    return partition.name == "uniform"


def _needs(partition: PartitionConfig) -> Iterator[Need]:
    if not (_neutral(partition) or partition.clusters > 0):
        yield Need("partition.clusters=0", "scikit-learn", "lowbit", "give the number of clusters")


def _unfit(partition: PartitionConfig, mode: Mode) -> Unfit | None:
    if mode is Mode.EXACT and not _neutral(partition):
        why = "clusters are found by sums in any order; choose partition=uniform"
        return Unfit(f"partition={partition.name}", why)
    return None


def _tail(partition: PartitionConfig) -> Iterator[Tail]:
    if not _neutral(partition):
        yield Tail(f"_{partition.name}", WORDS[partition.name])


def _clashes(partition: PartitionConfig, run: Any) -> Iterator[str]:
    if not _neutral(partition) and run.stabilizer.name == "ebc" and run.budget.probe_tokens != "train":
        yield (
            f"partition={partition.name} draws batches from the whole training text: leave "
            "budget.probe_tokens=train."
        )


PARTITION = Part(
    "partition",
    PartitionConfig,
    place=120,
    timed=False,
    neutral=_neutral,
    needs=_needs,
    unfit=_unfit,
    tail=_tail,
    clashes=_clashes,
)

from collections.abc import Iterator
from dataclasses import dataclass

from ..fields import setting
from ..part import Mode, Need, Part, Run

CLUSTERED = ("clustered", "stratified")


@dataclass
class PartitionConfig(Part):
    """From which parts of the training text a batch is drawn (docs/lowbit.md)."""

    name: str = setting(
        "uniform", "anywhere; all rows from one cluster of windows; or spread over all", group="partition"
    )
    clusters: int = setting(
        8, "clusters of windows; 0: as the silhouette suggests", "clusters", low=0, high=1000, only=CLUSTERED
    )

    off = "uniform"
    place = 120
    timed = False
    unfit_for = {Mode.EXACT: "clusters are found by sums in any order; choose partition=uniform"}
    words = {"clustered": "batches from one cluster", "stratified": "batches over all clusters"}

    def refuses(self, run: Run) -> Iterator[str]:
        if not self.changes_nothing() and run.stabilizer.name == "ebc" and run.budget.probe_tokens != "train":
            yield (
                f"partition={self.name} draws batches from the whole training text: leave "
                "budget.probe_tokens=train."
            )

    def needs(self) -> Iterator[Need]:
        if not (self.changes_nothing() or self.clusters > 0):
            yield Need("partition.clusters=0", "scikit-learn", "lowbit", "give the number of clusters")

"""One arm on the emulated device: graphed against eager, resumed against whole."""

from __future__ import annotations

import gc
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.emulated import device
from support.emulated.arms import SHAPE
from support.shards import folder_of_shards, overrides_of

from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import run_part
from ebc_lab.config.schema import RunConfig
from ebc_lab.training.graphs import StepGraphs
from ebc_lab.training.run import Training
from ebc_lab.workloads.starts import pinned
from ebc_lab.workloads.text import checked_text

RESUMED_AT = 31  # step; no evaluation and no audit


@dataclass
class Trial:
    """What became of an arm. `True` where two runs wrote the same steps.csv, to the byte."""

    outcome: str = ""
    eager: list[str] = field(default_factory=list)  # settings for which nothing was to be captured
    kinds: list[str] = field(default_factory=list)  # of steps that were captured
    graphed: bool | None = None  # graphed = eager; None where nothing was captured
    resumed: bool = False  # resumed = whole
    graph_waits: dict[str, int] = field(default_factory=dict)  # of the host, in steps taken from a graph
    findings: dict[str, int] = field(default_factory=dict)  # rules that were broken
    given_back: bool = False  # all memory, once the runs are gone


class Watched(Training):
    """Counts the waits of steps that are taken from a graph, before anything is read."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.graph_waits: Counter[str] = Counter()

    def _take_step(self, step: int) -> None:
        before = Counter(device.waits())
        super()._take_step(step)
        if self.optimizer.deferred:
            self.graph_waits += Counter(device.waits()) - before


def arm_run(overrides: Sequence[str], folder: Path, text: Path) -> RunConfig:
    """The run of an arm, on the text, or on shards in a new folder. Raises UserError."""
    data = ["data=path", f"data.file={text}"]
    if "data=bin" in overrides:
        data = overrides_of(folder_of_shards(folder))
    elif "workload=images" in overrides:
        data = []
    dtype = [] if any(o.startswith("dtype=") for o in overrides) else ["dtype=float32"]
    run = run_part(compose([*SHAPE, *data, "device=cuda", *dtype, *overrides], study=False))
    return pinned(run, *checked_text(run))


def trained(run: RunConfig, folder: Path, *, eager: bool = False) -> tuple[Watched, dict[str, Any], bytes]:
    """The training, its result and its steps.csv."""
    training = made(run, folder)
    if eager and training.graphs is not None:
        training.graphs = StepGraphs(None)
    result = training.run()
    return training, result, (folder / "steps.csv").read_bytes()


def made(run: RunConfig, folder: Path) -> Watched:
    folder.mkdir(parents=True, exist_ok=True)
    return Watched(run, folder)


def trial(overrides: Sequence[str], folder: Path, text: Path) -> Trial:
    """Try one arm, in new folders below `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run = arm_run(overrides, folder / "shards", text)
    gc.collect()
    device.forget()
    allocated = device.torch.cuda.memory_allocated()

    training, result, whole = trained(run, folder / "whole")
    found = Trial(result["outcome"], training.eager, graph_waits=dict(training.graph_waits))
    captured = training.graphs.graphs if training.graphs else {}
    found.kinds = [" ".join(kind) or "usual" for kind in captured]
    del training, captured
    if found.kinds:
        found.graphed = trained(run, folder / "eager", eager=True)[2] == whole

    first = made(run, folder / "resumed")
    first.advance(RESUMED_AT)
    first.save_checkpoint()
    first.recording.close()
    del first
    # the random numbers of the process are those of no run: a checkpoint has to bring them
    device.torch.manual_seed(12345)
    found.resumed = trained(run, folder / "resumed")[2] == whole

    found.findings = device.findings()
    gc.collect()
    found.given_back = device.torch.cuda.memory_allocated() == allocated
    device.torch.cuda.empty_cache()
    shutil.rmtree(folder)
    return found

"""The names of the files of a run and of a study. No other module spells out these names."""

from __future__ import annotations

import glob
import os
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from ebc_lab.config.errors import visible

RUNS = "runs"
HEADER = "study.json"
WEIGHTS = "weights.pt"
CHECKPOINT = "checkpoint.pt"
DAMAGED = "checkpoint.damaged-{}.pt"  # the numbered name given to an unusable checkpoint
PAPERS = ("*.md", "*.tex")  # tables for papers
FOR_PAPERS = "figure.pdf"  # the picture of a study's answer, for papers
PICTURES = ("*.png", "*.svg", FOR_PAPERS, "figures.json")
# endings of the notes that `ebm diagnose` writes beside a model
DIAGNOSES = (".diagnosis.md", ".diagnosis.json")


def matching_paths(pattern: str | os.PathLike[str]) -> list[Path]:
    """Return the paths that match a path or pattern, sorted. At each level, a file or folder of exactly this
    name is preferred to reading the name as a pattern. In `tokens [v2]/*_train_*.bin`, for example, only the
    last part is a pattern if the folder `tokens [v2]` exists. `**` stands for a folder and all below it but
    hidden ones."""
    path = Path(pattern).expanduser()
    found = [Path(path.anchor)]
    for name in path.parts[bool(path.anchor) :]:
        folders, found = found, []
        for folder in folders:
            names = [name] if os.path.lexists(folder / name) else glob.glob(name, root_dir=folder)
            # then the same with [ taken literally, so that only * and ? are wildcards
            names = names or glob.glob(name.replace("[", "[[]"), root_dir=folder)
            if name == "**":
                names = ["", *glob.glob("**/", root_dir=folder, recursive=True)]
            found += [folder / one for one in names]
    return sorted(found, key=str)


class _Named(TypedDict):
    name: str


class _Optimizer(_Named):
    lr: float


class _Budget(TypedDict):
    target_kl: float


class _Model(TypedDict):
    context: int


class ShownSettings(TypedDict):
    """The settings in the `config` of a spec that are read without building a RunConfig."""

    seed: int
    steps: int
    batch_size: int
    optimizer: _Optimizer
    stabilizer: _Named
    projection: _Named
    budget: _Budget
    model: _Model


class ProgressRecord(TypedDict):
    """The contents of progress.json."""

    step: int
    steps: int
    steps_per_s: float


class SpecRecord(TypedDict):
    """The contents of spec.json. A run outside a study has no `stage`, `role`, `arm` or `lr_scale`."""

    run_id: str
    kind: str  # train, overhead, step
    stage: NotRequired[str]
    role: NotRequired[str]
    arm: NotRequired[str]
    lr_scale: NotRequired[float | None]
    identity: dict[str, Any]  # everything that can change the run's numbers
    config: dict[str, Any]  # every setting


class _In:
    """The path of a run's file, as a descriptor: it is joined only on access, since there are many runs."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, files: RunFiles, owner: type | None = None) -> Path:
        return files.directory / self.name


class RunFiles:
    """The paths of the files in one run's folder."""

    spec = _In("spec.json")
    result = _In("result.json")
    steps = _In("steps.csv")
    evals = _In("evals.csv")
    progress = _In("progress.json")  # only while the run trains
    checkpoint = _In(CHECKPOINT)  # only until the run has a result
    packed = _In("model.ebcpack")  # with a quantizer, once the run has a result
    model = _In("model.pt")  # with workload=ebm, once the run has a result
    weights = _In(WEIGHTS)  # with init.keep, once the run has a result
    models = _In("models")  # folder of models saved during training, with ebm.keep_every
    alerts = _In("alerts.jsonl")  # with workload=ebm
    attempts = _In("attempts.jsonl")
    log = _In("log.txt")
    lock = _In(".lock")  # held by the process that trains the run

    def __init__(self, directory: Path):
        self.directory = directory

    def damaged(self, number: int) -> Path:
        """Return the path to which an unusable checkpoint is moved."""
        return self.directory / DAMAGED.format(number)


def is_checkpoint(path: str) -> bool:
    """Return whether a file in a run's folder is a checkpoint, even an unusable one that was set aside."""
    name = os.path.basename(path)
    return name == CHECKPOINT or fnmatch(name, DAMAGED.format("*"))


class StudyFiles:
    """The paths of the files in one study's folder."""

    def __init__(self, root: Path):
        self.root = root
        self.name = visible(root.name)
        self.place = root  # the path to show users; for a bundle, that of the bundle
        self.runs = root / RUNS
        self.header_file = root / HEADER
        self.decisions_file = root / "auto_decisions.json"
        self.acceptance_file = root / "acceptance.json"  # the verdict
        self.results_file = root / "results_final.json"
        self.ablation_file = root / "ablation.csv"
        self.modes_file = root / "determinism.csv"
        self.units_file = root / "carry.csv"
        self.profiles_file = root / "profiles.csv"
        self.ladder_file = root / "ladder.csv"
        self.figures_file = root / "figures.json"  # what each picture shows
        self.page_file = root / "report.html"
        self.manifest_file = root / "manifest.json"
        self.crate_file = root / "ro-crate-metadata.json"  # describes all files for other programs
        self.own = root / "own"  # copies of the user's own suite and parts
        self.index_file = root / ".index"  # a cache of facts about the runs (`study.store.index`)
        self.driver_lock = root / ".lock"  # held by the driver, the process that runs the study
        self.driver_file = root / ".driver.json"  # identifies that process
        self.outlook_file = root / ".outlook.json"  # the driver's forecast of the remaining work
        self.command_file = root / ".command.json"  # the command that runs the study, or ran it last
        self.launcher_file = root / ".launcher.json"  # name and session folder of the study's Slurm jobs
        self.mirror_file = root / ".mirror.json"  # the study's mirror, and the last index seen there
        self.sessions = root / ".sessions"  # files by which workers on other machines reach the driver
        self.cancel_mark = root / ".cancel"  # asks the driver to stop, on whatever machine it runs
        self.plotted_file = root / ".plotted"  # identifies the decisions that the pictures show

    def run_dir(self, run_id: str) -> Path:
        return self.runs / run_id

    def run_files(self, run_id: str) -> RunFiles:
        return RunFiles(self.runs / run_id)

    def run_ids(self) -> list[str]:
        """Return the ids of all runs that have a folder, sorted."""
        return sorted(os.listdir(self.runs)) if self.runs.is_dir() else []

    def all_runs(self) -> list[RunFiles]:
        return [self.run_files(run_id) for run_id in self.run_ids()]

    def conclusions(self) -> tuple[str, ...]:
        """Return the names, and patterns of names, of the study's files that are computed from its runs."""
        decided = (self.decisions_file, self.acceptance_file, self.results_file)
        tables = (self.ablation_file, self.modes_file, self.units_file, self.profiles_file, self.ladder_file)
        made = [path.name for path in (*decided, *tables, self.page_file, self.crate_file)]
        return (*made, "summary_*.csv", *PAPERS, *PICTURES)

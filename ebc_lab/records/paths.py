"""Where the files of a run and of a study are. No other module spells out these names."""

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
DAMAGED = "checkpoint.damaged-{}.pt"  # what a checkpoint is called that cannot be used, with a number
PAPERS = ("*.md", "*.tex")  # tables for papers
PICTURES = ("*.png", "*.svg", "figures.json")
# how the notes end that `ebm diagnose` writes beside a model
DIAGNOSES = (".diagnosis.md", ".diagnosis.json")


def matching_paths(pattern: str | os.PathLike[str]) -> list[Path]:
    """Return the paths that a path or a pattern means, in the order of their names. In every folder on the
    way, what is called so is found before the name is taken for a pattern: in `tokens [v2]/*_train_*.bin`
    only the file's name is one, if that folder exists."""
    path = Path(pattern).expanduser()
    found = [Path(path.anchor)]
    for name in path.parts[bool(path.anchor) :]:
        folders, found = found, []
        for folder in folders:
            names = [name] if os.path.lexists(folder / name) else glob.glob(name, root_dir=folder)
            # with a [ that is part of names, * and ? alone may be wild
            names = names or glob.glob(name.replace("[", "[[]"), root_dir=folder)
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
    """What is read of a spec's `config` without building the run."""

    seed: int
    steps: int
    batch_size: int
    optimizer: _Optimizer
    stabilizer: _Named
    projection: _Named
    budget: _Budget
    model: _Model


class ProgressRecord(TypedDict):
    """What progress.json holds."""

    step: int
    steps: int
    steps_per_s: float


class SpecRecord(TypedDict):
    """What spec.json holds. A run without a study has no `stage`, `role`, `arm` and `lr_scale`."""

    run_id: str
    kind: str  # train, overhead, step
    stage: NotRequired[str]
    role: NotRequired[str]
    arm: NotRequired[str]
    lr_scale: NotRequired[float | None]
    identity: dict[str, Any]  # everything that can change the run's numbers
    config: dict[str, Any]  # every setting


class _In:
    """A file of a run, whose path is joined when it is asked for: a study has thousands of runs."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, files: RunFiles, owner: type | None = None) -> Path:
        return files.directory / self.name


class RunFiles:
    """The files in the folder of one run."""

    spec = _In("spec.json")
    result = _In("result.json")
    steps = _In("steps.csv")
    evals = _In("evals.csv")
    progress = _In("progress.json")  # while it trains
    checkpoint = _In(CHECKPOINT)  # until it has a result
    packed = _In("model.ebcpack")  # of a run with a quantizer, once it has a result
    model = _In("model.pt")  # of workload=ebm, once it has a result
    weights = _In(WEIGHTS)  # of a run with init.keep, once it has a result
    models = _In("models")  # and while it trains, with ebm.keep_every
    alerts = _In("alerts.jsonl")  # of workload=ebm
    attempts = _In("attempts.jsonl")
    log = _In("log.txt")
    lock = _In(".lock")  # held by the process that trains it

    def __init__(self, directory: Path):
        self.directory = directory

    def damaged(self, number: int) -> Path:
        """Return what a checkpoint is called that could not be used."""
        return self.directory / DAMAGED.format(number)


def is_checkpoint(path: str) -> bool:
    """Return whether a run's file is a checkpoint of it, one that was set aside included."""
    name = os.path.basename(path)
    return name == CHECKPOINT or fnmatch(name, DAMAGED.format("*"))


class StudyFiles:
    """The files in the folder of one study."""

    def __init__(self, root: Path):
        self.root = root
        self.name = visible(root.name)
        self.place = root  # where a reader finds the study: of a bundle the bundle
        self.runs = root / RUNS
        self.header_file = root / HEADER
        self.decisions_file = root / "auto_decisions.json"
        self.acceptance_file = root / "acceptance.json"  # the verdict
        self.results_file = root / "results_final.json"
        self.ablation_file = root / "ablation.csv"
        self.modes_file = root / "determinism.csv"
        self.units_file = root / "carry.csv"
        self.profiles_file = root / "profiles.csv"
        self.figures_file = root / "figures.json"  # what each picture shows
        self.page_file = root / "report.html"
        self.manifest_file = root / "manifest.json"
        self.crate_file = root / "ro-crate-metadata.json"  # what all of them are, for other programs
        self.own = root / "own"  # copies of the suite and the parts that are the user's own
        self.index_file = root / ".index"  # of its runs, made of their files
        self.driver_lock = root / ".lock"  # held by the process that drives the study
        self.driver_file = root / ".driver.json"  # which process that is
        self.outlook_file = root / ".outlook.json"  # what that process expects still
        self.command_file = root / ".command.json"  # the command that runs it, or ran it last
        self.launcher_file = root / ".launcher.json"  # where its Slurm jobs are known
        self.mirror_file = root / ".mirror.json"  # which mirror it has, and the last of its indexes seen
        self.sessions = root / ".sessions"  # where workers of other machines meet its driver
        self.cancel_mark = root / ".cancel"  # asks the driver to stop, on whichever machine it runs
        self.plotted_file = root / ".plotted"  # from which decisions the pictures were drawn

    def run_dir(self, run_id: str) -> Path:
        return self.runs / run_id

    def run_files(self, run_id: str) -> RunFiles:
        return RunFiles(self.runs / run_id)

    def run_ids(self) -> list[str]:
        """Return the names of the runs' folders, sorted."""
        return sorted(os.listdir(self.runs)) if self.runs.is_dir() else []

    def all_runs(self) -> list[RunFiles]:
        return [self.run_files(run_id) for run_id in self.run_ids()]

    def conclusions(self) -> tuple[str, ...]:
        """Return names and patterns of the files that are computed from the runs."""
        decided = (self.decisions_file, self.acceptance_file, self.results_file)
        tables = (self.ablation_file, self.modes_file, self.units_file, self.profiles_file)
        made = [path.name for path in (*decided, *tables, self.page_file, self.crate_file)]
        return (*made, "summary_*.csv", *PAPERS, *PICTURES)

"""Studies of any number of finished runs, made in a moment: a few runs are trained, and their files copied.

Every file is a real one, with its own checksum: a copy has a run's streams and log, its own spec, and the
result with losses of its own. What is decided of them, and written of that, is the lab's own.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from support.called import SMALLEST
from support.drivers import CHANGED

from ebc_lab.config.compose import compose
from ebc_lab.config.identity import digest
from ebc_lab.config.schema import ArmConfig, Config, RunConfig
from ebc_lab.records.json_files import read_json, write_checksummed
from ebc_lab.records.paths import RunFiles
from ebc_lab.records.spec import RunSpec
from ebc_lab.report.conclude import concluding
from ebc_lab.study.autopilot import autopilot
from ebc_lab.study.resolve import resolve_study
from ebc_lab.study.stages.stage import planned_runs, stage_of
from ebc_lab.study.store.study import Study

SEEDS = 100  # of an arm: as many as a study may have
TRACKS = 2
TRIVIAL = [
    *SMALLEST,
    "dtype=float32",
    "threads_per_run=1",
    "compile=off",
    "study.stages=[lr_sweep,ablation]",
    "lr_sweep.optimizers=[adam,sgd]",
    "lr_sweep.grids={adam:[1e-2],sgd:[1e-2]}",
    "lr_sweep.keep=all",
    "lr_sweep.skip_threshold=1",
    "lr_sweep.steps=12",
    "lr_sweep.max_extensions=0",
    "ablation.reference=a0",
    "+ablation.arms.a0={about:first}",
    "+ablation.arms.a1={about:second}",
    "ablation.steps=12",
]


def config_of(folder: Path, runs: int, name: str = "many", *overrides: str, seeds: int = SEEDS) -> Config:
    """Return the settings of a study in `folder`/out whose ablation has `runs` runs: its arms clip the
    gradient's norm at a strength each, over `seeds` seeds on two tracks."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_text("".join(random.Random(0).choices(["the ", "cat ", "sat\n"], k=600)))
    place = [f"data.file={text}", f"output_dir={folder}/out", f"study.name={name}"]
    config = compose([*TRIVIAL, *place, "launcher=inline", *overrides])
    arms = {f"a{i}": _arm(i) for i in range(runs // (seeds * TRACKS))}
    suite = replace(config.ablation, arms=arms, question="which clip?")
    return replace(config, ablation=suite, seeds=list(range(1000, 1000 + seeds)))


def _arm(i: int) -> ArmConfig:
    return ArmConfig(f"clipped at {i + 1}", {"stabilizer": {"name": "norm_clip", "strength": 1.0 + i}})


@contextmanager
def hurried() -> Iterator[None]:
    """Nothing waits for the disk, and no pictures are drawn, which take minutes and are not wanted here."""
    with mock.patch("os.fsync"), mock.patch("ebc_lab.report.conclude._draw"):
        yield


def trained(folder: Path) -> Study:
    """Return a study of two arms in `folder`, trained there once, whose files others are copied from."""
    config = config_of(folder, 2 * TRACKS, "one", seeds=1)
    study = Study(folder / "out" / "one")
    if not study.manifest_file.exists():
        autopilot(config, concluding())
    return study


def made(folder: Path, runs: int, name: str = "many", *, seeds: int = SEEDS, left: int = 0) -> Config:
    """Make a study whose ablation has `runs` finished runs, and conclude it. `left`: so many of them have no
    result, and then the ablation is not decided."""
    source = trained(folder)
    config = config_of(folder, runs, name, seeds=seeds)
    study = Study(folder / "out" / name)
    study.prepare()
    with hurried():
        config, _ = resolve_study(config, study, lambda text: None, force=False)
        decisions = {}
        for stage in config.study.stages:
            counted = itertools.count()
            last = stage == config.study.stages[-1]
            while missing := _missing(study, config, stage, decisions):
                for spec in missing[: len(missing) - left * last]:
                    copied(study, spec, source, next(counted))
                if left and last:
                    return config
            specs, results = planned_runs(stage, config, decisions, study.results)
            decisions[stage] = stage_of(stage).decide(config, specs, results, decisions)
            study.write_decision(stage, decisions[stage])
        autopilot(config, concluding())
    return config


def _missing(study: Study, config: Config, stage: str, decisions: dict) -> list[RunSpec]:
    specs, results = planned_runs(stage, config, decisions, study.results)
    return list({s.run_id: s for s in specs if s.run_id not in results}.values())


def copied(study: Study, spec: RunSpec, source: Study, nth: int) -> None:
    """Plan a run and give it the files of a finished one, its losses shifted by a little of its own."""
    study.write_spec(spec)
    like = source.run_files(_alike(source.root)[spec.stage, spec.run.optimizer.name])
    files = study.run_files(spec.run_id)
    at = datetime(2026, 1, 1, tzinfo=UTC) + nth * timedelta(seconds=2)  # one after the other
    end = at + timedelta(seconds=1)
    for event, when in (("begin", at), ("end", end)):
        line = {"at": when.isoformat(), "event": event, "host": "here", "pid": 1}
        with files.attempts.open("a") as log:
            log.write(json.dumps(line) + "\n")
    _fill(
        files, like, nth, {"run_id": spec.run_id, "identity": spec.identity_sha256, "steps": spec.run.steps}
    )


def _fill(files: RunFiles, like: RunFiles, nth: int, own: dict[str, Any]) -> dict[str, Any]:
    for path in (like.steps, like.evals, like.log):
        shutil.copyfile(path, files.directory / path.name)
    result = {k: v for k, v in read_json(like.result).items() if k != "checksum"}
    shift = random.Random(nth).gauss(0, 0.01)
    losses = {k: result[k] + shift for k in ("val_loss", "test_loss") if result.get(k) is not None}
    result |= {**losses, **own}
    write_checksummed(files.result, result)
    return result


def taken(run: RunConfig, directory: Path, run_id: str, **hooks: Any) -> dict[str, Any]:
    """Stand in for `run_and_record` in a worker: copy the files of a run of the study in $COPIED_FROM."""
    spec = read_json(directory / "spec.json")
    source = Study(Path(os.environ["COPIED_FROM"]))
    like = source.run_files(_alike(source.root)[spec["stage"], run.optimizer.name])
    own = {"run_id": run_id, "identity": digest(spec["identity"]), "steps": run.steps}
    return _fill(RunFiles(directory), like, run.seed, own)


@contextmanager
def copying_workers(folder: Path, source: Study) -> Iterator[None]:
    """Workers copy runs of `source` in place of training: a driver has all of its work, they have none."""
    (folder / "site").mkdir(exist_ok=True)
    change = "def change(module):\n    from many import taken\n    module.run_and_record = taken\n"
    code = change + CHANGED.format(module="ebc_lab.training.outcome")
    (folder / "site" / "sitecustomize.py").write_text(code)
    root = Path(__file__).parents[2]
    given = filter(None, [os.environ.get("PYTHONPATH")])
    paths = [str(folder / "site"), str(root / "dev" / "studies"), str(root), *given]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "COPIED_FROM": str(source.root)}
    with mock.patch.dict(os.environ, environment):
        yield


@functools.cache
def _alike(root: Path) -> dict[tuple[str, str], str]:
    """Return (stage, optimizer) -> a run of them, in a finished study."""
    specs = {record.run_id: record.spec for record in Study(root).records()}
    return {(s["stage"], s["config"]["optimizer"]["name"]): r for r, s in specs.items() if s is not None}


def idle_specs(study: Study, config: Config, count: int, steps: int = 1) -> list[RunSpec]:
    """Plan `count` runs that train nothing, for workers that `support.idle` has made able to."""
    first = stage_of("lr_sweep").runs(config, {}, {})[0]
    runs = (replace(first.run, seed=seed, steps=steps) for seed in range(count))
    specs = [replace(first, kind="idle", run=run) for run in runs]
    for spec in specs:
        study.write_spec(spec)
    return specs

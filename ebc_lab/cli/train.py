"""Hydra's own command line, behind our validation: `ebc-lab train …` and the sweeps of `-m`.

Overrides are composed and validated first, every combination of a sweep, so that nothing is written for a
mistake; then `hydra.main` takes over with the arguments as they were given.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
from collections.abc import Sequence
from contextlib import chdir, nullcontext, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ebc_lab.config import machine
from ebc_lab.config.checks import warnings_of
from ebc_lab.config.compose import (
    begun_from,
    compose,
    default_scale,
    hydra_base,
    hydra_settings,
    hydra_words,
    implied,
    register_schema,
)
from ebc_lab.config.dicts import from_dict, run_part, to_dict
from ebc_lab.config.errors import UserError, naming
from ebc_lab.config.overrides import check_overrides, expand
from ebc_lab.config.own.files import conf_dir
from ebc_lab.config.own.parts import refuse_edited
from ebc_lab.config.parts.init import InitConfig
from ebc_lab.config.schema import Config, RunConfig
from ebc_lab.records.figures import FINISHED
from ebc_lab.records.files import refuse_unwritable
from ebc_lab.records.locks import run_lock
from ebc_lab.records.paths import RunFiles, SpecRecord
from ebc_lab.study.inspect.reproduce import override_value
from ebc_lab.study.store.study import Study, study_around
from ebc_lab.study.trackers import following
from ebc_lab.training.ends import DeviceFailed, Interrupted
from ebc_lab.workloads.starts import pinned_start, placed
from ebc_lab.workloads.text import check_length_of, checked_text

from . import INTERRUPTED
from .hydra.flags import Given
from .hydra.launchers import JobFailed, defaults, is_submitit, launching
from .options import console, print_json
from .sweep_view import Job, jobs, result_of, show
from .train_view import RunView, closing_lines

RERUNS = "outputs/rerun"
OTHER_FOLDER = "choose another folder, or delete this one"


def train(asked: Given) -> None:
    """`ebc-lab train`: validate, then hand over to Hydra. Raises UserError, and SystemExit as Hydra does."""
    register_schema()
    code = 0
    with redirect_stdout(sys.stderr) if asked.as_json else nullcontext():
        job = _Job(asked)
        try:
            job.run()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    if asked.as_json:
        print_json(job.summary(code))
    if code:
        sys.exit(code)


class _Job:
    """One call of Hydra: what was asked for, checked, and what is added to it. Raises UserError."""

    def __init__(self, asked: Given):
        # the last value of a repeated key counts; Hydra would sweep over both
        asked_for = list({override.partition("=")[0]: override for override in asked.overrides}.values())
        self.asked = asked = replace(asked, overrides=asked_for)
        self.multirun = asked.multirun or "hydra.mode=MULTIRUN" in asked_for
        chosen = any(o.lstrip("+").startswith(("scale=", "from=")) for o in asked_for)
        self.extra = [] if chosen else [default_scale()]
        if not self.multirun:
            self.extra += implied(asked_for)[len(asked_for) :]
        combinations = expand(asked_for) if self.multirun else [asked_for]
        self.combinations = [[*overrides, *self.extra] for overrides in combinations]
        for combination in self.combinations:
            check_overrides(combination, hydra_keys=True)
        self.run_overrides = [
            [o for o in combination if not o.lstrip("+~").startswith(("hydra.", "hydra/"))]
            for combination in self.combinations
        ]
        here = "hydra/launcher=submitit_slurm" not in self.combinations[0]
        self.configs = [
            compose(overrides, study=False, here=here, trains=asked.trains)
            for overrides in self.run_overrides
        ]
        for config in self.configs:
            if InitConfig.from_run(config).name == "none" and config.output_dir != Config.output_dir:
                raise UserError(
                    "output_dir is for studies: the folder of a run is hydra.run.dir=…, that of a sweep "
                    "hydra.sweep.dir=…"
                )
        self.recorded = begun_from(check_overrides(self.combinations[0], hydra_keys=True), study=False)
        self.settings = hydra_settings(*hydra_words(self.combinations[0], self.recorded))
        if not self.multirun and any(o.startswith("hydra/launcher=") for o in asked_for):
            raise UserError("hydra/launcher starts the runs of a sweep, also of one run: it needs -m.")
        self.directory = Path((self.settings.sweep if self.multirun else self.settings.run).dir)
        self.warnings = _refuse_impossible(self.configs, self.directory) if asked.trains else []

    def run(self) -> None:
        """Hand over to Hydra, as SystemExit its end."""
        import hydra

        around: Any = nullcontext()
        if self.asked.trains:
            self._prepare()
            if is_submitit(self.settings.launcher):
                around = launching(self.settings.launcher, str(self.directory))
        name, words = hydra_words(self.asked.overrides, self.recorded)
        self.command = shlex.join(["ebc-lab", "train", *self.asked.words, *self.asked.overrides, *self.extra])
        sys.argv = ["ebc-lab train", *self.asked.words, *words, *self.extra]
        # Python 3.14 reads each option's help as it is added; one of Hydra's is no text until it is shown
        argparse.ArgumentParser._check_help = lambda *_: None  # type: ignore[attr-defined]
        main = hydra.main(config_path=str(conf_dir().resolve()), config_name=name, **hydra_base())
        try:
            with around:
                main(self.train_composed)()
        finally:
            if self.asked.trains and self.multirun:
                show(console(), self._jobs(), self.directory)

    def train_composed(self, _: Any) -> float | None:
        """What Hydra calls for each run: train it in its folder. -> its validation loss, for sweepers.

        Its settings are those that were checked; what Hydra has composed is for Hydra's records. Under
        `hydra.job.chdir=true` Hydra has moved to the folder, and relative paths count from here.
        """
        from hydra.core.hydra_config import HydraConfig

        hydra = HydraConfig.get()
        checked = {
            tuple(hydra_words(overrides)[1]): config
            for overrides, config in zip(self.run_overrides, self.configs, strict=True)
        }
        asked = tuple(hydra.overrides.task)
        config = checked[asked] if asked in checked else compose(asked, study=False)  # of another sweeper
        directory = Path(hydra.runtime.output_dir)
        in_job = is_submitit(hydra.launcher)
        message, code = None, 0
        try:
            cores = int(hydra.launcher.get("cpus_per_task") or 1) if in_job else None
            every, together = config.launcher.checkpoint_every_s, config.launcher.processes_per_run
            with chdir(hydra.runtime.cwd), following(config.tracker, directory, print):
                config = placed(config, [Path(config.output_dir).expanduser()])
                result = train_one(run_part(config), directory, every, cores, together)
            if result["outcome"] not in FINISHED:
                cause = str(result["cause"]).rstrip(".")
                message, code = f"the run {result['outcome']}: {cause}; {RunFiles(directory).log}", 4
        except (UserError, OSError) as error:
            message, code = f"error: {error}", 2
        except (DeviceFailed, Interrupted, KeyboardInterrupt) as error:
            message, code = _cut_off(error, self.command)
        if message and in_job:
            raise JobFailed(f"{directory}: {message}", code)
        if message:
            print(message, file=sys.stderr)
            sys.exit(code)
        return result.get("val_loss")

    def _prepare(self) -> None:
        """Say what is trained on what, and make its folder."""
        for line in [*self._ebc_by_default(), *(f"warning: {warning}" for warning in self.warnings)]:
            print(line, flush=True)
        if is_submitit(self.settings.launcher):
            self.extra += defaults(self.settings.launcher, self.asked.overrides)
        if self.settings.job.chdir:
            print(
                "note: hydra.job.chdir=true changes nothing: relative paths mean this folder, as without it"
            )
        key = "hydra.sweep.dir" if self.multirun else "hydra.run.dir"
        if not any(o.lstrip("+").startswith(f"{key}=") for o in self.asked.overrides):
            self.directory = own_folder(self.directory)
            self.extra.append(f"{key}={override_value(str(self.directory))}")

    def _ebc_by_default(self) -> list[str]:
        """A line that says so where nobody asked for EBC."""
        chosen = any(o.lstrip("+").startswith("stabilizer") for o in self.asked.overrides)
        if chosen or not all(config.stabilizer.name == "ebc" for config in self.configs):
            return []
        return [f"{self.configs[0].optimizer.name} with EBC (the default); stabilizer=none turns EBC off"]

    def summary(self, code: int) -> dict[str, Any]:
        """What `--json` prints: the result of the run, or of each run of the sweep."""
        about = {"folder": str(self.directory), "warnings": self.warnings, "exit_code": code}
        if not self.multirun:
            return {**_ended(self.directory), **about}
        runs = [
            {"overrides": list(overrides), "folder": str(job.directory or ""), **_ended(job.directory)}
            for overrides, job in zip(self.run_overrides, self._jobs(), strict=True)
        ]
        return {"outcome": "done" if code == 0 else "stopped", "runs": runs, **about}

    def _jobs(self) -> list[Job]:
        return jobs(self.run_overrides, self.configs, self.directory)


def _cut_off(error: BaseException, command: str) -> tuple[str, int]:
    """What to say of a run that an interruption or its GPU's failure has ended, and the exit code."""
    failed = isinstance(error, DeviceFailed)
    what = str(error) if failed else "interrupted"
    return f"{what}; this continues from the checkpoint:\n  {command}", 4 if failed else INTERRUPTED


def _ended(directory: Path | None) -> dict[str, Any]:
    """result.json of a run, or that it has none."""
    return result_of(directory) or {"outcome": "not finished" if directory else "not begun"}


def own_folder(named: Path) -> Path:
    """Make this folder, or `<named>-2` and so on, where another run has begun in the same second."""
    path = named
    for n in itertools.count(2):
        with suppress(FileExistsError):
            path.mkdir(parents=True)
            break
        path = named.with_name(f"{named.name}-{n}")
    return path


def _text_of(config: Config) -> str:
    """What a look at a run's text depends on."""
    return repr((config.data, config.tokens, config.workload, config.ebm, config.model.context, config.steps))


def _refuse_impossible(configs: Sequence[Config], directory: Path) -> list[str]:
    """Raises UserError for a text, weights or a folder that cannot be used. -> warnings about the texts."""
    texts = {_text_of(config): config for config in configs}
    corpora = {key: checked_text(config)[0] for key, config in texts.items()}
    warnings = [corpus.warning for corpus in corpora.values()]
    for config in configs:
        check_length_of(config, corpora[_text_of(config)], config.steps)
        pinned_start(config)
    refuse_unwritable(directory)
    return list(dict.fromkeys(warning for warning in warnings if warning))


def train_again(
    study: Study, spec: SpecRecord, overrides: Sequence[str], folder: Path | None, command: str
) -> Path:
    """Train a recorded run again, in `folder` or in a new one. -> that folder. `command`: this call's own.
    Raises UserError for what is missing here, and for a folder in a study or with other files; SystemExit if
    the run was interrupted, or its GPU failed."""
    from ebc_lab.records.json_files import try_read
    from ebc_lab.study.inspect import rerun

    run_id = spec["run_id"]
    directory = folder.expanduser() if folder else Path(RERUNS) / study.name / run_id
    if study_around(directory.resolve()):
        raise UserError(f"{directory} is in a study, which is only read: choose another --output.")
    empty = not directory.exists() or (directory.is_dir() and not any(directory.iterdir()))
    if not empty and try_read(RunFiles(directory).spec, SpecRecord) is None:
        raise UserError(f"{directory} holds something else than this run: give a new folder as --output.")
    rerun.recorded_result(study, spec)
    with naming(run_id):
        config = rerun.settings_of(study, spec, overrides)
        _refuse_impossible([config], directory)
    if folder is None:
        directory = own_folder(directory)
        command = f"{command} --output {shlex.quote(str(directory))}"
    print(f"{run_id}, again in {directory}")
    for line in rerun.renamed_in_words(spec):
        print(line)
    try:
        run = run_part(placed(config, [Path(config.output_dir).expanduser()]))
        every_s = config.launcher.checkpoint_every_s
        train_one(run, directory, every_s, processes=rerun.processes_of(study, spec))
    except (DeviceFailed, Interrupted, KeyboardInterrupt) as error:
        message, code = _cut_off(error, command)
        print(message, file=sys.stderr)
        sys.exit(code)
    return directory


def train_one(
    run: RunConfig,
    directory: Path,
    checkpoint_every_s: float,
    job_cores: int | None = None,
    processes: int = 1,
) -> dict[str, Any]:
    """Resolve what is left to choose, train in `directory`, and print the outcome. -> it. Raises UserError.

    `job_cores`: of a launcher's job; `processes`: how many train the run together.
    """
    from ebc_lab.config.identity import digest, identity
    from ebc_lab.records.json_files import read_json, write_json
    from ebc_lab.study.resolve import resolve_run
    from ebc_lab.study.store.changes import differences, summarize
    from ebc_lab.training.ends import until_done
    from ebc_lab.training.outcome import run_and_record

    corpus_warning = checked_text(run)[0].warning  # a resolved run names the text that was taken instead
    files = RunFiles(directory)
    earlier = read_json(files.spec, SpecRecord, OTHER_FOLDER) if files.spec.exists() else None
    begun = from_dict(RunConfig, earlier["config"]) if earlier else None
    run = resolve_run(run, begun, print, cores_of_job=job_cores, processes=processes)
    if begun:
        refuse_edited(run, begun, OTHER_FOLDER)
    if run.lr_schedule.name == "replay":
        from ebc_lab.components.lr_schedule import recorded_rates, source_folder

        run.lr_schedule.sha256 = digest(recorded_rates(source_folder(run.lr_schedule, directory.parent)))
    named = identity(run)
    run_id = digest(named)[:10]
    if earlier and earlier["run_id"] != run_id:
        what = summarize(differences(earlier["identity"], named), named, ())
        raise UserError(f"{directory} holds another run ({what}): {OTHER_FOLDER}.")
    notes = warnings_of(run)
    threads, cores = processes * run.threads_per_run, job_cores or machine.cores()
    if processes > 1 and run.device == "cpu" and threads > cores:
        notes.append(f"{processes} processes of {run.threads_per_run} thread(s) share {cores} core(s).")
    for note in notes:
        print(f"note: {note}")
    directory.mkdir(parents=True, exist_ok=True)
    spec: SpecRecord = {"run_id": run_id, "kind": "train", "identity": named, "config": to_dict(run)}
    write_json(files.spec, spec)
    done_before = files.result.exists()
    with run_lock(directory) as mine:
        if not mine:
            raise UserError(f"another process is training in {directory}: wait for it, or stop it.")
        hooks: dict[str, Any] = {"checkpoint_every_s": checkpoint_every_s, "say": print}
        hooks |= {"processes": processes, "corpus_warning": corpus_warning}
        with RunView(run, directory).shown() as hooks["on_progress"]:
            result = until_done(
                lambda stop: run_and_record(run, directory, run_id, should_stop=stop, **hooks)
            )
    for line in closing_lines(run, result, directory, earlier=done_before):
        print(line)
    return result

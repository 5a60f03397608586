"""Hydra's own command line, behind our validation: `ebc-lab train …` and the sweeps of `-m`.

Overrides are composed and validated first, every combination of a sweep, so that nothing is written for a
mistake; then `hydra.main` takes over with the arguments as they were given.
"""

from __future__ import annotations

import itertools
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ebc_lab.config import machine
from ebc_lab.config.checks import check_run, remarks
from ebc_lab.config.choices import conf_dir, refuse_edited, with_sources
from ebc_lab.config.compose import compose, default_scale, implied, register_schema, set_length
from ebc_lab.config.dicts import from_dict, run_part, to_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.overrides import check_overrides, expand, spelled
from ebc_lab.config.schema import Config, RunConfig
from ebc_lab.records.files import refuse_unwritable
from ebc_lab.records.locks import run_lock
from ebc_lab.records.paths import RunFiles, SpecRecord
from ebc_lab.study.inspect.reproduce import override_value
from ebc_lab.study.trackers import following
from ebc_lab.workloads.text import checked_text, pinned

from .hydra_launchers import JobFailed, defaults, is_submitit, launching
from .sweep_view import tabulated
from .train_view import closing_lines, live_view

OTHER_FOLDER = "choose another hydra.run.dir, or delete this one"


def _without_hydra(overrides: Sequence[str]) -> list[str]:
    return [o for o in overrides if not o.lstrip("+~").startswith(("hydra.", "hydra/"))]


def train(arguments: Sequence[str]) -> None:
    """`ebc-lab train`: validate, then hand over to Hydra. Raises UserError, and SystemExit as Hydra does."""
    import hydra
    from hydra._internal.utils import get_args_parser

    given = get_args_parser().parse_args(list(arguments))
    register_schema()
    extra = [] if any(o.lstrip("+").startswith("scale=") for o in given.overrides) else [default_scale()]
    around: Any = nullcontext()
    after: Any = nullcontext()
    if not given.hydra_help and not given.help:
        multirun = given.multirun or "hydra.mode=MULTIRUN" in given.overrides
        if not multirun:
            extra += implied(given.overrides)[len(given.overrides) :]
        asked = expand(given.overrides) if multirun else [given.overrides]
        combinations = [[*overrides, *extra] for overrides in asked]
        configs = _validated(combinations)
        settings = _hydra_settings([spelled(o) for o in combinations[0]])
        if not multirun and any(o.startswith("hydra/launcher=") for o in given.overrides):
            raise UserError("hydra/launcher starts the runs of a sweep, also of one run: it needs -m.")
        if given.cfg is None:
            directory = str((settings.sweep if multirun else settings.run).dir)
            _refuse_impossible(configs, directory)
            if is_submitit(settings.launcher):
                extra += defaults(settings.launcher, given.overrides)
            key = "hydra.sweep.dir" if multirun else "hydra.run.dir"
            if not any(o.lstrip("+").startswith(f"{key}=") for o in given.overrides):
                directory = str(own_folder(Path(directory)))
                extra.append(f"{key}={override_value(directory)}")
            if is_submitit(settings.launcher):
                around = launching(settings.launcher, directory)
            if multirun:
                of_runs = [_without_hydra(combination) for combination in combinations]
                after = tabulated(of_runs, configs, Path(directory))
    words = [spelled(word) if word in given.overrides else word for word in arguments]
    sys.argv = ["ebc-lab train", *words, *extra]
    with after, around:
        hydra.main(version_base="1.3", config_path=str(conf_dir().resolve()), config_name="config")(task)()


def own_folder(named: Path) -> Path:
    """Make this folder, or `<named>-2` and so on: its name is a time, and others may have begun in the same
    second."""
    for path in itertools.chain([named], (named.with_name(f"{named.name}-{n}") for n in itertools.count(2))):
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise AssertionError


def _validated(combinations: Sequence[Sequence[str]]) -> list[Config]:
    """The configuration of every combination of a sweep. Raises UserError."""
    for combination in combinations:
        check_overrides(combination, hydra_keys=True)
    here = "hydra/launcher=submitit_slurm" not in combinations[0]
    return [compose(_without_hydra(combination), study=False, here=here) for combination in combinations]


def _refuse_impossible(configs: Sequence[Config], directory: str) -> None:
    """Raises UserError where a text is too short or not there, or the folder cannot be written."""
    texts = {repr((c.data, c.tokens, c.workload, c.ebm, c.model.context, c.steps)): c for c in configs}
    for config in texts.values():
        checked_text(config)
    refuse_unwritable(Path(directory))


def _hydra_settings(overrides: Sequence[str]) -> Any:
    """Hydra's own part of the composed configuration. Raises UserError."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException

    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir().resolve())):
            composed = hydra_compose("config", list(overrides), return_hydra_config=True)
    except HydraException as error:
        told = f"{error}\n{error.__cause__ or ''}".partition("Config search path")[0]
        lines = [line.strip() for line in told.splitlines() if not line.startswith(("To append", " "))]
        raise UserError(" ".join(filter(None, lines))) from None
    HydraConfig.instance().set_config(composed)  # for ${hydra:…}
    return composed.hydra


def task(composed: Any) -> float | None:
    """What Hydra calls for each job: train one run in the job's output folder. -> its validation loss, for
    sweepers."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from ebc_lab.training.turns import DeviceFailed, Interrupted

    set_length(composed)
    config: Config = OmegaConf.to_object(composed)  # type: ignore[assignment]
    hydra = HydraConfig.get()
    directory = Path(hydra.runtime.output_dir)
    in_job = is_submitit(hydra.launcher)
    message, code = None, 0
    command = shlex.join(["ebc-lab", "train", *sys.argv[1:]])
    try:
        cores = int(hydra.launcher.get("cpus_per_task") or 1) if in_job else None
        every, together = config.launcher.checkpoint_every_s, config.launcher.processes_per_run
        with following(config.tracker, directory, print):
            result = train_one(run_part(config), directory, every, cores, together)
        if result["outcome"] not in ("completed", "diverged"):
            message, code = f"the run {result['outcome']}: {result['cause']}; {RunFiles(directory).log}", 4
    except (UserError, OSError) as error:
        message, code = f"error: {error}", 2
    except DeviceFailed as error:
        message, code = f"{error}; this continues from the checkpoint:\n  {command}", 4
    except (Interrupted, KeyboardInterrupt):
        message, code = f"interrupted; this continues from the checkpoint:\n  {command}", 130
    if message and in_job:
        raise JobFailed(f"{directory}: {message}", code)
    if message:
        print(message, file=sys.stderr)
        sys.exit(code)
    return result.get("val_loss")


def train_one(
    run: RunConfig,
    directory: Path,
    checkpoint_every_s: float,
    job_cores: int | None = None,
    processes: int = 1,
) -> dict[str, Any]:
    """Resolve what is left to choose, train in `directory`, and print the outcome. `job_cores`: of a
    launcher's job; `processes`: how many train the run together.

    Raises UserError.
    """
    from ebc_lab.config.identity import digest, identity
    from ebc_lab.records.json_files import read_json, write_json
    from ebc_lab.training.outcome import run_and_record

    known = RunFiles(directory).spec
    earlier = read_json(known, SpecRecord, OTHER_FOLDER) if known.exists() else None
    begun = from_dict(RunConfig, earlier["config"]) if earlier else None
    run = _resolved(run, begun, job_cores, processes)
    if run.lr_schedule.name == "replay":
        from ebc_lab.components.schedules import recorded_rates, source_folder

        run.lr_schedule.sha256 = digest(recorded_rates(source_folder(run.lr_schedule, directory.parent)))
    run_id = digest(identity(run))[:10]
    if earlier and earlier["run_id"] != run_id:
        raise UserError(
            f"{directory} holds another run ({earlier['run_id']}): choose another hydra.run.dir, or delete "
            f"it."
        )
    for remark in [*remarks(run), *_crowded(run, processes, job_cores or machine.cores())]:
        print(f"note: {remark}")
    directory.mkdir(parents=True, exist_ok=True)
    spec: SpecRecord = {"run_id": run_id, "kind": "train", "identity": identity(run), "config": to_dict(run)}
    write_json(known, spec)
    earlier = RunFiles(directory).result.exists()
    with run_lock(directory) as mine:
        if not mine:
            raise UserError(f"another process is training in {directory}: wait for it, or stop it.")
        hooks: dict[str, Any] = {"checkpoint_every_s": checkpoint_every_s, "say": print}
        hooks["processes"] = processes
        with live_view(run, directory) as hooks["on_progress"]:
            result = _until_done(
                lambda stop: run_and_record(run, directory, run_id, should_stop=stop, **hooks)
            )
    for line in closing_lines(run, result, directory, earlier=earlier):
        print(line)
    return result


def _crowded(run: RunConfig, processes: int, cores: int) -> list[str]:
    """A remark on processes that have to share cores."""
    threads = run.threads_per_run
    crowded = processes > 1 and run.device == "cpu" and processes * threads > cores
    return [f"{processes} processes of {threads} thread(s) share {cores} core(s)."] if crowded else []


def _resolved(run: RunConfig, begun: RunConfig | None, job_cores: int | None, processes: int) -> RunConfig:
    """The run with corpus, device and speed settings chosen, as `begun` has them where it was begun earlier.

    Raises UserError where it cannot be trained.
    """
    from ebc_lab.bench.speeds import CHOSEN, choose, is_open
    from ebc_lab.config.machine import chosen_device

    for key in (*CHOSEN, "device"):
        if begun and is_open(run, key):
            setattr(run, key, getattr(begun, key))
    run = with_sources(pinned(run, *checked_text(run)))
    if begun:
        refuse_edited(run, begun, OTHER_FOLDER)
    run.device = chosen_device(run.device)
    if any(is_open(run, key) for key in CHOSEN):
        each = None if job_cores is None else max(1, job_cores // processes)
        choice = choose(run, steps=run.steps, limit=1, job_cores=each, together=processes, say=print)
        print("\n".join(choice.reasons(run)))
        run = choice.apply_to(run)
    check_run(run)
    if run.stabilizer.name == "ebc" and run.controller.name == "energy" and run.controller.a is None:
        raise UserError(
            "controller=energy needs controller.a, natural KL over the median predicted decrease; a study "
            "finds it."
        )
    return run


def _until_done(attempt: Callable[[Callable[[], bool]], dict[str, Any]]) -> dict[str, Any]:
    """Train; a signal takes effect at the next checkpoint: its own handler runs or, without one, Interrupted
    is raised.

    submitit's handlers requeue the job on USR2 (time-out, pre-emption) and ignore TERM: whether a kill or a
    restart follows is up to Slurm, and until then the run continues.
    """
    from ebc_lab.training.turns import Interrupted

    own: dict[int, Any] = {
        s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    }
    heard = [s for s, handler in own.items() if callable(handler) or s in (signal.SIGINT, signal.SIGTERM)]
    asked: list[int] = []
    for s in heard:
        signal.signal(s, lambda number, _: asked.append(number))
    try:
        while True:
            try:
                return attempt(lambda: bool(asked))
            except Interrupted:
                while asked:
                    number = asked.pop(0)
                    if not callable(own[number]):
                        raise
                    own[number](number, None)
    finally:
        for s in heard:
            signal.signal(s, own[s])

"""What is refused of a study's settings before anything is written, each in one sentence."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import re
import shlex
import shutil
import typing
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .checks import (
    check_read,
    check_settings,
    check_value,
    choice,
    lacking,
    require_gpu,
    set_in_vain,
    validate_run,
    value_at,
)
from .choices import changed, choices_of, groups, kind_of, under, with_size
from .dicts import run_part, type_hints
from .errors import UserError, any_of, nearest, require, shown
from .fields import CUSTOM, MULTIPLE, Setting, number
from .machine import chosen_device, visible_gpus
from .modes import check_processes
from .parts import PART
from .parts.init import InitConfig
from .parts.race import RaceConfig
from .parts.stabilizer import StabilizerConfig
from .schema import (
    CAPABILITIES,
    GROWING,
    HORIZON,
    STAGE_NEEDS,
    STAGES,
    TUNABLE,
    VERSIONS,
    AblationConfig,
    ArmConfig,
    Config,
    LauncherConfig,
    MethodConfig,
    RunConfig,
    TrackerConfig,
)

SBATCH_OURS = (
    *("array", "error", "job_name", "nodes", "ntasks_per_node"),
    *("open_mode", "output", "requeue", "signal", "time"),
)
SENSIBLE_RUNS = 20_000  # of a study: what each command costs is measured up to here (docs/speed.md)
MOST_RUNS = 50_000  # more are a slip of the keyboard, which would be planned for many minutes
MOST_LOOKS = 20  # at the finals, after the first
LONGEST_FILE_NAME = 255  # bytes, on all common disks
NEEDED_ARMS = ("baseline", "control", "ebc_x2")
FINAL_ARMS = (*NEEDED_ARMS, "ebc_chosen", "none_chosen", "ebc_lindelta", "ebc_lindelta_lrdecay")
A_NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,59}")  # of an arm
TRACKER_MODULES = {  # of each extra
    "tensorboard": ("tensorboard",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}


def validate(config: Config, *, study: bool, here: bool = True, beside: Config | None = None) -> None:
    """Refuse what cannot be meant, of one run or, with `study`, of the runs of its stages. Raises UserError.

    `here`: unless the launcher is Slurm, this machine trains, so it must have the device. `beside`: the
    settings that a run began as, some of which may be read only by others of its study.
    """
    run = _stage_run(config) if study else run_part(config)
    sweep = replace(config.lr_sweep, optimizers=_swept(config))
    check_settings(replace(config, budget=run.budget, lr_sweep=sweep))
    _study(config)
    _stages(config)
    _launcher(config.launcher)
    _trackers(config.tracker)
    if config.study.mirror is not None:
        check_address("study.mirror", config.study.mirror)
    _notify(config.notify, study=study)
    require(
        config.device != "auto" or config.launcher.name != "slurm" or not study,
        "launcher=slurm needs device=cuda or device=cpu: what this machine has says nothing about the nodes.",
    )
    if config.device == "cuda" and here and config.launcher.name != "slurm":
        require_gpu()
    validate_run(run, beside=run if study else beside)
    _processes(config, run, here=here, study=study)
    if study and (config.determinism.exact or config.launcher.processes_per_run > 1):
        _set_by_stages(config)
    if study:
        _races(config)
        _read_by_somebody(replace(config, budget=run.budget))
    else:
        check_read(config, beside)


def _races(config: Config) -> None:
    """Refuse runs that end early anywhere but in the search of `tune`, and there where every loss is needed.
    Raises UserError."""
    base = run_part(config)
    for settings in ({}, *_settings_of_runs(config).values()):
        require(
            RaceConfig.from_run(changed(base, {"race": settings.get("race", {})})).changes_nothing(),
            "race=bounds is for a single run, ebc-lab train: in a study the stage tune gives its runs their "
            "bounds by itself (tune.race_sigmas), and no other run has any.",
        )
    require(
        not (config.tune.window and config.tune.race_sigmas),
        "tune.race_sigmas would stop the runs whose losses say how far the LR window reaches: leave it at 0, "
        "or set tune.window=false.",
    )


def _read_by_somebody(config: Config) -> None:
    """Refuse settings that none of the study's runs reads. Raises UserError."""
    vain = set_in_vain(config)
    if not vain:
        return
    base = run_part(config)
    for settings in _settings_of_runs(config).values():
        run = changed(base, settings)
        unread = set_in_vain(run)
        for key in [key for key in vain if key.partition(".")[0] in PART]:
            if key not in unread and value_at(run, key) == value_at(base, key):
                del vain[key]
    for sentence in vain.values():
        raise UserError(sentence)


def _settings_of_runs(config: Config) -> dict[str, dict[str, Any]]:
    """Return where a study sets something of its runs alone -> what that changes of the study's settings."""
    stages = config.study.stages
    of_stages: dict[str, dict[str, Any]] = {}
    if "lr_sweep" in stages:
        bound = config.projection.bound  # the sweep keeps it, where an arm takes that of the choice's file
        for name in config.lr_sweep.projections:
            of_stages[f"lr_sweep.projections={name}"] = {"projection": {"name": name, "bound": bound}}
    if "controller_search" in stages:
        candidates = config.controller_search.candidates
        of_stages |= {f"controller_search.candidates.{name}": set_ for name, set_ in candidates.items()}
    if "circumstances" in stages:
        for mode in config.circumstances.modes:
            of_stages[f"circumstances.modes={mode}"] = {"determinism": {"name": mode}}
    for stage in stages:
        for field, named in vars(getattr(config, stage)).items():
            for name, entry in named.items() if isinstance(named, Mapping) else ():
                if hasattr(entry, "settings"):
                    of_stages[f"{stage}.{field}.{name}"] = entry.settings
    return of_stages


def lacking_for(config: Config, *, study: bool) -> list[str]:
    """Return what this process lacks to train a run or, with `study`, the runs of its stages, a sentence
    each."""
    base = run_part(config)
    own = [str(need) for need in lacking(base)]
    asked = _settings_of_runs(config) if study else {}
    if study and "lr_sweep" in config.study.stages:
        swept = [name for name in config.lr_sweep.optimizers if name in groups()["optimizer"]]
        asked |= {f"lr_sweep.optimizers={name}": {"optimizer": {"name": name}} for name in swept}
    of_runs = {path: map(str, lacking(changed(base, settings))) for path, settings in asked.items()}
    return own + [f"{path}: {need}" for path, needs in of_runs.items() for need in needs if need not in own]


def _processes(config: Config, run: RunConfig, *, here: bool, study: bool) -> None:
    """Refuse more processes of a run than there is room for, and what they cannot train together."""
    launcher = config.launcher
    together = launcher.processes_per_run
    check_processes(run, together)
    require(
        together == 1 or not (study and "circumstances" in config.study.stages),
        f"launcher.processes_per_run={together} does not go with the stage circumstances, which compares "
        "bits: leave it at 1.",
    )
    nodes = launcher.nodes_per_run
    require(
        together % nodes == 0,
        f"launcher.nodes_per_run={nodes} must divide launcher.processes_per_run={together}: each node has as "
        "many of a run's processes.",
    )
    require(
        study or nodes == 1,
        f"launcher.nodes_per_run={nodes} is for a study, whose jobs the lab starts: leave it at 1 for train.",
    )
    if launcher.name == "slurm":
        on_each = together // nodes
        spread = f" on {nodes} nodes" if nodes > 1 else ""
        gpus = launcher.gpus_per_node if config.device == "cuda" else None
        for key, room in (("gpus_per_node", gpus), ("cpus_per_task", launcher.cpus_per_task or None)):
            require(
                room is None or on_each <= room,
                f"launcher.processes_per_run={together}{spread} needs launcher.{key} >= {on_each}, "
                f"not {room}.",
            )
    elif together > 1 and here and chosen_device(config.device) == "cuda":
        gpus = len(visible_gpus(together))
        instances = len(visible_gpus()) - gpus
        parts = f" ({instances} more are parts of one, MIG, and go alone)" if instances else ""
        require(
            together <= gpus,
            f"launcher.processes_per_run={together} takes a GPU for each process, and {gpus} can be seen "
            f"here{parts}: choose {max(gpus, 1)} at the most, or device=cpu.",
        )


def _swept(config: Config) -> list[str]:
    """Return the optimizers of the sweep, the study's own one as `custom`. Raises UserError for any other one
    that is not in conf/."""
    custom = config.optimizer.name if kind_of(config.optimizer) == CUSTOM else None
    others = [name for name in config.lr_sweep.optimizers if name != custom]
    for name in others:
        known = name in choices_of("optimizer", name)
        require(
            not known or (name in groups()["optimizer"] and name != CUSTOM),
            f"lr_sweep.optimizers={name} is none of ebc-lab's own: give optimizer={name} as well; a study "
            "has one of these.",
        )
    return [CUSTOM if name == custom else name for name in config.lr_sweep.optimizers]


def _set_by_stages(config: Config) -> None:
    """Refuse what the stages set beside the run's own settings where that could not be exact, or not be
    trained by several processes."""
    plain = changed(run_part(config), {"stabilizer": {"name": "none"}})
    stages = config.study.stages
    asked: dict[str, dict[str, Any]] = {}
    if "lr_sweep" in stages:
        sweep = config.lr_sweep
        others = [name for name in sweep.optimizers if name != plain.optimizer.name]
        asked |= {f"lr_sweep.optimizers={name}": {"optimizer": {"name": name}} for name in others}
        asked |= {
            f"lr_sweep.projections={name}": {"projection": {"name": name}} for name in sweep.projections
        }
        asked |= {f"lr_sweep.control_shapes={n}": {"lr_schedule": {"name": n}} for n in sweep.control_shapes}
    if {"calibrate", "lr_scale", "finals"} & set(stages):
        ebc = {"stabilizer": {"name": "ebc"}}
        named = config.study
        asked[f"study.lr_schedule={named.lr_schedule}"] = {"lr_schedule": {"name": named.lr_schedule}}
        for budget in config.calibrate.budgets:
            asked[f"calibrate.budgets={budget}"] = {**ebc, "budget": {"name": budget}}
        shadow = {"name": "shadow", "schedule": named.kl_schedule}
        asked[f"study.kl_schedule={named.kl_schedule}"] = {**ebc, "budget": shadow}
    for key, settings in asked.items():
        _as_run(key, plain, settings, config.launcher.processes_per_run)


def _stage_run(config: Config) -> RunConfig:
    """Return a run of the stages with a budget that they calibrate: surrogate, which has most settings, or
    any."""
    budgets = config.calibrate.budgets
    named = "surrogate" if "surrogate" in budgets else [*budgets, config.budget.name][0]
    return replace(run_part(config), budget=replace(config.budget, name=named))


def _study(config: Config) -> None:
    """Refuse a study's name, folder, seeds, band, grids and finals where they cannot be meant."""
    name = config.study.name
    require(
        bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", name)),
        f"study.name={shown(name)} must be a plain folder name: letters, digits, '.', '_' and '-', "
        "at most 80.",
    )
    require(
        not name.lower().endswith(".zip"),
        f"study.name={name} would be taken for a bundle, a file: leave out .zip.",
    )
    require(bool(config.output_dir.strip()), "output_dir must name a folder.")
    require(
        max(len(part.encode()) for part in config.output_dir.split("/")) <= LONGEST_FILE_NAME,
        f"output_dir={shown(config.output_dir)} has a name of more than {LONGEST_FILE_NAME} bytes, which no "
        "disk takes: shorten it.",
    )
    deciding = stage_seeds(config)
    require(
        not any(seed in deciding for seed in config.seeds),
        f"seeds must not contain {deciding[0]} to {deciding[-1]}: those make decisions, and no decision is "
        "judged on them.",
    )
    in_order = config.data.name == "bin" and config.data.order == "in_order"
    alike = in_order and InitConfig.from_run(config).name == "run"
    require(
        not alike or config.model.dropout > 0 or len(config.seeds) == 1,
        "seeds: from the same weights (init=run), on batches in order, every seed is the same run: choose "
        "data.order=random, or one seed.",
    )
    band = config.study.band
    require(
        len(band) == 2 and band[0] < band[1],
        f"study.band must be two numbers 0 < low < high <= 1, not {band}.",
    )
    for optimizer in config.lr_sweep.optimizers:
        require(
            bool(config.lr_sweep.grids.get(optimizer)),
            f"lr_sweep.grids.{optimizer} is missing: give its learning rates, for example "
            f"'lr_sweep.grids.{optimizer}=[1e-3,2e-3,4e-3]'.",
        )
    _final_arms(config.finals.arms)
    most = config.finals.max_seeds
    seeds = len(config.seeds)
    require(
        most == 0 or 2 <= seeds < most,
        f"finals.max_seeds={most} adds to `seeds`: two at least, and fewer, not {seeds}.",
    )
    each = config.finals.seeds_per_look
    require(
        most == 0 or (most - seeds) / each <= MOST_LOOKS,
        f"finals.seeds_per_look={each} makes more than {MOST_LOOKS} looks until there are {most} seeds, and "
        f"each widens every interval: give {math.ceil((most - seeds) / MOST_LOOKS)} at least.",
    )


def stage_seeds(config: Config) -> range:
    """Return the seeds of the runs that decisions are made from."""
    first = config.study.stage_seed
    profiles = config.profiles.calibration_seeds + config.profiles.target_seeds
    numbers = [config.lr_sweep.replicates + 1, config.calibrate.seeds, config.tune.seeds]
    return range(first, first + max(*numbers, profiles * ("profiles" in config.study.stages)))


def _final_arms(arms: Sequence[str]) -> None:
    """Refuse final arms that are unknown, and a list that lacks one which the verdict compares."""
    for arm in arms:
        at = re.fullmatch(r"(?:ebc|control)_x(\d+(?:\.\d+)?)", arm)
        require(
            arm in FINAL_ARMS or (at is not None and MULTIPLE["low"] <= float(at[1]) <= MULTIPLE["high"]),
            f"finals.arms: {shown(arm)} is unknown{nearest(arm, FINAL_ARMS)}; it takes "
            f"{', '.join(FINAL_ARMS)}, and ebc_x or control_x with a multiple of the best lr up to "
            f"{MULTIPLE['high']:g}, as in ebc_x8.",
        )
    for arm in NEEDED_ARMS:
        require(arm in arms, f"finals.arms lacks {arm}, which the verdict compares.")


def _launcher(launcher: LauncherConfig) -> None:
    """Refuse settings of a launcher that contradict each other."""
    if launcher.name != "slurm":
        return
    require(launcher.slots > 0, "launcher.slots must say how many jobs launcher=slurm may have at a time.")
    for option in launcher.sbatch:
        require(
            option.replace("-", "_") not in SBATCH_OURS,
            f"launcher.sbatch.{option} is set by the launcher itself: see docs/slurm.md.",
        )
    require(
        60 * launcher.timeout_min > launcher.signal_delay_s,
        "launcher.timeout_min must be longer than launcher.signal_delay_s.",
    )


def _stages(config: Config) -> None:
    """Refuse stages that are unknown, out of order or without what they need, and what each of them
    refuses."""
    stages = config.study.stages
    for stage in stages:
        choice("study.stages", stage, STAGES)
    order = [s for s in STAGES if s in stages]
    require(stages == order, f"study.stages must be in the order {', '.join(order)}, each once.")
    for stage in stages:
        for before in STAGE_NEEDS[stage]:
            require(before in stages, f"study.stages: {stage} needs {before} as well.")
    counts = most_runs(config)
    listed = ", ".join(f"{stage} {runs}" for stage, runs in counts.items())
    require(
        sum(counts.values()) <= MOST_RUNS,
        f"this study may have more than {MOST_RUNS} runs ({listed}): shorten its grids, arms or seeds, or "
        "make it several studies.",
    )
    base = replace(_stage_run(config), stabilizer=replace(config.stabilizer, name="ebc"))
    if "controller_search" in stages:
        require(
            bool(config.controller_search.candidates), "controller_search.candidates must name at least one."
        )
        for name, settings in config.controller_search.candidates.items():
            together = config.launcher.processes_per_run
            _as_run(f"controller_search.candidates.{name}", base, settings, together)
    if "ablation" in stages:
        _suite(config)
    if "circumstances" in stages:
        for mode, parts in itertools.product(config.circumstances.modes, config.circumstances.parts):
            plain = replace(under(base, mode, parts), stabilizer=StabilizerConfig())
            validate_run(plain, beside=base)
    if "carry" in stages:
        _carry(config)
    if "profiles" in stages:
        _profiles(config)


def beyond_sensible(config: Config) -> str:
    """Return a warning about a study of more runs than is sensible; empty for others."""
    runs = sum(most_runs(config).values())
    if runs <= SENSIBLE_RUNS:
        return ""
    return (
        f"this study may have {runs:,} runs, and more than {SENSIBLE_RUNS:,} are not sensible: checking, "
        "packing and planning take minutes each; several studies in one folder take finished runs from each "
        "other"
    )


def most_runs(config: Config) -> dict[str, int]:
    """Return stage -> the most runs that it can ask for, by multiplication alone: before anything is listed
    that may have a million entries."""
    sweep, suite = config.lr_sweep, config.ablation
    pairs = len(sweep.optimizers) * len(sweep.projections)
    tracks = pairs if sweep.keep == "all" else 1
    longest = max((len(sweep.grids.get(name, ())) for name in sweep.optimizers), default=0)
    around = len(sweep.baseline_scales) + 2 * sweep.max_extensions + sweep.replicates
    control = len(sweep.control_scales) + 2 * sweep.control_extensions + 2
    control += len(sweep.control_warmups) + len(sweep.control_shapes)
    deltas = max(len(config.calibrate.multiples), 3) + config.calibrate.max_extra
    points = sum(_most_points(config, arm) for arm in suite.arms.values() if arm.tune)
    same = config.circumstances
    where = len(same.threads) * len(same.capabilities or CAPABILITIES) * len(same.parts)
    versions = 1 + sum(map(len, suite.versions().values()))
    labels = len(suite.arms) * max(1, len(suite.lr_scales) + len(suite.deltas)) * versions
    seeds, scales = len(config.seeds), config.lr_scale.scales
    carry = config.carry
    constants = sum(len(arm.grid) + carry.max_extensions for arm in carry.arms.values())
    profiles = config.profiles
    grids = {m: math.prod(map(len, method.grid.values())) for m, method in profiles.methods.items()}
    workloads, each = len(profiles.workloads), profiles.calibration_seeds
    targets = workloads * (grids.get(profiles.yardstick, 0) * each + profiles.target_seeds)
    chosen, scored = sum(grids.values()) * len(profiles.calibrate_on) * each, len(grids) * workloads * seeds
    counts = {
        "lr_sweep": pairs * (longest + 2 * sweep.max_extensions) + tracks * (around + control),
        "calibrate": tracks * len(config.calibrate.budgets) * deltas * config.calibrate.seeds,
        "controller_search": tracks * len(config.controller_search.candidates),
        "lr_scale": tracks * (3 * len(scales) + (1.0 not in scales) + 1),
        "tune": tracks * points * config.tune.seeds,
        "finals": tracks * len(config.finals.arms) * max(seeds, config.finals.max_seeds),
        "ablation": tracks * labels * seeds,
        "circumstances": len(same.modes) * where,
        "carry": constants * len(carry.settings) * seeds,
        "profiles": targets + chosen + scored,
    }
    return {stage: counts.get(stage, 0) for stage in config.study.stages}


def _begun_with(config: Config, arm: ArmConfig) -> int:
    """Return how many points of its grids an arm's search looks at, apart from those by which they grow."""
    lengths = {key: len(values) for key, values in arm.tune.items()}
    if config.tune.search == "grid":
        return math.prod(lengths.values())
    others = [n for key, n in lengths.items() if key not in GROWING]
    return math.prod(n for key, n in lengths.items() if key in GROWING) + sum(others) - len(others)


def _most_points(config: Config, arm: ArmConfig) -> int:
    """Return the most points that an arm's search may look at."""
    tune = config.tune
    edges = sum(key in GROWING for key in arm.tune)
    again = 2 if tune.search == "coordinate" and edges < len(arm.tune) else 0
    widened = 2 * tune.max_extensions if tune.window and "lr" in arm.tune else 0
    constant = tune.search == "coordinate" and "constant" in arm.tune.get("schedule", ())  # at one more rate
    return _begun_with(config, arm) + tune.max_extensions * (edges + 1) + again + widened + constant


def _carry(config: Config) -> None:
    """Refuse arms of the stage carry that cannot be run in each of its settings, and an answer that lacks
    what it compares."""
    carry = config.carry
    arms = list(carry.arms)
    require(len(arms) > 1, "carry.arms must name at least two arms: choose study=units.")
    choosing = [name for name, setting in carry.settings.items() if not setting.kept]
    require(len(choosing) > 1, "carry.settings must name at least two that are not kept.")
    choice("carry.reference", carry.reference, arms)
    require(
        not all(arm.starts for arm in carry.arms.values()), "carry.arms must name one without starts: true."
    )
    require(bool(carry.challengers), "carry.challengers must name the arms that the verdict is about.")
    for arm in carry.challengers:
        choice("carry.challengers", arm, [name for name in arms if name != carry.reference])
    base = replace(run_part(config), steps=carry.steps, stabilizer=StabilizerConfig())
    for kind, names in (("arms", arms), ("settings", list(carry.settings))):
        for name in names:
            _name_of(f"carry.{kind}.{name}", name)
    for name, unit in carry.arms.items():
        path = f"carry.arms.{name}"
        group, _, key = unit.over.partition(".")
        hint = _hints(group).get(key)
        require(
            float in (hint, *typing.get_args(hint)),
            f"{path}.over={shown(unit.over)} must be a number of a run's part, such as budget.target_kl.",
        )
        check_value(f"{path}.grid", unit.grid, TUNABLE["strength"], list[float])
        require(
            key not in unit.settings.get(group, {}),
            f"{path}: grid and settings.{unit.over} both set it: leave one out.",
        )
        require(
            unit.over != "optimizer.lr" or unit.lr_scale == 1,
            f"{path}.lr_scale does not go with over=optimizer.lr: the constant is the rate itself.",
        )
        for place, setting in carry.settings.items():
            run = _as_run(f"carry.settings.{place}", base, setting.settings, 1, check=False)
            path = f"carry.arms.{name} in carry.settings.{place}"
            settings = {**unit.settings, group: {**unit.settings.get(group, {}), key: unit.grid[0]}}
            made = _as_run(path, with_size(run, setting), settings, config.launcher.processes_per_run)
            require(
                group != "budget" or made.stabilizer.name == "ebc",
                f"{path}: {unit.over} goes with stabilizer=ebc, not stabilizer={made.stabilizer.name}.",
            )


def _hints(group: str) -> dict[str, Any]:
    """Return the type of each setting of a part; none of what is no part."""
    part: Any = PART.get(group)
    return type_hints(part) if part else {}


def _profiles(config: Config) -> None:
    """Refuse methods of the stage profiles that cannot be run on every workload, at the ends of their
    grids."""
    profiles = config.profiles
    require(len(profiles.methods) > 1, "profiles.methods must name at least two: choose study=calibrated.")
    require(bool(profiles.workloads), "profiles.workloads must name at least one.")
    require(bool(profiles.calibrate_on), "profiles.calibrate_on must name the workloads that choose.")
    choice("profiles.yardstick", profiles.yardstick, list(profiles.methods))
    for label in profiles.calibrate_on:
        choice("profiles.calibrate_on", label, list(profiles.workloads))
    for label in profiles.asked_about:
        choice("profiles.asked_about", label, list(profiles.methods))
    base = replace(run_part(config), steps=profiles.steps, stabilizer=StabilizerConfig())
    for name, workload in profiles.workloads.items():
        path = f"profiles.workloads.{name}"
        _name_of(path, name)
        for group in ("optimizer", "stabilizer", "controller", "lr_schedule", "projection"):
            require(group not in workload.settings, f"{path}.settings: {group} is the methods' to set.")
    for name, method in profiles.methods.items():
        path = f"profiles.methods.{name}"
        _name_of(path, name)
        _grid_of_method(path, method)
        for place in method.cannot:
            choice(f"{path}.cannot", place, list(profiles.workloads))
        for place, workload in profiles.workloads.items():
            run = with_size(changed(base, workload.settings), workload)
            for end in (0, -1) if place not in method.cannot else ():
                settings = method.settings_at({key: values[end] for key, values in method.grid.items()})
                _as_run(f"{path} on {place}", run, settings, config.launcher.processes_per_run)


def _name_of(path: str, name: str) -> None:
    require(bool(A_NAME.fullmatch(name)), f"{path}: a name is lower-case letters, digits and _.")


def _grid_of_method(path: str, method: MethodConfig) -> None:
    """Refuse a method without a learning rate, with a setting set twice, or with horizons that are no
    shares."""
    for group, settings in method.settings.items():
        require(
            isinstance(settings, dict), f"{path}.settings.{group} takes {{name: …}}, not {shown(settings)}."
        )
        require(
            settings.get("target") is None,
            f"{path}.settings.{group}: this stage takes the lab's own parts only.",
        )
    for key, values in method.grid.items():
        group, _, name = key.partition(".")
        require(
            key == HORIZON or name in _hints(group),
            f"{path}.grid: {shown(key)} is no setting of a run's part, as optimizer.lr is, nor {HORIZON}.",
        )
        require(
            name not in method.settings.get(group, {}),
            f"{path}: grid and settings.{key} both set it: leave one out.",
        )
        if key == HORIZON:
            check_value(f"{path}.grid.{key}", values, Setting("", above=0, high=1), list[float])
    optimizer = method.settings.get("optimizer", {})
    require(
        "optimizer.lr" in method.grid or "lr" in optimizer,
        f"{path} needs its learning rate: a grid of optimizer.lr, or optimizer.lr in its settings.",
    )


def _suite(config: Config) -> None:
    """Refuse a suite with arms that cannot be run, or whose tuned arms do not get the same number of runs."""
    suite = config.ablation
    for key, part in VERSIONS.items():
        these, choices = part.versions, getattr(suite, key)
        assert these is not None
        usual, set_to = part(), part.from_run(config)
        setattr(usual, these.free, getattr(set_to, these.free))
        require(
            not choices or set_to == usual,
            f"this suite brings its own {key}: only {part.group_name}.{these.free} can be set.",
        )
        none = part().name
        require(none not in choices, f"ablation.{key} names {these.noun}: leave out {none}.")
    for key, values in (("lr_scales", suite.lr_scales), ("deltas", suite.deltas)):
        require(
            len({number(value) for value in values}) == len(values),
            f"ablation.{key}: two of {shown(values)} are the same to three digits, as in their arms' names.",
        )
    arms = suite.all_arms()
    require(len(arms) > 1, "ablation.arms must name at least two arms: choose a suite with study=NAME.")
    require(
        bool(suite.reference),
        "ablation.reference is missing: it names the arm that every other is paired with, "
        f"{any_of(list(arms))}.",
    )
    require(
        suite.reference in arms,
        f"ablation.reference={suite.reference} is none of the arms{nearest(suite.reference, list(arms))}.",
    )
    for name, arm in arms.items():
        _arm(name, arm, config)
        _references(name, arm, arms, suite)
    for name in suite.mine.arms:
        choice("ablation.mine.arms", name, suite.arms)
    require(
        not suite.mine.arms or len(suite.mine.arms) < len(suite.arms),
        "ablation.mine.arms names every arm: leave one out, which they are compared with.",
    )
    require(
        not (suite.mine.arms and (suite.versions() or suite.lr_scales or suite.deltas)),
        f"ablation.mine.arms goes with neither {', '.join(VERSIONS)}, lr_scales nor deltas.",
    )
    sizes = {name: _begun_with(config, arm) for name, arm in suite.arms.items() if arm.tune}
    sweeps = bool(suite.lr_scales or suite.deltas)
    versions = [key for key in VERSIONS if getattr(suite, key)]
    for key in versions:
        require(not sweeps, f"ablation.{key} does not go with lr_scales or deltas.")
    copies = [name for name, arm in suite.arms.items() if arm.replay or arm.matched]
    require(
        not (suite.lr_scales and copies), f"ablation.lr_scales does not go with copies: {', '.join(copies)}."
    )
    for key in versions:
        require(not sizes, f"ablation.{key} goes with arms that have nothing to tune.")
    require(not sizes or "tune" in config.study.stages, "study.stages: arms with a grid need the stage tune.")
    counts = ", ".join(f"{name} {size}" for name, size in sizes.items())
    require(len(set(sizes.values())) <= 1, f"every tuned arm must get the same number of runs: {counts}.")


def _grids(path: str, arm: ArmConfig) -> None:
    """Refuse grids of an arm with values that their settings cannot take, or that go against each other."""
    for key, values in arm.tune.items():
        check_value(f"{path}.tune.{key}", values, TUNABLE[key], list[Any])
        for value in values if TUNABLE[key].choices else ():
            require(isinstance(value, str), f"{path}.tune.{key} takes names, not {shown(value)}.")
    require(
        not {"lr", "lr_scale"} <= set(arm.tune),
        f"{path}.tune: lr and lr_scale are both the learning rate: leave one out.",
    )
    tuned = [key for key in ("schedule", "warmup_share") if key in arm.tune]
    custom = arm.settings.get("lr_schedule", {}).get("target") is not None
    require(
        not (tuned and (arm.control or custom)),
        f"{path}.tune.{', '.join(tuned)} does not go with a schedule of your own, or the fair control's.",
    )
    require(not ("lr" in arm.tune and arm.control), f"{path}.tune.lr does not go with control.")


def _arm(name: str, arm: ArmConfig, config: Config) -> None:
    """Refuse an arm that cannot be run, or whose settings contradict each other."""
    path = f"ablation.arms.{name}"
    require(
        bool(A_NAME.fullmatch(name)),
        f"{path}: an arm's name is lower-case letters, digits and _.",
    )
    base = with_size(replace(run_part(config), steps=config.ablation.steps), arm)
    together = config.launcher.processes_per_run
    started = {"init": {"name": "run", "run": arm.init}} if arm.init else {}
    run = _as_run(path, base, {"stabilizer": {"name": "none"}, **arm.settings, **started}, together)
    _grids(path, arm)
    stabilizer = run.stabilizer.name
    fixed = "target_kl" in arm.settings.get("budget", {})
    require("radius" not in arm.tune or stabilizer == "ebc", f"{path}.tune.radius goes with stabilizer ebc.")
    for key, is_set in (("delta", arm.delta is not None), ("tune.delta", "delta" in arm.tune)):
        require(not is_set or stabilizer == "ebc", f"{path}.{key} goes with stabilizer ebc.")
        require(
            not is_set or not fixed,
            f"{path}.{key} and settings.budget.target_kl both set the target KL: leave one out.",
        )
    require(
        "strength" not in arm.tune or stabilizer not in ("none", "ebc"),
        f"{path}.tune.strength goes with a stabilizer that has one.",
    )
    require(not arm.matched or stabilizer == "norm_clip", f"{path}.matched goes with stabilizer norm_clip.")
    require(
        not (arm.tune and arm.tuned_as), f"{path}: an arm has its own grid or another's best point, not both."
    )
    require(
        not (arm.control and "lr_schedule" in arm.settings),
        f"{path}.control sets the learning-rate schedule: leave settings.lr_schedule out.",
    )
    require(
        arm.width_scale == 1 or run.model.target is None,
        f"{path}.width_scale goes with model=gpt: a model of your own has its sizes in model.arguments.",
    )
    require(
        not (arm.tune and (arm.replay or arm.matched)),
        f"{path}: an arm that copies another has nothing to tune.",
    )
    require(
        not (arm.init and (arm.replay or arm.matched)),
        f"{path}: an arm that starts from another's weights copies none: leave init or "
        f"{'replay' if arm.replay else 'matched'} out.",
    )
    require(
        "init" not in arm.settings,
        f"{path}.settings.init: name the arm whose weights this one starts from, {path}.init=ARM.",
    )


def _references(name: str, arm: ArmConfig, arms: Mapping[str, ArmConfig], suite: AblationConfig) -> None:
    """Refuse an arm that takes something from another one which is not there or cannot give it."""
    path = f"ablation.arms.{name}"
    for key in ("replay", "matched", "versus", "tuned_as", "init"):
        other = getattr(arm, key)
        if other is None:
            continue
        if key == "tuned_as":
            allowed = [n for n, a in suite.arms.items() if a.tune]
        elif key == "init":  # its weights must be there before anything is tuned
            allowed = [n for n, a in arms.items() if not (n == name or _copies(a) or a.tune or a.tuned_as)]
        else:
            copies = key != "versus"
            allowed = [n for n, a in arms.items() if n != name and not (copies and _copies(a))]
        require(bool(allowed), f"{path}.{key}={other}: there is no such arm to take it from.")
        choice(f"{path}.{key}", other, allowed)


def _copies(arm: ArmConfig) -> bool:
    """Tell whether an arm is made from another's record, or from its weights, of which a copy knows
    nothing."""
    return bool(arm.replay or arm.matched or arm.init)


def _as_run(
    path: str, base: RunConfig, settings: dict[str, object], processes: int, *, check: bool = True
) -> RunConfig:
    """Return the run that these settings make of `base`, validated, also for so many `processes`. Errors
    begin with `path`."""
    require(isinstance(settings, dict), f"{path} takes the settings of a run, not {shown(settings)}.")
    try:
        run = changed(base, settings)
        if not check:
            return run
        validate_run(run, beside=base)
        check_processes(run, processes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return run


def _notify(command: str, *, study: bool) -> None:
    """Refuse a command that cannot be run. Raises UserError."""
    if not command:
        return
    require(study, "notify is for a study: leave it out of train, whose end your shell can wait for.")
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(f"notify={shown(command)} cannot be split into words ({error}).") from None
    require(bool(words), "notify must name a program.")
    require(
        shutil.which(os.path.expanduser(words[0])) is not None,
        f"notify: {shown(words[0])} is no program on this machine: give its path (a pipe or a `;` needs "
        "notify=\"sh -c '…'\").",
    )


def _trackers(config: TrackerConfig) -> None:
    """Refuse a tracker whose extra is not installed, and a setting that none of them reads."""
    for name in config.names:
        lacking = [module for module in TRACKER_MODULES[name] if importlib.util.find_spec(module) is None]
        require(
            not lacking,
            f"tracker={name} needs {', '.join(lacking)}: python -m pip install 'ebc-lab[{name}]'.",
        )
    for_wandb = config.wandb_project is not None or config.wandb_mode != "auto"
    require(
        "wandb" in config.names or not for_wandb,
        "tracker.wandb_mode and tracker.wandb_project go with tracker=wandb.",
    )
    uri = config.mlflow_uri
    if uri is None:
        return
    require(
        "://" in uri or uri.startswith("file:"),
        f"tracker.mlflow_uri={uri} is no URI: write sqlite:///FILE, file:FOLDER or http://HOST:PORT.",
    )
    require("mlflow" in config.names, "tracker.mlflow_uri goes with tracker=mlflow.")


def check_address(path: str, address: str) -> None:
    """Refuse what is no address of files elsewhere, holds a secret, or needs a package that is missing.
    `path`: the setting that it is of."""
    require(
        not set(address) & set("@?#"),  # the address is not repeated here
        f"{path}: an address with a password, a key or options in it (@, ?, #) is refused, since it would be "
        "shown: leave them to the environment (AWS_PROFILE, AWS_ENDPOINT_URL …).",
    )
    scheme, _, rest = address.partition("://")
    require(
        bool(rest) and "::" not in address,
        f"{path} takes an address, s3://BUCKET/PATH or file:///FOLDER, not {shown(address)}.",
    )
    if importlib.util.find_spec("fsspec") is None:
        raise UserError(f"{path} needs fsspec: python -m pip install 'ebc-lab[mirror]'.")
    from fsspec.registry import known_implementations

    known = known_implementations.get(scheme)
    require(known is not None, f"{path}={shown(address)}: fsspec knows no {scheme}://.")
    module = known["class"].partition(".")[0]
    extra = "'ebc-lab[mirror]'" if module == "s3fs" else module
    require(
        importlib.util.find_spec(module) is not None,
        f"{path}={shown(address)} needs {module}: python -m pip install {extra}.",
    )
    require(
        scheme not in ("file", "local") or rest.startswith("/"),
        f"{path}={shown(address)}: the folder is given from the root, file:///FOLDER.",
    )

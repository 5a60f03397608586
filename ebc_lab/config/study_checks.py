"""What is refused of a study's settings before anything is written, each in one sentence."""

from __future__ import annotations

import importlib.util
import math
import re
from dataclasses import replace

from . import study_checks
from .checks import choice, need, need_gpu, positive, setting_at, validate_run
from .choices import changed, groups
from .dicts import run_part
from .errors import UserError, nearest
from .schema import (
    STAGE_NEEDS,
    STAGES,
    ArmConfig,
    Config,
    LauncherConfig,
    RunConfig,
    ShockConfig,
    TrackerConfig,
)

STUDY_CHOICES = {"lr_sweep.keep": ("best", "all"), "calibrate.delta_grid": ("natural", "published")}
SLURM_SETTINGS = (  # launcher.… that only launcher=slurm reads
    "partition",
    "account",
    "qos",
    "constraint",
    "timeout_min",
    "signal_delay_s",
    "cpus_per_task",
    "gpus_per_node",
    "mem_gb",
    "setup",
    "sbatch",
    "srun_args",
    "queue_every_s",
    "idle_s",
)
SBATCH_OURS = (
    "array",
    "error",
    "job_name",
    "nodes",
    "ntasks_per_node",
    "open_mode",
    "output",
    "requeue",
    "signal",
    "time",
)
TUNABLE = ("lr_scale", "delta", "strength")


def validate(config: Config, *, study: bool, here: bool = True) -> None:
    """Refuse what cannot be meant, of one run or, with `study`, of runs whose budget the stages choose. Raises UserError.

    `here`: what trains is this machine, unless the launcher says otherwise, so it must have the device.
    """
    _validate_study(config)
    need(
        config.device != "auto" or config.launcher.name != "slurm" or not study,
        "launcher=slurm needs device=cuda or device=cpu: what this machine has says nothing about the nodes.",
    )
    if config.device == "cuda" and here and config.launcher.name != "slurm":
        need_gpu()
    validate_run(_stage_run(config) if study else config)


def _stage_run(config: Config) -> RunConfig:
    """A run as the stages make it: of a budget that they calibrate, the one with most settings if there are several."""
    budgets = config.calibrate.budgets
    named = "surrogate" if "surrogate" in budgets else budgets[0]
    return replace(run_part(config), budget=replace(config.budget, name=named))


def _validate_study(config: Config) -> None:
    for group, named in (("launcher", config.launcher.name), ("scale", config.scale)):
        choice(group, named, groups()[group])
    for key, names, group in (
        ("lr_sweep.optimizers", config.lr_sweep.optimizers, "optimizer"),
        ("lr_sweep.projections", config.lr_sweep.projections, "projection"),
        ("calibrate.budgets", config.calibrate.budgets, "budget"),
    ):
        need(bool(names), f"{key} must name at least one {group}.")
        need(len(set(names)) == len(names), f"{key} names one {group} twice: {names}.")
        for name in names:
            choice(key, name, groups()[group])
    for key, allowed in STUDY_CHOICES.items():
        choice(key, setting_at(config, key), allowed)
    need(bool(config.output_dir.strip()), "output_dir must name a folder.")
    name = config.study.name
    need(
        bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", name)),
        f"study.name={name!r} must be one plain folder name: letters, digits, '.', '_' and '-', at most 80.",
    )
    need(bool(config.seeds), "seeds must name at least one seed.")
    need(len(set(config.seeds)) == len(config.seeds), f"seeds names a seed twice: {config.seeds}.")
    need(all(s >= 0 for s in [*config.seeds, config.seed, config.study.stage_seed]), "a seed must be >= 0.")
    first, last = config.study.stage_seed, config.study.stage_seed + config.lr_sweep.replicates
    need(
        not any(first <= s <= last for s in config.seeds),
        f"seeds must not contain {first} to {last}: decisions are made on those, and none is judged on the seed that made it.",
    )
    for stage in STAGES:
        positive(f"{stage}.steps", getattr(config, stage).steps)
    _stages(config)
    low, high = config.study.band if len(config.study.band) == 2 else (1.0, 0.0)
    need(0 < low < high <= 1, f"study.band must be two numbers 0 < low < high <= 1, not {config.study.band}.")
    for optimizer in config.lr_sweep.optimizers:
        need(
            bool(config.lr_sweep.grids.get(optimizer)),
            f"lr_sweep.grids.{optimizer} is missing: give its learning rates.",
        )
    for optimizer, grid in config.lr_sweep.grids.items():
        for lr in grid:
            positive(f"lr_sweep.grids.{optimizer}", lr)
        need(
            sorted(set(grid)) == grid,
            f"lr_sweep.grids.{optimizer} must be increasing, without repeats: {grid}.",
        )
    for key, values in (
        ("lr_sweep.control_scales", config.lr_sweep.control_scales),
        ("calibrate.multiples", config.calibrate.multiples),
        ("lr_scale.scales", config.lr_scale.scales),
    ):
        need(bool(values), f"{key} must not be empty.")
        for value in values:
            positive(key, value)
        need(sorted(set(values)) == values, f"{key} must be increasing, without repeats: {values}.")
    positive("calibrate.lr_scale", config.calibrate.lr_scale)
    positive("lr_sweep.control_warmup", config.lr_sweep.control_warmup, zero=True)
    need(config.lr_sweep.replicates >= 2, "lr_sweep.replicates must be at least 2: they measure the noise.")
    for key in ("lr_sweep.max_extensions", "calibrate.max_extra"):
        stage, _, attribute = key.partition(".")
        positive(key, getattr(getattr(config, stage), attribute), zero=True)
    positive("lr_sweep.skip_threshold", config.lr_sweep.skip_threshold)
    positive("finals.margin", config.finals.margin, zero=True)
    positive("finals.seeds_per_look", config.finals.seeds_per_look)
    need(
        config.finals.max_seeds == 0 or 2 <= len(config.seeds) < config.finals.max_seeds,
        f"finals.max_seeds={config.finals.max_seeds} adds to `seeds`: two at least, and fewer, not {len(config.seeds)}.",
    )
    _launcher(config.launcher)
    study_checks.check(config.tracker)


def _launcher(launcher: LauncherConfig) -> None:
    """Numbers in their ranges, and nothing asked of a launcher that it would ignore."""
    for key in (
        "slots",
        "runs_per_worker",
        "checkpoint_every_s",
        "max_lost",
        "run_timeout_s",
        "cpus_per_task",
        "idle_s",
    ):
        positive(f"launcher.{key}", getattr(launcher, key), zero=True)
    for key in ("workers_per_gpu", "heartbeat_s", "timeout_min", "signal_delay_s", "queue_every_s"):
        positive(f"launcher.{key}", getattr(launcher, key))
    need(
        launcher.name != "inline" or launcher.runs_per_worker <= 1,
        "launcher.runs_per_worker is a setting of launcher=local and launcher=slurm: launcher=inline trains one run at a time.",
    )
    default = LauncherConfig()
    asked = [k for k in SLURM_SETTINGS if getattr(launcher, k) != getattr(default, k)]
    need(
        launcher.name == "slurm" or not asked,
        f"launcher.{''.join(asked[:1])} is a setting of launcher=slurm.",
    )
    if launcher.name == "slurm":
        need(launcher.slots > 0, "launcher.slots must say how many jobs launcher=slurm may have at a time.")
        need(launcher.workers_per_gpu == 1, "launcher.workers_per_gpu is a setting of launcher=local.")
        ours = [k for k in launcher.sbatch if k.replace("-", "_") in SBATCH_OURS]
        need(
            not ours, f"launcher.sbatch.{''.join(ours[:1])} is set by the launcher itself: see docs/slurm.md."
        )
        need(
            60 * launcher.timeout_min > launcher.signal_delay_s,
            "launcher.timeout_min must be longer than launcher.signal_delay_s.",
        )


def _stages(config: Config) -> None:
    """The stages are known, in order, and each has what it needs; the arms of an ablation can all be run."""
    stages = config.study.stages
    for stage in stages:
        choice("study.stages", stage, STAGES)
    order = [s for s in STAGES if s in stages]
    need(stages == order, f"study.stages must be in the order {', '.join(order)}, each once.")
    for stage in stages:
        for before in STAGE_NEEDS[stage]:
            need(before in stages, f"study.stages: {stage} needs {before} as well.")
    base = replace(_stage_run(config), stabilizer=replace(config.stabilizer, name="ebc"))
    if "controller_search" in stages:
        need(
            bool(config.controller_search.candidates), "controller_search.candidates must name at least one."
        )
        for name, settings in config.controller_search.candidates.items():
            _as_run(f"controller_search.candidates.{name}", base, settings)
    if "ablation" not in stages:
        return
    calm = ShockConfig(step=config.shock.step)
    need(
        not config.ablation.shocks or config.shock == calm,
        "this suite brings its own shocks: only shock.step can be set.",
    )
    for shock in config.ablation.shocks:
        choice("ablation.shocks", shock, [s for s in groups()["shock"] if s != "none"])
    arms = config.ablation.all_arms()
    need(len(arms) > 1, "ablation.arms must name at least two arms: choose a suite with study=NAME.")
    need(
        config.ablation.reference in arms,
        f"ablation.reference={config.ablation.reference} is none of the arms{nearest(config.ablation.reference, list(arms))}.",
    )
    for name, arm in arms.items():
        _arm(name, arm, config)
    sizes = {name: math.prod(map(len, arm.tune.values())) for name, arm in arms.items() if arm.tune}
    need(not (sizes and config.ablation.shocks), "ablation.shocks goes with arms that have nothing to tune.")
    need(not sizes or "tune" in stages, "study.stages: arms with a grid to tune need the stage tune.")
    need(
        len(set(sizes.values())) <= 1,
        f"every tuned arm must get the same number of runs: {', '.join(f'{n} {k}' for n, k in sizes.items())}.",
    )


def _arm(name: str, arm: ArmConfig, config: Config) -> None:
    path = f"ablation.arms.{name}"
    need(
        bool(re.fullmatch(r"[a-z0-9][a-z0-9_]{0,59}", name)),
        f"{path}: an arm's name is lower-case letters, digits and _.",
    )
    base = replace(run_part(config), steps=config.ablation.steps)
    run = _as_run(path, base, {"stabilizer": {"name": "none"}, **arm.settings})
    positive(f"{path}.lr_scale", arm.lr_scale)
    said = "target_kl" in arm.settings.get("budget", {})
    for key, given in (("delta", arm.delta is not None), ("tune.delta", "delta" in arm.tune)):
        if given:
            need(run.stabilizer.name == "ebc", f"{path}.{key} goes with stabilizer ebc.")
            need(not said, f"{path}.{key} and settings.budget.target_kl both say what δ* is: leave one out.")
    if arm.delta is not None:
        positive(f"{path}.delta", arm.delta)
    rival = run.stabilizer.name not in ("none", "ebc")
    need("strength" not in arm.tune or rival, f"{path}.tune.strength goes with a stabilizer that has one.")
    need(
        not arm.matched or run.stabilizer.name == "norm_clip",
        f"{path}.matched goes with stabilizer norm_clip.",
    )
    need(
        not (arm.tune and (arm.replay or arm.matched)),
        f"{path}: an arm that copies another has nothing to tune.",
    )
    for key, values in arm.tune.items():
        choice(f"{path}.tune", key, TUNABLE)
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        need(
            bool(values) and numbers and sorted(set(values)) == list(values),
            f"{path}.tune.{key} must be numbers, increasing, without repeats: {list(values)}.",
        )
        for value in values:
            positive(f"{path}.tune.{key}", value)
    choice(f"{path}.replay_seed", arm.replay_seed, ("own", "next"))
    others = {n: a for n, a in config.ablation.all_arms().items() if n != name}
    recorded = [n for n, a in others.items() if not a.replay and not a.matched]
    for key, other, allowed in (
        ("replay", arm.replay, recorded),
        ("matched", arm.matched, recorded),
        ("versus", arm.versus, list(others)),
    ):
        if other is not None:
            choice(f"{path}.{key}", other, allowed)


def _as_run(path: str, base: RunConfig, settings: dict[str, object]) -> RunConfig:
    """The run these settings make of `base`, validated; the arm is named in the error."""
    try:
        run = changed(base, settings)
        validate_run(run)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return run


NEEDED = {
    "tensorboard": ("tensorboard",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
}  # modules of the extra


def check(config: TrackerConfig) -> None:
    """Refuse an unknown tracker, or one whose extra is not installed. Raises UserError."""
    for name in config.names:
        if name not in NEEDED:
            raise UserError(f"tracker.names takes {' and '.join(NEEDED)}, not {name}.")
        lacking = [module for module in NEEDED[name] if importlib.util.find_spec(module) is None]
        if lacking:
            raise UserError(
                f"tracker={name} needs {', '.join(lacking)}: python -m pip install 'ebc-lab[{name}]'."
            )
    uri = config.mlflow_uri
    if uri is not None and "://" not in uri and not uri.startswith("file:"):
        raise UserError(
            f"tracker.mlflow_uri={uri} is no URI: write sqlite:///FILE, file:FOLDER or http://HOST:PORT."
        )
    if uri is not None and "mlflow" not in config.names:
        raise UserError("tracker.mlflow_uri is a setting of tracker=mlflow.")
    if not config.wait_s >= 0:
        raise UserError("tracker.wait_s must be 0 or more seconds.")

"""What is refused of a study's settings before anything is written, each in one sentence."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Sequence
from dataclasses import replace

from .checks import check_settings, choice, need, need_gpu, validate_run
from .choices import changed, shaped
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
NEEDED_ARMS = ("baseline", "control", "ebc_x2")
FINAL_ARMS = (*NEEDED_ARMS, "ebc_chosen", "none_chosen", "ebc_lindelta", "ebc_lindelta_lrdecay")
TRACKER_MODULES = {  # of each extra
    "tensorboard": ("tensorboard",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
}


def validate(config: Config, *, study: bool, here: bool = True) -> None:
    """Refuse what cannot be meant, of one run or, with `study`, of the runs of its stages. Raises UserError.

    `here`: unless the launcher is Slurm, this machine trains, so it must have the device.
    """
    run = _stage_run(config) if study else run_part(config)
    check_settings(replace(config, budget=run.budget))
    _study(config)
    _stages(config)
    _launcher(config.launcher)
    _trackers(config.tracker)
    need(
        config.device != "auto" or config.launcher.name != "slurm" or not study,
        "launcher=slurm needs device=cuda or device=cpu: what this machine has says nothing about the nodes.",
    )
    if config.device == "cuda" and here and config.launcher.name != "slurm":
        need_gpu()
    validate_run(run)


def _stage_run(config: Config) -> RunConfig:
    """A run of the stages, with a budget that they calibrate: surrogate, which has most settings, or any."""
    budgets = config.calibrate.budgets
    named = "surrogate" if "surrogate" in budgets else [*budgets, config.budget.name][0]
    return replace(run_part(config), budget=replace(config.budget, name=named))


def _study(config: Config) -> None:
    name = config.study.name
    need(
        bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", name)),
        f"study.name={name!r} must be a plain folder name: letters, digits, '.', '_' and '-', at most 80.",
    )
    need(bool(config.output_dir.strip()), "output_dir must name a folder.")
    deciding = stage_seeds(config)
    need(
        not any(seed in deciding for seed in config.seeds),
        f"seeds must not contain {deciding[0]} to {deciding[-1]}: those make decisions, and no decision is "
        "judged on them.",
    )
    band = config.study.band
    need(
        len(band) == 2 and band[0] < band[1],
        f"study.band must be two numbers 0 < low < high <= 1, not {band}.",
    )
    for optimizer in config.lr_sweep.optimizers:
        need(
            bool(config.lr_sweep.grids.get(optimizer)),
            f"lr_sweep.grids.{optimizer} is missing: give its learning rates.",
        )
    _final_arms(config.finals.arms)
    most = config.finals.max_seeds
    need(
        most == 0 or 2 <= len(config.seeds) < most,
        f"finals.max_seeds={most} adds to `seeds`: two at least, and fewer, not {len(config.seeds)}.",
    )


def stage_seeds(config: Config) -> range:
    """The seeds of the runs that decisions are made from."""
    first = config.study.stage_seed
    return range(
        first, first + max(config.lr_sweep.replicates + 1, config.calibrate.seeds, config.tune.seeds)
    )


def _final_arms(arms: Sequence[str]) -> None:
    """The finals have the arms that the verdict compares, and no other than are known."""
    for arm in arms:
        at = re.fullmatch(r"(?:ebc|control)_x(\d+(?:\.\d+)?)", arm)
        need(
            arm in FINAL_ARMS or (at is not None and float(at[1]) > 0),
            f"finals.arms: {arm} is unknown{nearest(arm, FINAL_ARMS)}; it takes {', '.join(FINAL_ARMS)}, and "
            "ebc_x or control_x with any multiple of the best learning rate, as in ebc_x8.",
        )
    for arm in NEEDED_ARMS:
        need(arm in arms, f"finals.arms lacks {arm}, which the verdict compares.")


def _launcher(launcher: LauncherConfig) -> None:
    need(
        launcher.name != "inline" or launcher.runs_per_worker <= 1,
        "launcher.runs_per_worker goes with launcher=local or slurm: launcher=inline trains one at a time.",
    )
    if launcher.name != "slurm":
        return
    need(launcher.slots > 0, "launcher.slots must say how many jobs launcher=slurm may have at a time.")
    for option in launcher.sbatch:
        need(
            option.replace("-", "_") not in SBATCH_OURS,
            f"launcher.sbatch.{option} is set by the launcher itself: see docs/slurm.md.",
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
    if "ablation" in stages:
        _suite(config)


def _suite(config: Config) -> None:
    """The arms of a suite can all be run, and tuned ones get the same number of runs."""
    suite = config.ablation
    need(
        not suite.shocks or config.shock == ShockConfig(step=config.shock.step),
        "this suite brings its own shocks: only shock.step can be set.",
    )
    need("none" not in suite.shocks, "ablation.shocks names disturbances: leave out none.")
    arms = suite.all_arms()
    need(len(arms) > 1, "ablation.arms must name at least two arms: choose a suite with study=NAME.")
    need(
        suite.reference in arms,
        f"ablation.reference={suite.reference} is none of the arms{nearest(suite.reference, list(arms))}.",
    )
    for name, arm in arms.items():
        _arm(name, arm, config)
    sizes = {name: math.prod(map(len, arm.tune.values())) for name, arm in suite.arms.items() if arm.tune}
    sweeps = bool(suite.lr_scales or suite.deltas)
    need(not (sweeps and suite.shocks), "ablation.shocks does not go with lr_scales or deltas.")
    copies = [name for name, arm in suite.arms.items() if arm.replay or arm.matched]
    need(
        not (suite.lr_scales and copies), f"ablation.lr_scales does not go with copies: {', '.join(copies)}."
    )
    need(not (sizes and suite.shocks), "ablation.shocks goes with arms that have nothing to tune.")
    need(not sizes or "tune" in config.study.stages, "study.stages: arms with a grid need the stage tune.")
    counts = ", ".join(f"{name} {size}" for name, size in sizes.items())
    need(len(set(sizes.values())) <= 1, f"every tuned arm must get the same number of runs: {counts}.")


def _arm(name: str, arm: ArmConfig, config: Config) -> None:
    path = f"ablation.arms.{name}"
    need(
        bool(re.fullmatch(r"[a-z0-9][a-z0-9_]{0,59}", name)),
        f"{path}: an arm's name is lower-case letters, digits and _.",
    )
    base = shaped(replace(run_part(config), steps=config.ablation.steps), arm)
    run = _as_run(path, base, {"stabilizer": {"name": "none"}, **arm.settings})
    stabilizer = run.stabilizer.name
    fixed = "target_kl" in arm.settings.get("budget", {})
    for key, given in (("delta", arm.delta is not None), ("tune.delta", "delta" in arm.tune)):
        need(not given or stabilizer == "ebc", f"{path}.{key} goes with stabilizer ebc.")
        need(
            not given or not fixed,
            f"{path}.{key} and settings.budget.target_kl both set the target KL: leave one out.",
        )
    need(
        "strength" not in arm.tune or stabilizer not in ("none", "ebc"),
        f"{path}.tune.strength goes with a stabilizer that has one.",
    )
    need(not arm.matched or stabilizer == "norm_clip", f"{path}.matched goes with stabilizer norm_clip.")
    need(
        not (arm.tune and arm.tuned_as), f"{path}: an arm has its own grid or another's best point, not both."
    )
    need(
        not (arm.control and "lr_schedule" in arm.settings),
        f"{path}.control sets the learning-rate schedule: leave settings.lr_schedule out.",
    )
    need(
        not (arm.tune and (arm.replay or arm.matched)),
        f"{path}: an arm that copies another has nothing to tune.",
    )
    others = {n: a for n, a in config.ablation.all_arms().items() if n != name}
    recorded = [n for n, a in others.items() if not a.replay and not a.matched]
    references = (
        ("replay", arm.replay, recorded),
        ("matched", arm.matched, recorded),
        ("versus", arm.versus, list(others)),
        ("tuned_as", arm.tuned_as, [n for n, a in config.ablation.arms.items() if a.tune]),
    )
    for key, other, allowed in references:
        if other is not None:
            need(bool(allowed), f"{path}.{key}={other}: there is no such arm to take it from.")
            choice(f"{path}.{key}", other, allowed)


def _as_run(path: str, base: RunConfig, settings: dict[str, object]) -> RunConfig:
    """The run that these settings make of `base`, validated. Errors name the arm."""
    try:
        run = changed(base, settings)
        validate_run(run)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return run


def _trackers(config: TrackerConfig) -> None:
    """Refuse a tracker whose extra is not installed, and a setting that none of them reads."""
    for name in config.names:
        lacking = [module for module in TRACKER_MODULES[name] if importlib.util.find_spec(module) is None]
        need(
            not lacking,
            f"tracker={name} needs {', '.join(lacking)}: python -m pip install 'ebc-lab[{name}]'.",
        )
    uri = config.mlflow_uri
    if uri is None:
        return
    need(
        "://" in uri or uri.startswith("file:"),
        f"tracker.mlflow_uri={uri} is no URI: write sqlite:///FILE, file:FOLDER or http://HOST:PORT.",
    )
    need("mlflow" in config.names, "tracker.mlflow_uri goes with tracker=mlflow.")

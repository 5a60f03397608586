"""Checks of a study's settings before anything is written. Each mistake is refused in one sentence.

A table of mistakes maps each sentence to whether the settings make that mistake.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import shlex
import shutil
import typing
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from . import checks, schema
from .checks import check_value, choice, set_in_vain, validate_run
from .choices import OWN_GROUPS, changed, choices_of, groups, kind_of, under, with_setting, with_size
from .dicts import run_part, type_hints
from .errors import UserError, any_of, naming, nearest, refuse, require, shown
from .fields import CUSTOM, MULTIPLE, Setting, number
from .hints import near_setting
from .machine import chosen_device, installed, visible_gpus
from .modes import check_processes
from .parts import PART
from .parts.init import InitConfig
from .parts.race import RaceConfig
from .parts.stabilizer import StabilizerConfig
from .schema import (
    ARGUMENTS,
    BASE,
    COMPARED_ON,
    GROWING,
    HORIZON,
    SIZES,
    STAGES,
    TUNABLE,
    TUNED_AS,
    VERSIONS,
    ArmConfig,
    Config,
    RunConfig,
    tunable,
)

Mistakes: TypeAlias = dict[str, object]  # sentence -> true where the settings make this mistake
SBATCH_OURS = (
    *("array", "error", "job_name", "nodes", "ntasks_per_node"),
    *("open_mode", "output", "requeue", "signal", "time"),
)
SENSIBLE_RUNS = 20_000  # of a study; the cost of each command is measured up to here (docs/running.md)
MOST_RUNS = 50_000  # more are a typing error, which would be planned for many minutes
MOST_LOOKS = 20  # at the finals, after the first
LONGEST_FILE_NAME = 255  # bytes, on all common disks
NEEDED_ARMS = ("baseline", "control", "ebc_x2")
FINAL_ARMS = (*NEEDED_ARMS, "ebc_chosen", "none_chosen", "ebc_lindelta", "ebc_lindelta_lrdecay")
A_NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,59}")  # of an arm or another entry
TRACKER_NEEDS = {"mlflow": ("sqlalchemy", "alembic")}  # tracker -> modules beside the one of its name


def validate(config: Config, *, study: bool, here: bool = True, beside: Config | None = None) -> None:
    """Raise UserError for impossible or contradictory settings of a run or, with `study`, of a study.

    `here`: unless the launcher is Slurm, this machine trains and must have the device. `beside`: the run that
    this one began as. Settings unchanged since then may be unread: other runs of its study may read them.
    """
    run = _stage_run(config) if study else run_part(config)
    sweep = replace(config.lr_sweep, optimizers=_swept(config))
    checks.check_settings(replace(config, budget=run.budget, lr_sweep=sweep))
    refuse(_study(config))
    _check_finals(config)
    _check_stages(config)
    refuse(_slurm(config, study=study) | _trackers(config.tracker))
    if config.study.mirror is not None:
        check_address("study.mirror", config.study.mirror)
    _check_notify(config.notify, study=study)
    if config.device == "cuda" and here and config.launcher.name != "slurm":
        checks.require_gpu()
    validate_run(run, beside=run if study else beside)
    check_processes(run, config.launcher.processes_per_run)
    refuse(_processes(config, here=here, study=study))
    if not study:
        checks.check_read(config, beside)
        return
    if config.determinism.exact or config.launcher.processes_per_run > 1:
        _check_settings_of_stages(config)
    _check_races(config)
    _check_read_by_somebody(replace(config, budget=run.budget))


def _check_races(config: Config) -> None:
    """Raise UserError if a race is set outside the stage `tune`, or if the race in `tune` would stop runs
    that the LR window needs."""
    base = run_part(config)
    for settings in ({}, *_settings_of_runs(config).values()):
        run = changed(base, {"race": settings.get("race", {})})
        require(
            RaceConfig.from_run(run).changes_nothing(),
            "race=bounds is for a single run, ebc-lab train: in a study the stage tune gives its runs their "
            "bounds by itself (tune.race_sigmas), and no other run has any.",
        )
    require(
        not (config.tune.window and config.tune.race_sigmas),
        "tune.race_sigmas would stop the runs whose losses say how far the LR window reaches: leave it at 0, "
        "or set tune.window=false.",
    )


def _check_read_by_somebody(config: Config) -> None:
    """Raise UserError for a setting that is set but that no run of the study reads."""
    vain = set_in_vain(config)
    base = run_part(config)
    for settings in _settings_of_runs(config).values() if vain else ():
        run = changed(base, settings)
        unread = set_in_vain(run)
        for key in [key for key in vain if key.partition(".")[0] in PART]:
            if key not in unread and checks.value_at(run, key) == checks.value_at(base, key):
                del vain[key]
    for sentence in vain.values():
        raise UserError(sentence)


def _settings_of_runs(config: Config) -> dict[str, dict[str, Any]]:
    """Return, by path, the settings that a study changes in each place for some of its runs."""
    stages = config.study.stages
    asked: dict[str, dict[str, Any]] = {}
    if "lr_sweep" in stages:
        bound = config.projection.bound  # kept by the sweep; an arm takes that of the choice's file
        for name in config.lr_sweep.projections:
            asked[f"lr_sweep.projections={name}"] = {"projection": {"name": name, "bound": bound}}
    if "controller_search" in stages:
        for name, settings in config.controller_search.candidates.items():
            asked[f"controller_search.candidates.{name}"] = settings
    if "circumstances" in stages:
        for mode in config.circumstances.modes:
            asked[f"circumstances.modes={mode}"] = {"determinism": {"name": mode}}
    for stage in stages:
        for field, entries in vars(getattr(config, stage)).items():
            for name, entry in entries.items() if isinstance(entries, Mapping) else ():
                if isinstance(entry, schema.EntryConfig):
                    asked[f"{stage}.{field}.{name}"] = entry.settings
    return asked


def lacking_for(config: Config, *, study: bool) -> list[str]:
    """Return a sentence for each missing library that a run or, with `study`, a study needs to train."""
    base = run_part(config)
    sentences = [str(need) for need in checks.lacking(base)]
    asked = _settings_of_runs(config) if study else {}
    if study and "lr_sweep" in config.study.stages:
        swept = [name for name in config.lr_sweep.optimizers if name in groups()["optimizer"]]
        asked |= {f"lr_sweep.optimizers={name}": {"optimizer": {"name": name}} for name in swept}
    of_all = set(sentences)
    for path, settings in asked.items():
        needs = map(str, checks.lacking(changed(base, settings)))
        sentences += [f"{path}: {need}" for need in needs if need not in of_all]
    return sentences


def _slurm(config: Config, *, study: bool) -> Mistakes:
    """Return the mistakes in the settings of Slurm jobs; none under another launcher."""
    launcher = config.launcher
    if launcher.name != "slurm":
        return {}
    ours = [option for option in launcher.sbatch if option.replace("-", "_") in SBATCH_OURS]
    return {
        "launcher=slurm is for a study: a run trains here without it, and `ebc-lab train -m "
        "hydra/launcher=submitit_slurm` submits runs to Slurm.": not study,
        "launcher.slots must say how many jobs launcher=slurm may have at a time.": not launcher.slots,
        **{f"launcher.sbatch.{o} is set by the launcher itself: see docs/beyond.md.": True for o in ours},
        "launcher.timeout_min must be longer than launcher.signal_delay_s.": (
            60 * launcher.timeout_min <= launcher.signal_delay_s
        ),
        "launcher=slurm needs device=cuda or device=cpu: what this machine has says nothing about the "
        "nodes.": config.device == "auto" and study,
    }


def _processes(config: Config, *, here: bool, study: bool) -> Mistakes:
    """Return the mistakes in the number of processes that train a run together, and in their placement."""
    launcher = config.launcher
    together, nodes = launcher.processes_per_run, launcher.nodes_per_run
    asked = f"launcher.processes_per_run={together}"
    mistakes: Mistakes = {
        f"{asked} does not go with the stage circumstances, which compares bits: leave it at 1.": (
            together > 1 and study and "circumstances" in config.study.stages
        ),
        f"launcher.nodes_per_run={nodes} must divide {asked}: each node has as many of a run's processes.": (
            together % nodes
        ),
        f"launcher.nodes_per_run={nodes} is for a study, whose jobs the lab starts: leave it at 1 for "
        "train.": nodes > 1 and not study,
    }
    if launcher.name == "slurm":
        on_each = together // nodes
        spread = f" on {nodes} nodes" if nodes > 1 else ""
        gpus = launcher.gpus_per_node if config.device == "cuda" else None
        for key, room in (("gpus_per_node", gpus), ("cpus_per_task", launcher.cpus_per_task or None)):
            if room is not None:
                sentence = f"{asked}{spread} needs launcher.{key} >= {on_each}, not {room}."
                mistakes[sentence] = on_each > room
    elif together > 1 and here and chosen_device(config.device) == "cuda":
        seen = len(visible_gpus(together))
        instances = len(visible_gpus()) - seen
        parts = f" ({instances} more are parts of one, MIG, and go alone)" if instances else ""
        mistakes[
            f"{asked} takes a GPU for each process, and {seen} can be seen here{parts}: choose "
            f"{max(seen, 1)} at the most, or device=cpu."
        ] = together > seen
    return mistakes


def _swept(config: Config) -> list[str]:
    """Return the optimizers of the LR sweep, with the study's user-defined optimizer given as `custom`.
    Raises UserError for any other that an installed package offers."""
    custom = config.optimizer.name if kind_of(config.optimizer) == CUSTOM else None
    for name in config.lr_sweep.optimizers:
        offered = name != custom and name in choices_of("optimizer", name)
        require(
            not offered or (name in groups()["optimizer"] and name != CUSTOM),
            f"lr_sweep.optimizers={name} is none of ebc-lab's own: give optimizer={name} as well; a study "
            "has one of these.",
        )
    return [CUSTOM if name == custom else name for name in config.lr_sweep.optimizers]


def _check_settings_of_stages(config: Config) -> None:
    """Raise UserError for a stage's setting that the run's determinism or number of processes excludes."""
    plain = changed(run_part(config), {"stabilizer": {"name": "none"}})
    stages = config.study.stages
    asked: dict[str, dict[str, Any]] = {}
    if "lr_sweep" in stages:
        sweep = config.lr_sweep
        others = [name for name in sweep.optimizers if name != plain.optimizer.name]
        for key, group, names in (
            ("optimizers", "optimizer", others),
            ("projections", "projection", sweep.projections),
            ("control_shapes", "lr_schedule", sweep.control_shapes),
        ):
            asked |= {f"lr_sweep.{key}={name}": {group: {"name": name}} for name in names}
    if {"calibrate", "lr_scale", "finals"} & set(stages):
        ebc = {"stabilizer": {"name": "ebc"}}
        lr_schedule, kl_schedule = config.study.lr_schedule, config.study.kl_schedule
        asked[f"study.lr_schedule={lr_schedule}"] = {"lr_schedule": {"name": lr_schedule}}
        for budget in config.calibrate.budgets:
            asked[f"calibrate.budgets={budget}"] = {**ebc, "budget": {"name": budget}}
        shadow = {"name": "shadow", "schedule": kl_schedule}
        asked[f"study.kl_schedule={kl_schedule}"] = {**ebc, "budget": shadow}
    for key, settings in asked.items():
        _as_run(key, plain, settings, config)


def _stage_run(config: Config) -> RunConfig:
    """Return a typical run of the stages, for checking. Its budget is `surrogate`, which reads the most
    settings, if calibrated; otherwise the first calibrated budget or, if there is none, the study's own."""
    budgets = config.calibrate.budgets
    name = "surrogate" if "surrogate" in budgets else [*budgets, config.budget.name][0]
    return replace(run_part(config), budget=replace(config.budget, name=name))


def _study(config: Config) -> Mistakes:
    """Return the mistakes in a study's name, folder, seeds, band and grids."""
    name, folder, band = config.study.name, config.output_dir, config.study.band
    deciding = stage_seeds(config)
    in_order = config.data.name == "bin" and config.data.order == "in_order"
    alike = in_order and InitConfig.from_run(config).name == "run" and not config.model.dropout
    return {
        f"study.name={shown(name)} must be a plain folder name: letters, digits, '.', '_' and '-', "
        "at most 80.": not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", name),
        f"study.name={name} would be taken for a bundle, a file: leave out .zip.": name[-4:].lower()
        == ".zip",
        "output_dir must name a folder.": not folder.strip(),
        f"output_dir={shown(folder)} has a name of more than {LONGEST_FILE_NAME} bytes, which no disk takes: "
        "shorten it.": max(len(part.encode()) for part in folder.split("/")) > LONGEST_FILE_NAME,
        f"seeds must not contain {deciding[0]} to {deciding[-1]}: those make decisions, and no decision is "
        "judged on them.": any(seed in deciding for seed in config.seeds),
        "seeds: from the same weights (init=run), on batches in order, every seed is the same run: choose "
        "data.order=random, or one seed.": alike and len(config.seeds) > 1,
        f"study.band must be two numbers 0 < low < high <= 1, not {band}.": (
            len(band) != 2 or band[0] >= band[1]
        ),
        **{
            f"lr_sweep.grids.{optimizer} lacks the learning rates of optimizer={optimizer}: give them, as "
            f"'lr_sweep.grids.{optimizer}=[1e-3,2e-3,4e-3]'.": not config.lr_sweep.grids.get(optimizer)
            for optimizer in config.lr_sweep.optimizers
        },
    }


def _check_finals(config: Config) -> None:
    """Raise UserError if a final arm is unknown, if a required one is missing, or if `finals.max_seeds` or
    `finals.seeds_per_look` does not fit the number of the study's seeds."""
    arms = config.finals.arms
    for arm in arms:
        scaled = re.fullmatch(r"(?:ebc|control)_x(\d+(?:\.\d+)?)", arm)
        require(
            arm in FINAL_ARMS or bool(scaled and MULTIPLE["low"] <= float(scaled[1]) <= MULTIPLE["high"]),
            f"finals.arms: {shown(arm)} is unknown{nearest(arm, FINAL_ARMS)}; it takes "
            f"{', '.join(FINAL_ARMS)}, and ebc_x or control_x with a multiple of the best lr up to "
            f"{MULTIPLE['high']:g}, as in ebc_x8.",
        )
    for arm in NEEDED_ARMS:
        require(arm in arms, f"finals.arms lacks {arm}, which the verdict compares.")
    most, each, seeds = config.finals.max_seeds, config.finals.seeds_per_look, len(config.seeds)
    fits = most == 0 or 2 <= seeds < most
    require(fits, f"finals.max_seeds={most} adds to `seeds`: two at least, and fewer, not {seeds}.")
    require(
        (most - seeds) / each <= MOST_LOOKS,
        f"finals.seeds_per_look={each} makes more than {MOST_LOOKS} looks until there are {most} seeds, and "
        f"each widens every interval: give {math.ceil((most - seeds) / MOST_LOOKS)} at least.",
    )


def stage_seeds(config: Config) -> range:
    """Return the seeds that are reserved for runs on which stages base decisions."""
    first = config.study.stage_seed
    tuned = config.tune.seeds + config.tune.further_seeds
    counts = [config.lr_sweep.replicates + 1, config.calibrate.seeds, tuned]
    if "profiles" in config.study.stages:
        counts.append(config.profiles.calibration_seeds + config.profiles.target_seeds)
    return range(first, first + max(counts))


def _check_stages(config: Config) -> None:
    """Raise UserError for stages that are unknown, out of order or wrongly set, for a stage without another
    that it needs, and for a study of too many runs."""
    stages = config.study.stages
    require(
        config.check == "none"
        or (config.ablation.mine.group == "optimizer" and len(config.ladder.rungs) == 1),
        f"check={config.check} goes with study=optimizers: other studies have their own stages and rungs.",
    )
    for stage in stages:
        choice("study.stages", stage, STAGES)
    order = [s for s in STAGES if s in stages]
    require(stages == order, f"study.stages must be in the order {', '.join(order)}, each once.")
    for stage in stages:
        for before in schema.STAGE_NEEDS[stage]:
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
        candidates = config.controller_search.candidates
        require(bool(candidates), "controller_search.candidates must name at least one.")
        for name, settings in candidates.items():
            _as_run(f"controller_search.candidates.{name}", base, settings, config)
    if "ablation" in stages:
        _check_suite(config)
    if "ladder" in stages:
        _check_ladder(config)
    if "circumstances" in stages:
        for mode, parts in itertools.product(config.circumstances.modes, config.circumstances.parts):
            plain = replace(under(base, mode, parts), stabilizer=StabilizerConfig())
            validate_run(plain, beside=base)
    if "carry" in stages:
        _check_carry(config)
    if "profiles" in stages:
        _check_profiles(config)


def beyond_sensible(config: Config) -> str:
    """Return a warning if the study may have more runs than is sensible, and otherwise an empty string."""
    runs = sum(most_runs(config).values())
    if runs <= SENSIBLE_RUNS:
        return ""
    return (
        f"this study may have {runs:,} runs, and more than {SENSIBLE_RUNS:,} are not sensible: checking, "
        "packing and planning take minutes each; several studies in one folder take finished runs from each "
        "other"
    )


def most_runs(config: Config) -> dict[str, int]:
    """Return the most runs that each stage can ask for, by stage. The runs are counted by arithmetic alone,
    because there may be too many to list."""
    sweep, suite = config.lr_sweep, config.ablation
    pairs = len(sweep.optimizers) * len(sweep.projections)
    tracks = pairs if sweep.keep == "all" else 1
    longest = max((len(sweep.grids.get(name, ())) for name in sweep.optimizers), default=0)
    around = len(sweep.baseline_scales) + 2 * sweep.max_extensions + sweep.replicates
    control = len(sweep.control_scales) + 2 * sweep.control_extensions + 2
    control += len(sweep.control_warmups) + len(sweep.control_shapes)
    deltas = max(len(config.calibrate.multiples), 3) + config.calibrate.max_extra
    tuned = [arm for arm in suite.arms.values() if arm.tune]
    same = config.circumstances
    where = len(same.threads) * len(same.capabilities or schema.CAPABILITIES) * len(same.parts)
    versions = 1 + sum(map(len, suite.versions().values()))
    labels = len(suite.arms) * max(1, len(suite.lr_scales) + len(suite.deltas)) * versions
    seeds, scales = len(config.seeds), config.lr_scale.scales
    again = config.tune.finalists * config.tune.final_seeds  # an arm's further runs, on each rung as well
    climbed = config.ladder.trials * config.tune.seeds + again * bool(config.ladder.trials) + 2 * seeds
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
        "tune": tracks * sum(_most_points(config, arm) * config.tune.seeds + again for arm in tuned),
        "finals": tracks * len(config.finals.arms) * max(seeds, config.finals.max_seeds),
        "ablation": tracks * labels * seeds,
        "ladder": tracks * len(suite.arms) * (seeds + len(config.ladder.rungs) * climbed),
        "circumstances": len(same.modes) * where,
        "carry": constants * len(carry.settings) * seeds,
        "profiles": targets + chosen + scored,
    }
    return {stage: counts.get(stage, 0) for stage in config.study.stages}


def _begun_with(config: Config, arm: ArmConfig) -> int:
    """Return how many grid points an arm's search tries before any grid is extended."""
    lengths = {key: len(values) for key, values in arm.tune.items()}
    if config.tune.search == "grid":
        return math.prod(lengths.values())
    first = config.tune.at_first
    others = [n for key, n in lengths.items() if key not in first]
    return math.prod(n for key, n in lengths.items() if key in first) + sum(others) - len(others)


def _most_points(config: Config, arm: ArmConfig) -> int:
    """Return the most points that an arm's search may try."""
    tune = config.tune
    edges = sum(key in GROWING for key in arm.tune)
    again = 2 if tune.search == "coordinate" and edges < len(arm.tune) else 0
    widened = 2 * tune.max_extensions if tune.window and "lr" in arm.tune else 0
    constant = tune.search == "coordinate" and "constant" in arm.tune.get("schedule", ())  # at one more rate
    grown = tune.max_extensions * (edges + 1 + len(arm.grows))
    return widened + (tune.trials or _begun_with(config, arm) + grown + again + constant)


def _check_ladder(config: Config) -> None:
    """Raise UserError if the ladder has no rungs, or an arm cannot be run on one of them."""
    ladder, suite = config.ladder, config.ablation
    require(bool(ladder.rungs), "ladder.rungs must name at least one: choose study=ladder or check=bigger.")
    _check_names("ladder.rungs", ladder.rungs)
    require(BASE not in ladder.rungs, f"ladder.rungs.{BASE} is the suite's own size: take another name.")
    require(
        ladder.trials == 0 or ladder.trials > 2,
        f"ladder.trials={ladder.trials}: three points at least, to see a best one between two others, or 0.",
    )
    require(
        not (suite.lr_scales or suite.deltas or suite.versions()),
        "ladder does not go with a suite's lr_scales, deltas or versions of its arms.",
    )
    powers = {f"ladder.rules.{key}": rule for key, rule in ladder.rules.items()}
    for label, rules in ladder.rules_of.items():
        choice("ladder.rules_of", label, suite.arms)
        powers |= {f"ladder.rules_of.{label}.{key}": rule for key, rule in rules.items()}
    for path, rule in powers.items():
        for what in rule:
            choice(path, what, [*SIZES, *(["lr"] if path.rpartition(".")[2] != "lr" else [])])
    sizes: dict[str, schema.RungConfig] = {}
    arms = [
        (n, arm)
        for n, arm in suite.arms.items()
        if (arm.steps, arm.batch_scale, arm.width_scale) == (1, 1, 1)
    ]
    for name, rung in ladder.rungs.items():
        path = f"ladder.rungs.{name}"
        for group in rung.settings:
            require(
                group == "model", f"{path}.settings.{group}: a rung may change its size and the model alone."
            )
        base = with_size(replace(run_part(config), steps=ladder.steps), rung)
        for label, arm in arms:
            settings = {"stabilizer": {"name": "none"}, **rung.settings, **arm.settings}
            _as_run(f"{path}, arm {label}", base, settings, config)
        size = replace(rung, about="")
        same = next((other for other, its in sizes.items() if its == size), None)
        usual = size == schema.RungConfig()
        require(not usual, f"{path} has the suite's own size: give it a width_scale, batch_scale or steps.")
        require(same is None, f"{path} and ladder.rungs.{same} have the same size: leave one out.")
        sizes[name] = size


def _check_carry(config: Config) -> None:
    """Raise UserError if `carry` lacks arms or settings, or an arm cannot be run in one of the settings."""
    carry = config.carry
    choosing = [name for name, setting in carry.settings.items() if not setting.kept]
    require(len(carry.arms) > 1, "carry.arms must name at least two arms: choose study=units.")
    require(len(choosing) > 1, "carry.settings must name at least two that are not kept.")
    choice("carry.reference", carry.reference, carry.arms)
    tuned = [name for name, arm in carry.arms.items() if not arm.starts]
    require(bool(tuned), "carry.arms must name one without starts: true.")
    require(bool(carry.challengers), "carry.challengers must name the arms that the verdict is about.")
    for name in carry.challengers:
        choice("carry.challengers", name, [other for other in carry.arms if other != carry.reference])
    _check_names("carry.arms", carry.arms)
    _check_names("carry.settings", carry.settings)
    base = replace(run_part(config), steps=carry.steps, stabilizer=StabilizerConfig())
    for name, unit in carry.arms.items():
        path = f"carry.arms.{name}"
        group, _, key = unit.over.partition(".")
        hint = _hints(group).get(key)
        require(
            float in (hint, *typing.get_args(hint)),
            f"{path}.over={shown(unit.over)} must be a number of a run's part, such as budget.target_kl.",
        )
        others = unit.settings.get(group, {})
        require(key not in others, f"{path}: grid and settings.{unit.over} both set it: leave one out.")
        require(
            unit.over != "optimizer.lr" or unit.lr_scale == 1,
            f"{path}.lr_scale does not go with over=optimizer.lr: the constant is the rate itself.",
        )
        settings = {**unit.settings, group: {**others, key: unit.grid[0]}}
        for place, setting in carry.settings.items():
            with naming(f"carry.settings.{place}"):
                run = with_size(changed(base, setting.settings), setting)
            path = f"carry.arms.{name} in carry.settings.{place}"
            stabilizer = _as_run(path, run, settings, config).stabilizer.name
            require(
                group != "budget" or stabilizer == "ebc",
                f"{path}: {unit.over} goes with stabilizer=ebc, not stabilizer={stabilizer}.",
            )


def _hints(group: str) -> dict[str, Any]:
    """Return the type of each setting of a part, by name, or an empty dict if the group is not a part."""
    part: Any = PART.get(group)
    return type_hints(part) if part else {}


def _check_names(path: str, entries: Mapping[str, Any]) -> None:
    for name in entries:
        require(bool(A_NAME.fullmatch(name)), f"{path}.{name}: a name is lower-case letters, digits and _.")


def _check_profiles(config: Config) -> None:
    """Raise UserError if `profiles` lacks methods or workloads, or if a method cannot be run on one of its
    workloads at the ends of its grid."""
    profiles = config.profiles
    methods, workloads = profiles.methods, profiles.workloads
    require(len(methods) > 1, "profiles.methods must name at least two: choose study=calibrated.")
    require(bool(workloads), "profiles.workloads must name at least one.")
    require(bool(profiles.calibrate_on), "profiles.calibrate_on must name the workloads that choose.")
    choice("profiles.yardstick", profiles.yardstick, methods)
    for label in profiles.calibrate_on:
        choice("profiles.calibrate_on", label, workloads)
    for label in profiles.asked_about:
        choice("profiles.asked_about", label, methods)
    _check_names("profiles.workloads", workloads)
    for name, workload in workloads.items():
        for group in ("optimizer", "stabilizer", "controller", "lr_schedule", "projection"):
            path = f"profiles.workloads.{name}.settings"
            require(group not in workload.settings, f"{path}: {group} is the methods' to set.")
    _check_names("profiles.methods", methods)
    base = replace(run_part(config), steps=profiles.steps, stabilizer=StabilizerConfig())
    for name, method in methods.items():
        path = f"profiles.methods.{name}"
        _check_grid_of_method(path, method)
        for place in method.cannot:
            choice(f"{path}.cannot", place, workloads)
        for place in [place for place in workloads if place not in method.cannot]:
            run = with_size(changed(base, workloads[place].settings), workloads[place])
            for end in (0, -1):
                settings = method.settings_at({key: values[end] for key, values in method.grid.items()})
                _as_run(f"{path} on {place}", run, settings, config)


def _check_grid_of_method(path: str, method: schema.MethodConfig) -> None:
    """Raise UserError for a method without a learning rate, or with an invalid grid."""
    for group, settings in method.settings.items():
        its = f"{path}.settings.{group}"
        require(isinstance(settings, dict), f"{its} takes {{name: …}}, not {shown(settings)}.")
    for key, values in method.grid.items():
        group, _, name = key.partition(".")
        if key == HORIZON:
            check_value(f"{path}.grid.{key}", values, Setting("", above=0, high=1), list[float])
            continue
        require(
            name in _hints(group),
            f"{path}.grid: {shown(key)} is no setting of a run's part, as optimizer.lr is, nor {HORIZON}.",
        )
        twice = name in method.settings.get(group, {})
        require(not twice, f"{path}: grid and settings.{key} both set it: leave one out.")
    require(
        "optimizer.lr" in method.grid or "lr" in method.settings.get("optimizer", {}),
        f"{path} needs its learning rate: a grid of optimizer.lr, or optimizer.lr in its settings.",
    )


def _check_suite(config: Config) -> None:
    """Raise UserError for arms that cannot be run, and tuned arms that get unequal numbers of runs."""
    suite = config.ablation
    for key, part in VERSIONS.items():
        these, choices = part.versions, getattr(suite, key)
        assert these is not None
        usual, set_to = part(), part.from_run(config)
        none = usual.name
        setattr(usual, these.free, getattr(set_to, these.free))
        only = f"this suite brings its own {key}: only {part.group_name}.{these.free} can be set."
        require(not choices or set_to == usual, only)
        require(none not in choices, f"ablation.{key} names {these.noun}: leave out {none}.")
    for key, values in (("lr_scales", suite.lr_scales), ("deltas", suite.deltas)):
        require(
            len({number(value) for value in values}) == len(values),
            f"ablation.{key}: two of {shown(values)} are the same to three digits, as in their arms' names.",
        )
    arms = suite.all_arms()
    labels = list(arms)
    require(len(arms) > 1, "ablation.arms must name at least two arms: choose a suite with study=NAME.")
    require(
        bool(suite.reference),
        f"ablation.reference is missing: it names the arm that every other is paired with, {any_of(labels)}.",
    )
    require(
        suite.reference in arms,
        f"ablation.reference={suite.reference} is none of the arms{nearest(suite.reference, labels)}.",
    )
    for name, arm in arms.items():
        _check_arm(name, arm, config)
        _check_givers(name, arm, arms, suite)
    for name in suite.mine.arms:
        choice("ablation.mine.arms", name, suite.arms)
    for key in config.tune.combined:
        tuned = {k: None for arm in arms.values() for k in arm.tune}
        choice("tune.combined", key, dict.fromkeys(TUNABLE) | tuned)
    refuse(_lists(config))


def _lists(config: Config) -> Mistakes:
    """Return the conflicts between the lists of a suite, its arms and the study's stages."""
    suite = config.ablation
    mine, swept, trials = suite.mine.arms, suite.lr_scales or suite.deltas, config.tune.trials
    sizes = {name: _begun_with(config, arm) for name, arm in suite.arms.items() if arm.tune}
    counts = ", ".join(f"{name} {size}" for name, size in sizes.items())
    copies = [name for name, arm in suite.arms.items() if arm.replay or arm.matched]
    versions = [key for key in VERSIONS if getattr(suite, key)]
    return {
        "ablation.mine.arms names every arm: leave one out, which they are compared with.": (
            mine and len(mine) == len(suite.arms)
        ),
        f"ablation.mine.arms goes with neither {', '.join(VERSIONS)}, lr_scales nor deltas.": (
            mine and (versions or swept)
        ),
        **{f"ablation.{key} does not go with lr_scales or deltas.": swept for key in versions},
        f"ablation.lr_scales does not go with copies: {', '.join(copies)}.": suite.lr_scales and copies,
        **{f"ablation.{key} goes with arms that have nothing to tune.": sizes for key in versions},
        "study.stages: arms with a grid need the stage tune.": sizes and "tune" not in config.study.stages,
        f"every tuned arm must get the same number of runs: {counts}; or give all of them tune.trials=…, and "
        "those with fewer values try more around their best.": len({*sizes.values()}) > 1 and not trials,
        f"tune.trials={trials} is fewer than the points with which the grids begin: {counts}; choose "
        "tune.trials=0, which trains all of them, or tune.search=coordinate, or fewer values.": (
            trials and trials < max(sizes.values(), default=0)
        ),
    }


def _check_arm(name: str, arm: ArmConfig, config: Config) -> None:
    """Raise UserError for an arm that cannot be run, or whose settings contradict each other."""
    path = f"ablation.arms.{name}"
    require(bool(A_NAME.fullmatch(name)), f"{path}: an arm's name is lower-case letters, digits and _.")
    base = with_size(replace(run_part(config), steps=config.ablation.steps), arm)
    started = {"init": {"name": "run", "run": arm.init}} if arm.init else {}
    run = _as_run(path, base, {"stabilizer": {"name": "none"}, **arm.settings, **started}, config)
    for key, values in arm.tune.items():
        if key in TUNABLE:
            check_value(f"{path}.tune.{key}", values, TUNABLE[key], list[Any])
            for value in values if TUNABLE[key].choices else ():
                require(isinstance(value, str), f"{path}.tune.{key} takes names, not {shown(value)}.")
        else:
            _check_tuned_setting(path, arm, run, key)
    for key in arm.grows:
        require(
            key in arm.tune and key not in TUNABLE,
            f"{path}.grows.{key} goes with a grid of a part's setting, {path}.tune.optimizer.beta2=[…]: the "
            "others grow by themselves, or never.",
        )
    tune, stabilizer = arm.tune, run.stabilizer.name
    others = stabilizer != "ebc"
    own_schedule = arm.settings.get("lr_schedule", {}).get("target") is not None
    shaped_by = [key for key in ("schedule", "warmup_share") if key in tune]
    set_schedule, set_kl = "lr_schedule" in arm.settings, "target_kl" in arm.settings.get("budget", {})
    deltas = ["delta"] * (arm.delta is not None) + ["tune.delta"] * ("delta" in tune)
    copied = next((key for key in ("replay", "matched") if getattr(arm, key)), "")
    mistakes = {
        ".tune: lr and lr_scale are both the learning rate: leave one out.": {"lr", "lr_scale"} <= set(tune),
        f".tune.{', '.join(shaped_by)} does not go with a schedule of your own, or the fair control's.": (
            shaped_by and (arm.control or own_schedule)
        ),
        ".tune.lr does not go with control.": "lr" in tune and arm.control,
        ".tune.radius goes with stabilizer ebc.": "radius" in tune and others,
        **{f".{key} goes with stabilizer ebc.": others for key in deltas},
        **{
            f".{key} and settings.budget.target_kl both set the target KL: leave one out.": set_kl
            for key in deltas
        },
        ".tune.strength goes with a stabilizer that has one.": (
            "strength" in tune and stabilizer in ("none", "ebc")
        ),
        ".matched goes with stabilizer norm_clip.": arm.matched and stabilizer != "norm_clip",
        ": an arm has its own grid or another's best point, not both.": tune and arm.tuned_as,
        ".control sets the learning-rate schedule: leave settings.lr_schedule out.": (
            arm.control and set_schedule
        ),
        ".width_scale goes with model=gpt: a model of your own has its sizes in model.arguments.": (
            arm.width_scale != 1 and run.model.target is not None
        ),
        ": an arm that copies another has nothing to tune.": tune and copied,
        f": an arm that starts from another's weights copies none: leave init or {copied} out.": (
            arm.init and copied
        ),
        f".settings.init: name the arm whose weights this one starts from, {path}.init=ARM.": (
            "init" in arm.settings
        ),
    }
    refuse({path + sentence: made for sentence, made in mistakes.items()})


def _check_tuned_setting(path: str, arm: ArmConfig, run: RunConfig, key: str) -> None:
    """Raise UserError for a grid of a setting by which no arm is tuned, or for values that it cannot take."""
    where, (group, _, name) = f"{path}.tune.{key}", key.partition(".")
    known = [*TUNABLE, *(f"{part}.{field}" for part in PART for field in _hints(part))]
    argument = name.startswith(f"{ARGUMENTS}.") and group in OWN_GROUPS
    alike = [setting for setting in known if setting.rpartition(".")[2] == key]
    near = f" (did you mean {any_of(alike)}?)" if alike else near_setting(key, known)
    require(argument or key in known, f"{where} is no setting of a part{near}.")
    instead = TUNED_AS.get(key)
    require(instead is None, f"{where}: an arm tunes it as {path}.tune.{instead}.")
    require(
        group not in COMPARED_ON,
        f"{where} is of what is trained, not of how: an arm's own best cannot lie in another {group}.",
    )
    require(
        not argument or getattr(run, group).target is not None,
        f"{where} goes with a part of your own, {group}={{name: …, target: FILE:NAME}}.",
    )
    twice = name in arm.settings.get(group, {})
    require(not twice, f"{path}: tune and settings.{key} both set it: leave one out.")
    values, kind = arm.tune[key], _hints(group).get(name, Any)
    of_kind: Any = list[kind]  # type: ignore[valid-type]
    check_value(where, values, replace(tunable(key), unique=True), of_kind)
    numbers = [x for x in values if isinstance(x, int | float) and not isinstance(x, bool)]
    if rule := arm.grows.get(key):
        can = len(numbers) == len(values) > 1 and kind in (float, Any)
        require(can, f"{path}.grows.{key}: only two numbers or more can grow, not {shown(values)}.")
        positive = rule == "linear" or min(values) > 0
        require(positive, f"{path}.grows.{key}=log needs values above 0: choose linear.")
    for value in values:
        with naming(f"{where}={shown(value)}"):
            validate_run(with_setting(run, key, value), beside=run)


def _check_givers(
    name: str, arm: ArmConfig, arms: Mapping[str, ArmConfig], suite: schema.AblationConfig
) -> None:
    """Raise UserError if an arm refers to an arm that does not exist or cannot give what it is asked for."""
    path = f"ablation.arms.{name}"
    for key in ("replay", "matched", "versus", "tuned_as", "init"):
        giver = getattr(arm, key)
        if giver is None:
            continue
        if key == "tuned_as":
            allowed = [label for label, other in suite.arms.items() if other.tune]
        elif key == "versus":
            allowed = [label for label in arms if label != name]
        else:
            allowed = [label for label, other in arms.items() if label != name and not _copies(other)]
        if key == "init":  # its weights must exist before anything is tuned
            allowed = [label for label in allowed if not (arms[label].tune or arms[label].tuned_as)]
        require(bool(allowed), f"{path}.{key}={giver}: there is no such arm to take it from.")
        choice(f"{path}.{key}", giver, allowed)


def _copies(arm: ArmConfig) -> bool:
    """Return whether an arm is made from another arm's record or weights. If so, no other arm may copy it."""
    return bool(arm.replay or arm.matched or arm.init)


def _as_run(path: str, base: RunConfig, settings: Any, config: Config) -> RunConfig:
    """Return `base` changed by these settings, after validating it. Errors begin with `path`."""
    require(isinstance(settings, dict), f"{path} takes the settings of a run, not {shown(settings)}.")
    with naming(path):
        run = changed(base, settings)
        validate_run(run, beside=base)
        check_processes(run, config.launcher.processes_per_run)
    return run


def _check_notify(command: str, *, study: bool) -> None:
    """Raise UserError if the command of `notify` cannot be run or is given for a single run."""
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


def _trackers(config: schema.TrackerConfig) -> Mistakes:
    """Return the mistakes in trackers: missing packages, a bad address, or a setting that none reads."""
    needs = {name: (name, *TRACKER_NEEDS.get(name, ())) for name in config.names}
    missing = {name: [m for m in modules if not installed(m)] for name, modules in needs.items()}
    for_wandb = config.wandb_project is not None or config.wandb_mode != "auto"
    uri = config.mlflow_uri
    return {
        **{
            f"tracker={name} needs {', '.join(modules)}: python -m pip install 'ebc-lab[{name}]'.": modules
            for name, modules in missing.items()
        },
        "tracker.wandb_mode and tracker.wandb_project go with tracker=wandb.": (
            for_wandb and "wandb" not in config.names
        ),
        f"tracker.mlflow_uri={uri} is no URI: write sqlite:///FILE, file:FOLDER or http://HOST:PORT.": (
            uri is not None and "://" not in uri and not uri.startswith("file:")
        ),
        "tracker.mlflow_uri goes with tracker=mlflow.": uri is not None and "mlflow" not in config.names,
    }


def check_address(path: str, address: str) -> None:
    """Raise UserError for an address of remote files that is invalid, holds a secret, or needs a missing
    package. `path` is the setting that holds the address."""
    require(
        not set(address) & set("@?#"),  # left out of the message: it may hold a secret
        f"{path}: an address with a password, a key or options in it (@, ?, #) is refused, since it would be "
        "shown: leave them to the environment (AWS_PROFILE, AWS_ENDPOINT_URL …).",
    )
    scheme, _, rest = address.partition("://")
    require(
        bool(rest) and "::" not in address,
        f"{path} takes an address, s3://BUCKET/PATH or file:///FOLDER, not {shown(address)}.",
    )
    require(installed("fsspec"), f"{path} needs fsspec: python -m pip install 'ebc-lab[mirror]'.")
    from fsspec.registry import known_implementations

    known = known_implementations.get(scheme)
    require(known is not None, f"{path}={shown(address)}: fsspec knows no {scheme}://.")
    module = known["class"].partition(".")[0]
    extra = "'ebc-lab[mirror]'" if module == "s3fs" else module
    require(installed(module), f"{path}={shown(address)} needs {module}: python -m pip install {extra}.")
    require(
        scheme not in ("file", "local") or rest.startswith("/"),
        f"{path}={shown(address)}: the folder is given from the root, file:///FOLDER.",
    )

"""Builders of the stages' runs. They make a track's plain run at a multiple of its best learning rate, and
put a run on a schedule or under EBC. They also set the loss bounds above which a run of a search is stopped.

The results depend on the arguments alone, except that `texts_pinned` and `check_lengths` read files of text.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ebc_lab.config.checks import lacking, least_target_kl
from ebc_lab.config.choices import changed, optimizer_defaults, read_choice, with_size
from ebc_lab.config.dicts import run_part, to_dict
from ebc_lab.config.errors import naming
from ebc_lab.config.identity import (
    canonical_json,
    digest,
    round3,
    share_in_steps,
    study_environment,
    with_derived_settings,
)
from ebc_lab.config.parts.data import data_of_another_text
from ebc_lab.config.parts.race import RaceConfig
from ebc_lab.config.schema import STAGES, Config, RunConfig
from ebc_lab.ebc.options import GUARDED
from ebc_lab.records.decisions import BestRate, NaturalSteps, SweepTrack
from ebc_lab.records.spec import RunSpec, arm_name

from .rules import Decisions, Results, Specs, curve_of, losses_of

if TYPE_CHECKING:
    from ebc_lab.workloads.corpus import Corpus

Searched = tuple[str, str]  # optimizer, projection
Rivals = Sequence[Specs]  # points of a search, each as its runs over the seeds
# no run is stopped before this share of its steps: earlier losses misled (dev/studies/race_replay.py)
RACED_FROM = 0.75
MOST_BOUNDS = 20  # per run: more would fill its settings and hardly stop it earlier
DIGITS = 4  # decimals of a bound in nats
CUT_AT_ONCE = 2_000_000  # characters of a text that are cut into tokens within about a second


def plain_run(config: Config, track: BestRate, steps: int, seed: int, scale: float) -> RunConfig:
    """Return a track's run without EBC, at a constant rate of `scale` times the track's best rate."""
    base, name = run_part(config), track["optimizer"]
    # the study's own optimizer has the study's settings, any other those of its file
    optimizer = config.optimizer if config.optimizer.name == name else optimizer_defaults(name)
    return replace(
        base,
        seed=seed,
        steps=steps,
        evaluate=["val"],
        optimizer=replace(optimizer, lr=float(f"{track['lr'] * scale:.6g}")),
        projection=replace(base.projection, name=track["projection"]),
        stabilizer=replace(base.stabilizer, name="none"),
        lr_schedule=replace(base.lr_schedule, name="constant"),
    )


def ebc_run(config: Config, track: SweepTrack, steps: int, seed: int, scale: float, **ebc: Any) -> RunConfig:
    """Return a track's run with EBC on the study's schedules. EBC warms up by itself, so the learning rate
    has no warm-up. `ebc`: the budget, target KL and further settings, as `with_ebc` takes them."""
    run = scheduled(plain_run(config, track, steps, seed, scale), config.study.lr_schedule, 0)
    return with_ebc(run, track, schedule=config.study.kl_schedule, **ebc)


def scheduled(run: RunConfig, schedule: str, warmup: float) -> RunConfig:
    """Return the run on a learning-rate schedule. `warmup` is in steps or, below 1, a share of the run."""
    steps = share_in_steps(warmup, run.steps) if warmup < 1 else int(warmup)
    return replace(run, lr_schedule=replace(run.lr_schedule, name=schedule, warmup_steps=steps))


def with_ebc(
    run: RunConfig, track: SweepTrack, budget: str, target_kl: float, schedule: str, **settings: Any
) -> RunConfig:
    """Return the run with EBC, completed from the track's baseline. `target_kl` is in nats; `settings` are
    those chosen by a controller search."""
    held = replace(run.budget, name=budget, target_kl=target_kl, schedule=schedule)
    run = replace(run, stabilizer=replace(run.stabilizer, name="ebc"), budget=held)
    return fill_from_baseline(changed(run, settings), track)


def with_target(run: RunConfig, target_kl: float) -> RunConfig:
    """Return the run with this target KL, rounded to three digits. A target KL is raised if the budget cannot
    hold so small a one in the run's numerical precision."""
    return replace(run, budget=replace(run.budget, target_kl=max(round3(target_kl), least_target_kl(run))))


def fill_from_baseline(run: RunConfig, track: NaturalSteps, times: float = 1.0) -> RunConfig:
    """Return the run with three settings adjusted. The target KL of an EBC run is raised to the least that
    can be held, if it is lower. The guard is switched off unless the budget is `surrogate`. If the `energy`
    controller has no gain, it gets `times` the KL that the baseline spent per nat of promised decrease."""
    if run.stabilizer.name == "ebc":
        run = with_target(run, run.budget.target_kl)
    if run.budget.name not in GUARDED:
        run = replace(run, budget=replace(run.budget, guard="none"))
    energy = run.stabilizer.name == "ebc" and with_derived_settings(run).controller.name == "energy"
    descent = track.get("descent_median") or 0.0
    if energy and run.controller.a is None and descent > 0:  # else the run is refused for its missing gain
        gain = float(f"{times * track['natural_kl'] / descent:.4g}")
        return replace(run, controller=replace(run.controller, a=gain))
    return run


def spec_of(
    stage: str, role: str, run: RunConfig, scale: float, note: str = "", *, usual: int | None = None
) -> RunSpec:
    """Return a stage's run. Its arm is named after the run's settings; `usual` is the length left out."""
    return RunSpec(stage, role, arm_name(run, scale, note + length(run, usual)), scale, run)


def length(run: RunConfig, usual: int | None) -> str:
    """Return the part of an arm's name that gives a run's length, such as `_n200`; empty for the usual
    length."""
    return "" if usual in (None, run.steps) else f"_n{run.steps}"


def tracks_of(decisions: Decisions, stage: str) -> list[str]:
    """Return the tracks that the latest decision before `stage` kept; empty if no stage has decided yet."""
    made = [s for s in STAGES[: STAGES.index(stage)] if s in decisions]
    return list(decisions[made[-1]]["tracks"]) if made else []


def searched(decisions: Decisions, track: str) -> dict[str, Any]:
    """Return the settings that the controller search chose for a track; empty if there was no search."""
    decision = decisions.get("controller_search")
    return dict(decision["tracks"][track]["settings"]) if decision else {}


def waiting(specs: Specs, results: Results) -> bool:
    """Return whether any of the runs has no result yet."""
    return any(s.run_id not in results for s in specs)


def distinct(specs: Specs) -> list[RunSpec]:
    """Return the specs, keeping only the first of any that have the same run."""
    return list({s.run_id: s for s in reversed(specs)}.values())[::-1]


def searched_run(config: Config, pair: Searched, lr: float, steps: int, seed: int, scale: float) -> RunConfig:
    """Return a plain run of lr_sweep at a constant learning rate of `scale` times `lr`."""
    track: BestRate = {"optimizer": pair[0], "projection": pair[1], "lr": lr}
    return plain_run(config, track, steps, seed, scale)


def sweep_spec(config: Config, role: str, run: RunConfig, scale: float) -> RunSpec:
    """Return a run of lr_sweep. Its scale is relative to the best rate of the grid, whereas the scales of
    later stages are relative to the best constant rate. The arm is therefore named after the rate itself."""
    return RunSpec("lr_sweep", role, arm_name(run, None, length(run, config.finals.steps)), scale, run)


def rate_of(spec: RunSpec) -> float:
    return spec.run.optimizer.lr


# -- racing --------------------------------------------------------------------------------------------------


def raced(
    run: RunConfig, rivals: Rivals, results: Results, margin: float, first: float = RACED_FROM
) -> RunConfig:
    """Return the run with bounds: losses on the fixed windows above which the run is stopped.

    A bound is the loss of the best finished rival's worst seed at the same step, plus `margin` nats. `rivals`
    are points whose runs all have a result. A rival counts only if it completed and is `alike`; without one,
    the run is returned unchanged. Bounds begin at the share `first` of the run's steps: a high rate has
    higher losses before it decays, even than a low rate that it will beat. Bounds are settings of the run, so
    the run ends the same way whenever it is trained, resumed or copied.
    """
    finished = [p for p in rivals if alike(p[0].run, run) and max(losses_of(p, results)) < math.inf]
    if not finished:
        return run
    lead = min(finished, key=lambda point: max(losses_of(point, results)))
    curves = [curve_of(results[spec.run_id]) for spec in lead]
    common = sorted(set.intersection(*map(set, curves)))
    late = [step for step in common if first * run.steps <= step < run.steps]
    every = math.ceil(len(late) / MOST_BOUNDS) or 1
    highest = {step: max(curve[step] for curve in curves) for step in late[::every]}
    above = {str(step): round(loss + margin, DIGITS) for step, loss in highest.items()}
    return RaceConfig("bounds", above).put_into(run) if above else run


def alike(run: RunConfig, other: RunConfig) -> bool:
    """Return whether two runs differ at most in rate, strength, target KL, seed and bounds."""

    def without_these(run: RunConfig) -> RunConfig:
        run = RaceConfig().put_into(with_derived_settings(run))
        return replace(
            run,
            seed=0,
            optimizer=replace(run.optimizer, lr=1.0),
            stabilizer=replace(run.stabilizer, strength=None),
            budget=replace(run.budget, target_kl=1.0),
        )

    return without_these(run) == without_these(other)


# -- many runs of one configuration --------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _made(key: str) -> dict[Any, list[RunSpec]]:
    return {}


def specs_made(config: Config, stage: str) -> dict[Any, list[RunSpec]]:
    """Return a cache for the runs of a stage under one configuration. Naming thousands of runs takes seconds,
    and a study asks for all of them whenever a run ends."""
    environment, settings = study_environment(config), to_dict(getattr(config, stage))
    return _made(
        canonical_json({"run": to_dict(run_part(config)), stage: settings, "environment": environment})
    )


# -- settings that bring a text of their own -----------------------------------------------------------------


def own_text(base: RunConfig, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the `data` and `tokens` of a run if `settings` change either of them; empty if they change
    neither. The checksum of the tokens depends on the text, so it is None unless `settings` give it."""
    if not {"data", "tokens"} & set(settings):
        return {}
    data, tokens = to_dict(base.data), {**to_dict(base.tokens), "sha256": None}
    if "data" in settings:
        own = data_of_another_text(base.data, settings["data"])
        data |= {**read_choice("data", own["name"]), **own}
    return {"data": data, "tokens": tokens | settings.get("tokens", {})}


def own_runs(config: Config) -> Iterator[tuple[str, RunConfig]]:
    """Yield (path of the settings, longest run) for each arm, setting of `carry` and profiled workload."""
    base, stages, carry, profiles = run_part(config), config.study.stages, config.carry, config.profiles

    def of_its_own(run: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
        return changed(run, {**settings, **own_text(base, settings)})

    if "ablation" in stages:
        for name, arm in config.ablation.arms.items():
            run = with_size(replace(base, steps=config.ablation.steps), arm)
            yield f"ablation.arms.{name}", of_its_own(run, arm.settings)
    places: list[tuple[str, str, float, Mapping[str, Any]]] = [
        ("carry", "settings", carry.steps, carry.settings),
        ("ladder", "rungs", config.ladder.steps, config.ladder.rungs),
        ("profiles", "workloads", profiles.steps * profiles.longest, profiles.workloads),
    ]
    for stage, part, steps, entries in places:
        run = replace(base, steps=round(steps))
        for name, entry in entries.items() if stage in stages else ():
            yield f"{stage}.{part}.{name}", with_size(of_its_own(run, entry.settings), entry)


def check_lengths(config: Config, corpus: Corpus | None, own: Collection[str] = ("path", "bin")) -> None:
    """Raise UserError if a text is too short for a run, or shards of tokens end before a run does. The runs
    are those of the stages, and those of arms, settings and workloads, which may be longer, have larger
    batches or windows, or a text of their own.

    `corpus`: the study's, or None where it is not to be read. `own`: the kinds of texts that are read for an
    arm, setting or workload. A text that takes long to cut into tokens is left to the run.
    """
    stages = [getattr(config, name) for name in config.study.stages]
    longest = max(max(stage.steps, getattr(stage, "long_steps", 0)) for stage in stages)
    known = {} if corpus is None else {_files_of(config): corpus}
    runs = [("", replace(run_part(config), steps=longest)), *own_runs(config)]
    for where, run in runs:
        files = _files_of(run)
        if run.workload.name == "images" or (files not in known and run.data.name not in own):
            continue
        from ebc_lab.workloads.corpus import locate  # imported late: loads numpy, which most plans lack
        from ebc_lab.workloads.text import check_length_of, checked_lengths

        with naming(where):
            text = known[files] = known.get(files) or locate(run.data)
            quick = run.tokens.name == "characters" or (len(text.text) <= CUT_AT_ONCE and not lacking(run))
            if text.shards is None and quick:
                checked_lengths(run, text)
            check_length_of(run, text, run.steps)


def _files_of(run: RunConfig) -> str:
    """Return what names the files of a run's text."""
    return repr((run.data.name, run.data.file, run.data.files, run.data.val_files))


def with_text(base: RunConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return `settings`, with the data and tokens that it changes written out in full. Where a checksum is
    needed but unknown, as in a plan, which reads no files, a hash of the file names stands in for it."""
    own = own_text(base, settings)
    for group, text in own.items():
        if not text["sha256"] and text["name"] != "characters":
            files = text.get("files") or text.get("file")
            text["sha256"] = digest([group, text["name"], files, text.get("size")])
    return {**settings, **own}


def texts_pinned(config: Config, stage: str, part: str, say: Callable[[str], None]) -> Config:
    """Return the configuration with the checksums of the own data and tokens of a stage's settings or
    workloads (`part`) filled in by reading the files. Raises UserError if a file cannot be read. `say` prints
    a line."""
    from ebc_lab.workloads.starts import pinned
    from ebc_lab.workloads.text import checked_text

    base, of_stage = run_part(config), getattr(config, stage)
    made = dict(getattr(of_stage, part))
    for name, place in made.items():
        if own := own_text(base, place.settings):
            run = with_size(changed(base, {**place.settings, **own}), place)
            run = pinned(run, *checked_text(run))
            settings = {**place.settings, "data": to_dict(run.data), "tokens": to_dict(run.tokens)}
            made[name] = replace(place, settings=settings)
            say(f"{stage}: {name} has data of its own, {run.data.name} in {run.tokens.name}")
    return replace(config, **{stage: replace(of_stage, **{part: made})})

"""ablation: every arm of a suite over the seeds, compared with its reference arm, paired by seed."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ebc_lab.config.errors import count
from ebc_lab.config.parts import PARTS
from ebc_lab.config.parts.target import TargetConfig
from ebc_lab.config.schema import Config, RunConfig
from ebc_lab.records.columns import BITS, PART_FIGURES
from ebc_lab.records.decisions import Arm, Decision, StepCost, SuiteTrack
from ebc_lab.records.figures import RunResult
from ebc_lab.records.spec import RunSpec, track_prefix

from . import compare_arms, rules, suite
from .compare_arms import losses
from .rules import Decisions, Results, Specs, make_decision
from .stage import Stage, or_undecided
from .statistics import level_of, seeds_needed, show_mean
from .suite import arm_run, contenders, point_of
from .verdict import add_answers, told_apart, unfinished, verdict_of

FIGURES = (  # figures of a run that are averaged over an arm's completed seeds
    *("val_loss", "test_loss", "heldout_loss"),
    *("c_median", "c_median_logged", "c_early", "c_late", "clip_rate", "grad_clip_rate"),
    *("kl_median", "kl_ratio_median", "kl_within_30pct"),
    *("surrogate_early", "surrogate_late", "beta_early", "beta_late", "tightness_median"),
    *("guard_count", "skipped_steps"),
)
STEP = "step"  # the kind of a run that measures step time
SeededArm = tuple[str, int]
TIMED_STEPS = 120  # per side; the measurement stops earlier where steps are slow


def _spec(track: str, label: str, run: RunConfig, scale: float) -> RunSpec:
    return RunSpec("ablation", label, label, scale, replace(run, evaluate=["val", "test"]), of_track=track)


def _copies(
    config: Config, decisions: Decisions, results: Results, track: str, trained: Mapping[SeededArm, RunSpec]
) -> Iterator[RunSpec]:
    """Yield the runs that are derived from a completed run of another arm. Each replays that run's c·lr, or
    is clipped so as to match that run's clip rate."""
    arms = {label: arm for label, arm in config.ablation.all_arms().items() if arm.replay or arm.matched}
    following = dict(zip(config.seeds, [*config.seeds[1:], config.seeds[0]], strict=True))
    for (label, arm), seed in itertools.product(arms.items(), config.seeds):
        source_seed = following[seed] if arm.replay and arm.replay_seed == "next" else seed
        source = trained.get((arm.replay or arm.matched or "", source_seed))
        result = results.get(source.run_id) if source else None
        if source is None or result is None or result.get("outcome") != "completed":
            continue
        point = {"lr_scale": source.lr_scale} if arm.replay else {}
        run, scale = arm_run(config, decisions, track, arm, config.ablation.steps, seed, point)
        if arm.replay:
            run = replace(run, lr_schedule=replace(run.lr_schedule, name="replay", source=source.run_id))
        else:
            run = replace(run, stabilizer=replace(run.stabilizer, strength=_matching_strength(result)))
        yield _spec(track, label, run, scale)


def _matching_strength(result: RunResult) -> float:
    """Return the gradient norm whose use as a clipping threshold matches the run's clip rate: the share of
    the run's steps with a larger norm equals that rate."""
    grid = result["grad_norm_quantiles"]
    clip_rate = result["clip_rate"]
    assert grid is not None
    assert clip_rate is not None
    place = (1 - clip_rate) * (len(grid) - 1)
    low = min(int(place), len(grid) - 2)
    return float(f"{grid[low] + (place - low) * (grid[low + 1] - grid[low]):.4g}")


def measurements(specs: Specs) -> list[RunSpec]:
    """Return a measurement of step time for the first run of every arm except plain Adam. The measured steps
    alternate with steps of plain Adam."""
    first: dict[tuple[str, str], RunSpec] = {}
    for spec in specs:
        first.setdefault((spec.track, spec.arm), spec)
    return [
        replace(spec, role="step_cost", run=replace(spec.run, steps=TIMED_STEPS, evaluate=["val"]), kind=STEP)
        for spec in first.values()
        if (spec.run.optimizer.name, spec.run.stabilizer.name) != ("adam", "none")
    ]


def steps_cost(labels: Sequence[str], reference: str, specs: Specs, results: Results) -> dict[str, StepCost]:
    """Return the step time of each arm as a multiple of the reference arm's: the median over turns, and the
    quartiles. An arm without a measurement is left out. If the reference has none, the result is empty."""
    # every other arm is timed against Adam
    adam: Mapping[str, Any] = {"step_ratio": 1.0, "step_ratio_iqr": [1.0, 1.0]}
    timed: dict[str, Mapping[str, Any]] = dict.fromkeys(labels, adam)
    timed |= {s.arm: results.get(s.run_id, {}) for s in specs if s.kind == STEP}
    measured = {label: timed[label] for label in labels if timed[label].get("step_ratio")}
    if reference not in measured:
        return {}
    unit = measured.pop(reference)["step_ratio"]
    costs: dict[str, StepCost] = {}
    for label, result in measured.items():
        ratio, low, high = (x / unit for x in (result["step_ratio"], *result["step_ratio_iqr"]))
        costs[label] = {"ratio": ratio, "low": low, "high": high}
    return costs | {reference: {"ratio": 1.0, "low": 1.0, "high": 1.0}}


def _rule(config: Config, compared: int, about_mine: int, *, tuned: bool) -> str:
    rule = (
        f"test loss after {config.ablation.steps} steps, or as many times that as an arm's size says, paired "
        f"by seed with the reference arm, {level_of(rules.error_divided(config))} intervals; an arm "
        f"beats its reference by the interval that holds for all {compared} comparisons at once"
    )
    if tuned:
        rule += (
            "; the intervals between arms that were tuned apart are widened by what other tuning seeds would "
            "have chosen"
        )
    if about_mine:
        named = any(config.ablation.arms[label].versus for label in config.ablation.mine.arms)
        rule += (
            f"; each of {', '.join(config.ablation.mine.arms)} is compared with every other arm"
            f"{', and with the one that its versus names' * named}, by "
            f"intervals that hold for all {about_mine} of these at once: better or worse where one "
            f"excludes 0, level where it lies within ±{config.finals.margin:g} nats; the rival that the "
            "answer names is the best of the others by the validation loss it was tuned to"
        )
    return rule + rules.divided_in_words(config)


def _arms(config: Config, specs: Specs, results: Results, earlier: Decisions) -> dict[str, Arm]:
    """Return the arms of one track. Each has its figures, and its description from the suite's file."""
    asked = config.ablation.all_arms()
    arms = compare_arms.arms_of(specs, results)
    runs = {label: [s.run for s in specs if s.arm == label] for label in arms}
    texts = {label: {run.data.sha256 for run in of_arm} for label, of_arm in runs.items()}
    judged_on = texts.get(config.ablation.reference)
    for label, arm in arms.items():
        other_text = judged_on is not None and texts[label] != judged_on
        reference = asked[label].versus or config.ablation.reference
        strengths = {x for run in runs[label] if (x := run.stabilizer.strength) is not None}
        causes = (r.get("cause") for r in compare_arms.results_of_arm(arm, results).values())
        cause = next((str(cause) for cause in causes if cause), None)
        arm |= {
            "about": asked[label].about or label,
            "shape": suite.shape_of(asked[label]),
            "point": point_of(config, earlier, arm["track"], label, asked[label]) or None,
            "figures": _figures(arm, results),
            "strength": statistics.median(strengths) if strengths else None,
            "comparable": not (other_text or any(run.final_windows for run in runs[label])),
            "versus": None if other_text or reference == label else reference,
            "cause": None if losses(arm, results) else cause,
        }
    memory = {label: _memory(arm, runs[label], results) for label, arm in arms.items()}
    differs = len({tuple(bytes_.items()) for bytes_ in memory.values() if bytes_}) > 1
    target = TargetConfig.from_run(config)
    for label, arm in arms.items():
        versus = arms.get(arm["versus"] or "")
        arm["figures"] |= memory[label] if differs else {}
        arm["figures"] |= compare_arms.target_figures(
            target, arm, versus, results, runs[label][0].tokens_per_step, rules.error_divided(config)
        )
    return arms


def _figures(arm: Arm, results: Results) -> dict[str, float | None]:
    """Return the mean of each figure over the arm's completed seeds; None if no seed has the figure."""
    completed = compare_arms.completed_runs(arm, results)
    keys = (*FIGURES, BITS) if BITS in arm else FIGURES
    figures = {key: compare_arms.mean(compare_arms.completed_values(arm, results, key)) for key in keys}
    for figure in PART_FIGURES.values():  # left out where no run has it, but for those that every arm shows
        value = figure.mean(completed) if figure.averaged else None
        if value is not None or figure.in_every_arm:
            figures[figure.key] = value
    return figures


def _memory(arm: Arm, runs: Sequence[RunConfig], results: Results) -> dict[str, float | None]:
    """Return, by kind, the bytes that an arm needs besides the weights; empty if no run recorded them."""
    found = compare_arms.results_of_arm(arm, results).values()
    first: Mapping[str, Any] = next((r for r in found if "state_bytes" in r), {})
    hooked = any(run.memory.hooks for run in runs)
    gradients = "largest_gradient_bytes" if hooked else "gradient_bytes"
    kept = {"state_bytes": "state_bytes", "gradient_bytes": gradients, "activation_bytes": "activation_bytes"}
    return {name: float(first[key]) for name, key in kept.items() if key in first}


def _notes(config: Config, prefix: str, track: SuiteTrack) -> list[str]:
    arms = track["arms"]
    notes = []
    for label, asked in config.ablation.all_arms().items():
        lacking = "be tuned, and was not trained: no point of its grid"
        if asked.replay or asked.matched:
            lacking = "be made: no run that it copies"
        elif asked.init and not asked.tune:
            lacking = f"be trained: no run of {asked.init}, whose weights it starts from,"
        if label not in arms:
            notes.append(f"{prefix}{label} could not {lacking} completed")
    for label, arm in arms.items():
        if diverged := arm["outcomes"].get("diverged"):
            notes.append(f"{prefix}{label}: {diverged} of {len(arm['runs'])} seeds diverged")
    for name, sweeps in track["windows"].items():
        left_out = [label for sweep in sweeps.values() for label in sweep["left_out"]]
        if left_out:
            notes.append(
                f"{prefix}{name}'s windows leave out {', '.join(left_out)}: a run failed or was lost"
            )
    by_seed = track["best_by_seed"]
    if len(set(by_seed.values())) > 1:
        best = "; ".join(f"seed {s} {label}" for s, label in by_seed.items())
        notes.append(f"{prefix}one seed alone would have named different best arms: {best}")
    return notes


def _add_differences(
    config: Config, tracks: Mapping[str, SuiteTrack], results: Results, earlier: Decisions
) -> int:
    """Write into every arm its difference in test loss from its reference arm, and return how many arms have
    one. The difference is None if there is no reference arm, or if either arm has no finished run. An
    undecided difference also holds the number of seeds that would decide it."""
    pairs = []
    for name, track in tracks.items():
        arms = track["arms"]
        for label, arm in arms.items():
            arm["difference"] = None
            versus = arm["versus"]
            if versus in arms and losses(arm, results) and losses(arms[versus], results):
                pairs.append((name, label, versus))
    for (name, label, _), difference in suite.differences(config, tracks, pairs, results, earlier).items():
        tracks[name]["arms"][label]["difference"] = difference
        if verdict_of(difference) == "undecided":
            difference["seeds_needed"] = seeds_needed(difference)
    return len(pairs)


class Ablation(Stage):
    """The stage that trains every arm of a suite over the seeds and compares it with its reference arm."""

    name = "ablation"
    title = "Ablation"
    about = "Every arm of the suite over the same seeds, each paired with its reference."
    concludes = True
    leads_with_optimizer = False
    shows = "arms"
    pictures = (
        *("ablation_curves", "ablation_steps", "ablation_tightness", "kl_curve", "policy"),
        *(part.picture for part in PARTS if part.picture),
    )

    def runs(self, config: Config, decisions: Decisions, results: Results) -> list[RunSpec]:
        """Return the runs of every arm over the seeds, and the measurements of step time. A run that copies
        another run, or starts from its weights, is added once that other run has completed."""
        specs: list[RunSpec] = []
        for track in suite.ready(config, decisions, "ablation"):
            trained: dict[SeededArm, RunSpec] = {}
            arms = config.ablation.all_arms()
            sources = {arm.init for arm in arms.values()}
            for label, seed in itertools.product(arms, config.seeds):
                if label in sources:
                    source = suite.source_of(config, decisions, track, "ablation", label, seed)
                    trained[label, seed] = source
            for label, arm in arms.items():
                point = point_of(config, decisions, track, label, arm)
                if label in sources or arm.replay or arm.matched or point is None:
                    continue
                steps, (first, *_) = config.ablation.steps, config.seeds
                alike, scale = arm_run(config, decisions, track, arm, steps, first, point)
                for seed in config.seeds:
                    run: RunConfig | None = replace(alike, seed=seed)
                    if arm.init:
                        run = suite.started(replace(alike, seed=seed), trained[arm.init, seed], results)
                    if run is not None:
                        trained[label, seed] = _spec(track, label, run, scale)
            specs += trained.values()
            specs += _copies(config, decisions, results, track, trained)
            specs += measurements(list(trained.values())) if config.ablation.step_cost else []
        return specs

    def decide(self, config: Config, specs: Specs, results: Results, earlier: Decisions) -> Decision:
        """Return a decision with each arm's figures, and with its difference in test loss from its reference
        arm, paired by seed. Raises Undecidable if no run completed."""
        tracks: dict[str, SuiteTrack] = {}
        notes: list[str] = []
        trained = [s for s in specs if s.kind == "train"]
        every = suite.ready(config, earlier, "ablation")
        for name in every:
            arms = _arms(config, [s for s in trained if s.track == name], results, earlier)
            track: SuiteTrack = {
                "reference": config.ablation.reference,
                "arms": arms,
                "sigma": earlier["lr_sweep"]["tracks"][name]["sigma"],
            }
            if config.ablation.step_cost:
                of_track = [s for s in specs if s.track == name]
                track["steps_cost"] = steps_cost(list(arms), config.ablation.reference, of_track, results)
            track["windows"] = suite.windows_of(config, arms, results)
            track["transfer"] = suite.transfer_of(config, arms, results)
            test_losses = {label: losses(arm, results) for label, arm in contenders(track).items()}
            track["best_by_seed"] = {}
            for seed in map(str, config.seeds):
                known = [label for label in test_losses if seed in test_losses[label]]
                best = min(known, key=lambda label: test_losses[label][seed], default=None)
                track["best_by_seed"][seed] = best
            notes += _notes(config, track_prefix(name, every), track)
            tracks[name] = track
        compared = _add_differences(config, tracks, results, earlier)
        about_mine = add_answers(config, tracks, results, earlier)
        if all(math.isinf(loss) for loss in rules.losses_of(trained, results)):
            raise rules.Undecidable("ablation could not be judged: no run completed.")
        rule = _rule(config, compared, about_mine, tuned="tune" in earlier)
        return make_decision("ablation", rule, config, specs, results, earlier, tracks=tracks, notes=notes)

    def headline(self, track: SuiteTrack) -> str:
        """Return the arms without a finished run, then the answers about the user's own arms (`mine`). If
        there are no answers, return instead which arms differ from their reference arm."""
        answers = [answer["sentence"] for answer in track["answers"].values()]
        lost = unfinished(track)
        many = len(track["arms"]) - len(lost)
        told = answers or [f"{count(many, 'arm')}; {told_apart(track)}"]
        return "; ".join(dict.fromkeys([*lost, *told]))

    def so_far(self, config: Config, specs: Specs, results: Results, earlier: Decisions) -> list[str]:
        """Return how each of the user's own arms (`mine`) compares with its rival, over the seeds that both
        have finished. If there are none, return the lowest difference of an arm from its reference. Raises
        Undecidable."""
        decision = self.decide(config, specs, results, earlier)
        clauses = []
        for name, track in decision["tracks"].items():
            answers = {label: answer for label, answer in track["answers"].items() if answer["rival"]}
            found = [(label, one["rival"], one["difference"]) for label, one in answers.items()]
            if not found:
                beside = [
                    (label, arm["versus"], arm["difference"]) for label, arm in contenders(track).items()
                ]
                known = [(d["median"], label) for label, _, d in beside if d and d["median"] is not None]
                lowest = min(known, default=(0.0, ""))[1]
                found = [(label, rival, d) for label, rival, d in beside if label == lowest]
            for label, rival, d in found:
                if rival and d and d["seeds"]:
                    seeds = f"from {d['seeds']} of {len(config.seeds)} seeds"
                    words = f"{label} {show_mean(d)} of test loss against {rival}, {seeds}"
                    clauses.append(or_undecided(self.lead_in(name, decision) + words, d, joint=True))
        return clauses


STAGE = Ablation()

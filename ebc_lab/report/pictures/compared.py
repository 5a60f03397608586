"""The arms that a study compares, of its finals or of a suite: over each other, each alone, and what was
measured of several of them.

With several tracks, every picture has its track's name in its own. An arm whose runs recorded nothing, as in
a brief bundle, has no picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from ebc_lab.config.parts import PARTS
from ebc_lab.records.decisions import SuiteTrack
from ebc_lab.study.stages.stage import candidates_of

from ..text.words import arm_label, mine_of, optimizer, signed, tuned_arms
from .arms.arm import Rival, draw_clip, draw_kl, draw_loss
from .arms.clip import Course, course_of, draw_steps
from .arms.curvature import Steps, draw_curvature, steps_of
from .arms.ebm import States, draw_states, states_of
from .arms.low_bit import Curve, Factors, curve_of, draw_factors, draw_kl_curve, factors_of
from .arms.mechanism import Tightness, draw_groups, draw_tightness, tightness_of
from .arms.overlaid import draw_overlaid, losses_of
from .drawing.curves import ArmRuns, Run, known, read_results, read_runs
from .drawing.sheet import Arms, Decisions, Facts, Picture, Sheet
from .windows import draw_tuned, window_pictures


class PartPicture(Protocol):
    """The picture that a part of a run has of its own, `Part.picture`: a file of this folder with the part's
    name."""

    def gather(self, of: ArmRuns) -> Any:
        """Return what the picture shows of an arm, None for nothing."""

    def draw(self, facts: Facts, track: str, arms: Arms, drawn: Mapping[str, Any]) -> Sheet:
        """Draw the arms that show something."""


PART_FIGURES = {
    part.picture: cast(PartPicture, import_module(f".{part.group_name}", __package__))
    for part in PARTS
    if part.picture
}


@dataclass
class Gathered:
    """What the pictures of several arms are drawn from, gathered while each arm's runs are in memory."""

    courses: dict[str, Course] = field(default_factory=dict)
    tight: dict[str, Tightness] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)  # of KL against c
    paths: dict[str, Steps] = field(default_factory=dict)  # through KL and length of the steps
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)  # picture -> arm -> what it draws of that
    states: States | None = None  # of the reference, if it is an energy-based model


# -- the finals ----------------------------------------------------------------------------------------------


def final_pictures(root: Path, facts: Facts, section: str, decisions: Decisions) -> Iterator[Picture]:
    """Return the pictures of all final arms together, and of each. `section`: what stage compares them."""
    tracks = decisions[section]["tracks"]
    for track, compared in tracks.items():
        tail, arms = f"_{track}" * (len(tracks) > 1), compared["arms"]
        baseline = compared["roles"]["baseline"]
        shown = {arm_label(name, arm): arm for name, arm in arms.items()}
        named = replace(facts, looks={arm_label(name, arm): facts.look(name) for name, arm in arms.items()})
        ebc = [label for label, arm in shown.items() if arm["ebc"]]
        whom = f"{optimizer(track)}: the final arms over each other, those with EBC thick"
        yield from _overlaid(
            root, named, f"curves{tail}", whom, shown, ebc, arm_label(baseline, arms[baseline])
        )
        found = Gathered()
        of_baseline = read_runs(root, arms[baseline])
        natural_kl = decisions["lr_sweep"]["tracks"][track]["natural_kl"]
        for name, arm in arms.items():
            runs = of_baseline if name == baseline else read_runs(root, arm)
            reached = compared["efficiency"].get(name)
            there = "most seeds do not get there"
            if reached:
                there = f"{reached['seeds']} of {len(runs)} seeds get there, at step {reached['steps']:.0f}"
            rival = Rival("the baseline", of_baseline, f"; {there}", itself=name == baseline)
            yield from _pictures_of_arm(facts, name, "", arm, runs, rival, natural_kl, kl_of_plain=True)
            if measured := tightness_of(runs):
                found.tight[name] = measured
        if states := states_of(of_baseline):
            draw = partial(draw_states, track=track, label="the baseline", arm=arms[baseline], states=states)
            yield Picture(f"ebm{tail}", section, draw, facts)
        if found.tight:
            names = {name: arm_label(name, arms[name]) for name in found.tight}
            draw = partial(draw_tightness, track=track, arms=arms, measured=found.tight, names=names)
            yield Picture(f"tightness{tail}", section, draw, facts)


# -- a suite -------------------------------------------------------------------------------------------------


def suite_pictures(root: Path, facts: Facts, section: str, decisions: Decisions) -> Iterator[Picture]:
    """Return the pictures of every track's arms together, and of each. `section`: the stage that compares
    them."""
    tracks = decisions[section]["tracks"]
    for track, compared in tracks.items():
        tail = f"_{track}" * (len(tracks) > 1)
        arms = highlighted_arms(compared)
        yield from window_pictures(facts, track, compared, tail)
        yield from _together(root, facts, track, compared, arms, decisions, tail)
        found = Gathered()
        yield from _each_arm(root, facts, track, compared, arms, decisions, tail, found)
        for name, draw, drawn in _of_several(root, compared, found):
            shown = {label: compared["arms"][label] for label in drawn}
            yield Picture(f"{name}{tail}", section, partial(_draw, draw, track, shown, drawn), facts)
        if states := found.states:
            label = compared["reference"]
            draw = partial(draw_states, track=track, label=label, arm=arms[label], states=states)
            yield Picture(f"ebm{tail}", section, draw, facts)


def _draw(draw: Any, track: str, arms: Arms, drawn: Mapping[str, Any], facts: Facts) -> Any:
    return draw(facts, track, arms, drawn)


def highlighted_arms(compared: Mapping[str, Any]) -> Arms:
    """Return the arms that have pictures of their own: of a sweep's points the best, and the reference."""
    best, swept = {compared["reference"]}, set()
    for sweeps in compared.get("windows", {}).values():
        for sweep in sweeps.values():
            at = sweep["window"]["best"] if sweep["window"] else sweep["points"][0]["value"]
            best |= {p["arm"] for p in sweep["points"] if p["value"] == at}
            swept |= {p["arm"] for p in sweep["points"]}
    return {label: arm for label, arm in compared["arms"].items() if label in best or label not in swept}


def _together(
    root: Path,
    facts: Facts,
    track: str,
    compared: SuiteTrack,
    arms: Arms,
    decisions: Decisions,
    tail: str,
) -> Iterator[Picture]:
    """Return the pictures of the curves over the learning rate of arms that were tuned over one, and of the
    arms' losses over each other."""
    mine = mine_of(compared)
    tuned = tuned_arms(cast(Any, decisions.get("tune")), track)
    rates = {label: arm for label, arm in tuned.items() if label in arms and arm.get("curve")}
    if rates:
        draw = partial(draw_tuned, curves=rates, mine=mine)
        yield Picture(f"tuned_rates{tail}", "verdict", draw, facts)
    alike = {label: arm for label, arm in arms.items() if arm.get("comparable", True)}
    whom = f"{' and '.join(mine) or 'Every arm'} {'against the others' if mine else 'of the suite'}"
    whom += ", each at its own best" if "tune" in decisions else ""
    reference = compared["reference"]
    yield from _overlaid(root, facts, f"ablation_curves{tail}", whom, alike, mine, reference, least=2)


def _overlaid(
    root: Path,
    facts: Facts,
    name: str,
    whom: str,
    arms: Arms,
    mine: Sequence[str],
    reference: str,
    least: int = 1,
) -> Iterator[Picture]:
    """Return the picture of losses over each other, where that many arms recorded theirs."""
    courses = {label: course for label, arm in arms.items() if (course := losses_of(root, arm))}
    if len(courses) >= least:
        draw = partial(draw_overlaid, whom=whom, courses=courses, mine=mine, reference=reference)
        yield Picture(name, "verdict", draw, facts)


def _each_arm(
    root: Path,
    facts: Facts,
    track: str,
    compared: Mapping[str, Any],
    arms: Arms,
    decisions: Decisions,
    tail: str,
    found: Gathered,
) -> Iterator[Picture]:
    """Return each arm's own pictures; what the pictures of several arms need of it goes to `found`."""
    natural_kl = decisions["lr_sweep"]["tracks"][track]["natural_kl"]
    rivals = {v: read_runs(root, arms[v]) for v in {arm["versus"] for arm in arms.values()} if v in arms}
    for label, arm in arms.items():
        runs = rivals[label] if label in rivals else read_runs(root, arm)
        specs = read_results(root, arm, "spec")
        versus = arm["versus"] or label
        of_rival = runs if versus == label else rivals.get(versus, [])
        rival = Rival(versus, of_rival, _paired_in_words(arm), itself=versus == label)
        yield from _pictures_of_arm(_sized(facts, specs), label, tail, arm, runs, rival, natural_kl)
        if arm["ebc"] and any(run.steps for run in runs):
            found.courses[label] = course_of(runs)
            if measured := tightness_of(runs):
                found.tight[label] = measured
        if label == compared["reference"]:
            found.states = states_of(runs)
        if curve := curve_of(runs):
            found.curves[label] = curve
        if path := steps_of(runs, specs):
            found.paths[label] = path
        of_arm = ArmRuns(label, arm, runs, specs, partial(_tried, root, decisions.get("tune"), track, label))
        for name, part in PART_FIGURES.items():
            if (drawn := part.gather(of_arm)) is not None:
                found.parts.setdefault(name, {})[label] = drawn


def _pictures_of_arm(
    facts: Facts,
    name: str,
    tail: str,
    arm: Mapping[str, Any],
    runs: Sequence[Run],
    rival: Rival,
    natural_kl: float,
    kl_of_plain: bool = False,
) -> Iterator[Picture]:
    """Return the pictures of one arm's loss and, with EBC, of its clip coefficient, KL and groups."""
    if not any(run.recorded for run in runs):
        return
    kinds: dict[str, Any] = {"loss": partial(draw_loss, rival=rival)}
    if arm["ebc"]:
        kinds["clip"] = draw_clip
    if arm["ebc"] or kl_of_plain:
        kinds["kl"] = partial(draw_kl, natural_kl=natural_kl)
    if arm["ebc"]:
        kinds["groups"] = draw_groups
    for kind, draw in kinds.items():
        drawn = partial(draw, name=name, arm=arm, runs=runs)
        yield Picture(f"{name}{tail}_{kind}", "arms", drawn, facts, arm=name)


def _of_several(
    root: Path, compared: Mapping[str, Any], found: Gathered
) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Return (name, how it is drawn, what of each arm) of each picture of several arms."""
    measured = any(len(path.measured_at) for path in found.paths.values())
    several: dict[str, tuple[Any, Mapping[str, Any]]] = {
        "ablation_steps": (draw_steps, found.courses),
        "ablation_tightness": (draw_tightness, found.tight),
        "kl_curve": (draw_kl_curve, found.curves),
        "curvature": (draw_curvature, found.paths if measured else {}),
        "policy": (draw_factors, _factors(root, compared["arms"])),
        **{name: (PART_FIGURES[name].draw, drawn) for name, drawn in found.parts.items()},
    }
    for name, (draw, drawn) in several.items():
        if drawn:
            yield name, draw, drawn


def _tried(root: Path, tune: Any, track: str, label: str) -> list[tuple[str, dict[str, Any]]]:
    """Read the results of the runs that an arm was tuned by."""
    runs: Iterable[Any] = candidates_of(track, tune) if tune and track in tune["tracks"] else []
    return [(c["arm"], known(root, c["run_id"])) for c in runs if c["role"] == label]


def _factors(root: Path, arms: Arms) -> dict[str, Factors]:
    """Read the factors of every arm with a policy, also of those that have no pictures of their own."""
    steered = {label: arm for label, arm in arms.items() if "lr_factor" in arm["figures"]}
    measured = {label: factors_of(read_runs(root, arm)) for label, arm in steered.items()}
    return {label: factors for label, factors in measured.items() if factors}


def _sized(facts: Facts, specs: Mapping[str, Mapping[str, Any]]) -> Facts:
    """Return the study's facts with the tokens of a step of these runs."""
    run = next((spec["config"] for spec in specs.values() if "batch_size" in spec.get("config", {})), None)
    return replace(facts, tokens_per_step=run["batch_size"] * run["model"]["context"]) if run else facts


def _paired_in_words(arm: Mapping[str, Any]) -> str:
    """Return the paired difference in test loss, as the end of a sentence."""
    difference = arm["difference"] or {}
    if difference.get("mean") is None:
        return ""
    half = f" ± {difference['high'] - difference['mean']:.3f}" if difference["high"] is not None else ""
    return f"; test loss {signed(difference['mean'], 3)}{half}"

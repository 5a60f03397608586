"""The arms that a study compares, of its finals or of a suite: over each other, each alone, and what was
measured of several of them.

With several tracks, every picture has its track's name in its own. An arm whose runs recorded nothing, as in
a brief bundle, has no picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, cast

from ebc_lab.config.part import Part
from ebc_lab.config.parts import PARTS
from ebc_lab.records.decisions import SuiteTrack
from ebc_lab.study.stages.stage import candidates_of

from ..text.words import arm_label, mine_of, optimizer, tuned_arms
from .arms.clip import Course, course_of, draw_steps
from .arms.curvature import draw_curvature, steps_of
from .arms.ebm import draw_states, states_of
from .arms.low_bit import curve_of, draw_factors, draw_kl_curve, factors_of
from .arms.mechanism import Tightness, draw_groups, draw_tightness, tightness_of
from .arms.overlaid import draw_overlaid, losses_of
from .drawing.curves import ArmRuns, Run, known, read_runs, read_specs
from .drawing.sheet import Arms, Decisions, Facts, Picture, Sheet
from .windows import draw_tuned, window_pictures


class JointPicture(NamedTuple):
    """A picture of all arms of which it has something to show."""

    gather: Callable[[ArmRuns], Any]  # returns what it shows of an arm, None for nothing
    draw: Callable[..., Sheet | None]  # facts, track, arms, and what was gathered of each -> the picture


def _part_picture(part: type[Part]) -> JointPicture:
    """Return the picture that a part of a run has: the file of this folder with the part's name draws it."""
    module = import_module(f".{part.group_name}", __package__)
    return JointPicture(module.gather, module.draw)


JOINT_PICTURES = {
    "ablation_steps": JointPicture(
        lambda arm: course_of(arm.runs) if arm.decided["ebc"] else None, draw_steps
    ),
    "ablation_tightness": JointPicture(lambda arm: tightness_of(arm.runs), draw_tightness),
    "kl_curve": JointPicture(lambda arm: curve_of(arm.runs), draw_kl_curve),
    "curvature": JointPicture(lambda arm: steps_of(arm.runs, arm.specs), draw_curvature),
    "policy": JointPicture(lambda arm: factors_of(arm.runs), draw_factors),
    **{part.picture: _part_picture(part) for part in PARTS if part.picture},
    "ebm": JointPicture(lambda arm: states_of(arm.runs) if arm.is_reference else None, draw_states),
}


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
        plain = arm_label(baseline, arms[baseline])
        yield from _overlaid(root, named, f"curves{tail}", whom, shown, ebc, plain)
        courses: dict[str, Course] = {}
        tight: dict[str, Tightness] = {}
        for name, arm in arms.items():
            runs, label = read_runs(root, arm), arm_label(name, arm)
            if arm["ebc"]:
                yield _groups(facts, name, "", arm, runs)
                if course := course_of(runs):
                    courses[label] = course
            if measured := tightness_of(runs):
                tight[label] = measured
            if name == baseline and (states := states_of(runs)):
                draw = partial(_draw, draw_states, track, {"the baseline": arm}, {"the baseline": states})
                yield Picture(f"ebm{tail}", section, draw, facts)
        for kind, draw_kind, found in (("steps", draw_steps, courses), ("tightness", draw_tightness, tight)):
            if found:
                with_it = {label: shown[label] for label in found}
                draw = partial(_draw, draw_kind, track, with_it, found)
                yield Picture(f"{kind}{tail}", section, draw, named)


# -- a suite -------------------------------------------------------------------------------------------------


def suite_pictures(root: Path, facts: Facts, section: str, decisions: Decisions) -> Iterator[Picture]:
    """Return the pictures of every track's arms, together and each. `section`: the stage that has them."""
    tracks = decisions[section]["tracks"]
    for track, compared in tracks.items():
        tail = f"_{track}" * (len(tracks) > 1)
        arms = highlighted_arms(compared)
        yield from window_pictures(facts, track, compared, tail)
        yield from _together(root, facts, track, compared, arms, decisions, tail)
        gathered: dict[str, dict[str, Any]] = {name: {} for name in JOINT_PICTURES}
        for arm in _read_arms(root, track, compared, arms, decisions):
            for name, picture in JOINT_PICTURES.items():
                if (found := picture.gather(arm)) is not None:
                    gathered[name][arm.label] = found
            if arm.label in arms and arm.decided["ebc"]:
                yield _groups(_sized(facts, arm.specs), arm.label, tail, arm.decided, arm.runs)
        for name, found in gathered.items():
            if found:
                shown = {label: compared["arms"][label] for label in found}
                draw = partial(_draw, JOINT_PICTURES[name].draw, track, shown, found)
                yield Picture(f"{name}{tail}", section, draw, facts)


def _draw(draw: Any, track: str, arms: Arms, found: Mapping[str, Any], facts: Facts) -> Any:
    return draw(facts, track, arms, found)


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
    root: Path, facts: Facts, track: str, compared: SuiteTrack, arms: Arms, decisions: Decisions, tail: str
) -> Iterator[Picture]:
    """Return the pictures of tuned arms' losses over the learning rate, and of all arms' over each other."""
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


def _read_arms(
    root: Path, track: str, compared: Mapping[str, Any], arms: Arms, decisions: Decisions
) -> Iterator[ArmRuns]:
    """Yield the runs of `arms`, and of every arm with a policy, whichever rate it has."""
    for label, arm in compared["arms"].items():
        if label in arms or "lr_factor" in arm["figures"]:
            runs, specs = read_runs(root, arm), read_specs(root, arm)
            tried = partial(_tried, root, decisions.get("tune"), track, label)
            yield ArmRuns(label, arm, runs, specs, tried, label == compared["reference"])


def _groups(facts: Facts, name: str, tail: str, arm: Mapping[str, Any], runs: Sequence[Run]) -> Picture:
    """Return the picture of what an arm with EBC measured of its groups."""
    draw = partial(draw_groups, name=name, arm=arm, runs=runs)
    return Picture(f"{name}{tail}_groups", "arms", draw, facts, arm=name)


def _tried(root: Path, tune: Any, track: str, label: str) -> list[tuple[str, dict[str, Any]]]:
    """Read the results of the runs that an arm was tuned by."""
    runs: Iterable[Any] = candidates_of(track, tune) if tune and track in tune["tracks"] else []
    return [(c["arm"], known(root, c["run_id"])) for c in runs if c["role"] == label]


def _sized(facts: Facts, specs: Mapping[str, Mapping[str, Any]]) -> Facts:
    """Return the study's facts with the tokens of a step of these runs."""
    run = next((spec["config"] for spec in specs.values() if "batch_size" in spec.get("config", {})), None)
    return replace(facts, tokens_per_step=run["batch_size"] * run["model"]["context"]) if run else facts

"""ladder: is it still better where more is trained?

The arms of a suite are compared once more at other widths, batches and lengths, each tuned there around what
is carried from the suite's own size, on the same seeds. Claimed speed-ups over AdamW were found to come from
rivals that were tuned too little, and to shrink with size (Wen et al., arXiv:2509.02046). `climb` plans the
runs, `compared` has the statistics.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ebc_lab.config.parts.target import TargetConfig
from ebc_lab.config.schema import BASE, Config
from ebc_lab.records.decisions import Climb, Decision, Difference, LadderTrack, Rung, RungArm
from ebc_lab.records.figures import RunResult
from ebc_lab.records.spec import RunSpec, track_prefix

from ..compare_arms import completed_values, mean, results_of_arm, spread, target_figures
from ..rules import Decisions, Results, Specs, Undecidable, divided_in_words, error_divided, make_decision
from ..runs import distinct, waiting
from ..stage import Scenario, Stage
from ..statistics import NO_LUCK, Luck, centre_of, level_of, luck_between, paired, show_interval
from ..suite import ready, shape_of, short_name
from ..tune import luck_of
from ..verdict import measured, verdict_of
from . import compared
from .climb import NAME, Rungs, rung_size

Compared = tuple[str, str, bool]


def _arm(rungs: Rungs, label: str, name: str) -> RungArm:
    """Return what was found of an arm on a rung."""
    search, carried, point = rungs.search(label, name), rungs.carried(label, name), rungs.point(label, name)
    tuned = rungs.tuned.get(label)
    luck = Luck(**tuned["luck"]) if tuned and search is None else NO_LUCK
    if search is not None:
        luck = luck_of(search, rungs.sigma)
    results = rungs.results
    runs = {str(s.run.seed): s.run_id for s in rungs.judged(label, name)}
    kept = {str(s.run.seed): s.run_id for s in rungs.kept(label, name)}
    found: Any = {"runs": runs}
    tests = completed_values(found, results, "test_loss")
    seconds = completed_values(found, results, "train_s")
    outcomes = Counter(str(r["outcome"]) for r in results_of_arm(found, results).values() if "outcome" in r)
    arm: RungArm = {
        "point": carried if point is None else point,
        "carried": carried,
        "trials": len(search.tried) if search else 0,
        "edges": {k: e for k in carried if (e := search.edge_of_all(point, k))} if search and point else {},
        "luck": {"sd": luck.sd, "freedom": luck.freedom},
        "runs": runs,
        "outcomes": dict(sorted(outcomes.items())),
        "val_loss": mean(completed_values(found, results, "val_loss")),
        "test_loss": mean(tests),
        "test_sd": spread(tests),
        "train_s": statistics.median(seconds) if seconds else None,
        "carried_runs": kept,
        "regret": None,
    }
    if point is None:
        arm["untuned"] = "no point that was tried there completed"
    elif kept != runs:
        both = (compared.losses_by_seed(arm, results, carried=True), compared.losses_by_seed(arm, results))
        arm["regret"] = paired(*both, looks=error_divided(rungs.config))
    return arm


def _rung(rungs: Rungs, name: str) -> Rung:
    config, size = rungs.config, rungs.sizes[name]
    labels = [label for label in rungs.arms if not rungs.untuned(label)]
    run = rungs.specs(labels[0], name, rungs.carried(labels[0], name), config.seeds[:1], judged=True)[0].run
    about = size.about or shape_of(size) or "the suite's own size"
    rung: Rung = {"about": about, "shape": shape_of(size), **rung_size(run), "arms": {}}  # type: ignore[typeddict-item]
    rung["arms"] = {label: _arm(rungs, label, name) for label in labels}
    target, arms = TargetConfig.from_run(config), rung["arms"]
    reference: Any = arms.get(config.ablation.reference)
    for arm in arms.values():
        shown: Any = arm
        versus = reference if arm is not reference else None
        each, divided = run.tokens_per_step, error_divided(config)
        if figures := target_figures(target, shown, versus, rungs.results, each, divided):
            arm["target"] = figures
    return rung


def _climb(rungs: Rungs, found: Mapping[str, Rung], of: Compared) -> Climb:
    """Return the comparison of two arms over all rungs."""
    label, other, asked = of
    pairs, divided = len(rungs.compared), error_divided(rungs.config)
    both = {name: (rung["arms"].get(label), rung["arms"].get(other)) for name, rung in found.items()}
    there = {name: (arm, reference) for name, (arm, reference) in both.items() if arm and reference}
    climb: Climb = {
        "arm": label,
        "reference": other,
        "asked": asked,
        "rungs": {},
        "carried": {},
        "speed": {},
        "lengths": None,
        "overall": None,
        "overall_carried": None,
        "trend": None,
        "lacking": "",
        "verdict": "untuned",
        "course": "undecided",
        "sentence": "",
    }
    if not there:
        unable = next((x for x in (label, other) if rungs.untuned(x)), label)
        climb["sentence"] = climb["lacking"] = f"{unable} could not be tuned: {rungs.untuned(unable)}"
        return climb
    joint: dict[str, Any] = {"comparisons": pairs * len(found), "looks": divided}
    joint["margin"] = rungs.config.finals.margin
    for name, pair in there.items():
        for kind, carried in (("rungs", False), ("carried", True)):
            losses = (compared.losses_by_seed(arm, rungs.results, carried) for arm in pair)
            luck = luck_between(there[BASE] if carried else pair)
            difference = paired(*losses, luck=luck, **joint)
            difference["verdict"] = verdict_of(difference)
            climb[kind][name] = difference  # type: ignore[literal-required]
        climb["speed"][name] = compared.speed_up(*pair, rungs.results, joint["comparisons"], divided)
    _add_contrasts(climb, found, there, rungs.results, {**joint, "comparisons": pairs})
    climb["sentence"] = _sentence(climb, found)
    return climb


def _add_contrasts(
    climb: Climb,
    found: Mapping[str, Rung],
    there: Mapping[str, tuple[RungArm, RungArm]],
    results: Results,
    joint: Mapping[str, Any],
) -> None:
    """Write into a comparison what takes all rungs together: the contrast, the trend and their verdicts."""
    arms = [{name: pair[i] for name, pair in there.items()} for i in (0, 1)]
    tuned, kept = (
        [{name: compared.losses_by_seed(arm, results, carried) for name, arm in of.items()} for of in arms]
        for carried in (False, True)
    )
    lost = [name for name in found if not all(losses.get(name) for losses in tuned)]
    if lost:
        climb["lacking"], climb["verdict"] = f"nothing to compare on {', '.join(lost)}", "undecided"
        return
    weights, slopes = compared.equal_weights([*found]), compared.slope_weights(found)
    overall = compared.contrast(weights, *tuned, luck=compared.luck_over(weights, *arms), **joint)
    if overall:
        climb["verdict"] = overall["verdict"] = verdict_of(overall)
    at_base = luck_between(there[BASE])
    climb["overall"] = overall
    climb["overall_carried"] = compared.contrast(weights, *kept, luck=at_base, **joint)
    if slopes:
        climb["trend"] = compared.contrast(slopes, *tuned, luck=compared.luck_over(slopes, *arms), **joint)
        climb["course"] = _course(climb["trend"])
    if pair := compared.pair_of_lengths(found):
        divided = joint["looks"] * joint["comparisons"]
        climb["lengths"] = compared.lengths(pair, found, tuned[0][pair[0]], tuned[1], divided)


def _course(trend: Difference | None) -> str:
    """Return whether an arm gains on the other with more compute, or loses; `holds` if neither is more than
    the margin for each doubling."""
    if trend is None:
        return "undecided"
    return {"better": "gains", "worse": "loses", "level": "holds"}.get(verdict_of(trend), "undecided")


COURSES = {
    "gains": "it gains on {other} with more compute",
    "loses": "it loses to {other} with more compute",
    "holds": "that hardly changes with more compute",
    "undecided": "whether that changes with more compute is undecided",
}


def _sentence(climb: Climb, rungs: Mapping[str, Rung]) -> str:
    """Return a comparison as a sentence."""
    label, other = climb["arm"], climb["reference"]
    if climb["overall"] is None:
        return f"{label} against {other}: {climb['lacking']}"
    words = f"{label} against {other}, mean of {len(rungs)} rungs: {measured(climb['overall'])}"
    words += f": {climb['verdict']}"
    if trend := climb["trend"]:
        course = COURSES[climb["course"]].format(other=other)
        interval = show_interval(trend["joint_low"], trend["joint_high"])
        words += f"; {course}: {centre_of(trend):+.4f} nats per doubling {interval}".replace("-", "−")
    counts = Counter(d["verdict"] for d in climb["rungs"].values())
    each = ", ".join(f"{verdict} on {n}" for verdict, n in counts.most_common())
    return f"{words}; one by one: {each}"


def asked(track: LadderTrack) -> list[Climb]:
    """Return the comparisons that the answer is about."""
    return [climb for climb in track["climbs"] if climb["asked"]]


def adds_a_line(track: LadderTrack) -> bool:
    """Return whether a ladder only adds a line to the suite's answer: one rung beside the suite's size."""
    return len(track["rungs"]) == 2


def in_a_line(climb: Climb, rungs: Mapping[str, Rung], rules: Mapping[str, Any]) -> str:
    """Return what one rung beside the suite's own size adds to the suite's answer."""
    label, other = climb["arm"], climb["reference"]
    [(name, rung)] = [item for item in rungs.items() if item[0] != BASE]
    if name not in climb["rungs"]:
        return f"At {rung['about']}, {label} against {other}: {climb['lacking']}"
    found = _briefly(climb["rungs"][name])
    if any(arm["trials"] for arm in rung["arms"].values()):
        word = "carried" if rules else "kept"
        found = f"settings {word}: {_briefly(climb['carried'][name])}; tuned again: {found}"
    return f"At {rung['about']}, {label} minus {other}, nats of test loss, {found}"


def _briefly(d: Difference) -> str:
    if d["method"] != "t":
        return f"{measured(d)}, {d['verdict']}"
    words = f"{centre_of(d):+.4f} {show_interval(d['joint_low'], d['joint_high'])}, {d['verdict']}"
    return words.replace("-", "−")


def _rule(config: Config, comparisons: int) -> str:
    ladder = config.ladder
    tuned = (
        f"each arm's lowest validation loss among {ladder.trials} points around what is carried there, the "
        f"worst of {config.tune.seeds} seeds"
        if ladder.trials
        else "what is carried there"
    )
    rules = {key: [f"{what}^{by:g}" for what, by in powers.items()] for key, powers in ladder.rules.items()}
    carried = "as it is"
    if ladder.carry == "rules":
        carried = "; ".join(f"{key} by {', '.join(by)}" for key, by in rules.items())
    return (
        f"on each rung {tuned} (carried: {carried}), judged by test loss, {len(config.seeds)} "
        f"seeds, paired; a contrast named beforehand, the mean over {len(ladder.rungs) + 1} rungs, and the "
        f"slope per doubling of compute, {level_of(error_divided(config))} intervals joint over "
        f"{comparisons} comparisons; on single rungs joint over the rungs as well{divided_in_words(config)}"
    )


def _notes(track: LadderTrack) -> list[str]:
    """Return notes on arms without a point on a rung, on points at an edge, and on diverged runs."""
    notes = []
    for name, rung in track["rungs"].items():
        for label, arm in rung["arms"].items():
            if "untuned" in arm:
                notes.append(f"{label} on {name}: {arm['untuned']}")
            for key, edge in arm["edges"].items():
                value = f"{short_name(key)} {arm['point'][key]:g}"
                notes.append(f"{label} on {name}: {value} is the {edge}est that was tried")
            if lost := arm["outcomes"].get("diverged"):
                notes.append(f"{label} on {name}: {lost} of {len(arm['runs'])} seeds diverged")
    return notes


class Ladder(Stage):
    """The stage that compares the arms of a suite at other sizes, batches and lengths."""

    name = NAME
    title = "Still better where more is trained?"
    about = "Each arm, tuned again at other widths, batches and lengths, on the same seeds."
    concludes = True
    leads_with_optimizer = False
    shows = "ladder"
    pictures = ("ladder",)

    def runs(self, config: Config, earlier: Decisions, results: Results) -> list[RunSpec]:
        """Return each arm's runs on every rung: those that tune it there, those that are judged, and those at
        the carried settings. A search goes on as its runs end."""
        if "tune" not in earlier:
            return []
        tracks = ready(config, earlier, self.name)
        return distinct([s for track in tracks for s in Rungs(config, earlier, track, results).all_specs()])

    def decide(self, config: Config, specs: Specs, results: Results, earlier: Decisions) -> Decision:
        tracks: dict[str, LadderTrack] = {}
        notes: list[str] = []
        every, comparisons = ready(config, earlier, self.name), 0
        for name in every:
            rungs = Rungs(config, earlier, name, results)
            if not rungs.arms or all(map(rungs.untuned, rungs.arms)):
                raise Undecidable("ladder could not be judged: no two arms can be compared.")
            found = {rung: _rung(rungs, rung) for rung in rungs.sizes}
            comparisons = len(rungs.compared)
            tracks[name] = {
                "reference": config.ablation.reference,
                "rungs": found,
                "climbs": [_climb(rungs, found, of) for of in rungs.compared],
                "rules": rungs.rules,
                "tuned": bool(config.ladder.trials),
            }
            notes += [track_prefix(name, every) + note for note in _notes(tracks[name])]
        rule = _rule(config, comparisons)
        return make_decision(NAME, rule, config, specs, results, earlier, tracks=tracks, notes=notes)

    def leads(self, decision: Decision) -> bool:
        return not all(map(adds_a_line, decision["tracks"].values()))

    def headline(self, track: LadderTrack) -> str:
        if adds_a_line(track):
            return "; ".join(in_a_line(climb, track["rungs"], track["rules"]) for climb in asked(track))
        return "; ".join(climb["sentence"] for climb in asked(track))

    def so_far(self, config: Config, specs: Specs, results: Results, earlier: Decisions) -> list[str]:
        """Return on how many rungs every arm has all of its judged runs."""
        clauses = []
        every = ready(config, earlier, self.name)
        for track in every:
            rungs = Rungs(config, earlier, track, results)
            able = [label for label in rungs.arms if not rungs.untuned(label)]
            done = sum(
                all((judged := rungs.judged(a, name)) and not waiting(judged, results) for a in able)
                for name in rungs.sizes
            )
            clauses.append(f"{track_prefix(track, every)}{done} of {len(rungs.sizes)} rungs are climbed")
        return clauses

    def invent(self, config: Config, scenario: Scenario, spec: RunSpec, nth: int) -> RunResult:
        """Return losses at which what was carried is best or, if `scenario.edge`, the highest rate."""
        loss = 2.0 + (1 / (1 + spec.run.optimizer.lr) if scenario.edge else 0.01 * (nth % 7))
        return {"val_loss": loss, "test_loss": loss, "curve": [(spec.run.steps, loss, 1.0)]}


STAGE = Ladder()

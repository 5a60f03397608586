"""A suite of arms: are the arms that it asks about better, which arms are told apart from their reference, how
far may a setting be off, what does it cost to keep the settings of another size?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ebc_lab.records.columns import ABLATION_MEANINGS, DIFFERENCE_FIGURES, TUNED
from ebc_lab.records.decisions import Difference, StepCost, SuiteTrack, TunedArm, Window
from ebc_lab.study.stages.compare_arms import seeds_of
from ebc_lab.study.stages.statistics import WINDOW_NATS, by_interval, centre_of, in_octaves
from ebc_lab.study.stages.suite import SAME_NATS, contenders
from ebc_lab.study.stages.verdict import unfinished, verdict_of

from ..text import glance, tables, words
from ..text.table import PAGE, PAPER, TERMINAL, Table
from ..text.words import NOTHING, plural, signed
from .kind import MOST_TILES, Answer, Evidence, Kind, Tile, difference_tile

ABOUT_AN_ARM = ("about", "lr", "lr_scale", "delta_star", "lr_schedule", "warmup_steps", "delta_schedule")
MOST_LISTED = 5  # names in a finding
MOST_NAMED = 2  # names in a headline
VERDICTS = {  # of an arm that a suite asks about -> colour of the answer, in words
    "better": ("beats", "is better than"),
    "level": ("meets", "is level with"),
    "worse": ("misses", "is worse than"),
    "undecided": ("undecided", "is not told apart from"),
    "untuned": ("undecided", "could not be tuned"),
}

Said = tuple[str, str, Sequence[str]]  # colour of an answer, its sentence, its findings


class Suite(Kind):
    shows = "arms"
    section = "Arms of the suite"
    file = "ablation.csv"
    columns = ABLATION_MEANINGS

    def answers(self, found: Evidence) -> list[Answer]:
        return [self._answer(found, name, track) for name, track in found.tracks.items()]

    def _answer(self, found: Evidence, name: str, track: SuiteTrack) -> Answer:
        judged, sentence, findings = answer_of(track)
        mine, ranked = words.mine_of(track), tables.ranked(track)
        return Answer(
            name,
            judged,
            sentence,
            findings,
            _tiles(track, tuned_of(found, name))[:MOST_TILES],
            [t for t in _compared(found, name, track) if PAGE in t.places],
            judging=_judging(track),
            arms=frozenset({track["reference"], *mine, *ranked[:1]}),
        )

    def tables(self, found: Evidence) -> list[Table]:
        made: list[Table] = []
        for name, track in found.tracks.items():
            suffix, ranked = found.suffix(name), tables.ranked(track)
            at_first = _compared(found, name, track)
            made += [replace(t, places=[p for p in t.places if p != PAGE]) for t in at_first]  # page: above
            made += _tried(found, name, track)
            pairs = tables.suite_pairs(track, ranked)
            title = f"Difference in test loss from its reference{suffix}"
            if pairs and words.asked(track):
                table = tables.differences(f"differences-{name}", title, pairs, track, "", found.results)
                made.append(replace(table, places=(PAGE,)))
            arms = tables.of_arms(f"suite{{}}-{name}", track, found.results, ranked, suffix)
            made += [replace(arms[0], title=f"Arms, lowest median test loss first{suffix}"), *arms[1:]]
            spans = tables.spans(track, f"{{}}-{name}".format)
            on_page = spans if words.asked(track) else []
            made += [replace(t, places=(TERMINAL, PAGE) if on_page else (TERMINAL,)) for t in spans]
        return made

    def arms(self, found: Evidence) -> Mapping[str, Mapping[str, str]]:
        tracks = found.tracks.items()
        return {name: {label: label for label in tables.ranked(track)} for name, track in tracks}

    def rows(self, found: Evidence) -> Iterator[dict[str, Any]]:
        """Yield a row for each arm: its figures (means over completed seeds) and its paired difference."""
        for track, suite in found.tracks.items():
            for label, arm in suite["arms"].items():
                d = arm["difference"] or {}
                tuned = {f"{TUNED}{key}": value for key, value in (arm["point"] or {}).items()}
                yield {
                    "track": track,
                    "arm": label,
                    **{k: arm[k] for k in ABOUT_AN_ARM if k in arm},
                    **tuned,
                    "strength": arm["strength"],
                    "seeds": len(arm["runs"]),
                    "completed": arm["outcomes"].get("completed", 0),
                    "diverged": arm["outcomes"].get("diverged", 0),
                    **arm["figures"],
                    "versus": arm["versus"],
                    "pairs": d.get("seeds"),
                    "difference": d.get("mean"),
                    **{k: d.get(k) for k in DIFFERENCE_FIGURES},
                }

    def seeds(self, found: Evidence) -> Sequence[int]:
        return seeds_of(found.decision)

    def papers(self, found: Evidence) -> Mapping[str, Sequence[Table]]:
        made: list[Table] = []
        for name, track in found.tracks.items():
            spans = tables.spans(track, f"{name}-{{}}".format)
            intervals = glance.intervals_in_words(_judging(track))
            caption = f"{words.optimizer(name)}: test loss, nats per token; paired differences, {intervals}."
            compared = [table for table in _compared(found, name, track) if PAPER in table.places]
            made += [replace(table, caption=caption, note="") for table in compared]
            made += tables.further_arms(f"{name}{{}}", track, found.results)
            made += [
                replace(table, caption=f"{words.optimizer(name)}: {table.title.lower()}.") for table in spans
            ]
        return {"ablation": made}


KIND = Suite()


def tuned_of(found: Evidence, track: str) -> Mapping[str, TunedArm]:
    """Return what `tune` chose for each arm; empty where nothing was tuned."""
    return words.tuned_arms(found.decisions.get("tune"), track)


# -- the answer ----------------------------------------------------------------------------------------------


def answer_of(track: SuiteTrack) -> Said:
    """Answer a suite: of arms that it asks about whether they are better; else what its sweeps show, or which
    arms the joint interval tells apart from their reference.

    Never which arm is best: the lowest of several losses is that of the luckiest, too.
    """
    lost = [f"{line}." for line in unfinished(track)]
    if words.mine_of(track) or track.get("answers"):
        return _answer_of_mine(track, lost)
    if not any(arm["test_median"] is not None for arm in contenders(track).values()):
        return "undecided", "No answer: no arm completed a run that can be compared.", lost
    windows = track.get("windows", {})
    spans = {arm: swept["lr_scale"]["window"] for arm, swept in windows.items() if "lr_scale" in swept}
    if spans:
        return _answer_of_windows(spans)
    if rules := words.rules_among(
        {arm: swept["delta"] for arm, swept in windows.items() if "delta" in swept}
    ):
        return _answer_of_starts(rules)
    if track.get("transfer"):
        return _answer_of_transfer(track)
    return _told_apart(track, lost)


def _answer_of_mine(track: SuiteTrack, lost: Sequence[str]) -> Said:
    """Say whether the arms that a suite asks about are better, each against the best of the others."""
    answers = track["answers"]  # also of those that were never trained
    if not answers:
        return "undecided", "No answer: no run of these arms completed.", lost
    verdicts = {answer["verdict"] for answer in answers.values()}
    judged = VERDICTS[verdicts.pop()][0] if len(verdicts) == 1 else "undecided"
    findings = [*lost, *(f"{answer['sentence'].rstrip('.')}." for answer in answers.values())]
    if len(answers) > MOST_NAMED:
        counts = Counter(answer["verdict"] for answer in answers.values())
        told = {"better": "better than", "level": "level with", "worse": "worse than"}
        clauses = [f"{counts[v]} {said} its best rival" for v, said in told.items() if counts[v]]
        rest = counts["undecided"] + counts["untuned"]
        clauses += [f"{rest} not told apart from it"] if rest else []
        return judged, f"Of {len(answers)} arms, {', '.join(clauses)}.", findings
    clauses = [f"{n} {VERDICTS[a['verdict']][1]} {a['rival'] or ''}".rstrip() for n, a in answers.items()]
    needed = [
        a["seeds_needed"] for a in answers.values() if a["verdict"] == "undecided" and a["seeds_needed"]
    ]
    clauses += [f"about {plural(max(needed), 'seed')} would decide it"] if needed else []
    return judged, f"{'; '.join(clauses)}.", findings


def _told_apart(track: SuiteTrack, lost: Sequence[str]) -> Said:
    """Say which arms are told apart from their references, and how."""
    groups: dict[str, list[str]] = {"better": [], "worse": [], "level": [], "undecided": []}
    references = set()
    for label, arm in track["arms"].items():
        difference = arm.get("difference")
        if difference and difference["seeds"]:
            n = difference.get("seeds_needed")
            groups[verdict_of(difference)].append(f"{label} ({n})" if n else label)
            references.add(arm["versus"])
    many = sum(map(len, groups.values()))
    if not many:
        return "undecided", "No answer: no arm is paired with another one.", lost
    whom = references.pop() if len(references) == 1 else "their references"
    word = f"None of {plural(many, 'arm')} is told apart from {whom}"
    if apart := {kind: groups[kind] for kind in ("better", "worse") if groups[kind]}:
        clauses = [f"{_who(labels, many)} {kind}" for kind, labels in apart.items()]
        clauses[0] += f" than {whom}"
        rest = many - sum(map(len, apart.values()))
        are = "is" if rest == 1 else "are"
        word = ", ".join(clauses) + (
            f"; {rest} of {plural(many, 'arm')} {are} not told apart" if rest else ""
        )
    counted = any(label.endswith(")") for label in groups["undecided"])
    kinds = {"better": "Better", "worse": "Worse", "level": "Level", "undecided": "Not told apart"}
    kinds["undecided"] += " (about so many seeds would)" if counted else ""
    findings = [f"{kinds[kind]}: {_first_few(labels)}." for kind, labels in groups.items() if labels]
    findings += [f"By intervals that are joint over all {many} comparisons."] if many > 1 else []
    judged = "meets" if groups["better"] and not groups["worse"] else "undecided"
    return judged, f"{word}.", [*lost, *findings]


def _who(labels: Sequence[str], many: int) -> str:
    """Return a few arms by name, more by their number, as the subject of a clause."""
    who = " and ".join(labels) if len(labels) <= MOST_NAMED else f"{len(labels)} of {plural(many, 'arm')}"
    return f"{who} {'is' if len(labels) == 1 else 'are'}"


def _first_few(labels: Sequence[str]) -> str:
    if len(labels) <= MOST_LISTED + 1:
        return ", ".join(labels)
    return f"{', '.join(labels[:MOST_LISTED])} and {len(labels) - MOST_LISTED} more"


def _answer_of_windows(spans: Mapping[str, Window | None]) -> Said:
    """Name the widest windows of the learning rate, and all of them in order."""
    order = sorted(spans, key=lambda name: -(span["octaves"] if (span := spans[name]) else -1.0))
    findings = [f"{name}: {in_octaves(spans[name])} of the learning rate." for name in order]
    widest = [f"{name} over {in_octaves(spans[name])}" for name in order[:MOST_NAMED] if spans[name]]
    if not widest:
        return "undecided", "No arm completed a run at any learning rate.", findings
    near = f"within {WINDOW_NATS:g} nats of an arm’s own best"
    widest[0] += " of the learning rate"
    return "undecided", f"The loss stays {near}: {', '.join(widest)}.", findings


def _answer_of_starts(rules: Mapping[str, Any]) -> Said:
    """Name, of rules for δ against the fixed one, those that forget where they started."""
    good = [name for name, rule in rules.items() if rule["every_start"]]
    losses = {name: rule["worst"] for name, rule in rules.items()}
    findings = [
        f"{name}: {'a start diverged' if worst is None else f'{signed(worst, 3)} nats from its worst start'}."
        for name, worst in losses.items()
    ]
    findings.append(f"Minus the best fixed δ* of its length; at most {SAME_NATS:g} needs no tuning.")
    who = _first_few(good) if good else f"None of {plural(len(rules), 'rule')}"
    if len(good) == len(rules) > 1:
        who = f"All {len(rules)} rules"
    ends = "end" if len(good) > 1 else "ends"
    sentence = f"{who} {ends} within {SAME_NATS:g} nats of a tuned δ* from every start."
    return "undecided" if good else "misses", sentence, findings


def _answer_of_transfer(track: SuiteTrack) -> Said:
    """List the regrets of settings that were carried to other sizes, and name the largest of each kind."""
    regrets = words.regrets_of(track)
    findings = [
        f"{name}: {NOTHING if x is None else f'{signed(x, 3)} nats'} against a rate tuned again."
        for name, x in regrets.items()
    ]
    worst = words.largest_regrets(regrets, track["arms"])
    kinds = {True: " with EBC", False: " without EBC"}
    largest = [
        f"{signed(worst[ebc][1], 3)} nats{kind * (len(worst) > 1)}"
        for ebc, kind in kinds.items()
        if ebc in worst
    ]
    most = " and ".join(largest) or "an unknown amount"
    return "undecided", f"Settings kept from another size cost at most {most}.", findings


# -- figures -------------------------------------------------------------------------------------------------


def _tiles(track: SuiteTrack, tuned: Mapping[str, TunedArm]) -> list[Tile]:
    if words.mine_of(track) or track.get("answers"):
        return _tiles_of_mine(track, tuned)
    windows = track.get("windows", {})
    spans = {arm: swept["lr_scale"]["window"] for arm, swept in windows.items() if "lr_scale" in swept}
    if spans:
        known = {arm: span for arm, span in spans.items() if span}
        return [_window(arm, known[arm]) for arm in sorted(known, key=lambda arm: -known[arm]["octaves"])]
    if rules := words.rules_among(
        {arm: swept["delta"] for arm, swept in windows.items() if "delta" in swept}
    ):
        return _tiles_of_starts({name: rule["worst"] for name, rule in rules.items()})
    if track.get("transfer"):
        largest = words.largest_regrets(words.regrets_of(track), track["arms"])
        names = [largest[ebc][0] for ebc in (True, False) if ebc in largest]
        pairs = {name: track["arms"][name]["difference"] for name in names}
        return [difference_tile(f"Largest regret: {name}", d) for name, d in pairs.items() if d]
    return _tiles_of_arms(track)


def _window(arm: str, span: Window, remark: str = "") -> Tile:
    octaves = in_octaves(span).removesuffix(" octaves")
    return Tile(f"Learning-rate window of {arm}", octaves, "octaves", remark or f"best at ×{span['best']:g}")


def _tiles_of_mine(track: SuiteTrack, tuned: Mapping[str, TunedArm]) -> list[Tile]:
    asked = words.asked(track)
    tiles = []
    for label in asked:
        answer = track["answers"][label]
        if answer["rival"] and answer["difference"]:
            tiles.append(difference_tile(f"{label} minus {answer['rival']}, test loss", answer["difference"]))
    if len(asked) != 1:
        return tiles
    [label] = asked
    rival = track["answers"][label]["rival"]
    spans = {arm: found.get("window") for arm, found in tuned.items()}
    if span := spans.get(label):
        beside = f"{rival}: {in_octaves(spans[rival])}" if rival and spans.get(rival) else " "
        tiles.append(_window(label, span, beside))
    costs = track.get("steps_cost") or {}
    return [*tiles, *([_cost(label, costs, track["reference"], rival)] if label in costs else [])]


def _cost(label: str, costs: Mapping[str, StepCost], reference: str, rival: str | None) -> Tile:
    cost = costs[label]
    remark = f"of {reference}’s, quartiles {cost['low']:.2f} to {cost['high']:.2f}"
    if rival and rival in costs and rival != reference:
        remark += f"; {rival}: ×{costs[rival]['ratio']:.2f}"
    return Tile(f"Time of a step of {label}", f"×{cost['ratio']:.2f}", "", remark)


def _tiles_of_starts(worst: Mapping[str, float | None]) -> list[Tile]:
    """Return what each rule for δ loses from its worst start, the least first."""
    order = sorted(worst, key=lambda name: math.inf if worst[name] is None else worst[name])  # type: ignore[arg-type, return-value]
    return [
        Tile(f"{name} from its worst start", NOTHING, "", "a start diverged")
        if worst[name] is None
        else Tile(f"{name} from its worst start", signed(worst[name], 3), "nats", "minus the best fixed δ*")
        for name in order
    ]


def _tiles_of_arms(track: SuiteTrack) -> list[Tile]:
    """Return how many arms are told apart from their reference, and the two ends of the differences."""
    differences = {name: arm.get("difference") for name, arm in track["arms"].items()}
    pairs = {name: d for name, d in differences.items() if d and d["seeds"]}
    if not pairs:
        return []
    found = Counter(verdict_of(d) for d in pairs.values())
    counted = [f"{found[kind]} {kind}" for kind in ("better", "worse", "level", "undecided") if found[kind]]
    apart = str(found["better"] + found["worse"])
    tiles = [Tile("Arms told apart from their reference", apart, f"of {len(pairs)}", ", ".join(counted))]
    centres = {name: centre for name, d in pairs.items() if (centre := centre_of(d)) is not None}
    rising = sorted(centres, key=lambda name: centres[name])
    for end, name in zip(
        ("Lowest test loss", "Highest"), dict.fromkeys([*rising[:1], *rising[-1:]]), strict=False
    ):
        what = f"{end}: {name} minus {track['arms'][name]['versus']}"
        tiles.append(difference_tile(what, pairs[name]))
    costs = track.get("steps_cost") or {}
    if rising and rising[0] in costs:
        tiles.insert(2, _cost(rising[0], costs, track["reference"], None))
    return tiles


# -- tables --------------------------------------------------------------------------------------------------


def _compared(found: Evidence, name: str, track: SuiteTrack) -> list[Table]:
    """Return what stands right below the answer: each arm that is asked about beside the others; or what a
    sweep shows; or every arm beside its reference. Terminal and papers show the same, with more or less."""
    suffix = found.suffix(name)
    if asked := words.asked(track):
        tuned = tuned_of(found, name)
        made = [
            glance.is_better(f"better-{name}-{i}", label, track, tuned) for i, label in enumerate(asked, 1)
        ]
        return [replace(table, title=f"{table.title}{suffix}") for table in made]
    ranked = tables.ranked(track)
    pairs = tables.suite_pairs(track, ranked)
    title = f"The arms beside their reference{suffix}"
    table = tables.differences(f"glance-{name}", title, pairs, track, track["reference"], found.results)
    spans = tables.spans(track, f"{{}}-{name}".format)
    if not spans:
        return [table]
    return [replace(table, places=(TERMINAL, PAPER)), *(replace(t, places=(PAGE,)) for t in spans)]


def _tried(found: Evidence, name: str, track: SuiteTrack) -> list[Table]:
    """Return what was tried of the arms of a suite that asks about some of them."""
    mine, tune = words.mine_of(track), found.decisions.get("tune")
    if not tune or not mine:
        return []
    order = [*mine, *(label for label in track["arms"] if label not in mine)]
    grids = {label: arm.tune for label, arm in found.config.ablation.arms.items()}
    made = glance.tried(f"tried-{name}", tune, name, order, grids)
    return [replace(made, title=f"{made.title}{found.suffix(name)}", places=(PAGE,))] if made else []


def _judging(track: SuiteTrack) -> list[Difference]:
    """Return the differences that the answer rests on: of the arms that a suite asks about, else all."""
    mine = [d for label in words.asked(track) for d in track["answers"][label]["against"].values()]
    every = mine or list(tables.suite_pairs(track, track["arms"]).values())
    return [by_interval(d, joint=True) for d in every]

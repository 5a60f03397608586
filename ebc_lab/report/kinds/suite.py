"""A suite of arms: are some of them better, how far may a setting be off, what does another size cost?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ebc_lab.config.schema import Config
from ebc_lab.records.columns import ABLATION_MEANINGS, DIFFERENCE_FIGURES, TUNED
from ebc_lab.records.decisions import Answer as Verdict
from ebc_lab.records.decisions import Difference, StepCost, SuiteTrack, TunedArm, Window
from ebc_lab.study.stages.compare_arms import seeds_of
from ebc_lab.study.stages.statistics import WINDOW_NATS, by_interval, centre_of, in_octaves
from ebc_lab.study.stages.suite import SAME_NATS, contenders, other_size
from ebc_lab.study.stages.verdict import unfinished, verdict_of

from ..text import glance, tables, words
from ..text.arms import lr_window
from ..text.table import EVERYWHERE, PAGE, PAPER, TERMINAL, Table
from ..text.words import NOTHING, plural, signed
from .kind import MOST_TILES, Answer, Evidence, Kind, Tile, difference_tile, is_open, window_tile

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

HERE = " on this model, batch and length"  # what an answer holds for: `_on_what` has the sizes

Said = tuple[str, str, Sequence[str], Sequence[Tile]]  # colour of an answer, its sentence, findings, figures


class Suite(Kind):
    shows = "arms"
    section = "Arms of the suite"
    file = "ablation.csv"
    columns = ABLATION_MEANINGS

    def answers(self, found: Evidence) -> list[Answer]:
        return [self._answer(found, name, track) for name, track in found.tracks.items()]

    def _answer(self, found: Evidence, name: str, track: SuiteTrack) -> Answer:
        judged, sentence, findings, tiles = answer_of(track, tuned_of(found, name))
        mine, ranked = words.mine_of(track), tables.ranked(track)
        return Answer(
            name,
            judged,
            sentence,
            [*findings, *([_on_what(found.config)] if words.asked(track) else [])],
            tiles[:MOST_TILES],
            [t for t in _compared(found, name, track) if PAGE in t.places],
            judging=_judging(track),
            arms=frozenset({track["reference"], *mine, *ranked[:1]}),
        )

    def tables(self, found: Evidence) -> list[Table]:
        made: list[Table] = []
        for name, track in found.tracks.items():
            asked, ranked = words.asked(track), tables.ranked(track)
            compared = _compared(found, name, track)
            # the page has these above, right below the answer
            made += [replace(table, places=(TERMINAL,)) for table in compared if TERMINAL in table.places]
            made += _tried(found, name, track)
            pairs = tables.suite_pairs(track, ranked)
            if pairs and asked:
                table = tables.differences(f"differences-{name}", "", pairs, track, "", found.results)
                title = "Difference in test loss from its reference"
                made.append(found.titled(table, name, title=title, places=(PAGE,)))
            arms = tables.arms(f"suite-{name}", track, found.results, ranked)
            title = "Arms, lowest median test loss first"
            made.append(found.titled(arms, name, title=title, places=(PAGE,) if asked else (TERMINAL, PAGE)))
            further = tables.further_arms(f"suite{{}}-{name}", track, found.results, ranked)
            spans = tables.spans(track, f"{{}}-{name}".format)
            made += [found.titled(table, name, places=(TERMINAL, PAGE)) for table in further]
            made += [replace(t, places=(TERMINAL, PAGE) if asked else (TERMINAL,)) for t in spans]
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
            compared = [table for table in _compared(found, name, track) if PAPER in table.places]
            what = "test loss, and paired differences [joint intervals]"
            made += [replace(table, caption=f"{table.title}: {what}.") for table in compared]
            made += tables.further_arms(f"{name}{{}}", track, found.results)
            made += [replace(t, caption=f"{words.optimizer(name)}: {t.title.lower()}.") for t in spans]
        return {"ablation": made}


KIND = Suite()


def tuned_of(found: Evidence, track: str) -> Mapping[str, TunedArm]:
    """Return what `tune` chose for each arm; empty where nothing was tuned."""
    return words.tuned_arms(found.decisions.get("tune"), track)


# -- the answer ----------------------------------------------------------------------------------------------


def answer_of(track: SuiteTrack, tuned: Mapping[str, TunedArm] = MappingProxyType({})) -> Said:
    """Answer a suite: of arms that it asks about whether they are better; else what its sweeps show, or which
    arms the joint interval tells apart from their reference. `tuned`: what `tune` chose for each arm.

    Never which arm is best: the lowest of several losses is that of the luckiest, too.
    """
    lost = [f"{line}." for line in unfinished(track)]
    if words.mine_of(track) or track.get("answers"):
        return _answer_of_mine(track, lost, tuned)
    if not any(arm["test_median"] is not None for arm in contenders(track).values()):
        return "undecided", "No answer: no arm completed a run that can be compared.", lost, []
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


def _in_lines(tiles: Sequence[Tile]) -> list[str]:
    """Return figures as findings, one line each."""
    return [f"{tile.what}: {tile.value} {tile.unit} ({tile.remark})." for tile in tiles]


# -- is mine better? -----------------------------------------------------------------------------------------


def _answer_of_mine(track: SuiteTrack, lost: Sequence[str], tuned: Mapping[str, TunedArm]) -> Said:
    """Answer whether the arms that a suite asks about are better, each against the best of the others."""
    answers = track["answers"]  # also of those that were never trained
    if not answers:
        return "undecided", "No answer: no run of these arms completed.", lost, []
    others = {n: f" ({size})" for n, a in answers.items() if a["rival"] and (size := other_size(n, track))}
    colours = {VERDICTS[answer["verdict"]][0] for answer in answers.values()}
    judged = colours.pop() if len(colours) == 1 else "undecided"
    sentences = [f"{answer['sentence'].rstrip('.')}." for answer in answers.values()]
    findings = [*dict.fromkeys([*lost, *sentences])]
    tiles = _tiles_of_mine(track, tuned)
    compared = [label for label, answer in answers.items() if answer["rival"] and label not in others]
    named = {n: f"{_verdict_in_words(a)} {a['rival'] or ''}".rstrip() for n, a in answers.items()}
    if len(answers) > MOST_NAMED:
        counts = Counter(
            f"{_verdict_in_words(a)}{' the best of the others' * (n in compared)}"
            for n, a in answers.items()
            if n not in others
        )
        counted = [f"{n} {verdict.replace('is ', 'are ', n > 1)}" for verdict, n in counts.items()]
        counted += [f"{n}{size} {named[n]}" for n, size in others.items()]
        many = f"{len(answers)} arms{HERE * bool(compared)}"
        return judged, f"Of {many}, {', '.join(counted)}.", findings, tiles
    clauses = [f"{n}{others.get(n, '')} {words}" for n, words in named.items()]
    if compared:  # said once
        clauses[[*answers].index(compared[0])] += HERE
    undecided = [a for a in answers.values() if a["verdict"] == "undecided"]
    needed = [a["seeds_needed"] for a in undecided if a["seeds_needed"]]
    clauses += [f"about {plural(max(needed), 'seed')} would decide it"] if needed else []
    return judged, f"{'; '.join(clauses)}.", findings, tiles


def _on_what(config: Config) -> str:
    """Return what the answer was found on, and that it may be another one elsewhere."""
    batch, steps, text = words.batch(config), config.ablation.steps, config.data.name
    sizes = f"On one model ({words.model(config)}), batch {batch}, {steps:,} steps of {text}"
    return f"{sizes}: another size may answer otherwise; study=ladder asks that."


def _verdict_in_words(answer: Verdict) -> str:
    uncompared = answer["verdict"] == "undecided" and answer["rival"] is None
    return "is not compared" if uncompared else VERDICTS[answer["verdict"]][1]


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
    spans = {arm: lr_window(found) for arm, found in tuned.items()}
    if span := spans.get(label):
        other = spans.get(rival) if rival else None
        what = f"Learning-rate window of {label}, by validation loss"
        tiles.append(window_tile(what, span, other, f"of {rival}"))
    costs = track.get("steps_cost") or {}
    return [*tiles, *([_cost(label, costs, track["reference"], rival)] if label in costs else [])]


def _cost(label: str, costs: Mapping[str, StepCost], reference: str, rival: str | None) -> Tile:
    cost = costs[label]
    remark = f"of {reference}’s, quartiles {cost['low']:.2f} to {cost['high']:.2f}"
    if rival and rival in costs and rival != reference:
        remark += f"; {rival}: ×{costs[rival]['ratio']:.2f}"
    return Tile(f"Time of a step of {label}", f"×{cost['ratio']:.2f}", "", remark)


# -- other suites --------------------------------------------------------------------------------------------


def _told_apart(track: SuiteTrack, lost: Sequence[str]) -> Said:
    """Answer which arms are told apart from their references, and how."""
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
        return "undecided", "No answer: no arm is paired with another one.", lost, []
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
    return judged, f"{word}.", [*lost, *findings], _tiles_of_arms(track)


def _who(labels: Sequence[str], many: int) -> str:
    """Return a few arms by name, more by their number, as the subject of a clause."""
    who = " and ".join(labels) if len(labels) <= MOST_NAMED else f"{len(labels)} of {plural(many, 'arm')}"
    return f"{who} {'is' if len(labels) == 1 else 'are'}"


def _first_few(labels: Sequence[str]) -> str:
    if len(labels) <= MOST_LISTED + 1:
        return ", ".join(labels)
    return f"{', '.join(labels[:MOST_LISTED])} and {len(labels) - MOST_LISTED} more"


def _answer_of_windows(spans: Mapping[str, Window | None]) -> Said:
    """Answer with the widest windows of the learning rate; every window is a finding."""
    known = {arm: span for arm, span in spans.items() if span}
    if not known:
        return "undecided", "No answer: no arm completed a run at any learning rate.", [], []
    order = sorted(known, key=lambda arm: -known[arm]["octaves"])
    tiles = []
    for arm in order:
        tile = window_tile(f"Learning-rate window of {arm}", known[arm])
        tiles.append(tile._replace(remark=f"best at ×{known[arm]['best']:g}"))
    lost = [f"Learning-rate window of {arm}: {in_octaves(None)}." for arm in spans if arm not in known]
    unended = [arm for arm in order if is_open(known[arm])]
    ended = [f"{arm} over {in_octaves(known[arm])}" for arm in order if arm not in unended]
    clauses = [f"{_first_few(unended)} beyond the rates that were tried"] if unended else []
    sentence = f"The loss stays within {WINDOW_NATS:g} nats of an arm’s own best: "
    sentence += f"{'; '.join([*clauses, *ended[: MOST_NAMED - len(clauses)]])}."
    return "undecided", sentence, [*_in_lines(tiles), *lost], tiles


def _answer_of_starts(rules: Mapping[str, Any]) -> Said:
    """Answer which rules for δ forget where they started."""
    good = [name for name, rule in rules.items() if rule["every_start"]]
    losses = {name: math.inf if rule["worst"] is None else rule["worst"] for name, rule in rules.items()}
    tiles = []
    for name in sorted(losses, key=lambda name: losses[name]):
        known = math.isfinite(losses[name])
        remark = "minus the best fixed δ* of its length" if known else "a start diverged"
        tiles.append(Tile(f"{name} from its worst start", signed(losses[name], 3), "nats", remark))
    who = _first_few(good) if good else f"None of {plural(len(rules), 'rule')}"
    if len(good) == len(rules) > 1:
        who = f"All {len(rules)} rules"
    ends = "end" if len(good) > 1 else "ends"
    sentence = f"{who} {ends} within {SAME_NATS:g} nats of a tuned δ* from every start."
    return "undecided" if good else "misses", sentence, _in_lines(tiles), tiles


def _answer_of_transfer(track: SuiteTrack) -> Said:
    """Answer with the largest regrets of settings carried to other sizes; every regret is a finding."""
    kept = [name for size in track["transfer"] for name in size["kept"]]
    differences = {name: d for name in kept if (d := track["arms"][name]["difference"])}
    regrets = {name: mean for name, d in differences.items() if (mean := d["mean"]) is not None}
    shown = {name: f"{signed(regrets[name], 3)} nats" if name in regrets else NOTHING for name in kept}
    findings = [f"{name}: {regret} against a rate tuned again." for name, regret in shown.items()]
    rising = sorted(regrets, key=lambda name: regrets[name])
    worst = {bool(track["arms"][name]["ebc"]): name for name in rising}
    largest, tiles = [], []
    for ebc, kind in ((True, " with EBC"), (False, " without EBC")):
        if name := worst.get(ebc):
            largest.append(f"{signed(regrets[name], 3)} nats{kind * (len(worst) > 1)}")
            tiles.append(difference_tile(f"Largest regret: {name}", differences[name]))
    most = " and ".join(largest) or "an unknown amount"
    return "undecided", f"Settings kept from another size cost at most {most}.", findings, tiles


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
    if asked := words.asked(track):
        tuned = tuned_of(found, name)
        names = {label: f"better-{name}-{i}" for i, label in enumerate(asked, 1)}
        return [found.titled(glance.is_better(names[label], label, track, tuned), name) for label in asked]
    pairs = tables.suite_pairs(track, tables.ranked(track))
    title = "The arms beside their reference"
    table = tables.differences(f"glance-{name}", title, pairs, track, track["reference"], found.results)
    spans = tables.spans(track, f"{{}}-{name}".format)
    shown = [found.titled(table, name, places=(TERMINAL, PAPER) if spans else EVERYWHERE)]
    return [*shown, *(found.titled(span, name, places=(PAGE,)) for span in spans)]


def _tried(found: Evidence, name: str, track: SuiteTrack) -> list[Table]:
    """Return what was tried of the arms of a suite that asks about some of them."""
    mine, tune = words.mine_of(track), found.decisions.get("tune")
    if not tune or not mine:
        return []
    order = [*mine, *(label for label in track["arms"] if label not in mine)]
    grids = {label: arm.tune for label, arm in found.config.ablation.arms.items()}
    made = glance.tried(f"tried-{name}", tune, name, order, grids)
    return [found.titled(made, name, places=(PAGE,))] if made else []


def _judging(track: SuiteTrack) -> list[Difference]:
    """Return the differences that the answer rests on: of the arms that a suite asks about, else all."""
    mine = [d for label in words.asked(track) for d in track["answers"][label]["against"].values()]
    every = mine or list(tables.suite_pairs(track, track["arms"]).values())
    return [by_interval(d, joint=True) for d in every]

"""What a page says before all else: the verdict in one sentence, and at most three figures.

Both follow from the recorded decision by the rules below; nothing is judged here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ebc_lab.records.decisions import (
    Difference,
    FinalsTrack,
    Line,
    ModesTrack,
    ProfilesTrack,
    ScaleTrack,
    StepCost,
    SuiteTrack,
    Sweep,
    TunedArm,
    UnitsTrack,
    Window,
)
from ebc_lab.study.stages.statistics import by_interval, centre_of, in_octaves, level

from . import words
from .modes import answer as same_bits_in_words
from .modes import same_bits
from .profiles import answer as profiles_in_words
from .profiles import span_in_words
from .units import answer as carried_in_words
from .words import NOTHING, interval, percent, plural, signed

MOST = 3  # figures


class Tile(NamedTuple):
    """A figure that stands by itself: `what` it is, its `value` with its `unit`, and a `remark` in small
    print: its interval, or what it is to be compared with."""

    what: str
    value: str
    unit: str = ""
    remark: str = ""


class Headline(NamedTuple):
    """`judged`: beats, meets, misses or undecided, as the answer's colour."""

    judged: str
    sentence: str
    tiles: Sequence[Tile]


# -- the finals ----------------------------------------------------------------------------------------------


def finals(track: FinalsTrack, scaled: ScaleTrack | None, answer: words.InWords | None) -> Headline | None:
    """Return what the verdict of the finals says first; None where no line of it compares two arms.

    `scaled`: what `lr_scale` decided for this track, where the study has this stage.
    """
    lines = {line["name"]: line for line in track["verdict"]}
    fair = lines.get("best_ebc_no_worse_than_control")
    if fair is None or answer is None:
        return None
    twice = lines.get("x2_no_worse_than_baseline")
    tiles = [
        *_windows_of(scaled),
        _difference("Best EBC arm minus the fair control, test loss", fair["difference"], fair["joint"]),
        *([_overhead(lines["overhead"])] if "overhead" in lines else []),
        *([_difference("EBC at ×2 minus the baseline, test loss", twice["difference"])] if twice else []),
    ]
    return Headline(answer["judged"], answer["word"], tiles[:MOST])


def _windows_of(scaled: ScaleTrack | None) -> list[Tile]:
    if not scaled or not (span := scaled["lr_window"].get("ebc")):
        return []
    without = scaled["lr_window"].get("none")
    remark = f"{in_octaves(without)} without EBC" if without else ""
    return [Tile("Learning-rate window with EBC", _octaves(span), "octaves", remark)]


def _overhead(line: Line) -> Tile:
    value, _, quartiles = line["figure"].partition(" (")
    target = line["question"].partition("≤")[2].partition("%")[0].strip()
    remark = ", ".join(filter(None, (quartiles.rstrip(")"), f"target at most {target}%")))
    what = "Time that EBC adds to a step"
    if line.get("overhead_pct") is None:
        return Tile(what, NOTHING, "", value)
    return Tile(what, value, "", f"{remark}: {line['verdict']}")


# -- suites --------------------------------------------------------------------------------------------------


def suite(track: SuiteTrack, tuned: Mapping[str, TunedArm]) -> Headline:
    """Return what a suite says first: about arms of one's own; or over which range a setting may be off; or
    which arms are told apart. `tuned`: what `tune` chose for each arm; empty where nothing was tuned."""
    answer = words.suite_answer(track)
    if words.mine_of(track) or track.get("answers"):
        return Headline(answer["judged"], _mine(track, answer["word"]), _tiles_of_mine(track, tuned)[:MOST])
    windows = track.get("windows", {})
    spans = {arm: swept["lr_scale"]["window"] for arm, swept in windows.items() if "lr_scale" in swept}
    rules = words.rules_among({arm: swept["delta"] for arm, swept in windows.items() if "delta" in swept})
    if spans:
        tiles = _widest(spans)
    elif rules:
        tiles = _from_any_start(rules)
    else:
        tiles = _largest_regrets(track) if track.get("transfer") else _tiles_of_arms(track)
    return Headline(answer["judged"], answer["word"], tiles[:MOST])


def _mine(track: SuiteTrack, word: str) -> str:
    """Say the answer about arms of one's own, and what would decide an open one."""
    answers = [track["answers"][label] for label in words.asked(track)]
    needed = [a["seeds_needed"] for a in answers if a["verdict"] == "undecided" and a["seeds_needed"]]
    return f"{word.rstrip('.')}; about {plural(max(needed), 'seed')} would decide it." if needed else word


def _tiles_of_mine(track: SuiteTrack, tuned: Mapping[str, TunedArm]) -> list[Tile]:
    asked = words.asked(track)
    tiles = []
    for label in asked:
        answer = track["answers"][label]
        if answer["rival"] and answer["difference"]:
            what = f"{label} minus {answer['rival']}, test loss"
            tiles.append(_difference(what, answer["difference"], joint=True))
    if len(asked) != 1:
        return tiles
    [label] = asked
    rival = track["answers"][label]["rival"]
    if span := (tuned[label].get("window") if label in tuned else None):
        of_rival = tuned[rival].get("window") if rival and rival in tuned else None
        remark = f"{rival}: {in_octaves(of_rival)}" if of_rival else ""
        tiles.append(Tile(f"Learning-rate window of {label}", _octaves(span), "octaves", remark))
    costs = track.get("steps_cost") or {}
    if label in costs:
        tiles.append(_cost(label, costs, track["reference"], rival))
    return tiles


def _cost(label: str, costs: Mapping[str, StepCost], reference: str, rival: str | None) -> Tile:
    cost = costs[label]
    remark = f"of {reference}’s, quartiles {cost['low']:.2f} to {cost['high']:.2f}"
    if rival and rival in costs and rival != reference:
        remark += f"; {rival}: ×{costs[rival]['ratio']:.2f}"
    return Tile(f"Time of a step of {label}", f"×{cost['ratio']:.2f}", "", remark)


def _widest(spans: Mapping[str, Window | None]) -> list[Tile]:
    known = sorted(((arm, span) for arm, span in spans.items() if span), key=lambda x: -x[1]["octaves"])
    return [
        Tile(f"Learning-rate window of {arm}", _octaves(span), "octaves", f"best at ×{span['best']:g}")
        for arm, span in known
    ]


def _from_any_start(rules: Mapping[str, Sweep]) -> list[Tile]:
    """Return what each rule for δ loses from its worst start, the least first."""
    losses = {name: math.inf if rule["worst"] is None else rule["worst"] for name, rule in rules.items()}
    return [
        Tile(f"{name} from its worst start", signed(worst, 3), "nats", "minus the best fixed δ*")
        if math.isfinite(worst)
        else Tile(f"{name} from its worst start", NOTHING, "", "a start diverged")
        for name, worst in sorted(losses.items(), key=lambda loss: loss[1])
    ]


def _largest_regrets(track: SuiteTrack) -> list[Tile]:
    """Return the largest cost of settings that were kept from another size, with EBC and without."""
    largest = words.largest_regrets(words.regrets_of(track), track["arms"])
    names = [largest[ebc][0] for ebc in (True, False) if ebc in largest]
    pairs = {name: track["arms"][name]["difference"] for name in names}
    return [_difference(f"Largest regret: {name}", d, joint=True) for name, d in pairs.items() if d]


def _tiles_of_arms(track: SuiteTrack) -> list[Tile]:
    """Return how many arms are told apart from their reference, and the two ends of the differences."""
    differences = {name: arm.get("difference") for name, arm in track["arms"].items()}
    pairs = {name: d for name, d in differences.items() if d and d["seeds"]}
    if not pairs:
        return []
    found = Counter(words.verdict_of(d) for d in pairs.values())
    counted = [f"{found[kind]} {kind}" for kind in ("better", "worse", "level", "undecided") if found[kind]]
    apart = found["better"] + found["worse"]
    centres = {name: centre for name, d in pairs.items() if (centre := centre_of(d)) is not None}
    rising = sorted(centres, key=lambda name: centres[name])
    ends = dict(
        zip(("Lowest test loss", "Highest"), dict.fromkeys([*rising[:1], *rising[-1:]]), strict=False)
    )
    tiles = [Tile("Arms told apart from their reference", str(apart), f"of {len(pairs)}", ", ".join(counted))]
    for end, name in ends.items():
        what = f"{end}: {name} minus {track['arms'][name]['versus']}"
        tiles.append(_difference(what, pairs[name], joint=True))
    costs = track.get("steps_cost") or {}
    if rising and rising[0] in costs:
        tiles.insert(2, _cost(rising[0], costs, track["reference"], None))
    return tiles


# -- modes of determinism ------------------------------------------------------------------------------------


def modes(track: ModesTrack) -> Headline:
    """Return under which modes all runs ended with the same weights."""
    found = track["modes"]
    same = [mode for mode, counts in found.items() if same_bits(counts)]
    most = max(found, key=lambda mode: found[mode]["checksums"])
    of_runs = f"in {plural(found[most]['completed'], 'completed run')}"
    spread = {mode: c["loss_range"] for mode, c in found.items() if c["loss_range"] is not None}
    tiles = [
        Tile("Modes with the same bits in every run", str(len(same)), f"of {len(found)}", ", ".join(same)),
        Tile(f"Different weights under {most}", str(found[most]["checksums"]), "", of_runs),
    ]
    if spread:
        wide = max(spread, key=lambda mode: spread[mode])
        tiles.append(Tile("Largest difference of the loss", f"{spread[wide]:.1e}", "nats", f"under {wide}"))
    return Headline("undecided", same_bits_in_words(track)["word"], tiles)


# -- units ---------------------------------------------------------------------------------------------------


def units(track: UnitsTrack) -> Headline:
    """Return whether a challenger earns its cost, with the best of them, the unit that carries best, and how
    many runs broke."""
    verdicts = track["verdicts"]
    judged = "undecided" if "undecided" in verdicts.values() else "misses"
    judged = "beats" if "earns" in verdicts.values() else judged
    best = min(verdicts, key=lambda arm: centre_of(track["against"][arm]) or 0.0)
    what = f"{best} minus {track['reference']}, mean test loss"
    found = {arm: f["excess"] for arm, f in track["arms"].items() if f["excess"] is not None}
    tiles = [_difference(what, track["against"][best], joint=True)]
    if found:
        least = min(found, key=lambda arm: found[arm])
        worst = track["arms"][least]["worst"]
        excess = track["arms"][least]["carried"][worst]["excess"] if worst else None
        remark = f"above the best of all arms; {signed(excess, 3)} at worst ({worst})"
        tiles.append(Tile(f"{least} has the lowest mean excess", signed(found[least], 3), "nats", remark))
    shares = {arm: f["broken"]["broken"] / max(1, f["broken"]["runs"]) for arm, f in track["arms"].items()}
    broken = track["arms"][best]["broken"]
    rival = percent(shares[track["reference"]], 1)
    remark = f"{broken['broken']} of {broken['runs']}; {track['reference']} {rival}"
    tiles.append(Tile(f"Broken runs of {best}", percent(shares[best], 1), "", remark))
    return Headline(judged, carried_in_words(track)["word"], tiles)


# -- profiles ------------------------------------------------------------------------------------------------


def profiles(track: ProfilesTrack) -> Headline:
    """Return who scores highest, and where the methods stand that the study asks about."""
    methods = track["methods"]
    tiles = []
    for method in [m for m in track["asked_about"] if m in methods] or list(methods):
        found = methods[method]
        remark = f"{span_in_words(found)}, over the seeds" if found["low"] is not None else ""
        place = f"place {found['place']} of {len(methods)}"
        tiles.append(Tile(f"Score of {method}", f"{found['score']:.2f}", place, remark))
    tiles.sort(key=lambda tile: -float(tile.value))
    return Headline("undecided", profiles_in_words(track)["word"], tiles[:MOST])


# -- figures -------------------------------------------------------------------------------------------------


def _difference(what: str, difference: Difference, joint: bool = False) -> Tile:
    """Return a paired difference, with the interval that judges it and what follows from that."""
    d = by_interval(difference, joint)
    low, high = d["low"], d["high"]
    seeds = plural(d["seeds"], "seed")
    at_once = f"for {d['comparisons']} comparisons at once, " if joint and d["comparisons"] > 1 else ""
    limits = f"{interval(low, high, 3)} ({level([d])}, {at_once}{seeds})"
    remark = f"no interval, {seeds}" if low is None and high is None else limits
    return Tile(what, signed(centre_of(d), 3), "nats", remark)


def _octaves(span: Window) -> str:
    return in_octaves(span).removesuffix(" octaves")

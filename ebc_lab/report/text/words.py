"""What the page says in words: numbers a person can read, what each check means, and the answer in a
sentence.

The judgements themselves are made in `study.verdict`; here they are only told.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict, TypeVar

from ebc_lab.config.errors import clock as clock  # also the templates' filter
from ebc_lab.config.identity import tails_of_choices
from ebc_lab.config.part import Tail
from ebc_lab.config.parts.lr_schedule import TAILS as LR_TAILS
from ebc_lab.config.parts.lr_schedule import LRScheduleConfig
from ebc_lab.config.parts.model import ModelConfig
from ebc_lab.config.parts.partition import PartitionConfig
from ebc_lab.config.parts.policy import PolicyConfig
from ebc_lab.config.parts.quantizer import QuantizerConfig
from ebc_lab.config.parts.stabilizer import SCHEDULES
from ebc_lab.config.schema import RunConfig
from ebc_lab.records.decisions import (
    Arm,
    Difference,
    FinalsTrack,
    Line,
    RateWindow,
    SuiteTrack,
    Sweep,
)
from ebc_lab.records.spec import optimizer as optimizer
from ebc_lab.records.spec import tracks_in_words as tracks_in_words
from ebc_lab.study.stages.statistics import WINDOW_NATS, by_interval, in_octaves, level, show_difference
from ebc_lab.study.stages.suite import SAME_NATS, contenders
from ebc_lab.study.stages.suite import tuned_arms as tuned_arms
from ebc_lab.study.stages.verdict import unfinished
from ebc_lab.study.stages.verdict import verdict_of as verdict_of

NOTHING = "–"
QUESTION = "What does EBC buy, and what does it not?"
QUESTION_WITHOUT_WINDOW = "Does bounding how far each update may move the model’s predictions help?"
METHOD_OF_A_SUITE = (
    "Every arm is the same model on the same text. Those that have settings of their own to be tuned are "
    "tuned alike, by validation loss; then each is trained over fresh seeds, and two arms are compared seed "
    "by seed by their test loss, at which no choice has looked."
)
METHOD = (
    "EBC (Ellipsotope-Budgeted Clipping) shortens each update of an ordinary optimizer by a factor c ≤ 1, "
    "the clip coefficient, so that the model’s predictions move by no more than a chosen amount, the budget "
    "δ*: a KL divergence in nats per token.",
    "The study tunes the plain optimizer, a constant learning rate and a schedule; then EBC’s budget, which "
    "is a setting like any other and has to be tuned too. It tests how far the learning rate can rise, with "
    "EBC and without, and trains every arm again at full length over fresh seeds. Validation loss decides; "
    "test loss only judges.",
)
OF_PI = (  # where the earlier study's rule moved δ; docs/findings.md says the same
    "A moving δ is a symptom: sensitivities that are averaged from zero make the bound come too late, and "
    "training then fits its curvature to the length of its steps, so that one KL does not stand for one "
    "length. Bound a length, or let δ fall on a schedule."
)
TERMS = {  # docs/glossary.md repeats them
    "δ*": "EBC’s budget: the KL divergence, in nats per token, by which one step may move the predictions; "
    "on a schedule it falls towards the end of the run",
    "natural KL": "how far a step moves the predictions without EBC, at the baseline’s learning rate: "
    "the unit in which δ* is tried",
    "c": "the clip coefficient: the share of an update that is applied; 1 is all of it",
    "clip rate": "the share of the steps that EBC shortens, those with c < 0.999; the column Clipped",
    "baseline": "the plain optimizer at its best constant learning rate, which is ×1 of every other rate",
    "fair control": "the same optimizer on a learning-rate schedule that was tuned for it: its peak, and its "
    "warm-up and shape where several are tried",
    "LR window": f"the learning rates at which an arm’s loss lies within {WINDOW_NATS:g} nats of its own "
    "best, in octaves: factors of 2; “≥” where it does not end within what was tried",
    "headroom": "how far the learning rate can rise: the highest multiple of the baseline’s whose loss is "
    "within one σ of the best without EBC",
    "LR inert": "at rates where EBC clips nearly every step, c cancels the learning rate: the runs are the "
    "same up to rounding",
    "arm": "one way to train, over all seeds",
    "track": "an optimizer with its projection of the weights, if any; each has decisions of its own",
    "paired": "two arms compared seed by seed: the same initial weights and the same data in the same order",
    "σ": "the standard deviation of the final loss over replicate seeds: how much of a difference is luck",
    "luck of the tuning": "how far the loss of what was chosen would vary had other seeds chosen; intervals "
    "between arms that were tuned apart allow for it",
    "fresh seeds": "those that no earlier answer to the question rests on, and no tuning",
    "margin": "how far the runner-up lies behind what was chosen, in σ; of a comparison with a target, how "
    "many nats worse still counts as no worse",
    "smallest detectable difference": "the least true difference that this many seeds would show four times "
    "out of five, by the same interval that judges the comparison; where there are several arms, that is the "
    "interval that holds for all comparisons together",
}
OF_EBC = ("δ*", "natural KL", "c", "clip rate", "headroom", "LR inert")  # terms of studies that have EBC
CHECKS = {  # name -> title, what it asks, and what each verdict means
    "kl_on_target": (
        "Does the bound hold?",
        "The KL divergence of EBC’s steps, measured on tokens that had no part in choosing them, "
        "against its target δ*.",
        {
            "pass": "It does: clipped steps move the predictions about as far as they were allowed to.",
            "fail": "It does not: clipped steps move the predictions clearly more, or less, than asked.",
            "undecided": "No step was clipped, so there was nothing to measure.",
        },
    ),
    "c_in_band": (
        "Is EBC at work, without throttling?",
        "The median of the clip coefficient c over the run: 1 leaves a step as it is, 0.5 halves it.",
        {
            "pass": "It is: the typical step is shortened, but not to a crawl.",
            "fail": "It is not: the median lies outside the band.",
            "undecided": "No run with EBC came to its end.",
        },
    ),
    "no_plateau": (
        "Does it ever choke the training?",
        "The longest stretch of steps that were all cut down hard.",
        {
            "pass": "It does not.",
            "fail": "It does: there is a long stretch in which hardly any of each update was applied.",
            "undecided": "The runs are too short to tell.",
        },
    ),
    "x2_no_worse_than_baseline": (
        "Does EBC make a doubled learning rate safe?",
        "EBC at twice the best plain learning rate, against the plain optimizer at its best one.",
        {},
    ),
    "best_ebc_no_worse_than_control": (
        "Is EBC worth having where a tuned schedule is at hand?",
        "The EBC arm with the lowest validation loss, against the fair control: the same optimizer on "
        "a schedule that was tuned for it.",
        {},
    ),
    "lr_window": (
        "Does EBC make the learning rate irrelevant?",
        "EBC at its highest learning rate against EBC at its lowest, everything else the same; beside it, "
        "what the plain optimizer loses by the same step on the fair control’s schedule.",
        {
            "pass": "Between these two rates it does: the higher one costs no more than the target.",
            "fail": "It does not: the higher rate costs more than the target.",
            "undecided": "Undecided: the higher rate may cost no more than the target, or more.",
        },
    ),
    "overhead": (
        "What does it cost?",
        "The time that EBC adds to a training step, from one paired measurement on this machine.",
        {
            "pass": "No more than was aimed for.",
            "fail": "More than was aimed for.",
            "undecided": "The measurement is missing, or its spread holds the limit.",
        },
    ),
}
ROLES = {
    "baseline": "baseline",
    "control": "fair control",
    "ebc_chosen": "EBC at the chosen rate",
    "none_chosen": "no EBC at the chosen rate",
    "ebc_lindelta": "EBC, falling δ*",
    "ebc_lindelta_lrdecay": "EBC, falling δ*, LR decay",
    "grid": "grid",
    "replicate": "replicate for σ",
    "none": "without EBC",
    "ebc": "with EBC",
    "fixed_tau": "fixed trust radius",
    "surrogate_x1": "surrogate at ×1",
}
ROLES_AT_RATES = {"ebc": "EBC at", "control": "control’s schedule at"}  # of ebc_x8, control_x8
FAMILIES = {  # of the finals' paired differences: against what
    "baseline": "the baseline",
    "control": "the fair control",
    "rate": "the plain optimizer on the control’s schedule at the same rate",
}
JUDGED = {  # of a paired difference -> badge, what it says
    "beats": ("pass", "beats it"),
    "meets": ("pass", "meets the target"),
    "misses": ("fail", "misses the target"),
    "undecided": ("undecided", "undecided"),
}


class InWords(TypedDict, total=False):
    """A study's answer: `judged` beats, meets, misses or undecided; `word` is a sentence, `told` are those of
    `text`."""

    judged: str
    word: str
    text: str
    told: list[str]


def has_ebc(config: Mapping[str, Any]) -> bool:
    """Tell whether anything in a study, by its recorded settings, has EBC; where nothing has, nothing is said
    of it."""
    if {"calibrate", "controller_search", "lr_scale", "finals"} & set(config["study"]["stages"]):
        return True
    arms = ((config.get("ablation") or {}).get("arms") or {}).values()
    return any(((arm.get("settings") or {}).get("stabilizer") or {}).get("name") == "ebc" for arm in arms)


NOISE_ALONE = (
    "How much luck there is in a loss: one optimizer over a short grid of rates, its best run again "
    "under other seeds. σ is the spread of these; later margins are compared with it. What is asked about "
    "was not trained here: its rates are those of the tuning."
)


def of_the_sweep(ebc: bool, control: bool) -> tuple[str, str]:
    """Return what a study calls the stage that finds the best rate, and what it says of it: of EBC and of the
    fair control only where the study has them."""
    luck = "how much luck there is in a loss (σ, the spread over replicate seeds)"
    parts = ["which optimizer is best, and at which constant learning rate", luck]
    parts += ["how far predictions move by themselves (the natural KL)"] * ebc
    fair = "how good the same optimizer gets on a schedule whose peak, warm-up and shape are tuned"
    parts += [f"{fair} (the fair control)"] * control
    about = f"{', '.join(parts[:-1])}, and {parts[-1]}."
    title = f"Learning rate{', noise and a fair control' if control else ' and noise'}"
    return title, f"Without EBC: {about}" if ebc else capital(about)


NOT_OF_ALL = {"natural KL": "ebc", "fair control": "control"}  # figures of that stage, and what they are for


def explanation(ebc: bool, finals: bool, said: str) -> dict[str, Any]:
    """Return what a page says was done, `method`, and what the `terms` mean that its text, `said`, uses."""
    terms = {term: what for term, what in explained(said).items() if ebc or term not in OF_EBC}
    if finals:
        return {"method": METHOD, "terms": terms}
    return {"method": (*METHOD[:1], METHOD_OF_A_SUITE) if ebc else (METHOD_OF_A_SUITE,), "terms": terms}


# -- numbers -------------------------------------------------------------------------------------------------
# -------------


def fixed(x: float | None, digits: int = 4) -> str:
    """Return a figure with this many decimals: losses have four."""
    return NOTHING if x is None or not math.isfinite(x) else f"{x:z.{digits}f}".replace("-", "−")


def part(x: float | None) -> str:
    """Return a part of a whole, as c is: two decimals, or one digit where they would be 0."""
    return f"{x:.1g}" if x is not None and 0 < x < 0.005 else fixed(x, 2)


def capital(text: str) -> str:
    """The text with its first letter a capital, and the others as they are."""
    return text[:1].upper() + text[1:]


def signed(x: float | None, digits: int = 4) -> str:
    return NOTHING if x is None or not math.isfinite(x) else f"{x:+z.{digits}f}".replace("-", "−")


def size(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def brief(x: Any) -> str:
    """Return three significant digits where there are more; text and whole numbers as they are."""
    if x is None or x == "":
        return NOTHING
    if isinstance(x, bool) or not isinstance(x, int | float):
        return str(x)
    if isinstance(x, float) and not math.isfinite(x):
        return NOTHING
    if float(x).is_integer() and abs(x) < 1e6:
        return f"{int(x):,}".replace("-", "−")
    return f"{x:.3g}".replace("-", "−")


def percent(x: float | None, digits: int = 0) -> str:
    return NOTHING if x is None or not math.isfinite(x) else f"{100 * x:z.{digits}f}%"


def setting(x: Any) -> str:
    """Return a value of the configuration; of a third, six digits."""
    if isinstance(x, Mapping):
        return str(dict(x)) if x else "{}"
    if isinstance(x, list | tuple):
        return f"[{', '.join(map(setting, x))}]"
    if isinstance(x, bool):
        return "yes" if x else "no"
    if isinstance(x, float):
        return f"{x:.6g}"
    return "none" if x is None else str(x)


def interval(low: float | None, high: float | None, digits: int = 4) -> str:
    """Return `−0.012 to +0.034`; a missing limit is an infinite one."""
    if low is None and high is None:
        return NOTHING
    left = "−∞" if low is None else signed(low, digits)
    return f"{left} to {'+∞' if high is None else signed(high, digits)}"


def plural(n: int, one: str, many: str | None = None) -> str:
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def breakable(name: str) -> Any:
    """Return a long name of ours that may break after its underscores."""
    from markupsafe import Markup, escape

    return Markup("_<wbr>").join(escape(part) for part in name.split("_"))


# -- sentences -----------------------------------------------------------------------------------------------


def judgement(line: Line) -> str:
    """Return beats, meets, misses or undecided, of a verdict line that compares two arms."""
    return {"pass": "beats" if line["beats"] else "meets", "fail": "misses"}.get(line["verdict"], "undecided")


def means(line: Line, margin: float, reference: str, band: Sequence[float]) -> str:
    """Say what a line's verdict means, for somebody who does not know the method."""
    c = line.get("c_median")
    if line["name"] == "c_in_band" and line["verdict"] == "fail" and c is not None:
        if c > band[1]:
            return (
                "It hardly acts: over a full-length run the typical step is within the budget anyway, or "
                "nearly so."
            )
        return "It cuts deep: the typical step is shortened further than the band allows."
    meanings = CHECKS.get(line["name"], ("", "", {}))[2]
    if meanings or not line.get("difference"):
        return str(meanings.get(line["verdict"], ""))
    return {
        "beats": f"It beats {reference}: the whole interval lies below zero.",
        "meets": f"It meets the target, at most {margin:g} nats worse than {reference}; "
        "that it beats it is not shown.",
        "misses": f"It misses the target: the whole interval lies more than {margin:g} nats above "
        f"{reference}.",
        "undecided": f"Undecided: losing no more than {margin:g} nats to {reference} and losing more "
        "are both possible.",
    }[judgement(line)]


def gap(difference: Difference, joint: bool, than: str = "") -> str:
    """Write a paired difference, from the arm's side, with the interval that it is judged by."""
    d = by_interval(difference, joint)
    if d["mean"] is None:
        return show_difference(difference, joint=joint)
    size = f"{abs(d['mean']):.3f} nats {'lower' if d['mean'] < 0 else 'higher'}{than}"
    if d["low"] is None and d["high"] is None:
        return f"{size}, from one pair of runs"
    whose = f" for all {d['comparisons']} comparisons together" if joint and d["comparisons"] > 1 else ""
    limits = interval(d["low"], d["high"], 3)
    return f"{size} ({level([d])} interval {limits}{whose}, {plural(d['seeds'], 'paired seed')})"


def answer(lines: Sequence[Line], margin: float, scales: Sequence[float] = ()) -> InWords | None:
    """Answer the finals in a sentence, `word`, and in those that are `told` of it, which `text` joins; None
    where the lines that compare arms are not there.

    `scales`: the learning rates that the line `lr_window` compares.
    """
    by_name = {line["name"]: line for line in lines if line.get("difference")}
    fair = by_name.get("best_ebc_no_worse_than_control")
    if fair is None:
        return None
    window = by_name.get("lr_window")
    told = [_against_control(fair)]
    if twice := by_name.get("x2_no_worse_than_baseline"):
        told.append(_against_baseline(twice, margin))
    how = judgement(fair)
    against = AGAINST_A_SCHEDULE[how]
    if window is None:
        word = against.format("EBC")
        return {"judged": how, "word": f"{capital(word)}.", "text": " ".join(told), "told": told}
    tuned = "The setting to be tuned instead is EBC’s budget δ*: how far one step may move the predictions."
    told = [_over_the_window(window, scales), *told, tuned]
    signs = {"same" if _as_without_ebc(window) else window["verdict"], how}
    judged = "undecided"
    if not {"pass", "beats"} & signs and {"fail", "misses"} & signs:
        judged = "misses"
    elif {"pass", "beats"} & signs and not {"fail", "misses"} & signs:
        judged = "meets"
    word = f"{_over_the_rates(window, scales)}; {against.format('it')}."
    return {"judged": judged, "word": word, "text": " ".join(told), "told": told}


AGAINST_A_SCHEDULE = {  # of the comparison with the fair control -> the clause of the headline
    "beats": "{} beats a tuned schedule",
    "meets": "{} keeps up with a tuned schedule but is not shown to beat it",
    "misses": "{} loses to a tuned schedule",
    "undecided": "whether {} keeps up with a tuned schedule is undecided",
}


def _over_the_rates(window: Line, scales: Sequence[float]) -> str:
    """Say whether the loss stays where it is while the learning rate rises."""
    low, high = (f"×{scale:g}" for scale in scales)
    over = f"within {window['difference']['margin']:g} nats from {low} to {high} of the tuned learning rate"
    if window["verdict"] == "undecided":
        return f"Whether EBC keeps the loss {over} is undecided"
    if window["verdict"] == "fail":
        return f"EBC does not keep the loss {over}"
    return f"EBC keeps the loss {over}{', as the plain optimizer does' * _as_without_ebc(window)}"


def _as_without_ebc(window: Line) -> bool:
    """Tell whether the plain optimizer passes the line of the LR window, too."""
    plain = window["plain"]
    passes = plain is not None and plain["difference"]["alone"] in ("beats", "meets")
    return window["verdict"] == "pass" and passes


def control_warning(track: FinalsTrack) -> str:
    """Say what a reader must know of a fair control that is worse than the baseline; empty where it is
    not."""
    control = track["roles"].get("control", "")
    difference = track["differences"].get("baseline", {}).get(control)
    if not difference or (difference["mean"] or 0.0) <= 0:
        return ""
    return (
        f"The fair control came out worse than the baseline: its test loss is {gap(difference, joint=True)}. "
        "To beat it shows little; the comparison with the baseline is the one to look at."
    )


def _over_the_window(window: Line, scales: Sequence[float]) -> str:
    """Say what a higher learning rate does to EBC, and to the plain optimizer."""
    low, high = (f"×{scale:g}" for scale in scales)
    between = f"between {low} and {high} of the best constant one"
    claim = {
        "pass": f"With EBC a higher learning rate does no harm {between}",
        "fail": f"With EBC a higher learning rate does harm {between}",
        "undecided": f"Whether a higher learning rate does harm with EBC, {between}, is open",
    }[window["verdict"]]
    lead = f"at {high} the test loss is " if window["difference"]["mean"] is not None else ""
    text = f"{claim}: {lead}{gap(window['difference'], window['joint'], f' than at {low}')}"
    if window["plain"] and (plain := _plain_step(window["plain"], low, high)):
        text += f"; on the fair control’s schedule (tuned for the plain optimizer) without EBC, {plain}"
    return f"{text}."


def _plain_step(plain: RateWindow, low: str, high: str) -> str:
    """Say what the same step of the learning rate does without EBC; empty where that is not known."""
    d = plain["difference"]
    if d["mean"] is not None:
        return f"it is {abs(d['mean']):.3f} nats {'lower' if d['mean'] < 0 else 'higher'}"
    lost = d.get("diverged")
    if not lost:
        return ""
    ends = [(lost["arm"], high), (lost["reference"], low)]
    return " and ".join(f"{n} of {plural(d['seeds'], 'run')} diverged at {at}" for n, at in ends if n)


def _against_control(fair: Line) -> str:
    claim = {
        "beats": "EBC’s best arm beats the fair control",
        "meets": "EBC’s best arm keeps up with the fair control, but is not shown to beat it",
        "misses": "EBC’s best arm loses to the fair control",
        "undecided": "Whether EBC’s best arm keeps up with the fair control is open",
    }[judgement(fair)]
    claim += " (the same optimizer on a schedule tuned for it)"
    lead = "its test loss is " if fair["difference"]["mean"] is not None else ""
    return f"{claim}: {lead}{gap(fair['difference'], fair['joint'])}."


def _against_baseline(twice: Line, margin: float) -> str:
    then = {
        "beats": "EBC even beats the plain optimizer at its best one",
        "meets": f"EBC stays within {margin:g} nats of the plain optimizer at its best one",
        "misses": "EBC is worse than the plain optimizer at its best one",
        "undecided": "EBC against the plain optimizer at its best one is undecided",
    }[judgement(twice)]
    compared = gap(twice["difference"], twice["joint"])
    return f"At twice the best constant learning rate, {then}: {compared}."


def mine_of(track: SuiteTrack) -> list[str]:
    """Return the arms that a suite asks about, as it decided about them; none in suites that ask something
    else."""
    return [label for label in track.get("mine", ()) if label in track["arms"]]


def asked(track: SuiteTrack) -> list[str]:
    """Return those of them that are answered."""
    return [label for label in mine_of(track) if label in track["answers"]]


def suite_answer(track: SuiteTrack) -> InWords:
    """Answer a suite in a word and a sentence: of arms that it asks about whether they are better; else which
    arms the joint interval tells apart from their reference.

    Never which arm is best: the lowest of several losses is that of the luckiest, too. `told`: further
    sentences.
    """
    if mine_of(track) or track.get("answers"):
        return mine_answer(track)
    arms = {n: a for n, a in contenders(track).items() if a["test_median"] is not None}
    if not arms:
        text = "No arm completed a run that can be compared."
        return {"judged": "undecided", "word": "No answer.", "text": text}
    windows = track.get("windows", {})
    if any("lr_scale" in sweeps for sweeps in windows.values()):
        return _window_answer(windows)
    if rules := rules_among({name: sweeps["delta"] for name, sweeps in windows.items() if "delta" in sweeps}):
        return _start_answer(rules)
    if track.get("transfer"):
        return _transfer_answer(track)
    return _apart_answer(track)


def mine_answer(track: SuiteTrack) -> InWords:
    """Say whether the arms that a suite asks about are better, each against the best of the others."""
    answers = track["answers"]  # also of those that were never trained
    lost = " ".join(f"{line}." for line in unfinished(track))
    if not answers:
        return {
            "judged": "undecided",
            "word": "No answer.",
            "text": lost or "No run of these arms completed.",
        }
    verdicts = {answer["verdict"] for answer in answers.values()}
    one = verdicts.pop() if len(verdicts) == 1 else "undecided"
    clauses = [f"{n} {VERDICTS[a['verdict']][1]} {a['rival'] or ''}".rstrip() for n, a in answers.items()]
    text = " ".join(f"{answer['sentence'].rstrip('.')}." for answer in answers.values())
    return {"judged": VERDICTS[one][0], "word": f"{'; '.join(clauses)}.", "text": f"{lost} {text}".lstrip()}


def _apart_answer(track: SuiteTrack) -> InWords:
    """Say which arms of a suite of arms with references are told apart from these, and how."""
    groups: dict[str, list[str]] = {"better": [], "worse": [], "level": [], "undecided": []}
    references = set()
    for label, arm in track["arms"].items():
        difference = arm.get("difference")
        if difference and difference["seeds"]:
            n = difference.get("seeds_needed")
            groups[verdict_of(difference)].append(f"{label} ({n})" if n else label)
            references.add(arm["versus"])
    whom = references.pop() if len(references) == 1 else "their references"
    many = sum(map(len, groups.values()))
    lost = [f"{line}." for line in unfinished(track)]
    if not many:
        text = " ".join(lost) or "No arm is paired with another one."
        return {"judged": "undecided", "word": "No comparison.", "text": text}
    word = f"None of {plural(many, 'arm')} is told apart from {whom}"
    if apart := {kind: groups[kind] for kind in ("better", "worse") if groups[kind]}:
        clauses = [_who(labels, many, kind) for kind, labels in apart.items()]
        rest = many - sum(map(len, apart.values()))
        clauses[0] += f" than {whom}"
        are = "is" if rest == 1 else "are"
        open_ones = f"; {rest} of {plural(many, 'arm')} {are} not told apart" if rest else ""
        word = ", ".join(clauses) + open_ones
    kinds = {"better": "Better", "worse": "Worse", "level": "Level"}
    counted = any(label.endswith(")") for label in groups["undecided"])
    kinds["undecided"] = "Not told apart (about so many seeds would)" if counted else "Not told apart"
    sentences = [f"{kinds[kind]}: {_first_few(labels)}." for kind, labels in groups.items() if labels]
    by = f"By the intervals that hold for all {plural(many, 'comparison')} together." if many > 1 else ""
    judged = "meets" if groups["better"] and not groups["worse"] else "undecided"
    return {"judged": judged, "word": f"{word}.", "text": " ".join(filter(None, (*lost, *sentences, by)))}


def _who(labels: Sequence[str], many: int, what: str) -> str:
    """Say of a few arms by name, of more by their number, what they are."""
    named = " and ".join(filter(None, (", ".join(labels[:-1]), labels[-1])))
    who = named if len(labels) <= NAMED else f"{len(labels)} of {plural(many, 'arm')}"
    return f"{who} {'is' if len(labels) == 1 else 'are'} {what}"


def _first_few(labels: Sequence[str]) -> str:
    """Return names, no more than a headline has room for."""
    if len(labels) <= FEW + 1:
        return ", ".join(labels)
    return f"{', '.join(labels[:FEW])} and {len(labels) - FEW} more"


FEW = 5  # names that a sentence of the answer lists
NAMED = 2  # names that its headline does
VERDICTS = {  # of an arm that a suite asks about -> tone of the answer, in words
    "better": ("beats", "is better than"),
    "level": ("meets", "is level with"),
    "worse": ("misses", "is worse than"),
    "undecided": ("undecided", "is not told apart from"),
    "untuned": ("undecided", "could not be tuned"),
}
BADGES = {"better": "pass", "level": "pass", "worse": "fail", "undecided": "undecided"}


def _window_answer(windows: Mapping[str, Mapping[str, Sweep]]) -> InWords:
    """Name the widest windows of a suite that sweeps the learning rate, and all of them in order."""
    spans = {name: sweeps["lr_scale"]["window"] for name, sweeps in windows.items() if "lr_scale" in sweeps}
    order = sorted(spans, key=lambda n: -(span["octaves"] if (span := spans[n]) else -1.0))
    listed = "; ".join(f"{name} {in_octaves(spans[name])}" for name in order)
    text = f"Learning rates whose test loss is within {WINDOW_NATS:g} nats of an arm’s own best: {listed}."
    widest = [f"{name} over {in_octaves(spans[name])}" for name in order[:2] if spans[name]]
    word = "No arm completed a run at any learning rate."
    if widest:
        widest[0] += " of the learning rate"
        word = f"The loss stays within {WINDOW_NATS:g} nats of an arm’s own best: {', '.join(widest)}."
    return {"judged": "undecided", "word": word, "text": text}


S = TypeVar("S", bound=Mapping[str, Any])  # a `Sweep`


def rules_among(sweeps: Mapping[str, S]) -> dict[str, S]:
    """Return the sweeps over δ* of arms that are measured by another one's: rules by which δ moves."""
    return {name: sweep for name, sweep in sweeps.items() if sweep.get("yardstick") not in (None, name)}


def largest_regrets(
    regrets: Mapping[str, float | None], arms: Mapping[str, Arm]
) -> dict[bool, tuple[str, float]]:
    """Return, with EBC and without, the arm with the largest known regret, and that."""
    known = {name: x for name, x in regrets.items() if x is not None}
    rising = sorted(known, key=lambda name: known[name])
    return {bool(arms[name]["ebc"]): (name, known[name]) for name in rising}


def regrets_of(track: SuiteTrack) -> dict[str, float | None]:
    """Return the mean regret of each arm of a transfer that keeps the settings of another size, None if
    unknown."""
    copied = [name for size in track["transfer"] for name in size["kept"]]
    differences = {name: track["arms"][name]["difference"] for name in copied}
    return {name: difference["mean"] if difference else None for name, difference in differences.items()}


def _start_answer(rules: Mapping[str, Sweep]) -> InWords:
    """Name, of a suite that sets rules for δ against the fixed one, those that forget where they started."""
    good = [name for name, rule in rules.items() if rule["every_start"]]
    worst = {
        n: "a start diverged" if rule["worst"] is None else signed(rule["worst"], 3)
        for n, rule in rules.items()
    }
    text = (
        "Test loss from each rule’s worst start, minus that of the best fixed δ* of its length, in nats: "
        f"{'; '.join(f'{n} {regret}' for n, regret in worst.items())}. At most {SAME_NATS:g} needs no tuning."
    )
    who = _first_few(good) if good else f"None of {plural(len(rules), 'rule')}"
    if len(good) == len(rules) > 1:
        who = f"All {len(rules)} rules"
    ends = "end" if len(good) > 1 else "ends"
    word = f"{who} {ends} within {SAME_NATS:g} nats of a tuned δ* from every start."
    return {"judged": "undecided" if good else "misses", "word": word, "text": text}


def _transfer_answer(track: SuiteTrack) -> InWords:
    """List the regrets of a suite that carries settings to other sizes, and the largest of each kind."""
    regrets = regrets_of(track)
    listed = "; ".join(f"{n} {NOTHING if x is None else signed(x, 3)}" for n, x in regrets.items())
    worst = largest_regrets(regrets, track["arms"])
    kinds = {True: " with EBC", False: " without EBC"}
    largest = [
        f"{signed(worst[ebc][1], 3)} nats{kind * (len(worst) > 1)}"
        for ebc, kind in kinds.items()
        if ebc in worst
    ]
    word = f"Settings kept from another size cost at most {' and '.join(largest) or 'an unknown amount'}."
    text = (
        f"Test loss with the settings of the usual size, minus that of a rate tuned again, in nats: {listed}."
    )
    return {"judged": "undecided", "word": word, "text": text}


# the end of a run's name (identity.tail_of), without its first _ -> what it says; a model of one's own aside,
# which may be called like anything
TAILS = {name[1:]: tail for name, tail in tails_of_choices().items() if name != "_custom"}


# -- an arm in words -----------------------------------------------------------------------------------------


def role(name: str) -> str:
    """A role in words: `EBC at ×8` of `ebc_x8`."""
    kind, _, scale = name.rpartition("_x")
    return f"{ROLES_AT_RATES[kind]} ×{scale}" if kind in ROLES_AT_RATES else ROLES.get(name, name)


def short(name: str, arm: Mapping[str, Any]) -> str:
    """An arm as a label: `EBC ×8`, `plain ×8, control’s schedule`; only what departs from the study's own
    settings is named."""
    text = f"{'EBC' if arm['ebc'] else 'plain'} ×{arm['lr_scale']:g}"
    first = arm["roles"][0]
    if first in ("baseline", "control"):
        return f"{text} ({ROLES[first]})"
    kind = first.rpartition("_x")[0]
    if kind == "control":
        return f"{text}, control’s schedule"
    if kind == "ebc" or first == "ebc_chosen":
        return text
    return text + "".join(f", {schedule}" for schedule in schedules_of(name, arm))


def schedules_of(name: str, arm: Mapping[str, Any], *, title: bool = False) -> Iterator[str]:
    """The schedules of an arm as its decision records them, and of what else is no default what its name says
    beside its track: an optimizer of one's own may be called like a schedule."""
    rest = name.removeprefix(f"{arm['track']}_")
    if "lr_schedule" in arm:
        recorded = SCHEDULES.get(arm["delta_schedule"]), LR_TAILS.get(arm["lr_schedule"])
        yield from (_said(tail, title) for tail in recorded if tail and tail.words)
        warmup = arm["warmup_steps"]
        of_schedules = {tail.name[1:] for tail in (*SCHEDULES.values(), *LR_TAILS.values())}
        rest = "_".join(part for part in _parts(rest) if part in TAILS.keys() - of_schedules)
        if warmup is not None and warmup != LRScheduleConfig().warmup_steps:
            rest = f"w{warmup}_{rest}"
    yield from schedules(rest, title=title)


def _parts(name: str) -> list[str]:
    return re.findall(r"mint8_linear|[^_]+", name)


def _said(tail: Tail, title: bool) -> str:
    return tail.words if title or not tail.label else tail.label


def schedules(name: str, *, title: bool = False) -> Iterator[str]:
    """Say what the end of a run's or an arm's name means, `w100`, `w0` and `e0p6` too; at length in a
    `title`."""
    for part in _parts(name):
        if part in TAILS:
            yield _said(TAILS[part], title)
        elif re.fullmatch(r"w\d+", part):
            yield "no warm-up" if part == "w0" else f"{part[1:]} steps of warm-up"
        elif re.fullmatch(r"e\d(p\d+)?", part):
            yield f"decay over the last {100 * float(part[1:].replace('p', '.')):.3g}%"


def low_bit(config: RunConfig) -> str:
    """What a configuration has in few levels, and its batches and policy, where they are not the defaults."""
    parts = (QuantizerConfig, PartitionConfig, PolicyConfig)
    return ", ".join(tail.words for part in parts for tail in part.from_run(config).tail())


def model(config: RunConfig) -> str:
    """What a configuration trains, with its sizes."""
    m, ebm, decoder = config.model, config.ebm, config.decoder
    blocks = f"{plural(m.blocks, 'block')}, width {m.width}"
    name = ModelConfig.words.get(m.name, m.name.upper())
    if config.workload.name == "images":
        return f"{name}, {blocks}"
    if config.workload.name == "gpt":
        return f"{name}, {blocks}, context {m.context}"
    splats = f"up to {plural(ebm.splats, 'splat')}, {ebm.neighbours} of them on a state" if ebm.splats else ""
    window = f"a window of {plural(ebm.window, 'token')}"
    encoder = window if config.encoder.name == "window" else f"transformer blocks ({blocks})"
    experts = plural(decoder.experts, "expert")
    mixture = f"{experts} of {round(ebm.hidden * decoder.hidden_scale)} features, {decoder.active} active"
    decodes = mixture if decoder.name == "moe" else f"transformer blocks ({blocks})"
    sizes = [f"n = {ebm.n}", splats or "no splats", f"encoder: {encoder}", f"decoder: {decodes}"]
    return f"energy-based on the sphere; {'; '.join(sizes)}; context {m.context}"


def tokens(config: RunConfig) -> str:
    """What the text is cut into, or images, in the plural."""
    if config.workload.name == "images":
        return "images"
    kinds = {"bpe": f"byte pairs of the training split, {config.tokens.size:,} at the most"}
    usual = {"characters": "characters", "bytes": "bytes", "gpt2": "GPT-2’s"}
    return (usual | kinds)[config.tokens.name]


def words(name: str, arm: Mapping[str, Any]) -> str:
    """An arm in plain words, for a title; a suite's arms bring their own."""
    if "about" in arm:
        return f"{name}: {arm['about']}" if arm["about"] != name else name
    rate = (
        "its best constant rate" if arm["lr_scale"] == 1 else f"{arm['lr_scale']:g}× the best constant rate"
    )
    text = f"{optimizer(arm['track'])} {'with EBC' if arm['ebc'] else 'without EBC'}, {rate}"
    text += "".join(f", {schedule}" for schedule in schedules_of(name, arm, title=True))
    return text + {"baseline": " (the baseline)", "control": " (the fair control)"}.get(arm["roles"][0], "")


def explained(text: str) -> dict[str, str]:
    """Return the terms that a text uses, with what they mean."""
    return {term: what for term, what in TERMS.items() if re.search(rf"(?<!\w){re.escape(term)}(?!\w)", text)}

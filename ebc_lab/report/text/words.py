"""Words that page, terminal, papers and pictures share: numbers that a person can read, terms and what they
mean, and the names of arms."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ebc_lab.config.errors import clock as clock  # also the templates' filter
from ebc_lab.config.errors import count
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
from ebc_lab.records.decisions import SuiteTrack
from ebc_lab.records.spec import optimizer as optimizer
from ebc_lab.records.spec import tracks_in_words as tracks_in_words
from ebc_lab.study.stages.statistics import WINDOW_NATS
from ebc_lab.study.stages.suite import tuned_arms as tuned_arms
from ebc_lab.study.stages.verdict import verdict_of as verdict_of

NOTHING = "–"
plural = count  # also a filter of the templates
QUESTION = "What does EBC buy, and what does it not?"
QUESTION_WITHOUT_WINDOW = "Does bounding how far each update may move the model’s predictions help?"
METHOD_OF_A_SUITE = (
    "Every arm is the same model on the same text. Those that have settings of their own to be tuned are "
    "tuned alike, by validation loss; then each is trained over fresh seeds, and two arms are compared seed "
    "by seed by their test loss, which no choice has seen."
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
DELTA_DRIFT = (  # where the earlier study's rule moved δ; docs/findings.md says the same
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
EBC_TERMS = ("δ*", "natural KL", "c", "clip rate", "headroom", "LR inert")  # terms of studies that have EBC
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


def has_ebc(config: Mapping[str, Any]) -> bool:
    """Return whether anything in a study has EBC, by its recorded settings; else no page explains it."""
    if {"calibrate", "controller_search", "lr_scale", "finals"} & set(config["study"]["stages"]):
        return True
    arms = ((config.get("ablation") or {}).get("arms") or {}).values()
    return any(((arm.get("settings") or {}).get("stabilizer") or {}).get("name") == "ebc" for arm in arms)


NOISE_ALONE = (
    "How much luck there is in a loss: one optimizer is trained over a short grid of rates, and its best run "
    "again under other seeds. σ is the spread of their losses; later margins are measured by it. The arms "
    "that the study asks about are not trained here: their rates come from the tuning."
)


def sweep_in_words(ebc: bool, control: bool) -> tuple[str, str]:
    """Return title and purpose of the stage of the best rate; what the study lacks is not named."""
    luck = "how much luck there is in a loss (σ, the spread over replicate seeds)"
    parts = ["which optimizer is best, and at which constant learning rate", luck]
    parts += ["how far predictions move by themselves (the natural KL)"] * ebc
    fair = "how good the same optimizer gets on a schedule whose peak, warm-up and shape are tuned"
    parts += [f"{fair} (the fair control)"] * control
    about = f"{', '.join(parts[:-1])}, and {parts[-1]}."
    title = f"Learning rate{', noise and a fair control' if control else ' and noise'}"
    return title, f"Without EBC: {about}" if ebc else capital(about)


SWEEP_FIGURES = {"natural KL": "ebc", "fair control": "control"}  # of that stage, and what they are for


def explanation(ebc: bool, finals: bool, said: str) -> dict[str, Any]:
    """Return what a page says was done, `method`, and what the `terms` mean that its text, `said`, uses."""
    terms = {term: what for term, what in explained(said).items() if ebc or term not in EBC_TERMS}
    if finals:
        return {"method": METHOD, "terms": terms}
    return {"method": (*METHOD[:1], METHOD_OF_A_SUITE) if ebc else (METHOD_OF_A_SUITE,), "terms": terms}


# -- numbers -------------------------------------------------------------------------------------------------


def fixed(x: float | None, digits: int = 4) -> str:
    """Return a figure with this many decimals: losses have four."""
    return NOTHING if x is None or not math.isfinite(x) else f"{x:z.{digits}f}".replace("-", "−")


def format_share(x: float | None) -> str:
    """Return a share of a whole, such as c, with two decimals, or with one digit where these would be 0."""
    return f"{x:.1g}" if x is not None and 0 < x < 0.005 else fixed(x, 2)


def capital(text: str) -> str:
    """Return the text with a capital first letter."""
    return text[:1].upper() + text[1:]


def signed(x: float | None, digits: int = 4) -> str:
    return NOTHING if x is None or not math.isfinite(x) else f"{x:+z.{digits}f}".replace("-", "−")


def size(count: float | None) -> str:
    """Return a number of bytes in the unit that suits it."""
    if count is None:
        return NOTHING
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


def brackets(
    low: float | None, high: float | None, form: Callable[[float | None], str], least: str = "−∞"
) -> str:
    """Return `[3.2775, 3.2790]`, `(−∞, 3.2790]` without a lower end, or nothing. `least`: in place of −∞."""
    if low is None and high is None:
        return NOTHING
    left = f"({least}" if low is None else f"[{form(low)}"
    return f"{left}, {'∞)' if high is None else f'{form(high)}]'}"


def breakable(name: str) -> Any:
    """Return a long name of ours that may break after its underscores."""
    from markupsafe import Markup, escape

    return Markup("_<wbr>").join(escape(part) for part in name.split("_"))


# -- sentences -----------------------------------------------------------------------------------------------


def mine_of(track: SuiteTrack) -> list[str]:
    """Return the arms that a suite asks about; none of a suite that asks something else."""
    return [label for label in track.get("mine", ()) if label in track["arms"]]


def asked(track: SuiteTrack) -> list[str]:
    """Return the arms that a suite asks about and has compared with others."""
    compared = {label for label, answer in track["answers"].items() if answer["rival"]}
    return [label for label in mine_of(track) if label in compared]


BADGES = {"better": "pass", "level": "pass", "worse": "fail", "undecided": "undecided"}


def rules_among(sweeps: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the sweeps over δ* of arms that are measured by another one's: rules by which δ moves."""
    return {name: sweep for name, sweep in sweeps.items() if sweep.get("yardstick") not in (None, name)}


# the end of a run's name (identity.tail_of), without its first _ -> what it says; a model of one's own aside,
# which may be called like anything
TAILS = {name[1:]: tail for name, tail in tails_of_choices().items() if name != "_custom"}


# -- an arm in words -----------------------------------------------------------------------------------------


def role(name: str) -> str:
    """Return a role in words, such as `EBC at ×8` for `ebc_x8`."""
    kind, _, scale = name.rpartition("_x")
    return f"{ROLES_AT_RATES[kind]} ×{scale}" if kind in ROLES_AT_RATES else ROLES.get(name, name)


def arm_label(name: str, arm: Mapping[str, Any]) -> str:
    """Return an arm's label: a suite's own name for it; in the finals `EBC ×8` or `plain ×8, control’s
    schedule`, which names only what departs from the study's own settings."""
    if "about" in arm or "roles" not in arm:
        return name
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
    """Yield an arm's schedules as its decision records them, and whatever else in its name is no default. The
    track is left out: an optimizer of one's own may be called like a schedule."""
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
    """Yield what the parts of a name's end mean, also `w100`, `w0` and `e0p6`; at length in a `title`."""
    for part in _parts(name):
        if part in TAILS:
            yield _said(TAILS[part], title)
        elif re.fullmatch(r"w\d+", part):
            yield "no warm-up" if part == "w0" else f"{part[1:]} steps of warm-up"
        elif re.fullmatch(r"e\d(p\d+)?", part):
            yield f"decay over the last {100 * float(part[1:].replace('p', '.')):.3g}%"


def low_bit(config: RunConfig) -> str:
    """Return what a configuration has in few levels, its batches and its policy; empty for defaults."""
    parts = (QuantizerConfig, PartitionConfig, PolicyConfig)
    return ", ".join(tail.words for part in parts for tail in part.from_run(config).tail())


def model(config: RunConfig) -> str:
    """Return what a configuration trains, with its sizes."""
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


def batch(config: RunConfig) -> str:
    """Return what a step reads, such as `8 × 64 tokens`."""
    images = config.workload.name == "images"
    return f"{config.batch_size} {'images' if images else f'× {config.model.context} tokens'}"


def tokens(config: RunConfig) -> str:
    """Return what the text is cut into, in the plural; of images, `images`."""
    if config.workload.name == "images":
        return "images"
    kinds = {"bpe": f"byte pairs of the training split, {config.tokens.size:,} at the most"}
    usual = {"characters": "characters", "bytes": "bytes", "gpt2": "GPT-2’s"}
    return (usual | kinds)[config.tokens.name]


def arm_title(name: str, arm: Mapping[str, Any]) -> str:
    """Return an arm in plain words, for a title; a suite's arms bring their own."""
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

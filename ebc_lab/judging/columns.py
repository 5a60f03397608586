"""Which column of somebody's rows is what: as asked, else by its name and content, and said in a line each.

Where two columns fit equally well, they are asked for by name. A training loss is judged only if it is asked
for: `loss` by itself may be one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from shlex import quote
from typing import Any

import numpy as np
import pandas as pd

from ebc_lab.config.errors import UserError, any_of, nearest, require, shown, visible

from .asked import Asked
from .readers.names import split_names
from .readers.reader import FIRST_LOOK, Source
from .record import Taken

ARM_NAMES = (  # of equal weight within a line; those further down only where none of these is there
    ("arm", "optimizer", "optim", "opt", "method", "algorithm", "algo", "variant", "treatment", "recipe"),
    ("optimizer name", "optimizer type", "optim name", "experiment", "condition", "study"),
    ("group", "run group"),
    ("name", "run name", "run"),
    ("folder1",),
    ("folder2",),
    ("folder3",),
    ("file",),
)
SEED_NAMES = (
    ("seed",),
    ("random seed", "rng seed", "manual seed", "torch seed", "random state"),
    ("data seed",),
)
STEP_NAMES = (
    ("step", "global step", "iteration", "iter", "iterations", "training step", "train step", "update"),
    ("epoch",),
    ("tokens", "tokens seen", "samples", "examples"),
)
PLANNED_NAMES = (
    ("planned", "planned steps", "max steps", "total steps", "num steps", "n steps", "num iterations"),
    ("train steps", "training steps", "num train steps", "max iters", "steps"),
)
EPOCHS_PLANNED = (("epochs", "max epochs", "num epochs", "num train epochs"),)
RATE_NAMES = (("lr", "learning rate"), ("max lr", "peak lr", "base lr", "optimizer lr", "optim lr", "opt lr"))
RATES = {name for names in RATE_NAMES for name in names}
RUN_NAMES = (("run", "run id", "run name", "trial"), ("name", "id"))
RUN_WORDS = {"name", "run name", "run", "run id", "file", "trial", "id"}
STARTED_NAMES = (("started", "start time", "created", "created at"),)
NO_LOSS = (SEED_NAMES, STEP_NAMES, PLANNED_NAMES, EPOCHS_PLANNED, RATE_NAMES, RUN_NAMES, STARTED_NAMES)
LOSSES = {"loss", "nll", "ce", "xent", "crossentropy", "bpb", "bpc", "perplexity", "ppl"}
LOSSES |= {"mse", "mae", "rmse"}
ERRORS = {"error", "err", "wer", "cer", "fid", "regret"}
SCORES = {"acc", "accuracy", "f1", "auc", "auroc", "bleu", "rouge", "score", "iou", "reward", "return", "map"}
SCORES |= {"top1", "top5", "r2", "precision", "recall"}
CHOOSING = frozenset({"val", "valid", "validation", "eval", "evaluation", "dev", "v"})
TESTING = frozenset({"test", "heldout", "holdout"})
TRAINING = {"train", "training", "tr"}
SETTING_WORDS = re.compile(
    r"\b(lr|learning rate|weight decay|wd|momentum|beta\d?|betas|eps|epsilon|warmup|batch|dropout|schedule|"
    r"scheduler|decay|clip|width|depth|layers?|dim|heads?|model|dataset|rank|damping|hidden|temperature)\b"
)
DETAILS = {"state", "notes", "user", "tags", "runtime", "sweep", "hostname", "commit"}
DETAILS |= {"git", "url", "id", "path", "stage", "phase", "group", "job"}


@dataclass(frozen=True)
class Columns:
    """Columns by role; an empty name where the source has none. `taken`: how each was found, in words."""

    loss: str
    better: str
    arm: str = ""
    seed: str = ""
    step: str = ""
    run: str = ""
    planned: str = ""
    started: str = ""
    choose: str = ""
    settings: tuple[str, ...] = ()
    taken: tuple[Taken, ...] = ()


def plain(name: str) -> str:
    """Return a column's name in words, as it is compared: `optimizer.name` and `Optimizer_Name` are one."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", str(name))
    return " ".join(re.split(r"[^a-z0-9]+", spaced.lower())).strip()


def short(name: str) -> str:
    """Return a column's name in words without the place where a tracker keeps it: `config/lr` is `lr`."""
    return re.sub(r"^(config|params?|hparams|hyperparameters|args|user attrs|trainer) (?=.)", "", plain(name))


def choose_columns(source: Source, asked: Asked) -> tuple[Source, Columns]:
    """Return the source, with a column for the arm where it has to be made from names, and what is what.

    Raises UserError: a column that was asked for is not there, or it cannot be told which is what.
    """
    search = _Search(source)
    _refuse_two_roles(asked)
    step = search.find("step", asked.step, STEP_NAMES)
    loss, choose, better = _losses(search, asked)
    seed = search.find("seed", asked.seed, SEED_NAMES)
    lengths = EPOCHS_PLANNED if plain(step) == "epoch" else PLANNED_NAMES
    if not step:  # there `n_steps` is a setting like others, and `max_steps` is not
        lengths = (("planned", "planned steps", "max steps", "total steps"),)
    words = {name for name in search.names if not search.numeric(name)}
    planned = search.find("planned", asked.planned, lengths, apart={step, *words})
    started = search.find("started", "", STARTED_NAMES)
    run = search.find("run", asked.run, RUN_NAMES, apart={asked.arm} - {""})
    search.used |= {loss, choose, seed, step, planned, started}
    source, arm = _arm(search, asked, run, seed)
    seed = seed or search.find("seed", "", SEED_NAMES[:1])
    rate = search.find("lr", asked.lr, RATE_NAMES, apart={arm})
    search.used |= {arm, run}
    settings = _settings(search, asked, rate)
    columns = Columns(loss, better, arm, seed, step, run if run != arm else "", planned, started, choose)
    return source, replace(columns, settings=settings, taken=tuple(search.taken))


def _refuse_two_roles(asked: Asked) -> None:
    """Raise UserError where one column is asked for as two things that it cannot be at once."""
    named = [(role, getattr(asked, role)) for role in ("arm", "seed", "step", "loss", "planned")]
    named += [("setting", column) for column in dict.fromkeys(asked.settings)]
    roles: dict[str, str] = {}
    for role, column in named:
        other = roles.setdefault(column, role) if column else role
        require(other == role, f"--{other} and --{role} both name column {column}: it can be one of them.")


class _Search:
    """The columns of a source, and which of them have a role already."""

    def __init__(self, source: Source):
        self.source = source
        self.frame = source.frame
        self.names = [str(name) for name in source.frame.columns]
        self.used: set[str] = set()
        self.taken: list[Taken] = []

    def take(self, role: str, column: str, how: str) -> str:
        """Note what a column was taken for, and return its name."""
        self.taken.append({"role": role, "column": column, "sentence": f"{role}: {how}"})
        return column

    def named(self, role: str, column: str, *, note: bool = True) -> str:
        """Return a column that was asked for. Raises UserError where there is none of this name."""
        if column not in self.names:
            near = nearest(column, self.names)
            raise UserError(
                f"there is no column {shown(column)}, which --{role} names{near}: "
                f"{self.source.what} has {any_of(self.names)}."
            )
        return self.take(role, column, f"column {column}, as asked") if note else column

    def find(self, role: str, asked: str, names: Sequence[Sequence[str]], apart: Iterable[str] = ()) -> str:
        """Return the column with a role: the one asked for, the one that the format knows, or the first by
        its name that says anything; an empty name where there is none.

        Raises UserError where two fit equally well."""
        if asked:
            return self.named(role, asked)
        if known := self.source.roles.get(role, ""):
            return self.take(role, known, f"column {known}, by the format")
        free = [name for name in self.names if name not in {*self.used, *apart}]
        for tier in names:
            there = [n for n in free if plain(n) in tier] or [n for n in free if short(n) in tier]
            there = [n for n in there if self.says_anything(n)]
            if len(there) > 1:
                there = [n for n in there if self.varies(n)] or there[:1]
            if len(there) > 1 and not self.agree(there):
                raise _several(role, there)
            if there:
                return self.take(role, there[0], f"column {there[0]}, by its name")
        return ""

    def says_anything(self, name: str) -> bool:
        """Return whether a column has a value."""
        values = self.frame[name]
        return bool(values.iloc[:FIRST_LOOK].notna().any() or values.notna().any())

    def varies(self, name: str) -> bool:
        """Return whether a column has more than one value."""
        values = self.frame[name]
        near = values.iloc[:FIRST_LOOK]
        return bool((near != near.iloc[0]).any() or (values != near.iloc[0]).any()) if len(values) else False

    def agree(self, names: Sequence[str]) -> bool:
        """Return whether columns divide the rows alike, so that it does not matter which is taken."""
        first = self.frame[names[0]].astype("category").cat.codes
        return all(
            int(first.groupby(self.frame[name], observed=True).nunique().max()) == 1
            and int(self.frame[name].nunique()) == int(first.nunique())
            for name in names[1:]
        )

    def same(self, names: Sequence[str]) -> bool:
        """Return whether columns hold the same values."""
        return all(self.frame[names[0]].equals(self.frame[name]) for name in names[1:])

    def measures(self, name: str) -> bool:
        """Return whether a column holds numbers, or text that is mostly numbers or percentages."""
        values = self.frame[name]
        if self.numeric(name) or isinstance(values.dtype, pd.CategoricalDtype) or values.dtype.kind == "b":
            return self.numeric(name)
        text = values.iloc[:FIRST_LOOK].dropna().astype(str).str.strip().str.rstrip("%")
        text = text[text != ""].str.replace(",", ".", n=1, regex=False)
        return len(text) > 0 and bool(pd.to_numeric(text, errors="coerce").notna().mean() >= 0.5)

    def numeric(self, name: str) -> bool:
        """Return whether a column holds numbers and nothing else."""
        return self.frame[name].dtype.kind in "iuf"


def _several(role: str, names: Sequence[str]) -> UserError:
    return UserError(f"{any_of(names)} could each be the {role}: say which with --{role} {quote(names[0])}.")


# -- the loss ------------------------------------------------------------------------------------------------


def _losses(search: _Search, asked: Asked) -> tuple[str, str, str]:
    """Return the judged column, the one that chooses configurations (empty: the same), and what is better."""
    choose = search.named("choose", asked.choose, note=False) if asked.choose else ""
    loss = search.find("loss", asked.loss, ())
    if not loss:
        loss, other = _guess_loss(search)
        choose = choose or other
    better, why = direction_of(loss), "by its name"
    if search.source.better:
        better, why = search.source.better, "by the format"
    if asked.better:
        better, why = asked.better, "as asked"
    require(
        bool(better),
        f"whether a lower or a higher {loss} is better cannot be told from its name: say --better lower or "
        "--better higher.",
    )
    search.take("better", loss, f"{better} {loss} is better, {why}")
    if choose:
        known = direction_of(choose)
        how = f"{known or better} is better, {'by its name' if known else f'as of {loss}'}"
        search.take(
            "choose", choose, f"column {choose} chooses an arm's configuration ({how}); {loss} judges it"
        )
    if _percent(search, loss):
        search.take("unit", loss, f"{loss} is in percent")
    return loss, choose, better


def as_text(value: Any) -> str | None:
    """Return a value as text on one line, a whole number without its point, and what would command a terminal
    as escapes; None for a blank."""
    if value is None or value is pd.NA or value != value or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, float | np.floating) and value.is_integer() and abs(float(value)) < 2**53:
        return str(int(value))
    return visible(" ".join(str(value).split())) or None


def rows_where(source: Source, where: Sequence[str]) -> Source:
    """Return the rows of a source that have all of these `COLUMN=VALUE`.

    Raises UserError: there is no such column, or no row with this value."""
    frame, notes = source.frame, list(source.notes)
    for pair in where:
        column, _, value = pair.partition("=")
        known = [str(name) for name in frame.columns]
        require(
            column in known,
            f"--where {pair} names no column of {source.what}{nearest(column, known)}: write COLUMN=VALUE, "
            f"with one of {any_of(known)}.",
        )
        codes, values = pd.factorize(frame[column])
        texts = [as_text(one) for one in values]
        require(
            value in texts,
            f"no row of {source.what} has {column} = {shown(value)}: there are "
            f"{any_of([text or '' for text in texts])}.",
        )
        kept = codes == texts.index(value)
        notes.append(f"Only the rows with {column} = {value} were taken, {kept.sum():,} of {len(frame):,}.")
        frame = frame[kept].reset_index(drop=True)
    return replace(source, frame=frame, notes=notes) if where else source


def direction_of(column: str) -> str:
    """Return whether a `lower` or a `higher` value of a column is better, by its name; empty if unknown."""
    words = plain(column).split()
    if any(word in LOSSES | ERRORS or word.endswith(("loss", "error")) for word in words):
        return "lower"
    scored = any(word in SCORES or word.endswith(("acc", "accuracy", "score", "reward")) for word in words)
    return "higher" if scored else ""


def _guess_loss(search: _Search) -> tuple[str, str]:
    """Return the loss by its name: of a test split where there is one, chosen by the validation split's."""
    metrics = {n: set(plain(n).split()) for n in search.names if search.measures(n)}
    chosen = {}
    for split in (TESTING, CHOOSING):
        for kinds in (LOSSES - {"perplexity", "ppl"}, LOSSES, ERRORS, SCORES):
            there = [n for n, words in metrics.items() if words & split and words & kinds]
            if len(there) > 1 and not search.same(there):
                raise _several("loss", there)
            if there:
                chosen[split] = there[0]
                break
    if chosen:
        loss, *choosing = chosen.values()
        return search.take("loss", loss, f"column {loss}, by its name"), choosing[0] if choosing else ""
    training = [n for n, words in metrics.items() if words & (LOSSES | SCORES | ERRORS | {"value"})]
    known = {n for names in NO_LOSS for tier in names for n in tier}
    numbers = [n for n in search.names if search.measures(n) and plain(n) not in known]
    text = [n for n in search.names if search.frame[n].dtype.kind != "b"]
    worded = [n for n in text if set(plain(n).split()) & (CHOOSING | TESTING) and _metric(n)]
    if len(worded) == 1:  # what it holds besides numbers is said when they are read
        return search.take("loss", worded[0], f"column {worded[0]}, by its name"), ""
    if training:
        raise UserError(
            f"no column is a validation or test loss by its name; {any_of(training)} may be of training: "
            f"say --loss {quote(training[0])} if that is what you want judged."
        )
    raise UserError(
        f"no column of {search.source.what} is a loss by its name: say which with --loss"
        + (f", among {any_of(numbers)}." if numbers else "; none of its columns holds numbers.")
    )


def _percent(search: _Search, name: str) -> bool:
    """Return whether a column of text holds percentages."""
    some = search.frame[name].iloc[:FIRST_LOOK].dropna().head(20).astype(str)
    return len(some) > 0 and bool(some.str.fullmatch(r"\s*[-+]?[\d.]+\s*%\s*").all())


# -- the arm -------------------------------------------------------------------------------------------------


def _arm(search: _Search, asked: Asked, run: str, seed: str) -> tuple[Source, str]:
    """Return source and column of the arm; where names of runs or files hold more, one made from them."""
    # numbers tell runs apart, not arms
    numbered = {n for n in search.names if plain(n) in RUN_WORDS and search.numeric(n)}
    arm = search.find("arm", asked.arm, ARM_NAMES, apart={seed, *numbered})
    if not arm:
        raise UserError(
            f"no column of {search.source.what} names the arm (the optimizer or method): say which with "
            f"--arm, among {any_of(search.names)}."
        )
    if asked.arm or plain(arm) not in RUN_WORDS:
        return search.source, arm
    names = search.frame[arm].astype("category")
    split = split_names([str(name) for name in names.cat.categories])
    parted = dict(zip(names.cat.categories, split, strict=True))
    rests = {rest for rest, _ in parted.values()}
    if len(rests) == len(parted) and len(parted) > 2 and not run:
        require(
            len(parted) <= 50,
            f"{len(parted)} names in column {arm} and no arm in them: say with --arm which column names it.",
        )
    frame = search.frame.copy(deep=False)
    frame["arm"] = names.map({name: rest for name, (rest, _) in parted.items()})
    keys = dict.fromkeys(key for _, settings in parted.values() for key in settings)
    for key in [key for key in keys if key not in set(map(plain, search.names))]:
        frame[key] = names.map({name: settings.get(key) for name, (_, settings) in parted.items()})
    search.taken[-1]["sentence"] = f"arm: from column {arm}, without seed and settings in the names"
    search.frame = frame
    search.names = [str(name) for name in frame.columns]
    search.source = replace(search.source, frame=frame)
    return search.source, "arm"


# -- settings ------------------------------------------------------------------------------------------------


def _settings(search: _Search, asked: Asked, rate: str) -> tuple[str, ...]:
    """Return the columns that make a run's configuration: those asked for, else those that the format keeps
    as such, or whose names are those of settings. `runs_of` drops what varies within a run."""
    if asked.settings:
        chosen = [search.named("setting", name) for name in asked.settings]
        return tuple(dict.fromkeys([*([rate] if rate else []), *chosen]))
    known = list(search.source.settings)
    free = [name for name in search.names if name not in search.used and name != rate]
    named = [n for n in free if SETTING_WORDS.search(plain(n))]
    candidates = [n for n in (known or named) if n in free and not _metric(n)]
    guessed = [n for n in candidates if search.varies(n) and not _detail(n)]
    found = [*([rate] if rate and search.varies(rate) else []), *guessed]
    rest = [n for n in free if n not in (*found, "source") and search.varies(n)]
    if rest:
        search.take("not used", ", ".join(rest), ", ".join(rest))
    return tuple(dict.fromkeys(found))


def _detail(name: str) -> bool:
    """Return whether a column tells runs apart and is no setting: a seed, a stage, where a run lies."""
    words = plain(name).split()
    return "seed" in words or words == ["job", "type"] or (bool(words) and words[-1] in DETAILS)


def _metric(name: str) -> bool:
    """Return whether a column is a measurement by its name, and no setting."""
    return bool(set(plain(name).split()) & (LOSSES | SCORES | ERRORS | TRAINING))

"""What the lab knows of one part of a run, a group of `conf/`, in one place: `config/parts/NAME.py`.

Identity, checks, names, labels and docs/settings.md ask the parts; nothing else knows what a part's settings
mean. What a part does in a run is its mirror, `components/NAME.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from statistics import fmean
from typing import Any, Generic, NamedTuple, TypeVar

S = TypeVar("S")
LEVEL, EXPERT = "<σ>", "<i>"  # in the name of a column: a noise level, as `0p05`, and the number of an expert


class Mode(Enum):
    """What a run as a whole may be; the value is what asks for it."""

    EXACT = "determinism=verity"
    SEVERAL_PROCESSES = "launcher.processes_per_run={}"
    IN_BACKWARD = "memory.hooks"
    EBM = "workload=ebm"


class Unfit(NamedTuple):
    """A setting that does not go with a mode, and why, or what to choose instead."""

    setting: str
    remedy: str


class Need(NamedTuple):
    """A library that a setting needs in training and that the package does not bring: `extra` of it does."""

    setting: str
    library: str
    extra: str
    instead: str = ""  # what else can be chosen

    @property
    def module(self) -> str:
        """Return what is imported of it."""
        return {"scikit-learn": "sklearn"}.get(self.library, self.library)

    def __str__(self) -> str:
        instead = f", or {self.instead}" if self.instead else ""
        how = f"pip install 'ebc-lab[{self.extra}]'{instead}"
        return f"{self.setting} needs the library {self.library}: {how}."


class Tail(NamedTuple):
    """How a choice shows at the end of a run's name, in a title and in a label."""

    name: str  # "_ternary"
    words: str  # "ternary weights"
    label: str = ""  # where it is shorter than the words


@dataclass(frozen=True)
class Figure:
    """A figure that a part adds to result.json, declared once: decisions, the CSV files, docs/files.md and
    the tables of arms have it from here.

    Attributes:
        key: in result.json, decisions.json and ablation.csv.
        unit, meaning: as docs/files.md prints them.
        title, short: of its column in a table, and where that is narrow; no title: it is in no table.
        form: how a table writes it, one of `report.text.arms.FORMS`.
        beside: it is in the table of all arms too: beside the `loss`, or at the end, of the `steps`.
        places: where the part's own table has it: terminal, paper, page.
        of_steps: it is the median of the column of this name in steps.csv.
        of_run: finds it in a result; by default under its key.
        of_arm: an arm's, from the results of its completed runs; by default the mean of those that have it.
        always: a decision has it also where no run does.
        averaged: whether the stage `ablation` makes an arm's of it at all.
    """

    key: str
    unit: str
    meaning: str
    title: str = ""
    short: str = ""
    form: str = "brief"
    beside: str = ""
    places: tuple[str, ...] = ("terminal", "paper", "page")
    of_steps: bool = False
    of_run: Callable[[Mapping[str, Any]], float | None] | None = None
    of_arm: Callable[[Sequence[Mapping[str, Any]]], float | None] | None = None
    always: bool = False
    averaged: bool = True

    def value(self, result: Mapping[str, Any]) -> float | None:
        """Return a run's figure, None where it has none."""
        value = self.of_run(result) if self.of_run else result.get(self.key)
        return None if value is None else float(value)

    def mean(self, completed: Sequence[Mapping[str, Any]]) -> float | None:
        """Return an arm's figure from its completed runs, None where none has it."""
        if self.of_arm:
            return self.of_arm(completed)
        values = [value for result in completed if (value := self.value(result)) is not None]
        return fmean(values) if values else None


@dataclass(frozen=True)
class Versions:
    """A suite's list of choices of a part under each of which every arm runs as well, paired with itself.

    `key`: in `ablation`; `noun`: what the choices are; `free`: the setting of the part that can still be set.
    """

    key: str
    noun: str
    free: str


@dataclass(frozen=True)
class Part(Generic[S]):
    """One group of settings of a run.

    Attributes:
        name: the field of `RunConfig`, and the folder of `conf/`.
        settings: the dataclass of its settings; each says by `only=` and `of=` which choices read it.
        neutral: whether it changes nothing: then it is no part of a run's identity.
        idle: settings that this combination does not read, beside what `only=` says.
        refuses: the contradictions inside the group, a sentence each.
        needs: the libraries that training needs beside the package's own. Only a process that trains asks
            for them: what was recorded with them is read without.
        unfit: what of it does not go with a mode.
        tail: what it adds to a run's name and label.
        words: choice -> what it is called in a sentence.
        libraries: choice -> the distribution whose code computes it, which then names the run too.
        read_by: the group and its choices that read this part at all.
        place: where it stands among the parts in a run's name, and at every turn of a step.
        clashes: what contradicts the settings of the run outside the group, a sentence each.
        warnings: what is allowed and means less than it seems, a sentence each.
        timed: whether a step costs more or less by it; else a measurement of time leaves it out.
        measured: what `ebc-lab bench` measures of it in a section of its own.
        columns: what it adds to steps.csv: name -> unit and meaning.
        evals: the same of evals.csv.
        figures: what it adds to result.json.
        table, note: title of the table of its figures in a report, and what they are.
        picture: what the picture of its own is called, which `report/pictures/NAME.py` draws.
        versions: how a suite runs its arms under each of several choices.
    """

    name: str
    settings: type[S]
    neutral: Callable[[S], bool] = lambda settings: False
    idle: Callable[[S], Iterable[str]] = lambda settings: ()
    refuses: Callable[[S], Iterable[str]] = lambda settings: ()
    needs: Callable[[S], Iterable[Need]] = lambda settings: ()
    unfit: Callable[[S, Mode], Unfit | None] = lambda settings, mode: None
    tail: Callable[[S], Iterable[Tail]] = lambda settings: ()
    words: Mapping[str, str] = field(default_factory=dict)
    libraries: Mapping[str, str] = field(default_factory=dict)
    read_by: tuple[str, tuple[str, ...]] | None = None
    place: int = 1000
    clashes: Callable[[S, Any], Iterable[str]] = lambda settings, run: ()
    warnings: Callable[[S, Any], Iterable[str]] = lambda settings, run: ()
    timed: bool = True
    measured: str = ""
    columns: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    evals: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    figures: tuple[Figure, ...] = ()
    table: str = ""
    note: str = ""
    picture: str = ""
    versions: Versions | None = None

    def of(self, run: Any) -> S:
        """Return the part's settings of a run."""
        settings: S = getattr(run, self.name)
        return settings


def is_own(settings: Any, known: Iterable[str]) -> bool:
    """Whether a part is a user's own under a name of its own."""
    return settings.target is not None and settings.name not in known

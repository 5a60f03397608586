"""What the lab knows of one part of a run, a group of `conf/`, in one place: `config/parts/NAME.py`.

Identity, checks, names, labels and docs/settings.md ask the parts; nothing else knows what a part's settings
mean. What a part does in a run is in its mirror, `components/NAME.py`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import fmean
from typing import Any, ClassVar, NamedTuple, Self, TypeVar, cast

Run = Any  # a RunConfig, which is made of the parts and therefore cannot be imported here
AnyRun = TypeVar("AnyRun")  # likewise, or what extends it
LEVEL, EXPERT = "<σ>", "<i>"  # in the name of a column: a noise level, as `0p05`, and the number of an expert


class Mode(Enum):
    """What a run as a whole may be; the value is what asks for it."""

    EXACT = "determinism=verity"
    SEVERAL_PROCESSES = "launcher.processes_per_run={}"
    IN_BACKWARD = "memory.hooks"
    EBM = "workload=ebm"


class Need(NamedTuple):
    """A library that a setting needs in training, and the `extra` of this package that brings it."""

    setting: str
    library: str
    extra: str
    instead: str = ""  # what else can be chosen

    @property
    def module(self) -> str:
        """Return the name under which the library is imported."""
        return {"scikit-learn": "sklearn"}.get(self.library, self.library)

    def __str__(self) -> str:
        instead = f", or {self.instead}" if self.instead else ""
        how = f"pip install 'ebc-lab[{self.extra}]'{instead}"
        return f"{self.setting} needs the library {self.library}: {how}."


class Tail(NamedTuple):
    """How a choice shows at the end of a run's name, in a title and in a label."""

    name: str  # "_ternary"
    words: str  # "ternary weights"
    label: str = ""  # for a label, where that is shorter than the words


class Head(NamedTuple):
    """The column of a figure in tables of arms."""

    title: str
    short: str = ""  # in a narrow table; empty: the title
    form: str = "brief"  # how values are written, one of `report.text.arms.FORMS`
    beside: str = ""  # `loss` or `steps`: it is in the table of all arms as well, beside that column
    places: tuple[str, ...] = ("terminal", "paper", "page")  # where the part's own table shows it


@dataclass(frozen=True)
class Figure:
    """A figure that a part adds to result.json. Decisions, the CSV files, docs/files.md and the tables of
    arms take everything about it from here."""

    key: str  # its name in result.json, decisions.json and ablation.csv
    unit: str
    meaning: str  # as docs/files.md prints it
    head: Head | None = None  # its column in tables; None: it is in none
    of_steps: bool = False  # whether it is the median of the column of this name in steps.csv
    # what finds it in a run's result; by default it is there under its key
    of_run: Callable[[Mapping[str, Any]], float | None] | None = None
    # what finds an arm's value from the results of its completed runs; by default their mean
    of_arm: Callable[[Sequence[Mapping[str, Any]]], float | None] | None = None
    in_every_arm: bool = False  # whether a decision has it even where no run does
    averaged: bool = True  # whether the stage `ablation` finds a value for an arm at all

    def value(self, result: Mapping[str, Any]) -> float | None:
        """Return the figure of a run, or None where its result has none."""
        value = self.of_run(result) if self.of_run else result.get(self.key)
        return None if value is None else float(value)

    def mean(self, completed: Sequence[Mapping[str, Any]]) -> float | None:
        """Return the figure of an arm with these completed runs, or None where none of them has it."""
        if self.of_arm:
            return self.of_arm(completed)
        values = [value for result in completed if (value := self.value(result)) is not None]
        return fmean(values) if values else None


class Versions(NamedTuple):
    """A list in a suite's settings: every arm also runs under each of these choices of a part, paired with
    itself."""

    key: str  # the name of the list, a setting of `ablation`
    noun: str  # what its choices are called
    free: str  # the one setting of the part that can still be set beside such a list


class Part:
    """One group of a run's settings. A subclass is a dataclass of these settings, each of which says by
    `only=` and `of=` which choices read it. It overrides whatever it has something to say about."""

    group_name: ClassVar[str]  # the field of `RunConfig` and the folder of `conf/`, from the setting `name`
    place: ClassVar[int] = 1000  # among the parts in a run's name, and at every turn of a step
    off: ClassVar[str] = ""  # the choice under which it changes nothing; empty: each changes something
    # the group and its choices that read this part at all; None: every run reads it
    read_by: ClassVar[tuple[str, tuple[str, ...]] | None] = None
    words: ClassVar[Mapping[str, str]] = {}  # what each choice is called in a sentence
    # choice -> the distribution whose code computes it, which then names the run too
    libraries: ClassVar[Mapping[str, str]] = {}
    columns: ClassVar[Mapping[str, tuple[str, str]]] = {}  # what it adds to steps.csv: name -> unit, meaning
    evals: ClassVar[Mapping[str, tuple[str, str]]] = {}  # the same of evals.csv
    figures: ClassVar[tuple[Figure, ...]] = ()  # what it adds to result.json
    table: ClassVar[str] = ""  # the title of the table of its figures in a report
    note: ClassVar[str] = ""  # what these figures are
    picture: ClassVar[str] = ""  # what the picture is called that `report/pictures/NAME.py` draws of it
    timed: ClassVar[bool] = True  # whether a step costs more or less by it; else measurements leave it out
    measured: ClassVar[str] = ""  # the section of `ebc-lab bench` that measures it
    # choice -> the library that it needs in training, the extra that brings it, and what else can be chosen
    required: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    unfit_for: ClassVar[Mapping[Mode, str]] = {}  # what no choice that changes anything goes with -> remedy
    versions: ClassVar[Versions | None] = None  # how a suite runs its arms under each of several choices
    name: str  # which choice

    def __init_subclass__(cls) -> None:
        cls.group_name = vars(cls)["name"].metadata["setting"].group

    @classmethod
    def from_run(cls, run: Run) -> Self:
        """Return the part's settings of a run."""
        return cast(Self, getattr(run, cls.group_name))

    def put_into(self, run: AnyRun) -> AnyRun:
        """Return the run with these settings of the part."""
        return cast(AnyRun, dataclasses.replace(cast(Any, run), **{self.group_name: self}))

    def changes_nothing(self) -> bool:
        """Return whether a run computes the same without this part: then its identity leaves it out."""
        return self.name == self.off

    def is_read(self, run: Run) -> bool:
        """Return whether the run looks at this part at all, as `read_by` says."""
        reader, choices = self.read_by or ("", ())
        return not reader or getattr(run, reader).name in choices

    def unread(self) -> Iterable[str]:
        """Return the settings that this combination does not read, beside those that `only=` rules out."""
        return ()

    def refuses(self, run: Run) -> Iterable[str]:
        """Yield a sentence for each contradiction inside the part, then for each with the rest of the run."""
        return ()

    def warnings(self, run: Run) -> Iterable[str]:
        """Yield a sentence for everything that is allowed and means less than it seems."""
        return ()

    def unfit(self, mode: Mode) -> Iterable[str]:
        """Yield a clause for each setting that does not go with a mode, and why, or what to choose instead:
        `dtype=bfloat16: choose dtype=float32`. The first is told."""
        if mode in self.unfit_for and not self.changes_nothing():
            yield f"{self.group_name}={self.name}: {self.unfit_for[mode]}"

    def needs(self) -> Iterable[Need]:
        """Yield the libraries that training needs beside the package's own. Only a process that trains asks
        for them: what was recorded with them is read without."""
        if self.name in self.required:
            yield Need(f"{self.group_name}={self.name}", *self.required[self.name])

    def tail(self) -> Iterable[Tail]:
        """Yield what the part adds to a run's name and label: of a part that can be `off`, by default the
        name of each other choice and its words."""
        if self.off and self.name in self.words:
            yield Tail(f"_{self.name}", self.words[self.name])

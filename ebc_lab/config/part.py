"""The interface of a part of a run, a group of settings in `conf/` defined in `config/parts/NAME.py`.

The code for identity, checks, names, labels and docs/settings.md asks the parts; no other code knows what a
part's settings mean. What a part does in a run is in `components/NAME.py`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import fmean
from typing import Any, ClassVar, NamedTuple, Self, TypeVar, cast

Run = Any  # a RunConfig, which consists of parts and therefore cannot be imported here
AnyRun = TypeVar("AnyRun")  # a RunConfig or a subclass of it
LEVEL, EXPERT = "<σ>", "<i>"  # placeholders in column names: a noise level (as 0p05), an expert's number


class Mode(Enum):
    """A mode of a run that only some parts support. A member's value is the setting that selects it."""

    EXACT = "determinism=verity"
    SEVERAL_PROCESSES = "launcher.processes_per_run={}"
    IN_BACKWARD = "memory.hooks"
    EBM = "workload=ebm"


class Need(NamedTuple):
    """A library that a setting needs for training, and the `extra` of this package that installs it."""

    setting: str
    library: str
    extra: str
    instead: str = ""  # an alternative choice for users without the library

    @property
    def module(self) -> str:
        """Return the library's import name."""
        return {"scikit-learn": "sklearn"}.get(self.library, self.library)

    def __str__(self) -> str:
        instead = f", or {self.instead}" if self.instead else ""
        how = f"pip install 'ebc-lab[{self.extra}]'{instead}"
        return f"{self.setting} needs the library {self.library}: {how}."


class Tail(NamedTuple):
    """How a choice is written in the names of runs, in titles and in labels."""

    name: str  # at the end of a run's name: "_ternary"
    words: str  # in a title: "ternary weights"
    label: str = ""  # in a label; empty: the words


class Head(NamedTuple):
    """A figure's column in tables of arms."""

    title: str
    short: str = ""  # title in narrow tables; empty: the title
    form: str = "brief"  # format of the values, one of `report.text.arms.FORMS`
    beside: str = ""  # `loss` or `steps`: column of the table of all arms that it also stands beside
    places: tuple[str, ...] = ("terminal", "paper", "page")  # outputs in which the part's table has it
    note: str = ""  # what the caption of a table with this column says of it


@dataclass(frozen=True)
class Figure:
    """A figure that a part adds to result.json. Decisions, CSV files, `ebc-lab columns` and tables of arms
    take the figure's name, unit, meaning and format from this object."""

    key: str  # its name in result.json, auto_decisions.json and ablation.csv
    unit: str
    meaning: str  # as `ebc-lab columns` prints it
    head: Head | None = None  # its column in tables; None: no table shows it
    of_steps: bool = False  # whether it is the median of the column of this name in steps.csv
    # computes a run's value from its result; None: it is in the result under `key`
    of_run: Callable[[Mapping[str, Any]], float | None] | None = None
    # computes an arm's value from the results of its completed runs; None: the mean over these
    of_arm: Callable[[Sequence[Mapping[str, Any]]], float | None] | None = None
    in_every_arm: bool = False  # whether decisions have the key even if no run has the figure
    averaged: bool = True  # whether the stage `ablation` computes `mean` for each arm

    def value(self, result: Mapping[str, Any]) -> float | None:
        """Return the value of this figure for a run, or None if the run's result has none."""
        value = self.of_run(result) if self.of_run else result.get(self.key)
        return None if value is None else float(value)

    def mean(self, completed: Sequence[Mapping[str, Any]]) -> float | None:
        """Return the value of this figure for an arm: what `of_arm` computes from the results of the
        completed runs or, without `of_arm`, the mean of the runs' values. Return None if there is no
        value."""
        if self.of_arm:
            return self.of_arm(completed)
        values = [value for result in completed if (value := self.value(result)) is not None]
        return fmean(values) if values else None


class Versions(NamedTuple):
    """A setting of the suite that lists choices of one part. Every arm is run again under each listed choice,
    and those runs are compared with the arm's ordinary runs."""

    key: str  # the name of the list, a setting of `ablation`
    noun: str  # plural noun for its choices in messages
    free: str  # the only setting of the part that may be set beside such a list


class Part:
    """One group of a run's settings. A subclass is a dataclass with a field for each setting; a field's
    `only=` and `by=` name the choices that read it. Subclasses override the members that apply to them."""

    group_name: ClassVar[str]  # the field of `RunConfig` and folder of `conf/`, taken from the field `name`
    place: ClassVar[int] = 1000  # sort key among parts, in a run's name and in the order of calls in a step
    off: ClassVar[str] = ""  # the choice under which it changes nothing; empty: there is none
    # the group, and its choices, under which a run reads this part; None: every run reads it
    read_by: ClassVar[tuple[str, tuple[str, ...]] | None] = None
    words: ClassVar[Mapping[str, str]] = {}  # choice -> its name in sentences
    # choice -> the library that computes it, whose version is then part of the run's identity
    libraries: ClassVar[Mapping[str, str]] = {}
    columns: ClassVar[Mapping[str, tuple[str, str]]] = {}  # columns added to steps.csv -> unit, meaning
    evals: ClassVar[Mapping[str, tuple[str, str]]] = {}  # likewise, to evals.csv
    figures: ClassVar[tuple[Figure, ...]] = ()  # figures added to result.json
    table: ClassVar[str] = ""  # the title of the table of its figures in a report
    picture: ClassVar[str] = ""  # the name of the part's picture, drawn by `report/pictures/NAME.py`
    timed: ClassVar[bool] = True  # whether it affects the time of a step; else measurements leave it out
    measured: ClassVar[str] = ""  # the section of `ebc-lab bench` that measures it
    # choice -> fields of a `Need` after the first: library for training, extra, and optionally `instead`
    required: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    unfit_for: ClassVar[Mapping[Mode, str]] = {}  # mode that only `off` supports -> reason or remedy
    versions: ClassVar[Versions | None] = None  # the suite's list of choices to run all arms under
    name: str  # the choice

    def __init_subclass__(cls) -> None:
        cls.group_name = vars(cls)["name"].metadata["setting"].group

    @classmethod
    def from_run(cls, run: Run) -> Self:
        """Return the settings that a run has for this part."""
        return cast(Self, getattr(run, cls.group_name))

    def put_into(self, run: AnyRun) -> AnyRun:
        """Return a copy of the run in which this part has these settings."""
        return cast(AnyRun, dataclasses.replace(cast(Any, run), **{self.group_name: self}))

    def changes_nothing(self) -> bool:
        """Return whether the part has no effect on a run's numbers. A run's identity then omits the part."""
        return self.name == self.off

    def is_read(self, run: Run) -> bool:
        """Return whether the run reads this part at all, according to `read_by`."""
        reader, choices = self.read_by or ("", ())
        return not reader or getattr(run, reader).name in choices

    def unread(self) -> Iterable[str]:
        """Return the settings that the part's other settings disable, besides those ruled out by `only=`."""
        return ()

    def refuses(self, run: Run) -> Iterable[str]:
        """Yield an error message for each contradiction within the part or with the rest of the run."""
        return ()

    def warnings(self, run: Run) -> Iterable[str]:
        """Yield a warning for each setting that is allowed but does less than it seems to."""
        return ()

    def unfit(self, mode: Mode) -> Iterable[str]:
        """Yield a clause for each setting that does not support `mode`, with a reason or an alternative, such
        as `dtype=bfloat16: choose dtype=float32`. Users see only the first clause."""
        if mode in self.unfit_for and not self.changes_nothing():
            yield f"{self.group_name}={self.name}: {self.unfit_for[mode]}"

    def needs(self) -> Iterable[Need]:
        """Yield the libraries, beyond the package's dependencies, that training with this part needs. Only a
        process that trains checks for these libraries; reading results does not need them."""
        if self.name in self.required:
            yield Need(f"{self.group_name}={self.name}", *self.required[self.name])

    def tail(self) -> Iterable[Tail]:
        """Yield what the part adds to a run's name and label. By default, this is the name and the words of
        the choice, if the part has an `off` choice and `words` lists the choice made."""
        if self.off and self.name in self.words:
            yield Tail(f"_{self.name}", self.words[self.name])

"""What the lab knows of one part of a run, a group of `conf/`, in one place: `config/parts/NAME.py`.

Identity, checks, names, labels and docs/settings.md ask the parts; nothing else knows what a part's settings
mean. What a part does in a run is its mirror, `components/NAME.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Generic, NamedTuple, TypeVar

S = TypeVar("S")


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


class Tail(NamedTuple):
    """How a choice shows at the end of a run's name, in a title and in a label."""

    name: str  # "_ternary"
    words: str  # "ternary weights"
    label: str = ""  # where it is shorter than the words


@dataclass(frozen=True)
class Part(Generic[S]):
    """One group of settings of a run.

    Attributes:
        name: the field of `RunConfig`, and the folder of `conf/`.
        settings: the dataclass of its settings; each says by `only=` and `of=` which choices read it.
        neutral: whether it changes nothing: then it is no part of a run's identity.
        idle: settings that this combination does not read, beside what `only=` says.
        refuses: the contradictions inside the group, a sentence each.
        unfit: what of it does not go with a mode.
        tail: what it adds to a run's name and label.
        words: choice -> what it is called in a sentence.
        libraries: choice -> the distribution whose code computes it, which then names the run too.
        read_by: the group and its choices that read this part at all.
    """

    name: str
    settings: type[S]
    neutral: Callable[[S], bool] = lambda settings: False
    idle: Callable[[S], Iterable[str]] = lambda settings: ()
    refuses: Callable[[S], Iterable[str]] = lambda settings: ()
    unfit: Callable[[S, Mode], Unfit | None] = lambda settings, mode: None
    tail: Callable[[S], Iterable[Tail]] = lambda settings: ()
    words: Mapping[str, str] = field(default_factory=dict)
    libraries: Mapping[str, str] = field(default_factory=dict)
    read_by: tuple[str, tuple[str, ...]] | None = None


def is_own(settings: Any, known: Iterable[str]) -> bool:
    """Whether a part is a user's own under a name of its own."""
    return settings.target is not None and settings.name not in known

"""What the caller of `judge` says about runs that the lab did not train."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, SupportsFloat

from ebc_lab.config.errors import UserError, any_of, nearest, require


@dataclass(frozen=True)
class Asked:
    """The options of `judge`. An empty name is to be found out from the columns.

    Attributes:
        arm, seed, lr, step, loss, run, planned: columns by name; `loss` is what is judged.
        choose: the column by which an arm's configuration is chosen, where it is not `loss`.
        where: `COLUMN=VALUE`: only rows with this value are taken.
        settings: further columns that make a run's configuration.
        pattern: of text logs: a regular expression with named groups `step`, `loss` and others.
        reference: the arm that the others are compared with.
        better: `lower` or `higher`, whichever is better in the column `loss`.
        outcome: of a curve: `last`, `target` (the first step at or below it) or `best` over its steps.
        target: of the loss; steps to it are reported.
        at: arm -> the step whose value is its outcome in place of the last; "" stands for every arm.
        chain: arms, each of which is compared with the one before it, in place of with the reference.
        pairs: whether all pairs of arms are compared, in place of each with the reference.
        distinct: whether runs of an arm with equal curves count as one run.
        paired: whether seeds pair the runs of two arms; None: where both have the same seeds.
        margin: so much worse still counts as level, in the unit of the loss.
        sigma: standard deviation of a run's outcome, for arms of one run: `pooled`, or a number in the unit
            of the loss; empty: none is assumed.
        exchange: what a step is worth, in the unit of the loss per step; None: not known.
        rule: another benchmark's rule that is applied beside ours: `track3`.
    """

    arm: str = ""
    seed: str = ""
    lr: str = ""
    step: str = ""
    loss: str = ""
    run: str = ""
    planned: str = ""
    choose: str = ""
    settings: tuple[str, ...] = ()
    where: tuple[str, ...] = ()
    pattern: str = ""
    reference: str = ""
    better: str = ""
    outcome: str = "last"
    target: float | None = None
    at: Mapping[str, float] = field(default_factory=dict)
    chain: tuple[str, ...] = ()
    pairs: bool = False
    distinct: bool = False
    paired: bool | None = None
    margin: float = 0.0
    sigma: str = ""
    exchange: float | None = None
    rule: str = ""


def asked_of(options: Mapping[str, Any]) -> Asked:
    """Return options that a program gave. One that is None counts as left out; a single one will do for
    `settings` and `where`, a step for `at`, `a,b,c` for `chain`, and `0.0045/100` for `exchange`.

    Raises UserError: there is no such option, or a value is not of its kind."""
    known = [field.name for field in fields(Asked)]
    for name in options:
        require(name in known, f"judge has no option {name}{nearest(name, known)}: it takes {any_of(known)}.")
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(at := given.get("at", {}), str | int | float):
        given["at"] = steps_at([str(at)])
    if isinstance(given.get("exchange"), str):
        given["exchange"] = exchange_of(given["exchange"])
    for option in fields(Asked):  # names of columns and arms may be numbers in a frame
        if option.name in given and option.type == "str":
            given[option.name] = str(given[option.name])
    for name in ("settings", "where", "chain"):
        value = given.get(name, ())
        if isinstance(value, str):
            value = chain_of(value) if name == "chain" else (value,)
        given[name] = tuple(map(str, value))
    asked = Asked(**given)
    for name in ("target", "margin", "exchange"):
        value = getattr(asked, name)
        require(value is None or isinstance(value, SupportsFloat), f"{name} is a number, not {value!r}.")
    for name in ("pairs", "distinct", "paired"):
        value = getattr(asked, name)
        require(value is None or isinstance(value, bool), f"{name} is True or False, not {value!r}.")
    require(isinstance(asked.at, Mapping), f"at is a step, or {{arm: step}}, not {asked.at!r}.")
    return asked


def steps_at(pairs: Sequence[str]) -> dict[str, float]:
    """Return arm -> step of `ARM=STEP`, or "" -> step of a step alone. Raises UserError for anything else."""
    steps = {}
    for pair in pairs:
        arm, _, step = pair.rpartition("=")
        try:
            steps[arm] = float(step)
        except ValueError:
            raise UserError(f"--at is STEP or ARM=STEP, such as muon=3250, not {pair}.") from None
    return steps


def chain_of(text: str) -> tuple[str, ...]:
    """Return the arms of a chain, which are typed with commas between."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def exchange_of(text: str) -> float | None:
    """Return the loss that a step is worth, of `0.0045/100` or of a number. Raises UserError."""
    if not text:
        return None
    loss, _, steps = text.partition("/")
    try:
        worth = float(loss) / float(steps or 1)
    except (ValueError, ZeroDivisionError):
        worth = math.nan
    if not (math.isfinite(worth) and worth >= 0):
        raise UserError(
            f"--exchange is a loss over the steps that it is worth, such as 0.0045/100, not {text}."
        )
    return worth

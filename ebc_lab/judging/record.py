"""What a judgement holds, as JSON has it: None stands for what is infinite or not known.

Terminal, page, papers and CSV files are made from this record, and `judge --json` prints it.
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class Taken(TypedDict):
    """What was taken for what: a role of a column, and how it was found."""

    role: str  # arm, seed, step, loss, settings …
    column: str  # its name in the source; empty where nothing was found
    sentence: str


class Caution(TypedDict):
    """Something that a reader of the answer has to know."""

    kind: str
    sentence: str
    runs: list[str]  # the runs that it means


class _Configured(TypedDict):
    arm: str
    configuration: dict[str, Any]  # setting -> value, of those that vary among all runs


class ArmSummary(TypedDict):
    """The outcomes of an arm's runs. What is infinite or unknown is None."""

    runs: int
    completed: int  # with a finite outcome
    diverged: int
    mean: float | None  # None if a run diverged
    sd: float | None  # of the completed runs; None with fewer than two
    low: float | None  # 95% t-interval of the mean; None with one run, runs without spread or a diverged one
    high: float | None
    median: float | None
    median_low: float | None  # an interval of order statistics, without any assumption; None with one run
    median_high: float | None
    median_confidence: float | None  # of this interval: 0.9375 of all five runs, 0.75 of three
    lowest: float | None
    highest: float | None  # None if a run diverged


class ArmRecord(_Configured, ArmSummary):
    """The runs of an arm, in the configuration that was chosen for it. Figures are in the loss's own unit."""

    length: float | None  # the last step of its runs, where it is one for all
    at: float | None  # the step whose value is the outcome, where it was asked for


class DifferenceRecord(TypedDict):
    """An arm's outcome minus another's. Keys that `records.decisions.Difference` has too mean the same."""

    arm: str
    reference: str
    # t: paired by seed; rank: paired, with a diverged run; welch; rank-sum: unpaired, with a diverged run;
    # sigma: by a standard deviation from elsewhere; None: nothing can be tested, and `note` says why
    method: str | None
    note: str | None
    n_arm: int
    n_reference: int
    mean: float | None  # None if a run diverged
    median: float | None  # of the paired differences, or by rank-sum of all pairs of runs
    sd: float | None  # of the difference of one run of each arm
    low: float | None
    high: float | None
    p: float | None
    detectable: float | None
    joint_low: float | None
    joint_high: float | None
    p_joint: float | None
    joint_detectable: float | None
    verdict: str  # better, worse, level or undecided, by the joint interval
    seeds_needed: int | None  # so many fresh runs per arm would, alone, decide in 4 of 5 cases
    margin: float
    comparisons: int  # for which the joint interval holds at once: those with a method


class Record(TypedDict):
    """A judgement whole."""

    ebc_lab: str  # the version that judged
    sources: list[str]  # what was read, in words
    loss: str  # the judged column
    better: str  # lower or higher
    outcome: str  # what of a curve: `last val_loss`, in words
    unit: NotRequired[str]  # of outcomes that are no loss: `steps` to a target, of which fewer are better
    step: str  # unit of the curve's steps; empty where there is no curve
    reference: str  # empty: all pairs are compared, or a chain
    chain: NotRequired[list[str]]  # arms, each of which is compared with the one before it
    paired: bool
    pairing: str  # why, in a sentence
    method: str  # how intervals and p-values were made, in a sentence or two
    margin: float
    confidence: float
    taken: list[Taken]
    answer: list[str]  # the first sentence answers; the others qualify it
    cautions: list[Caution]
    arms: list[ArmRecord]  # the best first
    differences: list[DifferenceRecord]
    tuning: dict[str, Any] | None  # a `tuning.Tuning`
    steps: dict[str, Any] | None  # as `sections.steps_section` makes it
    lengths: dict[str, Any] | None  # as `sections.lengths_section` makes it
    rule: dict[str, Any] | None  # as `sections.rule_section` makes it
    runs: list[dict[str, Any]]  # one a run: run, arm, seed, source, planned, length, outcome, settings

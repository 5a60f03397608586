"""`judge`: from somebody's files or frame to an answer with its evidence."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, cast

import pandas as pd

from ebc_lab import __version__
from ebc_lab.config.errors import any_of, nearest, require
from ebc_lab.records.columns import (
    JUDGED_ARM_MEANINGS,
    JUDGED_DIFFERENCE_MEANINGS,
    JUDGED_RUN_MEANINGS,
    described,
)
from ebc_lab.records.json_files import as_json
from ebc_lab.study.stages.statistics import CONFIDENCE, Luck

from . import cautions, differences, outcomes, sections, sentences, tuning
from .asked import Asked, asked_of
from .columns import choose_columns, rows_where
from .readers import read
from .readers.reader import Source, plain_frame, printable
from .record import ArmRecord, Caution, DifferenceRecord, Record, Taken
from .runs import Runs, alike_arms, joined, runs_of

Paths = str | os.PathLike[str]
OUTCOMES = ("last", "target", "best")
BASELINES = ("baseline", "control", "reference", "default", "vanilla")
COMMON_BASELINES = ("adamw", "adam", "sgd")  # of two arms only


def judge(runs: pd.DataFrame | Paths | Sequence[Paths], **asked: Any) -> Judgement:
    """Return what somebody's runs say: arms, differences with joint intervals, cautions, an answer.

        j = ebc_lab.judge(frame, arm="optimizer", loss="val_loss", reference="adamw")
        print(j.answer)
        j.differences()

    `runs`: a frame with a row an evaluation or a row a run, or files and folders of the formats in
    docs/judge.md. `asked`: the fields of `judging.asked.Asked`.

    Raises:
        UserError: it cannot be told which column is what, or a column does not hold what it is taken for.
    """
    return judged(runs, asked_of(asked))


def judged(runs: pd.DataFrame | Paths | Sequence[Paths], asked: Asked) -> Judgement:
    """Return what `judge` returns, the options given as one value. Raises UserError as `judge` does."""
    check(asked)
    if isinstance(runs, pd.DataFrame):
        sources = [Source(plain_frame(runs), f"a frame of {len(runs):,} rows")]
    else:
        paths = [runs] if isinstance(runs, str | os.PathLike) else runs
        paths = list(paths) if isinstance(paths, Sequence) else []
        require(
            bool(paths) and all(isinstance(path, str | os.PathLike) for path in paths),
            "judge takes a frame of pandas, or the places of files and folders: join several frames first.",
        )
        sources = read([Path(path) for path in paths], asked)
    sources = [rows_where(printable(source), asked.where) for source in sources]
    chosen = [choose_columns(source, asked) for source in sources]
    made = joined([runs_of(source, columns) for source, columns in chosen])
    what = [source.what for source in sources]
    notes = [note for source in sources for note in source.notes]
    taken = list({one["sentence"]: one for _, columns in chosen for one in columns.taken}.values())
    taken = [one for one in taken if one["role"] != "lr" or one["column"] in made.settings]
    if made.settings:
        names = ", ".join(made.settings)
        taken.append(Taken(role="settings", column=names, sentence=f"settings: {names}"))
    return Judgement(made, as_json(_record(made, asked, what, notes, taken)))


def check(asked: Asked) -> None:
    """Raise UserError where an option cannot be."""
    require(asked.better in ("", "lower", "higher"), f"--better is lower or higher, not {asked.better}.")
    require(asked.outcome in OUTCOMES, f"--outcome is {any_of(OUTCOMES)}, not {asked.outcome}.")
    require(asked.rule in ("", "track3"), f"--rule is track3, not {asked.rule}.")
    require(
        asked.outcome != "target" or asked.target is not None,
        "--outcome target needs a --target, the loss that is to be reached.",
    )
    reachable = asked.target is None or math.isfinite(asked.target)
    require(reachable, f"--target is a loss that can be reached, not {asked.target}.")
    twice = [arm for arm in asked.chain if asked.chain.count(arm) > 1]
    require(not twice, f"--chain names {' and '.join(twice[:1])} twice: an arm has one place in it.")
    require(len(asked.chain) != 1, "--chain names the arms from the first to the last, with commas between.")
    alone = [asked.pairs, bool(asked.chain), bool(asked.reference)]
    require(
        sum(alone) < 2, "give one of --reference, --pairs and --chain: each says what is compared with what."
    )
    require(math.isfinite(asked.margin) and asked.margin >= 0, "--margin is a difference of at least 0.")
    worth = asked.exchange if asked.exchange is not None else 0.0
    require(math.isfinite(worth) and worth >= 0, "--exchange is a loss of at least 0 for a step.")
    number = asked.sigma in ("", "pooled") or _positive(asked.sigma)
    require(number, f"--sigma is pooled or a number above 0, not {asked.sigma}.")


def _positive(text: str) -> bool:
    try:
        return math.isfinite(float(text)) and float(text) > 0
    except ValueError:
        return False


@dataclass(frozen=True)
class Judgement:
    """What somebody's runs say. Its tables are called as those of `ebc_lab.load`, and have units and
    meanings of their columns in `table.attrs`.

    Attributes:
        data: the runs as they were read: `data.table`, `data.curves`.
        record: everything as JSON has it; `judge --json` prints it.
    """

    data: Runs
    record: Record

    @property
    def answer(self) -> str:
        """Return what was found, in a sentence or a few."""
        return "\n".join(self.record["answer"])

    @property
    def problems(self) -> list[str]:
        """Return what a reader of the answer has to know, a sentence each."""
        return [caution["sentence"] for caution in self.record["cautions"]]

    def runs(self) -> pd.DataFrame:
        """Return one row a run: name, arm, seed, length, outcome (inf or -inf: diverged), settings."""
        return described(self.data.table.copy(), JUDGED_RUN_MEANINGS)

    def arms(self) -> pd.DataFrame:
        """Return one row an arm, the best first."""
        return described(pd.DataFrame(self.record["arms"]), JUDGED_ARM_MEANINGS)

    def differences(self) -> pd.DataFrame:
        """Return one row a comparison of two arms: arm minus reference, both intervals, the judgement."""
        columns = list(DifferenceRecord.__annotations__)
        found = pd.DataFrame(self.record["differences"], columns=columns)
        return described(found, JUDGED_DIFFERENCE_MEANINGS)

    @property
    def verdict(self) -> pd.DataFrame:
        """Return one row a comparison: the question in words, the verdict, what was measured."""
        rows = [
            {
                "name": one["arm"],
                "question": f"Is {one['arm']} better than {one['reference']}?",
                "verdict": one["verdict"],
                "figure": sentences.difference_in_words(one),
            }
            for one in self.record["differences"]
        ]
        return pd.DataFrame(rows, columns=["name", "question", "verdict", "figure"])

    def evals(self, arm: str | None = None, seed: str | int | None = None) -> pd.DataFrame:
        """Return one row an evaluation of the runs that fit: run, arm, seed, step, and the judged column."""
        table = self.data.table
        wanted = table.index == table.index
        if arm is not None:
            wanted = wanted & (table["arm"] == arm)
        if seed is not None:
            wanted = wanted & (table["seed"] == str(seed))
        numbers = table.index[wanted]
        require(len(numbers) > 0, f"no run has arm {arm} and seed {seed}: runs() lists what there is.")
        curves = self.data.curves[self.data.curves["run"].isin(numbers)]
        about = table.loc[curves["run"], ["run", "arm", "seed"]].reset_index(drop=True)
        values = curves[["step", "loss"]].reset_index(drop=True)
        return about.join(values).rename(columns={"loss": self.data.loss})

    def __repr__(self) -> str:
        return f"<judgement of {len(self.data.table)} runs: {self.answer}>"

    def _repr_html_(self) -> str:
        cautions = "".join(f"<li>{escape(text)}</li>" for text in self.problems)
        lines = "".join(f"<p>{escape(line)}</p>" for line in self.record["answer"])
        return f"<div>{lines}<ul>{cautions}</ul>{self.arms().to_html(index=False, na_rep='–')}</div>"


# -- the record ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Selection:
    """The runs that are judged, and what they were chosen from.

    Attributes:
        every: all runs, of any length and configuration.
        runs: those of one length an arm, with their outcomes.
        judged: of these the ones in the configuration that was chosen for their arm.
        tuned: how it was chosen; None where no arm had a choice.
        turn: whether larger outcomes are better; losses are outcomes with their signs turned then.
        losses: arm -> number of the run -> loss, the best arm first.
        cautions: what was met on the way.
    """

    every: Runs
    runs: Runs
    judged: Runs
    tuned: tuning.Tuning | None
    turn: bool
    losses: outcomes.Losses
    cautions: Sequence[Caution]


def _selected(every: Runs, asked: Asked) -> _Selection:
    """Return the runs that are judged."""
    every = outcomes.of_chain(every, asked.chain)
    every, of_copies = outcomes.distinct_runs(every) if asked.distinct else (every, [])
    runs, of_lengths = outcomes.at_one_length(every)
    runs, of_outcomes = outcomes.with_outcome(runs, asked)
    turn = runs.better == "higher" and asked.outcome != "target"
    tried = tuning.configurations_of(runs.table, runs.settings, higher=turn)
    tuned = tuning.tuning_of(tried, chosen_by=runs.choose or runs.loss, reported=runs.loss, lr=asked.lr)
    judged = outcomes.chosen_runs(runs, tried, tuned)
    if tuned:
        everywhere = tuning.configurations_of(every.table, every.settings, higher=turn)
        tuned = tuning.counted(tuned, {arm: len(tried) for arm, tried in everywhere.items()})
    losses = outcomes.losses_by_arm(judged, turn=turn)
    losses = {arm: losses[arm] for arm in in_order(losses)}
    return _Selection(every, runs, judged, tuned, turn, losses, [*of_copies, *of_lengths, *of_outcomes])


def _record(
    every: Runs, asked: Asked, what: Sequence[str], notes: Sequence[str], taken: list[Taken]
) -> Record:
    """Return the judgement of runs as JSON has it."""
    chosen = _selected(every, asked)
    runs, judged, losses, turn = chosen.runs, chosen.judged, chosen.losses, chosen.turn
    varying = [name for name in runs.settings if runs.table[name].map(str).nunique() > 1]
    reference, why = reference_of(losses, asked)
    paired, pairing = pairing_of(judged, losses, asked)
    by_seed = outcomes.losses_by_arm(judged, turn=turn, by="seed") if paired else losses
    keyed = {arm: by_seed[arm] for arm in losses}
    assumed = sigma_of(losses, asked)
    luck = {arm: tuning.luck_of(chosen.tuned, arm) for arm in losses}
    first, pairs = reference or next(iter(losses)), asked.pairs or not reference
    compare = _comparing(first, asked, assumed, pairs=pairs, paired=paired, turn=turn)
    compared = compare(keyed, luck)
    lucky = any(one.sd for one in luck.values())
    tuned = tuning.turned(chosen.tuned) if turn and chosen.tuned else chosen.tuned
    record: Record = {
        "ebc_lab": __version__,
        "sources": list(what),
        "loss": runs.loss,
        "better": runs.better,
        "outcome": sentences.outcome_in_words(runs, asked),
        "step": runs.step_name,
        "reference": reference,
        "paired": paired,
        "pairing": pairing,
        "method": sentences.method_in_words(compared, lucky, assumed.get("sigma")),
        "margin": asked.margin,
        "confidence": CONFIDENCE,
        "taken": [*taken, *([Taken(role="reference", column="", sentence=why)] if why else [])],
        "answer": [],
        "cautions": [
            *(Caution(kind="read", sentence=note, runs=[]) for note in notes),
            *chosen.cautions,
            *cautions.cautions(runs, judged, asked, chosen.tuned),
            *alike_arms(chosen.every.table),
            *chosen.every.cautions,
        ],
        "arms": _arm_records(judged, varying, losses, asked, turn=turn),
        "differences": compared,
        "tuning": cast(dict[str, Any] | None, tuned),
        "steps": sections.steps_section(judged, first, asked, pairs=pairs, paired=paired),
        "lengths": sections.lengths_section(
            chosen.every, judged, keyed, luck, reference, asked, compare, turn=turn
        ),
        "rule": sections.rule_section(judged, asked),
        "runs": _run_records(judged),
    }
    if asked.chain:
        record["chain"] = list(asked.chain)
    if asked.outcome == "target":
        record["unit"] = f"{runs.step_name}s"
    record["answer"] = sentences.answer(record)
    return record


def _comparing(
    first: str, asked: Asked, assumed: Mapping[str, Any], *, pairs: bool, paired: bool, turn: bool
) -> Callable[[outcomes.Losses, Mapping[str, Luck]], list[DifferenceRecord]]:
    """Return a function that compares arms by their losses, as they are or at equal steps, and by the luck
    that these have. `first`: the reference, or the arm that pairs begin with; `assumed`: of `sigma_of`."""

    def compare(by_arm: outcomes.Losses, luck: Mapping[str, Luck]) -> list[DifferenceRecord]:
        how = {"pairs": pairs, "chain": asked.chain, "paired": paired, "margin": asked.margin, **assumed}
        found: Sequence[Mapping[str, Any]] = differences.compare(by_arm, first, luck=luck, **how)
        shown = [tuning.turned_figures(one) for one in found] if turn else found
        names = DifferenceRecord.__annotations__
        return [cast(DifferenceRecord, {name: one[name] for name in names}) for one in shown]

    return compare


def reference_of(losses: outcomes.Losses, asked: Asked) -> tuple[str, str]:
    """Return the arm that the others are compared with, and why it is: the one asked for, or one that is
    called so; of two arms one in any case. Empty where none is: then all pairs are compared.

    Raises UserError where there is no arm of the name asked for."""
    arms = list(losses)
    if asked.chain:
        return "", ""
    if asked.reference:
        near = nearest(asked.reference, arms)
        require(
            asked.reference in arms, f"there is no arm {asked.reference}{near}: there are {any_of(arms)}."
        )
        return asked.reference, f"reference: {asked.reference}, as asked"
    names = {arm.lower(): arm for arm in sorted(arms)}
    called = next((names[name] for name in BASELINES if name in names), "")
    if len(arms) == 2:
        called = called or next((names[name] for name in COMMON_BASELINES if name in names), "")
        if not called:
            return min(arms), f"reference: {min(arms)}, the first of the two in the alphabet"
    return called, f"reference: {called}, by its name" if called else ""


def pairing_of(runs: Runs, losses: Mapping[str, Mapping[str, float]], asked: Asked) -> tuple[bool, str]:
    """Return whether seeds pair the runs of different arms, and why, in a sentence.

    Raises UserError where pairs are asked for and runs have no seeds."""
    table = runs.table
    seeds = {arm: set(of_arm["seed"]) for arm, of_arm in table.groupby("arm", sort=False)}
    known = bool(table["seed"].notna().all())
    doubled = bool(table.duplicated(["arm", "seed"]).any())
    if asked.paired:
        require(known, "--paired needs a seed for each run: say with --seed which column it is.")
        require(not doubled, "--paired needs one run for each arm and seed, and some have two.")
        return True, "Runs are paired by seed, as asked."
    if asked.paired is False:
        return False, "Runs are compared unpaired, as asked."
    if not known:
        return False, "No column gives every run a seed, so nothing is paired."
    if len(seeds) == 1:
        return False, "There is one arm, so nothing is paired."
    if max(len(of_arm) for of_arm in losses.values()) == 1:
        return False, "Each arm has one run, so nothing is paired."
    alike = {frozenset(of_arm) for of_arm in seeds.values()}
    shared = len(next(iter(alike)))
    if doubled:
        return False, "An arm has two runs of one seed, so nothing is paired."
    if len(alike) == 1 and shared > 1:
        return True, (
            f"Every arm has the same {shared} seeds, so runs are paired by seed; say --unpaired if one seed "
            "does not give two arms the same weights or data."
        )
    return False, "The arms do not have the same seeds, so nothing is paired."


def sigma_of(losses: outcomes.Losses, asked: Asked) -> dict[str, Any]:
    """Return `sigma`, the deviation assumed of arms of one run, and its degrees of freedom; nothing if none
    is assumed. Raises UserError where it is to be pooled and no arm has two finished runs."""
    if not asked.sigma:
        return {}
    if asked.sigma != "pooled":
        return {"sigma": float(asked.sigma)}
    finished = [[x for x in of_arm.values() if math.isfinite(x)] for of_arm in losses.values()]
    several = [values for values in finished if len(values) > 1]
    require(bool(several), "--sigma pooled needs an arm with two finished runs: give --sigma a number.")
    sigma, freedom = tuning.pooled(several)
    return {"sigma": sigma, "sigma_freedom": freedom}


def in_order(losses: outcomes.Losses) -> list[str]:
    """Return the arms, the best first: by share of diverged runs, mean of the other runs, then name."""

    def place(arm: str) -> tuple[float, float, str]:
        finished = [x for x in losses[arm].values() if math.isfinite(x)]
        mean = statistics.fmean(finished) if finished else math.inf
        return 1 - len(finished) / len(losses[arm]), mean, arm

    return sorted(losses, key=place)


# -- rows of the record --------------------------------------------------------------------------------------


def _arm_records(
    runs: Runs, settings: Sequence[str], losses: outcomes.Losses, asked: Asked, *, turn: bool
) -> list[ArmRecord]:
    """Return a row for each arm, in the order of `losses`. `settings`: those that tell configurations."""
    table = runs.table
    records = []
    for arm, of_arm in losses.items():
        summary: dict[str, Any] = dict(differences.arm_summary(list(of_arm.values())))
        rows = table[table["arm"] == arm]
        lengths = set(rows["length"].dropna())
        records.append(
            {
                "arm": arm,
                "configuration": {name: rows[name].iloc[0] for name in settings},
                **(tuning.turned_figures(summary) if turn else summary),
                "length": lengths.pop() if len(lengths) == 1 else None,
                "at": asked.at.get(arm, asked.at.get("")),
            }
        )
    return cast(list[ArmRecord], records)


def _run_records(runs: Runs) -> list[dict[str, Any]]:
    """Return a row for each judged run."""
    kept = ["run", "arm", "seed", "source", "planned", "length", "outcome"]
    rows = []
    for row in runs.table.to_dict("records"):
        rows.append({**{name: row[name] for name in kept}, "settings": {k: row[k] for k in runs.settings}})
    return rows

"""A study as data: its runs, arms, differences, decisions and verdict, as pandas tables."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebc_lab.config.errors import UserError, nearest
from ebc_lab.config.schema import Config
from ebc_lab.records.columns import (
    EVAL_COLUMNS,
    RUN_MEANINGS,
    STEP_COLUMNS,
    TABLES,
    described,
    meaning_of,
)
from ebc_lab.records.decisions import Decision
from ebc_lab.records.paths import RunFiles
from ebc_lab.records.streams import read_columns
from ebc_lab.study.stages.rules import decision_problem
from ebc_lab.study.stages.stage import concluding_stages, stage_of
from ebc_lab.study.store.changes import describe_earlier_looks, looks_of
from ebc_lab.study.store.find import find
from ebc_lab.study.store.study import Record, Study, StudyHeader, studies_in

from . import card, tables
from .catalogue import state_of
from .frames import frame, typed

if TYPE_CHECKING:
    import pandas as pd

OUTPUT_DIR = Config.output_dir  # of the working folder: where studies are unless told otherwise
OF_THE_RUN = {"run_id": ("", "the run"), "arm": ("", "its arm"), "seed": ("", "its seed")}


def load(name: str | os.PathLike[str], output_dir: str | os.PathLike[str] = OUTPUT_DIR) -> LoadedStudy:
    """Return a study by its name in `output_dir`, by its folder, or by its bundle (`.zip`), finished or not.

    Nothing that the study holds is executed; torch is not imported.

        s = ebc_lab.load("laptop")
        print(s.answer)
        finals = s.runs().query("stage == 'finals'")
        finals.groupby("arm").test_loss.agg(["mean", "std"])

    Raises:
        UserError: there is no such study, or its study.json is damaged.
    """
    place = os.fspath(name)
    study = find(place, os.fspath(output_dir))
    if not study.exists():
        known = [s.name for s in studies_in(Path(output_dir).expanduser())]
        near = nearest(Path(place).name, known) or (f"; there are {', '.join(known[:10])}" if known else "")
        raise UserError(
            f"there is no study at {study.root}{near}: give the name of a study in {output_dir}, "
            "the path of its folder, or that of its bundle."
        )
    return LoadedStudy(study)


class LoadedStudy:
    """One study. Its decisions, and which runs it has, are read once, when they are first asked for.

    Every table has fixed columns and types, even if it is empty. `table.attrs["units"]` and
    `table.attrs["meanings"]` describe the columns.

    Attributes:
        name: the name of the study.
        header: the contents of study.json: settings, corpus, versions and hardware.
    """

    def __init__(self, study: Study):
        self._study = study
        self.name = study.name
        self.header: StudyHeader = study.header()

    @property
    def root(self) -> Path:
        """Return the study's folder. That of a bundle is temporary, and is removed with this object."""
        return self._study.root

    @property
    def source(self) -> Path:
        """Return the path of the folder or bundle that the study was loaded from."""
        return self._study.place

    @property
    def config(self) -> dict[str, Any]:
        """Return all settings as they were resolved when the study began, as nested dicts."""
        return self.header["config"]

    @cached_property
    def decisions(self) -> dict[str, Decision]:
        """Return stage -> decision, for the decisions that can be used; `problems` names the others. Raises
        UserError if the file is damaged."""
        return {stage: d for stage, d in self._recorded.items() if stage not in self._faults}

    @cached_property
    def _recorded(self) -> dict[str, Decision]:
        return self._study.decisions()

    @cached_property
    def _faults(self) -> dict[str, str]:
        """Return stage -> why its decision cannot be used, for the decisions that cannot."""
        return {s: why for s, decision in self._recorded.items() if (why := decision_problem(decision))}

    @cached_property
    def _records(self) -> list[Record]:
        return self._study.records()

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        with self.blame_files():
            return tables.run_rows(self._records, self.decisions)

    def blame_files(self) -> AbstractContextManager[None]:
        """Return a context in which malformed contents of the study's files raise a UserError."""
        return self._study.blame_files()

    def specs(self) -> dict[str, dict[str, Any]]:
        """Return the settings of each run by its id, as spec.json has them. Damaged runs are left out."""
        return {r.run_id: spec["config"] for r in self._records if (spec := r.spec) is not None}

    def results(self) -> dict[str, dict[str, Any]]:
        """Return what result.json says of each run that has ended, by its id. Damaged runs are left out."""
        return {r.run_id: dict(result) for r in self._records if (result := r.result) is not None}

    @property
    def state(self) -> str:
        """Return `running` if a process runs the study; otherwise `finished`, `interrupted`, or `empty` if it
        has no runs yet."""
        if self._study.holder() is not None:
            return "running"
        return state_of(self.config["study"]["stages"], self._recorded, self._study.run_ids())

    @property
    def problems(self) -> list[str]:
        """Return a sentence for each decision and each run that cannot be used."""
        remedy = "the study's command decides again from the runs"
        where = self._study.decisions_file
        faults = [f"{s} in {where} cannot be used ({why}): {remedy}." for s, why in self._faults.items()]
        return [*faults, *(record.problem for record in self._records if record.problem)]

    @property
    def answer(self) -> str:
        """Return what the study found, in lines: the answers about your own arms if it asks about any, and
        otherwise what its last decided stage found. Raises UserError if a file is malformed."""
        if not self.decisions:
            unusable = "; ".join(f"{stage} cannot be used: {why}" for stage, why in self._faults.items())
            return unusable or "nothing is decided yet"
        stage, decision = list(self.decisions.items())[-1]
        with self.blame_files():
            if sentences := [answer["sentence"] for _, _, answer in tables.answers(self.decisions)]:
                said = {"ablation": [*tables.lost(self.decisions), *sentences]}
                ends = concluding_stages(self.decisions)
                lines = (said.get(s) or stage_of(s).headlines(self.decisions[s]) for s in ends)
                return "\n".join(itertools.chain.from_iterable(lines))
            text = "\n".join(stage_of(stage).headlines(decision))
        return text if self.state != "interrupted" else f"so far, {stage}: {text}"

    # -- tables ----------------------------------------------------------------------------------------------

    def runs(self) -> pd.DataFrame:
        """Return a table with a row for each run, in the order of stages, arms and seeds: its settings, how
        it ended, and its figures."""
        return frame(self._rows, RUN_MEANINGS)

    def arms(self) -> pd.DataFrame:
        """Return a table with a row for each arm of a stage: its settings, and the means over the seeds that
        completed."""
        with self.blame_files():
            return tables.arms(self._rows, self.decisions)

    def differences(self) -> pd.DataFrame:
        """Return a table with a row for each comparison of two arms: the difference in test loss (nats),
        paired by seed, with both intervals and the judgement."""
        with self.blame_files():
            return tables.differences(self.decisions)

    @property
    def verdict(self) -> pd.DataFrame:
        """Return a table with a row for each question: the lines of the verdict or, of a suite, each of your
        own arms against the best of the others. If the suite asks about none, each arm is compared with its
        reference.

        `attrs["looks"]`: the numbers of seeds of earlier answers that share seeds with this one;
        `attrs["note"]`: a caveat about earlier answers, empty if there are none."""
        with self.blame_files():
            table = tables.verdict(self.decisions)
        table.attrs |= {"looks": looks_of(self.header), "note": describe_earlier_looks(self.header)}
        return table

    def steps(
        self, arm: str | None = None, seed: int | None = None, run_id: str | None = None
    ) -> pd.DataFrame:
        """Return `run_id`, `arm`, `seed` and the columns of steps.csv, a row for each step of the runs that
        fit, which are all training runs by default. Raises UserError if none fits, or a file is damaged."""
        wanted = {"arm": arm, "seed": seed, "run_id": run_id}
        return self._streams(wanted, lambda files: files.steps, STEP_COLUMNS, TABLES["steps"])

    def evals(
        self, arm: str | None = None, seed: int | None = None, run_id: str | None = None
    ) -> pd.DataFrame:
        """Return a table as `steps` does, with a row for each evaluation in evals.csv."""
        wanted = {"arm": arm, "seed": seed, "run_id": run_id}
        return self._streams(wanted, lambda files: files.evals, EVAL_COLUMNS, TABLES["evals"])

    def _streams(
        self,
        wanted: Mapping[str, Any],
        which: Callable[[RunFiles], Path],
        columns: Sequence[str],
        meanings: Mapping[str, tuple[str, str]],
    ) -> pd.DataFrame:
        """Return the streams of the runs that are `wanted`, under each other. `columns`: those that are there
        in any case. Raises UserError as `steps` does."""
        import pandas as pd

        parts = []
        for row in self._fitting(wanted):
            try:
                stream = pd.DataFrame(read_columns(which(self._study.run_files(row["run_id"]))))
            except FileNotFoundError:  # it has not begun
                continue
            for place, key in enumerate(OF_THE_RUN):
                stream.insert(place, key, row[key])
            parts.append(stream)
        parts = parts or [pd.DataFrame(columns=[*OF_THE_RUN, *columns])]
        table = typed(pd.concat(parts, ignore_index=True))
        known = {name: meaning_of(name, {**OF_THE_RUN, **meanings}) for name in table.columns}
        return described(table, {name: meaning for name, meaning in known.items() if meaning})

    def _fitting(self, wanted: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the rows of the training runs that have the wanted values, None standing for any. Raises
        UserError if a value is wanted and no run has it."""
        wanted = {key: value for key, value in wanted.items() if value is not None}
        every = [row for row in self._rows if row.get("kind") == "train"]
        fitting = [row for row in every if all(row[key] == value for key, value in wanted.items())]
        if wanted and not fitting:
            near = nearest(str(wanted.get("arm", "")), sorted({row["arm"] for row in every}))
            asked = ", ".join(f"{key} {value}" for key, value in wanted.items())
            raise UserError(
                f"study {self.name} has no training run with {asked}{near}: its arms and seeds are in runs()."
            )
        return fitting

    # -- as it is shown --------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        try:
            text = f"{self.state}, {len(self._study.run_ids())} runs: {self.answer}"
        except UserError as error:
            text = str(error)
        return f"<study {self.name}: {text}>"

    def _repr_html_(self) -> str:
        corpus, version = self.header["corpus"]["title"], self.header["ebc_lab"]
        try:
            about = f"{self.state} · {corpus} · {self.config['scale']} · ebc-lab {version}"
            return card.html(self.name, about, self.answer, self.arms(), self.problems)
        except UserError as error:
            return f"<p>{escape(str(error))}</p>"

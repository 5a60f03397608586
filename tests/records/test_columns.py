"""Every column that a run of workload=ebm adds has a unit and a meaning, and a place in the docs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.ebm_runs import eventful, tiny_ebm

from ebc_lab.records.columns import (
    EVAL_COLUMNS,
    STEP_COLUMNS,
    WORKLOAD_EVAL_MEANINGS,
    WORKLOAD_STEP_MEANINGS,
    meaning_of,
)
from ebc_lab.records.json_files import read_json
from ebc_lab.records.paths import RunFiles
from ebc_lab.records.streams import read_columns
from ebc_lab.training.outcome import run_and_record
from ebc_lab.workloads.ebm import eval_columns, step_columns

FILES = Path(__file__).parents[2] / "docs" / "results.md"
KEPT_MODEL_FIGURES = ("settled", "sampled", "unigram", "bigram", "energy_trend")


@pytest.fixture(scope="module")
def trained(text_file, tmp_path_factory) -> RunFiles:
    """A run that has every kind of event, with audits at every step."""
    run = replace(eventful(tiny_ebm(text_file)), audit_every=1)
    directory = tmp_path_factory.mktemp("run")
    result = run_and_record(run, directory, "run")
    assert result["outcome"] == "completed", result
    return RunFiles(directory)


@pytest.mark.thorough
def test_every_column_that_a_run_writes_has_a_meaning_and_every_meaning_a_column(trained):
    for path, usual, meanings in (
        (trained.steps, STEP_COLUMNS, WORKLOAD_STEP_MEANINGS),
        (trained.evals, EVAL_COLUMNS, WORKLOAD_EVAL_MEANINGS),
    ):
        own = {name: values for name, values in read_columns(path).items() if name not in usual}
        found = {name: meaning_of(name, meanings) for name in own}
        assert None not in found.values(), found
        assert set(found.values()) == set(meanings.values())
        assert [name for name, values in own.items() if not np.isfinite(values).any()] == []


def test_the_figures_of_the_kept_model_are_those_of_its_evaluations_and_a_few_more(trained):
    figures = read_json(trained.result)["workload"]
    unknown = {name for name in figures if meaning_of(name, WORKLOAD_EVAL_MEANINGS) is None}
    assert unknown == set(KEPT_MODEL_FIGURES)


@pytest.mark.parametrize(
    "overrides",
    [
        ["ebm.splats=0"],
        ["decoder=transformer"],
        ["decoder.experts=12", "ebm.levels=[0.005,1]"],
        ["ebm.score=0", "ebm.mle=0", "ebm.noised=0"],
        ["ebm.soc=false"],
    ],
)
def test_other_settings_add_no_column_without_a_meaning(text_file, overrides):
    run = tiny_ebm(text_file, *overrides)
    for names, meanings in (
        (step_columns(run), WORKLOAD_STEP_MEANINGS),
        (eval_columns(run, 40), WORKLOAD_EVAL_MEANINGS),
    ):
        assert [name for name in names if meaning_of(name, meanings) is None] == []


@pytest.mark.parametrize(
    "column", ["r2_", "r2_x", "r2_se", "r2_0p05_s", "load_", "load_max", "load_1p5", "soc"]
)
def test_only_a_level_or_a_number_stands_for_the_mark_in_a_name(column):
    assert meaning_of(column, WORKLOAD_STEP_MEANINGS) is None


def test_the_files_of_a_run_are_in_the_docs(trained):
    text = FILES.read_text()
    for name in (trained.model.name, trained.alerts.name, f"{trained.models.name}/step_N.pt"):
        assert f"`{name}`" in text
    assert trained.model.exists()

"""The pictures of a small invented study, whatever became of its runs: complete, and on their pages."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.drawn import (
    ARMS,
    BASELINE,
    CONTROL,
    FALLING,
    OF_A_TRACK,
    check_sheet,
    drawn,
    expected_names,
    write_study,
)

from ebc_lab.report.pictures.catalogue import PHONE
from ebc_lab.report.pictures.render import pdf, png

TROUBLES = {
    "some of each kind": {
        (BASELINE, 1): "oom",
        (FALLING, 1): "diverged",
        **{(CONTROL, s): "missing" for s in (0, 1)},
    },
    "no baseline": {(BASELINE, 0): "diverged", (BASELINE, 1): "failed", (FALLING, 0): "missing"},
    "nothing at all": {(arm, seed): "missing" for arm in ARMS for seed in (0, 1)},
}


@pytest.mark.parametrize(
    "outcomes",
    [
        pytest.param(t, id=k, marks=() if k == "some of each kind" else pytest.mark.slow)
        for k, t in TROUBLES.items()
    ],
)
@pytest.mark.filterwarnings("error")
def test_draws_whatever_became_of_the_runs_and_says_so(tmp_path, outcomes):
    figures = drawn(write_study(tmp_path, outcomes=outcomes))
    for (arm, seed), outcome in outcomes.items():
        said = {"diverged": "diverged", "missing": "has no result"}.get(outcome, "did not finish")
        lost = all(outcomes.get((arm, seed)) == "missing" for seed in (0, 1))
        if arm == FALLING:
            assert (f"adam_none_{arm}_groups" in figures) != lost, "an arm without a run has no picture"
        if arm == FALLING and not lost:
            assert f"seed {seed} {said}" in figures[f"adam_none_{arm}_groups"].alert
    assert all(png(figure).startswith(b"\x89PNG") for figure in figures.values())


AWKWARD = ("adam_spectral", "muon_spectral")
LOOKED_AT = [f"{name}_muon_spectral" for name in OF_A_TRACK] + ["lr_sweep"]


@pytest.fixture(scope="module")
def awkward(tmp_path_factory):
    """The figures of a study with two tracks, and with names and warnings that nobody foresaw."""
    root = write_study(
        tmp_path_factory.mktemp("awkward"), tracks=AWKWARD, outcomes={(FALLING, 1): "diverged"},
        name="a_study_$with_money$_" + "x" * 60, title="a $file$ with\na very long name.txt" * 3,
        warning="NOT Shakespeare: " + "it could not be had, " * 9,
    )  # fmt: skip
    return drawn(root, phone=LOOKED_AT)


@pytest.mark.thorough
def test_each_track_has_pictures_of_its_own(awkward):
    assert set(awkward) == expected_names(*AWKWARD) | {name + PHONE for name in LOOKED_AT}


def test_no_text_leaves_the_page_or_covers_another(awkward):
    for name, sheet in awkward.items():
        check_sheet(sheet, name)


def test_the_picture_for_papers_is_a_vector_drawing_with_its_fonts_in_it(awkward):
    content = pdf(awkward["lr_scale_muon_spectral" + PHONE])
    assert content.startswith(b"%PDF")
    assert b"/FontFile2" in content  # TrueType, embedded
    assert b"/Type3" not in content


@pytest.mark.thorough
def test_needs_neither_torch_nor_pandas_nor_pyplot():
    banned = "{'torch', 'pandas', 'matplotlib.pyplot'}"
    script = f"import sys, ebc_lab.report.pictures; print(sorted({banned} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"

"""The pictures of a small invented suite: the right files, and in them every arm where its figures put it."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure
from support.drawn import (
    BROKEN,
    GOOD,
    PLAIN,
    SEEDS,
    TRAP,
    check_sheet,
    drawn,
    write_suite,
)

from ebc_lab.report import pictures
from ebc_lab.report.pictures.catalogue import PHONE


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> dict[str, Figure]:
    return drawn(write_suite(tmp_path_factory.mktemp("suite"), asked=("copied_arm",)))


def test_incomplete_arms_are_named_beside_the_picture(suite):
    said = suite["ablation_curves"].alert
    assert said == f"diverged: {BROKEN} (1 of 3 seeds); could not be made: copied_arm"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "outcome",
    ["diverged", *(pytest.param(other, marks=pytest.mark.slow) for other in ("missing", "oom"))],
)
def test_draws_a_suite_whose_reference_never_completed(tmp_path, outcome):
    figures = drawn(write_suite(tmp_path, outcomes={(PLAIN, seed): outcome for seed in SEEDS}))
    for figure in figures.values():
        assert pictures.png(figure).startswith(b"\x89PNG")


def test_each_track_has_pictures_of_its_own(tmp_path):
    tracks = ("adam_none", "muon_none")
    gains = {PLAIN: (0.0,), GOOD: (-0.02,)}
    names = set(drawn(write_suite(tmp_path, tracks=tracks, gains=gains, versus={}, outcomes={})))
    for track in tracks:
        assert {
            f"ablation_steps_{track}",
            f"{GOOD}_{track}_groups",
        } <= names
    assert "ablation_steps" not in names


def test_an_arm_has_one_colour_in_every_picture(suite):
    steps, tightness = suite["ablation_steps"], suite["ablation_tightness"]
    for label, row in ((GOOD, 0), (TRAP, 1)):
        [line] = [
            m for m in tightness.axes[0].get_lines() if list(m.get_ydata()) == [row] and m.get_ms() == 6.5
        ]
        [name] = {t.get_color() for t in steps.axes[0].texts if t.get_text().startswith(label)}
        assert line.get_color() == name


def test_a_line_for_each_ebc_arm_of_what_its_clip_and_its_kl_did(suite):
    top, bottom = suite["ablation_steps"].axes
    for axes in (top, bottom):
        assert sorted(t.get_text().split("  ")[0] for t in axes.texts if "  " in t.get_text()) == [GOOD, TRAP]
    assert bottom.get_yscale() == "log"
    for axes, points in ((bottom, 4), (top, 40)):  # audits and steps of the run
        lines = [line for line in axes.get_lines() if len(line.get_xdata()) == points]
        faint = [line for line in lines if line.get_alpha() is not None]
        assert len(lines) - len(faint) == 2
        assert len(faint) == 2 * len(SEEDS)
        if axes is bottom:
            assert all(
                0.8 <= line.get_ydata()[0] <= 1.2 for line in lines
            )  # 0.008 to 0.012, of a target of 0.01
    assert len({line.get_linestyle() for line in lines if line.get_alpha() is None}) == 2


@pytest.mark.thorough
def test_no_text_of_a_suite_leaves_the_page(tmp_path):
    long = "a_label_that_" + "goes_on_" * 8
    gains = {PLAIN: (0.0, 0.0), GOOD: (-0.05, -0.04), long: (0.01, 0.02)}
    names = ("ablation_steps", "ablation_tightness", "ablation_curves")
    root = write_suite(tmp_path, gains=gains, versus={long: GOOD}, outcomes={}, ebc=(GOOD, long))
    figures = drawn(root, phone=names)
    assert {name + PHONE for name in names} < set(figures)
    for name, sheet in figures.items():
        check_sheet(sheet, name)

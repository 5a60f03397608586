"""The pictures of a small invented suite: the right files, and in them every arm where its figures put it."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure
from support.drawn import (
    GOOD,
    PLAIN,
    SEEDS,
    TRAP,
    check_sheet,
    drawn,
    write_suite,
)
from support.seen import assert_as_recorded, sheets_text

from ebc_lab.report import pictures
from ebc_lab.report.pictures.catalogue import PHONE


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> dict[str, Figure]:
    return drawn(write_suite(tmp_path_factory.mktemp("suite"), asked=("copied_arm",)))


def test_the_pictures_of_a_suite_are_as_they_were(suite):
    assert_as_recorded("pictures_suite", sheets_text(suite))


@pytest.mark.thorough
def test_of_many_arms_those_that_moved_most_or_end_lowest_are_named(tmp_path):
    """Each drifts, or lies off its target, by a share of its own."""
    gains = {f"arm{i}": (0.01 * (i - 4), 0.01 * (i - 3)) for i in range(11)}
    more = {
        f"arm{i}": ({"c_late": 0.5 + 0.04 * (i * 3 % 11), "kl_ratio_median": 0.6 + 0.1 * (i * 7 % 11)}, {})
        for i in range(11)
    }
    names = ("ablation_curves", "ablation_steps")
    root = write_suite(tmp_path, gains=gains, more=more, versus={}, outcomes={}, ebc=tuple(gains))
    assert_as_recorded("pictures_many_arms", sheets_text(drawn(root, *names, phone=names)))


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

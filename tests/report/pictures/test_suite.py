"""The pictures of a small invented suite: the right files, and in them every arm where its figures put it."""

from __future__ import annotations

import itertools
import json

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from support.drawn import (
    BROKEN,
    GAIN,
    GOOD,
    PLAIN,
    SEEDS,
    TRAP,
    check_page,
    check_phone,
    drawn,
    said_above,
    words_of,
    write_suite,
)

from ebc_lab.report import pictures
from ebc_lab.report.pictures import forest
from ebc_lab.report.pictures import suite as suite_module
from ebc_lab.report.pictures.catalogue import PHONE
from ebc_lab.report.pictures.curves import read_runs
from ebc_lab.report.pictures.sheet.figure import STYLE


def row_of(figure: Figure, label: str) -> tuple[float, list[str]]:
    """The height of an arm's row in the forest plot, and everything that stands in it."""
    texts = figure.axes[0].texts
    y = next(
        t.xy[1]
        for t in texts
        if t.get_text().split(" ")[0] == label and hasattr(t, "xy") and t.get_weight() == "bold"
    )
    return y, [t.get_text() for t in texts if (t.xy[1] if hasattr(t, "xy") else t.get_position()[1]) == y]


def marks_of(figure: Figure, y: float) -> dict[str, list[float]]:
    """Marker -> where it stands in row `y`; the seeds' points stand a little under it."""
    found: dict[str, list[float]] = {}
    for line in figure.axes[0].get_lines():
        at = np.atleast_1d(line.get_ydata())
        if len(at) and np.allclose(at, y):
            found.setdefault(str(line.get_marker()), []).extend(np.atleast_1d(line.get_xdata()).tolist())
        if len(at) and np.allclose(at, y + 0.2):
            found["seeds"] = np.atleast_1d(line.get_xdata()).tolist()
    return found


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> dict[str, Figure]:
    return drawn(write_suite(tmp_path_factory.mktemp("suite"), asked=("copied_arm",)))


@pytest.mark.slow
def test_a_suite_draws_the_same_each_time(tmp_path):
    root = write_suite(tmp_path)
    written = pictures.draw_study(root)
    first = {path: path.read_bytes() for path in written}
    assert {path: path.read_bytes() for path in pictures.draw_study(root)} == first


def test_a_suite_draws_its_arms_together_and_each_alone(suite):
    kinds = {f"{arm}_loss" for arm in GAIN}
    kinds |= {f"{arm}_{kind}" for arm in (GOOD, TRAP) for kind in ("clip", "kl", "groups")}
    assert set(suite) == kinds | {"ablation", "ablation_steps", "ablation_tightness", "ablation_curves"}


def test_the_forest_has_a_row_for_each_arm_best_first_diverged_last(suite):
    rows = {label: row_of(suite["ablation"], label)[0] for label in GAIN}
    assert sorted(rows, key=rows.__getitem__) == [GOOD, PLAIN, TRAP, BROKEN]


def test_a_row_shows_the_paired_difference_its_interval_and_each_seed(suite):
    y, words = row_of(suite["ablation"], GOOD)
    marks = marks_of(suite["ablation"], y)
    half = 4.302652729911275 * 0.01 / 3**0.5  # t(2), 97.5%; the differences' deviation is 0.01
    assert marks["o"] == pytest.approx([-0.04])
    assert marks["None"] == pytest.approx(
        2 * [-0.04 - half, -0.04 + half]
    )  # the joint interval of one comparison is its own
    assert marks["seeds"] == pytest.approx([-0.05, -0.04, -0.03])
    assert words == [GOOD, f"what {GOOD} is", f"−0.040 ± {half:.3f}", "1.960", "1.960"]


def test_an_arm_compared_with_another_than_the_reference_says_so(suite):
    y, words = row_of(suite["ablation"], TRAP)
    assert f"{TRAP}  (vs {GOOD})" in words
    assert marks_of(suite["ablation"], y)["D"] == pytest.approx([0.1])
    assert marks_of(suite["ablation"], y)["seeds"] == pytest.approx([0.11, 0.09, 0.1])


def test_the_reference_is_zero_and_zero_names_its_loss(suite):
    assert "0 = plain_arm, test loss 2.000" in words_of(suite["ablation"])
    y, words = row_of(suite["ablation"], PLAIN)
    assert marks_of(suite["ablation"], y)["s"] == [0.0]
    assert "reference" in words


def test_a_diverged_arm_is_a_cross_at_the_right_edge_with_words(suite):
    y, words = row_of(suite["ablation"], BROKEN)
    marks = marks_of(suite["ablation"], y)
    assert marks["x"] == [0.985]
    assert marks["s"] == pytest.approx([0.1])  # the median, by rank
    assert "None" not in marks  # three seeds have no interval by rank
    assert "1 of 3 seeds diverged" in words
    assert marks["seeds"] == pytest.approx([0.1, 0.1])
    header = said_above(suite["ablation"])
    assert header[1] == "Adam: every arm against plain_arm, paired seed by seed"  # the page says the question
    assert header[-1] == f"diverged: {BROKEN} (1 of 3 seeds); could not be made: copied_arm"


def test_an_outlier_leaves_the_axis_and_is_pointed_to(tmp_path):
    near = {f"near{i}": (0.01 * i, 0.01 * i + 0.01, 0.01 * i - 0.01) for i in range(5)}
    root = write_suite(
        tmp_path, gains={PLAIN: (0.0,) * 3, **near, "far": (3.0, 3.1, 3.2)}, versus={}, outcomes={}, ebc=()
    )
    figure = drawn(root, until="ablation")["ablation"]
    y, words = row_of(figure, "far")
    assert figure.axes[0].get_xlim()[1] < 1
    assert marks_of(figure, y)[">"] == [0.985]
    assert "+3.100 ± 0.248" in words


def test_an_interval_that_the_axis_cuts_has_an_arrow_at_the_cut_end(tmp_path):
    """The mean lies inside, one end of the interval does not: without an arrow it would seem to end there."""
    near = {f"near{i}": (0.01 * i, 0.01 * i + 0.01, 0.01 * i - 0.01) for i in range(5)}
    wide = {"wide": (-0.4, 0.45, 0.05)}
    root = write_suite(tmp_path, gains={PLAIN: (0.0,) * 3, **near, **wide}, versus={}, outcomes={}, ebc=())
    figure = drawn(root, until="ablation")["ablation"]
    low, high = figure.axes[0].get_xlim()
    marks = marks_of(figure, row_of(figure, "wide")[0])
    assert low < 0.033 < high < 0.4
    assert set(marks["<"]) == {0.015}
    assert set(marks[">"]) == {0.985}
    assert "arrow: goes on beyond the axis, see its figure" in words_of(figure)
    whole = marks_of(figure, row_of(figure, "near1")[0])
    assert not {"<", ">"} & set(whole)


def test_of_a_mean_beyond_the_axis_the_part_of_its_interval_that_lies_inside_is_drawn(tmp_path):
    near = {f"near{i}": (0.01 * i, 0.01 * i + 0.01, 0.01 * i - 0.01) for i in range(5)}
    wide = {"wide": (-1.2, -0.1, -0.2)}
    root = write_suite(tmp_path, gains={PLAIN: (0.0,) * 3, **near, **wide}, versus={}, outcomes={}, ebc=())
    figure = drawn(root, until="ablation")["ablation"]
    low, high = figure.axes[0].get_xlim()
    assert -0.5 < low < high < 1, "the mean, -0.5, lies beyond, and both limits do"
    marks = marks_of(figure, row_of(figure, "wide")[0])
    assert marks["<"] == [0.015]
    assert marks[">"] == [0.985]
    assert marks["None"][:2] == [low, high]


def test_one_comparison_is_not_called_all_comparisons(tmp_path):
    root = write_suite(tmp_path, gains={PLAIN: (0.0, 0.0), GOOD: (-0.05, -0.04)}, versus={}, outcomes={})
    words = words_of(drawn(root, until="ablation")["ablation"])
    assert not any("comparisons together" in text for text in words)
    assert any("Of 1 interval 0 lie" in text or "95%: " in text for text in words)
    assert not any("1 intervals" in text for text in words)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "outcome",
    ["diverged", *(pytest.param(other, marks=pytest.mark.slow) for other in ("missing", "oom"))],
)
def test_draws_a_suite_whose_reference_never_completed(tmp_path, outcome):
    figures = drawn(write_suite(tmp_path, outcomes={(PLAIN, seed): outcome for seed in SEEDS}))
    _, words = row_of(figures["ablation"], GOOD)
    said = {"diverged": "plain_arm diverged in 3 of 3 seeds"}.get(outcome, "no pair of seeds to compare")
    assert said in words
    assert "0 = plain_arm, which has no test loss" in words_of(figures["ablation"])
    for figure in figures.values():
        assert pictures.png(figure).startswith(b"\x89PNG")


def test_one_seed_has_a_mean_and_no_interval(tmp_path):
    figure = drawn(
        write_suite(tmp_path, gains={PLAIN: (0.0,), GOOD: (-0.02,)}, outcomes={}), until="ablation"
    )["ablation"]
    y, words = row_of(figure, GOOD)
    assert "−0.020" in words
    assert marks_of(figure, y)["o"] == pytest.approx([-0.02])
    assert any("one seed: no interval" in text for text in words_of(figure))


def test_each_track_has_pictures_of_its_own(tmp_path):
    tracks = ("adam_none", "muon_none")
    gains = {PLAIN: (0.0,), GOOD: (-0.02,)}
    names = set(drawn(write_suite(tmp_path, tracks=tracks, gains=gains, versus={}, outcomes={})))
    for track in tracks:
        assert {
            f"ablation_{track}",
            f"ablation_steps_{track}",
            f"{GOOD}_{track}_loss",
            f"{GOOD}_{track}_kl",
        } <= names
    assert "ablation" not in names


def test_the_loss_is_drawn_against_the_arm_that_it_is_paired_with(suite):
    assert any(
        text.startswith(f"target: {GOOD}'s final validation loss") for text in words_of(suite[f"{TRAP}_loss"])
    )
    assert f"{GOOD}, validation" in words_of(suite[f"{TRAP}_loss"])
    assert f"{PLAIN}, validation" not in words_of(suite[f"{PLAIN}_loss"])
    header = said_above(suite[f"{TRAP}_loss"])
    assert header[1] == f"{TRAP}: what {TRAP} is"
    assert "test loss +0.100 ± 0.025" in header[2]


def test_a_line_for_each_ebc_arm_of_what_its_clip_and_its_kl_did(suite):
    top, bottom = suite["ablation_steps"].axes[1], suite["ablation_steps"].axes[0]
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


def test_of_many_ebc_arms_those_that_moved_most_are_named(tmp_path):
    gains = {PLAIN: (0.0,), **{f"arm{i}": (0.01 * i,) for i in range(1, 22)}}
    ebc = [label for label in gains if label != PLAIN]
    root = write_suite(tmp_path, gains=gains, versus={}, outcomes={}, ebc=ebc)
    figures = drawn(root, until="ablation")  # and not the pictures of 21 arms
    facts = pictures.facts_of(json.loads((root / "study.json").read_text()))
    decision = json.loads((root / "auto_decisions.json").read_text())["ablation"]
    arms = {label: decision["tracks"]["adam_none"]["arms"][label] for label in ebc}
    courses = {label: suite_module.course_of(read_runs(root, arm)) for label, arm in arms.items()}
    with matplotlib.rc_context(fname=STYLE):
        figures["ablation_steps"] = suite_module.draw_steps(facts, "adam_none", arms, courses)
    named = {text.get_text().split("  ")[0] for text in figures["ablation_steps"].axes[1].texts}
    # the farthest from their targets; as many for the drift of c, the same for all here
    assert {"arm19", "arm20", "arm21"} < named
    assert len(named) == 6
    assert any(text.startswith("15 other arms") for text in words_of(figures["ablation_steps"]))
    figure = figures["ablation"]
    figure.draw_without_rendering()
    tops = [figure.axes[0].transData.transform((0, row_of(figure, label)[0]))[1] for label in gains]
    assert min(b - a for a, b in itertools.pairwise(sorted(tops))) > 25  # pixels: two lines of words


def test_no_text_of_a_suite_leaves_the_page(tmp_path):
    long = "a_label_that_" + "goes_on_" * 8
    gains = {PLAIN: (0.0, 0.0), GOOD: (-0.05, -0.04), long: (0.01, 0.02)}
    names = ("ablation", "ablation_steps", "ablation_tightness", "ablation_curves", f"{long}_loss")
    root = write_suite(tmp_path, gains=gains, versus={long: GOOD}, outcomes={}, ebc=(GOOD, long))
    figures = drawn(root, phone=names)
    assert any(text.endswith(f"(vs {GOOD})") for text in words_of(figures["ablation"]))
    for name in names:
        check_page(figures[name], name)
        check_phone(figures[name + PHONE], name)


def test_signs_are_those_of_print():
    assert [forest.signed(x) for x in (-0.0314, 0.0004, 0.02)] == ["−0.031", "0.000", "+0.020"]

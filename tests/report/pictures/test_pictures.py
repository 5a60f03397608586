"""The pictures of a small invented study: the right files, complete, the same each time, whatever became of
its runs."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys

import matplotlib
import matplotlib.image
import pytest
from support.drawn import (
    ARMS,
    BASELINE,
    CONTROL,
    FALLING,
    OF_A_TRACK,
    check_phone,
    drawn,
    expected_names,
    header_of,
    said_above,
    words_of,
    write_study,
)

from ebc_lab.report import pictures
from ebc_lab.report.pictures.catalogue import PHONE
from ebc_lab.report.pictures.render import png
from ebc_lab.report.pictures.sheet.place import spread


@pytest.mark.slow
def test_draws_every_picture_of_a_study_the_same_each_time(tmp_path):
    root = write_study(tmp_path)
    before, settings = set(tmp_path.iterdir()), dict(matplotlib.rcParams)
    written = pictures.draw_study(root)
    names = expected_names("adam_none")
    files = {f"{name}{ending}" for name in names for ending in (".png", ".svg", "_phone.svg")}
    assert {path.name for path in written} == files | {"figures.json"}
    assert set(tmp_path.iterdir()) == before | set(written)
    first = {path: path.read_bytes() for path in written}
    assert {path: path.read_bytes() for path in pictures.draw_study(root)} == first
    assert dict(matplotlib.rcParams) == settings


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
        for kind in ("loss", "clip", "kl"):
            header = said_above(figures[f"adam_none_{arm}_{kind}"])
            assert any(f"seed {seed} {said}" in line for line in header)
    together = ("efficiency", "finals")
    for name in (*(f"adam_none_{FALLING}_{kind}" for kind in ("loss", "clip", "kl")), *together):
        image = matplotlib.image.imread(io.BytesIO(png(figures[name])), format="png")
        assert image.shape[:2] == (round(figures[name].bbox.height), round(figures[name].bbox.width))


AWKWARD = ("adam_spectral", "muon_spectral")
LOOKED_AT = [f"muon_spectral_{arm}_{kind}" for arm in (CONTROL, FALLING) for kind in ("loss", "clip", "kl")]
LOOKED_AT += [f"{name}_muon_spectral" for name in OF_A_TRACK]
LOOKED_AT += [f"muon_spectral_{FALLING}_groups", "lr_sweep"]


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
    for name in LOOKED_AT:
        check_phone(awkward[name + PHONE], name)
        figure = awkward[name]
        figure.draw_without_rendering()
        used = figure.get_tightbbox()
        assert 0 <= used.x0 < used.x1 <= figure.get_figwidth(), name
        assert 0 <= used.y0 < used.y1 <= figure.get_figheight(), name
        assert not any("…" in text for text in words_of(figure)), name
        header = [text.get_window_extent() for text in header_of(figure)]
        assert all(above.y0 >= below.y1 for above, below in itertools.pairwise(header))
        boxes = [axes.get_tightbbox() for axes in figure.axes]
        assert header[-1].y0 >= max(box.y1 for box in boxes), f"{name}: the header reaches into the axes"
        for legend in figure.legends:
            assert legend.get_window_extent().y1 <= min(box.y0 for box in boxes), (
                f"{name}: the key covers the axes"
            )


@pytest.mark.thorough
def test_needs_neither_torch_nor_pandas_nor_pyplot():
    banned = "{'torch', 'pandas', 'matplotlib.pyplot'}"
    script = f"import sys, ebc_lab.report.pictures; print(sorted({banned} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_labels_are_spread_in_order_and_stay_on_the_page():
    places = spread([0.1, 0.11, 0.12, 0.98, 0.99], [0.05] * 5)
    assert places == pytest.approx([0.1, 0.15, 0.2, 0.95, 1.0])
